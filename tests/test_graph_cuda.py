"""A whole step in one CUDA graph: what only a GPU can show. Skipped where there is none.

Graphs stay off until this has passed on a GPU. Ordered so that the first failure says most: the capture itself, the
eager step's equal, random numbers, what is skipped, waiting, memory, then streams.
"""

import gc
import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional

from samlib.batchnorm import second_pass
from samlib.errors import InputError
from samlib.graph import GraphedStep, ParallelShards, assign, in_parallel, make_static
from samlib.models import resnet20
from samlib.optim import ASAM, SAM, AverageSAM
from samlib.shards import Shards
from samlib.train import ClippedSGD

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

DEVICE = "cuda"
SGD = torch.optim.SGD
STEPS, BATCH, NUM_SHARDS = 50, 16, 4
MOMENTUM = {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-3}
CLIPPED = MOMENTUM | {"clip_norm": 1.0}
ADAMW = partial(torch.optim.AdamW, capturable=True)

# method -> (optimiser, number of shards)
METHODS = {
    "sgd": (partial(SGD, **MOMENTUM), 1),
    "clipped sgd": (partial(ClippedSGD, **CLIPPED), 1),
    "sam": (partial(SAM, base_optimizer=SGD, rho=0.1, **MOMENTUM), 1),
    "clipped sam": (partial(SAM, base_optimizer=ClippedSGD, rho=0.1, **CLIPPED), 1),
    "sam, p = inf": (partial(SAM, base_optimizer=SGD, rho=0.01, p=math.inf, **MOMENTUM), 1),
    "sam, adamw": (partial(SAM, base_optimizer=ADAMW, rho=0.1), 1),
    "asam": (partial(ASAM, base_optimizer=SGD, rho=0.5, **MOMENTUM), 1),
    "average sam": (partial(AverageSAM, base_optimizer=SGD, rho=0.2, seed=5, **MOMENTUM), 1),
    "msam": (partial(SAM, base_optimizer=SGD, rho=0.1, **MOMENTUM), NUM_SHARDS),
}
every_method = pytest.mark.parametrize("method", METHODS)


@pytest.fixture(autouse=True)
def deterministic(monkeypatch):
    """The same kernels in every run, so that what differs is the graph's doing."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)


def network(seed=0, dropout=0.0):
    torch.manual_seed(seed)
    layers = [
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Flatten(),
        nn.Linear(8 * 36, 10),
    ]
    return nn.Sequential(*layers).to(DEVICE, torch.float64)


def batches(steps, seed=1, size=BATCH, side=8):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        inputs = torch.randn(size, 3, side, side, generator=generator, dtype=torch.float64)
        yield inputs.to(DEVICE), torch.randint(10, (size,), generator=generator).to(DEVICE)


def rate(step):
    return 0.05 * (1 + math.cos(math.pi * step / STEPS))


def follow_schedule(opt, step):
    assign(opt, lr=rate(step), rho=opt.defaults.get("rho", 0.0) * (1 + step % 7) / 7)


def make(method, model, flat=False):
    """The optimiser and the eager step of a method; lr and rho are tensors."""
    optimizer, num_shards = METHODS[method]
    switches = {} if "sgd" in method else {"flat": flat}
    opt = optimizer(model.parameters(), lr=0.1, fused=True, **switches)
    make_static(opt)
    return opt, partial(one_step, opt, model, num_shards)


def one_step(opt, model, num_shards, inputs, labels):
    closures = [
        partial(loss_and_gradient, opt, model, *part)
        for part in zip(inputs.chunk(num_shards), labels.chunk(num_shards), strict=True)
    ]
    return opt.step(closures if isinstance(opt, SAM) else closures[0])


def loss_and_gradient(opt, model, inputs, labels):
    opt.zero_grad(set_to_none=False)
    with second_pass(model, "frozen" if getattr(opt, "in_second_pass", False) else "update"):
        loss = functional.cross_entropy(model(inputs), labels)
    loss.backward()
    return loss


def graphed(method="sam", *, flat=True, seed=0, dropout=0.0, **settings):
    model = network(seed, dropout)
    opt, step = make(method, model, flat)
    return model, opt, GraphedStep(step, opt, next(batches(1)), **settings)


def train(opt, step, steps=STEPS, seed=1):
    """The losses of some steps under a changing lr and rho."""
    losses = []
    for number, batch in enumerate(batches(steps, seed)):
        follow_schedule(opt, number)
        losses.append(step(*batch).detach().clone())
    return torch.stack(losses)


def state(opt, model):
    kept = [value for w in model.parameters() for value in opt.state[w].values()]
    return [value.detach().clone() for value in [*model.state_dict().values(), *kept]]


def assert_close(found, expected, tolerance=1e-9):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


# --------------------------------------------------------------------------------------------------------- the capture


@pytest.mark.parametrize("flat", [False, True])
@every_method
def test_a_capture_changes_nothing_and_the_replay_after_it_is_one_step(method, flat):
    model, opt, step = graphed(method, flat=flat)
    expected_model, expected_opt, eager = graphed(method, flat=flat, warmup=STEPS)
    *first, last = batches(4)
    for batch in first:
        step(*batch)
        eager(*batch)
    assert step._graph is None
    before = state(opt, model)
    step._place(last)
    graph = step._capture()
    torch.cuda.synchronize()
    assert all(map(torch.equal, state(opt, model), before))
    graph.replay()
    expected = eager(*last)
    assert eager._graph is None
    assert_close(step._loss, expected)
    assert_close(state(opt, model), state(expected_opt, expected_model))


@pytest.mark.parametrize("flat", [False, True])
@every_method
def test_a_graph_is_the_eager_step_over_fifty_steps_under_a_changing_lr_and_rho(method, flat):
    model, expected_model = network(), network()
    expected_opt, eager = make(method, expected_model, flat)
    expected = train(expected_opt, eager)
    opt, step = make(method, model, flat)
    step = GraphedStep(step, opt, next(batches(1)))
    assert_close(train(opt, step), expected)
    assert step._graph is not None
    assert_close(state(opt, model), state(expected_opt, expected_model))


@pytest.mark.parametrize("method", ["sgd", "sam"])
def test_a_graph_is_the_ordinary_loop_with_numbers_for_lr_and_rho(method):
    """The fused kernel reads lr in float32, the loop has it in float64."""
    optimizer, num_shards = METHODS[method]
    model = network()
    opt = optimizer(model.parameters(), lr=0.1, fused=True)
    expected = train(opt, partial(one_step, opt, model, num_shards))
    graphed_model, graphed_opt, step = graphed(method)
    assert_close(train(graphed_opt, step), expected, 1e-5)
    assert_close(list(graphed_model.parameters()), list(model.parameters()), 1e-5)


@pytest.mark.parametrize("warmup", [2, 5])
def test_the_first_steps_momentum_is_made_once(warmup):
    _, expected_opt, eager = graphed(warmup=STEPS)
    expected = train(expected_opt, eager, 12)
    _, opt, step = graphed(warmup=warmup)
    assert_close(train(opt, step, 12), expected)


def test_a_number_for_lr_is_frozen_by_a_capture_and_refused():
    model = network()
    opt = SGD(model.parameters(), lr=0.1, fused=True)
    step, batch = partial(one_step, opt, model, 1), next(batches(1))
    with pytest.raises(InputError, match="would be frozen"):
        GraphedStep(step, opt, batch)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    in_parallel([lambda: step(*batch)] * 3, [stream])
    with torch.cuda.graph(graph, stream=stream):
        step(*batch)
    before = [w.detach().clone() for w in model.parameters()]
    opt.param_groups[0]["lr"] = 0.0
    graph.replay()
    assert not any(map(torch.equal, model.parameters(), before))


def test_what_the_graph_would_ignore_is_refused():
    _, opt, step = graphed()
    batch = next(batches(1))
    for _ in range(5):
        step(*batch)
    opt.load_state_dict(opt.state_dict())
    make_static(opt)
    with pytest.raises(InputError, match="make another GraphedStep"):
        step(*batch)


def test_phases_are_two_graphs_of_one_optimiser_in_one_pool():
    expected_model, model = network(), network()
    expected_opt, eager = make("sam", expected_model, flat=True)
    opt, step = make("sam", model, flat=True)
    pool = torch.cuda.graph_pool_handle()
    rho = {True: opt.param_groups[0]["rho"], False: 0.0}
    expected_rho = {True: expected_opt.param_groups[0]["rho"], False: 0.0}
    phases = {}
    for ascent in (True, False):
        opt.param_groups[0]["rho"] = rho[ascent]
        phases[ascent] = GraphedStep(step, opt, next(batches(1)), pool=pool)
    for number, batch in enumerate(batches(40)):
        ascent = number % 16 < 8
        opt.param_groups[0]["rho"], expected_opt.param_groups[0]["rho"] = rho[ascent], expected_rho[ascent]
        assign(opt, lr=rate(number))
        assign(expected_opt, lr=rate(number))
        assert_close(phases[ascent](*batch), eager(*batch))
    assert all(phase._graph is not None for phase in phases.values())
    assert_close(state(opt, model), state(expected_opt, expected_model))


# -------------------------------------------------------------------------------------------------------------- ResNet


def augmented(images, generator):
    """Flips and crops of their own for each image, in one gather."""
    size, channels, side, _ = images.shape
    padded = functional.pad(images, (4, 4, 4, 4))
    flip = torch.rand(size, 1, device=DEVICE, generator=generator) < 0.5
    columns = torch.arange(side, device=DEVICE)
    columns = torch.where(flip, columns.flip(0), columns)
    shift = torch.randint(9, (2, size, 1), device=DEVICE, generator=generator)
    rows = (torch.arange(side, device=DEVICE) + shift[0])[:, None, :, None].expand(-1, channels, -1, side + 8)
    columns = (columns + shift[1])[:, None, None, :].expand(-1, channels, side, -1)
    return padded.gather(2, rows).gather(3, columns).double() / 255 - 0.5


@pytest.mark.parametrize("method", ["sgd", "sam", "msam"])
def test_resnet20_with_augmentation_draws_and_trains_as_the_eager_step(method):
    images = torch.randint(256, (BATCH, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    labels = torch.arange(BATCH) % 10
    images, labels = images.to(DEVICE), labels.to(DEVICE)
    found = []
    for warmup in (STEPS, 3):
        torch.manual_seed(0)
        model = resnet20().to(DEVICE, torch.float64, memory_format=torch.channels_last)
        opt, step = make(method, model, flat=True)
        generator = torch.Generator(DEVICE).manual_seed(7)

        def whole(images, labels, step=step, generator=generator):
            return step(augmented(images, generator).contiguous(memory_format=torch.channels_last), labels)

        graph = GraphedStep(whole, opt, [images, labels], generators=[generator], warmup=warmup)
        losses = []
        for number in range(20):
            follow_schedule(opt, number)
            losses.append(graph(images, labels))
        found.append([torch.stack(losses), *state(opt, model)])
        drawn = generator.get_state()
        assert len({loss.item() for loss in losses}) == 20
        if warmup == STEPS:
            expected_draws = drawn
    assert torch.equal(drawn, expected_draws)
    assert_close(*found, tolerance=1e-6)


def test_each_replay_draws_anew():
    _, opt, _ = graphed("sgd")
    generator = torch.Generator(DEVICE).manual_seed(3)
    step = GraphedStep(lambda: torch.rand((), device=DEVICE, generator=generator), opt, [], generators=[generator])
    drawn = torch.stack([step() for _ in range(8)])
    same = torch.Generator(DEVICE).manual_seed(3)
    assert torch.equal(drawn, torch.stack([torch.rand((), device=DEVICE, generator=same) for _ in range(8)]))
    generator.manual_seed(3)  # as a resumed run does
    assert torch.equal(step(), drawn[0])


def test_dropout_from_the_default_generator_is_that_of_the_eager_step():
    found = []
    for warmup in (STEPS, 3):
        model, opt, step = graphed("sgd", dropout=0.5, warmup=warmup)
        torch.manual_seed(11)
        found.append([train(opt, step, 20), *state(opt, model)])
    assert_close(*found)


def test_average_sam_draws_from_its_own_generator():
    _, expected_opt, eager = graphed("average sam", warmup=STEPS)
    train(expected_opt, eager, 12)
    _, opt, step = graphed("average sam")
    train(opt, step, 12)
    assert torch.equal(opt.generator.get_state(), expected_opt.generator.get_state())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_in_the_step(dtype):
    found = []
    for warmup in (STEPS, 3):
        model = network().float()
        opt = SAM(model.parameters(), SGD, rho=0.1, lr=0.1, momentum=0.9, fused=True, flat=True)
        make_static(opt)

        def closure(inputs, labels, model=model, opt=opt):
            opt.zero_grad(set_to_none=False)
            with torch.autocast(DEVICE, dtype), second_pass(model, "frozen" if opt.in_second_pass else "update"):
                loss = functional.cross_entropy(model(inputs.float()).float(), labels)
            loss.backward()
            return loss

        step = GraphedStep(
            lambda *b, opt=opt, closure=closure: opt.step(partial(closure, *b)), opt, next(batches(1)), warmup=warmup
        )
        found.append(train(opt, step, 20))
    assert_close(*found, tolerance=1e-3)


# ------------------------------------------------------------------------------------------- skipping, waiting, memory


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("method", ["sam", "clipped sam", "asam", "msam"])
def test_a_step_that_is_not_finite_sets_a_flag_and_leaves_the_weights(method, flat):
    model, opt, step = graphed(method, flat=flat)
    good = list(batches(6))
    for batch in good:
        step(*batch)

    def trained():
        return [*model.parameters(), *(opt.state[w]["momentum_buffer"] for w in model.parameters())]

    before = [tensor.detach().clone() for tensor in trained()]
    step(torch.full_like(good[0][0], math.nan), good[0][1])
    assert opt.skipped_steps == 1
    assert all(map(torch.equal, trained(), before))
    step(*good[0])
    assert opt.skipped_steps == 1
    assert not any(map(torch.equal, trained(), before))
    assert all(tensor.isfinite().all() for tensor in trained())


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature")
@every_method
def test_no_replay_waits(method):
    _, opt, step = graphed(method)
    data = list(batches(8))
    for batch in data[:4]:
        step(*batch)
    assert step._graph is not None
    try:
        torch.cuda.set_sync_debug_mode("error")
        for number, batch in enumerate(data[4:]):
            follow_schedule(opt, number)
            step(*batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_method
def test_replays_take_no_more_memory(method):
    _, _, step = graphed(method)
    batch = next(batches(1))
    for _ in range(6):
        step(*batch)
    torch.cuda.synchronize()
    taken = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for _ in range(20):
        step(*batch)
    torch.cuda.synchronize()
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == taken


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("method", ["sgd", "sam", "msam"])
def test_eager_steps_and_other_tensors_between_replays(method, flat):
    """Freed memory is given to others at once, here full of NaN: a graph that still used it would show."""
    found = []
    for warmup in (STEPS, 3):
        model, opt, step = graphed(method, flat=flat, warmup=warmup)
        losses = []
        for number, batch in enumerate(batches(20)):
            losses.append(step(*batch))
            if number % 5 == 4:
                losses.append(step.step(*(tensor[: BATCH // 2] for tensor in batch)).detach())
                opt.zero_grad()
            others = [torch.full((size,), math.nan, device=DEVICE) for size in (2, 8, 16, 64, 216, 432, 2880, 5760)] * 4
        del others
        found.append([torch.stack(losses), *state(opt, model)])
    assert_close(*found)


def test_a_graph_that_is_gone_gives_its_memory_back_and_leaves_the_others_as_they_were():
    """torch keeps the workspace of matrix products by stream, and frees a graph's with it (pytorch issue 193402)."""
    gc.collect()
    torch.cuda.empty_cache()
    expected_model, expected_opt, eager = graphed(seed=1, warmup=STEPS)
    expected = train(expected_opt, eager, 20)
    first, second = graphed(seed=0), graphed(seed=1)
    losses = []
    for number, batch in enumerate(batches(20)):
        if number == 10:
            del first
            gc.collect()
            torch.cuda.empty_cache()
        elif number < 10:
            first[2](*batch)
        follow_schedule(second[1], number)
        losses.append(second[2](*batch))
    assert_close(torch.stack(losses), expected)
    assert_close(state(second[1], second[0]), state(expected_opt, expected_model))


# ------------------------------------------------------------------------------------------------------------- streams


@pytest.mark.parametrize("method", ["sam", "average sam", "msam"])
def test_runs_as_graphs_on_their_own_streams_are_the_lone_runs(method):
    seeds = range(4)
    expected = []
    for seed in seeds:
        model, opt, step = graphed(method, seed=seed)
        expected.append([train(opt, step, seed=seed), *state(opt, model)])
    runs = [graphed(method, seed=seed) for seed in seeds]
    assert len({step.stream for _, _, step in runs}) == len(runs)
    losses = []
    for number, of_runs in enumerate(zip(*(batches(STEPS, seed) for seed in seeds), strict=True)):
        calls = []
        for (_, opt, step), batch in zip(runs, of_runs, strict=True):
            follow_schedule(opt, number)
            calls.append(partial(step, *batch))
        losses.append(torch.stack(in_parallel(calls, [step.stream for _, _, step in runs])))
    for (model, opt, _), of_run, wanted in zip(runs, torch.stack(losses, 1), expected, strict=True):
        assert_close([of_run, *state(opt, model)], wanted)


@pytest.mark.parametrize("statistics", ["frozen", "update", "eval"])
@pytest.mark.parametrize("num_streams", [0, 1, 2, 4])
@pytest.mark.parametrize("capture", [False, True])
def test_shards_on_streams_are_the_closures_in_turn(num_streams, statistics, capture):
    cut = {"num_shards": NUM_SHARDS, "statistics": statistics}

    def sequential(opt, model, inputs, labels):
        return opt.step(Shards(opt, model, functional.cross_entropy, inputs, labels, **cut, passes="sequential"))

    def parallel(opt, model, inputs, labels, streams):
        shards = ParallelShards(opt, model, functional.cross_entropy, inputs, labels, **cut, streams=streams)
        return opt.step(shards)

    found = []
    for way in (sequential, partial(parallel, streams=[torch.cuda.Stream() for _ in range(num_streams)])):
        model = network().to(memory_format=torch.channels_last)
        opt, _ = make("msam", model, flat=True)
        step = GraphedStep(partial(way, opt, model), opt, next(batches(1)), warmup=3 if capture else STEPS)
        found.append([train(opt, step, 20), *state(opt, model)])
    assert_close(*found)


def test_branches_of_a_capture_join_before_what_follows():
    """A long branch and a short one, then an operation that reads both."""
    _, opt, _ = graphed("sgd")
    streams = [torch.cuda.Stream() for _ in range(2)]
    weights = torch.eye(512, device=DEVICE) * 1.0001

    def long(x):
        for _ in range(200):
            x = x @ weights
        return x

    def step(x):
        return torch.stack(in_parallel([partial(long, x), lambda: x + 1], streams)).sum()

    branched = GraphedStep(step, opt, [weights])
    for scale in (1.0, 2.0, 3.0, 4.0, 5.0, 6.0):
        x = torch.full((512, 512), scale, device=DEVICE)
        torch.testing.assert_close(branched(x), torch.stack([long(x), x + 1]).sum())
