"""Weights in half precision, for files that have to be small: float16, wherever that holds a tensor."""

from collections.abc import Iterable, Mapping
from io import BytesIO

import torch
from torch import Tensor

ERROR = 2.0**-11  # of a number rounded to the 11 bits of float16, relative and at most
STATISTICS = ("running_mean", "running_var")  # of a batch norm: estimates from the data, and no weights


def halved(content: bytes) -> bytes:
    """A file of weights, `content`, as a file of the same weights in half precision.

    Raises:
        Exception: whatever `torch.load` raises for a file that is no such file.
    """
    state = torch.load(BytesIO(content), map_location="cpu", weights_only=True)
    file = BytesIO()
    torch.save(in_half(state), file)
    return file.getvalue()


def in_half(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The float32 weights of a state dict in float16. Running statistics, integers, and a tensor of which float16 loses
    more than its last bits (a number above 65504, too many below 6e-5), stay as they are."""
    return {name: tensor.clone() if name.endswith(STATISTICS) else _rounded(tensor) for name, tensor in state.items()}


def is_half(states: Iterable[Mapping[str, Tensor]]) -> bool:
    """Whether any of the weights are in half precision."""
    return any(tensor.dtype == torch.float16 for state in states for tensor in state.values())


def _rounded(tensor: Tensor) -> Tensor:
    """In float16 if the error is at most `ERROR` of the tensor's norm, as it is for numbers in the normal range."""
    if tensor.dtype == torch.float32:
        half, exact = tensor.half(), tensor.double()
        if (half.double() - exact).norm() <= ERROR * exact.norm():
            return half
    return tensor.clone()  # a view would take the storage of its base into the file
