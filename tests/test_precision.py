"""SAM in low precision: the perturbation that acts, the loss scale, and layers as two products."""

import copy
import json
import math
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from samlib.bench import precision as bench
from samlib.errors import InputError
from samlib.measures import effective_perturbation
from samlib.measures.precision import LowPrecisionWarning, acting_perturbation, round_to_tf32
from samlib.optim import ASAM, SAM, AverageSAM
from samlib.two_products import two_products

SGD = torch.optim.SGD
PROPERTY = settings(deadline=None, derandomize=True, max_examples=100)
NARROW = {"bf16": torch.bfloat16, "fp16": torch.float16}
# bits of the mantissa, least normal exponent
FORMATS = {"fp32": (23, -126), "tf32": (10, -126), "fp16": (10, -14), "bf16": (7, -126)}
BF16_SPACING = 2.0**-7  # of bf16 numbers from 1 to 2; half of it from 0.5 to 1


def numpy_round(x, precision):
    """float64 to the nearest number of a format, subnormal ones included."""
    bits, least_exponent = FORMATS[precision]
    _, exponent = np.frexp(x)  # |x| in [2^(exponent - 1), 2^exponent)
    last_bit = np.maximum(exponent - 1, least_exponent) - bits
    units = np.ldexp(x, -last_bit)
    to_even = np.rint(units)
    away_from_zero = np.sign(units) * np.floor(np.abs(units) + 0.5)
    return np.ldexp(away_from_zero if precision == "tf32" else to_even, last_bit)


def compared(acting, eps):
    """The three numbers from the vectors, in NumPy."""
    length = np.linalg.norm(acting)
    return {
        "norm_ratio": length / np.linalg.norm(eps),
        "cosine": acting @ eps / (length * np.linalg.norm(eps)) if length else 0.0,
        "unmoved_fraction": np.mean(acting == 0),
    }


def flat(tensors):
    return torch.cat([t.detach().double().flatten() for t in tensors]).numpy()


def assert_equal(found, expected):
    """Bit for bit, for tensors or state dicts."""
    found, expected = (list(x.values()) if isinstance(x, dict) else list(x) for x in (found, expected))
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def optimiser(weights, grads, rho, *, cls=SAM, dtype=torch.float32, **how):
    """With one parameter that holds `weights` and has the gradient `grads`."""
    w = nn.Parameter(torch.tensor(weights, dtype=dtype))
    w.grad = torch.tensor(grads, dtype=dtype)
    return cls([w], SGD, rho=rho, lr=0.1, **how)


# ------------------------------------------------------------------------------------------------ the emulated rounding


@st.composite
def weights_and_eps(draw):
    """float32 vectors from the subnormal numbers of each format up, with eps from invisible to larger than w."""
    precision = draw(st.sampled_from(list(FORMATS)))
    generator = np.random.default_rng(draw(st.integers(0, 2**20)))
    w = generator.normal(size=draw(st.integers(1, 30))) * 2.0 ** draw(
        st.integers(-30 if precision == "fp16" else -140, 8)
    )
    eps = generator.normal(size=w.size) * np.abs(w).max() * 2.0 ** draw(st.integers(-14, 1))
    return precision, w.astype(np.float32), eps.astype(np.float32)


@PROPERTY
@given(weights_and_eps())
def test_every_format_is_that_of_numpy_with_own_rounding(drawn):
    precision, w, eps = drawn
    acting = numpy_round((w + eps).astype(np.float64), precision) - numpy_round(w.astype(np.float64), precision)
    found = effective_perturbation([torch.from_numpy(w)], [torch.from_numpy(eps)], precision)
    if np.any(eps):
        assert found == pytest.approx(compared(acting, eps.astype(np.float64)), rel=1e-9, abs=1e-12)


def test_subnormal_weights_keep_the_spacing_of_the_least_normal_ones():
    for precision, least in (("bf16", 2.0**-133), ("fp16", 2.0**-24), ("tf32", 2.0**-136)):
        w = torch.tensor([3 * least])
        assert effective_perturbation([w], [torch.tensor([0.4 * least])], precision)["unmoved_fraction"] == 1
        assert effective_perturbation([w], [torch.tensor([least])], precision)["norm_ratio"] == 1


def test_a_nan_with_all_bits_set_is_a_nan_in_tf32():
    """CUDA's NaN, to which no bit can be added."""
    assert round_to_tf32(torch.tensor([2**31 - 1], dtype=torch.int32).view(torch.float32)).isnan().all()


def test_tensors_without_entries_count_for_nothing():
    empty = torch.empty(0, 3)
    assert np.isnan(list(effective_perturbation([empty], [empty], "bf16").values())).all()
    found = effective_perturbation([empty, torch.ones(1)], [empty, torch.full((1,), BF16_SPACING)], "bf16")
    assert found == {"norm_ratio": 1.0, "cosine": 1.0, "unmoved_fraction": 0.0}


@pytest.mark.parametrize("name", NARROW)
def test_weights_stored_in_16_bits_round_the_sum_in_every_precision(name):
    w, eps = torch.ones(1, dtype=NARROW[name]), torch.tensor([2.0**-12])
    for precision in FORMATS:
        assert effective_perturbation([w], [eps], precision)["unmoved_fraction"] == 1


# --------------------------------------------------------------------------------------------------- the call of a user


def test_of_eps_under_half_a_spacing_nothing_acts_on_powers_of_two():
    powers = [1.0, 2.0, 4.0, 64.0]  # eps is rho in every entry for p = inf
    opt = optimiser(powers, [1.0] * 4, 0.49 * BF16_SPACING, p=math.inf)
    with pytest.warns(LowPrecisionWarning):
        assert acting_perturbation(opt, "bf16") == {"norm_ratio": 0.0, "cosine": 0.0, "unmoved_fraction": 1.0}
    downwards = optimiser(powers[:1], [-1.0], 0.51 * BF16_SPACING / 2, p=math.inf)  # the spacing below 1 is half
    assert acting_perturbation(downwards, "bf16") == pytest.approx(
        {"norm_ratio": 1 / 0.51, "cosine": 1.0, "unmoved_fraction": 0.0}
    )


@pytest.mark.parametrize("precision", FORMATS)
def test_of_a_representable_eps_all_acts(precision):
    opt = optimiser([1.0, -1.0, 0.5], [1.0, -3.0, 0.25], BF16_SPACING, p=math.inf)
    assert acting_perturbation(opt, precision) == {"norm_ratio": 1.0, "cosine": 1.0, "unmoved_fraction": 0.0}


def two_layers(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 4)).to(dtype)


def batch(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(16, 20, generator=generator, dtype=torch.float64).to(dtype)
    return inputs, torch.randint(4, (16,), generator=generator)


def closure_of(opt, model, data, at_point=lambda: None):
    """Calls `at_point` after the backward pass of each pass."""

    def closure():
        opt.zero_grad()
        loss = nn.functional.cross_entropy(model(data[0]), data[1])
        loss.backward()
        at_point()
        return loss

    return closure


@pytest.mark.parametrize("cls", [SAM, ASAM, AverageSAM])
@pytest.mark.parametrize("precision", FORMATS)
@pytest.mark.filterwarnings("ignore::samlib.measures.precision.LowPrecisionWarning")
def test_at_w_and_at_the_perturbed_point_it_is_the_numpy_computation(cls, precision):
    model = two_layers()
    opt, found, eps, perturbed = cls(model.parameters(), SGD, rho=0.05, lr=0.1), [], [], []
    w = flat(model.parameters())

    def look():
        found.append(acting_perturbation(opt, precision))
        (perturbed if opt.at_perturbed_point else eps).append(
            flat(model.parameters() if opt.at_perturbed_point else opt.perturbation())
        )

    if cls is AverageSAM:  # has no pass at w
        look()
    opt.step(closure_of(opt, model, batch(), look))
    stored = (w.astype(np.float32) + eps[0].astype(np.float32)).astype(np.float64)
    for point, intended, measured in ((stored, eps[0], found[0]), (perturbed[0], perturbed[0] - w, found[1])):
        acting = numpy_round(point, precision) - numpy_round(w, precision)
        assert measured == pytest.approx(compared(acting, intended), rel=1e-9)
    assert len(found) == 2
    assert np.linalg.norm(perturbed[0] - w - eps[0]) < 1e-4 * np.linalg.norm(eps[0])


@pytest.mark.parametrize("name", NARROW)
@pytest.mark.filterwarnings("ignore::samlib.measures.precision.LowPrecisionWarning")
def test_it_is_what_a_layer_under_autocast_sees(name):
    """Applied to the identity, a layer shows the weight that it multiplies with."""
    torch.manual_seed(0)
    layer = nn.Linear(24, 40, bias=False)
    opt, seen, found = SAM(layer.parameters(), SGD, rho=0.05, lr=0.1), [], []

    def closure():
        opt.zero_grad()
        with torch.autocast("cpu", NARROW[name]):
            seen.append(layer(torch.eye(24)).detach().double())
            loss = layer(torch.ones(3, 24)).float().square().sum()
        loss.backward()
        found.append(acting_perturbation(opt, name))
        return loss

    w = flat(layer.parameters())
    opt.step(closure)
    assert np.array_equal(seen[0].T.flatten().numpy(), numpy_round(w, name))
    acting = flat([(seen[1] - seen[0]).T])
    assert found[0]["unmoved_fraction"] == np.mean(acting == 0)
    assert found[1]["norm_ratio"] == pytest.approx(np.linalg.norm(acting) / 0.05, rel=1e-4)
    assert found[0] == pytest.approx(found[1], rel=1e-4)


@pytest.mark.parametrize("name", NARROW)
def test_loss_and_gradient_under_autocast_are_those_of_rounded_weights(name):
    dtype, data = NARROW[name], batch()
    torch.manual_seed(0)
    layer = nn.Linear(20, 4)
    opt = SAM(layer.parameters(), SGD, rho=0.02, lr=0.1)
    found = []

    def closure():
        opt.zero_grad()
        with torch.autocast("cpu", dtype):
            loss = nn.functional.cross_entropy(layer(data[0]), data[1])
        loss.backward()
        rounded = [w.detach().to(dtype).requires_grad_() for w in layer.parameters()]
        expected = nn.functional.cross_entropy(nn.functional.linear(data[0].to(dtype), *rounded).float(), data[1])
        expected.backward()
        assert torch.equal(loss, expected)
        assert_equal([w.grad for w in layer.parameters()], [w.grad.float() for w in rounded])
        found.append(loss.item())
        return loss

    opt.step(closure)
    assert found[0] != found[1]


def test_where_nothing_acts_the_second_pass_is_the_first_bit_for_bit():
    layer = nn.Linear(20, 4)
    with torch.no_grad():
        layer.weight.fill_(0.5)
        layer.bias.fill_(0.5)
    opt, seen = SAM(layer.parameters(), SGD, rho=0.1 * BF16_SPACING, p=math.inf, lr=0.1), []

    def closure():
        opt.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = nn.functional.cross_entropy(layer(batch()[0]), batch()[1])
        loss.backward()
        with nullcontext() if seen else pytest.warns(LowPrecisionWarning, match="100% of the weights do not move"):
            acting_perturbation(opt, "bf16")
        seen.append([loss.detach(), *[w.grad for w in layer.parameters()]])
        return loss

    opt.step(closure)
    assert_equal(*seen)


@pytest.mark.parametrize("name", NARROW)
def test_weights_stored_in_16_bits_are_measured_at_w_and_refused_at_the_perturbed_point(name):
    model = two_layers(NARROW[name])
    inputs, labels = batch(dtype=NARROW[name])
    opt = SAM(model.parameters(), SGD, rho=0.3, lr=0.1)
    nn.functional.cross_entropy(model(inputs).float(), labels).backward()
    before, eps = flat(model.parameters()), flat(opt.perturbation())
    found = acting_perturbation(opt, "fp32")
    assert acting_perturbation(opt, name) == found
    opt.first_step()
    assert found == pytest.approx(compared(flat(model.parameters()) - before, eps), rel=1e-9)
    assert 0 < found["unmoved_fraction"] < 1
    with pytest.raises(InputError, match=f"stored in {NARROW[name]}"):
        acting_perturbation(opt, "fp32")


def test_only_what_is_perturbed_counts():
    moved, filtered, frozen = (nn.Parameter(torch.ones(shape)) for shape in ((2,), (2, 2), (3,)))
    frozen.requires_grad_(False)
    for w in (moved, filtered):
        w.grad = torch.ones_like(w)
    opt = SAM([moved, filtered, frozen], SGD, rho=BF16_SPACING * 2**0.5, lr=0.1, perturb_filter=lambda w: w.ndim == 1)
    exact = {"norm_ratio": 1.0, "cosine": 1.0, "unmoved_fraction": 0.0}
    assert acting_perturbation(opt, "bf16") == pytest.approx(exact)
    opt.first_step()
    assert acting_perturbation(opt, "bf16") == pytest.approx(exact)


@pytest.mark.parametrize("grads, rho", [(None, 0.1), ([1.0], 0.0), ([0.0], 0.1)])
def test_without_a_perturbation_all_is_nan_and_nothing_is_said(grads, rho):
    opt = optimiser([1.0], grads or [0.0], rho)
    if grads is None:
        opt.zero_grad()
    for point in ("at w", "in the second pass"):
        if point != "at w":
            opt.first_step()
        assert np.isnan(list(acting_perturbation(opt, "bf16").values())).all()
        with pytest.raises(InputError, match="precision: 'fp8' is unknown"):
            acting_perturbation(opt, "fp8")


def test_a_gradient_that_is_not_finite_gives_nan_and_no_warning():
    found = acting_perturbation(optimiser([1.0, 2.0], [math.inf, 1.0], 0.1), "bf16")
    assert np.isnan([found["norm_ratio"], found["cosine"]]).all()


@pytest.mark.parametrize("share, warns", [(0.48, False), (0.49, True)])
def test_the_warning_comes_below_a_cosine_of_0_9(share, warns):
    """Of eps = spacing (1, share) on ones the first entry acts: cosine 1 / sqrt(1 + share^2) = 0.902 and 0.898."""
    rho = BF16_SPACING * math.hypot(1, share)
    opt = optimiser([1.0, 1.0], [1.0, share], rho)
    with pytest.warns(LowPrecisionWarning) if warns else nullcontext():
        assert acting_perturbation(opt, "bf16")["cosine"] == pytest.approx(1 / math.hypot(1, share))


def test_the_warning_comes_once_for_each_optimiser_and_says_what_to_do():
    for opt in [optimiser([1.0], [1.0], 0.001) for _ in range(2)]:
        with pytest.warns(LowPrecisionWarning) as caught:
            acting_perturbation(opt, "bf16")
        acting_perturbation(opt, "bf16")  # a warning here would be an error
        [warning] = caught
        assert warning.filename == __file__
        for part in ("in bf16", "cosine 0.00", "0.00 times its norm", "100%"):
            assert part in str(warning.message)
        for remedy in ("fp16", "TF32", "larger rho", "samlib.two_products", "fp32"):
            assert remedy in str(warning.message)


@pytest.mark.parametrize("cls", [SAM, ASAM, AverageSAM])
@pytest.mark.filterwarnings("ignore::samlib.measures.precision.LowPrecisionWarning")
def test_measuring_leaves_no_trace_in_a_training(cls):
    ends = []
    for measured in (False, True):
        model = two_layers()
        opt = cls(model.parameters(), SGD, rho=0.05, lr=0.1, momentum=0.9)

        def look(opt=opt, measured=measured):
            if measured:
                acting_perturbation(opt, "bf16")

        torch.manual_seed(1)
        for step in range(3):
            opt.step(closure_of(opt, model, batch(step), look))
            look()
        ends.append([*model.parameters(), *[w.grad for w in model.parameters()], torch.get_rng_state()])
    assert_equal(*ends)


@pytest.mark.parametrize("power", [-12, 12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_loss_scale_does_not_matter(power, dtype):
    """To a power of two, in both the measure and eps: bit for bit."""
    plain, scaled = ([2.0**k * g for g in (0.5, 1.0, -0.75)] for k in (0, power))
    opts = [optimiser([1.0, 0.3, -0.2], grads, 0.01, dtype=dtype) for grads in (plain, scaled)]
    assert_equal(*[opt.perturbation() for opt in opts])
    assert acting_perturbation(opts[0], "fp16") == acting_perturbation(opts[1], "fp16")


# ----------------------------------------------------------------------------------- GradScaler together with autocast


def scaled_step(opt, scaler, model, data, dtype, factors=(1.0, 1.0), seen=None):
    """A step under autocast; the loss of pass i is multiplied by factors[i] on its way into the backward pass."""

    def closure():
        opt.zero_grad()
        with torch.autocast("cpu", dtype):
            loss = nn.functional.cross_entropy(model(data[0]), data[1])
        scaler.scale(loss * factors[opt.at_perturbed_point]).backward()
        if seen is not None and not opt.at_perturbed_point:
            seen.append(opt.perturbation())
        return loss

    loss = opt.step(closure, scaler=scaler)
    scaler.update()
    return loss


@pytest.mark.parametrize("bad_pass", [0, 1])
def test_a_true_overflow_of_fp16_in_either_pass_skips_the_step_and_no_more(bad_pass):
    """The gradients inside the network overflow, none is set to inf by hand. The step after it is as if none had
    been."""
    factors = [1.0, 1.0]
    factors[bad_pass] = 2.0**16
    ends = []
    for overflows in (True, False):
        model = two_layers()
        opt = SAM(model.parameters(), SGD, rho=0.05, lr=0.1, momentum=0.9)
        scaler = torch.amp.GradScaler("cpu", init_scale=512.0 if overflows else 256.0)
        if overflows:
            before = copy.deepcopy(list(model.parameters()))
            assert math.isfinite(scaled_step(opt, scaler, model, batch(), torch.float16, factors))
            assert_equal(model.parameters(), before)
            assert not opt.at_perturbed_point
        assert (opt.skipped_steps, scaler.get_scale()) == (int(overflows), 256.0)
        for step in range(2):
            scaled_step(opt, scaler, model, batch(step), torch.float16)
        assert (opt.skipped_steps, scaler.get_scale()) == (int(overflows), 256.0)
        ends.append(model.state_dict())
    assert_equal(*ends)


@pytest.mark.parametrize("scale, tolerance", [(2.0**10, 0.0), (1000.0, 2.0**-6)])
def test_the_loss_scale_does_not_reach_eps_under_autocast(scale, tolerance):
    """Bit for bit where it is a power of two; bf16 has float32's exponents, so nothing leaves its range."""
    eps = []
    for init_scale in (1.0, scale):
        model = two_layers()
        opt = SAM(model.parameters(), SGD, rho=0.05, lr=0.1)
        scaled_step(opt, torch.amp.GradScaler("cpu", init_scale), model, batch(), torch.bfloat16, seen=(seen := []))
        eps.append(seen[0])
    for one, other in zip(*eps, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance * 0.05)


def test_a_loss_scale_too_small_for_fp16_loses_gradients_and_a_larger_one_finds_the_direction():
    """What a scaler is for, seen in eps: gradients below the least fp16 number vanish."""
    found = []
    for scale in (1.0, 2.0**12):
        model = two_layers()
        opt = SAM(model.parameters(), SGD, rho=0.05, lr=0.1)
        scaler = torch.amp.GradScaler("cpu", scale)
        scaled_step(opt, scaler, model, batch(), torch.float16, [2.0**-22, 2.0**-22], seen=(seen := []))
        found.append(flat(seen[0]))
    model = two_layers()
    opt = SAM(model.parameters(), SGD, rho=0.05, lr=0.1)
    closure_of(opt, model, batch())()
    cosines = [eps @ flat(opt.perturbation()) / 0.05 / max(np.linalg.norm(eps), 1e-30) for eps in found]
    assert cosines[0] < 0.9 < 0.999 < cosines[1]


@pytest.mark.parametrize("form", ["closure", "two steps"])
def test_autocast_around_the_whole_step_sees_the_perturbed_weights(form):
    """Autocast keeps the rounded weights until its outermost context ends."""
    losses = []
    for outer in (nullcontext, partial(torch.autocast, "cpu", torch.bfloat16)):
        model = two_layers()
        opt = SAM(model.parameters(), SGD, rho=1.0, lr=0.1)

        def loss_of_pass(opt=opt, model=model):
            opt.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = nn.functional.cross_entropy(model(batch()[0]), batch()[1])
            loss.backward()
            losses.append(loss.item())
            return loss

        with outer():
            if form == "closure":
                opt.step(loss_of_pass)
            else:
                loss_of_pass()
                opt.first_step()
                loss_of_pass()
                opt.second_step()
            loss_of_pass()
    assert losses[:3] == losses[3:]


# ----------------------------------------------------------------------------------------------- layers as two products


class Tied(nn.Module):
    """One weight in two layers, an embedding and a norm layer between them."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 6)
        self.inner, self.norm, self.outer = nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 6, bias=False)
        self.outer.weight = self.inner.weight

    def forward(self, inputs):
        tokens = self.embedding((inputs.flatten(1)[:, :3] * 10).long() % 5)
        return self.outer(self.norm(self.inner(tokens).tanh())).flatten(1)


def pooled(*layers):
    return nn.Sequential(*layers, nn.Flatten())


NETWORKS = {
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(128, 7), nn.Tanh(), nn.Linear(7, 4, bias=False)),
    "conv2d": lambda: pooled(nn.Conv2d(2, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3, groups=2)),
    "padding": lambda: pooled(
        nn.Conv2d(2, 4, 3, padding="same", dilation=2), nn.Tanh(), nn.Conv2d(4, 2, 3, padding=1, padding_mode="reflect")
    ),
    "conv1d": lambda: nn.Sequential(nn.Flatten(2), nn.Conv1d(2, 4, 5, bias=False), nn.Tanh(), nn.Flatten()),
    "conv3d": lambda: nn.Sequential(nn.Unflatten(1, (1, 2)), nn.Conv3d(1, 2, (2, 3, 3)), nn.Tanh(), nn.Flatten()),
    "transposed": lambda: pooled(nn.Conv2d(2, 4, 3, stride=2), nn.Tanh(), nn.ConvTranspose2d(4, 2, 3, 2, groups=2)),
    "tied": Tied,
}


def built(name, dtype=torch.float64):
    torch.manual_seed(0)
    return NETWORKS[name]().to(dtype)


def images(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(6, 2, 8, 8, generator=generator, dtype=torch.float64).to(dtype), torch.arange(6) % 2


def split_closure(opt, model, data, split=two_products, seen=None):
    def closure():
        opt.zero_grad()
        with split(opt):
            loss = nn.functional.cross_entropy(model(data[0]), data[1])
        if not opt.second_order:
            loss.backward()
        if seen is not None:
            seen.append([loss.detach(), *[w.grad.clone() for w in model.parameters()]])
        return loss

    return closure


def plain(opt):
    return nullcontext()


@pytest.mark.parametrize("name", NETWORKS)
def test_in_double_precision_it_is_the_plain_pass(name):
    seen = {two_products: [], plain: []}
    for split, found in seen.items():
        model = built(name)
        opt = SAM(model.parameters(), SGD, rho=0.5, lr=0.1)
        opt.step(split_closure(opt, model, images(), split, found))
    assert_equal(seen[two_products][0], seen[plain][0])  # at w
    assert seen[two_products][1][0] != seen[two_products][0][0]
    torch.testing.assert_close(seen[two_products][1], seen[plain][1], rtol=1e-12, atol=1e-12)


FORMS = {
    "asam": (ASAM, {}),
    "average": (AverageSAM, {}),
    "inner steps": (SAM, {"inner_steps": 3}),
    "every second step": (SAM, {"ascent_every": 2}),
    "second order": (SAM, {"second_order": True}),
    "weights alone": (SAM, {"perturb_filter": lambda w: w.ndim > 1}),
    "biases alone": (SAM, {"perturb_filter": lambda w: w.ndim == 1}),
}


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_step_trains_as_without_it(form, shards):
    cls, how = FORMS[form]
    ends = []
    for split in (two_products, plain):
        model = built("conv2d")
        opt = cls(model.parameters(), SGD, rho=0.3, lr=0.1, momentum=0.9, **how)
        inputs, labels = images()
        data = list(zip(inputs.chunk(shards), labels.chunk(shards), strict=True))
        for _ in range(3):
            opt.step([split_closure(opt, model, shard, split) for shard in data])
        ends.append(list(model.parameters()))
    torch.testing.assert_close(*ends, rtol=1e-11, atol=1e-11)


def test_layers_that_are_frozen_stay_plain_and_the_others_are_split():
    losses = []
    for split in (two_products, plain):
        model = built("linear")
        model[1].requires_grad_(False)
        opt = SAM(model.parameters(), SGD, rho=0.3, lr=0.1)
        opt.step(closure := split_closure(opt, model, images(), split))
        losses.append(closure())
    torch.testing.assert_close(*losses, rtol=1e-12, atol=1e-12)


@PROPERTY
@given(rows=st.lists(st.integers(1, 4), max_size=3), sizes=st.tuples(*[st.integers(1, 5)] * 2), bias=st.booleans())
def test_linear_layers_of_any_shape(rows, sizes, bias):
    layer = nn.Linear(*sizes, bias=bias).double()
    opt = SAM(layer.parameters(), SGD, rho=0.5, lr=0.1)
    inputs = torch.randn(*rows, sizes[0], dtype=torch.float64, requires_grad=True)
    layer(inputs).square().sum().backward()
    opt.first_step(zero_grad=True)
    found = []
    for split in (two_products, plain):
        with split(opt):
            out = layer(inputs)
        found.append([out, *torch.autograd.grad(out.sin().sum(), [inputs, *layer.parameters()])])
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layer", [nn.Linear(3, 2), nn.Conv2d(3, 2, 1), nn.ConvTranspose1d(3, 2, 1)], ids=repr)
@pytest.mark.parametrize("dtype", NARROW.values())
def test_under_autocast_eps_keeps_its_own_exponent(layer, dtype):
    """w = 1, bias = 1, eps = 2^-14 in each entry, far below the spacing of either format: on an input of ones a plain
    layer sees 3 + 1 and a split one 4 + 4 * 2^-14."""
    layer = copy.deepcopy(layer)
    with torch.no_grad():
        for w in layer.parameters():
            w.fill_(1.0)
            w.grad = torch.ones_like(w)
    opt = SAM(layer.parameters(), SGD, rho=2.0**-14, p=math.inf, lr=0.1)
    opt.first_step()
    ones = torch.ones({nn.Linear: (1, 3), nn.Conv2d: (1, 3, 1, 1), nn.ConvTranspose1d: (1, 3, 1)}[type(layer)])
    with torch.autocast("cpu", dtype):
        assert layer(ones).unique().tolist() == [4.0]
        with two_products(opt):
            out = layer(ones)
    assert out.dtype is torch.float32
    assert out.unique().tolist() == [4 + 2.0**-12]


def test_the_gradient_of_the_input_comes_from_both_products():
    """Under autocast, through two layers: d out / d x = (w2 + eps2)(w1 + eps1) with numbers as above."""
    layers = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
    with torch.no_grad():
        for w in layers.parameters():
            w.fill_(1.0)
            w.grad = torch.ones_like(w)
    opt = SAM(layers.parameters(), SGD, rho=2.0**-6, p=math.inf, lr=0.1)
    opt.first_step(zero_grad=True)
    x = torch.ones(1, 1, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16), two_products(opt):
        out = layers(x)
    out.backward()
    assert layers[1].weight.grad.item() == 1 + 2.0**-6  # the first layer's output, a bf16 number
    assert layers[0].weight.grad.item() == 1 + 2.0**-6
    assert x.grad.item() == 1 + 2.0**-5  # 1 + 2^-5 + 2^-12 with the factor 1 + 2^-6 in bf16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_where_no_weight_is_perturbed_it_does_nothing(dtype):
    """At w, after a step, and for weights stored in 16 bits: bit for bit, and in autocast's own dtype."""
    model = built("conv2d", dtype)
    opt = SAM(model.parameters(), SGD, rho=0.3, lr=0.1)
    inputs, labels = images(dtype)

    def both():
        with torch.autocast("cpu", torch.bfloat16):
            out = model(inputs)
            with two_products(opt):
                split = model(inputs)
        assert split.dtype is torch.bfloat16
        assert torch.equal(split, out)

    model.eval()
    both()
    nn.functional.cross_entropy(model(inputs).float(), labels).backward()
    opt.first_step()
    if dtype is torch.bfloat16:
        both()
    opt.second_step()
    both()


def test_contexts_nest_and_leave_nothing_behind():
    model = built("tied")
    keys, attributes = list(model.state_dict()), [set(vars(module)) for module in model.modules()]
    opt = SAM(model.parameters(), SGD, rho=0.3, lr=0.1)
    inputs, labels = images()
    nn.functional.cross_entropy(model(inputs), labels).backward()
    opt.first_step()
    before = model(inputs)
    with two_products(opt):
        once = model(inputs)
        with two_products(opt):
            assert torch.equal(model(inputs), once)
        assert torch.equal(model(inputs), once)
        assert list(model.state_dict()) == keys
    assert not torch.equal(once, before)  # the order of additions is another
    with pytest.raises(KeyboardInterrupt), two_products(opt):
        raise KeyboardInterrupt
    assert torch.equal(model(inputs), before)
    assert list(model.state_dict()) == keys
    assert [set(vars(module)) for module in model.modules()] == attributes


def test_arguments_by_keyword_are_taken():
    layer = nn.Linear(3, 2).double()
    opt = SAM(layer.parameters(), SGD, rho=0.3, lr=0.1)
    layer(torch.ones(1, 3).double()).sum().backward()
    opt.first_step()
    inputs = torch.randn(4, 3).double()
    with two_products(opt):
        out = nn.functional.linear(bias=layer.bias, weight=layer.weight, input=inputs)
    torch.testing.assert_close(out, layer(inputs), rtol=1e-12, atol=1e-12)


def test_a_compiled_model_sees_the_weights_of_every_step():
    losses = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = built("linear")
        forward = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        opt, seen = SAM(model.parameters(), SGD, rho=0.5, lr=0.1), []
        closure = split_closure(opt, forward, images(), seen=seen)
        for _ in range(4):
            opt.step(closure)
        losses.append([loss for loss, *_ in seen])
    torch.testing.assert_close(*losses, rtol=1e-12, atol=1e-12)
    torch._dynamo.reset()


def test_a_model_in_distributed_data_parallel(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        ends = []
        for split in (two_products, plain):
            model = built("conv2d")
            parallel = nn.parallel.DistributedDataParallel(model)
            opt = SAM(model.parameters(), SGD, rho=0.5, lr=0.1)
            for _ in range(2):
                opt.step(split_closure(opt, parallel, images(), split))
            ends.append(list(model.parameters()))
        torch.testing.assert_close(*ends, rtol=1e-12, atol=1e-12)
    finally:
        torch.distributed.destroy_process_group()


# ------------------------------------------------------------------------------------------------------------ the bench


def test_the_rows_of_the_bench_are_plain_values_and_the_same_each_time(monkeypatch):
    monkeypatch.setattr(bench, "ROUNDS", 2)
    before = torch.get_rng_state()
    runs = [bench.rows(("small CNN",), (0.05, 0.2)) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), before)
    assert [(row["rho"], row["precision"]) for row in runs[0]] == [
        (r, p) for r in (0.05, 0.2) for p in bench.PRECISIONS
    ]
    rows, again = ([{k: v for k, v in row.items() if not k.startswith("time_")} for row in run] for run in runs)
    assert json.loads(json.dumps(rows, allow_nan=False)) == again
    for row in rows:
        assert (row["rise"] is None) == (row["precision"] != "bf16")
        assert 0.9 < row["cosine"] < 1
        shrinks = 1 if row["precision"] == "bf16" else 8  # three bits more
        assert row["rounding_norm"] * row["rho"] * shrinks == pytest.approx(rows[0]["rounding_norm"] * 0.05, rel=0.1)


def test_the_bench_measures_no_error_where_nothing_is_rounded(monkeypatch):
    """Autocast switched off: what is left is the order of additions."""
    monkeypatch.setattr(bench, "ROUNDS", 2)
    monkeypatch.setattr(bench, "_bf16", nullcontext)
    found = bench.rows(("small CNN",), (0.1,))[0]
    assert found["rise"] > 0.01
    assert all(abs(value) < 1e-3 for name, value in found.items() if "_error" in name)
    assert found["change_error_two_products"] > 0
