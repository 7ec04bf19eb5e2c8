"""The precision of convolutions and matrix products: on a GPU its own, on a CPU emulated.

fp32, tf32 (8 bits of exponent, 10 of mantissa), fp16 and bf16 name the operands; products are summed in float32.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from samlib.errors import InputError
from samlib.measures.precision import round_to_tf32

PRECISIONS = ("fp32", "tf32", "fp16", "bf16")
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def arithmetic(precision: str, device: torch.device) -> AbstractContextManager[None]:
    """Convolutions, linear layers and matrix products inside the context take operands of this precision.

    Put it around the forward pass and the backward pass: on a GPU the libraries ask for TF32 when a kernel starts. What
    was set before is back at the end, also after an exception. Contexts nest, and the innermost one holds: a measure in
    fp32 is in fp32 wherever it is called. A context of `two_products` belongs inside.

    On a GPU fp32 forbids TF32 in matrix products and in convolutions, where PyTorch allows it by default, and tf32
    allows it in both. fp16 and bf16 are `torch.autocast`, which keeps no rounded weights from one pass to the next: a
    second pass at w + eps and a replayed CUDA graph would see those of w. What it leaves in float32 stays there.

    On a CPU the same is emulated, so that every machine does the same: operands are rounded to the format, to nearest,
    multiplied and summed in float32. In 16 bits, as under autocast, a bias counts as an operand and the result is
    rounded too, as in the backward pass are the incoming gradient and the gradients of the operands; beyond 65504 fp16
    is infinite. In TF32 bias and result stay in float32, and so do the gradients of the operands.
    Emulated are the convolutions, `linear`, `matmul` (`@`), `mm` and `bmm` of float32 tensors, also through
    `functional_call`, and any graph they leave behind, inside the context or after it. Between products everything is
    in float32, where autocast may hold 16 bits: a batch norm, a sum or a pooling has fewer rounding errors here.
    In double backward the products of the second pass are not rounded.

    Args:
        precision: "fp32", "tf32", "fp16" or "bf16".
        device: of the model.

    Raises:
        InputError: unknown precision, a device that is neither a CPU nor a CUDA GPU, or a GPU that has no TF32 or bf16.
    """
    if precision not in PRECISIONS:
        raise InputError(f"precision = {precision!r} is unknown: use one of {', '.join(PRECISIONS)}")
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device = {str(device)!r} has no arithmetic here: use cpu or cuda")
    return _on_cpu(precision) if device.type == "cpu" else _on_gpu(precision, device)


# ---------------------------------------------------------------------------------------------- on a GPU


@contextmanager
def _on_gpu(precision: str, device: torch.device) -> Iterator[None]:
    if precision in ("tf32", "bf16") and torch.cuda.get_device_capability(device) < (8, 0):
        raise InputError(f"precision = {precision!r} needs a GPU of compute capability 8.0 or more: use fp32 or fp16")
    with ExitStack() as stack:
        stack.enter_context(_tf32(allowed=precision == "tf32"))
        stack.enter_context(_autocast("cuda", DTYPES.get(precision)))
        yield


@contextmanager
def _tf32(*, allowed: bool) -> Iterator[None]:
    """Matrix products and convolutions; RNNs too, since PyTorch refuses to answer for cuDNN where the two differ."""
    before = [switch.fp32_precision for switch in _switches()]
    try:
        _set_fp32(["tf32" if allowed else "ieee"] * 3)
        yield
    finally:
        _set_fp32(before)


def _set_fp32(settings: list[str]) -> None:
    """The older switches first: they overwrite the newer ones, and cannot be read where the two disagree."""
    torch.backends.cuda.matmul.allow_tf32 = settings[0] == "tf32"
    torch.backends.cudnn.allow_tf32 = settings[1] == "tf32"
    for switch, setting in zip(_switches(), settings, strict=True):
        switch.fp32_precision = setting


def _switches() -> tuple[Any, ...]:
    return torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn


def _autocast(device_type: str, dtype: torch.dtype | None) -> AbstractContextManager:
    """Autocast to a dtype; None ends one that is in force."""
    if dtype is not None:
        return torch.autocast(device_type, dtype, cache_enabled=False)
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()


# ---------------------------------------------------------------------------------------------- emulated


@contextmanager
def _on_cpu(precision: str) -> Iterator[None]:
    mode = _Emulation(_FORMATS[precision]) if precision in _FORMATS else None
    token = _INNERMOST.set(mode)
    try:
        with _autocast("cpu", None), mode or nullcontext():
            yield
    finally:
        _INNERMOST.reset(token)


class _Format(NamedTuple):
    """What becomes of the tensors of a product, each a function of one float32 tensor, with its gradient."""

    operand: Callable[[Tensor], Tensor]
    bias: Callable[[Tensor], Tensor]
    result: Callable[[Tensor], Tensor]


class _Emulation(TorchFunctionMode):
    """Rounds what goes into every product and what comes out."""

    def __init__(self, to: _Format) -> None:
        super().__init__()
        self.to = to

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func not in _PRODUCTS or _INNERMOST.get() is not self:
            return func(*args, **kwargs)
        positions = (self.to.operand, self.to.operand, self.to.bias)  # of what follows them none is a tensor
        args = tuple(_rounded(to, arg) for to, arg in zip(positions, args, strict=False)) + args[3:]
        named = {
            name: _rounded(self.to.bias if name == "bias" else self.to.operand, arg) for name, arg in kwargs.items()
        }
        return _rounded(self.to.result, func(*args, **named))


def _rounded(to: Callable[[Tensor], Tensor], value: Any) -> Any:
    return to(value) if isinstance(value, Tensor) and value.dtype is torch.float32 else value


def _through(dtype: torch.dtype, x: Tensor) -> Tensor:
    """There and back: autograd takes the gradient the same way, and rounds it too."""
    return x.to(dtype).to(torch.float32)


class _Operand(torch.autograd.Function):
    """x in TF32; its gradient as it is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return round_to_tf32(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class _Result(torch.autograd.Function):
    """x as it is; its gradient in TF32, an operand of the backward products."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()  # not a view: what follows may change it in place

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _Operand.apply(gradient)


def _as_it_is(x: Tensor) -> Tensor:
    return x


_PRODUCTS = {
    *(F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
    *(torch.matmul, torch.mm, torch.bmm),
    *(Tensor.matmul, Tensor.mm, Tensor.bmm),  # `@` arrives as Tensor.matmul
}
_FORMATS = {
    "tf32": _Format(_Operand.apply, _as_it_is, _Result.apply),
    **{name: _Format(*[partial(_through, dtype)] * 3) for name, dtype in DTYPES.items()},
}
_INNERMOST: ContextVar[_Emulation | None] = ContextVar("_INNERMOST", default=None)
