"""Drawn settings and drawn sequences of operations: SAM's whole step against a slow reference in NumPy.

The reference works in float64, on one tensor at a time, from the formulas of the papers. Its loss couples the tensors
and has a Hessian in closed form, so that the second-order term needs no autograd either.
"""

import copy
import io
import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import nn

from samlib.optim import ASAM, SAM, AverageSAM
from samlib.perturbation import perturbation

# Further settings of the constructor. Every test of this file, of test_optim_behaviour and of test_optim_peers runs
# once with each entry.
BACKENDS = [{}, {"flat": True}]

SGD = torch.optim.SGD
SHAPES = [(), (1,), (3,), (2, 3), (2, 1, 2)]
PROPERTY = settings(deadline=None, derandomize=True, database=None, max_examples=20)
all_backends = pytest.mark.parametrize("backend", BACKENDS, ids=str)


def excluded(method, backend):
    """Settings that the constructor refuses together."""
    return backend.get("flat", False) and (method.get("second_order", False) or method.get("inner_steps", 1) > 1)


def on_all_backends(name, table, method_of):
    """Parametrises a test by the entries of `table` and the backends that take them; `method_of` an entry, its settings
    of the constructor."""
    pairs = {
        f"{key}-{backend}": (entry, backend)
        for key, entry in table.items()
        for backend in BACKENDS
        if not excluded(method_of(entry), backend)
    }
    return pytest.mark.parametrize(f"{name}, backend", pairs.values(), ids=pairs)


# ---------------------------------------------------------------------------------------------------------- the loss


class Shard:
    """L(w) = sum_i c_i (w_i - t_i)^2 / 2 + (sum_i <a_i, w_i> - b)^2 / 2 over the tensors i that the shard reaches.

    `bad` is "w" or "w+eps" for a loss of NaN in the passes there, and "" for none.
    """

    def __init__(self, shapes, reach, seed, bad="", zero=False):
        rng = np.random.default_rng(seed)
        size = 0.0 if zero else 1.0  # a loss of zero has a gradient of zero, not of None
        self.reach, self.bad, self.b = reach, bad, size * rng.normal()
        self.c = {i: size * rng.uniform(0.5, 2.0, shapes[i]) for i in reach}
        self.t = {i: rng.normal(size=shapes[i]) for i in reach}
        self.a = {i: size * rng.normal(size=shapes[i]) / 4 for i in reach}

    def loss(self, w):
        residual = sum(np.sum(self.a[i] * w[i]) for i in self.reach) - self.b
        return 0.5 * sum(np.sum(self.c[i] * (w[i] - self.t[i]) ** 2) for i in self.reach) + 0.5 * residual**2

    def gradient(self, w):
        residual = sum(np.sum(self.a[i] * w[i]) for i in self.reach) - self.b
        return {i: self.c[i] * (w[i] - self.t[i]) + residual * self.a[i] for i in self.reach}

    def hessian_product(self, x):
        """H x, for an x on some of the tensors."""
        along = sum(np.sum(self.a[i] * x[i]) for i in self.reach if i in x)
        return {i: self.c[i] * x.get(i, 0.0) + along * self.a[i] for i in self.reach}

    def torch_loss(self, params):
        w = {i: params[i].double() for i in self.reach}
        c, t, a = ({i: torch.as_tensor(x[i]) for i in x} for x in (self.c, self.t, self.a))
        residual = sum((a[i] * w[i]).sum() for i in self.reach) - self.b
        return 0.5 * sum((c[i] * (w[i] - t[i]) ** 2).sum() for i in self.reach) + 0.5 * residual**2

    def closure(self, opt, params):
        def closure():
            opt.zero_grad()
            loss = self.torch_loss(params)
            if self.bad == ("w+eps" if opt.at_perturbed_point else "w"):
                loss = loss * math.nan
            if not opt.second_order:
                loss.backward()
            return loss

        return closure


# ----------------------------------------------------------------------------------------------------- the reference


class Skipped(Exception):
    """The gradient of an ascent is not finite; carries the loss of that ascent."""


class Reference:
    """SAM around SGD with momentum and weight decay, as design.md section 5 describes the step."""

    def __init__(self, momentum, decay, *, p=2.0, adaptive=False, eta=0.0, normalize=True, norm_eps=0.0, **rest):
        self.momentum, self.decay, self.p, self.normalize, self.norm_eps = momentum, decay, p, normalize, norm_eps
        self.eta = eta if adaptive else None
        self.inner_steps, self.ascent_every = rest.get("inner_steps", 1), rest.get("ascent_every", 1)
        self.second_order = rest.get("second_order", False)
        self.is_perturbed = rest.get("perturb_filter") or (lambda w: True)
        self.is_scaled = rest.get("scale_filter") or (lambda w: True)
        self.w, self.rho, self.lr, self.frozen, self.buffer = {}, {}, {}, set(), {}
        self.steps = self.skipped = 0

    def step(self, shards, shares=None, ascent=None):
        """The loss that `step` returns."""
        shares = [1 / len(shards)] * len(shards) if shares is None else [share / sum(shares) for share in shares]
        ascends = self.steps % self.ascent_every == 0 and bool(self.perturbable())
        self.steps += 1
        try:
            if not ascends:
                loss, grads = self.mean([self.descend(shard, "w", {}) for shard in shards], shares)
            elif ascent is not None:
                loss, grads = self.sharp(ascent, shards, shares)
            else:
                loss, grads = self.mean([self.sharp(shard, [shard], [1.0]) for shard in shards], shares)
        except Skipped as skipped:
            self.skipped += 1
            return skipped.args[0]
        if all(np.isfinite(g).all() for g in grads.values()):
            self.update(grads)
        else:
            self.skipped += 1
        return loss

    def sharp(self, ascent, shards, shares):
        loss, _ = self.descend(ascent, "w", {})
        eps = self.ascend(ascent)
        _, grads = self.mean([self.descend(shard, "w+eps", eps) for shard in shards], shares)
        if self.second_order:
            self.add_second_order_term(ascent, grads)
        return loss, grads

    def descend(self, shard, place, eps):
        """The loss and the gradients of the tensors that are trained, at w + eps."""
        w = {i: self.w[i] + eps.get(i, 0.0) for i in self.w}
        factor = math.nan if shard.bad == place else 1.0
        grads = {i: factor * g for i, g in shard.gradient(w).items() if i not in self.frozen}
        return factor * shard.loss(w), grads

    def mean(self, results, shares):
        total = {}
        for (_, grads), share in zip(results, shares, strict=True):
            for i, g in grads.items():
                total[i] = total.get(i, 0.0) + share * g
        return sum(share * loss for (loss, _), share in zip(results, shares, strict=True)), total

    def perturbable(self):
        return [i for i in self.w if self.rho[i] > 0 and i not in self.frozen and self.is_perturbed(self.w[i])]

    def scale(self, i):
        return (
            np.ones_like(self.w[i]) if self.eta is None or not self.is_scaled(self.w[i]) else abs(self.w[i]) + self.eta
        )

    def ascend(self, shard):
        """Inner steps of length rho, each from the last point and followed by the projection on the ball."""
        at = [i for i in self.perturbable() if i in shard.reach]
        eps = {i: np.zeros_like(self.w[i]) for i in at}
        for inner_step in range(self.inner_steps if at else 0):
            loss, grads = self.descend(shard, "w+eps" if inner_step else "w", eps)
            if any(np.isnan(grads[i]).any() for i in at):
                raise Skipped(loss if not inner_step else shard.loss(self.w))
            u = self.direction({i: self.scale(i) * grads[i] for i in at})
            total = {i: eps[i] / (self.rho[i] * self.safe_scale(i)) + u[i] for i in at}
            if inner_step:
                total = self.projected(total)
            eps = {i: self.rho[i] * self.scale(i) * total[i] for i in at}
        return eps

    def safe_scale(self, i):
        return np.where(self.scale(i) > 0, self.scale(i), 1.0)

    def direction(self, h):
        """The maximiser of <u, h> over ||u||_p <= 1, Foret et al. 2021, equation 2."""
        q = 1.0 if self.p == math.inf else self.p / (self.p - 1)
        length = self.norm(h, q)
        divisor = length + self.norm_eps if self.normalize else 1.0
        if length == 0:
            return {i: np.zeros_like(x) for i, x in h.items()}
        if q == 1:
            return {i: np.sign(x) for i, x in h.items()}
        return {i: np.sign(x) * (abs(x) / divisor) ** (q - 1) for i, x in h.items()}

    def projected(self, u):
        if self.p == math.inf:
            return {i: np.clip(x, -1, 1) for i, x in u.items()}
        return {i: x / max(1.0, self.norm(u, self.p)) for i, x in u.items()}

    def norm(self, tensors, order):
        return sum(np.sum(abs(x) ** order) for x in tensors.values()) ** (1 / order)

    def add_second_order_term(self, ascent, grads):
        """(d eps / d w)' v for p = 2, T = 1: H (I - u u') rho v / ||g||, with v the gradient at w + eps."""
        at = self.perturbable()
        g = {i: x for i, x in self.descend(ascent, "w", {})[1].items() if i in at}
        length = self.norm(g, 2)
        if length == 0 or not any(i in grads for i in at):
            return
        v = {i: self.rho[i] * grads[i] for i in g if i in grads}
        along = sum(np.sum(g[i] * v[i]) for i in v) / length**2
        x = {i: (v.get(i, 0.0) - along * g[i]) / length for i in g}
        for i, term in ascent.hessian_product(x).items():
            if i not in self.frozen:
                grads[i] = grads.get(i, 0.0) + term

    def update(self, grads):
        for i, g in grads.items():
            self.buffer[i] = self.momentum * self.buffer.get(i, 0.0) + g + self.decay * self.w[i]
            self.w[i] = self.w[i] - self.lr[i] * self.buffer[i]


# ------------------------------------------------------------------------------------------------- drawn trainings


def no_vector(w):
    return w.ndim != 1


def parameter(shape, dtype, transposed=False):
    values = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(shape) + sum(shape)))
    values = values.to(dtype)
    if transposed and values.ndim > 1:
        values = values.transpose(0, -1).contiguous().transpose(0, -1)
    return nn.Parameter(values)


METHODS = {
    "sam": {},
    "p 1.5, norm eps": {"p": 1.5, "norm_eps": 0.1},
    "p 3, every 2nd step": {"p": 3.0, "ascent_every": 2},
    "p inf, filter": {"p": math.inf, "perturb_filter": no_vector},
    "3 inner steps, norm eps": {"inner_steps": 3, "norm_eps": 0.1},
    "2 inner steps, p inf": {"inner_steps": 2, "p": math.inf},
    "3 inner steps, p 1.5, filter": {"inner_steps": 3, "p": 1.5, "perturb_filter": no_vector},
    "asam eta 0": {"adaptive": True},
    "asam p 1.5, filter, every 3rd step": {"adaptive": True, "eta": 0.1, "p": 1.5, "scale_filter": no_vector}
    | {"ascent_every": 3},
    "asam p inf": {"adaptive": True, "eta": 0.1, "p": math.inf},
    "asam 3 inner steps": {"adaptive": True, "eta": 0.1, "inner_steps": 3},
    "not normalised": {"normalize": False},
    "not normalised asam": {"normalize": False, "adaptive": True, "eta": 0.1},
    "second order": {"second_order": True},
    "second order, filter, every 2nd step": {"second_order": True, "perturb_filter": no_vector, "ascent_every": 2},
}
RHOS = st.sampled_from([0.0, 0.05, 0.3])
DTYPES = [torch.float64, torch.float64, torch.float32]


class Training(RuleBasedStateMachine):
    """An optimiser and the reference beside it, through any sequence of what a user may do with one."""

    def __init__(self, method, backend):
        super().__init__()
        self.method, self.backend = method, backend

    @initialize(data=st.data())
    def begin(self, data):
        sizes = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=3), "group sizes")
        shapes = [data.draw(st.sampled_from(SHAPES)) for _ in range(max(1, sum(sizes)))]
        if all(len(shape) == 1 for shape in shapes):
            shapes[0] = (2, 3)  # a filter that declines every tensor is refused
        self.dtypes, self.transposed = DTYPES if data.draw(st.booleans()) else DTYPES[:1], data.draw(st.booleans())
        sizes[0] += not sum(sizes)
        hyper = {"momentum": 0.9, "weight_decay": 0.01}
        # not fused: torch 2.15's fused SGD fails once a tensor gets its first gradient later than another
        hyper |= data.draw(st.sampled_from([{}, {"foreach": True}, {"foreach": False}]), "base")
        self.params = []
        self.reference = Reference(hyper["momentum"], hyper["weight_decay"], **self.method)
        self.make = partial(SAM, base_optimizer=SGD, **hyper, **self.method, **self.backend)
        groups = [self.group([shapes.pop() for _ in range(size)], data.draw(RHOS, "rho"), 0.05) for size in sizes]
        self.opt = self.make(groups)

    def group(self, shapes, rho, lr):
        """A new group for the optimiser, which the reference is told of, too."""
        first = len(self.params)
        for shape in shapes:
            dtype = self.dtypes[len(self.params) % len(self.dtypes)]
            self.params.append(parameter(shape, dtype, self.transposed))
        for i in range(first, len(self.params)):
            self.reference.w[i] = self.params[i].detach().double().numpy().copy()
            self.reference.rho[i], self.reference.lr[i] = rho, lr
        return {"params": self.params[first:], "rho": rho, "lr": lr}

    def trained(self):
        return [i for i, w in enumerate(self.params) if w.requires_grad]

    def shard(self, data, bad=""):
        others = data.draw(st.sets(st.sampled_from(range(len(self.params)))), "reach")
        reach = sorted(others | {data.draw(st.sampled_from(self.trained()))})
        # a mixture of dtypes has a test of its own, which fails at present
        zero = data.draw(st.sampled_from([False, False, False, True]), "zero gradient")
        return Shard([w.shape for w in self.params], reach, data.draw(st.integers(0, 99)), bad, zero)

    def shards(self, data):
        found = [self.shard(data) for _ in range(data.draw(st.integers(1, 3), "shards"))]
        found[-1].bad = data.draw(st.sampled_from(["", "", "", "w", "w+eps"]), "bad")
        return found

    @rule(data=st.data(), repeats=st.integers(1, 3))
    def step(self, data, repeats):
        shards = self.shards(data)
        shares = data.draw(st.sampled_from([None, [1.0, 3.0, 2.5][: len(shards)]]), "weights")
        ascent = self.shard(data, data.draw(st.sampled_from(["", "", "w"]))) if data.draw(st.booleans()) else None
        for _ in range(repeats):
            self.one_step(shards, shares, ascent)

    def one_step(self, shards, shares, ascent):
        closures = [shard.closure(self.opt, self.params) for shard in shards]
        found = self.opt.step(
            closures[0] if len(closures) == 1 else closures,
            weights=shares,
            ascent_closure=ascent and ascent.closure(self.opt, self.params),
        )
        expected = self.reference.step(shards, shares, ascent)
        assert not found.requires_grad
        np.testing.assert_allclose(found, expected, rtol=self.tolerance(), atol=self.tolerance())

    @precondition(lambda self: not self.opt.second_order and self.opt.inner_steps == 1)
    @rule(data=st.data(), zero_grad=st.booleans())
    def two_steps(self, data, zero_grad):
        [shard, *_] = self.shards(data)
        closure = shard.closure(self.opt, self.params)
        closure()
        self.opt.first_step(zero_grad)
        assert not zero_grad or all(w.grad is None for w in self.params)
        closure()
        self.opt.second_step(zero_grad)
        self.reference.step([shard])

    @rule(data=st.data(), at_call=st.integers(0, 3))
    def fail(self, data, at_call):
        """A closure raises: nothing has happened, except to the gradients."""
        shard, before = self.shard(data), copy.deepcopy(self.params)
        inner, calls = shard.closure(self.opt, self.params), []

        def closure():
            calls.append(None)
            if len(calls) > at_call:
                raise KeyboardInterrupt
            return inner()

        with pytest.raises(KeyboardInterrupt):
            self.opt.step([closure] * 4)
        assert_same(self.params, before)

    @rule()
    def save_and_load(self):
        file = io.BytesIO()
        torch.save((self.params, self.opt.state_dict()), file)
        file.seek(0)
        params, state = torch.load(file, weights_only=True)
        self.params = [w.requires_grad_(old.requires_grad) for w, old in zip(params, self.params, strict=True)]
        left = iter(self.params)
        groups = [  # what they are made with is replaced by what is loaded
            {"params": [next(left) for _ in group["params"]], "rho": 9.0, "lr": 9.0} for group in self.opt.param_groups
        ]
        self.opt = self.make(groups)
        self.opt.load_state_dict(state)

    @rule(shape=st.sampled_from(SHAPES), rho=RHOS)
    @precondition(lambda self: len(self.params) < 12)
    def add_group(self, shape, rho):
        self.opt.add_param_group(self.group([shape], rho, 0.02))

    @rule(data=st.data(), rho=RHOS, lr=st.sampled_from([0.0, 0.02, 0.05]))
    def change_a_group(self, data, rho, lr):
        group = data.draw(st.sampled_from(self.opt.param_groups))
        group["rho"], group["lr"] = rho, lr
        for i, w in enumerate(self.params):
            if any(w is one for one in group["params"]):
                self.reference.rho[i], self.reference.lr[i] = rho, lr

    @rule(data=st.data())
    def freeze_or_thaw(self, data):
        i = data.draw(st.sampled_from(range(len(self.params))))
        if self.trained() != [i]:
            self.params[i].requires_grad_(not self.params[i].requires_grad)
            self.reference.frozen ^= {i}

    def tolerance(self):
        return 1e-10 if all(dtype == torch.float64 for dtype in self.dtypes) else 1e-3

    @invariant()
    def the_weights_are_those_of_the_reference(self):
        for i, w in enumerate(self.params):
            np.testing.assert_allclose(
                w.detach().double(), self.reference.w[i], rtol=self.tolerance(), atol=self.tolerance()
            )
        assert self.opt.skipped_steps == self.reference.skipped
        assert self.opt.state_dict()["sam"]["steps"] == self.reference.steps
        assert not self.opt.at_perturbed_point
        assert self.opt.unperturbed() == {}


def assert_same(found, expected):
    """Bit for bit."""
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@on_all_backends("method", METHODS, dict)
def test_any_sequence_of_operations_is_that_of_the_reference(method, backend):
    sequences = settings(PROPERTY, max_examples=15, stateful_step_count=12)
    run_state_machine_as_test(partial(Training, method, backend), settings=sequences)


# ------------------------------------------------------------------------------------- single steps on drawn tensors

SHAPE_LISTS = st.one_of(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=5), st.just([(2,)] * 60))
NARROW = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
VARIANTS = st.sampled_from(
    [
        (SAM, {}),
        (SAM, {"p": 1.5}),
        (SAM, {"p": math.inf}),
        (SAM, {"inner_steps": 2}),
        (SAM, {"normalize": False}),
        (SAM, {"second_order": True}),
        (ASAM, {}),
        (ASAM, {"eta": 0.0, "p": math.inf}),
        (AverageSAM, {}),
        (AverageSAM, {"adaptive": True, "p": 1.5}),
    ]
)


def quartic(opt, params, seen=None):
    """The closure of sum w^4 / 4, whose gradient is w^3; `seen` collects the weights of every pass."""

    def closure():
        opt.zero_grad()
        if seen is not None:
            seen.append([w.detach().clone() for w in params])
        loss = sum(0.25 * (w.double() ** 4).sum() for w in params)
        if not opt.second_order:
            loss.backward()
        return loss

    return closure


@all_backends
@PROPERTY
@given(data=st.data(), shapes=SHAPE_LISTS, variant=VARIANTS, num_shards=st.integers(1, 3), transposed=st.booleans())
def test_restored_bit_for_bit_at_any_shape_dtype_and_layout(backend, data, shapes, variant, num_shards, transposed):
    cls, method = variant
    assume(not excluded(method, backend))
    params = [parameter(shape, data.draw(st.sampled_from(NARROW)), transposed) for shape in shapes]
    before, strides = copy.deepcopy([w.detach() for w in params]), [w.stride() for w in params]
    opt = cls(params, SGD, rho=2.0, lr=0.0, **method, **backend)
    opt.step(quartic(opt, params))  # flat buffers are made in the first step
    addresses, seen = [w.data_ptr() for w in params], []
    opt.step([quartic(opt, params, seen)] * num_shards)
    assert_same(params, before)
    assert any(not torch.equal(w, old) for pass_ in seen for w, old in zip(pass_, before, strict=True))
    assert opt.skipped_steps == 0
    assert [w.data_ptr() for w in params] == addresses
    assert [w.stride() for w in params] == strides


@all_backends
@PROPERTY
@given(data=st.data(), shapes=SHAPE_LISTS, variant=VARIANTS)
def test_the_way_tensors_are_grouped_does_not_matter(backend, data, shapes, variant):
    """Groups of the same settings, in the order of the tensors, among them groups without a tensor."""
    cls, method = variant
    assume(not excluded(method, backend))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(shapes)), max_size=4), "cuts"))
    edges = list(zip([0, *cuts], [*cuts, len(shapes)], strict=True))
    ends = []
    for groups in ([(0, len(shapes))], edges):
        params = [parameter(shape, torch.float64) for shape in shapes]
        parts = [{"params": params[start:stop], "rho": 0.3} for start, stop in groups]
        opt = cls(parts, SGD, rho=9.0, lr=0.05, momentum=0.9, **method, **backend)
        for _ in range(3):
            opt.step([quartic(opt, params)] * 2)
        ends.append([w.detach() for w in params])
    for found, expected in zip(*ends, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@all_backends
@PROPERTY
@given(
    shapes=SHAPE_LISTS, rho=st.floats(1e-3, 10), p=st.sampled_from([1.2, 2.0, 5.0, math.inf]), adaptive=st.booleans()
)
def test_the_pass_at_w_plus_eps_is_where_the_functional_form_says(backend, shapes, rho, p, adaptive):
    params = [parameter(shape, torch.float64) for shape in shapes]
    how = {"p": p, "adaptive": adaptive, "eta": 0.1 * adaptive}
    opt, seen = SAM(params, SGD, rho=rho, lr=0.1, **how, **backend), []
    closure = quartic(opt, params, seen)
    w = [t.detach().clone() for t in params]
    eps = perturbation(w, [t**3 for t in w], rho, **how)
    closure()
    seen.clear()
    for found, expected in zip(opt.perturbation(), eps, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    opt.step(closure)
    for found, start, e in zip(seen[1], w, eps, strict=True):
        torch.testing.assert_close(found, start + e, rtol=1e-12, atol=1e-14)


@all_backends
@pytest.mark.parametrize(
    "cls, p",
    [
        (SAM, 2.0),
        (SAM, math.inf),
        (ASAM, 2.0),
        (ASAM, math.inf),
        (AverageSAM, 2.0),
        (SAM, 1.5),
        (ASAM, 1.5),
        (AverageSAM, math.inf),
    ],
)
def test_tensors_without_entries_do_no_harm(cls, p, backend):
    params, reference = ([parameter(shape, torch.float64) for shape in SHAPES] for _ in range(2))
    empty = nn.Parameter(torch.empty(0, dtype=torch.float64))
    opts = [cls(ws, SGD, lr=0.1, p=p, **backend) for ws in ([params[0], empty, *params[1:]], reference)]
    opts[0].step(quartic(opts[0], [*params, empty]))
    opts[1].step(quartic(opts[1], reference))
    for found, expected in zip(params, reference, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


@all_backends
@pytest.mark.parametrize("cls", [SAM, ASAM])
@pytest.mark.parametrize(
    "dtypes, rho",
    [
        ([torch.float32], 0.05),
        ([torch.float64], 0.05),
        ([torch.float32], 5.0),
        ([torch.float64], 5.0),
        ([torch.float32, torch.float64], 0.05),
    ],
    ids=str,
)
def test_a_zero_gradient_perturbs_nothing_at_any_radius_and_dtype(dtypes, rho, cls, backend):
    params = [parameter((3,), dtype) for dtype in dtypes]
    before = [w.detach().clone() for w in params]
    opt, seen = cls(params, SGD, rho=rho, lr=0.1, **backend), []

    def closure():
        opt.zero_grad()
        seen.append([w.detach().clone() for w in params])
        loss = 0.0 * sum(w.double().sum() for w in params)
        loss.backward()
        return loss

    opt.step(closure)
    assert len(seen) == 2
    assert_same(seen[1], before)
    assert_same(params, before)
