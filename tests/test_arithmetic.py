"""Arithmetic: rounding against NumPy, whole passes against PyTorch's own autocast, and the switches of a GPU."""

import copy
import operator
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from samlib import models
from samlib.arithmetic import DTYPES, PRECISIONS, arithmetic
from samlib.errors import InputError
from samlib.measures import WeightLoss
from samlib.measures.hessian import lambda_max
from samlib.optim import SAM
from samlib.two_products import two_products

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
EMULATED = ("tf32", "fp16", "bf16")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")


def numpy_round(x, precision):
    """float32 to the nearest number of a format, on the bits; ties to even, in TF32 away from zero (cvt.rna)."""
    if precision == "fp16":
        with np.errstate(over="ignore"):
            return x.astype(np.float16).astype(np.float32)
    bits = x.view(np.uint32).astype(np.uint64)
    if precision == "bf16":
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16
    else:
        bits = (bits + 0x1000) >> 13 << 13
    return np.where(np.isfinite(x), bits.astype(np.uint32).view(np.float32), x)


def interesting():
    """Both signs of: 0, powers of two from the subnormal ones up, their neighbours, ties, the ends of each range."""
    powers = np.ldexp(1.0, np.arange(-149, 128))
    units = [0, 2**-11, 3 * 2**-11, 2**-8, 3 * 2**-8, 2**-8 + 2**-23, 2**-8 - 2**-23, 2**-11 + 2**-23, 1 - 2**-23]
    found = [*np.outer(powers, 1 + np.array(units)).ravel(), 0.0, 65504, 65519.996, 65520, 65536, 3.3895314e38, np.inf]
    with np.errstate(over="ignore"):
        found = np.unique(np.array(found).astype(np.float32))
    normal = np.random.default_rng(0).normal(size=2000).astype(np.float32)
    return np.concatenate([found, -found, normal, [np.float32(np.nan)]])


def same_bits(found, expected):
    found, expected = np.asarray(found), np.asarray(expected)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(np.signbit(found), np.signbit(expected))


@pytest.mark.parametrize("precision", EMULATED)
def test_operands_are_rounded_as_numpy_rounds_them(precision):
    """A product with 1 is the other operand, rounded."""
    values = interesting()
    x, one = torch.from_numpy(values)[:, None], torch.ones(1, 1)
    finite = np.isfinite(values)
    with arithmetic(precision, CPU):
        products = [F.linear(x, one), F.linear(one, x).T, x @ one, torch.mm(one, x.T).T]
    for found in products:
        np.testing.assert_array_equal(found[:, 0].numpy(), numpy_round(values, precision))
        same_bits(found[finite, 0].abs().numpy(), np.abs(numpy_round(values, precision))[finite])
    assert np.isinf(numpy_round(values[finite], "fp16")).any()


@pytest.mark.parametrize("precision", EMULATED)
def test_the_backward_pass_rounds_its_operands(precision):
    """In NumPy, with numbers whose sums are exact in float32."""
    rng = np.random.default_rng(1)
    x, w, b, g = (
        rng.integers(-(2**size), 2**size, shape).astype(np.float32) * np.float32(2.0**-size)
        for shape, size in (((6, 4), 12), ((8, 4), 6), ((8,), 14), ((6, 8), 12))
    )
    tensors = [torch.tensor(t, requires_grad=True) for t in (x, w, b)]
    with arithmetic(precision, CPU):
        out = F.linear(*tensors)
    out.backward(torch.tensor(g))
    in_16_bits = precision != "tf32"

    def rounded(t):
        return numpy_round(np.ascontiguousarray(t), precision)

    def result(t):
        return rounded(t) if in_16_bits else t

    x, w, g, b = rounded(x), rounded(w), rounded(g), result(b)
    same_bits(out.detach().numpy(), result(x @ w.T + b))
    for tensor, expected in zip(tensors, (g @ w, g.T @ x, g.sum(0)), strict=True):
        same_bits(tensor.grad.numpy(), result(expected))


def exact(shape, size):
    """float32 numbers of which some need rounding, small enough that a few products sum up exactly."""
    numbers = torch.randint(-(2**size), 2**size, shape, generator=torch.Generator().manual_seed(sum(shape)))
    return (numbers * 2.0**-size).requires_grad_()


PRODUCTS = {
    "linear": (F.linear, (5, 4), (3, 4), (3,)),
    "linear without bias": (F.linear, (2, 5, 4), (3, 4)),
    "conv1d": (F.conv1d, (2, 3, 6), (4, 3, 2), (4,)),
    "conv2d": (F.conv2d, (2, 3, 5, 5), (4, 3, 2, 2), (4,)),
    "conv3d": (F.conv3d, (1, 2, 3, 3, 3), (2, 2, 2, 1, 2), (2,)),
    "conv_transpose2d": (F.conv_transpose2d, (2, 3, 4, 4), (3, 2, 2, 2), (2,)),
    "matmul": (torch.matmul, (2, 3, 4), (4, 5)),
    "@": (operator.matmul, (3, 4), (4, 5)),
    "method mm": (torch.Tensor.mm, (3, 4), (4, 5)),
    "mm": (torch.mm, (3, 4), (4, 5)),
    "bmm": (torch.bmm, (2, 3, 4), (2, 4, 5)),
}


def with_gradients(name, sizes, context, cast):
    """A product and the gradients of its tensors, which `cast` has made of numbers in float32."""
    function, *shapes = PRODUCTS[name]
    tensors = [exact(shape, size) for shape, size in zip(shapes, sizes, strict=False)]
    with context:
        out = function(*map(cast, tensors))
    out.backward(exact(out.shape, 5).detach().to(out.dtype))
    return [out.detach().float(), *(tensor.grad for tensor in tensors)]


ROUNDING = [(10, 5, 5), (5, 10, 5)]  # of the first operand, or of the second


@pytest.mark.parametrize("sizes", ROUNDING)
@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("precision", DTYPES)
def test_every_product_and_its_gradients_are_exact_but_for_the_stated_roundings(name, precision, sizes):
    """Bit for bit the products in float64 of operands that PyTorch has cast, cast again."""
    dtype = DTYPES[precision]
    ours = with_gradients(name, sizes, arithmetic(precision, CPU), lambda t: t)
    exactly = with_gradients(name, sizes, nullcontext(), lambda t: t.to(dtype).double())
    exactly[0] = exactly[0].to(dtype).float()
    for found, expected in zip(ours, exactly, strict=True):
        assert found.dtype is torch.float32
        assert torch.equal(found, expected)


@pytest.mark.parametrize("sizes", ROUNDING)
@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("precision", DTYPES)
def test_every_product_and_its_gradients_are_those_of_autocast(name, precision, sizes):
    """Bit for bit, as sums are exact; but some CPUs sum convolutions of 16 bits in 16 bits."""
    ours = with_gradients(name, sizes, arithmetic(precision, CPU), lambda t: t)
    autocast = with_gradients(name, sizes, torch.autocast("cpu", DTYPES[precision]), lambda t: t)
    tolerance = 4 * torch.finfo(DTYPES[precision]).eps if "conv" in name else 0
    for found, expected in zip(ours, autocast, strict=True):
        assert (found - expected).norm() <= tolerance * expected.norm()


def gradient(model, context, images, labels):
    model.zero_grad()
    with context:
        loss = F.cross_entropy(model(images).float(), labels)
        loss.backward()
    return torch.cat([w.grad.flatten() for w in model.parameters()]).clone()


@pytest.mark.parametrize("build", [lambda: models.mlp(64, 10, 32), lambda: models.small_cnn(1, 10)], ids=["mlp", "cnn"])
@pytest.mark.parametrize("precision", DTYPES)
def test_the_gradient_of_a_network_is_that_of_autocast(build, precision):
    """What autocast does to the gradient of float32, the emulation explains but for the order of additions and, in the
    CNN, the roundings between two products."""
    torch.manual_seed(0)
    model = build()
    batch = torch.randn(32, 1, 8, 8), torch.arange(32) % 10
    plain, ours, autocast = (
        gradient(model, context, *batch)
        for context in (
            arithmetic("fp32", CPU),
            arithmetic(precision, CPU),
            torch.autocast("cpu", DTYPES[precision], cache_enabled=False),
        )
    )
    change = (autocast - plain).norm()
    assert change / plain.norm() > {"fp16": 1e-4, "bf16": 1e-3}[precision]
    assert (ours - autocast).norm() < 0.5 * change


def test_a_coarser_format_errs_more():
    """Without a kink, at which one rounding can change a gradient by any amount."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    batch = torch.randn(32, 1, 8, 8), torch.arange(32) % 10
    plain = gradient(model, arithmetic("fp32", CPU), *batch)
    error = {p: (gradient(model, arithmetic(p, CPU), *batch) - plain).norm() / plain.norm() for p in EMULATED}
    assert 0 < error["tf32"] < error["fp16"] < error["bf16"] / 4 < 0.01


# ---------------------------------------------------------------------------------------------- contexts


def product():
    return (torch.full((1, 1), 1 + 2.0**-12) @ torch.ones(1, 1)).item()


def test_the_innermost_context_holds_and_the_outer_one_comes_back():
    assert product() == 1 + 2.0**-12
    with arithmetic("bf16", CPU):
        assert product() == 1.0
        with arithmetic("fp32", CPU):
            assert product() == 1 + 2.0**-12
            with arithmetic("tf32", CPU), arithmetic("tf32", CPU):
                assert product() == 1.0
        assert product() == 1.0
        with pytest.raises(KeyboardInterrupt), arithmetic("fp32", CPU):
            raise KeyboardInterrupt
        assert product() == 1.0
    assert product() == 1 + 2.0**-12


@pytest.mark.parametrize("precision", PRECISIONS)
def test_autocast_around_it_is_off_inside(precision):
    with torch.autocast("cpu", torch.bfloat16):
        with arithmetic(precision, CPU):
            assert (torch.ones(1, 1) @ torch.ones(1, 1)).dtype is torch.float32
        assert (torch.ones(1, 1) @ torch.ones(1, 1)).dtype is torch.bfloat16


@pytest.mark.parametrize("precision", PRECISIONS)
def test_other_types_and_other_functions_are_left_alone(precision):
    x = torch.tensor([[1 + 2.0**-12]])
    with arithmetic(precision, CPU):
        assert (x.double() @ torch.ones(1, 1).double()).item() == 1 + 2.0**-12
        assert (x.long() @ torch.ones(1, 1).long()).item() == 1
        assert (x * x).item() == 1 + 2.0**-11
        assert F.layer_norm(torch.tensor([1.0, 1 + 2.0**-12]), (2,)).abs().min() > 0


def test_arguments_by_keyword_are_rounded_and_nothing_else_is():
    x, w, bias = torch.full((1, 1, 3), 1 + 2.0**-12), torch.ones(1, 1, 2), torch.tensor([1 + 2.0**-12])
    with arithmetic("tf32", CPU):
        assert F.conv1d(weight=w, input=x, bias=bias, stride=2).tolist() == [[[3 + 2.0**-12]]]
        assert F.conv1d(x, w, bias).tolist() == [[[3 + 2.0**-12] * 2]]
    with arithmetic("bf16", CPU):
        assert F.conv1d(x, w, bias=bias, padding=1).tolist() == [[[2.0, 3.0, 3.0, 2.0]]]


@pytest.mark.parametrize("precision", ["tf32", "fp16", "bf16"])
def test_a_result_may_be_changed_in_place(precision):
    """As by the ReLU of torchvision's networks without batch norm."""
    layer, x = torch.nn.Conv2d(2, 3, 3), torch.randn(4, 2, 5, 5)
    grads = []
    for inplace in (True, False):
        with arithmetic(precision, torch.device("cpu")):
            torch.nn.ReLU(inplace=inplace)(layer(x)).square().sum().backward()
        grads.append(layer.weight.grad)
        layer.weight.grad = None
    assert torch.equal(*grads)


def test_fp32_on_a_cpu_changes_no_bit():
    model, batch = models.small_cnn(1, 10), (torch.randn(8, 1, 8, 8), torch.arange(8) % 10)
    plain = F.cross_entropy(model(batch[0]), batch[1])
    with arithmetic("fp32", CPU):
        assert torch.equal(F.cross_entropy(model(batch[0]), batch[1]), plain)


@pytest.mark.parametrize("precision", EMULATED)
def test_a_functional_call_sees_the_same(precision):
    model, x = models.mlp(64, 10, 16).eval(), torch.randn(4, 64)
    with arithmetic(precision, CPU):
        assert torch.equal(functional_call(model, dict(model.named_parameters()), (x,)), model(x))


@pytest.mark.parametrize("precision", EMULATED)
def test_second_derivatives_are_those_of_float32_but_for_rounding(precision):
    torch.manual_seed(0)
    loss = WeightLoss(models.mlp(64, 10, 16), torch.randn(40, 1, 8, 8), torch.arange(40) % 10)
    plain = lambda_max(loss)["lambda_max"]
    with arithmetic(precision, CPU):
        found = lambda_max(loss)["lambda_max"]
        with arithmetic("fp32", CPU):
            assert lambda_max(loss)["lambda_max"] == plain
    assert found == pytest.approx(plain, rel=0.02 if precision == "bf16" else 0.003)
    assert found != plain


def test_two_products_inside_keep_all_of_eps():
    """w = 1 and eps = 2^-14, far below the spacing of bf16, on an input of ones: 3 + 1, and 4 + 4 * 2^-14."""
    layer, ones = nn.Linear(3, 1), torch.ones(1, 3)
    with torch.no_grad():
        for w in layer.parameters():
            w.fill_(1.0)
            w.grad = torch.ones_like(w)
    opt = SAM(layer.parameters(), torch.optim.SGD, rho=2.0**-13, lr=0.1)  # 2^-14 in each of 4 entries
    opt.first_step(zero_grad=True)
    with arithmetic("bf16", CPU):
        assert layer(ones).item() == 4.0
        with two_products(opt):
            assert layer(ones).item() == 4 + 2.0**-12


def test_a_sam_step_is_that_of_autocast_with_the_same_exact_numbers():
    """Both passes of the closure, the second one at the perturbed weights."""
    ends = []
    for make in (lambda: arithmetic("bf16", CPU), lambda: torch.autocast("cpu", torch.bfloat16, cache_enabled=False)):
        layer = nn.Linear(4, 2, bias=False)
        with torch.no_grad():
            layer.weight.copy_(exact((2, 4), 10))
        opt = SAM(layer.parameters(), torch.optim.SGD, rho=0.5, lr=0.125)

        def closure(opt=opt, layer=layer, make=make):
            opt.zero_grad()
            with make():
                loss = layer(exact((3, 4), 5).detach()).float().square().sum()
            loss.backward()
            return loss

        opt.step(closure)
        ends.append(copy.deepcopy(layer.weight))
    assert torch.equal(*ends)


@pytest.mark.parametrize(
    ("precision", "device", "words"),
    [("fp8", CPU, ["precision = 'fp8'", "fp32, tf32, fp16, bf16"]), ("fp32", torch.device("meta"), ["meta", "cuda"])],
)
def test_bad_input_is_refused_before_anything_is_entered(precision, device, words):
    with pytest.raises(InputError) as error:
        arithmetic(precision, device)
    assert all(word in str(error.value) for word in words)


# ---------------------------------------------------------------------------------------------- a GPU's switches


def switches():
    backends = torch.backends
    newer = [s.fp32_precision for s in (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn)]
    return newer, backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()


ON, OFF = (["tf32"] * 3, True, True, "high"), (["ieee"] * 3, False, False, "highest")


@pytest.fixture
def compute_capability(monkeypatch):
    """The switches are there on any machine; a GPU to ask may not be."""

    def pretend(*capability):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    pretend(8, 0)
    return pretend


def test_fp32_forbids_tf32_where_pytorch_allows_it_and_tf32_allows_it_everywhere(compute_capability):
    before = switches()
    assert before[2]  # PyTorch's default: TF32 in convolutions
    with arithmetic("fp32", CUDA):
        assert switches() == OFF
        with arithmetic("tf32", CUDA):
            assert switches() == ON
            with pytest.raises(KeyboardInterrupt), arithmetic("fp32", CUDA):
                raise KeyboardInterrupt
            assert switches() == ON
        assert switches() == OFF
    assert switches() == before


def test_settings_of_the_user_s_own_come_back(compute_capability):
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    newer = matmul.fp32_precision
    try:
        matmul.allow_tf32, cudnn.allow_tf32 = True, False
        before = switches()
        with arithmetic("fp32", CUDA):
            assert switches() == OFF
        assert switches() == before
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = False, True
        matmul.fp32_precision = newer


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_a_gpu_without_the_format_is_refused(precision, compute_capability):
    before = switches()
    compute_capability(7, 5)
    refused = pytest.raises(InputError, match=f"'{precision}' needs a GPU of compute capability 8.0")
    with refused, arithmetic(precision, CUDA):
        pass
    assert switches() == before


@needs_gpu
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("channels", [16, 64])
def test_on_a_gpu_products_have_the_precision(precision, channels):
    """Against float64: the error of each format, and for TF32 and 16 bits that it is there at all."""
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(channels, channels, 3, 3, generator=generator).to(CUDA) for _ in range(2))
    a, b = x.flatten(1), w.flatten(1)
    exact_conv, exact_linear = F.conv2d(x.double(), w.double(), padding=1), F.linear(a.double(), b.double())
    low, high = {"fp32": (0, 2e-6), "tf32": (1e-5, 2e-3), "fp16": (1e-5, 2e-3), "bf16": (5e-4, 2e-2)}[precision]
    with arithmetic(precision, CUDA):
        found = F.conv2d(x, w, padding=1), F.linear(a, b)
    for value, expected in zip(found, (exact_conv, exact_linear), strict=True):
        error = (value.double() - expected).norm() / expected.norm()
        assert low <= error <= high
        assert value.dtype is DTYPES.get(precision, torch.float32)


@needs_gpu
@pytest.mark.parametrize("precision", PRECISIONS)
def test_on_a_gpu_a_captured_pass_sees_weights_that_change(precision):
    layer, x = nn.Linear(16, 8).to(CUDA), torch.randn(4, 16, device=CUDA)
    with torch.no_grad(), arithmetic(precision, CUDA):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            layer(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = layer(x)
        layer.weight.mul_(2)
        graph.replay()
        assert torch.equal(captured, layer(x))


@needs_gpu
def test_on_a_gpu_the_emulation_is_within_the_order_of_additions():
    torch.manual_seed(0)
    model, batch = models.mlp(64, 10, 32), (torch.randn(32, 1, 8, 8), torch.arange(32) % 10)
    plain = gradient(model, arithmetic("fp32", CPU), *batch)
    for precision in EMULATED:
        ours = gradient(model, arithmetic(precision, CPU), *batch)
        theirs = gradient(
            copy.deepcopy(model).to(CUDA), arithmetic(precision, CUDA), *(tensor.to(CUDA) for tensor in batch)
        ).cpu()
        assert (ours - theirs).norm() < 0.5 * (theirs - plain).norm()
