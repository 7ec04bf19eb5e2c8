"""A model with other weights than its own during a forward pass, and what would show that a pass did more than that.

`torch.func.functional_call` does the first half: it swaps a module that has two names twice, which leaves the model
broken, and gives the weights back before the loss is computed, which may need them.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node


class Places:
    """Where modules hold some tensors, to put others there for a while.

    What keeps a tensor of its own by other means, such as the flat weights of a recurrent layer, goes on with that.

    Args:
        model: its parameters and buffers are looked through, also those that two modules hold.
        tensors: of the model.
    """

    def __init__(self, model: nn.Module, tensors: Sequence[Tensor]) -> None:
        order = {tensor: index for index, tensor in enumerate(tensors)}
        self._held = [
            (place, name, tensor, order[tensor])
            for module in model.modules()
            for place in (module._parameters, module._buffers)
            for name, tensor in place.items()
            if tensor is not None and tensor in order
        ]

    @contextmanager
    def filled(self, others: Sequence[Tensor]) -> Iterator[None]:
        """The model with these, in the order of `tensors`."""
        try:
            for place, name, _, index in self._held:
                place[name] = others[index]
            yield
        finally:
            for place, name, tensor, _ in self._held:
                place[name] = tensor


@contextmanager
def unchanged(modules: Sequence[nn.Module], tensors: Sequence[Tensor], *, thoroughly: bool = False) -> Iterator[None]:
    """Nothing changes the parameters and buffers of the modules, the tensors, or their gradients in between.

    Args:
        thoroughly: compares values, too, for which it copies all. Some changes show in nothing else: those by `.data`,
            and those that batch norm as a function makes. Where something changes or fails, the values are put back,
            and so is the state of torch's generator on the CPU.

    Raises:
        RuntimeError: something does.
    """
    held = _held(modules)
    before = [*(tensor for _, _, tensor in held), *tensors]
    marks = list(map(_mark, before))
    values = [tensor.detach().clone() for tensor in before] if thoroughly else []
    generator = torch.get_rng_state() if thoroughly else None
    try:
        yield
        now = _held(modules)
        if not (
            len(now) == len(held)
            and all(place.get(name) is tensor for place, name, tensor in held)
            and all(_mark(tensor) == mark for tensor, mark in zip(before, marks, strict=True))
            and all(map(_is_equal, before, values))
        ):
            raise RuntimeError("a pass changes a parameter, a buffer or an input, or adds to a gradient")
    except BaseException:
        if thoroughly:
            for place, name, tensor in held:
                place[name] = tensor
            with torch.no_grad():
                for tensor, value in zip(before, values, strict=True):
                    if not _is_equal(tensor, value):
                        tensor.copy_(value)
            torch.set_rng_state(generator)
        raise


def _held(modules: Sequence[nn.Module]) -> list[tuple[dict[str, Any], str, Tensor]]:
    places = (place for whole in modules for one in whole.modules() for place in (one._parameters, one._buffers))
    return [(place, name, tensor) for place in places for name, tensor in place.items() if tensor is not None]


def _mark(tensor: Tensor) -> tuple[int, ...]:
    grad = tensor.grad if tensor.is_leaf else None
    address = tensor.data_ptr() if tensor.layout == torch.strided else 0
    version = 0 if tensor.is_inference() else tensor._version
    return address, version, *(() if grad is None else (id(grad), grad._version))


def _is_equal(tensor: Tensor, value: Tensor) -> bool:
    if tensor.layout != torch.strided or tensor.shape != value.shape:
        return tensor.shape == value.shape
    return bool(((tensor == value) | (tensor != tensor) & (value != value)).all())


def check_graph(loss: Tensor, weights: Sequence[Tensor], *, strictly: bool) -> None:
    """That the backward pass of a loss leads to the weights and comes back to the model nowhere, which by then has its
    own weights again.

    Args:
        strictly: an operation with a backward pass in Python may come back, and no other tensor may want a gradient.
            Otherwise only a checkpoint with use_reentrant=True is looked for, which does come back.

    Raises:
        RuntimeError: it is not so.
    """
    known = set(weights)
    for node in _nodes(loss):
        name = node.name()
        if name == "CheckpointFunctionBackward" or (
            strictly and isinstance(node, BackwardCFunction) and name != "CompiledFunctionBackward"
        ):
            raise RuntimeError(f"{name} may use the model in its backward pass")
        if strictly and hasattr(node, "variable") and node.variable not in known:
            raise RuntimeError(
                "the loss reaches a tensor with requires_grad=True by another way than the modules that "
                "hold the optimiser's, or one that the optimiser does not train"
            )


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


def gradients(
    losses: Tensor, weights: Sequence[Tensor], own: Sequence[Tensor], shares: Tensor
) -> tuple[Tensor | None, ...]:
    """The gradients of the sum of shares x losses by `weights`, which stood in for the model's `own`; None for one that
    is not reached.

    Raises:
        RuntimeError: the loss depends on the model's own weights.
    """
    grads = torch.autograd.grad(losses, [*weights, *own], shares, allow_unused=True)
    if any(g is not None for g in grads[len(weights) :]):
        raise RuntimeError("the loss reaches weights of the model by another way than the modules that hold them")
    return grads[: len(weights)]
