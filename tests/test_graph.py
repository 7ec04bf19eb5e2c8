"""A whole step as a graph, as far as a CPU can show it.

`Taped` stands in for a CUDA graph: it keeps the operations of one step with their arguments and runs them again,
without the Python around them. Numbers and addresses are frozen in it as in a graph. What only a GPU can show (streams,
capture, registered generators) is in `test_graph_cuda.py`.
"""

import copy
import gc
import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import samlib.optim
from samlib import train as training
from samlib.batchnorm import second_pass
from samlib.errors import InputError
from samlib.graph import GraphedStep, ParallelShards, assign, in_parallel, make_static
from samlib.optim import ASAM, SAM, AverageSAM
from samlib.shards import Shards
from samlib.spec import DataSpec, ModelSpec, OptimSpec, RunSpec, TrainSpec
from samlib.train import ClippedSGD

SGD = torch.optim.SGD
STEPS, BATCH, NUM_SHARDS = 50, 8, 4
MOMENTUM = {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-3}
CLIPPED = MOMENTUM | {"clip_norm": 1.0}

# method -> (optimiser, number of shards); the optimiser is made with lr and switches
METHODS = {
    "sgd": (partial(SGD, **MOMENTUM), 1),
    "clipped sgd": (partial(ClippedSGD, **CLIPPED), 1),
    "sam": (partial(SAM, base_optimizer=SGD, rho=0.1, **MOMENTUM), 1),
    "clipped sam": (partial(SAM, base_optimizer=ClippedSGD, rho=0.1, **CLIPPED), 1),
    "asam": (partial(ASAM, base_optimizer=SGD, rho=0.5, **MOMENTUM), 1),
    "sam, p = inf": (partial(SAM, base_optimizer=SGD, rho=0.01, p=math.inf, **MOMENTUM), 1),
    "average sam": (partial(AverageSAM, base_optimizer=SGD, rho=0.2, seed=5, **MOMENTUM), 1),
    "msam": (partial(SAM, base_optimizer=SGD, rho=0.1, **MOMENTUM), NUM_SHARDS),
    "parallel msam": (partial(SAM, base_optimizer=SGD, rho=0.1, **MOMENTUM), NUM_SHARDS),
}
every_method = pytest.mark.parametrize("method", METHODS)


def network(seed=0):
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 9, 3)]
    return nn.Sequential(*layers).double()


def batches(steps, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        inputs = torch.randn(BATCH, 3, 5, 5, generator=generator, dtype=torch.float64)
        yield inputs, torch.randint(3, (BATCH,), generator=generator)


def rate(step):
    return 0.05 * (1 + math.cos(math.pi * step / STEPS))


def radius(step, of):
    return of * (1 + step % 7) / 7


def make(method, model, *, flat=False, set_to_none=False, **settings):
    """The optimiser and the step of a method, for the ordinary loop or a graph."""
    optimizer, num_shards = METHODS[method]
    switches = {} if "sgd" in method else {"flat": flat}
    opt = optimizer(model.parameters(), lr=0.1, **switches, **settings)
    return opt, partial(one_step, method, opt, model, num_shards, set_to_none=set_to_none)


def one_step(method, opt, model, num_shards, inputs, labels, set_to_none=False):
    if method == "parallel msam" and opt.param_groups[0]["fused"]:
        return opt.step(ParallelShards(opt, model, functional.cross_entropy, inputs, labels, num_shards=num_shards))
    closures = [
        partial(loss_and_gradient, opt, model, *part, set_to_none)
        for part in zip(inputs.chunk(num_shards), labels.chunk(num_shards), strict=True)
    ]
    return opt.step(closures if isinstance(opt, SAM) else closures[0])


def loss_and_gradient(opt, model, inputs, labels, set_to_none=False):
    opt.zero_grad(set_to_none)
    with second_pass(model, "frozen" if getattr(opt, "in_second_pass", False) else "update"):
        loss = functional.cross_entropy(model(inputs), labels)
    loss.backward()
    return loss


def follow_schedule(opt, step):
    of = opt.defaults.get("rho", 0.0)
    assign(opt, lr=rate(step), rho=radius(step, of))


def train(opt, step, steps=STEPS):
    """The losses of some steps under a changing lr and rho."""
    losses = []
    for number, (inputs, labels) in enumerate(batches(steps)):
        follow_schedule(opt, number)
        losses.append(step(inputs, labels).detach())
    return torch.stack(losses)


def state(opt, model):
    kept = [value for w in model.parameters() for value in opt.state[w].values()]
    return [*model.state_dict().values(), *kept]


def graphed(method, *, cls=None, warmup=3, **settings):
    """Model, optimiser and graph of a method."""
    model = network()
    opt, step = make(method, model, fused=True, **settings)
    make_static(opt)
    return model, opt, (cls or Taped)(step, opt, next(batches(1)), warmup=warmup)


class Tape(TorchDispatchMode):
    """Keeps the operations that it sees run, and runs them again on the same memory."""

    def __init__(self):
        super().__init__()
        self.operations = []
        self.is_new = True  # unlike a capture, keeping is running

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        if func.namespace == "aten":
            self.operations.append((func, args, kwargs or {}, out))
        return out

    @torch.no_grad()
    def replay(self):
        if self.is_new:
            self.is_new = False
            return
        with torch._C._AutoDispatchBelowAutograd():
            for func, args, kwargs, out in self.operations:
                for kept, made in zip(tensors(out), tensors(func(*args, **kwargs)), strict=True):
                    if kept.data_ptr() != made.data_ptr():  # else a view, or changed in place
                        kept.copy_(made)


class Taped(GraphedStep):
    """A graph on the CPU."""

    _can_capture = True

    def _capture(self):
        with pytest.MonkeyPatch.context() as patch, Tape() as tape:
            patch.setattr(samlib.optim, "_is_recorded", lambda device: True)
            self._loss = self._run()
        return tape


def tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def assert_close(found, expected, tolerance=1e-12):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


# ----------------------------------------------------------------------------------------------------------- equality


@pytest.mark.parametrize("flat", [False, True])
@every_method
def test_a_graph_is_the_ordinary_loop_over_fifty_steps_under_a_changing_lr_and_rho(method, flat):
    """Up to rounding: the fused kernel and a norm that stays on the device round in other places."""
    model = network()
    opt, step = make(method, model)
    expected = train(opt, step)
    taped_model, taped_opt, taped = graphed(method, flat=flat)
    found = train(taped_opt, taped)
    assert isinstance(taped._graph, Tape)
    assert taped.calls == STEPS
    assert_close(found, expected)
    assert_close(state(taped_opt, taped_model), state(opt, model))


@every_method
def test_a_graph_is_the_eager_step_of_the_same_optimiser_bit_for_bit(method):
    model, opt, eager = graphed(method, cls=GraphedStep)
    expected = train(opt, eager, 15)
    taped_model, taped_opt, taped = graphed(method)
    assert eager._graph is None
    assert torch.equal(train(taped_opt, taped, 15), expected)
    assert all(map(torch.equal, state(taped_opt, taped_model), state(opt, model)))


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("method", ["sgd", "sam", "msam"])
def test_gradients_may_be_set_to_none(method, flat):
    model = network()
    opt, step = make(method, model)
    expected = train(opt, step, 10)
    taped_model, taped_opt, taped = graphed(method, flat=flat, set_to_none=True)
    assert_close(train(taped_opt, taped, 10), expected)
    assert_close(state(taped_opt, taped_model), state(opt, model))


@pytest.mark.parametrize("method", ["sgd", "clipped sgd"])
def test_lr_as_a_tensor_is_lr_as_a_number_bit_for_bit(method):
    model, taped_model = network(), network()
    opt, step = make(method, model, fused=True)
    taped_model, taped_opt, taped = graphed(method)
    assert torch.equal(train(taped_opt, taped), train(opt, step))
    assert all(map(torch.equal, state(taped_opt, taped_model), state(opt, model)))


def test_clipping_in_a_graph_is_clip_grad_norm_before_a_plain_step():
    model = network()
    opt = SGD(model.parameters(), lr=0.1, **MOMENTUM)
    norms = []

    def step(inputs, labels):
        loss = loss_and_gradient(opt, model, inputs, labels)
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), CLIPPED["clip_norm"]))
        opt.step()
        return loss

    expected = train(opt, step)
    taped_model, taped_opt, taped = graphed("clipped sgd")
    assert_close(train(taped_opt, taped), expected)
    assert_close(state(taped_opt, taped_model), state(opt, model))
    clipped = sum(norm > CLIPPED["clip_norm"] for norm in norms)
    assert 0 < clipped < STEPS  # so the graph has gone both ways


@pytest.mark.parametrize("static", [False, True])
def test_a_number_freezes_where_a_tensor_does_not(static):
    model = network()
    opt, step = make("sam", model, fused=True)
    if static:
        make_static(opt)
    for batch in batches(3):
        step(*batch)
    with Tape() as tape:
        step(*batch)
    tape.is_new = False
    assign(opt, lr=0.0)
    before = [w.detach().clone() for w in model.parameters()]
    tape.replay()
    assert all(map(torch.equal, model.parameters(), before)) == static


def test_phases_with_and_without_ascent_are_two_graphs_of_one_optimiser():
    model = network()
    opt, step = make("sam", model)
    taped_model, taped_opt, ascending = graphed("sam", flat=True)
    rho = taped_opt.param_groups[0]["rho"]
    taped_opt.param_groups[0]["rho"] = 0.0
    plain = Taped(ascending.step, taped_opt, next(batches(1)))
    for number, batch in enumerate(batches(30)):
        ascent = 5 <= number < 15 or number >= 22
        opt.param_groups[0]["rho"] = 0.1 if ascent else 0.0
        taped_opt.param_groups[0]["rho"] = rho if ascent else 0.0
        assign(opt, lr=rate(number))
        assign(taped_opt, lr=rate(number))
        assert_close((ascending if ascent else plain)(*batch), step(*batch).detach())
    assert isinstance(ascending._graph, Tape)
    assert isinstance(plain._graph, Tape)
    assert_close(state(taped_opt, taped_model), state(opt, model))


@pytest.mark.parametrize("flat", [False, True])
def test_a_step_that_is_not_finite_leaves_the_weights_and_is_counted(flat):
    model, opt, taped = graphed("sam", flat=flat)
    good = list(batches(6))
    for batch in good[:5]:
        taped(*batch)

    def trained():
        return [*model.parameters(), *(opt.state[w]["momentum_buffer"] for w in model.parameters())]

    before = [tensor.detach().clone() for tensor in trained()]
    taped(torch.full_like(good[5][0], math.nan), good[5][1])
    assert opt.skipped_steps == 1
    assert all(map(torch.equal, trained(), before))
    taped(*good[5])
    assert opt.skipped_steps == 1
    assert not any(map(torch.equal, trained(), before))
    assert all(tensor.isfinite().all() for tensor in trained())


@pytest.mark.parametrize("flat", [False, True])
def test_while_all_steps_were_skipped_there_is_no_momentum_and_no_capture(flat):
    model, opt, taped = graphed("sam", flat=flat)
    plain_model = network()
    _, step = make("sam", plain_model, fused=True, flat=flat)
    bad, *good = batches(6)
    for _ in range(5):
        taped(torch.full_like(bad[0], math.nan), bad[1])
    assert (opt.skipped_steps, taped._graph) == (5, None)
    for batch in good:
        taped(*batch)
        step(*batch)
    assert isinstance(taped._graph, Tape)
    assert_close(list(model.parameters()), list(plain_model.parameters()))


# ----------------------------------------------------------------------------------------------- a step that is static


# What waits for the device; lift_fresh is a tensor made from numbers of the host, which have to be copied there.
WAITING = {"_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "allclose", "masked_select", "lift_fresh"}


class Watch(TorchDispatchMode):
    """Takes note of operations that wait."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found |= {func.overloadpacket.__name__} & WAITING
        return func(*args, **kwargs or {})


def recorded(monkeypatch):
    monkeypatch.setattr(samlib.optim, "_is_recorded", lambda device: True)


@pytest.mark.parametrize("flat", [False, True])
@every_method
def test_no_operation_of_a_step_waits(method, flat, monkeypatch):
    _, opt, eager = graphed(method, cls=GraphedStep, flat=flat)
    batch, *rest = batches(4)
    for one in rest:
        eager(*one)
    recorded(monkeypatch)
    with Watch() as watch:
        follow_schedule(opt, 5)
        eager(*batch)
    assert watch.found == set()


def test_the_ordinary_step_and_vectorised_shards_would_be_seen_to_wait(monkeypatch):
    model = network()
    opt, step = make("sam", model)
    batch = next(batches(1))
    with Watch() as watch:
        step(*batch)
    assert "_local_scalar_dense" in watch.found
    recorded(monkeypatch)
    with Watch() as watch:
        opt.step(Shards(opt, model, functional.cross_entropy, *batch, num_shards=4, passes="vmap"))
    assert watch.found == {"lift_fresh"}


class Devices(TorchDispatchMode):
    """The devices that each operation's tensors are on. Stands in for the fused kernel, which fake tensors lack."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = None if "fused" in func.name() else func(*args, **kwargs or {})
        self.found.add(frozenset(tensor.device.type for tensor in tensors((args, kwargs, out))))
        return out


@every_method
def test_on_fake_gpu_tensors_nothing_moves_between_host_and_device(method, monkeypatch):
    """All of a step but the model: the ascents, the restores, the clipping, the update."""
    optimizer, num_shards = METHODS[method]
    recorded(monkeypatch)
    with FakeTensorMode():
        params = [nn.Parameter(torch.empty(shape, device="cuda")) for shape in ((4, 3), (5,), (2, 2, 2))]
        opt = optimizer(params, lr=0.1, fused=True)
        opt._generator = torch.Generator()  # for average SAM: there is none for a GPU without one
        for group in opt.param_groups:
            group.update({name: torch.empty((), device="cuda") for name in ("lr", "rho") if name in group})

        def closure():
            for w in params:
                w.grad = torch.ones_like(w)
            return torch.ones((), device="cuda")

        with Devices() as devices:
            opt.step([closure] * num_shards if isinstance(opt, SAM) else closure)
            devices.found.clear()  # of the first step, which puts a few constants there
            assign(opt, lr=0.05, rho=0.3)
            opt.step([closure] * num_shards if isinstance(opt, SAM) else closure)
    assert devices.found - {frozenset()} == {frozenset({"cuda"})}


@pytest.mark.parametrize("flat", [False, True])
@every_method
def test_addresses_are_constant(method, flat):
    model, opt, eager = graphed(method, cls=GraphedStep, flat=flat)

    def addresses():
        grads = [w.grad for w in model.parameters()] if flat else []  # else new in each pass: in a capture, the graph's
        kept = [*model.parameters(), *state(opt, model), *grads, *eager.inputs, *getattr(opt, "_copies", [])]
        return [tensor.data_ptr() for tensor in kept + [opt.param_groups[0]["lr"]]]

    seen = []
    for number, batch in enumerate(batches(10)):
        follow_schedule(opt, number)
        eager(*batch)
        seen.append(addresses())
    assert all(one == seen[0] for one in seen)


class Outside(TorchDispatchMode):
    """Takes note of the memory that was there before and that the operations use."""

    def __init__(self):
        super().__init__()
        self.before, self.made = {}, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for storage in (tensor.untyped_storage() for tensor in tensors((args, kwargs))):
            if storage._cdata not in self.made:
                self.before[storage._cdata] = StorageWeakRef(storage)
        out = func(*args, **kwargs or {})
        self.made |= {tensor.untyped_storage()._cdata for tensor in tensors(out)} - self.before.keys()
        return out


class Capturing(GraphedStep):
    _can_capture = True

    def _capture(self):
        with pytest.MonkeyPatch.context() as patch, Outside() as self.outside:
            recorded(patch)
            self._loss = self._run()
        return Tape()


@pytest.mark.parametrize("set_to_none", [False, True])
@pytest.mark.parametrize("flat", [False, True])
@every_method
def test_no_memory_that_a_graph_uses_is_freed(method, flat, set_to_none):
    """A graph goes on writing to it. Here eager steps come after the capture: of half a batch, and on a part of the
    weights, for which `flat` gives its buffers up and the copies at w are made anew."""
    model, opt, graph = graphed(method, cls=Capturing, flat=flat, set_to_none=set_to_none)
    for batch in batches(4):
        graph(*batch)
    graph.step(*(tensor[: BATCH // 2] for tensor in batch))
    opt.zero_grad()

    def closure():
        opt.zero_grad()
        loss = model[-1].weight.square().sum()
        loss.backward()
        return loss

    opt.step(closure)
    opt.zero_grad()
    kept = graph.outside.before.values()
    assert len(kept) > len(opt.param_groups[0]["params"]) + len(graph.inputs)
    assert not any(storage.expired() for storage in kept)


@every_method
def test_nothing_grows(method):
    _, _, eager = graphed(method, cls=GraphedStep, flat=True)

    def train_and_count(steps):
        for batch in batches(steps):
            eager(*batch)
        gc.collect()
        return sum(issubclass(type(one), Tensor) for one in gc.get_objects())

    gc.freeze()  # what was there before is not looked at
    try:
        assert train_and_count(4) == train_and_count(12) > 0
    finally:
        gc.unfreeze()


# ------------------------------------------------------------------------------------------------------------ the class


def test_warm_up_steps_and_the_capture_are_steps():
    numbers = []
    _, _, taped = graphed("sgd", warmup=2)
    taped.step, step = lambda *inputs: numbers.append(taped.calls) or step(*inputs), taped.step
    for batch in batches(6):
        taped(*batch)
    assert numbers == [0, 1, 2]  # the third is recorded, and played from then on
    assert taped.calls == 6


@pytest.mark.parametrize("method", ["sgd", "sam"])
def test_the_loss_is_not_overwritten_and_has_no_graph(method):
    _, _, taped = graphed(method)
    losses = [taped(*batch) for batch in batches(8)]
    assert len({loss.item() for loss in losses}) == 8
    assert not any(loss.requires_grad for loss in losses)


def test_inputs_may_be_written_in_place():
    _, _, taped = graphed("sam")
    _, _, other = graphed("sam")
    for inputs, labels in batches(6):
        other.inputs[0].copy_(inputs)
        assert torch.equal(taped(inputs, labels), other(other.inputs[0], labels))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x, y: (x[:1], y), r"inputs\[0\] is torch.float64 of shape \(1, 3, 5, 5\)"),
        (lambda x, y: (x, y[:1]), r"inputs\[1\] is torch.int64 of shape \(1,\)"),
        (lambda x, y: (x.float(), y), r"inputs\[0\] is torch.float32"),
        (lambda x, y: (x,), "inputs holds 1 tensors: the step was made for 2"),
    ],
)
def test_inputs_of_another_kind_are_refused(change, message):
    _, _, taped = graphed("sgd")
    batch = next(batches(1))
    with pytest.raises(InputError, match=message):
        taped(*change(*batch))


def test_a_graph_needs_a_warm_up():
    with pytest.raises(InputError, match="warmup = 1"):
        graphed("sgd", warmup=1)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({}, "fused is not set"),
        ({"fused": True, "second_order": True}, "second_order = True"),
        ({"fused": True, "ascent_every": 2}, "ascent_every = 2"),
        ({"fused": True, "base_optimizer": torch.optim.Adam}, "capturable is not set"),
    ],
)
def test_an_optimiser_that_cannot_be_captured_is_refused(settings, message):
    opt = SAM(network().parameters(), **{"base_optimizer": SGD, "lr": 0.1, **settings})
    for refuse in (make_static, lambda opt: GraphedStep(lambda: None, opt, [])):
        with pytest.raises(InputError, match=message):
            refuse(opt)


@pytest.mark.parametrize("name", ["lr", "rho"])
def test_a_setting_that_would_freeze_is_refused(name):
    opt = SAM(network().parameters(), SGD, lr=0.1, fused=True)
    make_static(opt)
    opt.param_groups[0][name] = 0.1
    with pytest.raises(InputError, match=f"{name} = 0.1 would be frozen"):
        GraphedStep(lambda: None, opt, [])


def set_group(name, value):
    return lambda opt, model: opt.param_groups[0].update({name: value})


def load_state(opt, model):
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    make_static(opt)


def move_weights(opt, model):
    model[0].weight.data = model[0].weight.data.clone()


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize(
    "change, message",
    [
        (set_group("lr", 0.05), "^lr of the optimizer"),
        (set_group("lr", torch.tensor(0.05, dtype=torch.float64)), "^lr of"),
        (set_group("rho", 0.0), "^rho of"),
        (set_group("momentum", 0.8), "^momentum of"),
        (set_group("initial_lr", 0.8), "^initial_lr of"),
        (load_state, "of the optimizer"),
        (move_weights, "^a weight of"),
        (lambda opt, model: model[-1].bias.requires_grad_(False), "^requires_grad of"),
        (lambda opt, model: opt.state.clear(), "^the state of"),
        (lambda opt, model: opt.add_param_group({"params": [nn.Parameter(torch.ones(2))]}), "^a weight of"),
    ],
)
def test_what_the_graph_would_ignore_is_refused(change, message, flat):
    model, opt, taped = graphed("sam", flat=flat)
    batch = next(batches(1))
    for _ in range(5):
        taped(*batch)
    change(opt, model)
    with pytest.raises(InputError, match=message):
        taped(*batch)


def test_after_loading_a_state_another_graph_goes_on():
    model, opt, taped = graphed("sam", flat=True)
    expected = train(opt, taped, 20)
    again, opt_again, first = graphed("sam", flat=True)
    losses = []
    for number, batch in enumerate(batches(20)):
        if number == 9:
            kept = copy.deepcopy((again.state_dict(), opt_again.state_dict()))
            again, opt_again, first = graphed("sam", flat=True)
            again.load_state_dict(kept[0])
            opt_again.load_state_dict(kept[1])
            make_static(opt_again)
        follow_schedule(opt_again, number)
        losses.append(first(*batch))
    assert torch.equal(torch.stack(losses), expected)
    assert all(map(torch.equal, state(opt_again, again), state(opt, model)))


def test_adamw_with_its_counts_on_the_device():
    found = []
    for cls in (GraphedStep, Taped):
        model = network()
        adamw = partial(torch.optim.AdamW, weight_decay=0.1, fused=True, capturable=True)
        opt = SAM(model.parameters(), adamw, rho=0.1, lr=0.01, flat=True)
        make_static(opt)
        losses = train(opt, cls(partial(one_step, "sam", opt, model, 1), opt, next(batches(1))), 20)
        found.append([losses, *state(opt, model)])
    assert_close(*found, tolerance=0)


# ---------------------------------------------------------------------------------------------------------- settings


def test_settings_become_tensors_where_the_weights_are():
    model = network().float()
    opt = SAM(model.parameters(), SGD, lr=0.1, rho=0.3, fused=True)
    opt.add_param_group({"params": [nn.Parameter(torch.ones(2))], "rho": 0.0})
    make_static(opt)
    first, second = opt.param_groups
    assert (first["lr"].dtype, first["lr"].item()) == (torch.float64, 0.1)
    assert (first["rho"].dtype, first["rho"].item()) == (torch.float32, pytest.approx(0.3))
    assert (type(second["rho"]), second["rho"]) == (float, 0.0)
    before = [id(group[name]) for group in opt.param_groups for name in ("lr", "rho")]
    make_static(opt)
    assert [id(group[name]) for group in opt.param_groups for name in ("lr", "rho")] == before


def test_assign_changes_tensors_in_place_and_numbers_otherwise():
    opt = SAM(network().parameters(), SGD, lr=0.1, rho=0.3, fused=True)
    assign(opt, lr=0.2)
    assert opt.param_groups[0]["lr"] == 0.2
    make_static(opt)
    lr = opt.param_groups[0]["lr"]
    assign(opt, lr=0.05, rho=0.7)
    assert opt.param_groups[0]["lr"] is lr
    assert lr.item() == 0.05
    assert opt.param_groups[0]["rho"].item() == 0.7
    sgd = SGD(network().parameters(), lr=0.1)
    assign(sgd, lr=0.2, rho=0.7)
    assert sgd.param_groups[0]["lr"] == 0.2
    assert "rho" not in sgd.param_groups[0]


def test_a_scheduler_of_torch_changes_the_tensor_in_place():
    model, opt, taped = graphed("sgd")
    plain_model = network()
    plain, step = make("sgd", plain_model, fused=True)
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(one, 20) for one in (opt, plain)]
    for batch in batches(20):
        assert torch.equal(taped(*batch), step(*batch).detach())
        for schedule in schedules:
            schedule.step()
    assert_close(state(opt, model), state(plain, plain_model))


# -------------------------------------------------------------------------------------------------------- side by side


def test_without_streams_calls_run_in_turn():
    order = []
    calls = [partial(lambda index: order.append(index) or 10 * index, index) for index in range(4)]
    assert in_parallel(calls) == [0, 10, 20, 30]
    assert in_parallel(calls, [None, None]) == [0, 10, 20, 30]
    assert order == [0, 1, 2, 3, 0, 1, 2, 3]
    assert in_parallel([]) == []


@pytest.mark.parametrize("statistics", ["frozen", "update", "eval"])
@pytest.mark.parametrize("cls", [SAM, ASAM])
def test_parallel_shards_are_the_closures_in_turn(cls, statistics):
    found = []
    for parallel in (False, True):
        model = network()
        opt = cls(model.parameters(), SGD, rho=0.1, lr=0.1, momentum=0.9)
        cut = {"num_shards": NUM_SHARDS, "statistics": statistics}
        losses = [
            opt.step(
                ParallelShards(opt, model, functional.cross_entropy, *batch, **cut)
                if parallel
                else Shards(opt, model, functional.cross_entropy, *batch, **cut, passes="sequential")
            )
            for batch in batches(10)
        ]
        found.append([torch.stack(losses), *state(opt, model)])
    assert_close(*found)


def test_parallel_shards_leave_out_what_the_loss_does_not_reach():
    model = network()
    model.spare = nn.Parameter(torch.ones(2, dtype=torch.float64))
    model.forward = lambda x: nn.Sequential(*list(model.children()))(x)
    opt = SAM(model.parameters(), SGD, rho=0.1, lr=0.1)
    opt.step(ParallelShards(opt, model, functional.cross_entropy, *next(batches(1)), num_shards=2))
    assert model.spare.grad is None
    assert torch.equal(model.spare, torch.ones_like(model.spare))


def test_shards_of_different_sizes_are_refused():
    model = network()
    opt = SAM(model.parameters(), SGD, lr=0.1)
    with pytest.raises(InputError, match="the shards have the sizes"):
        ParallelShards(opt, model, functional.cross_entropy, *next(batches(1)), num_shards=3)


@pytest.mark.parametrize("cut", [partial(Shards, passes="vmap"), ParallelShards])
def test_a_fused_update_of_channels_last_weights_gets_gradients_of_their_strides(cut):
    """The fused kernel pairs weights and gradients by memory: other strides are other weights' gradients."""
    found = []
    for fused in (False, True):
        model = network().to(memory_format=torch.channels_last)
        opt = SAM(model.parameters(), SGD, rho=0.1, lr=0.1, momentum=0.9, fused=fused)
        for batch in batches(3):
            opt.step(cut(opt, model, functional.cross_entropy, *batch, num_shards=NUM_SHARDS))
        found.append(state(opt, model))
        assert all(w.grad.stride() == w.stride() for w in model.parameters())
    assert_close(*found)


def test_the_generator_of_average_sam_is_the_one_it_draws_from():
    opt = AverageSAM(network().parameters(), SGD, lr=0.1, seed=3)
    same = torch.Generator().manual_seed(3)
    assert torch.equal(opt.generator.get_state(), same.get_state())
    eps = opt.perturbation()
    opt.generator.manual_seed(4)
    assert not torch.equal(opt.perturbation()[0], eps[0])


# ------------------------------------------------------------------------------------------- the step of samlib.train


class Examined(Taped):
    """A tape that looks at what it keeps."""

    def _capture(self):
        with Watch() as self.watch, Outside() as self.outside:
            return super()._capture()


OPTIMS = {
    "sgd": OptimSpec("sgd", clip="descent", clip_norm=0.5),
    "sam": OptimSpec("sam", clip="both", clip_norm=0.5),
    "msam": OptimSpec("sam", num_shards=4, shard_batchnorm="batch"),
    "average sam": OptimSpec("average_sam"),
}


@pytest.mark.parametrize("optim", OPTIMS.values(), ids=OPTIMS)
def test_the_step_of_a_training_is_one_that_a_graph_can_keep(optim, monkeypatch):
    """With eager steps of a smaller last batch and evaluations between the replays."""
    settings = TrainSpec(
        epochs=3, batch_size=16, drop_last=False, logged_loss="w" if optim.method == "sgd" else "w+eps"
    )
    spec = RunSpec(DataSpec(train_size=100), ModelSpec(width=4), optim, settings)
    found = []
    for cls in (GraphedStep, Examined):
        monkeypatch.setattr(training, "GraphedStep", cls)
        run = training.Training.start(spec, torch.device("cpu"), graph=True)
        run.go_on(lambda: None)
        found.append([torch.tensor(run.record().history["running_loss"]), *run.model.state_dict().values()])
    assert run.graphed.calls == 18
    assert run.graphed.watch.found == set()
    assert not any(storage.expired() for storage in run.graphed.outside.before.values())
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-5)
