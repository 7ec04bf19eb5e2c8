"""Real processes, started by torchrun, over gloo: samlib.optim under DistributedDataParallel.

All cases of distributed_worker.py run in one torchrun, in four processes and then in two. Here each is compared with
the same training in one process, in float64. What is true under DistributedDataParallel:

- Plain closures give one ascent, shared by the ranks: SAM on the whole batch. With `no_sync` each rank ascends on its
  own: mSAM with one shard per rank, or per closure of a rank.
- A rank counts once in the mean, whatever its number of examples.
- Batch norm's running statistics are those of rank 0's examples: they are broadcast from rank 0 before each forward
  pass that follows a synchronised one, which is every pass with plain closures and only the first of a step with
  `no_sync`. Between two broadcasts each rank moves its own, so ranks may end a step with different buffers, and what is
  saved or evaluated should be rank 0's.
"""

import os
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from functools import cache
from pathlib import Path

import pytest
import torch
from distributed_worker import (
    BASE,
    CASES,
    RANK_TIMEOUT,
    STEPS,
    WORLD_SIZES,
    Case,
    Network,
    examples,
    factor,
    loss_at,
    optimizer_for,
    outcome_file,
)

import samlib
from samlib.batchnorm import second_pass

WORKER = Path(__file__).with_name("distributed_worker.py")


def cases(chosen=lambda case: True):
    names = [name for name, case in CASES.items() if chosen(case)]
    return pytest.mark.parametrize("name", names)


both_world_sizes = pytest.mark.parametrize("world", [2, 4])


# ------------------------------------------------------------------------------------------------------ the processes

RUNS = [(world, name) for world in WORLD_SIZES for name in CASES]  # in their order


@cache
def torchrun():
    """The outcomes on every rank of the cases that finished, by number of processes and name, and what was printed."""
    with tempfile.TemporaryDirectory() as folder:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
        same_samlib = str(Path(samlib.__file__).parents[1])
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": same_samlib}
        printed = output_of([*launcher, f"--nproc-per-node={max(WORLD_SIZES)}", WORKER, folder], environment)
        files = {(world, name): outcome_file(folder, world, name) for world, name in RUNS}
        return {run: torch.load(file) for run, file in files.items() if file.exists()}, printed


def output_of(command, environment):
    """Standard output and error. A rank ends itself when it hangs; torchrun, should it hang, is ended here."""
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            printed, _ = process.communicate(timeout=2 * RANK_TIMEOUT)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun then ends its workers
            printed, _ = process.communicate()
            printed += f"\ntorchrun did not end within {2 * RANK_TIMEOUT} s"
    return printed


def outcomes(name, world):
    """The outcome of a case on each rank; where there is none, a failure with the ranks' tracebacks."""
    finished, printed = torchrun()
    if (world, name) not in finished:
        stopped_in = RUNS[len(finished)]
        reason = printed if (world, name) == stopped_in else "its failure shows the tracebacks of the ranks"
        pytest.fail("the run stopped with {} processes in case {!r}\n{}".format(*stopped_in, reason), pytrace=False)
    return finished[world, name]


# ---------------------------------------------------------------------------------------------- the same in one process


class OneProcess:
    """A case in one process, one closure per ascent; batch norm's buffers are handed round as the broadcasts do."""

    def __init__(self, case, world):
        self.case, self.world = case, world
        self.model = Network(case)
        self.opt = optimizer_for(case, self.model.parameters())
        self.buffers = [self._buffers()] * world
        self.losses = []

    def step(self, step):
        ranks, case = range(self.world), self.case
        together = [[rank] for rank in ranks] if case.local else [ranks]
        closures = [self._closure(step, shard, group) for shard in range(case.shards) for group in together]
        options = {}
        if case.ascent_closure and not case.local:
            options["ascent_closure"] = self._closure(step, -1, ranks)
        self.losses.append(float(self.opt.step(closures, **options)))

    def _closure(self, step, shard, ranks):
        passes = iter(range(10))

        def closure():
            self.opt.zero_grad()
            pass_ = next(passes)
            own_ascent = self.case.ascent_closure and self.case.local and not self.opt.in_second_pass
            at = (step, -1 if own_ascent else shard)
            if self._is_one_batch():
                return self._whole_batch(*at, pass_, ranks)
            return sum(self._part(*at, pass_, rank, len(ranks)) for rank in ranks)

        return closure

    def _is_one_batch(self):
        """Whether the ranks' parts may go through the model together, as the whole batch."""
        return not (self.case.local or self.case.batch_norm or self.case.ragged or self.case.branches)

    def _whole_batch(self, step, shard, pass_, ranks):
        parts = [examples(self.case, step, self.world, rank, shard) for rank in ranks]
        loss = loss_at(self.case, self.model, tuple(map(torch.cat, zip(*parts, strict=True))), None)
        (loss * max(factor(self.case.fault, step, rank, shard, pass_) for rank in ranks)).backward()
        return loss.detach()

    def _part(self, step, shard, pass_, rank, num_parts):
        if not (self.case.local and self.opt.in_second_pass):  # DistributedDataParallel broadcasts
            if rank == 0:
                self._of_rank_0 = self.buffers[0]
            self.buffers[rank] = self._of_rank_0
        for buffer, value in zip(self.model.buffers(), self.buffers[rank], strict=True):
            buffer.copy_(value)
        with second_pass(self.model, self.case.statistics) if self.opt.in_second_pass else nullcontext():
            loss = loss_at(self.case, self.model, examples(self.case, step, self.world, rank, shard), rank) / num_parts
        self.buffers[rank] = self._buffers()
        (loss * factor(self.case.fault, step, rank, shard, pass_)).backward()
        return loss.detach()

    def _buffers(self):
        return [buffer.clone() for buffer in self.model.buffers()]


class OverRanksPerturbations(OneProcess):
    """AverageSAM with a seed per rank: the mean over ranks of the gradient at each one's own perturbed point."""

    def __init__(self, case, world):
        super().__init__(case, world)
        self.opt = torch.optim.SGD(self.model.parameters(), **BASE)
        self.opt.skipped_steps = 0
        self.drawers = [optimizer_for(case, Network(case).parameters(), rank) for rank in range(world)]

    def step(self, step):
        params, loss, faulty = list(self.model.parameters()), 0.0, False
        self.opt.zero_grad()
        for rank, drawer in enumerate(self.drawers):
            eps = drawer.perturbation()
            drawer.step(lambda: 0.0)  # uses the draw up
            at_w = [w.detach().clone() for w in params]
            with torch.no_grad():
                torch._foreach_add_(params, eps)
            part = loss_at(self.case, self.model, examples(self.case, step, self.world, rank), rank) / self.world
            part.backward()
            with torch.no_grad():
                torch._foreach_copy_(params, at_w)
            loss += part.item()
            faulty |= factor(self.case.fault, step, rank, 0, 0) != 1
        self.losses.append(loss)
        if faulty:
            self.opt.skipped_steps += 1
        else:
            self.opt.step()


@cache
def in_one_process(name, world):
    case = CASES[name]
    trainer = (OverRanksPerturbations if case.seeds_differ else OneProcess)(case, world)
    for step in range(STEPS):
        trainer.step(step)
    return trainer


def tensors_of_state(opt):
    values = [value for w in opt.state for _, value in sorted(opt.state[w].items())]
    return [value for value in values if isinstance(value, torch.Tensor)]


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def assert_equal(found, expected):
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# ------------------------------------------------------------------------------------------------------------ the cases


@both_world_sizes
@cases()
def test_ranks_end_bit_identical(world, name):
    first, *others = outcomes(name, world)
    assert first["params"]
    assert first["state"]
    for other in others:
        assert_equal(other["params"], first["params"])
        assert_equal(other["state"], first["state"])
        assert (other["skipped"], other["scale"]) == (first["skipped"], first["scale"])


@both_world_sizes
@cases()
def test_weights_and_momentum_are_those_of_one_process(world, name):
    found, expected = outcomes(name, world)[0], in_one_process(name, world)
    assert_close(found["params"], [w.detach() for w in expected.model.parameters()])
    assert_close(found["state"], tensors_of_state(expected.opt))
    assert found["skipped"] == int(expected.opt.skipped_steps)


@both_world_sizes
@cases()
def test_the_mean_of_the_returned_losses_is_that_of_one_process(world, name):
    losses = torch.tensor([outcome["losses"] for outcome in outcomes(name, world)], dtype=torch.float64).mean(0)
    expected = torch.tensor(in_one_process(name, world).losses, dtype=torch.float64)
    compared = [step for step in range(STEPS) if not (CASES[name].fault and step == CASES[name].fault.step)]
    assert_close(losses[compared], expected[compared])


@both_world_sizes
@cases(lambda case: case.batch_norm)
def test_every_rank_has_the_running_statistics_that_the_broadcasts_give_it(world, name):
    for outcome, expected in zip(outcomes(name, world), in_one_process(name, world).buffers, strict=True):
        assert outcome["buffers"]
        assert_close(outcome["buffers"], expected)


@both_world_sizes
@pytest.mark.parametrize("name, equal", [("shared batch norm", True), ("local batch norm", False)])
def test_ranks_end_with_equal_buffers_only_if_the_last_forward_pass_was_broadcast_to_and_frozen(world, name, equal):
    first, *others = outcomes(name, world)
    for other in others:
        same = [torch.equal(a, b) for a, b in zip(first["buffers"], other["buffers"], strict=True)]
        assert all(same) == equal


@both_world_sizes
@cases(lambda case: case.fault)
def test_a_gradient_that_is_not_finite_on_one_rank_makes_all_skip_and_count(world, name):
    for outcome in outcomes(name, world):
        assert outcome["skipped"] == 1
        assert all(torch.isfinite(w).all() for w in outcome["params"] + outcome["state"])


@both_world_sizes
@cases(lambda case: case.scaler)
def test_the_scale_falls_on_all_ranks_if_one_meets_an_inf(world, name):
    scale = 2.0**7 if CASES[name].fault else 2.0**8
    assert [outcome["scale"] for outcome in outcomes(name, world)] == [scale] * world


@both_world_sizes
@cases(lambda case: case.settings.get("flat"))
def test_flat_buffers_stay_in_use(world, name):
    assert all(outcome["flat"] for outcome in outcomes(name, world))


@both_world_sizes
@cases(lambda case: case.reload)
def test_a_run_that_was_saved_and_loaded_ends_as_the_uninterrupted_one_bit_for_bit(world, name):
    uninterrupted = outcomes(name.removesuffix(", reloaded"), world)
    for found, expected in zip(outcomes(name, world), uninterrupted, strict=True):
        for part in ("params", "state", "buffers"):
            assert_equal(found[part], expected[part])
        assert found["losses"] == expected["losses"]


@both_world_sizes
@pytest.mark.parametrize(
    "name, other",
    [
        ("shared", "local"),
        ("shared ASAM", "local ASAM"),
        ("shared ascent_closure", "local ascent_closure"),
        ("local", "local list of closures"),
        ("local", "local ragged"),
        ("shared batch norm, update", "shared batch norm, eval"),
        ("local batch norm, eval", "shared batch norm, eval"),
        ("AverageSAM", "AverageSAM, different seeds"),
    ],
)
def test_the_comparisons_tell_the_methods_apart(world, name, other):
    """1e-12 would prove nothing if the methods ended that near to each other."""
    ends = [torch.cat([w.detach().flatten() for w in outcomes(n, world)[0]["params"]]) for n in (name, other)]
    assert (ends[0] - ends[1]).abs().max() > 1e-5


def test_every_case_steps_with_a_perturbation_that_matters():
    base = in_one_process("shared", 2).model
    still = OneProcess(Case(settings={"rho": 0.0}), 2)
    for step in range(STEPS):
        still.step(step)
    assert max((a - b).abs().max() for a, b in zip(base.parameters(), still.model.parameters(), strict=True)) > 1e-3
