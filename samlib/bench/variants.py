"""Who is compared: SGD, the floor, a plain SAM, pytorch_optimizer's SAM, ours. One line each in the two tables."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from pytorch_optimizer import SAM as PeerSAM
from torch import Tensor, nn

from samlib.bench import plan
from samlib.bench.networks import Workload
from samlib.bench.protocol import Built, Stopwatch
from samlib.optim import SAM
from samlib.shards import Shards

RHO = 0.05
SETTINGS = {"lr": 0.01, "momentum": 0.9}
BLOCK = 20  # steps between two readings of the clock on a GPU

Step = Callable[[], object]


class PlainSAM:
    """Two-step SAM with SGD as a Python loop over tensors, in the manner of the first public one for PyTorch.

    The baseline, and what the others have to agree with. It gives the parameters new memory in every step.
    """

    def __init__(self, params: Iterable[Tensor], rho: float = RHO, **settings: float) -> None:
        self.params = list(params)
        self.rho = rho
        self.base = torch.optim.SGD(self.params, **settings)
        self.at_w: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def first_step(self) -> None:
        norm = torch.stack([p.grad.norm() for p in self.params]).norm()
        for p in self.params:
            self.at_w[p] = p.data.clone()
            p.add_(p.grad * (self.rho / norm))

    @torch.no_grad()
    def second_step(self) -> None:
        self.restore()
        self.base.step()

    def restore(self) -> None:
        for p in self.params:
            p.data = self.at_w.pop(p)

    def zero_grad(self) -> None:
        self.base.zero_grad()


class FusedSGD(torch.optim.SGD):
    """Fused SGD for pytorch_optimizer, whose switch `foreach` lies in the group where torch's SGD finds it, too."""

    def __init__(self, groups: list[dict], foreach: bool, **settings: float) -> None:
        super().__init__(groups, fused=True, **settings)

    def step(self, closure: None = None) -> None:
        before = [group["foreach"] for group in self.param_groups]
        for group in self.param_groups:
            group["foreach"] = False
        super().step(closure)
        for group, foreach in zip(self.param_groups, before, strict=True):
            group["foreach"] = foreach


class CompiledSAM:
    """Our two halves through torch.compile, each with the clearing of the gradients at its end.

    The first step is eager, since it makes the momentum. SGD comes without its fused kernel, which would be a pass over
    memory of its own: compiled, the update and the way back are one. `lr` is a tensor, as a schedule needs it.
    """

    def __init__(self, params: Iterable[Tensor]) -> None:
        lr = torch.tensor(SETTINGS["lr"], dtype=torch.float64)
        optimizer = SAM(params, torch.optim.SGD, rho=RHO, flat=True, **{**SETTINGS, "lr": lr})

        def first_step() -> None:
            optimizer.first_step()
            clear(optimizer)

        def second_step() -> None:
            optimizer.second_step()
            clear(optimizer)

        self._halves = [first_step, second_step]
        self._compiled = [torch.compile(half, fullgraph=True) for half in self._halves]

    def first_step(self) -> None:
        self._halves[0]()

    def second_step(self) -> None:
        self._halves[1]()
        self._halves = self._compiled

    def zero_grad(self) -> None:
        """Done already."""


class CompiledPeer(PeerSAM):
    """pytorch_optimizer's two halves through torch.compile, likewise from the second step on."""

    def second_step(self, zero_grad: bool = False) -> None:
        super().second_step(zero_grad)
        self.first_step, self.second_step = torch.compile(super().first_step), torch.compile(super().second_step)


# ---------------------------------------------------------------------------------------------- the optimisers

_sam = partial(SAM, base_optimizer=torch.optim.SGD, rho=RHO, fused=True, **SETTINGS)
_peer_settings = {"rho": RHO, "foreach": True, **SETTINGS}
_peer = partial(PeerSAM, **_peer_settings)

# Each has first_step and second_step. Bookkeeping is timed on these.
OPTIMIZERS: dict[str, Callable] = {
    plan.PLAIN: partial(PlainSAM, **SETTINGS),
    plan.PEER: partial(_peer, base_optimizer=torch.optim.SGD),
    plan.FAIR_PEER: partial(_peer, base_optimizer=FusedSGD),
    plan.FOREACH: _sam,
    plan.FLAT: partial(_sam, flat=True),
    plan.AGAIN: partial(_sam, flat=True),
    plan.COMPILED_OURS: CompiledSAM,
    plan.COMPILED_PEER: partial(CompiledPeer, base_optimizer=torch.optim.SGD, **_peer_settings),
}


def clear(optimizer: Any) -> None:
    """zero_grad, in the form that is the fastest for this optimiser."""
    if getattr(optimizer, "flat", False):
        optimizer.zero_grad(set_to_none=False)
    else:
        optimizer.zero_grad()


# ---------------------------------------------------------------------------------------------- their steps


def floor(workload: Workload) -> Step:
    """Two forward-backwards, the gradients set to None before each."""

    def step() -> None:
        for _ in range(2):
            for p in params:
                p.grad = None
            workload.backward()

    params = workload.params
    return step


def sgd(workload: Workload, fused: bool | None = None) -> Step:
    optimizer = torch.optim.SGD(workload.params, fused=fused, **SETTINGS)

    def step() -> None:
        optimizer.zero_grad()
        workload.backward()
        optimizer.step()

    return step


def two_step(workload: Workload, name: str) -> Step:
    """The form without closures; gradients are cleared once a pass."""
    optimizer = OPTIMIZERS[name](workload.params)

    def step() -> None:
        workload.backward()
        optimizer.first_step()
        clear(optimizer)
        workload.backward()
        optimizer.second_step()
        clear(optimizer)

    return step


def with_closure(workload: Workload, name: str) -> Step:
    """As our README shows it."""
    optimizer = OPTIMIZERS[name](workload.params)

    def closure() -> Tensor:
        clear(optimizer)
        return workload.backward()

    return lambda: optimizer.step(closure)


def plain_msam(workload: Workload, num_shards: int) -> Step:
    """The mean of the shards' SAM gradients, by the plain loop."""
    optimizer = OPTIMIZERS[plan.PLAIN](workload.params)

    def step() -> None:
        mean = [torch.zeros_like(p) for p in optimizer.params]
        for shard in workload.shards(num_shards):
            workload.loss(*shard).backward()
            optimizer.first_step()
            optimizer.zero_grad()
            workload.loss(*shard).backward()
            optimizer.restore()
            for total, p in zip(mean, optimizer.params, strict=True):
                total += p.grad / num_shards
            optimizer.zero_grad()
        for total, p in zip(mean, optimizer.params, strict=True):
            p.grad = total
        optimizer.base.step()
        optimizer.zero_grad()

    return step


def msam(workload: Workload, num_shards: int, passes: str | None = None, compile: bool = False) -> Step:
    optimizer = OPTIMIZERS[plan.OURS](workload.params)
    cut = partial(Shards, optimizer, workload.model, nn.functional.cross_entropy)
    settings = {"num_shards": num_shards, "statistics": "update", "passes": passes, "compile": compile}
    return lambda: optimizer.step(cut(*workload.batch, **settings))


@dataclass(frozen=True, slots=True)
class Variant:
    """A way to make one training step.

    Attributes:
        make: sets it up on a workload.
        like: the variant whose update it must make in float64, to `tolerance`; None: it leaves the weights alone.
        compiled: whether the model goes through torch.compile.
    """

    make: Callable[[Workload], Step]
    like: str | None
    tolerance: float = 1e-12
    compiled: bool = False


PEER_TOLERANCE = 1e-7  # pytorch_optimizer takes the norm in float32, also of float64 gradients
COMPILED_TOLERANCE = 1e-10  # a compiled model adds up in another order


def plain_name(num_shards: int) -> str:
    return f"plain mSAM, {num_shards} shards"


def _msam_variants(num_shards: int) -> dict[str, Variant]:
    plain = plain_name(num_shards)
    ways = {"": None, "sequential": "sequential", "overlapped": "overlapped", "vmap": "vmap"}
    return {
        plain: Variant(partial(plain_msam, num_shards=num_shards), plain),
        **{
            plan.msam(num_shards, way): Variant(partial(msam, num_shards=num_shards, passes=passes), plain)
            for way, passes in ways.items()
        },
        **{
            plan.msam(num_shards, f"{way} compiled".strip()): Variant(
                partial(msam, num_shards=num_shards, passes=passes, compile=True), plain, COMPILED_TOLERANCE
            )
            for way, passes in ways.items()
        },
    }


VARIANTS: dict[str, Variant] = {
    plan.FLOOR: Variant(floor, None),
    plan.SGD: Variant(sgd, plan.SGD),
    plan.FUSED_SGD: Variant(partial(sgd, fused=True), plan.SGD),
    plan.PLAIN: Variant(partial(two_step, name=plan.PLAIN), plan.PLAIN),
    plan.PEER: Variant(partial(two_step, name=plan.PEER), plan.PLAIN, PEER_TOLERANCE),
    plan.FAIR_PEER: Variant(partial(two_step, name=plan.FAIR_PEER), plan.PLAIN, PEER_TOLERANCE),
    plan.FOREACH: Variant(partial(with_closure, name=plan.FOREACH), plan.PLAIN),
    plan.FLAT: Variant(partial(with_closure, name=plan.FLAT), plan.PLAIN),
    plan.AGAIN: Variant(partial(with_closure, name=plan.AGAIN), plan.PLAIN),
    plan.COMPILED_OURS: Variant(partial(two_step, name=plan.COMPILED_OURS), plan.PLAIN),
    plan.COMPILED_PEER: Variant(partial(two_step, name=plan.COMPILED_PEER), plan.PLAIN, PEER_TOLERANCE),
    plan.FLOOR + plan.COMPILED: Variant(floor, None, compiled=True),
    plan.SGD + plan.COMPILED: Variant(sgd, plan.SGD, COMPILED_TOLERANCE, compiled=True),
    plan.OURS + plan.COMPILED: Variant(
        partial(with_closure, name=plan.OURS), plan.PLAIN, COMPILED_TOLERANCE, compiled=True
    ),
    **{name: variant for shards in plan.SHARDS for name, variant in _msam_variants(shards).items()},
}


# ---------------------------------------------------------------------------------------------- set up to be timed


def build(name: str, case: plan.Case, device: torch.device, dtype: torch.dtype, block: int = 1) -> Built:
    """A variant on the network of a case, to be run `block` steps at a time.

    All variants of a case start from the same weights and see the same batches.
    """
    if case.kind == "bookkeeping":
        return build_bookkeeping(name, case, device, dtype)
    variant = VARIANTS[name]
    workload = Workload(case.network, case.batch, device, dtype, compiled=variant.compiled)
    step = variant.make(workload)

    def run(stopwatch: Stopwatch) -> None:
        with stopwatch:
            for _ in range(block):
                workload.next_batch()
                step()

    return Built(workload.params, run, block)


def build_bookkeeping(name: str, case: plan.Case, device: torch.device, dtype: torch.dtype) -> Built:
    """first_step and second_step on the gradients of L(w) = <g, w> + |w|^2 / 2, with g drawn once.

    So the second gradient depends on where the ascent has led, and the check of equality sees an ascent or a restore
    that is wrong.
    """
    params = Workload(case.network, 0, device, dtype).params
    optimizer = OPTIMIZERS[name](params)
    generator = torch.Generator(device).manual_seed(0)
    g = [torch.randn(p.shape, generator=generator, device=device, dtype=dtype) for p in params]

    def run(stopwatch: Stopwatch) -> None:
        for half in (optimizer.first_step, optimizer.second_step):
            place(params, g)
            with stopwatch:
                half()
                clear(optimizer)

    return Built(params, run, steps=1)


@torch.no_grad()
def place(params: list[Tensor], g: list[Tensor]) -> None:
    """What autograd would do: a new tensor where there is none, otherwise added in place."""
    for p, linear in zip(params, g, strict=True):
        if p.grad is None:
            p.grad = p + linear
        else:
            p.grad += p + linear
