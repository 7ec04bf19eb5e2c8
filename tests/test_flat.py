"""Flat buffers, and what the speed of both backends rests on: number of operations, memory, addresses, no waiting."""

import copy
import io
from itertools import accumulate

import pytest
import torch
from torch import nn
from torch.torch_version import TorchVersion
from torch.utils._python_dispatch import TorchDispatchMode

import samlib.optim
from samlib.errors import InputError
from samlib.flat import ALIGNMENT, Addresses
from samlib.optim import ASAM, SAM, AverageSAM

# Dynamo of torch 2.11 cannot trace the attributes of an optimiser; 2.15 can. Those between were not tried.
compiles = pytest.mark.skipif(TorchVersion(torch.__version__) < (2, 15), reason="compiling a step needs torch 2.15")

SGD, AdamW = torch.optim.SGD, torch.optim.AdamW
METHODS = {
    "SAM": (SAM, {}),
    "p = inf": (SAM, {"p": float("inf")}),
    "unnormalised": (SAM, {"normalize": False}),
    "norm_eps": (SAM, {"norm_eps": 0.1}),
    "some tensors": (SAM, {"perturb_filter": lambda w: w.ndim > 1}),
    "ASAM": (ASAM, {}),
    "ASAM of weights": (ASAM, {"scale_filter": lambda w: w.ndim > 1}),
    "average SAM": (AverageSAM, {"seed": 3}),
}
BASES = {
    "SGD": (SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True}),
    "fused SGD": (SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "fused": True}),
    "AdamW": (AdamW, {"lr": 0.01}),
    "fused Adam": (torch.optim.Adam, {"lr": 0.01, "fused": True, "amsgrad": True}),
    "RMSprop": (torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.9, "centered": True}),
    "not elementwise": (torch.optim.Adafactor, {"lr": 0.01}),
}


def network(depth=2, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    layers = [layer for _ in range(depth) for layer in (nn.Linear(5, 5), nn.Tanh())]
    return nn.Sequential(*layers, nn.Conv1d(5, 3, 1), nn.Flatten(0)).to(dtype)


def closure_of(opt, model, seed=0, set_to_none=True):
    w = next(model.parameters())
    inputs = torch.randn(5, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(w)

    def closure():
        opt.zero_grad(set_to_none)
        loss = (model(inputs) - 1).square().mean()
        loss.backward()
        return loss

    return closure


def train(opt, model, steps, first=0, **options):
    for step in range(first, first + steps):
        closure = closure_of(opt, model, step, **options)
        opt.step([closure, closure_of(opt, model, step + 100, **options)] if step % 3 == 2 else closure)


def close(found, expected, tolerance=1e-12):
    torch.testing.assert_close(list(found), list(expected), rtol=tolerance, atol=tolerance)


def is_flat(opt):
    return opt.flat and opt._layout.buffers is not None


# ----------------------------------------------------------------------------------------------------- the same numbers


@pytest.mark.parametrize("base, base_settings", BASES.values(), ids=BASES)
@pytest.mark.parametrize("cls, settings", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("set_to_none", [True, False])
def test_flat_buffers_change_no_number(cls, settings, base, base_settings, set_to_none):
    models = [network(), network()]
    for model, flat in zip(models, (False, True), strict=True):
        opt = cls(model.parameters(), base, flat=flat, **settings, **base_settings)
        train(opt, model, 7, set_to_none=set_to_none)
        assert is_flat(opt) == flat
    close(models[1].parameters(), models[0].parameters())


def test_groups_have_their_own_buckets_radius_and_learning_rate():
    models = [network(), network()]
    for model, flat in zip(models, (False, True), strict=True):
        weights = [w for w in model.parameters() if w.ndim > 1]
        others = [w for w in model.parameters() if w.ndim == 1]
        groups = [{"params": weights, "rho": 0.3}, {"params": others, "rho": 0.0, "lr": 0.5, "weight_decay": 0.1}]
        opt = SAM(groups, SGD, lr=0.1, momentum=0.9, flat=flat)
        schedule = torch.optim.lr_scheduler.ExponentialLR(opt, 0.9)
        for step in range(5):
            train(opt, model, 1, step)
            schedule.step()
    assert len(opt._layout.buffers.buckets) == 2
    close(models[1].parameters(), models[0].parameters())


def test_tensors_of_two_dtypes_and_memory_formats():
    models = []
    for flat in (False, True):
        model = network()
        model[0].to(torch.float32)
        model[1].register_forward_hook(lambda _, __, out: out.double())
        model[0].register_forward_pre_hook(lambda _, inputs: inputs[0].float())
        conv = model[-2]
        conv.weight.data = torch.empty(5, 3, 1, dtype=torch.float64).transpose(0, 1).copy_(conv.weight)
        assert not conv.weight.is_contiguous()
        opt = SAM(model.parameters(), SGD, lr=0.1, momentum=0.9, rho=0.5, flat=flat)
        closure = closure_of(opt, model)
        for _ in range(4):
            opt.step(closure)
        assert not conv.weight.is_contiguous()
        assert is_flat(opt) == flat
        models.append(model)
    close(models[1].parameters(), models[0].parameters(), 1e-6)


# ------------------------------------------------------------------------------------ operations, addresses and memory

NO_WORK = {"detach", "view", "as_strided", "alias", "_record_function_enter_new", "_record_function_exit"}


class Operations(TorchDispatchMode):
    """Names of the operations that do work, outside the closures."""

    def __init__(self):
        super().__init__()
        self.names, self.paused = [], False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if not self.paused and name not in NO_WORK:
            self.names.append(name)
        return func(*args, **(kwargs or {}))

    def outside(self, closure):
        def quiet():
            self.paused = True
            try:
                return closure()
            finally:
                self.paused = False

        return quiet


@pytest.fixture
def recorded(monkeypatch):
    """As within the capture of a CUDA graph, where the step must not read."""
    monkeypatch.setattr(samlib.optim, "_is_recorded", lambda device: True)


def operations(depth, flat, **settings):
    model = network(depth, torch.float32)
    opt = SAM(model.parameters(), SGD, lr=0.1, momentum=0.9, fused=True, flat=flat, **settings)
    for step in range(3):
        opt.step(closure_of(opt, model, step))
    closure = closure_of(opt, model)
    with Operations() as found:
        opt.step(found.outside(closure))
    return found.names


@pytest.mark.parametrize("depth", [1, 100])
def test_a_flat_step_is_at_most_twelve_operations_however_many_tensors(recorded, depth):
    names = operations(depth, flat=True)
    assert len(names) <= 12, names


def test_single_tensors_take_as_many_calls_however_many_there_are(recorded):
    assert len(operations(2, flat=False)) == len(operations(50, flat=False))


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("cls", [SAM, ASAM, AverageSAM])
@pytest.mark.parametrize("shards", [1, 3])
def test_a_recorded_step_reads_nothing_from_the_device(recorded, flat, cls, shards):
    model = network(dtype=torch.float32)
    opt = cls(model.parameters(), SGD, lr=0.1, momentum=0.9, fused=True, flat=flat)
    opt.step([closure_of(opt, model)] * shards)
    with Operations() as found:
        opt.step([closure_of(opt, model)] * shards)
    assert len(found.names) > 20  # the passes are counted here, too
    assert not {"_local_scalar_dense", "equal", "nonzero", "is_nonzero", "item"} & set(found.names)


@pytest.mark.parametrize("bad_pass", [0, 1])
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("base", [SGD, AdamW])
def test_a_fused_base_optimiser_skips_without_a_read(monkeypatch, flat, bad_pass, base):
    model, passes = network(dtype=torch.float32), []
    opt = SAM(model.parameters(), base, lr=0.1, fused=True, flat=flat)
    opt.step(closure_of(opt, model))
    monkeypatch.setattr(samlib.optim, "_is_recorded", lambda device: True)
    before = copy.deepcopy(list(model.parameters()))
    state = copy.deepcopy([opt.state[w] for w in model.parameters()])
    good = closure_of(opt, model)

    def closure():
        loss = good()
        if len(passes) == bad_pass:
            next(model.parameters()).grad[0] = float("nan")
        passes.append(loss)
        return loss

    opt.step(closure)
    assert len(passes) == 2
    assert opt.skipped_steps == 1
    assert all(map(torch.equal, model.parameters(), before))
    for w, old in zip(model.parameters(), state, strict=True):
        assert all(torch.equal(opt.state[w][name], value) for name, value in old.items())
    opt.step(good)
    assert opt.skipped_steps == 1
    assert not any(map(torch.equal, model.parameters(), before))
    assert opt.state_dict()["sam"] == {"steps": 3, "skipped_steps": 1}


def test_a_base_optimiser_that_cannot_skip_shows_it_in_the_count(recorded):
    model = network()
    opt = SAM(model.parameters(), SGD, lr=0.1)

    def closure():
        loss = closure_of(opt, model)()
        next(model.parameters()).grad[0] = float("nan")
        return loss

    opt.step(closure)
    assert opt.skipped_steps == 1
    assert not all(torch.isfinite(w).all() for w in model.parameters())


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("recording", [False, True])
def test_rho_and_lr_may_be_tensors_that_change(monkeypatch, flat, recording):
    models = [network(dtype=torch.float32), network(dtype=torch.float32)]
    plain = SAM(models[0].parameters(), SGD, rho=0.1, lr=0.1, momentum=0.9, fused=True, flat=flat)
    rho, lr = torch.tensor(0.1), torch.tensor(0.1)
    device = SAM(models[1].parameters(), SGD, rho=rho, lr=lr, momentum=0.9, fused=True, flat=flat)
    for step in range(6):
        if step == 1:
            monkeypatch.setattr(samlib.optim, "_is_recorded", lambda device: recording)
        plain.param_groups[0].update(rho=0.1 + step, lr=0.1 / (1 + step))
        rho.fill_(0.1 + step)
        lr.fill_(0.1 / (1 + step))
        for opt, model in zip((plain, device), models, strict=True):
            opt.step(closure_of(opt, model, step))
    assert device.param_groups[0]["rho"] is rho
    close(models[1].parameters(), models[0].parameters(), 1e-6)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_weights_momentum_and_copies_stay_where_they_are(flat, set_to_none):
    model = network()
    opt = SAM(model.parameters(), SGD, lr=0.1, momentum=0.9, fused=True, flat=flat)
    seen = []
    for step in range(4):
        closure = closure_of(opt, model, step, set_to_none)

        def look(closure=closure):
            copies = [at_w.data_ptr() for at_w in opt.unperturbed().values()]
            if copies:
                momentum = [opt.state[w].get("momentum_buffer", w).data_ptr() for w in opt.state]
                bound = flat and not set_to_none
                grads = [w.grad.data_ptr() for w in model.parameters()] if bound else []
                seen.append((copies, momentum, grads, [w.data_ptr() for w in model.parameters()]))
            return closure()

        opt.step(look)
    assert seen[1] == seen[2] == seen[3]


def test_views_are_aligned_and_hold_the_weights():
    model = network()
    opt = SAM(model.parameters(), SGD, lr=0.1, flat=True)
    train(opt, model, 1)
    [bucket] = opt._layout.buffers.buckets
    start = bucket.flat.data_ptr()
    assert all((w.data_ptr() - start) % ALIGNMENT == 0 for w in model.parameters())
    assert bucket.flat.numel() == sum(-(-w.nbytes // ALIGNMENT) * ALIGNMENT // w.itemsize for w in model.parameters())
    assert bucket.flat.sum().item() == pytest.approx(sum(w.sum().item() for w in model.parameters()))


def peak_bytes(opt, grads, shards):
    """Of new memory during the bookkeeping of a step, with gradients that were there before."""
    params = [w for group in opt.param_groups for w in group["params"]]

    def closure():
        for w, grad in zip(params, grads, strict=True):
            w.grad = grad
        return 0.0

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        opt.step([closure] * shards)
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate((event.nbytes() for event in events), initial=0))


# In units of the weights, beyond the copy that stays: nothing for SAM, T for ASAM, the mean gradient for shards.
MEMORY = {
    "SAM": (SAM, {}, 1, 0),
    "unnormalised": (SAM, {"normalize": False}, 1, 0),
    "ASAM": (ASAM, {}, 1, 1),
    "mSAM": (SAM, {}, 4, 1),
}


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("cls, settings, shards, units", MEMORY.values(), ids=MEMORY)
def test_extra_memory_is_one_copy_of_the_weights(cls, settings, shards, units, flat):
    params = [nn.Parameter(torch.randn(64, 64)) for _ in range(16)]
    grads = [torch.randn_like(w) for w in params]
    size = sum(w.nbytes for w in params)
    opt = cls(params, SGD, lr=0.0, flat=flat, **settings)
    kept = [1, 2][flat]  # the copy at w; flat: and the gathered gradients (the weights have only moved)
    if not flat:
        first = peak_bytes(opt, [grad.clone() for grad in grads], shards)
        assert size <= first <= (kept + units) * size + 50_000
    else:
        opt.step([lambda: [setattr(w, "grad", g.clone()) for w, g in zip(params, grads, strict=True)] and 0.0] * shards)
    later = peak_bytes(opt, [grad.clone() for grad in grads], shards)
    assert later <= units * size + 50_000
    assert sum(copied.nbytes for copied in opt._copies) == size


# ------------------------------------------------------------------------------------ what is not flat, and what comes


def overlapping(tensor):
    return tensor[:3], tensor[1:]


def odd_ones():
    base = torch.ones(4, 4, dtype=torch.float64)
    return {
        "without axes": lambda: [nn.Parameter(torch.tensor(1.0, dtype=torch.float64))],
        "with gaps": lambda: [nn.Parameter(base.clone()[:, ::2])],
        "frozen": lambda: [nn.Parameter(base.clone(), requires_grad=False)],
        "empty": lambda: [nn.Parameter(base[:0].clone())],
        "tied in memory": lambda: [nn.Parameter(part) for part in overlapping(base.clone())],
    }


@pytest.mark.parametrize("odd", odd_ones().values(), ids=odd_ones())
@pytest.mark.parametrize("base", [SGD, AdamW])
def test_parameters_that_do_not_fit_stay_by_themselves(odd, base):
    ends = []
    for flat in (False, True):
        params = [nn.Parameter(torch.ones(3, dtype=torch.float64)), *odd()]
        opt = SAM(params, base, lr=0.1, rho=0.3, flat=flat)

        def closure(opt=opt, params=params):
            opt.zero_grad()
            loss = sum(((w + 1) ** 2).sum() for w in params)
            loss.backward()
            return loss

        for _ in range(3):
            opt.step(closure)
        addresses = [w.data_ptr() for w in params]
        assert is_flat(opt) == flat
        ends.append(params)
        state = opt.state_dict()["state"]
        assert set(state) <= set(range(len(params)))
        assert all(len(addresses) == len(set(addresses)) for _ in [0])
    close(ends[1], ends[0])


@pytest.mark.parametrize("base", [SGD, AdamW])
@pytest.mark.parametrize("bad_pass", [2, 3, 5])
def test_a_pass_that_does_not_reach_all_tensors_ends_the_buffers_and_changes_no_number(base, bad_pass):
    ends = []
    for flat in (False, True):
        model, passes = network(), []
        settings = {"momentum": 0.9, "weight_decay": 0.1} if base is SGD else {}
        opt = SAM(model.parameters(), base, lr=0.1, flat=flat, **settings)

        def closure(opt=opt, model=model, passes=passes):
            loss = closure_of(opt, model)()
            if len(passes) == bad_pass:
                model[0].bias.grad = None
            passes.append(loss)
            return loss

        for step in range(4):
            opt.step([closure] * (1 + step % 2))
            assert opt.flat == (flat and len(passes) <= bad_pass)
        ends.append([*model.parameters(), *(value for one in opt.state.values() for value in one.values())])
    close(ends[1], ends[0])


def test_a_sparse_gradient_is_still_refused():
    table = nn.Embedding(5, 2, sparse=True)
    opt = SAM(table.parameters(), SGD, lr=0.1, flat=True)

    def closure():
        opt.zero_grad()
        loss = table(torch.tensor([0, 1])).sum()
        loss.backward()
        return loss

    with pytest.raises(InputError, match="sparse"):
        opt.step(closure)


def test_a_model_that_is_converted_in_mid_training_goes_on():
    ends = []
    for flat in (False, True):
        model = network(dtype=torch.float32)
        opt = SAM(model.parameters(), SGD, lr=0.1, flat=flat)
        train(opt, model, 3)
        model.double()
        train(opt, model, 3, first=3)
        assert is_flat(opt) == flat
        ends.append(model)
    assert all(w.dtype == torch.float64 for w in ends[1].parameters())
    close(ends[1].parameters(), ends[0].parameters(), 1e-6)


def test_weights_loaded_into_the_model_are_what_is_trained():
    model, other = network(), network(seed=5)
    opt = SAM(model.parameters(), SGD, lr=0.0, flat=True)
    train(opt, model, 1)
    model.load_state_dict(other.state_dict())
    train(opt, model, 1)
    assert all(map(torch.equal, model.parameters(), other.parameters()))


@pytest.mark.parametrize("base", [SGD, AdamW])
def test_a_group_added_in_mid_training_and_a_frozen_layer(base):
    ends = []
    for flat in (False, True):
        model = network()
        first, *rest = model.parameters()
        opt = SAM([first], base, lr=0.1, flat=flat)
        train(opt, model, 2)
        opt.add_param_group({"params": rest, "rho": 0.3, "lr": 0.05})
        train(opt, model, 3, first=2)
        assert is_flat(opt) == flat
        model[2].weight.requires_grad_(False)
        train(opt, model, 3, first=5)
        ends.append(model)
    close(ends[1].parameters(), ends[0].parameters())


@pytest.mark.parametrize("base", [SGD, AdamW])
@pytest.mark.parametrize("before, after", [(True, False), (False, True), (True, True)])
def test_a_state_dict_passes_between_the_backends(base, before, after):
    settings = {"momentum": 0.9} if base is SGD else {}
    straight = network()
    train(SAM(straight.parameters(), base, lr=0.1, **settings), straight, 8)
    model = network()
    opt = SAM(model.parameters(), base, lr=0.1, flat=before, **settings)
    train(opt, model, 4)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, file)
    train(opt, model, 1)  # goes on from where it was, whatever the copy does
    file.seek(0)
    saved = torch.load(file)
    counts = [id(one.get("step")) for one in saved["opt"]["state"].values() if "step" in one]
    assert len(counts) == len(set(counts))
    resumed = network(seed=1)
    resumed.load_state_dict(saved["model"])
    opt = SAM(resumed.parameters(), base, lr=0.1, flat=after, **settings)
    opt.load_state_dict(saved["opt"])
    train(opt, resumed, 4, first=4)
    assert is_flat(opt) == after
    close(resumed.parameters(), straight.parameters())


def test_loading_a_state_in_mid_training_takes_the_buffers_along():
    model = network()
    opt = SAM(model.parameters(), SGD, lr=0.1, momentum=0.9, flat=True)
    train(opt, model, 3)
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(opt.state_dict())
    train(opt, model, 3, first=3)
    end = copy.deepcopy(list(model.parameters()))
    model.load_state_dict(weights)
    opt.load_state_dict(state)
    train(opt, model, 3, first=3)
    assert all(map(torch.equal, model.parameters(), end))


def test_parameters_that_took_different_numbers_of_steps_are_not_joined():
    model = network()
    opt = SAM(model.parameters(), AdamW, lr=0.1)
    train(opt, model, 2)
    opt.state[model[0].bias]["step"].add_(1)
    state = copy.deepcopy(opt.state_dict())
    flat = SAM(model.parameters(), AdamW, lr=0.1, flat=True)
    flat.load_state_dict(state)
    train(flat, model, 1)
    assert flat.flat is False
    assert [int(flat.state[w]["step"]) for w in model.parameters()] == [3, 4, 3, 3, 3, 3]


def test_settings_that_exclude_flat_buffers_are_refused():
    for settings in ({"second_order": True}, {"inner_steps": 2}):
        with pytest.raises(InputError, match="flat=True excludes"):
            SAM(network().parameters(), SGD, lr=0.1, flat=True, **settings)


# ------------------------------------------------------------------------------------------------------------- compile


@compiles
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize(
    "cls, base, settings, tolerance",
    [
        (SAM, SGD, {"momentum": 0.9}, 1e-9),
        (SAM, AdamW, {}, 1e-4),  # compiled, torch's AdamW corrects its bias in float32
        (ASAM, SGD, {}, 1e-9),
    ],
)
def test_both_halves_of_a_step_compile_without_a_break_and_once(cls, flat, base, settings, tolerance):
    torch.compiler.reset()
    models, seen = [network(), network()], []
    opts = [cls(model.parameters(), base, lr=torch.tensor(0.1), flat=flat, **settings) for model in models]
    compiled = [
        torch.compile(half, fullgraph=True, backend=lambda graph, _: seen.append(step) or graph.forward)
        for half in (opts[1].first_step, opts[1].second_step)
    ]
    for step in range(8):
        for opt, model in zip(opts, models, strict=True):
            for half in (opt.first_step, opt.second_step) if step == 0 or opt is opts[0] else compiled:
                closure_of(opt, model, step, set_to_none=not flat)()
                half()
            opt.param_groups[0]["lr"].mul_(0.9)
    assert len(seen) >= 2
    assert max(seen) <= 3
    close(models[1].parameters(), models[0].parameters(), tolerance)
    torch.compiler.reset()


@compiles
@pytest.mark.parametrize("flat", [False, True])
def test_compiled_halves_clear_and_count_like_eager_ones(flat):
    """With `flat` the clearing is part of the compiled code; torch's own zero_grad breaks a graph."""
    torch.compiler.reset()
    models = [network(), network()]
    opts = [SAM(model.parameters(), SGD, lr=torch.tensor(0.1), momentum=0.9, flat=flat) for model in models]

    def cleared(opt, half):
        def both():
            half()
            if flat:
                opt.zero_grad(set_to_none=False)

        return both

    eager, own = ([cleared(opt, half) for half in (opt.first_step, opt.second_step)] for opt in opts)
    compiled = [torch.compile(half, fullgraph=True, backend="eager") for half in own]
    for step in range(6):
        for opt, model, halves in zip(opts, models, [eager, own if step == 0 else compiled], strict=True):
            for half in halves:
                closure_of(opt, model, step, set_to_none=not flat)()
                half()
                assert not flat or not any(w.grad.any() for w in model.parameters())
    close(models[1].parameters(), models[0].parameters(), 1e-9)
    assert opts[1].skipped_steps == 0
    for half in compiled:
        closure_of(opts[1], models[1], 6, set_to_none=not flat)()
        next(models[1].parameters()).grad.view(-1)[2] = float("inf")
        half()
    assert opts[1].skipped_steps == 1
    torch.compiler.reset()


# ------------------------------------------------------------------------------- what others may do with views of ours


def both(train_, **settings):
    """The parameters after the same training with single tensors and with flat buffers; they must be close."""
    ends = []
    for flat in (False, True):
        model = network()
        opt = SAM(model.parameters(), SGD, lr=0.1, momentum=0.9, flat=flat, **settings)
        train_(opt, model)
        ends.append(list(model.parameters()))
    close(ends[1], ends[0])


@pytest.mark.parametrize("set_to_none", [True, False])
def test_the_data_of_a_gradient_may_be_exchanged(set_to_none):
    def train_(opt, model):
        for step in range(6):
            train(opt, model, 1, step, set_to_none=set_to_none)
            for w in model.parameters():
                w.grad.data = w.grad.data.clone()

    both(train_)


@pytest.mark.parametrize("cpp", [True, False])
def test_addresses_are_those_of_tensors_that_have_not_moved(cpp, monkeypatch):
    if not cpp:
        monkeypatch.setattr("samlib.flat._are_at", None)
    tensors = [torch.ones(3), torch.ones(2), torch.ones(0), torch.ones(4)[1:]]
    addresses = Addresses(tensors)
    assert addresses.are_those_of(tensors)
    assert addresses.are_those_of([t.view_as(t) for t in tensors])
    for moved in (0, 1, 3):
        others = [t.clone() if index == moved else t for index, t in enumerate(tensors)]
        assert not addresses.are_those_of(others)
    tensors[1].data = torch.ones(2)
    assert not addresses.are_those_of(tensors)


def test_gradients_may_be_cleared_after_the_step_in_place():
    def train_(opt, model):
        inputs = torch.randn(5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

        def closure():
            loss = (model(inputs) - 1).square().mean()
            loss.backward()
            return loss

        for _ in range(4):
            opt.step(closure)
            opt.zero_grad(set_to_none=False)

    both(train_)


def test_a_hook_may_exchange_gradients_and_sees_the_base_optimiser():
    def train_(opt, model):
        seen = []

        def hook(optimizer, args, kwargs):
            seen.append(optimizer)
            for w in model.parameters():
                w.grad = w.grad * 0.5

        opt.base_optimizer.register_step_pre_hook(hook)
        opt.base_optimizer.register_step_post_hook(lambda optimizer, *_: seen.append(optimizer))
        train(opt, model, 4)
        assert seen == [opt.base_optimizer] * 8

    both(train_)


def test_the_base_optimiser_may_load_a_state_and_its_momentum_may_be_dropped():
    def train_(opt, model):
        train(opt, model, 2)
        state = copy.deepcopy(opt.base_optimizer.state_dict())
        train(opt, model, 2, first=2)
        opt.base_optimizer.load_state_dict(state)
        opt.param_groups[0]["lr"] = 0.3
        train(opt, model, 2, first=4)
        opt.param_groups[0]["lr"] = 0.05
        opt.state.clear()
        train(opt, model, 2, first=6)
        assert len(opt.state_dict()["state"]) == 6

    both(train_)


def test_a_model_converted_between_the_halves_of_the_two_step_form():
    def train_(opt, model):
        for step in range(4):
            for half in (opt.first_step, opt.second_step):
                closure = closure_of(opt, model, step, set_to_none=False)
                closure()
                half()
            model.float().double()

    both(train_)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("cls", [SAM, AverageSAM])
def test_a_layer_frozen_in_mid_training_is_not_perturbed(cls, set_to_none):
    model = network()
    opt = cls(model.parameters(), SGD, lr=0.1, flat=True)
    train(opt, model, 2, set_to_none=set_to_none)
    model[0].requires_grad_(False)
    opt.zero_grad()
    frozen, seen = copy.deepcopy(model[0].weight), []
    closure = closure_of(opt, model, set_to_none=set_to_none)

    def look():
        seen.append(torch.equal(model[0].weight, frozen))
        return closure()

    for _ in range(2):
        opt.step(look)
    assert all(seen)
    assert torch.equal(model[0].weight, frozen)


def test_a_layer_that_is_exchanged_in_a_group_is_trained_and_perturbed():
    def train_(opt, model):
        train(opt, model, 2)
        model[0] = nn.Linear(5, 5, dtype=torch.float64)
        with torch.no_grad():
            for w in model[0].parameters():
                w.fill_(0.1)
        opt.param_groups[0]["params"][:2] = list(model[0].parameters())
        train(opt, model, 2, first=2)
        assert not torch.equal(model[0].weight, torch.full_like(model[0].weight, 0.1))

    both(train_)


def test_flat_buffers_can_be_given_up_by_hand():
    def train_(opt, model):
        train(opt, model, 2)
        opt.flat = False
        model.float().double()
        train(opt, model, 2, first=2)
        assert not is_flat(opt)

    both(train_)


def test_an_update_without_eps_does_not_touch_what_lies_between_the_views():
    ends = []
    for flat in (False, True):
        model = network()
        opt = ASAM(model.parameters(), torch.optim.Adam, lr=0.01, eps=0.0, flat=flat)
        train(opt, model, 4)
        assert opt.skipped_steps == 0
        ends.append(list(model.parameters()))
    close(ends[1], ends[0])


def test_strided_parameters_that_share_memory_stay_tied():
    memory = torch.ones(9, dtype=torch.float64)
    a, b = nn.Parameter(memory[::2]), nn.Parameter(memory[4:5])
    opt = SAM([a, b], SGD, lr=0.1, flat=True)

    def closure():
        opt.zero_grad()
        loss = a.square().sum() + b.square().sum()
        loss.backward()
        return loss

    opt.step(closure)
    assert a[2] == b[0]


def test_a_fused_optimiser_that_loads_a_state_that_is_not_does_not_skip_by_itself(recorded):
    model, other = network(), network()
    plain = SAM(other.parameters(), SGD, lr=0.1, momentum=0.9)
    train(plain, other, 1)
    opt = SAM(model.parameters(), SGD, lr=0.1, momentum=0.9, fused=True)
    opt.load_state_dict(plain.state_dict())
    train(opt, model, 2)
    assert opt.skipped_steps == 0


def test_clearing_reaches_a_gradient_that_somebody_replaced():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    opt = SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1, flat=True)
    inputs = torch.randn(8, 4)

    def closure():
        opt.zero_grad(set_to_none=False)
        loss = model(inputs).square().mean()
        loss.backward()
        return loss

    for _ in range(3):
        opt.step(closure)
    last = list(model.parameters())[-1]
    closure()
    last.grad = torch.full_like(last, 100.0)
    opt.zero_grad(set_to_none=False)
    assert not last.grad.any()


def test_a_second_pass_that_clears_for_itself_reaches_gradients_replaced_in_the_first():
    """The optimiser clears between passes on what the pass before left; a closure may have replaced any of it."""

    def train_(opt, model):
        plain = closure_of(opt, model, set_to_none=False)

        def closure():
            loss = plain()
            with torch.no_grad():
                model[0].weight.grad = model[0].weight.grad * 2  # a new tensor
                model[2].weight.grad.data = model[2].weight.grad.data * 3  # new data of the same tensor
            return loss

        for step in range(4):
            opt.step([closure] * (1 + step % 2))

    both(train_)


def test_gradients_are_cleared_where_the_weights_have_left_the_buffers():
    model = network(dtype=torch.float32)
    opt = SAM(model.parameters(), SGD, lr=0.1, flat=True)
    closure_of(opt, model, set_to_none=False)()
    opt.step(closure_of(opt, model, set_to_none=False))
    model.double()
    for w in model.parameters():
        w.grad = torch.ones_like(w)
    opt.zero_grad(set_to_none=False)
    assert not any(w.grad.any() for w in model.parameters())
