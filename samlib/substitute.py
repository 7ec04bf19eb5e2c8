"""A model with other weights than its own during a forward pass, and what would show that it went back to its own.

`torch.func.functional_call` does the first half: it swaps a module that has two names twice, which leaves the model
broken, and gives the weights back before the loss is computed, which may need them.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node


@contextmanager
def substituted(model: nn.Module, others: Mapping[Tensor, Tensor]) -> Iterator[None]:
    """The model with `others[t]` in the place of its parameter or buffer t, wherever a module of it holds t.

    What keeps a tensor of its own by other means, such as the flat weights of a recurrent layer, goes on with that.
    """
    held = [
        (place, name, tensor)
        for module in model.modules()
        for place in (module._parameters, module._buffers)
        for name, tensor in place.items()
        if tensor is not None and tensor in others
    ]
    try:
        for place, name, tensor in held:
            place[name] = others[tensor]
        yield
    finally:
        for place, name, tensor in held:
            place[name] = tensor


@contextmanager
def unchanged(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Nothing changes the tensors or their gradients in between.

    Raises:
        RuntimeError: something does.
    """
    marks = [(tensor, _mark(tensor)) for tensor in tensors]
    yield
    for tensor, mark in marks:
        if _mark(tensor) != mark:
            raise RuntimeError(f"a pass changes a tensor of shape {tuple(tensor.shape)} of the model or the inputs")


def _mark(tensor: Tensor) -> tuple[int, ...]:
    grad = tensor.grad if tensor.is_leaf else None
    return tensor.data_ptr(), tensor._version, *(() if grad is None else (id(grad), grad._version))


def check_graph(loss: Tensor, *, custom: bool) -> None:
    """That no backward pass of the loss may come back to the model, which by then has its own weights again.

    Args:
        custom: an operation with a backward pass in Python may; otherwise only a checkpoint with use_reentrant=True,
            which always does.

    Raises:
        RuntimeError: one is there.
    """
    for node in _nodes(loss):
        if isinstance(node, BackwardCFunction) and (custom or node.name() == "CheckpointFunctionBackward"):
            raise RuntimeError(f"{node.name()} may use the model in its backward pass")


def _nodes(loss: Tensor) -> set[Node]:
    """Of the graph of operations that autograd has recorded."""
    seen: set[Node] = set()
    waiting = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [other for other, _ in node.next_functions]
    return seen


def gradients(losses: Tensor, weights: list[Tensor], own: list[Tensor], shares: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of the sum of shares x losses by `weights`, which stood in for the model's `own`; None for one that
    is not reached.

    Raises:
        RuntimeError: the loss depends on the model's own weights.
    """
    grads = torch.autograd.grad(losses, [*weights, *own], shares, allow_unused=True)
    if any(g is not None for g in grads[len(weights) :]):
        raise RuntimeError("the loss reaches weights of the model by other ways than its modules")
    return grads[: len(weights)]
