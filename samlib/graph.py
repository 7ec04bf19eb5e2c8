"""A whole training step as one CUDA graph: launched once, without Python in between.

Off by default: nothing in samlib makes a graph unless it is asked to, and that stays so until
`tests/test_graph_cuda.py` has passed on a GPU. What those tests hold on to is written here as torch 2.11 to 2.15
document it. That the step which would be captured is a fixed sequence of operations is tested on a CPU
(`tests/test_graph.py`).

::

    opt = SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1, momentum=0.9, fused=True, flat=True)
    make_static(opt)  # lr and rho become tensors on the device

    def step(inputs, labels):
        def closure():
            opt.zero_grad(set_to_none=False)
            loss = loss_fn(model(inputs), labels)
            loss.backward()
            return loss
        return opt.step(closure)

    graphed = GraphedStep(step, opt, [inputs, labels])
    for inputs, labels in batches:  # all of one shape
        assign(opt, lr=next(schedule))
        loss = graphed(inputs, labels)

What a graph keeps: kernels, their order and their arguments, which are addresses of tensors, and numbers as they were.
So a number that changes must lie in a tensor (`make_static`, `assign`), a tensor must stay where it is, and a step must
neither read a tensor on the host nor decide by one. A graph for which one of these does not hold computes something
else without a word. So `GraphedStep` compares, in every call, the optimiser's settings and the addresses of its weights
and state with those of the capture. It does not see what else the step uses: change a model's buffers in place.

What can be captured: SGD, SAM, ASAM, average SAM and mSAM around a base optimiser of torch with `fused=True`. Its
kernel reads lr on the device, where SGD's others read it on the host. (They differ by rounding, so compare a graph with
a fused eager run.) Under SAM it also skips an update whose gradient is not finite. `torch.nn.utils.clip_grad_norm_`
clamps on the device. Not `second_order`, `ascent_every` above 1, a GradScaler, `replay_rng`, nor the vectorised passes
of `Shards`, which make a tensor from numbers of the host (`ParallelShards` does not). Enter autocast in the step, not
around it.

Changing numbers: `fill_` takes its value along with the launch, so nothing on the host has to be kept until it runs. It
runs after the step before and before the step that follows, where all are given to one stream. A `copy_` with
non_blocking from pinned memory reads that memory when the device gets there, perhaps after the host has written the
next value to it: do not use it for a schedule.

Random numbers come from generators on the device that are registered with the graph; each replay draws what the eager
step would have drawn. torch's default one is registered always. Runs side by side need generators of their own.

Phases: a step with ascent and one without are two sequences, hence two `GraphedStep` of one optimiser. Set rho of the
groups to the tensor, or to 0.0, before the call. They may share a `pool`, since they never run at once. A last
mini-batch of another size is a plain call of the step.

The optimiser's own count of steps (in its `state_dict`) advances with eager steps and the capture, not with replays.
"""

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from samlib.errors import InputError
from samlib.optim import SAM, AverageSAM
from samlib.perturbation import wide_dtype
from samlib.shards import VMAP, Forward, Gradients, LossFunction, Shards

T = TypeVar("T")
Step = Callable[..., Tensor]

DEVICE_SETTINGS = ("lr", "rho")
SHARD_STREAMS = 4


class GraphedStep:
    """A training step that is captured in a CUDA graph after a few eager ones; each call is one step.

    The first `warmup` calls run eagerly on a side stream: they make momentum and buffers, and libraries choose their
    kernels. The next call captures, which records the step without running it, and replays it, as all later calls do
    (while SAM has skipped all steps, it is put off). Replays run on the caller's stream. Without a GPU every call is
    eager.

    Args:
        step: step(*inputs) -> loss, a tensor without axes. The whole step: gradients, ascent, update. While it is
            captured no loss of another step may be kept with its autograd graph, which belongs to another stream.
        optimizer: the one that it steps, after `make_static`.
        inputs: examples of the tensors that the step is given, of the shapes and dtypes of all calls to come.
        generators: those on the device from which the step draws; an AverageSAM's own is found.
        warmup: eager steps before the capture, 2 or more; torch's documentation asks for 3.
        stream: where to warm up and capture; default a new one. Two graphs that run at once, and a graph that may
            outlive another, need streams of their own, since torch keeps the workspace of matrix products by stream.
        pool: `torch.cuda.graph_pool_handle()`, to share memory with graphs that never run at the same time.

    Attributes:
        inputs: the tensors that the step reads. A caller may write into them and pass them.
        calls: number of steps made.

    Raises:
        InputError: an optimiser that cannot be captured, warmup below 2; in a call: inputs of another number, shape or
            dtype, an optimiser that is not as it was captured.
    """

    def __init__(
        self,
        step: Step,
        optimizer: Optimizer,
        inputs: Sequence[Tensor],
        *,
        generators: Iterable[torch.Generator] = (),
        warmup: int = 3,
        stream: "torch.cuda.Stream | None" = None,
        pool: Any = None,
    ) -> None:
        _check_capturable(optimizer)
        _check_static(optimizer)
        if warmup < 2:
            raise InputError(
                f"warmup = {warmup}: the first step makes the momentum, and SAM waits in it for the device; it is the "
                "second that runs what is to be captured. Use 2 or more"
            )
        device = _device(optimizer)
        self.step, self.optimizer, self.warmup, self.pool = step, optimizer, warmup, pool
        self.inputs = [torch.empty_like(tensor, device=device) for tensor in inputs]
        self.generators = [*generators]
        self.stream = torch.cuda.Stream(device) if stream is None and device.type == "cuda" else stream
        self.calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._captured: dict[str, list[Any]] = {}
        self._kept: list[Tensor] = []  # that the graph writes to and the optimiser may replace
        self._loss: Tensor | None = None  # of the last replay

    def __call__(self, *inputs: Tensor) -> Tensor:
        """One step on these inputs.

        Tensors on the device are copied without waiting. From the host the copy waits for the device.

        Returns:
            The loss, detached, in memory of its own.
        """
        self._place(inputs)
        if self._graph is None and self._can_capture and self.calls >= self.warmup and not self._lacks_state:
            # Gradients made in the capture are the graph's own. Older ones may be freed while it still writes to them.
            self.optimizer.zero_grad(set_to_none=True)
            self._captured, self._graph = _held(self.optimizer), self._capture()
            self._kept = self.optimizer.scratch() if isinstance(self.optimizer, SAM) else []
        loss = self._eager() if self._graph is None else self._replay()
        self.calls += 1
        return loss

    def _place(self, inputs: Sequence[Tensor]) -> None:
        if len(inputs) != len(self.inputs):
            raise InputError(f"inputs holds {len(inputs)} tensors: the step was made for {len(self.inputs)}")
        for index, (buffer, given) in enumerate(zip(self.inputs, inputs, strict=True)):
            if (given.shape, given.dtype) != (buffer.shape, buffer.dtype):  # copy_ would broadcast and convert
                raise InputError(
                    f"inputs[{index}] is {given.dtype} of shape {tuple(given.shape)}: the step was made for "
                    f"{buffer.dtype} of shape {tuple(buffer.shape)}. Call the plain step for it, or make another graph"
                )
            buffer.copy_(given)

    def _run(self) -> Tensor:
        return self.step(*self.inputs).detach()

    def _eager(self) -> Tensor:
        return in_parallel([self._run], [self.stream])[0].clone()

    def _replay(self) -> Tensor:
        _check_unchanged(self.optimizer, self._captured)
        self._graph.replay()
        return self._loss.clone()

    @property
    def _can_capture(self) -> bool:
        return self.stream is not None

    @property
    def _lacks_state(self) -> bool:
        """Whether momentum is still to be made, since all steps were skipped, as for an overflow: a capture would make
        it a part of the graph."""
        return getattr(self.optimizer, "has_only_skipped", False)

    def _capture(self) -> "torch.cuda.CUDAGraph":
        graph = torch.cuda.CUDAGraph()
        own = [self.optimizer.generator] if isinstance(self.optimizer, AverageSAM) else []
        for generator in [*self.generators, *own]:
            graph.register_generator_state(generator)
        with _without_collection(), torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            self._loss = self._run()
        return graph


# ------------------------------------------------------------------------------------------------------ side by side


class Streams(NamedTuple):
    """The streams of one of several steps that run at once: for its work, to capture it, and for its shards."""

    work: "torch.cuda.Stream"
    capture: "torch.cuda.Stream"
    shards: "tuple[torch.cuda.Stream, ...]"


@cache
def streams(device: torch.device, slot: int) -> Streams:
    """Those of a slot, the same in every call.

    torch has 32 streams and hands them out in turn, again and again, and keeps the workspace of matrix products by
    stream: of two graphs captured on one stream, in step with each other, one may write where the other reads.
    """
    made = [torch.cuda.Stream(device) for _ in range(2 + SHARD_STREAMS)]
    return Streams(made[0], made[1], tuple(made[2:]))


def in_parallel(calls: Sequence[Callable[[], T]], streams: "Sequence[torch.cuda.Stream | None]" = ()) -> list[T]:
    """Gives the calls to the streams in turn. They begin after what the current stream has been given so far, and what
    it is given afterwards waits for all of them.

    Inside a capture this makes branches of the graph; around `GraphedStep` it runs several small networks at once::

        in_parallel([partial(graphed, *batch) for graphed, batch in zip(runs, batches)], [run.stream for run in runs])

    Calls on different streams must not write to the same memory. Without streams, or with None for them as on a CPU,
    they run one after the other.

    Returns:
        What the calls return, in their order.
    """
    streams = [stream for stream in streams if stream is not None]
    if not streams:
        return [call() for call in calls]
    current = torch.cuda.current_stream(streams[0].device)
    for stream in streams:
        stream.wait_stream(current)
    results = []
    try:
        for index, call in enumerate(calls):
            with torch.cuda.stream(streams[index % len(streams)]):
                results.append(call())
    finally:
        for stream in streams:
            current.wait_stream(stream)
    return results


class ParallelShards(Shards):
    """As `Shards`, each shard with weights and gradients of its own, on a few streams.

    The step is that of the closures called in turn, up to rounding, and so are the running statistics. It takes
    num_shards times the memory of weights and gradients. It is meant for a captured step, in place of the vectorised
    passes: each shard keeps the dense kernels of one network, and shards overlap where one does not fill the GPU.

    Args:
        opt, model, loss_fn, inputs, targets, num_shards, shard_size, statistics: as for `Shards`.
        streams: where the shards run, in turn; none, as on a CPU: one after the other.

    Raises:
        InputError: as `Shards` with passes="vmap".

    Source: behdin2023, equations 4 to 6.
    """

    def __init__(
        self,
        opt: Optimizer,
        model: nn.Module,
        loss_fn: LossFunction,
        inputs: Tensor,
        targets: Tensor,
        *,
        streams: "Sequence[torch.cuda.Stream]" = (),
        num_shards: int | None = None,
        shard_size: int | None = None,
        statistics: str = "frozen",
    ) -> None:
        cut = {"num_shards": num_shards, "shard_size": shard_size}
        # the limits of vmap are those of a capture: shards of one size, no hooks on parameters
        super().__init__(opt, model, loss_fn, inputs, targets, **cut, statistics=statistics, passes=VMAP)
        self.passes, self.streams = "streams", streams

    def _run(self, forwards: Sequence[Forward], backward: Callable[..., Any]) -> list[tuple[Tensor, Gradients]]:
        return in_parallel([lambda forward=forward: backward(forward()) for forward in forwards], self.streams)


# ------------------------------------------------------------------------------------------------ changing settings


def make_static(optimizer: Optimizer) -> None:
    """Makes lr and rho of every group tensors on the weights' device, as a graph needs them.

    lr is float32 on a GPU, where torch's fused kernels read no other, and float64 on a CPU; rho has the precision of
    the weights. A rho of 0 stays a number, by which the step has no ascent. Call it again after `load_state_dict`.

    Raises:
        InputError: an optimiser that cannot be captured.
    """
    _check_capturable(optimizer)
    device = _device(optimizer)
    dtypes = {"lr": torch.float32 if device.type == "cuda" else torch.float64}
    dtypes["rho"] = wide_dtype(optimizer.param_groups[0]["params"][0])
    for group in optimizer.param_groups:
        for name in DEVICE_SETTINGS:
            if name in group and not _is_off(name, group[name]):
                group[name] = torch.as_tensor(group[name], dtype=dtypes[name], device=device)


def assign(optimizer: Optimizer, **settings: float) -> None:
    """Sets lr, rho and others in all groups that have them: in place where they are tensors, without waiting.

    ::

        assign(opt, lr=0.05, rho=0.1)
    """
    for group in optimizer.param_groups:
        for name in settings.keys() & group.keys():
            if isinstance(group[name], Tensor):
                group[name].fill_(settings[name])
            else:
                group[name] = settings[name]


# ------------------------------------------------------------------------------------------------------------ checks


def _check_capturable(optimizer: Optimizer) -> None:
    if isinstance(optimizer, SAM) and (optimizer.second_order or optimizer.ascent_every > 1):
        raise InputError(
            f"second_order = {optimizer.second_order}, ascent_every = {optimizer.ascent_every}: a graph repeats one "
            "sequence of operations. Leave them out"
        )
    for name in ("fused", "capturable"):
        if any(not group.get(name, name == "capturable") for group in optimizer.param_groups):
            raise InputError(
                f"{name} is not set in the optimizer's groups: a captured step needs a base optimizer that reads lr on "
                f"the device, such as torch.optim.SGD. Make it with {name}=True"
            )


def _check_static(optimizer: Optimizer) -> None:
    device = _device(optimizer)
    for group in optimizer.param_groups:
        for name in DEVICE_SETTINGS:
            value = group.get(name)
            on_device = isinstance(value, Tensor) and value.device == device
            if name in group and not on_device and not _is_off(name, value):
                raise InputError(f"{name} = {value!r} would be frozen in the graph: call make_static(optimizer) first")


def _is_off(name: str, value: Any) -> bool:
    """Whether this is a rho that leaves the ascent out."""
    return name == "rho" and not isinstance(value, Tensor) and value == 0


def _check_unchanged(optimizer: Optimizer, captured: dict[str, list[Any]]) -> None:
    held = _held(optimizer)
    for name in {**captured, **held}:
        if held.get(name) != captured.get(name):
            raise InputError(
                f"{name} of the optimizer is not what the graph has captured, and would be ignored. Change lr and rho "
                "with assign(), or make another GraphedStep"
            )


def _held(optimizer: Optimizer) -> dict[str, list[Any]]:
    """What a graph takes in for good: the addresses of weights and state, the values of settings."""
    groups, state = optimizer.param_groups, optimizer.state
    weights = [w for group in groups for w in group["params"]]
    kept = [value for w in weights for value in state.get(w, {}).values()]
    names = dict.fromkeys(name for group in groups for name in group if name != "params")
    return {
        "a weight": list(map(Tensor.data_ptr, weights)),
        "requires_grad": [w.requires_grad for w in weights],
        "the state": list(map(_address_or_value, kept)),
        **{name: [_address_or_value(group.get(name)) for group in groups] for name in names},
    }


def _address_or_value(value: Any) -> Any:
    return value.data_ptr() if isinstance(value, Tensor) else value


def _device(optimizer: Optimizer) -> torch.device:
    return optimizer.param_groups[0]["params"][0].device


@contextmanager
def _without_collection() -> Iterator[None]:
    """No garbage collection inside: it may destroy another graph, which CUDA forbids during a capture."""
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
