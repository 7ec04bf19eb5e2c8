"""The shards of a mini-batch for mSAM: one after the other, overlapped, or all at once with `torch.func.vmap`.

Top: `Shards`, the list of closures that `SAM.step` takes. Below: its two passes over all shards, what they do to the
running statistics of batch norm, and when they cannot be used.

Sequentially a step costs num_shards small forward and backward passes, twice. Overlapped they are the same, two at a
time on a CPU. The vectorised passes have one call per layer, with a weight tensor per shard: fewer, larger calls. Both
hold the gradients and perturbations of all shards, num_shards times the memory of the weights each.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from inspect import signature
from itertools import pairwise
from types import FunctionType
from typing import Any
from warnings import warn
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode
from torch.torch_version import TorchVersion

from samlib.batchnorm import second_pass
from samlib.errors import InputError
from samlib.flat import overlapping
from samlib.overlap import obstacle as obstacle_to_threads
from samlib.overlap import overlapped
from samlib.substitute import Places, check_graph, gradients, unchanged

LossFunction = Callable[[Any, Tensor], Tensor]
Forward = Callable[[], tuple[Tensor, list[Tensor], float]]
Gradients = tuple[Tensor | None, ...]
OfShards = Tensor | Sequence[Tensor]  # one for each shard

SEQUENTIAL, OVERLAPPED, VMAP = PASSES = ("sequential", "overlapped", "vmap")

# Measured on two CPU cores, eager, at 2, 4, 8 and 16 shards, for MLPs, small CNNs, a ResNet-20 (0.27 M parameters), a
# MobileNetV2 and a ResNet-18. On two threads overlapped passes were as fast as sequential ones or faster for each of
# them; vmap was faster still from 8 shards on where a network is so small that its time is that of the calls. Where
# nothing can overlap, vmap wins over sequential passes from 8 shards on for a ResNet-20 and an MLP of 0.28 M, and loses
# for an MLP of 1.3 M. Not yet measured on a GPU, nor with more threads.
MIN_SHARDS = 8
FEW_PARAMETERS = 100_000
MAX_PARAMETERS = 500_000
MAX_COPIED = 2**27  # num_shards x parameters: gradients, eps and gradients again, of 4 bytes, are then 1.6 GB
COMPILES_AUTOGRAD = (2, 15)  # the first torch with which the compiled passes were tried and work; 2.11 does not


class Shards(list[Callable[[], Tensor]]):
    """A mini-batch cut into shards, each of which gets an ascent of its own (mSAM): what `opt.step` is given.

    A list of closures, one per shard, in the order of the batch. Each clears the gradients, computes the shard's loss
    (batch norm as `statistics` says in a second pass), calls backward and returns the loss. For the passes "overlapped"
    and "vmap" the optimiser calls `gradients_at_w` and `mean_gradients` instead, which give the same step up to
    rounding; running statistics of batch norm end as the closures, called in turn, leave them.

    Args:
        opt: the optimiser that will step: the closures clear its gradients and ask it for `in_second_pass`.
        model: called as model(inputs).
        loss_fn: loss_fn(outputs, targets) -> the mean over the examples it is given, a tensor without axes.
        inputs: (batch, ...).
        targets: (batch, ...).
        num_shards: at most the batch size. Sizes differ by at most one example where it does not divide the batch.
        shard_size: examples per shard, instead of num_shards; the last shard may be smaller.
        statistics: "frozen", "update" or "eval", as for `samlib.batchnorm.second_pass`.
        passes: "sequential": the closures, one after the other. "overlapped", on a CPU: a shard's backward pass in a
            second thread during the next one's forward pass, each with half of torch's threads. "vmap": all shards in
            one call per layer. None: the one that is the fastest as far as measured, of those that nothing stands
            against.
        compile: run the passes through `torch.compile`, with True its default backend, with a string that one: the
            model and loss of each closure, or forward and backward of all shards as one graph. What is compiled is kept
            between steps for the same model, loss function's code and shapes. Closures of a model that is compiled
            already and those for second_order stay as they are.

    Attributes:
        weights: the shards' sizes, for `step(weights=...)`, or None where they are equal: the mean over shards is then
            the mean over examples.
        passes: the choice made.

    Raises:
        InputError: neither or both of num_shards and shard_size, or one outside its range; inputs and targets of
            different lengths; an unknown choice of statistics or passes. For passes other than "sequential":
            DistributedDataParallel, a model that is compiled already, synchronised or cumulative (momentum=None) batch
            norm, instance norm with running statistics, recurrent layers, hooks on parameters, trainable tensors of
            `opt` outside `model`, the settings second_order and inner_steps > 1. For "vmap": shards of different sizes.
            For "overlapped": another device than a CPU, a number of threads that does not halve, backward hooks on
            layers.

    Dropout draws a mask per example in all three; the draws differ between them, and only the closures can replay them
    (with `replay_rng` they are taken). Passes other than "sequential" put weights where the model has its own. They
    fail where a loss reaches the model's own weights, where a pass changes weights, buffers or inputs (spectral norm
    does) and where activations are checkpointed. If nobody has asked for them by name, they also do where an operation
    has a backward pass in Python or where the optimiser does not train all that wants a gradient; a warning then says
    so, the closures make the step, and those passes are not tried again for the model. State of other kinds (a list, a
    counter) is changed by all first passes before the second ones, and batch norm that a forward pass itself switches
    to eval sees the statistics from before the step: give "sequential" for such a model.

    Source: behdin2023, equations 4 to 6.

    Example::

        opt = SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1, momentum=0.9)
        loss = opt.step(Shards(opt, model, loss_fn, inputs, targets, num_shards=8))
    """

    def __init__(
        self,
        opt: Optimizer,
        model: nn.Module,
        loss_fn: LossFunction,
        inputs: Tensor,
        targets: Tensor,
        *,
        num_shards: int | None = None,
        shard_size: int | None = None,
        statistics: str = "frozen",
        passes: str | None = None,
        compile: bool | str = False,
    ) -> None:
        with second_pass(model, statistics):  # refuses an unknown choice and lazy layers
            pass
        self.model, self.loss_fn, self.inputs, self.targets = model, loss_fn, inputs, targets
        self.statistics, self.compile = statistics, compile
        self.sizes = _sizes(len(inputs), len(targets), num_shards, shard_size)
        self.weights = None if len(set(self.sizes)) == 1 else self.sizes
        self._is_own_choice = passes is None
        self.passes = self._choose(opt, passes)
        self._running: _Running | None = None  # between the passes
        parts = zip(inputs.split(self.sizes), targets.split(self.sizes), strict=True)
        loss = _loss_of(opt, model, compile)
        super().__init__(_closure(opt, model, partial(loss, model, loss_fn), statistics, *part) for part in parts)

    @property
    def at_once(self) -> bool:
        """Whether all first passes come before all second ones."""
        return self.passes != SEQUENTIAL

    def gradients_at_w(self, parameters: Sequence[Tensor]) -> tuple[Tensor, list[OfShards]] | None:
        """The first pass of every shard. Advances the running statistics; weights and `.grad` stay.

        Args:
            parameters: of the model, the tensors to differentiate by.

        Returns:
            The shards' losses, (num_shards,), and their gradients, in the order of `parameters`: for each the gradients
            of all shards, a tensor of (num_shards, *shape) or a list of num_shards tensors of its shape; zeros for one
            that the loss does not reach. None, with a warning, if the passes were not asked for by name and fail at
            this model: `passes` is "sequential" from now on.
        """
        self._running = _Running(self.model, len(self))
        running = self._running.buffers()
        try:
            losses, grads = self._differentiate(parameters, [None] * len(parameters), running)
        except Exception as error:
            return self._give_up(error)
        self._running.advance(running)
        found = zip(parameters, grads, strict=True)
        return losses, [w.new_zeros(len(self), *w.shape) if g is None else g for w, g in found]

    def _give_up(self, error: Exception) -> None:
        """Whatever it is: if it is the model's, the closures raise it again."""
        if not self._is_own_choice:
            raise error
        warn(f"the shards go on one after the other, since passes={self.passes!r} failed: {error}", stacklevel=7)
        self._running.put_back()
        _failed.setdefault(self.model, set()).add(self.passes)
        self.passes = SEQUENTIAL

    def mean_gradients(
        self, parameters: Sequence[Tensor], eps: Sequence[OfShards | None], shares: Sequence[float] | None = None
    ) -> list[Tensor | None] | None:
        """The second pass of every shard, at w + eps_s; comes after `gradients_at_w`. `.grad` stays.

        Args:
            parameters: of the model, the tensors to differentiate by.
            eps: for each parameter those of all shards, a tensor of (num_shards, *shape) or num_shards tensors of its
                shape; None where it is not perturbed.
            shares: of the shards in the mean, adding up to 1; default equal.

        Returns:
            The mean over shards of the gradients at w + eps_s, one tensor of the parameter's shape each; None for a
            parameter that the loss does not reach. None instead of the list as for `gradients_at_w`.
        """
        buffers = self._running.in_second_pass(self.statistics)
        try:
            with second_pass(self.model, self.statistics):
                _, grads = self._differentiate(parameters, eps, buffers, shares or [1 / len(self)] * len(self))
        except Exception as error:
            return self._give_up(error)
        if self.statistics == "update":
            self._running.advance(buffers)
        return [None if g is None else _sum(g) for g in grads]

    def _differentiate(
        self,
        parameters: Sequence[Tensor],
        eps: Sequence[OfShards | None],
        buffers: dict[str, Tensor],
        shares: Sequence[float] | None = None,
    ) -> tuple[Tensor, Sequence[OfShards | None]]:
        """The losses of all shards, (num_shards,), shard s at w + eps_s, and their gradients, times the shard's share
        if there are shares, as `gradients_at_w` returns them."""
        modules = [one for one in (self.model, self.loss_fn) if isinstance(one, nn.Module)]
        tried = _tried.setdefault(self.model, set())
        is_new = self._is_own_choice and self.passes not in tried
        with _advised(self.passes), unchanged(modules, [self.inputs, self.targets], thoroughly=is_new):
            way = self._differentiate_at_once if self.passes == VMAP else self._differentiate_each
            found = way(parameters, eps, buffers, shares or [1.0] * len(self))
        if shares:  # this was the second pass
            tried.add(self.passes)
        return found

    def _differentiate_at_once(
        self,
        parameters: Sequence[Tensor],
        eps: Sequence[OfShards | None],
        buffers: dict[str, Tensor],
        shares: Sequence[float],
    ) -> tuple[Tensor, Gradients]:
        """That in one call of the model."""
        places = _places(self.model)
        names = [tuple(places[w]) for w in parameters]  # two where two modules hold it
        weights = [_perturbed(w.detach(), e, len(self)) for w, e in zip(parameters, eps, strict=True)]
        inputs, targets = (t.unflatten(0, (len(self), -1)) for t in (self.inputs, self.targets))
        wide = torch.promote_types(parameters[0].dtype, torch.float32)
        factors = torch.tensor(shares, dtype=wide, device=parameters[0].device)
        run = _compiled(_differentiated, self.model, self.compile) if self.compile else _differentiated
        with _tracing() if self.compile else _ChannelsSideBySide():
            given = weights, list(parameters), buffers, inputs, targets, factors
            return run(self.model, self.loss_fn, self._is_own_choice, names, *given)

    def _differentiate_each(
        self,
        parameters: Sequence[Tensor],
        eps: Sequence[OfShards | None],
        buffers: dict[str, Tensor],
        shares: Sequence[float],
    ) -> tuple[Tensor, list[list[Tensor] | None]]:
        """That in a call for each shard, whose perturbed weights live no longer than its passes."""
        parts = zip(self.inputs.split(self.sizes), self.targets.split(self.sizes), strict=True)
        weights = [(w.detach(), e) for w, e in zip(parameters, eps, strict=True)]
        places = Places(self.model, [*parameters, *map(self.model.get_buffer, buffers)])
        loss_of = _compiled(_loss, self.model, self.compile) if self.compile else _loss

        def forward(shard: int, inputs: Tensor, targets: Tensor) -> tuple[Tensor, list[Tensor], float]:
            at = [nn.Parameter(w if e is None else _sum_as(w, e[shard])) for w, e in weights]
            running = [of_shards[shard] for of_shards in buffers.values()]
            # hooks on saved tensors may come back to the model when it has its own weights again
            with (
                torch.enable_grad(),
                torch.autograd.graph.disable_saved_tensors_hooks("hooks on saved tensors"),
                places.filled([*at, *running]),
                unchanged([], at),
            ):
                loss = loss_of(self.model, self.loss_fn, inputs, targets)
            torch.clear_autocast_cache()  # which keeps the weights alive
            if loss.numel() != 1:
                raise InputError(f"loss_fn returned {loss.ndim} axes: let it return the mean over the examples")
            check_graph(loss, at, strictly=self._is_own_choice)
            return loss, at, shares[shard]

        def backward(made: tuple[Tensor, list[Tensor], float]) -> tuple[Tensor, Gradients]:
            loss, at, share = made
            return loss.detach().squeeze(), gradients(loss, at, list(parameters), torch.full_like(loss, share))

        found = self._run([partial(forward, shard, *part) for shard, part in enumerate(parts)], backward)
        losses, grads = zip(*found, strict=True)
        return torch.stack(losses), [_filled(of_w) for of_w in zip(*grads, strict=True)]

    def _run(self, forwards: Sequence[Forward], backward: Callable[..., Any]) -> list[tuple[Tensor, Gradients]]:
        if self.passes == OVERLAPPED and not obstacle_to_threads():  # there was none when this was made
            return overlapped(forwards, backward, at_half=bool(self.compile))
        return [backward(forward()) for forward in forwards]

    def _choose(self, opt: Optimizer, passes: str | None) -> str:
        if passes is None:
            return next(way for way in self._by_speed() if not self._obstacle(opt, way))
        if passes not in PASSES:
            raise InputError(f"passes = {passes!r}: give one of {', '.join(map(repr, PASSES))}, or None to choose")
        if obstacle := self._obstacle(opt, passes):
            raise InputError(f"passes = {passes!r} is impossible: {obstacle}, or leave passes at None")
        return passes

    def _obstacle(self, opt: Optimizer, passes: str) -> str | None:
        """Why the passes are impossible, and what to do; None if they are possible."""
        if passes == SEQUENTIAL:
            return None
        particular = self._obstacle_to_vmap if passes == VMAP else self._obstacle_to_overlap
        return _obstacle(opt, self.model) or particular()

    def _obstacle_to_vmap(self) -> str | None:
        if len(set(self.sizes)) > 1:
            return f"the shards have the sizes {sorted(set(self.sizes))}: let num_shards or shard_size divide the batch"
        return _obstacle_to_compile() if self.compile else None

    def _obstacle_to_overlap(self) -> str | None:
        device = next((t.device for t in (self.inputs, *self.model.parameters()) if t.device.type != "cpu"), None)
        if device is not None:
            return f"a tensor is on {device}, and it is for a CPU: take another choice"
        if _has_backward_hooks(self.model):
            return "there are backward hooks on layers, which would run in another thread: take them off"
        return obstacle_to_threads()

    def _by_speed(self) -> list[str]:
        size, num_shards = sum(w.numel() for w in self.model.parameters()), len(self.sizes)
        if num_shards == 1 or num_shards * size > MAX_COPIED:
            return [SEQUENTIAL]
        ways = [OVERLAPPED]
        if num_shards >= MIN_SHARDS and size <= MAX_PARAMETERS:
            ways = [VMAP, OVERLAPPED] if size <= FEW_PARAMETERS else [OVERLAPPED, VMAP]
        failed = _failed.get(self.model, ())
        return [*(way for way in ways if way not in failed), SEQUENTIAL]


def _closure(
    opt: Optimizer,
    model: nn.Module,
    loss_of: Callable[[Any, Tensor], Tensor],
    statistics: str,
    inputs: Tensor,
    targets: Tensor,
) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        opt.zero_grad()
        with second_pass(model, statistics) if getattr(opt, "in_second_pass", False) else nullcontext():
            loss = loss_of(inputs, targets)
        if not getattr(opt, "second_order", False):  # the optimiser differentiates twice itself
            loss.backward()
        return loss

    return closure


def _loss_of(opt: Optimizer, model: nn.Module, backend: bool | str) -> Callable[..., Tensor]:
    """`_loss`, compiled where that is asked for and possible: compiled code has no second derivatives."""
    if not backend or getattr(opt, "second_order", False) or hasattr(model, "_orig_mod"):
        return _loss
    return _compiled(_loss, model, backend)


def _loss(model: nn.Module, loss_fn: LossFunction, inputs: Any, targets: Tensor) -> Tensor:
    return loss_fn(model(inputs), targets)


def _sizes(batch: int, num_targets: int, num_shards: int | None, shard_size: int | None) -> list[int]:
    if batch != num_targets:
        raise InputError(f"inputs has {batch} examples and targets {num_targets}: give one target per example")
    if (num_shards is None) == (shard_size is None):
        raise InputError(f"num_shards = {num_shards} and shard_size = {shard_size}: give one of the two")
    if shard_size is not None:
        if shard_size < 1:
            raise InputError(f"shard_size = {shard_size}: it must be 1 or more")
        return [min(shard_size, batch - start) for start in range(0, batch, shard_size)]
    if not 1 <= num_shards <= batch:
        raise InputError(
            f"num_shards = {num_shards}: it must be from 1 to the batch size, {batch}. If the last batch of an epoch "
            "is small, give shard_size, or drop_last=True to the DataLoader"
        )
    edges = [round(index * batch / num_shards) for index in range(num_shards + 1)]
    return [stop - start for start, stop in pairwise(edges)]


# --------------------------------------------------------------------------------------------- the passes over shards


def _filled(grads: Sequence[Tensor | None]) -> list[Tensor] | None:
    """None if all of them are; one that is None among others is 0."""
    like = next((g for g in grads if g is not None), None)
    return None if like is None else [torch.zeros_like(like) if g is None else g for g in grads]


def _sum(grads: OfShards) -> Tensor:
    if isinstance(grads, Tensor):
        return grads.sum(0)
    total = grads[0].clone()  # autograd may give two parameters the same tensor
    for grad in grads[1:]:
        total.add_(grad)
    return total


def _differentiated(
    model: nn.Module,
    loss_fn: LossFunction,
    strictly: bool,
    names: Sequence[tuple[str, ...]],
    weights: list[Tensor],
    own: list[Tensor],
    buffers: dict[str, Tensor],
    inputs: Tensor,
    targets: Tensor,
    factors: Tensor,
) -> tuple[Tensor, Gradients]:
    """The shards' losses, (num_shards,), and the gradients of their sum times `factors` by `weights`, which stand in
    for the model's `own`. All other tensors have an axis of shards in front; changes `buffers` in place as a forward
    pass of the model would."""

    def loss(weights: list[Tensor], buffers: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
        state = {name: w for of_w, w in zip(names, weights, strict=True) for name in of_w}
        return loss_fn(functional_call(model, {**state, **buffers}, (inputs,), tie_weights=False), targets)

    leaves = [w.detach().requires_grad_() for w in weights]
    with torch.enable_grad():
        losses = vmap(loss, randomness="different")(leaves, buffers, inputs, targets)
        if losses.ndim != 1:
            raise InputError(f"loss_fn returned {losses.ndim - 1} axes: let it return the mean over the examples")
        if not torch.compiler.is_compiling():
            check_graph(losses, leaves, strictly=strictly)
        return losses.detach(), gradients(losses, leaves, own, factors.to(losses.dtype))


class _ChannelsSideBySide(TorchFunctionMode):
    """Within it the batch norm of all shards is one call, with the channels of each shard as channels of their own.

    By itself vmap normalises in one call, but then multiplies by the weights and adds the bias, each in a pass over all
    activations, and likewise backward. Compiled code has these passes in one loop and does without this.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not nn.functional.batch_norm:
            return func(*args, **(kwargs or {}))
        given = signature(func).bind(*args, **(kwargs or {}))
        given.apply_defaults()
        try:
            return _BatchNormOfShards.apply(*given.args)
        except _LeftToVmap:
            return func(*args, **(kwargs or {}))


class _LeftToVmap(Exception):
    """The rule is not for this call; what stands against it, if anything, vmap itself says."""


class _BatchNormOfShards(torch.autograd.Function):
    """`torch.nn.functional.batch_norm`, with that rule for vmap. Under it torch differentiates what the rule does."""

    @staticmethod
    def forward(*_: Any) -> Tensor:
        raise _LeftToVmap  # nothing here depends on the shard

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Asked for by torch where there is a rule for vmap."""

    @staticmethod
    def vmap(
        info: Any,
        in_dims: Sequence[int | None],
        x: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        training: bool,
        *settings: float,
    ) -> tuple[Tensor, int]:
        if training and running_mean is not None and in_dims[1] is None:
            raise _LeftToVmap  # running statistics that no buffer of a torch layer holds: shards cannot share them
        tensors = zip((x, running_mean, running_var, weight, bias), in_dims[:5], strict=True)
        x, *channels = [None if t is None else _of_shards(t, dim, info.batch_size) for t, dim in tensors]
        rows = [None if t is None else t.flatten() for t in channels]
        out = nn.functional.batch_norm(x.transpose(0, 1).flatten(1, 2), *rows, training, *settings)
        return out.unflatten(1, (info.batch_size, -1)), 1


def _of_shards(tensor: Tensor, dim: int | None, num_shards: int) -> Tensor:
    """With the axis of shards in front."""
    return tensor.expand(num_shards, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _compiled(function: FunctionType, model: nn.Module, backend: bool | str) -> Callable[..., Any]:
    """`function`, compiled for a model. torch keeps what it compiles, and counts it against a limit, with a function's
    code: each model gets a copy of the code, which goes with the model. Every shape is compiled for itself, since
    kernels for variable shapes are slower and training has one shape or two.

    The vectorised passes are one graph, backward included: compiled as a forward and a backward, with what is saved
    between them, a ResNet-20 took 1.6 times as long.
    """
    own = _kept.setdefault(model, {})
    if (function, backend) not in own:
        copied = FunctionType(function.__code__.replace(), function.__globals__)
        whole = function is _differentiated
        options = {} if backend is True else {"backend": backend}
        if whole and backend is True:  # channels last strides over all shards: 1.3 to 1.5 of SAM at 16 instead of 1.2
            options = {"options": {"layout_optimization": False}}
        own[function, backend] = torch.compile(copied, fullgraph=whole, dynamic=False, **options)
    return own[function, backend]


def _tracing() -> AbstractContextManager:
    return torch._dynamo.config.patch(trace_autograd_ops=True)  # torch 2.15 compiles a call of autograd only with this


_failed: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()  # the passes that have failed at a model
_tried: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()  # those that have made a whole step
_kept: WeakKeyDictionary[nn.Module, dict[tuple[FunctionType, bool | str], Callable[..., Any]]] = WeakKeyDictionary()


def _places(model: nn.Module) -> dict[Tensor, list[str]]:
    """The names of each parameter, one for each module that holds it."""
    found: dict[Tensor, list[str]] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix, recurse=False, remove_duplicate=False):
            found.setdefault(parameter, []).append(name)
    return found


def _perturbed(w: Tensor, eps: OfShards | None, num_shards: int) -> Tensor:
    """(num_shards, *shape)"""
    if eps is None:
        return w.expand(num_shards, *w.shape)
    return _sum_as(w, eps if isinstance(eps, Tensor) else torch.stack(list(eps)))


def _sum_as(w: Tensor, eps: Tensor) -> Tensor:
    return (w + eps).to(w.dtype)  # eps of a half-precision weight is float32


@contextmanager
def _advised(passes: str) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        error.add_note(f"This came from passes={passes!r} of Shards: passes='sequential' does without.")
        raise


# --------------------------------------------------------------------------------------------- running statistics


class _Running:
    """The running means and variances of a model's batch-norm layers during passes that are not the closures.

    In the loop each forward pass takes r to keep r + step, with keep = 1 - momentum and step = momentum x (statistic of
    the shard), or powers of keep where it calls a layer more than once. Here every shard starts from the same r, with
    buffers of its own; what it adds beyond keep r is its step, and the recurrence over shards comes afterwards.
    """

    def __init__(self, model: nn.Module, num_shards: int) -> None:
        self.layers = dict(_tracking(model))
        self.num_shards = num_shards
        # one row of all means and variances; path has a row for each shard, the state after it
        self.start = torch.cat(self._means_and_variances()) if self.layers else None
        self.counts = [layer.num_batches_tracked.clone() for layer in self.layers.values()]
        self.keep: Tensor | None = None
        self.steps: Tensor | None = None
        self.path: Tensor | None = None

    def buffers(self) -> dict[str, Tensor]:
        """Buffers for a pass, with an axis of shards in front, by their names in the model: the statistics of now, or
        after the shard's first pass, and counts of 0."""
        if not self.layers:
            return {}
        statistics = (columns.clone() for columns in self._before().split(self._widths(), 1))
        counts = {
            name + "num_batches_tracked": layer.num_batches_tracked.new_zeros(self.num_shards)
            for name, layer in self.layers.items()
        }
        return dict(zip(self._names(), statistics, strict=True)) | counts

    def _before(self) -> Tensor:
        return self.start.expand(self.num_shards, -1) if self.path is None else self.path

    def put_back(self) -> None:
        """Writes the statistics from before the first pass."""
        if self.layers:
            torch._foreach_copy_(self._means_and_variances(), self.start.split(self._widths()))
            torch._foreach_copy_([layer.num_batches_tracked for layer in self.layers.values()], self.counts)

    def in_second_pass(self, statistics: str) -> dict[str, Tensor]:
        """Buffers for the second pass: in the loop, "eval" normalises with what the shard's first pass left."""
        if statistics == "update":
            return self.buffers()
        if statistics == "frozen" or not self.layers:
            return {}
        return dict(zip(self._names(), self.path.split(self._widths(), 1), strict=True))

    def advance(self, buffers: dict[str, Tensor]) -> None:
        """Writes the running statistics that the loop would leave, given what a pass left in `buffers`. A second call
        counts both passes, each shard's second one right after its first."""
        if not self.layers:
            return
        for name, layer in self.layers.items():
            layer.num_batches_tracked.add_(buffers[name + "num_batches_tracked"].sum())
        keep, after = self._keep(buffers), torch.cat([buffers[name] for name in self._names()], 1)
        steps = after - keep * self._before()
        if self.steps is not None:
            keep, steps = keep * self.keep, keep * self.steps + steps
        self.keep, self.steps, self.path = keep, steps, _path(self.start, keep, steps)
        torch._foreach_copy_(self._means_and_variances(), self.path[-1].split(self._widths()))

    def _keep(self, buffers: dict[str, Tensor]) -> Tensor:
        """(1 - momentum) to the power of the calls in a shard, for each entry of a row and a row for each shard."""
        columns = []
        for name, layer in self.layers.items():
            calls = buffers[name + "num_batches_tracked"].unsqueeze(1)
            of_layer = (layer.running_mean, layer.running_var)
            columns += [torch.full_like(r, 1 - layer.momentum) ** calls for r in of_layer]
        return torch.cat(columns, 1)

    def _means_and_variances(self) -> list[Tensor]:
        return [r for layer in self.layers.values() for r in (layer.running_mean, layer.running_var)]

    def _names(self) -> list[str]:
        return [name + buffer for name in self.layers for buffer in ("running_mean", "running_var")]

    def _widths(self) -> list[int]:
        return [len(r) for r in self._means_and_variances()]


def _path(start: Tensor, keep: Tensor, steps: Tensor) -> Tensor:
    """r_s = keep_s r_(s-1) + step_s, a row for every shard s."""
    rows = []
    for one, step in zip(keep, steps, strict=True):
        start = torch.addcmul(step, one, start)
        rows.append(start)
    return torch.stack(rows)


def _tracking(model: nn.Module) -> Iterator[tuple[str, _BatchNorm]]:
    """The layers whose running statistics a forward pass changes, by the prefix of their buffers' names."""
    for name, layer in model.named_modules():
        if isinstance(layer, _BatchNorm) and layer.training and layer.track_running_stats:
            yield f"{name}." if name else "", layer


# --------------------------------------------------------------------------------------------- what stands against it


def _obstacle(opt: Optimizer, model: nn.Module) -> str | None:
    """Why shards cannot have weights of their own, and what to do; None if they can."""
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
        return "the model is compiled: pass the module itself, and compile=True"
    if getattr(opt, "second_order", False) or getattr(opt, "inner_steps", 1) > 1:
        return "the optimiser has second_order or inner_steps > 1: leave them out"
    own = set(model.parameters())
    if any(w.requires_grad and w not in own for group in opt.param_groups for w in group["params"]):
        return "the optimiser trains tensors that are not parameters of model: make one module of both"
    if any(w._backward_hooks or w._post_accumulate_grad_hooks for w in own):
        return "parameters have hooks, which act on the gradients of the closures only: take them off"
    if overlapping([w for w in own if w.requires_grad and not w.is_meta]):
        return "two parameters share memory, which would move by both perturbations: make them one parameter"
    return next(filter(None, map(_obstacle_in, model.modules())), None)


def _has_backward_hooks(model: nn.Module) -> bool:
    of_all = nn.modules.module._global_backward_hooks or nn.modules.module._global_backward_pre_hooks
    return bool(of_all) or any(layer._backward_hooks or layer._backward_pre_hooks for layer in model.modules())


def _obstacle_to_compile() -> str | None:
    if hasattr(torch._dynamo.config, "trace_autograd_ops") and TorchVersion(torch.__version__) >= COMPILES_AUTOGRAD:
        return None
    return f"torch {torch.__version__} cannot compile a call of autograd: take a later one, leave compile out"


def _obstacle_in(module: nn.Module) -> str | None:
    if isinstance(module, nn.parallel.DistributedDataParallel):
        return "the model is wrapped in DistributedDataParallel, which they would bypass: pass the bare module"
    if isinstance(module, nn.RNNBase):
        return f"{type(module).__name__} keeps its weights where no others can stand in for them: take another layer"
    if not isinstance(module, _NormBase) or not module.training or not module.track_running_stats:
        return None
    # a forward pass of its own may read the running statistics, in whose places there are zeros
    if not isinstance(module, _BatchNorm) or type(module).forward is not _BatchNorm.forward:
        return f"they cannot keep the running statistics of {type(module).__name__}: take another layer"
    if module.momentum is None:
        return "a batch-norm layer has momentum=None: give it a number"
    return None
