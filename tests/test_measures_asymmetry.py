"""The asymmetry factor against closed forms and against a second, stateless version of it."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from samlib import data as data_of
from samlib import spec as specs_of
from samlib import train
from samlib.errors import InputError
from samlib.measures import WeightLoss
from samlib.measures.asymmetry import MULTIPLES, SLICE, asymmetry_factors, norm, random_directions
from samlib.spec import DataSpec, MeasureSpec, ModelSpec, RunSpec, TrainSpec
from samlib.store import Store


class OneWeight(nn.Module):
    """Two classes, logits (-f(w), 0) for any input: the loss of class 0 is log(1 + exp(f(w))), so L has the shape of f.

    The weight is the single number 0, and the only direction of length 1 on [0, 1] is +1.
    """

    def __init__(self, f):
        super().__init__()
        self.f, self.w = f, nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        logit = -self.f(self.w)
        return torch.cat([logit, torch.zeros_like(logit)]).expand(len(x), 2)


def one_weight(f) -> WeightLoss:
    return WeightLoss(OneWeight(f), torch.zeros(3, 1, dtype=torch.float64), torch.zeros(3, dtype=torch.long))


def softplus(value: float) -> float:
    return math.log1p(math.exp(value))


def cnn(seed: int = 0) -> nn.Module:
    """Batch norm with running statistics that are not their defaults, and tensors of one, two and four axes."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(1, 3, 3, bias=False), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4))
    net[1].running_mean.normal_()
    net[1].running_var.uniform_(0.5, 2.0)
    return net.double()


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn((7, 1, 4, 4), generator=generator, dtype=torch.float64)
    return x, torch.randint(4, (7,), generator=generator)


def flat(tensors) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])


# ---------------------------------------------------------------------------------------------- closed forms


@pytest.mark.parametrize("mu", [0.1, 1.0, 3.0])
def test_two_slopes_of_one_weight(mu):
    """f = 2w to the right of 0 and -w to the left: the changes are in closed form, and the left one is the smaller."""
    loss = one_weight(lambda w: torch.maximum(2 * w, -w))
    (found,) = asymmetry_factors(loss, [mu], directions=4)
    plus, minus = softplus(2 * mu) - math.log(2), softplus(mu) - math.log(2)
    assert found == {
        "mu": mu,
        "asymmetry_factor": pytest.approx(minus / plus, rel=1e-12),
        "no_minimum": 0.0,
        "rise_plus": pytest.approx(plus, rel=1e-12),
        "rise_minus": pytest.approx(minus, rel=1e-12),
    }


def test_an_even_loss_is_symmetric():
    (found,) = asymmetry_factors(one_weight(torch.square), [1.5])
    assert (found["asymmetry_factor"], found["no_minimum"]) == (1.0, 0.0)


def test_where_one_change_is_negative_so_is_the_factor():
    """No minimum along the direction, and nothing is clipped (errata E-B8): not to 0, not to 1, not left out."""
    (found,) = asymmetry_factors(one_weight(lambda w: w), [1.0], directions=2)
    down, up = softplus(-1) - math.log(2), softplus(1) - math.log(2)
    assert found["asymmetry_factor"] == pytest.approx(down / up, rel=1e-12)
    assert found["asymmetry_factor"] < 0
    assert found["no_minimum"] == 1.0


def test_where_both_are_negative_the_factor_is_above_one():
    (found,) = asymmetry_factors(one_weight(lambda w: -torch.maximum(2 * w, -w)), [1.0], directions=2)
    down, less = softplus(-2) - math.log(2), softplus(-1) - math.log(2)
    assert found["asymmetry_factor"] == pytest.approx(down / less, rel=1e-12)
    assert found["asymmetry_factor"] > 1
    assert found["no_minimum"] == 1.0


def test_a_loss_that_does_not_change_or_is_not_finite_has_no_factor():
    (flat_loss,) = asymmetry_factors(one_weight(lambda w: 0 * w), [1.0])
    assert math.isnan(flat_loss["asymmetry_factor"])
    assert flat_loss["no_minimum"] == 1.0
    (infinite,) = asymmetry_factors(one_weight(lambda w: torch.where(w > 0, math.inf, w * w)), [1.0])
    assert math.isnan(infinite["asymmetry_factor"])
    diverged = one_weight(torch.square)
    nn.init.constant_(diverged.model.w, math.nan)
    assert math.isnan(asymmetry_factors(diverged, [1.0])[0]["asymmetry_factor"])


# ---------------------------------------------------------------------------------------------- written a second time


@pytest.mark.parametrize("law", ["uniform01", "gaussian"])
def test_mean_over_directions_of_a_network_in_eval_mode(law):
    model, (x, y) = cnn(), data()
    loss = WeightLoss(model, x, y, batch_size=3)
    found = asymmetry_factors(loss, [0.3, 2.0], directions=5, law=law, seed=7)

    generator = torch.Generator().manual_seed(7)
    draw = torch.rand if law == "uniform01" else torch.randn
    named = {name: p.detach() for name, p in model.named_parameters()}
    buffers = dict(model.named_buffers())
    model.eval()

    def value(vector: Tensor) -> float:
        parts = dict(zip(named, vector.split([p.numel() for p in named.values()]), strict=True))
        weights = {name: parts[name].view_as(p) for name, p in named.items()}
        return F.cross_entropy(functional_call(model, weights | buffers, (x,)), y).item()

    w = flat(named.values())
    units = []
    for _ in range(5):
        entries = torch.cat([draw(p.shape, generator=generator).flatten() for p in named.values()]).double()
        units.append(entries / entries.square().sum().sqrt())
    for row in found:
        changes = np.array([[value(w + sign * row["mu"] * u) - value(w) for sign in (1, -1)] for u in units])
        assert row["asymmetry_factor"] == pytest.approx(np.mean(changes.min(1) / changes.max(1)), rel=1e-6)
        assert row["no_minimum"] == np.mean(changes.min(1) <= 0)
        assert [row["rise_plus"], row["rise_minus"]] == pytest.approx(changes[0], rel=1e-6)


def test_the_model_is_left_as_it_was():
    model = cnn().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    asymmetry_factors(WeightLoss(model, *data()), [0.5, 5.0], directions=3)
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


# ---------------------------------------------------------------------------------------------- directions


def test_published_directions_are_nearly_one_and_gaussian_ones_are_not():
    """E-B7: the cosine of two directions is E[u]^2 / E[u^2] = 3/4, and that with the vector of ones sqrt(3)/2."""
    weights = [torch.zeros(50, 40), torch.zeros(3000)]
    ones = torch.ones(5000)
    for law, between, with_ones in (("uniform01", 0.75, 0.75**0.5), ("gaussian", 0.0, 0.0)):
        a, b, *_ = map(flat, random_directions(weights, 3, law=law))
        assert torch.cosine_similarity(a, b, 0).item() == pytest.approx(between, abs=0.05)
        assert torch.cosine_similarity(a, ones, 0).item() == pytest.approx(with_ones, abs=0.05)


def test_all_models_of_one_shape_are_given_the_same_directions():
    """E-B21; and they are the same whatever the precision of the weights, and the first ones of a longer list."""
    single, double = [torch.ones(3, 2), torch.ones(4)], [torch.zeros(3, 2).double(), torch.zeros(4).double()]
    few, many = random_directions(single, 2, seed=3), random_directions(double, 5, seed=3)
    for u, v in zip(few, many, strict=False):
        assert torch.equal(flat(u).double(), flat(v))
    assert not torch.equal(flat(few[0]), flat(few[1]))
    assert not torch.equal(flat(few[0]), flat(random_directions(single, 1, seed=4)[0]))


def test_the_global_generator_is_left_alone():
    torch.manual_seed(5)
    random_directions([torch.zeros(3)], 2)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(1))


def test_filter_normalised_directions_do_not_see_the_scale_of_weights_before_batch_norm():
    """Twice the filters and running statistics to match make the same function; a step of length 1 tells them apart."""
    losses = []
    for factor in (1.0, 4.0):
        model = cnn()
        with torch.no_grad():
            model[0].weight.mul_(factor)
            model[1].running_mean.mul_(factor)
            model[1].running_var.add_(1e-5).mul_(factor**2).sub_(1e-5)  # eps of batch norm is not scaled
        losses.append(WeightLoss(model, *data()))
    one, four = (asymmetry_factors(loss, [0.3, 1.0], directions=3, scale="filter") for loss in losses)
    for a, b in zip(one, four, strict=True):
        assert a == pytest.approx(b, rel=1e-9)
    one, four = (asymmetry_factors(loss, [0.3], directions=3)[0]["rise_plus"] for loss in losses)
    assert abs(one / four - 1) > 0.01


def test_with_filters_each_filter_moves_by_its_own_length_and_tensors_of_one_axis_stay(monkeypatch):
    model, seen = cnn(), []
    loss = WeightLoss(model, *data())
    w = [p.clone() for p in loss.weights()]
    measured = WeightLoss.value

    def noted(self):
        seen.append([p.clone() for p in self.weights()])
        return measured(self)

    monkeypatch.setattr(WeightLoss, "value", noted)
    asymmetry_factors(loss, [0.5], directions=1, scale="filter")
    at_w, plus, minus = seen
    for before, centre, up, down in zip(w, at_w, plus, minus, strict=True):
        assert torch.equal(before, centre)
        torch.testing.assert_close(up + down, 2 * before)
        step = (up - before).flatten(1).norm(dim=1) if before.ndim > 1 else (up - before).abs()
        wanted = 0.5 * before.flatten(1).norm(dim=1) if before.ndim > 1 else torch.zeros_like(before)
        torch.testing.assert_close(step, wanted)


def test_norm_is_over_all_tensors_together():
    assert norm([torch.tensor([3.0]), torch.tensor([[4.0]])]).item() == pytest.approx(5)


def test_the_multiples_hold_mu_itself_and_that_of_the_slices():
    assert 1.0 in MULTIPLES
    assert SLICE in MULTIPLES
    assert SLICE == 2 / 5  # the paper's |mu| = 2 beside mu = 5
    assert list(MULTIPLES) == sorted(MULTIPLES)


@pytest.mark.parametrize(
    ("mus", "settings", "message"),
    [
        ([], {}, r"mus: \[\]"),
        ([0.0], {}, r"mus: \[0.0\]"),
        ([1.0, math.inf], {}, "mus: .*inf"),
        ([math.nan], {}, "mus: .*nan"),
        ([1.0], {"directions": 0}, "directions: 0"),
        ([1.0], {"law": "cauchy"}, "law: 'cauchy' is unknown; choose one of uniform01, gaussian"),
        ([1.0], {"scale": "layer"}, "scale: 'layer' is unknown; choose one of unit, filter"),
    ],
)
def test_bad_input_is_named(mus, settings, message):
    with pytest.raises(InputError, match=message):
        asymmetry_factors(one_weight(torch.square), mus, **settings)


# ---------------------------------------------------------------------------------------------- as a record


def test_the_record_of_a_run_holds_the_factor_at_mu_and_a_table_of_its_multiples(tmp_path):
    run = RunSpec(DataSpec(train_size=60), ModelSpec("mlp", width=8), train=TrainSpec(epochs=2, batch_size=20))
    store = Store(tmp_path, writable=True)
    train.run(run, store, "cpu")
    spec = MeasureSpec(
        specs_of.key(run),
        "asymmetry_factor",
        split="test",
        mu=2.0,
        directions=3,
        direction_law="gaussian",
        direction_scale="filter",
    )
    found = train.run(spec, store, "cpu")

    splits = data_of.load(run.data, run.seed)
    model = train.trained_model(run, store, splits, torch.device("cpu"))
    loss = WeightLoss(model, splits.test.inputs, splits.test.labels, batch_size=1000)
    rows = asymmetry_factors(loss, [2.0 * m for m in MULTIPLES], directions=3, law="gaussian", scale="filter")
    assert found.table == {name: [row[name] for row in rows] for name in rows[0]}
    at_mu, at_slice = rows[MULTIPLES.index(1.0)], rows[MULTIPLES.index(SLICE)]
    assert found.measures == {
        "asymmetry_factor": at_mu["asymmetry_factor"],
        "no_minimum": at_mu["no_minimum"],
        "rise_plus": at_slice["rise_plus"],
        "rise_minus": at_slice["rise_minus"],
        "weight_norm": pytest.approx(flat(loss.weights()).norm().item(), rel=1e-6),
    }
    assert spec.column == (
        "asymmetry_factor@split=test@mu=2.0@directions=3@direction_law=gaussian@direction_scale=filter"
    )
