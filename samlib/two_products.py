"""Linear and convolution layers at w + eps as two low-precision products, one with w and one with eps.

Where a layer rounds its weight to bf16 or fp16 (autocast) or TF32, it sees round(w + eps), and of an eps below half a
spacing of w nothing is left (`samlib.measures.precision`). As a factor of its own, eps keeps its own exponent.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from samlib.optim import SAM

_PRODUCTS = {F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d}


@contextmanager
def two_products(opt: SAM) -> Iterator[None]:
    r"""Splits the products that the forward passes made inside the context take with perturbed weights.

    .. math:: f(x, w + \epsilon) = f(x, w) + f(x, \epsilon), \qquad f \text{ linear or a convolution}

    w is a constant copy (`SAM.unperturbed`), eps the difference of the parameter and that copy; a bias is split in the
    same way. The parameter gets its gradient through the second product, which is the whole of it, and x from both.
    The two outputs are added in float32, and the sum stays so until the next layer rounds it: in 16 bits a second
    output below half a spacing of the first would be rounded away each time, which biases the rise of the loss.

    Without rounding this is the plain pass, up to the order of additions. Where the weights are not perturbed (the pass
    at w, rho 0, `ascent_every`) and for tensors that are not (`perturb_filter`) it does nothing, and so for weights
    that are stored in 16 bits, whose eps has been rounded already. Contexts nest and end with an exception; the model
    is not touched.

    Split are `torch.nn.functional.linear` and the convolutions, transposed ones too, called with a parameter as it is:
    hence `nn.Linear` and `nn.Conv*`, tied weights, and a model in DistributedDataParallel. Not split are embeddings,
    norm layers, recurrent layers, `nn.MultiheadAttention`, parametrised weights and products written with `@`. Enter it
    around the forward pass, in the closure; activation checkpointing needs it around the backward pass as well.

    It costs a further product of each layer forward and one more backward (for x), and activations in float32: the pass
    took 1.6 to 2 times as long on a CPU. The whole of eps acts then. But w is rounded as before, so that the gradient
    is taken as far from w + eps as without it, and on the networks that were measured its error stays nearly the same.

    Args:
        opt: the optimiser whose closure this is.

    Source: none; measured in `samlib.bench.precision`.

    Example::

        def closure():
            opt.zero_grad()
            with torch.autocast("cuda", torch.bfloat16), two_products(opt):
                loss = loss_fn(model(inputs), targets)
            loss.backward()
            return loss
    """
    at_w = {weight: copy for weight, copy in opt.unperturbed().items() if weight.dtype.itemsize >= 4}
    if not at_w:
        yield
        return
    with _Split(at_w):
        yield


class _Split(TorchFunctionMode):
    """Hands every product with a tensor of `at_w` to `_product`."""

    def __init__(self, at_w: dict[Tensor, Tensor]) -> None:
        super().__init__()
        self.at_w = at_w

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in _PRODUCTS:
            return self._product(func, *args, **kwargs or {})
        return func(*args, **kwargs or {})

    def _product(
        self, func: Callable, input: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        if weight not in self.at_w:
            return func(input, weight, bias, *args, **kwargs)
        at_w = self.at_w[weight], self.at_w.get(bias, bias)
        eps = weight - at_w[0], bias - at_w[1] if bias in self.at_w else None
        first, second = (func(input, *tensors, *args, **kwargs) for tensors in (at_w, eps))
        return _wide(first) + _wide(second)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor
