"""Batch norm and the second pass of SAM: what the running statistics do there, and how to estimate them anew.

SAM runs a mini-batch twice, at w and at w + eps. None of the papers says what the second pass does to the running
statistics, and published code disagrees, so here it is a named choice.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from samlib.errors import InputError

# Attribute of a layer that a choice sets to False. Without `track_running_stats` a layer in training mode is not handed
# its buffers at all. Nothing has to be copied back, and a backward pass may follow outside the context, which restoring
# the buffers in place would forbid.
_SWITCHED_OFF = {"frozen": "track_running_stats", "update": None, "eval": "training"}


@contextmanager
def second_pass(model: nn.Module, statistics: str = "frozen") -> Iterator[None]:
    """Sets what the batch-norm layers of `model` do in the forward passes made inside the context.

    ======== ======================= ====================================================
    choice   normalises with         running mean and variance, number of batches tracked
    ======== ======================= ====================================================
    frozen   this batch's statistics unchanged (R252_SAM and davda54/sam, boca2023)
    update   this batch's statistics updated once more (tml-epfl, Samsung's ASAM, coldenhoff2022)
    eval     running statistics      unchanged
    ======== ======================= ====================================================

    Contexts nest, also on the same model, and the layers are as before after an exception. Layers that the caller has
    put in eval mode stay in eval mode. Only forward passes matter: the backward pass may come later, unless activation
    checkpointing runs the forward pass again in it.

    Args:
        model: any module; all of torch's batch-norm classes and their subclasses are found, other layers are untouched.
        statistics: "frozen", "update" or "eval".

    Raises:
        InputError: unknown choice, or a lazy layer that has not seen a batch yet.

    Example::

        def closure():
            opt.zero_grad()
            with second_pass(model, "frozen") if opt.in_second_pass else nullcontext():
                loss = loss_fn(model(inputs), targets)
            loss.backward()
            return loss
    """
    if statistics not in _SWITCHED_OFF:
        raise InputError(f"statistics = {statistics!r} is unknown: use one of {', '.join(_SWITCHED_OFF)}")
    name = _SWITCHED_OFF[statistics]
    layers = _layers(model) if name else []
    before = [getattr(layer, name) for layer in layers]
    for layer in layers:
        setattr(layer, name, False)
    try:
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            setattr(layer, name, value)


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[Tensor | tuple[Tensor, ...] | list[Tensor]]) -> None:
    """Estimates the running statistics anew: their mean over `batches`, at the present weights.

    Each batch counts by its number of examples, so a smaller last batch does not pull the estimate. The model runs in
    training mode, without gradients; modes and momentum are as before afterwards. A model without batch norm is left
    alone and `batches` is not read.

    Args:
        model: the module whose statistics to replace.
        batches: inputs of shape (batch, ...) as the model takes them, or tuples or lists that begin with them, on the
            model's device.

    Raises:
        InputError: `batches` is empty (the statistics are then unchanged), or a lazy layer has not seen a batch yet.

    Source: Izmailov et al. 2018, section 3.2 (SWA), in the form of Garipov et al. 2018.
    """
    layers = [layer for layer in _layers(model) if layer.track_running_stats]
    if not layers:
        return
    modes = {module: module.training for module in model.modules()}
    momenta = [layer.momentum for layer in layers]
    model.train()
    seen = 0
    try:
        for batch in batches:
            inputs = batch[0] if isinstance(batch, tuple | list) else batch
            if not seen:
                for layer in layers:
                    layer.reset_running_stats()
            seen += len(inputs)
            for layer in layers:
                layer.momentum = len(inputs) / seen
            model(inputs)
    finally:
        for module, mode in modes.items():
            module.training = mode
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
    if not seen:
        raise InputError("batches is empty: give at least one batch of inputs")


def _layers(model: nn.Module) -> list[_BatchNorm]:
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    if any(isinstance(layer, LazyModuleMixin) for layer in layers):
        raise InputError("model has a lazy batch-norm layer that has seen no batch: run one forward pass first")
    return layers
