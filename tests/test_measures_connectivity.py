"""The chain between two sets of weights: its points, its gradient, its optimum, and the losses along and around it."""

import copy
import itertools
import math

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import nn
from torch.nn import functional

from samlib import models
from samlib.errors import InputError
from samlib.measures import connectivity
from samlib.measures.connectivity import along, barrier, on_grid, plane, point, train_bend, weights_of

F64 = torch.float64


def nodes(count, *, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return [[torch.randn(shape, generator=rng, dtype=F64) for shape in ((3, 2), (3,))] for _ in range(count)]


def images(n=40, *, seed=0, features=2, classes=3):
    rng = torch.Generator().manual_seed(seed)
    inputs = torch.randn(n, features, generator=rng, dtype=F64)
    return inputs, torch.randint(0, classes, (n,), generator=rng)


def linear():
    return nn.Linear(2, 3).to(F64)


def batch_norm_net(seed=0):
    torch.manual_seed(seed)
    return models.mlp(2, 3, width=8).to(F64)


def mini_batches(data, size, seed=0):
    rng = torch.Generator().manual_seed(seed)
    while True:
        chosen = torch.randperm(len(data[1]), generator=rng)[:size]
        yield data[0][chosen], data[1][chosen]


def train(model, start, end, data, *, steps=50, lr=0.1, batch=16, seed=0, **settings):
    rng = torch.Generator().manual_seed(seed)
    return train_bend(model, start, end, mini_batches(data, batch, seed), steps=steps, lr=lr, rng=rng, **settings)


# ---------------------------------------------------------------------------------------------- points of a path


@pytest.mark.parametrize("count", [2, 3, 4])
def test_nodes_lie_on_their_path_bit_for_bit(count):
    path = nodes(count)
    for index, node in enumerate(path):
        assert all(map(torch.equal, point(path, index / (count - 1)), node))


@pytest.mark.parametrize(
    ("t", "shares"), [(0.25, (0.5, 0.5, 0)), (0.4, (0.2, 0.8, 0)), (0.75, (0, 0.5, 0.5)), (0.9, (0, 0.2, 0.8))]
)
def test_between_two_nodes_a_path_is_straight(t, shares):
    path = nodes(3)
    for found, *at in zip(point(path, t), *path, strict=True):
        torch.testing.assert_close(found, sum(share * w for share, w in zip(shares, at, strict=True)))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: point(nodes(1), 0.5), ["nodes", "1", "at least 2"]),
        (lambda: point(nodes(2), 1.5), ["t = 1.5", "0 to 1"]),
        (lambda: point(nodes(2), math.nan), ["t = nan"]),
        (lambda: point([nodes(1)[0], nodes(1)[0][:1]], 0.5), ["nodes", "shapes"]),
        (lambda: barrier([1.0, 2.0]), ["values", "2", "inside"]),
        (lambda: train(linear(), *nodes(2), images(), steps=0), ["steps", "0"]),
        (lambda: train(linear(), nodes(1)[0][:1], nodes(1)[0], images()), ["shapes"]),
        (lambda: train(linear(), *nodes(2), images(), bend=nodes(1)[0][:1]), ["shapes"]),
        (lambda: plane(*nodes(2), nodes(1)[0]), ["end is the start"]),
        (lambda: plane(nodes(2)[0], point(nodes(2), 0.3), nodes(2)[1]), ["bend lies on the line"]),
        (lambda: on_grid(linear(), plane(*nodes(3)), 1, images(), images()), ["points", "1", "2"]),
    ],
)
def test_what_is_no_path_is_refused(call, words):
    with pytest.raises(InputError) as error:
        call()
    for word in words:
        assert word in str(error.value)


# ---------------------------------------------------------------------------------------------- training the bend


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("seed", range(4))
def test_a_step_of_the_bend_is_that_of_autograd_through_the_path(seed, weight_decay):
    """d/d bend of L(phi(t)) + wd/2 ||phi(t)||^2, at the t that the generator draws first."""
    model, data, (start, begin, end) = batch_norm_net(), images(), [weights_of(batch_norm_net(s)) for s in (1, 2, 3)]
    t = torch.rand((), generator=torch.Generator().manual_seed(seed)).item()
    bend = [w.clone().requires_grad_() for w in begin]
    phi = [2 * t * b + (1 - 2 * t) * a if t < 0.5 else (2 - 2 * t) * b + (2 * t - 1) * c for a, b, c in
           zip(start, bend, end, strict=True)]  # fmt: skip
    batch = next(mini_batches(data, 16, seed))
    names = [name for name, _ in model.named_parameters()]
    logits = torch.func.functional_call(copy.deepcopy(model), dict(zip(names, phi, strict=True)), batch[0])
    loss = functional.cross_entropy(logits, batch[1]) + weight_decay / 2 * sum(w.square().sum() for w in phi)
    loss.backward()
    found = train(model, start, end, data, steps=1, lr=0.1, seed=seed, bend=begin, weight_decay=weight_decay)
    for now, before, w in zip(found, begin, bend, strict=True):
        torch.testing.assert_close(now, before - 0.1 * w.grad)


def test_the_bend_of_a_convex_loss_reaches_the_optimum_that_scipy_finds():
    """The mean loss along the chain is convex in the bend for a linear model: one minimum, found by another way."""
    model, data, (start, end) = linear(), images(60), nodes(2)
    ts = (torch.arange(100, dtype=F64) + 0.5) / 100
    share, early = 1 - (2 * ts - 1).abs(), ts < 0.5  # of the bend; the rest is that of the nearer end

    def mean_loss(bend):
        flat_start, flat_bend, flat_end = map(flattened, (start, bend, end))
        rest = torch.where(early[:, None], flat_start, flat_end)
        path = share[:, None] * flat_bend + (1 - share[:, None]) * rest
        logits = torch.einsum("nf,tcf->tnc", data[0], path[:, :6].view(-1, 3, 2)) + path[:, None, 6:]
        return functional.cross_entropy(logits.reshape(-1, 3), data[1].repeat(len(ts)))

    def objective(flat):
        bend = [torch.tensor(flat[:6].reshape(3, 2), requires_grad=True), torch.tensor(flat[6:], requires_grad=True)]
        value = mean_loss(bend)
        gradient = torch.autograd.grad(value, bend)
        return value.item(), np.concatenate([g.numpy().ravel() for g in gradient])

    best = scipy.optimize.minimize(objective, np.zeros(9), jac=True, method="L-BFGS-B").fun
    halfway = mean_loss(point([start, end], 0.5)).item()
    found = mean_loss(train(model, start, end, data, steps=600, lr=0.3, batch=60)).item()
    assert best <= found < best + 0.02 * (halfway - best)


def test_training_the_bend_leaves_the_ends_and_the_model_alone():
    model, (start, end) = batch_norm_net(), [weights_of(batch_norm_net(seed)) for seed in (1, 2)]
    model.eval()
    before = [copy.deepcopy(what) for what in (model.state_dict(), start, end)]
    first = train(model, start, end, images(), weight_decay=0.01)
    for now, then in zip((model.state_dict().values(), start, end), (before[0].values(), *before[1:]), strict=True):
        assert all(map(torch.equal, now, then))
    assert not any(module.training for module in model.modules())
    assert all(map(torch.equal, first, train(model, start, end, images(), weight_decay=0.01)))
    assert not all(map(torch.equal, first, train(model, start, end, images(), weight_decay=0.01, seed=1)))


def test_the_bend_begins_halfway_or_where_it_is_told_to():
    start, end = nodes(2)
    given = nodes(1, seed=5)[0]
    for bend, expected in ((None, point([start, end], 0.5)), (given, given)):
        found = train(linear(), start, end, images(), steps=1, lr=1e-12, bend=bend)
        for now, then in zip(found, expected, strict=True):
            torch.testing.assert_close(now, then, atol=1e-10, rtol=0)


def test_a_trained_chain_lies_lower_than_the_straight_line():
    data = images(60)
    data = data[0], (data[0][:, 0] > 0).long() + (data[0][:, 1] > 0).long()  # something to learn
    ends = []
    for seed in (1, 2):
        model = batch_norm_net(seed)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for inputs, labels in itertools.islice(mini_batches(data, 20, seed), 100):
            optimizer.zero_grad()
            functional.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
        ends.append(weights_of(model))
    ts = np.linspace(0, 1, 9)
    bend = train(model, *ends, data, steps=200, lr=0.1, batch=20)
    line, chain = (along(model, path, ts, data, data)["train_loss"] for path in (ends, [ends[0], bend, ends[1]]))
    assert (line[0], line[-1]) == (chain[0], chain[-1])
    assert barrier(chain) < 0.5 * barrier(line)


def test_too_few_batches_are_an_error_and_a_bend_may_diverge():
    start, end = nodes(2)
    rng = torch.Generator().manual_seed(0)
    with pytest.raises(InputError, match="batches holds 1 mini-batches: give at least steps = 2"):
        train_bend(linear(), start, end, [images()], steps=2, lr=0.1, rng=rng)
    found = train(linear(), start, end, images(), steps=60, lr=1e300, weight_decay=1.0)
    assert not all(torch.isfinite(w).all() for w in found)


# ---------------------------------------------------------------------------------------------- along the path


def numpy_losses(weights, train, data):
    """Two hidden layers with batch norm on the statistics of all training images, in NumPy."""
    w1, g1, b1, w2, g2, b2, w3, b3 = [w.numpy() for w in weights]

    def normalised(h, reference, gain, shift):
        scale = np.sqrt(reference.var(0, ddof=1) + 1e-5)  # the running variance is the unbiased one
        return np.maximum((h - reference.mean(0)) / scale * gain + shift, 0)

    def biased(h, gain, shift):  # in training mode, while the statistics of the next layer are taken
        return np.maximum((h - h.mean(0)) / np.sqrt(h.var(0) + 1e-5) * gain + shift, 0)

    first = train[0].numpy() @ w1.T
    second = biased(first, g1, b1) @ w2.T
    h = normalised(data[0].numpy() @ w1.T, first, g1, b1)
    h = normalised(h @ w2.T, second, g2, b2)
    logits = h @ w3.T + b3
    logits -= logits.max(1, keepdims=True)
    right = data[1].numpy()
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    return -log_p[np.arange(len(right)), right].mean(), 100 * (logits.argmax(1) != right).mean()


def test_statistics_are_taken_anew_at_every_point():
    """At the ends too; those that the model brings are of no account."""
    model, path, data, other = (
        batch_norm_net(),
        [weights_of(batch_norm_net(s)) for s in (1, 2)],
        images(30),
        images(20, seed=1),
    )
    found = along(model, path, [0.0, 0.3, 1.0], data, other)
    assert list(found) == ["t", "train_loss", "train_error_pct", "test_loss", "test_error_pct"]
    for index, t in enumerate(found["t"]):
        for split, of in (("train", data), ("test", other)):
            expected = numpy_losses(point(path, t), data, of)
            assert found[f"{split}_loss"][index] == pytest.approx(expected[0], rel=1e-9)
            assert found[f"{split}_error_pct"][index] == pytest.approx(expected[1])


def test_many_images_are_taken_in_parts(monkeypatch):
    """Losses and errors are the same to rounding; statistics are means over the parts (`batchnorm.recalibrate`)."""
    model, path, data = linear(), nodes(2), images(30)
    whole = along(model, path, [0.2, 0.7], data, data)
    monkeypatch.setattr(connectivity, "BATCH", 7)
    parts = along(model, path, [0.2, 0.7], data, data)
    for name, column in whole.items():
        assert parts[name] == pytest.approx(column, rel=1e-12)


def test_a_measure_leaves_the_model_alone():
    model = batch_norm_net()
    before = copy.deepcopy(model.state_dict())
    path = [weights_of(batch_norm_net(seed)) for seed in (1, 2, 3)]
    along(model, path, [0.0, 0.5], images(), images())
    on_grid(model, plane(*path), 2, images(), images())
    assert all(map(torch.equal, model.state_dict().values(), before.values()))
    assert all(module.training for module in model.modules())


def test_a_barrier_is_taken_above_the_higher_end():
    assert barrier([1.0, 5.0, 2.0, 3.0]) == 2.0
    assert barrier([4.0, 1.0, 3.0]) == -3.0  # every point inside lies below the higher end
    assert math.isnan(barrier([1.0, math.nan, 2.0]))
    assert math.isnan(barrier([1.0, math.inf, 2.0]))


# ---------------------------------------------------------------------------------------------- the plane


def flattened(weights):
    return torch.cat([w.ravel() for w in weights])


@pytest.mark.parametrize("seed", range(3))
def test_the_axes_are_orthonormal_and_the_nodes_have_their_coordinates(seed):
    start, bend, end = nodes(3, seed=seed)
    found = plane(start, bend, end)
    u, v = map(flattened, found.axes)
    torch.testing.assert_close(torch.stack([u @ u, v @ v, u @ v]), torch.tensor([1.0, 1.0, 0.0], dtype=F64))
    assert found.end == (pytest.approx(connectivity.distance(start, end)), 0.0)
    assert found.bend[1] > 0
    for node, place in ((start, (0.0, 0.0)), (end, found.end), (bend, found.bend)):
        torch.testing.assert_close(flattened(found.at(*place)), flattened(node))


def test_distances_in_the_plane_are_distances_of_weights():
    start, bend, end = nodes(3)
    found = plane(start, bend, end)
    assert math.dist(found.bend, found.end) == pytest.approx(connectivity.distance(bend, end))
    assert math.hypot(*found.bend) == pytest.approx(connectivity.distance(start, bend))


def test_a_grid_holds_the_losses_at_its_places():
    path, data, other = [weights_of(batch_norm_net(s)) for s in (1, 2, 3)], images(30), images(20, seed=1)
    of = plane(*path)
    found = on_grid(batch_norm_net(), of, 3, data, other, margin=0.5)
    assert {len(column) for column in found.values()} == {9}
    assert found["x"][:4] == pytest.approx([*np.linspace(*_box(of, 0, 0.5), 3), found["x"][0]])
    assert found["y"][::3] == pytest.approx(np.linspace(*_box(of, 1, 0.5), 3))
    for index in (0, 4, 7):
        weights = of.at(found["x"][index], found["y"][index])
        assert found["train_loss"][index] == pytest.approx(numpy_losses(weights, data, data)[0], rel=1e-6)
        assert found["test_loss"][index] == pytest.approx(numpy_losses(weights, data, other)[0], rel=1e-6)


def _box(of, axis, margin):
    reached = [0.0, of.end[axis], of.bend[axis]]
    return min(reached) - margin * of.end[0], max(reached) + margin * of.end[0]
