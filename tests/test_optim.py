"""SAM, ASAM and average SAM against closed forms, NumPy, autograd and torch's own optimisers."""

import copy
import io
import math
import os
import socket
from contextlib import contextmanager, nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from samlib.batchnorm import second_pass
from samlib.errors import InputError
from samlib.optim import ASAM, SAM, AverageSAM
from samlib.perturbation import dual_vector, global_norm, perturbation, project
from samlib.shards import Shards

SGD = torch.optim.SGD
CURVATURE = torch.tensor([1.0, 10.0], dtype=torch.float64)


@pytest.fixture(autouse=True, params=["foreach", "flat"])
def backend(request, monkeypatch):
    """Every test runs with single tensors and with flat buffers, where the settings allow them."""
    construct = SAM.__init__

    def init(self, *arguments, **settings_):
        if request.param == "flat" and not settings_.get("second_order") and settings_.get("inner_steps", 1) == 1:
            settings_ = {"flat": True, **settings_}
        construct(self, *arguments, **settings_)

    monkeypatch.setattr(SAM, "__init__", init)
    return request.param


def parameter(*values, dtype=torch.float64):
    return nn.Parameter(torch.tensor(values, dtype=dtype))


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


def quadratic(opt, w):
    """The closure of 0.5 w' diag(1, 10) w."""

    def closure():
        opt.zero_grad()
        loss = 0.5 * (CURVATURE * w * w).sum()
        if not opt.second_order:
            loss.backward()
        return loss

    return closure


def network(seed=0, dtype=torch.float64, dropout=0.0):
    torch.manual_seed(seed)
    layers = [nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(dropout), nn.Linear(6, 3)]
    return nn.Sequential(*layers).to(dtype)


def examples(seed=0, size=12, dtype=torch.float64):
    generator = torch.Generator().manual_seed(100 + seed)
    inputs = torch.randn(size, 4, generator=generator, dtype=dtype)
    return inputs, torch.randint(3, (size,), generator=generator)


def closure_of(opt, model, inputs, labels, seen=None):
    """A training closure with frozen batch norm in the second pass; `seen` collects the losses."""

    def closure():
        opt.zero_grad()
        with second_pass(model) if getattr(opt, "in_second_pass", False) else nullcontext():
            loss = nn.functional.cross_entropy(model(inputs), labels)
        if not getattr(opt, "second_order", False):
            loss.backward()
        if seen is not None:
            seen.append(loss.detach().clone())
        return loss

    return closure


def train(opt, model, steps, first=0, **options):
    for step in range(first, first + steps):
        opt.step(closure_of(opt, model, *examples(step, dtype=next(model.parameters()).dtype)), **options)


def assert_equal(found, expected):
    """Bit for bit, for tensors or state dicts."""
    found, expected = (list(x.values()) if isinstance(x, dict) else list(x) for x in (found, expected))
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def assert_close(found, expected, tolerance=1e-12):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


# -------------------------------------------------------------------------------------------------------- known values

KNOWN = {
    "SAM": (SAM, (1.0, 1.0), {"rho": 0.1}, (0.009950371902, 0.09950371902), (0.89900496281, -0.09950371902)),
    "ASAM eta 0": (ASAM, (2.0, -0.5), {"rho": 0.5, "eta": 0.0}, (0.847998304, -0.132499735), None),
    "ASAM eta 0.01": (ASAM, (2.0, -0.5), {"rho": 0.5, "eta": 0.01}, (0.848661252, -0.136591168), None),
}


@pytest.mark.parametrize("cls, start, settings_, eps, end", KNOWN.values(), ids=KNOWN)
def test_known_values_in_all_three_forms(cls, start, settings_, eps, end):
    eps = vector(*eps)
    grad = CURVATURE * vector(*start)
    adaptive = {"adaptive": True, "eta": settings_["eta"]} if cls is ASAM else {}
    [functional] = perturbation([parameter(*start).detach()], [grad], settings_["rho"], **adaptive)
    assert_close(functional, eps, 1e-9)

    w = parameter(*start)
    opt = cls([w], SGD, lr=0.1, **settings_)
    loss = opt.step(quadratic(opt, w))
    assert loss == 0.5 * (CURVATURE * vector(*start) ** 2).sum()
    assert not loss.requires_grad

    v = parameter(*start)
    two_step = cls([v], SGD, lr=0.1, **settings_)
    quadratic(two_step, v)()
    assert_equal(two_step.perturbation(), [functional])
    two_step.first_step(zero_grad=True)
    assert v.grad is None
    assert_close(v.detach(), vector(*start) + eps, 1e-9)
    quadratic(two_step, v)()
    two_step.second_step(zero_grad=True)
    assert v.grad is None
    assert torch.equal(v, w)

    at = vector(*start)
    assert_close(w.detach(), at - 0.1 * CURVATURE * (at + functional))
    if end:
        assert_close(w.detach(), vector(*end), 1e-10)


def test_asam_is_sam_where_all_weights_have_size_one():
    w, g = [vector(1.0, -1.0, 1.0)], [vector(0.3, 2.0, -1.0)]
    [sam] = perturbation(w, g, 0.1)
    assert_close(perturbation(w, g, 0.1, adaptive=True), [sam])
    assert_close(perturbation(w, g, 0.1, adaptive=True, eta=0.01), [1.01 * sam])


def test_asam_is_invariant_to_rescaling_of_weights():
    generator = torch.Generator().manual_seed(0)
    w, g, factor = (torch.randn(7, generator=generator, dtype=torch.float64) for _ in range(3))
    [eps] = perturbation([w], [g], 0.5, adaptive=True)
    [rescaled] = perturbation([factor * w], [g / factor], 0.5, adaptive=True)
    assert_close(rescaled, factor * eps)


# ------------------------------------------------------------------------------------- the perturbation as a maximiser

DTYPES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5}
PROPERTY = settings(deadline=None, derandomize=True, max_examples=80)
NORMS = st.one_of(st.sampled_from([1.5, 2.0, 4.0, math.inf]), st.floats(1.05, 50))


@st.composite
def gradients(draw):
    """Lists of tensors of any shape, of one dtype, at any scale that the dtype holds."""
    dtype = draw(st.sampled_from(list(DTYPES)))
    shapes = draw(st.lists(st.lists(st.integers(1, 4), max_size=3), min_size=1, max_size=4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    size = 10.0 ** draw(st.integers(-3, 3) if dtype is torch.float16 else st.integers(-17, 17))
    return [(torch.randn(shape, generator=generator, dtype=torch.float64) * size).to(dtype) for shape in shapes]


def flat(tensors):
    return torch.cat([t.detach().double().flatten() for t in tensors])


def norm(tensors, p):
    return torch.linalg.vector_norm(flat(tensors), p).item()


@PROPERTY
@given(grads=gradients(), p=NORMS, rho=st.floats(1e-3, 10))
def test_eps_has_norm_rho_and_reaches_the_dual_norm(grads, p, rho):
    eps = perturbation([], grads, rho, p=p)
    tolerance = DTYPES[grads[0].dtype] * (1 if p > 1.2 else 100)  # the exponent q - 1 multiplies rounding errors
    assert norm(eps, p) == pytest.approx(rho, rel=tolerance)
    q = 1.0 if p == math.inf else p / (p - 1)
    assert (flat(eps) @ flat(grads)).item() == pytest.approx(rho * norm(grads, q), rel=tolerance)


@PROPERTY
@given(grads=gradients(), p=NORMS, seed=st.integers(0, 2**20))
def test_no_other_direction_in_the_ball_rises_faster(grads, p, seed):
    generator = torch.Generator().manual_seed(seed)
    others = torch.randn(20, len(flat(grads)), generator=generator, dtype=torch.float64)
    others /= torch.linalg.vector_norm(others, p, dim=1, keepdim=True)
    u, dual_norm = dual_vector(grads, p)
    best = (flat(u) @ flat(grads)).item()
    assert best == pytest.approx(dual_norm.item(), rel=1e-3)
    assert (others @ flat(grads)).max().item() <= best * (1 + 1e-3)


@PROPERTY
@given(grads=gradients(), p=NORMS, rhos=st.lists(st.sampled_from([0.0, 0.01, 0.5]), min_size=4, max_size=4))
def test_one_norm_over_all_groups_but_those_with_rho_zero(grads, p, rhos):
    params = [nn.Parameter(torch.zeros_like(g)) for g in grads]
    rhos = rhos[: len(params)]
    opt = SAM([{"params": [w], "rho": rho} for w, rho in zip(params, rhos, strict=True)], SGD, p=p, lr=0.1)
    for w, g in zip(params, grads, strict=True):
        w.grad = g
    perturbed = [(g, rho) for g, rho in zip(grads, rhos, strict=True) if rho]
    expected = iter(perturbation([], *zip(*perturbed, strict=True), p=p) if perturbed else [])
    for rho, eps in zip(rhos, opt.perturbation(), strict=True):
        assert torch.equal(eps, next(expected) if rho else torch.zeros_like(eps))
    if len({rho for _, rho in perturbed}) == 1:
        assert norm(opt.perturbation(), p) == pytest.approx(perturbed[0][1], rel=1e-3)


@PROPERTY
@given(grads=gradients(), p=NORMS)
def test_projection_ends_in_the_ball_and_leaves_what_is_inside(grads, p):
    inside = project(grads, p)
    assert norm(inside, p) <= 1 + 1e-2
    if norm(grads, p) <= 0.99:
        assert_equal(inside, grads)


def test_projection_is_the_nearest_point_for_p_2_and_inf():
    u = [vector(3.0, 0.5), vector(-4.0)]
    assert_equal(project(u, math.inf), [vector(1.0, 0.5), vector(-1.0)])
    assert_close(flat(project(u, 2)), flat(u) / flat(u).norm())


@pytest.mark.parametrize("p", [1.5, 2.0, 4.0, math.inf])
def test_a_zero_gradient_gives_a_zero_perturbation(p):
    w = parameter(0.0, 0.0)
    opt = SAM([w], SGD, rho=0.1, p=p, lr=0.1, weight_decay=0.1)
    assert opt.step(quadratic(opt, w)) == 0
    assert torch.equal(w, torch.zeros(2).double())
    assert opt.skipped_steps == 0


@pytest.mark.parametrize("rho", [0.05, 1e3])
@pytest.mark.parametrize("dtypes", [[torch.float32], [torch.float64], [torch.float32, torch.float64]])
def test_a_step_with_gradients_of_zero_leaves_the_weights(rho, dtypes):
    weights = [parameter(1.0, 2.0, dtype=dtype) for dtype in dtypes]
    opt = SAM(weights, SGD, rho=rho, lr=0.1)
    seen = []

    def closure():
        opt.zero_grad()
        loss = sum((0 * w).sum() for w in weights)
        loss.backward()
        seen.append([w.detach().tolist() for w in weights])
        return loss

    opt.step(closure)
    assert seen == [[[1.0, 2.0]] * len(dtypes)] * 2
    assert [w.detach().tolist() for w in weights] == seen[0]


def test_norm_eps_is_added_to_the_norm():
    g = [vector(3.0, 4.0)]
    assert_close(perturbation([], g, 0.1, norm_eps=5.0), [0.1 * g[0] / 10])


def test_a_mixture_of_dtypes_has_one_norm():
    g = [torch.full((3,), 0.5, dtype=dtype) for dtype in DTYPES]
    assert norm(perturbation([], g, 0.2), 2) == pytest.approx(0.2, rel=1e-6)
    w = [torch.full((3,), 0.3, dtype=dtype) for dtype in DTYPES]
    eps = perturbation(w, g, 0.2, adaptive=True, eta=0.01)
    relative = [e / (t.double() + 0.01) for e, t in zip(eps, w, strict=True)]
    assert norm(relative, 2) == pytest.approx(0.2, rel=1e-6)


def test_global_norm_is_not_finite_if_an_entry_is_not():
    for order in (1, 1.5, 2, 3, math.inf):
        for bad in (math.nan, math.inf):
            assert not torch.isfinite(global_norm([torch.ones(3), torch.tensor([1.0, bad])], order))


def test_filters_choose_what_is_perturbed_and_what_is_scaled():
    w, b = nn.Parameter(torch.full((2, 2), 3.0, dtype=torch.float64)), nn.Parameter(torch.zeros(2).double())
    w.grad, b.grad = torch.ones(2, 2).double(), torch.full((2,), 2.0, dtype=torch.float64)

    def is_matrix(t):
        return t.ndim > 1

    eps = SAM([w, b], SGD, rho=0.1, perturb_filter=is_matrix, lr=0.1).perturbation()
    assert_close(eps, [torch.full((2, 2), 0.05, dtype=torch.float64), torch.zeros(2).double()])
    eps = ASAM([w, b], SGD, rho=0.1, eta=0.0, scale_filter=is_matrix, lr=0.1).perturbation()
    length = math.sqrt(4 * 9 + 2 * 4)  # || T g ||, with T = 3 for w and 1 for b
    assert_close(
        eps,
        [torch.full((2, 2), 0.9 / length, dtype=torch.float64), torch.full((2,), 0.2 / length, dtype=torch.float64)],
    )


# ------------------------------------------------------------------------------------------- trajectories in NumPy


def numpy_eps(w, g, rho, p=2.0, eta=None, normalize=True, norm_eps=0.0):
    """Equation 2 of foret2021 on one long vector, in the paper's form; eta None for T = 1."""
    scale = np.ones_like(w) if eta is None else np.abs(w) + eta
    h = scale * g
    if p == math.inf:
        return rho * scale * np.sign(h)
    q = p / (p - 1)
    length = (np.sum(np.abs(h) ** q) ** (1 / q) + norm_eps) ** (q / p) if normalize else 1.0
    return rho * scale * np.sign(h) * np.abs(h) ** (q - 1) / length


def numpy_climb(gradient, w, steps, rho, p, **how):
    """Projected ascent: every step of length rho, from the last point, then back into the ball."""
    eps = numpy_eps(w, gradient(w), rho, p, **how)
    for _ in range(steps - 1):
        eps = eps + numpy_eps(w, gradient(w + eps), rho, p, **how)
        scale = np.ones_like(w) if how.get("eta") is None else np.abs(w) + how["eta"]
        if p == math.inf:
            eps = scale * np.clip(eps / scale, -rho, rho)
        else:
            eps = eps * min(1.0, rho / np.linalg.norm(eps / scale, p))
    return eps


VARIANTS = {
    "sam": {},
    "p 1.5": {"p": 1.5},
    "p 4": {"p": 4.0},
    "p inf": {"p": math.inf},
    "asam": {"adaptive": True, "eta": 0.01},
    "asam eta 0 p 1.5": {"adaptive": True, "p": 1.5},
    "not normalised": {"normalize": False},
    "not normalised p 1.5": {"normalize": False, "p": 1.5},
    "not normalised asam": {"normalize": False, "adaptive": True, "eta": 0.1},
    "norm eps": {"norm_eps": 0.3},
    "3 inner steps": {"inner_steps": 3},
    "3 inner steps p inf": {"inner_steps": 3, "p": math.inf},
    "4 inner steps p 1.5": {"inner_steps": 4, "p": 1.5},
    "2 inner steps asam": {"inner_steps": 2, "adaptive": True, "eta": 0.2},
    "every 3rd step": {"ascent_every": 3},
}


def logistic_data(seed=0, size=10):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(size, 5)), rng.integers(0, 2, size).astype(float)


def logistic_gradient(inputs, labels):
    return lambda w: inputs.T @ (1 / (1 + np.exp(-inputs @ w)) - labels) / len(labels)


def quadratic_gradient(inputs, targets):
    return lambda w: inputs.T @ (inputs @ w - targets) / len(targets)


def torch_loss(kind, inputs, targets, w):
    scores = torch.from_numpy(inputs) @ w
    if kind is logistic_gradient:
        return nn.functional.binary_cross_entropy_with_logits(scores, torch.from_numpy(targets))
    return 0.5 * (scores - torch.from_numpy(targets)).square().mean()


def vector_closure(opt, parts, kind, inputs, targets):
    """A closure over a weight vector that is held in two tensors."""

    def closure():
        opt.zero_grad()
        loss = torch_loss(kind, inputs, targets, torch.cat(parts))
        if not opt.second_order:
            loss.backward()
        return loss

    return closure


def two_parts():
    return [parameter(0.4, -1.0, 0.7), parameter(0.2, 1.5)]


@pytest.mark.parametrize("kind", [logistic_gradient, quadratic_gradient])
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_trajectory_equals_numpy(variant, kind):
    parts, rho, lr, momentum, decay = two_parts(), 0.3, 0.2, 0.9, 0.01
    w, buffer = flat(parts).numpy(), 0.0
    opt = SAM(parts, SGD, rho=rho, lr=lr, momentum=momentum, weight_decay=decay, **variant)
    how = {name: variant[name] for name in ("normalize", "norm_eps") if name in variant}
    eta = variant.get("eta", 0.0) if variant.get("adaptive") else None
    for step in range(6):
        data = logistic_data(step)
        gradient = kind(*data)
        opt.step(vector_closure(opt, parts, kind, *data))
        eps = np.zeros_like(w)
        if step % variant.get("ascent_every", 1) == 0:
            p, steps = variant.get("p", 2.0), variant.get("inner_steps", 1)
            eps = numpy_climb(gradient, w, steps, rho, p, eta=eta, **how)
        buffer = momentum * buffer + gradient(w + eps) + decay * w
        w = w - lr * buffer
        assert_close(flat(parts), torch.from_numpy(w))


@pytest.mark.parametrize("p", [1.5, 2.0, math.inf])
def test_inner_steps_stay_in_the_ball_and_climb(p):
    parts, rho, points = two_parts(), 0.5, []
    start = flat(parts)
    opt = SAM(parts, SGD, rho=rho, p=p, inner_steps=4, lr=0.0)
    inner = vector_closure(opt, parts, quadratic_gradient, *logistic_data())

    def closure():
        loss = inner()
        points.append((norm([flat(parts) - start], p), loss.item()))
        return loss

    opt.step(closure)
    assert len(points) == 5
    assert all(distance <= rho * (1 + 1e-12) for distance, _ in points)
    assert points[-1][1] > points[0][1]
    assert points[-1][1] >= points[1][1]
    assert_equal([flat(parts)], [start])


def test_unnormalised_sam_on_a_diagonal_network():
    """f = (u^2 - v^2)' x: one example's ascent multiplies u by 1 + 2 rho r x, with r the residual (Andriushchenko and
    Flammarion 2022, whose recurrence this is)."""
    generator = torch.Generator().manual_seed(0)
    x, y, rho, lr = torch.randn(5, generator=generator, dtype=torch.float64), 1.5, 0.05, 0.02
    u, v = (nn.Parameter(torch.full((5,), 0.4, dtype=torch.float64)) for _ in range(2))
    opt = SAM([u, v], SGD, rho=rho, normalize=False, lr=lr)

    def closure():
        opt.zero_grad()
        loss = 0.5 * ((u * u - v * v) @ x - y) ** 2
        loss.backward()
        return loss

    a, b = u.detach().clone(), v.detach().clone()
    for _ in range(30):
        opt.step(closure)
        r = (a * a - b * b) @ x - y
        up, down = a * (1 + 2 * rho * r * x), b * (1 - 2 * rho * r * x)
        r = (up * up - down * down) @ x - y
        a, b = a - 2 * lr * r * x * up, b + 2 * lr * r * x * down
    assert_close([u.detach(), v.detach()], [a, b])
    assert abs(r) < 0.5


# ----------------------------------------------------------------------------------------------------- shards and n-SAM


def numpy_msam(kind, w, shards, weights, rho):
    total = 0.0
    for (inputs, targets), share in zip(shards, weights, strict=True):
        gradient = kind(inputs, targets)
        total = total + share * gradient(w + numpy_eps(w, gradient(w), rho))
    return total


@pytest.mark.parametrize(
    "sizes, weights, shares",
    [
        ([5, 5], None, [0.5, 0.5]),
        ([4, 4, 2], None, [1 / 3] * 3),
        ([4, 4, 2], [4, 4, 2], [0.4, 0.4, 0.2]),
        ([1] * 10, None, [0.1] * 10),
    ],
)
@pytest.mark.parametrize("kind", [logistic_gradient, quadratic_gradient])
def test_msam_equals_numpy(kind, sizes, weights, shares):
    inputs, targets = logistic_data()
    edges = np.cumsum(sizes)[:-1]
    shards = list(zip(np.split(inputs, edges), np.split(targets, edges), strict=True))
    parts = two_parts()
    w = flat(parts).numpy()
    opt = SAM(parts, SGD, rho=0.3, lr=0.2)
    loss = opt.step([vector_closure(opt, parts, kind, *shard) for shard in shards], weights=weights)
    expected = sum(
        share * torch_loss(kind, *shard, torch.from_numpy(w)).item()
        for share, shard in zip(shares, shards, strict=True)
    )
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert_close(flat(parts), torch.from_numpy(w - 0.2 * numpy_msam(kind, w, shards, shares, 0.3)))


@pytest.mark.parametrize("cls", [SAM, ASAM, AverageSAM])
def test_a_list_of_one_closure_is_a_closure_bit_for_bit(cls):
    models = [network(dtype=torch.float32), network(dtype=torch.float32)]
    opts = [cls(model.parameters(), SGD, lr=0.1, momentum=0.9) for model in models]
    for step in range(5):
        closures = [closure_of(*pair, *examples(step, dtype=torch.float32)) for pair in zip(opts, models, strict=True)]
        assert opts[0].step(closures[0]) == opts[1].step([closures[1]], weights=[3])
    assert_equal(models[0].state_dict(), models[1].state_dict())


def test_shards_with_the_same_data_are_sam():
    parts, shared = two_parts(), two_parts()
    opt, other = SAM(parts, SGD, lr=0.2), SAM(shared, SGD, lr=0.2)
    opt.step(vector_closure(opt, parts, logistic_gradient, *logistic_data()))
    other.step([vector_closure(other, shared, logistic_gradient, *logistic_data())] * 3)
    assert_close(flat(parts), flat(shared), 1e-14)


def test_the_ascent_may_have_its_own_data():
    (inputs, targets), (more_inputs, more_targets) = logistic_data(0), logistic_data(1, size=30)
    parts = two_parts()
    w = flat(parts).numpy()
    opt = SAM(parts, SGD, rho=0.3, lr=0.2)
    ascent = vector_closure(opt, parts, logistic_gradient, more_inputs, more_targets)
    halves = [(inputs[:5], targets[:5]), (inputs[5:], targets[5:])]
    closures = [vector_closure(opt, parts, logistic_gradient, *half) for half in halves]
    loss = opt.step(closures, ascent_closure=ascent)
    assert loss == torch_loss(logistic_gradient, more_inputs, more_targets, torch.from_numpy(w))
    eps = numpy_eps(w, logistic_gradient(more_inputs, more_targets)(w), 0.3)
    assert_close(flat(parts), torch.from_numpy(w - 0.2 * logistic_gradient(inputs, targets)(w + eps)))


def test_n_sam_over_the_mini_batch_itself_is_sam_bit_for_bit():
    parts, others = two_parts(), two_parts()
    opt, other = SAM(parts, SGD, lr=0.2), SAM(others, SGD, lr=0.2)
    opt.step(vector_closure(opt, parts, logistic_gradient, *logistic_data()))
    closure = vector_closure(other, others, logistic_gradient, *logistic_data())
    other.step(closure, ascent_closure=closure)
    assert_equal(parts, others)


def test_shards_need_not_reach_every_tensor():
    a, b, c = parameter(1.0), parameter(2.0), parameter(3.0)
    opt = SAM([a, b, c], SGD, rho=0.1, lr=1.0)

    def closure_on(*tensors):
        def closure():
            opt.zero_grad()
            loss = 0.5 * sum((t * t).sum() for t in tensors)
            loss.backward()
            return loss

        return closure

    opt.step([closure_on(a, b), closure_on(b)])
    root = math.sqrt(5)
    assert_close(a.detach(), parameter(1 - 0.5 * (1 + 0.1 / root)).detach())
    assert_close(b.detach(), parameter(2 - 0.5 * (2 + 0.2 / root) - 0.5 * 2.1).detach())
    assert c.grad is None
    assert c == 3


# ------------------------------------------------------------------------------------- what a closure knows of its pass

ORDERS = {
    "sam": (SAM, {}, lambda a, b, n: {"closure": a}, "a0 a1"),
    "msam": (SAM, {}, lambda a, b, n: {"closure": [a, b]}, "a0 a1 b0 b1"),
    "n-sam": (SAM, {}, lambda a, b, n: {"closure": a, "ascent_closure": n}, "n0 a1"),
    "n-sam over shards": (SAM, {}, lambda a, b, n: {"closure": [a, b], "ascent_closure": n}, "n0 a1 b1"),
    "inner steps": (SAM, {"inner_steps": 3}, lambda a, b, n: {"closure": a, "ascent_closure": n}, "n0 n1 n1 a1"),
    "inner steps of shards": (SAM, {"inner_steps": 2}, lambda a, b, n: {"closure": [a, b]}, "a0 a1 a1 b0 b1 b1"),
    "average": (AverageSAM, {}, lambda a, b, n: {"closure": [a, b]}, "a1 b1"),
    "rho 0": (SAM, {"rho": 0.0}, lambda a, b, n: {"closure": [a, b], "ascent_closure": n}, "a0 b0"),
    "second order": (SAM, {"second_order": True}, lambda a, b, n: {"closure": [a, b]}, "a0 a1 b0 b1"),
}


@pytest.mark.parametrize("cls, settings_, arguments, expected", ORDERS.values(), ids=ORDERS)
def test_order_of_the_closure_calls(cls, settings_, arguments, expected):
    parts, calls = two_parts(), []
    start = flat(parts)
    opt = cls(parts, SGD, lr=0.0, **settings_)

    def named(name):
        inner = vector_closure(opt, parts, logistic_gradient, *logistic_data())

        def closure():
            assert opt.at_perturbed_point == (not torch.equal(flat(parts), start))
            assert opt.in_second_pass == (opt.at_perturbed_point and cls is not AverageSAM)
            calls.append(f"{name}{int(opt.at_perturbed_point)}")
            return inner()

        return closure

    opt.step(**arguments(*map(named, "abn")))
    assert " ".join(calls) == expected
    assert not opt.at_perturbed_point
    assert_equal([flat(parts)], [start])


def test_an_ascent_every_third_step():
    w, passes = parameter(1.0, 1.0), []
    opt = SAM([w], SGD, lr=0.1, ascent_every=3)
    inner = quadratic(opt, w)

    def closure():
        passes.append(opt.at_perturbed_point)
        return inner()

    for _ in range(5):
        opt.step(closure)
    assert passes == [False, True, False, False, False, True, False]


# -------------------------------------------------------------------------------------------------------- second order

SECOND_ORDER = {
    "sam": {},
    "p 1.5": {"p": 1.5},
    "p inf": {"p": math.inf},
    "asam": {"adaptive": True, "eta": 0.1},
    "asam p inf": {"adaptive": True, "p": math.inf},
    "not normalised": {"normalize": False},
    "norm eps": {"norm_eps": 0.2},
}


def exact_gradient(parts, objective, rho, **how):
    """Autograd through the whole objective L(w + eps(w)), as a function of fresh leaves."""
    leaves = [w.detach().clone().requires_grad_() for w in parts]
    perturbed = [w for w, r in zip(leaves, rho, strict=True) if r]
    grads = torch.autograd.grad(objective(leaves), perturbed, create_graph=True)
    eps = iter(perturbation(perturbed, grads, [r for r in rho if r], **how))
    moved = [w + next(eps) if r else w for w, r in zip(leaves, rho, strict=True)]
    return torch.autograd.grad(objective(moved), leaves)


@pytest.mark.parametrize("rho", [(0.3, 0.3), (0.3, 0.0)], ids=["all", "one group"])
@pytest.mark.parametrize("how", SECOND_ORDER.values(), ids=SECOND_ORDER)
def test_second_order_is_the_gradient_of_the_objective(how, rho):
    parts = two_parts()
    groups = [{"params": [w], "rho": r} for w, r in zip(parts, rho, strict=True)]
    opt = SAM(groups, SGD, second_order=True, lr=0.2, **how)
    expected = exact_gradient(
        parts, lambda ws: torch_loss(logistic_gradient, *logistic_data(), torch.cat(ws)), rho, **how
    )
    before = flat(parts)
    loss = opt.step(vector_closure(opt, parts, logistic_gradient, *logistic_data()))
    assert loss == torch_loss(logistic_gradient, *logistic_data(), before)
    assert not loss.requires_grad
    assert_close(flat(parts), before - 0.2 * flat(expected))


def test_second_order_in_closed_form_on_the_quadratic():
    w = parameter(1.0, 1.0)
    opt = SAM([w], SGD, rho=0.1, second_order=True, lr=1.0)
    opt.step(quadratic(opt, w))
    hessian, start = torch.diag(CURVATURE), torch.ones(2).double()
    g = hessian @ start
    unit = g / g.norm()
    v = hessian @ (start + 0.1 * unit)
    slope = 0.1 / g.norm() * hessian @ (torch.eye(2).double() - torch.outer(unit, unit))
    assert_close(w.detach(), start - (v + slope @ v))


def test_second_order_of_shards_is_the_mean_over_shards():
    inputs, targets = logistic_data()
    halves = [(inputs[:4], targets[:4]), (inputs[4:], targets[4:])]
    parts = two_parts()
    before = flat(parts)
    expected = [
        flat(exact_gradient(parts, lambda ws, h=half: torch_loss(logistic_gradient, *h, torch.cat(ws)), (0.3, 0.3)))
        for half in halves
    ]
    opt = SAM(parts, SGD, rho=0.3, second_order=True, lr=0.2)
    opt.step([vector_closure(opt, parts, logistic_gradient, *half) for half in halves], weights=[4, 6])
    assert_close(flat(parts), before - 0.2 * (0.4 * expected[0] + 0.6 * expected[1]))


def test_second_order_at_a_zero_gradient_and_on_a_linear_loss():
    w = parameter(0.0, 0.0)
    opt = SAM([w], SGD, second_order=True, lr=0.1)
    opt.step(quadratic(opt, w))
    assert torch.equal(w, torch.zeros(2).double())
    v = parameter(1.0, 2.0)
    linear = SAM([v], SGD, second_order=True, lr=0.1)
    for _ in range(2):  # these closures leave the gradients to step(), too
        linear.step(lambda: v.sum())
    assert_close(v.detach(), vector(0.8, 1.8))
    assert opt.skipped_steps == linear.skipped_steps == 0


def test_second_order_with_an_ascent_on_its_own_data():
    """b is in the ascent's loss alone: its whole gradient comes by way of eps."""

    def ascent_loss(a, b):
        return (a * b * b).sum() + (a * a).sum()

    def descent_loss(a):
        return 0.5 * (CURVATURE * a * a).sum()

    a, b = parameter(1.0, -0.5), parameter(0.3, 2.0)
    opt = SAM([a, b], SGD, rho=0.2, second_order=True, lr=1.0)
    leaves = [w.detach().clone().requires_grad_() for w in (a, b)]
    grads = torch.autograd.grad(ascent_loss(*leaves), leaves, create_graph=True)
    eps = 0.2 * grads[0] / torch.cat(grads).norm()
    expected = torch.autograd.grad(descent_loss(leaves[0] + eps), leaves)
    opt.step(lambda: descent_loss(a), ascent_closure=lambda: ascent_loss(a, b))
    for w, leaf, grad in zip((a, b), leaves, expected, strict=True):
        assert_close(w.detach(), leaf.detach() - grad)


def test_second_order_trains_a_network_with_batch_norm():
    model = network()
    reference = copy.deepcopy(model)
    opt = SAM(model.parameters(), SGD, rho=1e-7, second_order=True, lr=0.1)
    train(opt, model, 3)
    train(SGD(reference.parameters(), lr=0.1), reference, 3)
    for name, tensor in model.state_dict().items():
        assert_close(tensor, reference.state_dict()[name], 1e-5)
    assert opt.skipped_steps == 0


# ------------------------------------------------------------------------------------ rho = 0 and restoring the weights


@pytest.mark.parametrize("cls", [SAM, ASAM, AverageSAM])
def test_rho_zero_is_the_base_optimiser_bit_for_bit(cls):
    model = network(dtype=torch.float32, dropout=0.3)
    reference = copy.deepcopy(model)
    hyper = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": True}
    torch.manual_seed(1)
    train(cls(model.parameters(), SGD, rho=0.0, **hyper), model, 50)
    torch.manual_seed(1)
    train(SGD(reference.parameters(), **hyper), reference, 50)
    assert_equal(model.state_dict(), reference.state_dict())


def test_two_passes_at_one_point_are_the_base_optimiser_bit_for_bit():
    """The perturbation is below the rounding of the weights, so both passes run, at w: what is left to differ is
    dropout, batch norm and the restored weights."""
    model = network(dtype=torch.float32, dropout=0.3)
    reference = copy.deepcopy(model)
    with torch.no_grad():
        for tensors in zip(model.parameters(), reference.parameters(), strict=True):
            for w in tensors:
                w.add_(0.5)  # away from 0, where any perturbation would be visible
    hyper = {"lr": 0.01, "momentum": 0.9}
    opt = SAM(model.parameters(), SGD, rho=1e-12, **hyper)
    torch.manual_seed(1)
    train(opt, model, 20, replay_rng=True)
    torch.manual_seed(1)
    train(SGD(reference.parameters(), **hyper), reference, 20)
    assert_equal(model.state_dict(), reference.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("settings_", [{}, {"inner_steps": 3}, {"p": math.inf}], ids=str)
def test_weights_are_restored_bit_for_bit_and_stay_where_they_are(dtype, settings_):
    model = network(dtype=torch.float32)[0].to(dtype)
    before = copy.deepcopy(model.state_dict())
    opt = SAM(model.parameters(), SGD, rho=3.0, lr=0.0, **settings_)
    moved = []
    addresses = []

    def closure():
        opt.zero_grad()
        loss = model(examples(dtype=dtype)[0]).square().mean()
        loss.backward()
        moved.append(not torch.equal(model.weight, before["weight"]))
        addresses.append([w.data_ptr() for w in model.parameters()])
        return loss

    for _ in range(5):
        opt.step(closure)
    assert moved == [False, *[True] * (opt.inner_steps)] * 5
    assert_equal(model.state_dict(), before)
    assert all(one == addresses[0] for one in addresses)


def test_the_copies_at_w_can_be_read_while_the_weights_are_perturbed():
    w = parameter(1.0, 1.0)
    opt = SAM([w], SGD, rho=0.1, lr=0.1)
    inner, seen = quadratic(opt, w), []

    def closure():
        seen.append({p: (p.detach().clone(), at_w.clone()) for p, at_w in opt.unperturbed().items()})
        return inner()

    opt.step(closure)
    assert seen[0] == {}
    [(perturbed, at_w)] = [seen[1][w]]
    assert torch.equal(at_w, torch.ones(2).double())
    assert_close(perturbed - at_w, vector(0.009950371902, 0.09950371902), 1e-9)
    assert opt.unperturbed() == {}


def test_an_error_in_the_second_pass_restores_the_weights():
    model = network()
    opt = SAM(model.parameters(), SGD, rho=1.0, lr=0.1)
    inner = closure_of(opt, model, *examples())

    def closure():
        if opt.at_perturbed_point:
            raise KeyboardInterrupt
        return inner()

    before = copy.deepcopy(list(model.parameters()))
    with pytest.raises(KeyboardInterrupt):
        opt.step(closure)
    assert_equal(model.parameters(), before)
    assert not opt.at_perturbed_point
    opt.step(inner)


@pytest.mark.parametrize("cls", [SAM, ASAM, AverageSAM])
def test_the_two_step_form_is_the_closure_form_bit_for_bit(cls):
    models = [network(), network()]
    opts = [cls(model.parameters(), SGD, lr=0.1, momentum=0.9, ascent_every=2) for model in models]
    for step in range(6):
        opts[0].step(closure_of(opts[0], models[0], *examples(step)))
        closure = closure_of(opts[1], models[1], *examples(step))
        if cls is not AverageSAM:
            closure()
        opts[1].first_step(zero_grad=True)
        if cls is AverageSAM or step % 2 == 0:  # at w the one pass has been made
            closure()
        else:
            with second_pass(models[1]):
                closure()
        opts[1].second_step()
    assert_equal(models[0].state_dict(), models[1].state_dict())


# ------------------------------------------------------------------------------------ None and non-finite gradients


def test_tensors_without_a_gradient_on_either_pass_are_left_alone_and_restored():
    first, second, never, both = (parameter(1.0) for _ in range(4))
    opt = SAM([first, second, never, both], SGD, rho=0.1, lr=1.0)

    def closure():
        opt.zero_grad()
        used = second if opt.at_perturbed_point else first
        loss = 0.5 * (used * used + both * both).sum()
        loss.backward()
        return loss

    opt.step(closure)
    assert first == 1  # perturbed, without a gradient afterwards: back where it was
    assert second == 0  # not perturbed, stepped on its gradient of 1
    assert never == 1
    assert_close(both.detach(), parameter(-0.1 / math.sqrt(2)).detach())


def test_a_step_without_any_gradient_does_nothing():
    w = parameter(1.0)
    opt = SAM([w], SGD, lr=0.1)
    assert opt.step(lambda: 2.5) == 2.5
    assert w == 1
    assert_equal(opt.perturbation(), [torch.zeros(1).double()])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("bad_pass", [0, 1])
@pytest.mark.parametrize("form", ["step", "two steps"])
@pytest.mark.parametrize("p", [1.5, 2.0, math.inf])
def test_a_gradient_that_is_not_finite_skips_the_step(bad, bad_pass, form, p):
    w = parameter(1.0, 1.0)
    opt = SAM([w], SGD, rho=0.1, p=p, lr=0.1, momentum=0.9)
    inner = quadratic(opt, w)
    inner()
    calls = []

    def closure():
        loss = inner()
        if len(calls) == bad_pass:
            w.grad[1] = bad
        calls.append(w.detach().clone())
        return loss

    if form == "step":
        assert opt.step(closure) == 5.5
        assert len(calls) == 1 + bad_pass  # what follows a failed ascent is not run
    else:
        closure()
        opt.first_step()
        closure()
        opt.second_step()
    assert all(torch.isfinite(at).all() for at in calls)
    assert torch.equal(w, torch.ones(2).double())
    assert opt.skipped_steps == 1
    assert not opt.state
    calls += [None] * 2
    opt.step(inner)
    assert opt.state_dict()["sam"] == {"steps": 2, "skipped_steps": 1}
    assert w[0] < 1


def test_one_bad_shard_skips_the_step_and_the_shards_after_it():
    w, called = parameter(1.0, 1.0), []
    opt = SAM([w], SGD, lr=0.1)
    good = quadratic(opt, w)

    def bad():
        called.append("bad")
        loss = good()
        w.grad.fill_(math.inf)
        return loss

    opt.step([good, bad, lambda: called.append("after")])
    assert called == ["bad"]
    assert torch.equal(w, torch.ones(2).double())
    assert opt.skipped_steps == 1


def test_average_sam_skips_too():
    w = parameter(1.0, 1.0)
    opt = AverageSAM([w], SGD, lr=0.1)

    def closure():
        w.grad = torch.full_like(w, math.nan)
        return w.sum()

    opt.step(closure)
    assert torch.equal(w, torch.ones(2).double())
    assert opt.skipped_steps == 1


# ------------------------------------------------------------------------------------------------------- average SAM


@pytest.mark.parametrize("how", [{}, {"p": 1.5}, {"p": math.inf}, {"adaptive": True, "eta": 0.1}], ids=str)
def test_average_sam_steps_on_the_gradient_at_a_random_point_at_distance_rho(how):
    parts = two_parts()
    opt = AverageSAM(parts, SGD, rho=0.7, seed=5, lr=0.2, **how)
    for step in range(3):
        w, eps = flat(parts), flat(opt.perturbation())
        scale = w.abs() + 0.1 if "eta" in how else torch.ones_like(w)
        assert norm([eps / scale], how.get("p", 2.0)) == pytest.approx(0.7, rel=1e-12)
        data = logistic_data(step)
        loss = opt.step(vector_closure(opt, parts, logistic_gradient, *data))
        assert loss.item() == pytest.approx(torch_loss(logistic_gradient, *data, w + eps).item(), rel=1e-12)
        expected = w.numpy() - 0.2 * logistic_gradient(*data)((w + eps).numpy())
        assert_close(flat(parts), torch.from_numpy(expected))


def test_average_sam_draws_gaussian_directions_from_its_own_generator():
    w = nn.Parameter(torch.zeros(100, 100))
    opt = AverageSAM([w], SGD, rho=2.0, seed=3, normalize=False, lr=0.1)
    state = torch.get_rng_state()
    [z] = opt.perturbation()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(opt.perturbation()[0], z)  # looking at it does not use it up
    assert torch.equal(z, 2 * torch.randn(100, 100, generator=torch.Generator().manual_seed(3)))
    normalised = AverageSAM([w], SGD, rho=2.0, seed=3, lr=0.1).perturbation()[0]
    assert_close(normalised, 2 * z / z.norm(), 1e-6)
    assert not torch.equal(AverageSAM([w], SGD, rho=2.0, seed=4, lr=0.1).perturbation()[0], normalised)


def test_frozen_tensors_are_not_perturbed():
    w, frozen = parameter(1.0), parameter(1.0).requires_grad_(False)
    eps = AverageSAM([w, frozen], SGD, rho=0.3, lr=0.1).perturbation()
    assert_close([eps[0].abs(), eps[1]], [vector(0.3), vector(0.0)])


def test_every_step_and_every_shard_draws_anew():
    w, seen = parameter(*[0.0] * 8), []
    opt = AverageSAM([w], SGD, lr=0.0)

    def closure():
        opt.zero_grad()
        w.sum().backward()
        seen.append(w.detach().clone())
        return w.sum()

    opt.step([closure, closure])
    opt.step(closure)
    assert all(not torch.equal(seen[i], seen[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


# ------------------------------------------------------------------------------------------- state, groups, schedulers

RESUMED = {
    "sam": lambda model: SAM(model.parameters(), SGD, lr=0.1, momentum=0.9, ascent_every=2),
    "asam adam": lambda model: ASAM(model.parameters(), torch.optim.AdamW, lr=0.01),
    "average": lambda model: AverageSAM(model.parameters(), SGD, seed=7, lr=0.1, momentum=0.9),
    "fused": lambda model: SAM(model.parameters(), SGD, lr=0.1, momentum=0.9, fused=True),
}


@pytest.mark.parametrize("make", RESUMED.values(), ids=RESUMED)
def test_a_resumed_training_is_the_uninterrupted_one_bit_for_bit(make):
    whole = network()
    train(make(whole), whole, 10)

    model = network()
    opt = make(model)
    train(opt, model, 5)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = network(seed=9)
    opt = make(resumed)
    resumed.load_state_dict(saved["model"])
    opt.load_state_dict(saved["opt"])
    train(opt, resumed, 5, first=5)
    assert_equal(resumed.state_dict(), whole.state_dict())


def test_state_dict_is_that_of_the_base_optimiser_and_holds_no_weights():
    model = network()
    opt = SAM(model.parameters(), SGD, rho=0.2, lr=0.1, momentum=0.9)
    train(opt, model, 2)
    state = opt.state_dict()
    assert all(set(entry) == {"momentum_buffer"} for entry in state["state"].values())
    assert state["param_groups"][0]["rho"] == 0.2
    assert state["sam"] == {"steps": 2, "skipped_steps": 0}
    for index, w in enumerate(model.parameters()):
        assert opt.base_optimizer.state[w]["momentum_buffer"] is state["state"][index]["momentum_buffer"]
        assert not torch.equal(w, state["state"][index]["momentum_buffer"])


def test_a_bare_base_optimisers_state_can_be_taken_over():
    """As behdin2023's hybrid runs do when they switch to SAM with the momentum so far."""
    model, reference = network(), network()
    sgd = SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(sgd, model, 3)
    opt = SAM(model.parameters(), SGD, rho=0.3, lr=0.5, momentum=0.0)
    opt.load_state_dict(sgd.state_dict())
    train(opt, model, 3, first=3)

    other = SAM(reference.parameters(), SGD, rho=0.0, lr=0.1, momentum=0.9)
    train(other, reference, 3)
    other.param_groups[0]["rho"] = 0.3
    train(other, reference, 3, first=3)
    assert_equal(model.state_dict(), reference.state_dict())


@pytest.mark.parametrize("cls", [SAM, AverageSAM])
def test_a_deep_copy_trains_on_by_itself(cls):
    model = network()
    opt = cls(model.parameters(), SGD, lr=0.1, momentum=0.9)
    torch.optim.lr_scheduler.ConstantLR(opt, factor=1.0)
    train(opt, model, 2)
    twin, twin_opt = copy.deepcopy((model, opt))
    train(opt, model, 3)
    assert not torch.equal(twin[0].weight, model[0].weight)
    train(twin_opt, twin, 3)
    assert_equal(twin.state_dict(), model.state_dict())


def test_groups_are_shared_with_the_base_optimiser():
    w, v, u = parameter(1.0, 1.0), parameter(1.0, 1.0), parameter(1.0, 1.0)
    opt = SAM([{"params": [w], "rho": 0.2}, {"params": v, "lr": 0.5}], SGD, rho=0.1, lr=0.1)
    opt.add_param_group({"params": [u], "rho": 0.0})
    assert opt.param_groups is opt.base_optimizer.param_groups
    assert [group["rho"] for group in opt.param_groups] == [0.2, 0.1, 0.0]
    assert [group["lr"] for group in opt.param_groups] == [0.1, 0.5, 0.1]
    for t in (w, v, u):
        t.grad = torch.ones(2).double()
    half = math.sqrt(0.25)
    expected = [torch.full((2,), size * half, dtype=torch.float64) for size in (0.2, 0.1, 0.0)]
    assert_close(opt.perturbation(), expected)
    opt.param_groups[1]["lr"] = 0.0
    opt.base_optimizer.step()
    assert w[0] == 0.9
    assert v[0] == 1.0


def test_named_parameters_and_factories_are_taken():
    model = network()
    opt = SAM(model.named_parameters(), lambda groups, **hyper: SGD(groups, momentum=0.9, **hyper), lr=0.1)
    assert opt.param_groups[0]["param_names"][0] == "0.weight"
    train(opt, model, 2)
    assert len(opt.state) == len(list(model.parameters()))


@pytest.mark.parametrize("attach", [lambda opt: opt, lambda opt: opt.base_optimizer], ids=["wrapper", "base"])
@pytest.mark.parametrize("form", ["step", "two steps"])
def test_schedulers_drive_the_base_optimiser(attach, form):
    w, start = parameter(1.0, 1.0), torch.ones(2).double()
    opt = SAM([w], SGD, rho=0.0, lr=0.4)
    schedule = torch.optim.lr_scheduler.StepLR(attach(opt), step_size=1, gamma=0.5)
    for _ in range(3):  # a schedule that steps before its optimiser would warn, and warnings are errors
        if form == "step":
            opt.step(quadratic(opt, w))
        else:
            quadratic(opt, w)()
            opt.first_step()
            opt.second_step()
        schedule.step()
    for lr in (0.4, 0.2, 0.1):
        start = start - lr * CURVATURE * start
    assert_close(w.detach(), start)


def test_a_hook_on_the_base_optimiser_clips_the_gradient_that_is_stepped_on():
    w = parameter(1.0, 1.0)
    opt = SAM([w], SGD, rho=0.1, lr=1.0)

    def clip():
        nn.utils.clip_grad_norm_([w], 0.01)

    opt.base_optimizer.register_step_pre_hook(lambda *_: clip())
    opt.step([quadratic(opt, w)] * 2)
    assert (w.detach() - 1).norm().item() == pytest.approx(0.01, rel=1e-3)


# ---------------------------------------------------------------------------------------------------- GradScaler


def scaled_closure(opt, scaler, model, inputs, labels, bad_pass=None):
    calls = []

    def closure():
        opt.zero_grad()
        with second_pass(model) if opt.in_second_pass else nullcontext():
            loss = nn.functional.cross_entropy(model(inputs), labels)
        scaler.scale(loss).backward()
        if len(calls) == bad_pass:
            next(model.parameters()).grad[0, 0] = math.inf
        calls.append(None)
        return loss

    return closure


@pytest.mark.parametrize("how", [{}, {"norm_eps": 0.5}, {"normalize": False}, {"inner_steps": 2}], ids=str)
@pytest.mark.parametrize("power", [-10, 0, 20])
@pytest.mark.parametrize("cls", [SAM, AverageSAM])
def test_the_loss_scale_does_not_matter(how, power, cls):
    if cls is AverageSAM and "inner_steps" in how:
        how = {}
    plain, scaled = network(dtype=torch.float32), network(dtype=torch.float32)
    opts = [cls(model.parameters(), SGD, lr=0.1, momentum=0.9, **how) for model in (plain, scaled)]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**power)
    for step in range(3):
        data = examples(step, dtype=torch.float32)
        halves = [[part[:6] for part in data], [part[6:] for part in data]]
        loss = opts[0].step([closure_of(opts[0], plain, *half) for half in halves])
        closures = [scaled_closure(opts[1], scaler, scaled, *half) for half in halves]
        assert opts[1].step(closures, scaler=scaler) == loss
        scaler.update()
    assert_equal(scaled.state_dict(), plain.state_dict())
    assert scaler.get_scale() == 2.0**power


@pytest.mark.parametrize("bad_pass", [0, 1])
def test_an_inf_on_either_pass_is_skipped_and_lowers_the_scale(bad_pass):
    model = network(dtype=torch.float32)
    before = copy.deepcopy(list(model.parameters()))
    opt = SAM(model.parameters(), SGD, lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    data = examples(dtype=torch.float32)
    opt.step(scaled_closure(opt, scaler, model, *data, bad_pass=bad_pass), scaler=scaler)
    scaler.update()
    assert_equal(model.parameters(), before)
    assert (opt.skipped_steps, scaler.get_scale()) == (1, 512.0)
    opt.step(scaled_closure(opt, scaler, model, *data), scaler=scaler)
    scaler.update()
    assert (opt.skipped_steps, scaler.get_scale()) == (1, 512.0)
    assert not torch.equal(model[0].weight, before[0])


def test_a_scaler_that_is_switched_off_changes_nothing():
    plain, scaled = network(), network()
    opts = [SAM(model.parameters(), SGD, lr=0.1) for model in (plain, scaled)]
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    opts[0].step(closure_of(opts[0], plain, *examples()))
    opts[1].step(scaled_closure(opts[1], scaler, scaled, *examples()), scaler=scaler)
    scaler.update()
    assert_equal(plain.state_dict(), scaled.state_dict())


# -------------------------------------------------------------------------------------------------- dropout and no_sync


@pytest.mark.parametrize("settings_", [{}, {"inner_steps": 3}, {"second_order": True}], ids=str)
def test_replay_draws_the_same_masks_in_every_pass_of_a_shard(settings_):
    w = nn.Parameter(torch.ones(64))
    opt = SAM([w], SGD, lr=0.1, **settings_)
    masks = []

    def closure():
        opt.zero_grad()
        dropped = nn.functional.dropout(w, 0.5)
        masks.append(dropped.detach() != 0)
        loss = dropped.square().sum()
        if not opt.second_order:
            loss.backward()
        return loss

    def run(**options):
        masks.clear()
        torch.manual_seed(0)
        opt.step([closure, closure], **options)
        return [masks[: len(masks) // 2], masks[len(masks) // 2 :]], torch.get_rng_state()

    (first, second), after = run(replay_rng=True)
    assert all(torch.equal(mask, first[0]) for mask in first)
    assert all(torch.equal(mask, second[0]) for mask in second)
    assert not torch.equal(first[0], second[0])
    torch.manual_seed(0)
    for _ in range(2):  # the generator has moved on by one pass per shard
        nn.functional.dropout(torch.ones(64), 0.5)
    assert torch.equal(torch.get_rng_state(), after)
    (first, _), _ = run()
    assert not torch.equal(first[0], first[1])


@pytest.fixture
def process_group():
    """A group of this process alone, over gloo."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    torch.distributed.init_process_group("gloo", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()
    del os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]


def test_no_sync_keeps_the_ascent_in_this_process_and_averages_the_descent(process_group):
    model = network()
    ddp = nn.parallel.DistributedDataParallel(copy.deepcopy(model))
    reduced = []

    def hook(_, bucket):
        reduced.append(opt.at_perturbed_point)
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    ddp.register_comm_hook(None, hook)
    reference = SAM(model.parameters(), SGD, lr=0.1, inner_steps=2)
    opt = SAM(ddp.parameters(), SGD, lr=0.1, inner_steps=2)
    for step in range(3):
        reference.step(closure_of(reference, model, *examples(step)))
        opt.step(closure_of(opt, ddp, *examples(step)), no_sync=ddp.no_sync)
    assert reduced == [True] * 3  # one average a step, of the descent; without no_sync there are three
    assert_close(list(ddp.module.parameters()), list(model.parameters()))
    opt.step(closure_of(opt, ddp, *examples()))
    assert reduced == [True] * 3 + [False, True, True]


def no_sync_marked_in(inside):
    """A stand-in for `ddp_model.no_sync`: while it is entered, the list `inside` is not empty."""

    @contextmanager
    def no_sync():
        inside.append(True)
        yield
        inside.pop()

    return no_sync


def test_a_process_whose_ascent_fails_takes_part_in_the_descent_and_makes_all_skip():
    w, synced, inside = parameter(1.0, 1.0), [], []
    opt = SAM([w], SGD, lr=0.1)
    inner = quadratic(opt, w)

    def closure():
        loss = inner()
        if inside:
            w.grad.fill_(math.inf)
        else:
            synced.append(w.grad.clone())
            assert opt.in_second_pass
        return loss

    opt.step(closure, no_sync=no_sync_marked_in(inside))
    assert len(synced) == 1
    assert torch.isnan(synced[0]).all()  # what the average over processes spreads
    assert torch.equal(w, torch.ones(2).double())
    assert opt.skipped_steps == 1


def test_the_skip_spreads_through_whatever_tensor_the_descent_reaches():
    a, b, inside = parameter(1.0, 1.0), parameter(1.0, 1.0), []
    opt = SAM([a, b], SGD, lr=0.1)

    def closure():
        opt.zero_grad()
        loss = (b * b).sum() + ((a * a).sum() if inside else 0)
        loss.backward()
        if inside:
            b.grad.fill_(math.inf)
        return loss

    opt.step(closure, no_sync=no_sync_marked_in(inside))
    assert opt.skipped_steps == 1
    assert torch.equal(b, torch.ones(2).double())


def test_second_order_is_refused_for_distributed_data_parallel(process_group):
    ddp = nn.parallel.DistributedDataParallel(network())
    opt = SAM(ddp.parameters(), SGD, lr=0.1, second_order=True)
    with pytest.raises(InputError, match="second_order=True with DistributedDataParallel"):
        opt.step(closure_of(opt, ddp, *examples()))
    plain = network()
    opt = SAM(plain.parameters(), SGD, lr=0.1, second_order=True)
    opt.step(closure_of(opt, plain, *examples()))


# --------------------------------------------------------------------------------------------------------- refusals


def refused(field, remedy, **settings_):
    named = {name: getattr(value, "__name__", value) for name, value in settings_.items()}  # an id holds no address
    return pytest.param(settings_, field, remedy, id=str(named))


@pytest.mark.parametrize(
    "settings_, field, remedy",
    [
        refused("rho value: -0.1", "0 or a positive number", rho=-0.1),
        refused("rho value: '0.1'", "0 or a positive number", rho="0.1"),
        refused("rho value: nan", "0 or a positive number", rho=math.nan),
        refused("rho value: inf", "0 or a positive number", rho=math.inf),
        refused("p value: 1.0", "above 1", p=1),
        refused("p value: nan", "above 1", p=math.nan),
        refused("eta value: -1", "0 or a positive number", adaptive=True, eta=-1),
        refused("norm_eps value: -1", "0 or a positive number", norm_eps=-1),
        refused("inner_steps value: 0", "1 or more", inner_steps=0),
        refused("inner_steps value: 1.5", "1 or more", inner_steps=1.5),
        refused("ascent_every value: 0", "1 or more", ascent_every=0),
        refused("eta and scale_filter", "adaptive=True", eta=0.1),
        refused("eta and scale_filter", "adaptive=True", scale_filter=torch.is_tensor),
        refused("inner_steps > 1", "change one of the two", inner_steps=2, normalize=False),
        refused("second_order=True", "inner_steps=1", inner_steps=2, second_order=True),
        refused("second_order=True", "p at most 2, or inf", p=4, second_order=True),
        refused("maximize=True", "negate the loss", maximize=True),
        refused("perturb_filter declines all 1", "return True for some", perturb_filter=torch.is_complex),
    ],
)
def test_settings_out_of_range_are_refused(settings_, field, remedy):
    with pytest.raises(InputError, match=field) as error:
        SAM([parameter(1.0)], SGD, lr=0.1, **settings_)
    assert remedy in str(error.value)


def test_a_group_out_of_range_is_refused_and_not_added():
    opt = SAM([parameter(1.0)], SGD, lr=0.1)
    with pytest.raises(InputError, match="Invalid rho value: -1"):
        opt.add_param_group({"params": [parameter(1.0)], "rho": -1})
    assert len(opt.param_groups) == 1


@pytest.mark.parametrize("tensor", [torch.ones(2, dtype=torch.complex64), torch.eye(2).to_sparse()], ids=str)
def test_sparse_and_complex_parameters_are_refused(tensor):
    for params in ([tensor.requires_grad_()], [("name", tensor)], [{"params": tensor}]):
        with pytest.raises(InputError, match="SAM takes real, dense ones"):
            SAM(params, SGD, lr=0.1)


@pytest.mark.parametrize("rho", [0.1, 0.0])
def test_a_sparse_gradient_is_refused(rho):
    table = nn.Embedding(4, 2, sparse=True)
    opt = SAM(table.parameters(), SGD, rho=rho, lr=0.1)

    def closure():
        loss = table(torch.tensor([1])).sum()
        loss.backward()
        return loss

    with pytest.raises(InputError, match="a gradient is sparse: make it dense"):
        opt.step(closure)


def test_an_optimizer_in_place_of_its_class_is_refused():
    w = parameter(1.0)
    with pytest.raises(InputError, match="pass its class"):
        SAM([w], SGD([w], lr=0.1))


def test_a_base_optimiser_that_calls_closures_is_refused():
    with pytest.raises(InputError, match="LBFGS calls a closure itself"):
        SAM([parameter(1.0)], torch.optim.LBFGS)


def test_an_empty_parameter_list_is_refused_as_torch_does():
    with pytest.raises(ValueError, match="empty parameter list"):
        SAM([], SGD, lr=0.1)


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "closure = None: step"),
        ({"closure": []}, r"closure = \[\]: step"),
        ({"closure": [torch.ones, None]}, "or a list of them, one per shard"),
        ({"closure": lambda: None}, "closure returned None: end it with `return loss`"),
        ({"closure": [float, float], "weights": [1]}, r"weights = \[1.0\]: give one positive number for each of the 2"),
        ({"closure": [float, float], "weights": [1, 0]}, "give one positive number"),
        ({"closure": [float, float], "weights": [1, math.inf]}, "give one positive number"),
    ],
)
def test_a_step_that_makes_no_sense_is_refused(options, message):
    opt = SAM([parameter(1.0)], SGD, lr=0.1)
    with pytest.raises(InputError, match=message):
        opt.step(**options)


def test_options_that_exclude_each_other_are_refused():
    w = parameter(1.0)
    second_order = SAM([w], SGD, lr=0.1, second_order=True)
    for option in ({"scaler": torch.amp.GradScaler("cpu")}, {"no_sync": nullcontext}):
        with pytest.raises(InputError, match="second_order=True excludes scaler and no_sync"):
            second_order.step(lambda: w.sum(), **option)
    for opt in (second_order, SAM([w], SGD, lr=0.1, inner_steps=2)):
        with pytest.raises(InputError, match=r"use step\(closure\)"):
            opt.first_step()
    for how in ({"inner_steps": 2}, {"second_order": True}):
        with pytest.raises(InputError, match="AverageSAM has no ascent"):
            AverageSAM([w], SGD, lr=0.1, **how)
    for option in ({"ascent_closure": w.sum}, {"no_sync": nullcontext}):
        with pytest.raises(InputError, match="AverageSAM has no ascent"):
            AverageSAM([w], SGD, lr=0.1).step(w.sum, **option)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("settings_", [{}, {"inner_steps": 3}])
def test_gradients_may_be_cleared_after_the_step_as_in_the_tutorial(shards, settings_):
    models = [network(), network()]
    for model, inside in zip(models, (True, False), strict=True):
        opt = SAM(model.parameters(), SGD, lr=0.1, momentum=0.9, **settings_)
        for step in range(3):
            inputs, labels = examples(step)

            def closure(opt=opt, model=model, inside=inside, inputs=inputs, labels=labels):
                if inside:
                    opt.zero_grad()
                loss = nn.functional.cross_entropy(model(inputs), labels)
                loss.backward()
                return loss

            opt.step([closure] * shards)
            opt.zero_grad()
    assert_equal(models[0].state_dict(), models[1].state_dict())


def test_a_scaler_that_steps_by_itself_is_refused():
    w = parameter(1.0, 1.0, dtype=torch.float32)
    opt = SAM([w], SGD, lr=0.1)
    scaler = torch.amp.GradScaler("cpu")

    def closure():
        opt.zero_grad()
        loss = w.square().sum()
        scaler.scale(loss).backward()
        return loss

    closure()
    with pytest.raises(InputError, match=r"opt.step\(closure, scaler=scaler\)"):
        scaler.step(opt, closure)
    scaler.update()
    opt.step(closure, scaler=scaler)
    assert opt.skipped_steps == 0
    assert (w < 1).all()


def test_loading_is_refused_in_the_middle_of_a_step():
    w = parameter(1.0, 1.0)
    opt = SAM([w], SGD, lr=0.1)
    state = opt.state_dict()
    quadratic(opt, w)()
    opt.first_step()
    with pytest.raises(RuntimeError, match=r"cancel_step\(\) first"):
        opt.load_state_dict(state)
    opt.cancel_step()
    opt.load_state_dict(state)
    assert torch.equal(w, torch.ones(2).double())


def test_a_second_order_closure_that_calls_backward_is_refused():
    w = parameter(1.0, 1.0)
    opt = SAM([w], SGD, lr=0.1, second_order=True)

    def closure():
        opt.zero_grad()
        loss = w.square().sum()
        loss.backward()
        return loss

    with pytest.raises(InputError, match="not call backward"):
        opt.step(closure)


def test_a_step_that_was_begun_can_be_cancelled():
    w = parameter(1.0, 1.0)
    opt = SAM([w], SGD, lr=0.1, momentum=0.9)
    opt.cancel_step()  # nothing to undo
    quadratic(opt, w)()
    opt.first_step(zero_grad=True)
    assert opt.at_perturbed_point
    opt.cancel_step()
    assert torch.equal(w, torch.ones(2).double())
    assert not opt.at_perturbed_point
    assert len(opt.state) == 0
    with pytest.raises(RuntimeError, match="without first_step"):
        opt.second_step()
    opt.step(quadratic(opt, w))
    assert_close(w.detach(), vector(0.9, 0.0) - 0.1 * CURVATURE * 0.05 * CURVATURE / 101**0.5)


def test_the_two_steps_are_refused_out_of_order():
    w = parameter(1.0, 1.0)
    opt = SAM([w], SGD, lr=0.1)
    with pytest.raises(RuntimeError, match="without first_step"):
        opt.second_step()
    quadratic(opt, w)()
    opt.first_step()
    with pytest.raises(RuntimeError, match="twice without second_step"):
        opt.first_step()
    with pytest.raises(RuntimeError, match="between first_step"):
        opt.step(quadratic(opt, w))
    opt.second_step()
    opt.step(quadratic(opt, w))


# ------------------------------------------------------------------------------------------------------------- hybrids


def test_a_hybrid_goes_on_with_the_momentum_of_what_came_before():
    model, reference = network(), network()
    settings_ = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
    sgd = SGD(model.parameters(), **settings_)
    schedule = torch.optim.lr_scheduler.ExponentialLR(sgd, 0.9)
    one = SAM(reference.parameters(), SGD, rho=0.0, **settings_)
    opt = sgd
    for step, rho in enumerate([0.0, 0.0, 0.1, 0.1, 0.1, 0.2, 0.2, 0.0]):
        if step == 2:
            opt = SAM.around(sgd, rho=0.1)
        if step == 5:
            opt = SAM.around(opt.base_optimizer, 0.2)
        if step == 7:
            opt = opt.base_optimizer  # plain SGD again
        one.param_groups[0].update(rho=rho, lr=0.1 * 0.9**step)
        train(opt, model, 1, step)
        train(one, reference, 1, step)
        schedule.step()
    assert_close(list(model.parameters()), list(reference.parameters()))


def test_a_wrapped_optimiser_keeps_its_groups_and_takes_the_radius_given_last():
    w, v = parameter(1.0, 1.0), parameter(2.0)
    sgd = SGD([{"params": [w]}, {"params": [v], "lr": 0.5}], lr=0.1)
    opt = ASAM.around(sgd, eta=0.0)
    assert [group["rho"] for group in opt.param_groups] == [0.5, 0.5]
    assert [group["lr"] for group in opt.param_groups] == [0.1, 0.5]
    assert opt.adaptive
    assert opt.eta == 0
    assert opt.base_optimizer is sgd
    assert [group["rho"] for group in SAM.around(sgd, rho=0.2).param_groups] == [0.2, 0.2]
    with pytest.raises(InputError, match="rho value"):
        SAM.around(sgd, rho=-1)
    with pytest.raises(InputError, match="lr is no setting of SAM"):
        SAM.around(sgd, lr=0.1)
    with pytest.raises(InputError, match="not its class"):
        SAM.around(SGD)
    with pytest.raises(InputError, match="a SAM already"):
        SAM.around(opt)


def test_groups_may_have_a_radius_that_is_a_number_and_one_that_is_a_tensor():
    ends = []
    for one, other in ((0.1, 0.2), (torch.tensor(0.1, dtype=torch.float64), 0.2)):
        model = network()
        first, *rest = model.parameters()
        opt = SAM([{"params": [first], "rho": one}, {"params": rest, "rho": other}], SGD, p=1.5, lr=0.1)
        train(opt, model, 2)
        ends.append([*model.parameters(), *opt.perturbation()])
    assert_close(ends[1], ends[0])


def test_an_average_sam_refuses_the_state_of_another_class_before_it_loads_any():
    w = parameter(1.0)
    state = SAM([w], SGD, lr=0.5).state_dict()
    opt = AverageSAM([w], SGD, lr=0.1)
    with pytest.raises(InputError, match="state_dict is of another class"):
        opt.load_state_dict(state)
    assert opt.param_groups[0]["lr"] == 0.1


def test_a_layer_frozen_between_steps_of_vectorised_shards_does_not_move():
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    opt = SAM(model.parameters(), SGD, lr=0.1, momentum=0.9)
    step = partial(Shards, opt, model, nn.functional.cross_entropy, num_shards=2, passes="vmap")
    opt.step(step(*examples(0, 8)))
    opt.zero_grad()
    model[0].requires_grad_(False)
    frozen = model[0].weight.clone()
    for seed in range(3):
        opt.step(step(*examples(seed, 8)))
    assert torch.equal(model[0].weight, frozen)
