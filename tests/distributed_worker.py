"""What torchrun starts for test_distributed.py: every case under DistributedDataParallel, on every rank.

`torchrun --nproc-per-node=4 distributed_worker.py FOLDER` runs them in four processes and then in the first two of
these: to start a process takes longer than its cases. For each case it writes a file with the list of the ranks'
outcomes, `outcome_file`. Those of the cases before a crash are then known. The test imports the cases and their data
from here and runs them again in one process.
"""

import faulthandler
import math
import os
import sys
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from samlib.batchnorm import second_pass
from samlib.optim import ASAM, SAM, AverageSAM

# A rank whose partner is gone fails after the first, one that hangs elsewhere prints where after the second. Both are
# far above the few seconds that the cases take, for a machine that is busy.
GROUP_TIMEOUT, RANK_TIMEOUT = 40, 160
WORLD_SIZES = (4, 2)
STEPS, RELOAD_AT, BATCH = 5, 3, 24  # the reload comes between two ascents where every second step has one
BASE = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}


@dataclass(frozen=True)
class Fault:
    """Where a gradient becomes infinite: in one pass of one closure, on one rank, in one step."""

    pass_: int
    step: int = 2
    rank: int = 1
    shard: int = 0


@dataclass(frozen=True)
class Case:
    """One training run; the defaults are SAM on plain closures, without batch norm."""

    optimizer: type[SAM] = SAM
    settings: dict[str, Any] = field(default_factory=dict)
    local: bool = False  # step with no_sync
    shards: int = 1  # closures on each rank
    ascent_closure: bool = False
    two_step: bool = False
    batch_norm: bool = False
    statistics: str = "frozen"  # of batch norm in the second pass
    ragged: bool = False  # ranks with different numbers of examples
    branches: bool = False  # a layer that only the examples of rank 0 reach
    seeds_differ: bool = False  # of AverageSAM
    set_to_none: bool = True
    fault: Fault | None = None
    scaler: bool = False
    ddp: dict[str, Any] = field(default_factory=dict)
    reload: str = ""  # half-way: "rank 0" saves for all, or "every rank" for itself


LOCAL, VIEWS = {"local": True}, {"ddp": {"gradient_as_bucket_view": True}}
AVERAGE = {"optimizer": AverageSAM}
BRANCHES = {"branches": True, "ddp": {"find_unused_parameters": True}}
INNER = {"settings": {"inner_steps": 2}}
FLAT = {"settings": {"flat": True}}
HALF_TIME = {"local": True, "batch_norm": True, "settings": {"ascent_every": 2}}

CASES = {
    # one ascent, shared by the ranks
    "shared": Case(),
    "shared ASAM": Case(ASAM),
    "shared inner_steps 2": Case(**INNER),
    "shared batch norm": Case(batch_norm=True),
    "shared batch norm, update": Case(batch_norm=True, statistics="update"),
    "shared batch norm, eval": Case(batch_norm=True, statistics="eval"),
    "shared ragged": Case(ragged=True),
    "shared list of closures": Case(shards=2),
    "shared ascent_closure": Case(ascent_closure=True),
    "shared ascent_closure, list of closures": Case(ascent_closure=True, shards=2),
    "shared two-step": Case(two_step=True),
    "shared branches": Case(**BRANCHES),
    "shared bucket views": Case(**VIEWS, shards=2),
    "shared bucket views, zeroed in place": Case(**VIEWS, set_to_none=False),
    "shared AdamW": Case(settings={"base_optimizer": torch.optim.AdamW}),
    # every rank ascends on its own
    "local": Case(**LOCAL),
    "local ASAM": Case(ASAM, **LOCAL),
    "local inner_steps 2": Case(**LOCAL, **INNER),
    "local batch norm": Case(**LOCAL, batch_norm=True),
    "local batch norm, update": Case(**LOCAL, batch_norm=True, statistics="update"),
    "local batch norm, eval": Case(**LOCAL, batch_norm=True, statistics="eval"),
    "local ragged": Case(**LOCAL, ragged=True),
    "local list of closures": Case(**LOCAL, shards=2),
    "local list of closures, batch norm": Case(**LOCAL, shards=2, batch_norm=True),
    "local ascent_closure": Case(**LOCAL, ascent_closure=True),
    "local two-step": Case(**LOCAL, two_step=True),
    "local branches": Case(**LOCAL, **BRANCHES),
    "local bucket views": Case(**LOCAL, **VIEWS, shards=2),
    "local bucket views, zeroed in place": Case(**LOCAL, **VIEWS, set_to_none=False),
    "local AdamW": Case(**LOCAL, settings={"base_optimizer": torch.optim.AdamW}),
    # no ascent
    "AverageSAM": Case(**AVERAGE),
    "AverageSAM, different seeds": Case(**AVERAGE, seeds_differ=True),
    # contiguous buffers
    "shared flat": Case(**FLAT),
    "local flat": Case(**LOCAL, **FLAT),
    "local flat, list of closures": Case(**LOCAL, **FLAT, shards=2),
    "local flat, bucket views, zeroed in place": Case(**LOCAL, **FLAT, **VIEWS, set_to_none=False),
    # a gradient that is not finite, on one rank
    "fault in the shared ascent": Case(fault=Fault(pass_=0)),
    "fault in the shared ascent of the second shard": Case(shards=2, fault=Fault(pass_=0, shard=1)),
    "fault in the shared descent": Case(fault=Fault(pass_=1)),
    "fault in the shared ascent, two-step": Case(two_step=True, fault=Fault(pass_=0)),
    "fault in the local ascent": Case(**LOCAL, fault=Fault(pass_=0)),
    "fault in the local ascent of the first shard": Case(**LOCAL, shards=2, fault=Fault(pass_=0)),
    "fault in the local second inner step": Case(**LOCAL, **INNER, fault=Fault(pass_=1)),
    "fault in the local descent": Case(**LOCAL, fault=Fault(pass_=1)),
    "fault in the local ascent, two-step": Case(**LOCAL, two_step=True, fault=Fault(pass_=0)),
    "fault in the local ascent, flat": Case(**LOCAL, **FLAT, fault=Fault(pass_=0)),
    "fault in AverageSAM": Case(**AVERAGE, seeds_differ=True, fault=Fault(pass_=0)),
    "scaler": Case(scaler=True),
    "scaler, local": Case(**LOCAL, scaler=True),
    "scaler, fault in the shared ascent": Case(scaler=True, fault=Fault(pass_=0)),
    "scaler, fault in the local ascent": Case(**LOCAL, scaler=True, fault=Fault(pass_=0)),
    "scaler, fault in the shared descent": Case(scaler=True, fault=Fault(pass_=1)),
    # saved and loaded half-way
    "local, half of the ascents": Case(**HALF_TIME),
    "local, half of the ascents, reloaded": Case(**HALF_TIME, reload="rank 0"),
    "local flat, reloaded": Case(**LOCAL, **FLAT, reload="rank 0"),
    "AverageSAM, reloaded": Case(**AVERAGE, reload="rank 0"),
    "AverageSAM, different seeds, reloaded": Case(**AVERAGE, seeds_differ=True, reload="every rank"),
}


class Network(nn.Module):
    """Two layers and a head; with branches a second head, which only some inputs reach."""

    def __init__(self, case, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        norm = nn.BatchNorm1d(6) if case.batch_norm else nn.Identity()
        self.body = nn.Sequential(nn.Linear(4, 6), norm, nn.Tanh())
        self.head = nn.Linear(6, 3)
        self.branch = nn.Linear(6, 3) if case.branches else None
        self.double()

    def forward(self, inputs, branch=False):
        hidden = self.body(inputs)
        return self.head(hidden) + (self.branch(hidden) if branch else 0)


def loss_at(case, model, examples, rank):
    inputs, labels = examples
    logits = model(inputs, branch=True) if case.branches and rank == 0 else model(inputs)
    return nn.functional.cross_entropy(logits, labels)


def examples(case, step, world, rank, shard=0):
    """One rank's part of the batch of a step, or of one of the rank's shards; shard -1 is for the ascent closure."""
    generator = torch.Generator().manual_seed(1000 * (shard + 2) + step)
    inputs = torch.randn(BATCH, 4, generator=generator, dtype=torch.float64)
    labels = torch.randint(3, (BATCH,), generator=generator)
    sizes = [BATCH // world] * world
    if case.ragged:
        sizes = [size + 2 * r - (world - 1) for r, size in enumerate(sizes)]
    return inputs.split(sizes)[rank], labels.split(sizes)[rank]


def optimizer_for(case, params, rank=0, **changes):
    settings = {"base_optimizer": torch.optim.SGD, "rho": 0.2, **BASE, **case.settings, **changes}
    if settings["base_optimizer"] is torch.optim.AdamW:
        del settings["momentum"]
    if case.seeds_differ:
        settings["seed"] = rank
    return case.optimizer(params, **settings)


def factor(fault, step, rank, shard, pass_):
    """What the gradient is multiplied with: infinity where the fault is."""
    here = fault and (fault.step, fault.rank, fault.shard, fault.pass_) == (step, rank, shard, pass_)
    return math.inf if here else 1.0


class Trainer:
    """One rank of a case."""

    def __init__(self, case, rank, world, seed=None):
        self.case, self.rank, self.world = case, rank, world
        # the ranks start apart: the constructor of DistributedDataParallel gives them the weights of rank 0
        self.ddp = DistributedDataParallel(Network(case, rank if seed is None else seed), **case.ddp)
        self.opt = optimizer_for(case, self.ddp.parameters(), rank)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=100) if case.scaler else None
        self.losses = []

    def step(self, step):
        loss = self._two_steps(step) if self.case.two_step else self._closure_step(step)
        self.losses.append(float(loss))
        if self.scaler:
            self.scaler.update()

    def _closure_step(self, step):
        options = {"no_sync": self.ddp.no_sync} if self.case.local else {}
        if self.case.ascent_closure:
            options["ascent_closure"] = self._closure(step, -1)
        if self.scaler:
            options["scaler"] = self.scaler
        closures = [self._closure(step, shard) for shard in range(self.case.shards)]
        return self.opt.step(closures if len(closures) > 1 else closures[0], **options)

    def _closure(self, step, shard):
        passes = iter(range(10))

        def closure():
            self.opt.zero_grad(set_to_none=self.case.set_to_none)
            return self._forward_backward(step, shard, next(passes))

        return closure

    def _forward_backward(self, step, shard, pass_):
        data = examples(self.case, step, self.world, self.rank, shard)
        with second_pass(self.ddp, self.case.statistics) if self.opt.in_second_pass else nullcontext():
            loss = loss_at(self.case, self.ddp, data, self.rank)
        spoilt = loss * factor(self.case.fault, step, self.rank, shard, pass_)
        (self.scaler.scale(spoilt) if self.scaler else spoilt).backward()
        return loss.detach()

    def _two_steps(self, step):
        with self.ddp.no_sync() if self.case.local else nullcontext():  # forward pass included, as its docs demand
            loss = self._forward_backward(step, 0, 0)
        self.opt.first_step(zero_grad=True)
        self._forward_backward(step, 0, 1)
        self.opt.second_step(zero_grad=True)
        return loss

    def save(self, path):
        torch.save({"model": self.ddp.module.state_dict(), "optimizer": self.opt.state_dict()}, path)

    def load(self, path):
        saved = torch.load(path, weights_only=True)
        self.ddp.module.load_state_dict(saved["model"])
        self.opt.load_state_dict(saved["optimizer"])

    def outcome(self):
        params = [w.detach() for w in self.ddp.module.parameters()]
        state = [value for w in self.opt.state for _, value in sorted(self.opt.state[w].items())]
        return {
            "params": params,
            "state": [value for value in state if isinstance(value, torch.Tensor)],
            "buffers": list(self.ddp.module.buffers()),
            "skipped": int(self.opt.skipped_steps),
            "scale": self.scaler.get_scale() if self.scaler else None,
            "flat": self.opt.flat,
            "losses": self.losses,
        }


def run(case, rank, world, folder):
    trainer = Trainer(case, rank, world)
    for step in range(STEPS):
        if case.reload and step == RELOAD_AT:
            trainer = reloaded(trainer, folder)
        trainer.step(step)
    return trainer.outcome()


def reloaded(trainer, folder):
    """A new trainer, of other weights, that goes on where this one was."""
    path = folder / f"checkpoint-{trainer.rank if trainer.case.reload == 'every rank' else 0}.pt"
    if trainer.rank == 0 or trainer.case.reload == "every rank":
        trainer.save(path)
    dist.barrier()
    fresh = Trainer(trainer.case, trainer.rank, trainer.world, seed=50 + trainer.rank)
    # DistributedDataParallel orders its buckets anew after the first backward pass, and gloo's sum over four ranks
    # depends, in its last bit, on a gradient's place in the bucket. So the first pass is made before the load.
    fresh._forward_backward(0, 0, 0)
    fresh.opt.zero_grad()
    fresh.load(path)
    fresh.losses = trainer.losses
    return fresh


def outcome_file(folder, world, name):
    return Path(folder, f"{world} processes, case {list(CASES).index(name)}.pt")


def main(folder):
    rank, master = int(os.environ["RANK"]), (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    for world in WORLD_SIZES:
        if rank < world:
            timeout = timedelta(seconds=GROUP_TIMEOUT)
            store = dist.PrefixStore(f"{world} processes", dist.TCPStore(*master, is_master=False, timeout=timeout))
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timeout)
            run_all(rank, world, folder)
            dist.destroy_process_group()


def run_all(rank, world, folder):
    for name, case in CASES.items():
        outcomes = [None] * world if rank == 0 else None
        try:
            dist.gather_object(run(case, rank, world, folder), outcomes)
        except Exception as error:
            error.add_note(f"on rank {rank} of {world}, in case {name!r}")
            raise
        if rank == 0:
            torch.save(outcomes, folder / "unfinished")
            (folder / "unfinished").rename(outcome_file(folder, world, name))


if __name__ == "__main__":
    faulthandler.dump_traceback_later(RANK_TIMEOUT, exit=True)
    main(Path(sys.argv[1]))
