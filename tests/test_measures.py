"""The measures against dense Hessians, closed forms and hand-made roundings; the model is never changed by them."""

import copy
import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.sparse.linalg import eigsh
from torch import Tensor, nn
from torch.autograd.functional import hessian as dense_hessian
from torch.func import functional_call

from samlib.errors import InputError
from samlib.measures import WeightLoss, adversarial, effective_perturbation, lambda_max
from samlib.measures.precision import round_to_tf32


def mlp(seed: int = 0, width: int = 4) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 3)).double()


def cnn(seed: int = 0) -> nn.Module:
    """Batch norm, dropout, and running statistics that are not their defaults."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(12, 4)
    ).double()
    net[1].running_mean.normal_()
    net[1].running_var.uniform_(0.5, 2.0)
    return net


def data(shape: tuple[int, ...], classes: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    return x, torch.randint(classes, (shape[0],), generator=generator)


def dense(loss: WeightLoss, function) -> np.ndarray:
    """Dense Hessian of `function(flat weights)` at the weights of `loss`, by autograd."""
    flat = torch.cat([w.flatten() for w in loss.weights()])
    return dense_hessian(function, flat).numpy()


def loss_of_flat(model: nn.Module, x: Tensor, y: Tensor, weight_decay: float = 0.0, smoothing: float = 0.0):
    """The loss of WeightLoss written a second time: stateless, all examples at once, smoothing spelt out."""
    named = dict(model.named_parameters())
    sizes = [p.numel() for p in named.values()]

    def function(flat: Tensor) -> Tensor:
        parts = {k: v.view_as(p) for (k, p), v in zip(named.items(), flat.split(sizes), strict=True)}
        log_p = functional_call(model, parts, (x,)).log_softmax(1)
        nll = -(1 - smoothing) * log_p.gather(1, y[:, None]).mean() - smoothing * log_p.mean()
        return nll + 0.5 * weight_decay * flat.square().sum()

    return function


class QuadraticLogit(nn.Module):
    """Two classes, logits (-w'Dw, 0) for any input: at w = 0 the cross entropy of class 0 has the Hessian D."""

    def __init__(self, diagonal: list[float] | Tensor):
        super().__init__()
        self.register_buffer("diagonal", torch.as_tensor(diagonal, dtype=torch.float64))
        self.w = nn.Parameter(torch.zeros_like(self.diagonal))

    def forward(self, x: Tensor) -> Tensor:
        logit = -(self.diagonal * self.w.square()).sum()
        return torch.stack([logit, torch.zeros_like(logit)]).expand(len(x), 2)


def quadratic(diagonal, examples: int = 3) -> WeightLoss:
    zeros = torch.zeros(examples, dtype=torch.long)
    return WeightLoss(QuadraticLogit(diagonal), torch.zeros(examples, 1, dtype=torch.float64), zeros)


def state(model: nn.Module) -> dict:
    """Everything a measure must leave alone."""
    return {
        "tensors": {k: v.clone() for k, v in model.state_dict().items()},
        "modes": [m.training for m in model.modules()],
        "tracking": [m.track_running_stats for m in model.modules() if isinstance(m, nn.BatchNorm2d)],
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
    }


def assert_untouched(model: nn.Module, before: dict) -> None:
    after = state(model)
    assert after["modes"] == before["modes"]
    assert after["tracking"] == before["tracking"]
    for key, tensor in before["tensors"].items():
        assert torch.equal(after["tensors"][key], tensor), key
    for found, wanted in zip(after["grads"], before["grads"], strict=True):
        assert (found is None and wanted is None) or torch.equal(found, wanted)


class TestWeightLoss:
    @pytest.mark.parametrize("batch_size", [None, 3, 7, 100])
    def test_value_and_gradient_are_those_of_the_whole_data_however_it_is_batched(self, batch_size):
        model, (x, y) = mlp(), data((7, 3), 3)
        loss = WeightLoss(model, x, y, batch_size=batch_size, weight_decay=0.3, label_smoothing=0.2)
        flat = torch.cat([w.flatten() for w in loss.weights()]).requires_grad_()
        wanted = loss_of_flat(model, x, y, 0.3, 0.2)(flat)
        (gradient,) = torch.autograd.grad(wanted, flat)
        assert loss.value() == pytest.approx(wanted.item(), rel=1e-14)
        torch.testing.assert_close(torch.cat([g.flatten() for g in loss.gradient()]), gradient, rtol=1e-12, atol=1e-14)
        assert len(loss) == 7

    def test_works_inside_no_grad(self):
        loss = WeightLoss(mlp(), *data((7, 3), 3))
        with torch.no_grad():
            inside = loss.gradient()
        for a, b in zip(inside, loss.gradient(), strict=True):
            assert torch.equal(a, b)
            assert not a.requires_grad

    def test_frozen_weights_are_constants_and_unused_ones_have_gradient_zero(self):
        model = mlp()
        model[0].weight.requires_grad_(False)
        model.register_parameter("unused", nn.Parameter(torch.ones(2, dtype=torch.float64)))
        loss = WeightLoss(model, *data((7, 3), 3))
        assert len(loss.weights()) == 4
        assert any(not g.any() for g in loss.gradient())
        with pytest.raises(InputError, match="requires_grad"):
            WeightLoss(mlp().requires_grad_(False), *data((7, 3), 3))

    def test_eval_mode_uses_running_statistics_and_no_dropout(self):
        model, (x, y) = cnn().train(), data((9, 1, 4, 4), 4)
        wanted = F.cross_entropy(copy.deepcopy(model).eval()(x), y).item()
        assert WeightLoss(model, x, y, batch_size=4).value() == pytest.approx(wanted, rel=1e-14)

    def test_train_mode_uses_the_statistics_of_each_batch_and_no_dropout(self):
        model, (x, y) = cnn().eval(), data((9, 1, 4, 4), 4)
        control = copy.deepcopy(model).train()
        control[3].eval()
        batches = zip(x.split(4), y.split(4), strict=True)
        wanted = sum(F.cross_entropy(control(a), b, reduction="sum").item() for a, b in batches) / 9
        assert WeightLoss(model, x, y, batch_size=4, train_mode=True).value() == pytest.approx(wanted, rel=1e-14)

    @pytest.mark.parametrize("train_mode", [False, True])
    def test_leaves_modes_buffers_and_gradients_alone(self, train_mode):
        model, (x, y) = cnn().train(), data((9, 1, 4, 4), 4)
        model[1].eval()
        F.cross_entropy(model(x), y).backward()
        before = state(model)
        loss = WeightLoss(model, x, y, batch_size=4, train_mode=train_mode)
        loss.value_and_gradient()
        lambda_max(loss)
        adversarial(loss, 0.1, steps=3, shard_size=4, adaptive=True)
        assert_untouched(model, before)

    @pytest.mark.parametrize("train_mode", [False, True])
    def test_leaves_the_model_alone_when_a_pass_fails(self, train_mode):
        model, (x, y) = cnn().train(), data((9, 1, 4, 4), 4)
        y[-1] = 99  # no such class: the last batch raises after the first has passed
        before = state(model)
        loss = WeightLoss(model, x, y, batch_size=4, train_mode=train_mode)
        for measure in (loss.value, loss.gradient, lambda: lambda_max(loss), lambda: adversarial(loss, 0.1)):
            with pytest.raises(IndexError):
                measure()
            assert_untouched(model, before)

    def test_at_moves_the_weights_and_restores_them_bit_for_bit(self):
        model, (x, y) = cnn().train(), data((9, 1, 4, 4), 4)
        before, loss = state(model), WeightLoss(model, x, y)
        eps = [0.1 * torch.randn_like(w) for w in loss.weights()]
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for p, e in zip(moved.parameters(), eps, strict=True):
                p.add_(e)
        with loss.at(eps) as same:
            assert same.value() == pytest.approx(WeightLoss(moved, x, y).value(), rel=1e-14)
            with loss.at(eps):
                assert loss.value() != WeightLoss(moved, x, y).value()
            assert loss.value() == WeightLoss(moved, x, y).value()
            model(x)  # train mode: the running statistics move inside the block
        assert_untouched(model, before)

    def test_at_restores_after_an_error(self):
        model, (x, y) = cnn().train(), data((9, 1, 4, 4), 4)
        before, loss = state(model), WeightLoss(model, x, y)
        with pytest.raises(RuntimeError), loss.at([torch.ones_like(w) for w in loss.weights()]):
            model(torch.cat([model(x), x]))  # the running statistics move, then the shapes do not fit
        assert_untouched(model, before)

    def test_shards_are_consecutive_and_the_last_is_ragged(self):
        x, y = data((7, 3), 3)
        loss = WeightLoss(mlp(), x, y, batch_size=2, weight_decay=0.1, label_smoothing=0.1)
        shards = loss.shards(3)
        assert [len(s) for s in shards] == [3, 3, 1]
        assert torch.equal(torch.cat([s.inputs for s in shards]), x)
        mean = sum(len(s) * s.value() for s in shards) / 7
        assert mean == pytest.approx(loss.value(), rel=1e-14)

    def test_bad_input_is_named(self):
        model, (x, y) = mlp(), data((7, 3), 3)
        with pytest.raises(InputError, match="targets: 6 for 7 inputs"):
            WeightLoss(model, x, y[:6])
        with pytest.raises(InputError, match="targets: 0"):
            WeightLoss(model, x[:0], y[:0])
        with pytest.raises(InputError, match="batch_size: 0"):
            WeightLoss(model, x, y, batch_size=0)
        with pytest.raises(InputError, match=r"shard_size: 2\.5"):
            WeightLoss(model, x, y).shards(2.5)
        with pytest.raises(InputError, match="eps: shapes"), WeightLoss(model, x, y).at([torch.zeros(())] * 4):
            pass


class TestLambdaMax:
    @pytest.mark.parametrize("batch_size", [None, 3, 7])
    @pytest.mark.parametrize(("weight_decay", "smoothing"), [(0.0, 0.0), (0.7, 0.0), (0.0, 0.3)])
    def test_equals_the_dense_hessian(self, batch_size, weight_decay, smoothing):
        model, (x, y) = mlp(), data((7, 3), 3)
        loss = WeightLoss(model, x, y, batch_size=batch_size, weight_decay=weight_decay, label_smoothing=smoothing)
        top = np.linalg.eigvalsh(dense(loss, loss_of_flat(model, x, y, weight_decay, smoothing)))[-1]
        found = lambda_max(loss, tolerance=1e-9)
        assert found["lambda_max"] == pytest.approx(top, rel=1e-10)
        assert found["converged"]
        assert found["residual"] < 1e-7

    def test_default_tolerance_is_good_to_five_digits(self):
        model, (x, y) = mlp(width=16), data((60, 3), 3)
        loss = WeightLoss(model, x, y)
        top = np.linalg.eigvalsh(dense(loss, loss_of_flat(model, x, y)))[-1]
        found = lambda_max(loss)
        assert found["lambda_max"] == pytest.approx(top, rel=1e-5)
        assert found["residual"] < 2e-3
        assert found["products"] < 60

    def test_batch_norm_in_train_mode_equals_its_dense_hessian(self):
        torch.manual_seed(0)
        model, (x, y) = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double(), data((8, 3), 3)
        stateless = copy.deepcopy(model).train()
        stateless[1].track_running_stats = False
        loss = WeightLoss(model.eval(), x, y, train_mode=True)
        top = np.linalg.eigvalsh(dense(loss, loss_of_flat(stateless, x, y)))[-1]
        assert lambda_max(loss, tolerance=1e-9)["lambda_max"] == pytest.approx(top, rel=1e-9)

    def test_softmax_regression_has_its_closed_form(self):
        """H = 1/N sum_i (diag(p_i) - p_i p_i') kron x_i x_i'."""
        torch.manual_seed(0)
        model, (x, y) = nn.Linear(5, 4, bias=False).double(), data((11, 5), 4)
        p = model(x).softmax(1).detach()
        blocks = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        terms = [torch.kron(b, torch.outer(v, v)) for b, v in zip(blocks, x, strict=True)]
        top = torch.linalg.eigvalsh(sum(terms) / 11)[-1].item()
        assert lambda_max(WeightLoss(model, x, y, batch_size=4), tolerance=1e-9)["lambda_max"] == pytest.approx(top)

    def test_logistic_regression_at_zero_is_half_the_second_moment_of_the_inputs(self):
        x, y = data((50, 6), 2)
        model = nn.Linear(6, 2, bias=False).double()
        nn.init.zeros_(model.weight)
        top = 0.5 * torch.linalg.eigvalsh(x.T @ x / 50)[-1].item()
        assert lambda_max(WeightLoss(model, x, y), tolerance=1e-9)["lambda_max"] == pytest.approx(top)

    @pytest.mark.parametrize("between", [0, 40])  # 2 weights: dense; 42: Lanczos
    def test_largest_is_algebraic_not_in_magnitude(self, between):
        loss = quadratic([1.0, *np.linspace(-4, 0.5, between), -5.0])
        assert lambda_max(loss, tolerance=1e-6)["lambda_max"] == pytest.approx(1.0, rel=1e-9)

    def test_negative_definite_hessian(self):
        assert lambda_max(quadratic(np.linspace(-9, -2, 30)), tolerance=1e-6)["lambda_max"] == pytest.approx(-2)

    def test_hessian_of_zeros(self):
        for size in (3, 30):
            found = lambda_max(quadratic(np.zeros(size)))
            assert (found["lambda_max"], found["residual"], found["converged"]) == (0, 0, True)

    def test_weights_without_influence_do_not_matter(self):
        model, (x, y) = mlp(), data((7, 3), 3)
        before = lambda_max(WeightLoss(model, x, y), tolerance=1e-9)["lambda_max"]
        model.register_parameter("unused", nn.Parameter(torch.ones(2, dtype=torch.float64)))
        assert lambda_max(WeightLoss(model, x, y), tolerance=1e-9)["lambda_max"] == pytest.approx(before)

    def test_same_seed_same_number(self):
        loss = WeightLoss(mlp(width=16), *data((60, 3), 3), batch_size=25)
        assert lambda_max(loss, seed=3) == lambda_max(loss, seed=3)
        assert lambda_max(loss, seed=3)["lambda_max"] == pytest.approx(lambda_max(loss, seed=4)["lambda_max"], rel=1e-5)
        assert lambda_max(loss, seed=3)["residual"] != lambda_max(loss, seed=4)["residual"]

    def test_says_when_it_did_not_converge(self):
        found = lambda_max(quadratic(np.linspace(0, 1, 200)), iterations=1, tolerance=1e-12)
        assert np.isnan([found["lambda_max"], found["residual"]]).all()
        assert not found["converged"]
        assert found["products"] > 5

    def test_diverged_model_is_nan(self):
        model = mlp()
        nn.init.constant_(model[2].weight, math.nan)
        found = lambda_max(WeightLoss(model, *data((7, 3), 3)))
        assert math.isnan(found["lambda_max"])
        assert not found["converged"]

    def test_agrees_with_curvlinops(self):
        """An independent library, on a convolutional net with batch norm and a ragged last batch."""
        model, (x, y) = cnn().eval(), data((10, 1, 4, 4), 4)
        batches = list(zip(x.split(4), y.split(4), strict=True))
        with warnings.catch_warnings():  # curvlinops scripts some functions when it is imported
            warnings.filterwarnings("ignore", r"`torch\.jit\.script", FutureWarning)
            warnings.filterwarnings("ignore", r"`torch\.jit\.script", DeprecationWarning)
            from curvlinops import HessianLinearOperator

            weights = list(model.parameters())
            operator = HessianLinearOperator(model, nn.CrossEntropyLoss(), weights, batches, check_deterministic=False)
            (top,) = eigsh(operator.to_scipy(), 1, which="LA", tol=1e-10, return_eigenvectors=False)
        assert lambda_max(WeightLoss(model, x, y), tolerance=1e-9)["lambda_max"] == pytest.approx(top, rel=1e-9)

    def test_bad_input_is_named(self):
        with pytest.raises(InputError, match="iterations: 0"):
            lambda_max(quadratic([1.0]), iterations=0)
        with pytest.raises(InputError, match="tolerance: 0"):
            lambda_max(quadratic([1.0]), tolerance=0)


def norm_of(gradient: list[Tensor], order: float) -> float:
    return torch.linalg.vector_norm(torch.cat([g.flatten() for g in gradient]), order).item()


class TestAdversarial:
    def test_one_step_is_the_loss_at_the_point_of_sam(self):
        model, (x, y) = mlp(), data((7, 3), 3)
        loss = WeightLoss(model, x, y)
        gradient = loss.gradient()
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for p, g in zip(moved.parameters(), gradient, strict=True):
                p.add_(g, alpha=0.3 / norm_of(gradient, 2))
        found = adversarial(loss, 0.3)
        perturbed = F.cross_entropy(moved(x), y).item()
        assert found["loss"] == loss.value()
        assert found["perturbed_loss"] == pytest.approx(perturbed, rel=1e-13)
        assert found["sharpness"] == pytest.approx(perturbed - loss.value(), rel=1e-12)

    @pytest.mark.parametrize(("p", "dual"), [(2, 2), (4, 4 / 3), (math.inf, 1)])
    def test_small_ball_gives_the_dual_norm_of_the_gradient(self, p, dual):
        loss = WeightLoss(mlp(), *data((7, 3), 3))
        wanted = norm_of(loss.gradient(), dual)
        assert adversarial(loss, 1e-6, p=p)["sharpness"] / 1e-6 == pytest.approx(wanted, rel=1e-4)

    def test_adaptive_ball_scales_with_the_weights(self):
        loss = WeightLoss(mlp(), *data((7, 3), 3))
        scaled = [g * (w.abs() + 0.01) for g, w in zip(loss.gradient(), loss.weights(), strict=True)]
        found = adversarial(loss, 1e-6, adaptive=True, eta=0.01)
        assert found["sharpness"] / 1e-6 == pytest.approx(norm_of(scaled, 2), rel=1e-4)

    def test_many_steps_near_a_minimum_reach_half_rho_squared_lambda_max(self):
        loss = quadratic([10.0, 6.0, 1.0, 0.5, 0.1])
        with torch.no_grad():
            loss.model.w.copy_(torch.tensor([1e-6, -2e-6, 3e-6, 1e-6, -1e-6]))
        found = adversarial(loss, 0.01, steps=40)
        assert found["sharpness"] == pytest.approx(0.5 * 0.01**2 * 10, rel=1e-3)

    @pytest.mark.parametrize("p", [2, 3, math.inf])
    def test_many_steps_reach_the_maximum_over_the_ball(self, p):
        """A convex loss of two weights: its maximum is on the boundary, where it is searched exhaustively."""
        x, y = data((9, 1), 2)
        model = nn.Linear(1, 2, bias=False).double()
        loss, w = WeightLoss(model, x, y), model.weight.detach().clone()
        angle = torch.linspace(0, 2 * math.pi, 4001, dtype=torch.float64)
        circle = torch.stack([angle.cos(), angle.sin()], 1)
        boundary = 0.7 * circle / torch.linalg.vector_norm(circle, p, dim=1, keepdim=True)
        logits = torch.einsum("ni,akj->ank", x, (w.flatten() + boundary)[:, :, None])
        top = max(F.cross_entropy(one, y).item() for one in logits)
        assert adversarial(loss, 0.7, steps=30, p=p)["perturbed_loss"] == pytest.approx(top, rel=1e-5)

    def test_more_steps_never_lower_the_result(self):
        loss = WeightLoss(mlp(), *data((7, 3), 3))
        rises = [adversarial(loss, 2.0, steps=k)["sharpness"] for k in range(1, 8)]
        assert rises == sorted(rises)
        assert rises[-1] > rises[0]

    def test_shards_have_their_own_ascents_and_weigh_by_size(self):
        model, (x, y) = mlp(), data((7, 3), 3)
        found = adversarial(WeightLoss(model, x, y, batch_size=2, weight_decay=0.1), 0.3, shard_size=3, steps=2)
        parts = [
            adversarial(WeightLoss(model, x[i], y[i], weight_decay=0.1), 0.3, steps=2)
            for i in (slice(0, 3), slice(3, 6), slice(6, 7))
        ]
        for name in ("sharpness", "perturbed_loss", "loss"):
            assert found[name] == pytest.approx((3 * parts[0][name] + 3 * parts[1][name] + parts[2][name]) / 7)

    def test_one_shard_is_one_ascent(self):
        loss = WeightLoss(mlp(), *data((7, 3), 3))
        assert adversarial(loss, 0.3, shard_size=7) == adversarial(loss, 0.3)
        assert adversarial(loss, 0.01, shard_size=1)["sharpness"] > adversarial(loss, 0.01)["sharpness"]

    @pytest.mark.parametrize("p", [2, 4, math.inf])
    def test_zero_gradient_means_no_perturbation(self, p):
        found = adversarial(quadratic([3.0, 1.0]), 0.5, p=p, steps=3)
        assert found == {"sharpness": 0.0, "perturbed_loss": found["loss"], "loss": pytest.approx(math.log(2))}

    def test_batch_without_errors_has_a_positive_loss_and_sharpness(self):
        model = nn.Linear(2, 2, bias=False).double()
        with torch.no_grad():
            model.weight.copy_(10 * torch.eye(2))
        found = adversarial(WeightLoss(model, torch.eye(2, dtype=torch.float64), torch.tensor([0, 1])), 0.1)
        assert 0 < found["loss"] < found["perturbed_loss"]
        assert found["sharpness"] > 0

    def test_radius_zero(self):
        assert adversarial(WeightLoss(mlp(), *data((7, 3), 3)), 0.0, steps=2)["sharpness"] == 0

    @pytest.mark.parametrize("steps", [1, 3])
    def test_diverged_model_is_nan(self, steps):
        model = mlp()
        nn.init.constant_(model[2].weight, math.nan)
        found = adversarial(WeightLoss(model, *data((7, 3), 3)), 0.1, steps=steps)
        assert np.isnan(list(found.values())).all()

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"rho": -1.0}, "rho: -1"),
            ({"rho": math.inf}, "rho: inf"),
            ({"rho": 1.0, "steps": 0}, "steps: 0"),
            ({"rho": 1.0, "p": 1}, "p: 1"),
            ({"rho": 1.0, "eta": 0.1}, "eta: 0.1"),
            ({"rho": 1.0, "shard_size": 0}, "shard_size: 0"),
        ],
    )
    def test_bad_input_is_named(self, settings, message):
        with pytest.raises(InputError, match=message):
            adversarial(WeightLoss(mlp(), *data((7, 3), 3)), **settings)


class TestEffectivePerturbation:
    @pytest.mark.parametrize(
        ("precision", "spacing"), [("fp32", 2.0**-23), ("tf32", 2.0**-10), ("fp16", 2.0**-10), ("bf16", 2.0**-7)]
    )
    def test_spacing_above_one(self, precision, spacing):
        """Less than half a spacing moves nothing; three quarters of it act as a whole one."""
        one = torch.ones(4, dtype=torch.float64)
        lost = effective_perturbation([one], [0.4 * spacing * one], precision)
        assert lost == {"norm_ratio": 0.0, "cosine": 0.0, "unmoved_fraction": 1.0}
        grown = effective_perturbation([one], [0.75 * spacing * one], precision)
        assert grown == pytest.approx({"norm_ratio": 4 / 3, "cosine": 1, "unmoved_fraction": 0})

    def test_direction_and_unmoved_weights_over_all_tensors_jointly(self):
        """bf16 at w = 1: of eps = (2^-7, 2^-9, 0, 0) only the first entry acts; cosine and ratio are 4 / sqrt(17)."""
        weights = [torch.ones(1), torch.ones(3)]
        eps = [torch.tensor([2.0**-7]), torch.tensor([2.0**-9, 0, 0])]
        found = effective_perturbation(weights, eps, "bf16")
        assert found["norm_ratio"] == pytest.approx(4 / 17**0.5)
        assert found["cosine"] == pytest.approx(4 / 17**0.5)
        assert found["unmoved_fraction"] == 0.75

    def test_ties_go_to_even_in_fp16_and_away_from_zero_in_tf32(self):
        one, half_spacing = torch.ones(1), torch.tensor([2.0**-11])
        assert effective_perturbation([one], [half_spacing], "fp16")["unmoved_fraction"] == 1
        assert effective_perturbation([one], [half_spacing], "tf32")["norm_ratio"] == 2

    def test_tf32_rounds_to_ten_bits_and_keeps_the_range_of_fp32(self):
        torch.manual_seed(0)
        x = torch.randn(10_000) * torch.logspace(-30, 30, 10_000)
        mantissa, exponent = np.frexp(x.double().numpy())  # 0.5 <= |mantissa| < 1: 11 bits after the point
        wanted = np.ldexp(np.sign(mantissa) * np.floor(np.abs(mantissa) * 2**11 + 0.5) / 2**11, exponent)
        assert np.array_equal(round_to_tf32(x).double().numpy(), wanted)
        special = torch.tensor([0.0, math.inf, -math.inf, 2.0 - 2.0**-23])
        assert round_to_tf32(special).tolist() == [0.0, math.inf, -math.inf, 2.0]

    def test_a_small_perturbation_of_many_weights_is_lost_in_bf16_and_kept_in_fp16(self):
        """A net of 0.27 million random weights at rho = 0.05: measured before at (1.42, .70) and (1.01, .99)."""
        generator = torch.Generator().manual_seed(0)
        weights = [sd * torch.randn(13_500, generator=generator) for sd in torch.linspace(0.012, 0.08, 20)]
        gradient = [torch.randn(13_500, generator=generator) for _ in weights]
        norm = torch.cat(gradient).norm()
        eps = [0.05 * g / norm for g in gradient]
        found = {p: effective_perturbation(weights, eps, p) for p in ("fp32", "tf32", "fp16", "bf16")}
        assert found["bf16"]["norm_ratio"] == pytest.approx(1.42, rel=0.03)
        assert found["bf16"]["cosine"] == pytest.approx(0.70, rel=0.03)
        assert found["bf16"]["unmoved_fraction"] > 0.4
        for name in ("fp16", "tf32"):
            assert found[name]["norm_ratio"] == pytest.approx(1.01, rel=0.01)
            assert found[name]["cosine"] == pytest.approx(0.99, rel=0.01)
        assert found["fp32"]["cosine"] == pytest.approx(1, abs=1e-6)

    def test_zero_perturbation_has_no_direction(self):
        found = effective_perturbation([torch.ones(2)], [torch.zeros(2)], "bf16")
        assert np.isnan([found["norm_ratio"], found["cosine"]]).all()
        assert found["unmoved_fraction"] == 1

    def test_bad_input_is_named(self):
        with pytest.raises(InputError, match="precision: 'fp8' is unknown"):
            effective_perturbation([torch.ones(2)], [torch.ones(2)], "fp8")
        with pytest.raises(InputError, match="eps"):
            effective_perturbation([torch.ones(2)], [torch.ones(1)], "fp32")
