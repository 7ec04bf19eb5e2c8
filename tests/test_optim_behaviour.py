"""How SAM behaves in a training: base optimisers, schedulers, checkpoints, shards, batch norm, awkward gradients."""

import copy
import io
import math
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from test_optim import assert_close, assert_equal
from test_optim_properties import BACKENDS, SGD, all_backends, on_all_backends
from torch import nn
from torch.optim import lr_scheduler

from samlib.batchnorm import second_pass
from samlib.errors import InputError
from samlib.optim import ASAM, SAM, AverageSAM

ADAM = {"lr": 0.01, "weight_decay": 0.01}
BASES = {
    "sgd foreach": (SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4, "foreach": True}),
    "sgd loop": (SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.1, "foreach": False}),
    "sgd fused nesterov": (SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": True, "fused": True}),
    "adam": (torch.optim.Adam, ADAM),
    "adamw amsgrad": (torch.optim.AdamW, ADAM | {"amsgrad": True}),
    "adamw fused": (torch.optim.AdamW, ADAM | {"fused": True}),
    "rmsprop": (torch.optim.RMSprop, ADAM | {"momentum": 0.5, "centered": True}),
}
MOMENTUM = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}

# class, its settings, number of shards; the passes of a step are `passes_at_w` at w, then some at w + eps
VARIANTS = {
    "sam": (SAM, {}, 1),
    "p 1.5": (SAM, {"p": 1.5}, 1),
    "p 4": (SAM, {"p": 4.0}, 1),
    "p inf": (SAM, {"p": math.inf}, 1),
    "msam": (SAM, {}, 3),
    "asam": (ASAM, {"eta": 0.1}, 1),
    "asam of matrices": (ASAM, {"eta": 0.0, "scale_filter": lambda w: w.ndim > 1}, 2),
    "not normalised": (SAM, {"normalize": False}, 1),
    "3 inner steps": (SAM, {"inner_steps": 3}, 1),
    "second order": (SAM, {"second_order": True}, 1),
    "every 3rd step": (SAM, {"ascent_every": 3}, 1),
    "average": (AverageSAM, {"seed": 3}, 1),
    "average asam of shards": (AverageSAM, {"adaptive": True, "eta": 0.1}, 2),
}
TWO_STEP = {name: v for name, v in VARIANTS.items() if v[2] == 1 and not {"inner_steps", "second_order"} & set(v[1])}


def cases(table):
    return on_all_backends("variant", table, lambda variant: variant[1])


def network(seed=0, dtype=torch.float64, batch_norm=True):
    torch.manual_seed(seed)
    norm = nn.BatchNorm1d(6) if batch_norm else nn.Identity()
    return nn.Sequential(nn.Linear(4, 6), norm, nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def examples(seed=0, size=12, dtype=torch.float64):
    generator = torch.Generator().manual_seed(100 + seed)
    inputs = torch.randn(size, 4, generator=generator, dtype=torch.float64).to(dtype)
    return inputs, torch.randint(3, (size,), generator=generator)


def closure_of(opt, model, inputs, labels, statistics="frozen", set_to_none=True):
    def closure():
        opt.zero_grad(set_to_none)
        with second_pass(model, statistics) if getattr(opt, "in_second_pass", False) else nullcontext():
            loss = nn.functional.cross_entropy(model(inputs), labels)
        if not getattr(opt, "second_order", False):
            loss.backward()
        return loss

    return closure


def shards_of(opt, model, data, num_shards, **how):
    parts = zip(*(tensor.chunk(num_shards) for tensor in data), strict=True)
    return [closure_of(opt, model, *part, **how) for part in parts]


def train(opt, model, steps, first=0, num_shards=1, schedule=None):
    for step in range(first, first + steps):
        closures = shards_of(opt, model, examples(step, dtype=next(model.parameters()).dtype), num_shards)
        opt.step(closures if num_shards > 1 else closures[0])
        if schedule is not None:
            schedule.step()


def parameter(*values):
    return nn.Parameter(torch.tensor(values, dtype=torch.float64))


def flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


# ---------------------------------------------------------------------------------------------------- base optimisers


BIT_FOR_BIT = {
    f"{name}-{backend}": (*base, backend)
    for name, base in BASES.items()
    for backend in BACKENDS
    if not (backend and base[1].get("fused"))
}


@pytest.mark.parametrize("rho", [0.0, 1e-35], ids=["rho 0", "two passes at w"])
@pytest.mark.parametrize("base, hyper, backend", BIT_FOR_BIT.values(), ids=BIT_FOR_BIT)
def test_without_a_perturbation_it_is_the_base_optimiser_bit_for_bit(base, hyper, rho, backend):
    """A rho of 1e-35 is lost in the rounding of the weights: all of a SAM step happens, at w."""
    model, reference = network(dtype=torch.float32), network(dtype=torch.float32)
    opt = SAM(model.parameters(), base, rho=rho, **hyper, **backend)
    train(opt, model, 50)
    train(base(reference.parameters(), **hyper), reference, 50)
    assert_equal(model.state_dict(), reference.state_dict())
    assert model[1].num_batches_tracked == 50


@all_backends
@pytest.mark.parametrize("rho", [0.0, 1e-35], ids=["rho 0", "two passes at w"])
@pytest.mark.parametrize("name", ["sgd fused nesterov", "adamw fused"])
def test_a_fused_base_optimiser_differs_by_rounding_at_most(name, rho, backend):
    """torch's fused kernels round the last entries of a tensor, which do not fill a vector, in another way than the
    others: in a flat buffer, other entries are the last. Without batch norm, since the gradient of a bias in front of
    it is nothing but rounding, which Adam makes large."""
    base, hyper = BASES[name]
    model, reference = network(batch_norm=False), network(batch_norm=False)
    train(SAM(model.parameters(), base, rho=rho, **hyper, **backend), model, 50)
    train(base(reference.parameters(), **hyper), reference, 50)
    assert_close(model.state_dict(), reference.state_dict(), 1e-11)


@cases(VARIANTS)
def test_rho_zero_makes_every_variant_the_base_optimiser(variant, backend):
    cls, how, _ = variant
    model, reference = network(), network()
    train(cls(model.parameters(), torch.optim.AdamW, rho=0.0, **how, **ADAM, **backend), model, 5)
    train(torch.optim.AdamW(reference.parameters(), **ADAM), reference, 5)
    assert_equal(model.state_dict(), reference.state_dict())


@all_backends
@pytest.mark.parametrize("base, hyper", BASES.values(), ids=BASES)
def test_the_base_optimiser_steps_at_w_with_the_gradient_at_w_plus_eps(base, hyper, backend):
    """Against a bare base optimiser that is handed that gradient."""
    model, reference = network(), network()
    opt, bare = SAM(model.parameters(), base, rho=0.1, **hyper, **backend), base(reference.parameters(), **hyper)
    for step in range(10):
        closure_of(bare, reference, *examples(step))()
        grads = [w.grad for w in reference.parameters()]
        moved = copy.deepcopy(reference)
        length = flat(grads).norm()
        with torch.no_grad(), second_pass(moved):
            for w, g in zip(moved.parameters(), grads, strict=True):
                w.add_(0.1 * g / length)
        with second_pass(moved):
            closure_of(torch.optim.SGD(moved.parameters()), moved, *examples(step))()
        for w, other in zip(reference.parameters(), moved.parameters(), strict=True):
            w.grad = other.grad
        bare.step()
        opt.step(closure_of(opt, model, *examples(step)))
    assert_close(model.state_dict(), reference.state_dict(), 1e-8)  # Adam divides rounding errors by small numbers


def make_schedules():
    return {
        "cosine": partial(lr_scheduler.CosineAnnealingLR, T_max=8),
        "one cycle": partial(lr_scheduler.OneCycleLR, max_lr=0.3, total_steps=9, base_momentum=0.5, max_momentum=0.95),
        "cyclic": partial(lr_scheduler.CyclicLR, base_lr=0.01, max_lr=0.2, step_size_up=3),
        "chained": lambda opt: lr_scheduler.SequentialLR(
            opt,
            [lr_scheduler.LinearLR(opt, 0.1, total_iters=3), lr_scheduler.ExponentialLR(opt, 0.5)],
            milestones=[3],
        ),
        "lambda of each group": partial(lr_scheduler.LambdaLR, lr_lambda=[lambda t: 0.9**t, lambda t: 1 / (1 + t)]),
    }


@all_backends
@pytest.mark.parametrize("attach", [lambda opt: opt, lambda opt: opt.base_optimizer], ids=["wrapper", "base"])
@pytest.mark.parametrize("make", make_schedules().values(), ids=make_schedules())
def test_a_scheduler_drives_sam_as_it_drives_the_base_optimiser(make, attach, backend):
    model, reference, driven = network(), network(), network()

    def groups(net):
        return [{"params": net[:2].parameters()}, {"params": net[2:].parameters(), "lr": 0.03}]

    bare = SGD(groups(reference), **MOMENTUM)
    opts = [SAM(groups(net), SGD, rho=rho, **MOMENTUM, **backend) for net, rho in ((model, 0.0), (driven, 0.1))]
    schedules = [make(bare), make(attach(opts[0])), make(attach(opts[1]))]
    for step in range(8):
        for opt, net, schedule in zip([bare, *opts], [reference, model, driven], schedules, strict=True):
            train(opt, net, 1, first=step, schedule=schedule)
        for opt in opts:
            for group, expected in zip(opt.param_groups, bare.param_groups, strict=True):
                assert (group["lr"], group["momentum"]) == (expected["lr"], expected["momentum"])
    assert_equal(model.state_dict(), reference.state_dict())
    assert not torch.equal(driven[0].weight, reference[0].weight)


@all_backends
@pytest.mark.parametrize("attach", [lambda opt: opt, lambda opt: opt.base_optimizer], ids=["wrapper", "base"])
def test_a_schedule_on_the_loss_sees_the_loss_at_w(attach, backend):
    w = parameter(1.0, 2.0)
    opt = SAM([w], SGD, rho=0.5, lr=0.4, **backend)
    schedule = lr_scheduler.ReduceLROnPlateau(attach(opt), factor=0.5, patience=0)
    losses = []
    for _ in range(12):

        def closure():
            opt.zero_grad()
            loss = 0.5 * (w * w).sum()
            loss.backward()
            return loss

        before = 0.5 * (w.detach() ** 2).sum()
        losses.append(opt.step(closure))
        assert losses[-1] == before
        schedule.step(losses[-1])
    assert opt.param_groups[0]["lr"] == opt.base_optimizer.param_groups[0]["lr"] < 0.4  # it hovers at distance rho


@all_backends
def test_a_group_added_in_training_is_perturbed_and_trained_from_then_on(backend):
    """As a head that is thawed: against two closed-form steps on 0.5 |w|^2."""
    w, v = parameter(3.0, 4.0), parameter(0.0, 12.0)
    opt = SAM([w], SGD, rho=0.5, lr=0.1, momentum=0.9, **backend)

    def closure():
        opt.zero_grad()
        loss = 0.5 * (w * w).sum() + 0.5 * (v * v).sum()
        loss.backward()
        return loss

    opt.step(closure)
    first = torch.tensor([3.0, 4.0]).double() * (1 + 0.5 / 5)
    at = torch.tensor([3.0, 4.0]).double() - 0.1 * first
    assert_close(w.detach(), at)
    opt.add_param_group({"params": [v], "rho": 2.0, "lr": 0.5})
    opt.zero_grad()
    length = math.sqrt(at.square().sum().item() + 144)
    opt.step(closure)
    assert_close(w.detach(), at - 0.1 * (0.9 * first + at * (1 + 0.5 / length)))
    assert_close(v.detach(), torch.tensor([0.0, 12.0]).double() * (1 - 0.5 * (1 + 2.0 / length)))


# ------------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("base, hyper", [BASES["sgd foreach"], BASES["adamw amsgrad"]], ids=["sgd", "adamw"])
@cases(VARIANTS)
def test_resumed_from_a_file_it_is_the_uninterrupted_training_bit_for_bit(variant, base, hyper, backend):
    """Interrupted after 4 steps: in the middle of a period of 3, and of a schedule."""
    cls, how, num_shards = variant

    def make(seed):
        model = network(seed)
        opt = cls(model.parameters(), base, rho=0.1, **how, **hyper, **backend)
        return model, opt, lr_scheduler.CosineAnnealingLR(opt, T_max=9)

    whole, opt, schedule = make(0)
    train(opt, whole, 9, num_shards=num_shards, schedule=schedule)

    model, opt, schedule = make(0)
    train(opt, model, 4, num_shards=num_shards, schedule=schedule)
    file = io.BytesIO()
    torch.save([part.state_dict() for part in (model, opt, schedule)], file)
    train(opt, model, 2, num_shards=num_shards)  # what happens afterwards does not reach the file
    file.seek(0)
    resumed, opt, schedule = make(7)
    for part, state in zip((resumed, opt, schedule), torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    train(opt, resumed, 5, first=4, num_shards=num_shards, schedule=schedule)
    assert_equal(resumed.state_dict(), whole.state_dict())


@all_backends
def test_a_checkpoint_keeps_the_count_of_skipped_steps_and_the_radii(backend):
    w = parameter(1.0, 2.0)
    groups = [{"params": [w], "rho": 0.7}]
    opt = SAM(groups, SGD, rho=0.1, lr=0.1, **backend)
    opt.step(partial(spoiled, opt, w, math.nan, "both"))
    other = SAM([parameter(1.0, 2.0)], SGD, lr=5.0, rho=3.0, **backend)
    other.load_state_dict(opt.state_dict())
    assert other.skipped_steps == 1
    assert (other.param_groups[0]["rho"], other.param_groups[0]["lr"]) == (0.7, 0.1)
    assert other.base_optimizer.param_groups is other.param_groups
    assert other.base_optimizer.state is other.state


@all_backends
@pytest.mark.parametrize("steps_together", [0, 1])
@pytest.mark.parametrize("base, hyper", [BASES["sgd foreach"], BASES["adam"]], ids=["sgd", "adam"])
def test_a_state_of_tensors_with_different_pasts_is_taken_as_it_is(base, hyper, steps_together, backend):
    """A first layer that was frozen for two steps has no momentum yet, or a lower step count than the second."""
    model = network(batch_norm=False)
    opt = SAM(model.parameters(), base, rho=0.3, **hyper)
    model[0].requires_grad_(False)
    train(opt, model, 2)
    model[0].requires_grad_(True)
    train(opt, model, steps_together, first=2)
    resumed = copy.deepcopy(model)
    other = SAM(resumed.parameters(), base, rho=0.3, **hyper, **backend)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    train(opt, model, 3, first=3)
    train(other, resumed, 3, first=3)
    assert_close(resumed.state_dict(), model.state_dict(), 1e-10)


# ------------------------------------------------------------------------------------------------------------- shards


def lines(seed=0, count=6, size=4):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, size)), rng.normal(size=count), rng.normal(size=size)


@all_backends
def test_one_shard_per_example_is_the_mean_of_the_examples_sam_gradients(backend):
    """f_i = (a_i'w - b_i)^2 / 2 has eps_i = rho sign(r_i) a_i / |a_i|: against NumPy, and against torch.func."""
    a, b, w = lines()
    weight, rho, lr = nn.Parameter(torch.from_numpy(w.copy())), 0.3, 0.1
    opt = SAM([weight], SGD, rho=rho, lr=lr, **backend)
    rows, targets = torch.from_numpy(a), torch.from_numpy(b)

    def loss_of(at, row, target):
        return 0.5 * (row @ at - target) ** 2

    def sam_gradient(at, row, target):
        g = torch.func.grad(loss_of)(at, row, target)
        return torch.func.grad(loss_of)(at + rho * g / g.norm(), row, target)

    def closure(i):
        opt.zero_grad()
        loss = loss_of(weight, rows[i], targets[i])
        loss.backward()
        return loss

    for _ in range(5):
        oracle = torch.func.vmap(sam_gradient, (None, 0, 0))(weight.detach(), rows, targets).mean(0)
        expected = weight.detach() - lr * oracle
        opt.step([partial(closure, i) for i in range(len(b))])
        residual = a @ w - b
        lengths = np.linalg.norm(a, axis=1)
        w = w - lr * ((residual + rho * np.sign(residual) * lengths) @ a) / len(b)
        assert_close(weight.detach(), torch.from_numpy(w))
        assert_close(weight.detach(), expected)


@all_backends
@pytest.mark.parametrize("num_shards", [2, 4])
@pytest.mark.parametrize("cls", [SAM, ASAM])
def test_shards_with_the_same_data_are_sam_bit_for_bit_where_the_shares_are_exact(cls, num_shards, backend):
    models = [network(batch_norm=False), network(batch_norm=False)]
    opts = [cls(model.parameters(), SGD, rho=0.3, **MOMENTUM, **backend) for model in models]
    for step in range(10):
        one, many = (closure_of(*pair, *examples(step)) for pair in zip(opts, models, strict=True))
        assert opts[0].step(one) == opts[1].step([many] * num_shards)
    assert_equal(models[0].state_dict(), models[1].state_dict())


@on_all_backends("how", {"sam": {}, "2 inner steps": {"inner_steps": 2}, "p inf": {"p": math.inf}}, dict)
def test_accumulated_micro_batches_are_one_large_batch_and_shards_are_not(how, backend):
    """A closure that runs micro-batches, each with its share of the loss, has one ascent: SAM, not mSAM."""
    models = [network(batch_norm=False) for _ in range(3)]
    opts = [SAM(model.parameters(), SGD, rho=0.5, **MOMENTUM, **how, **backend) for model in models]

    def accumulated(opt, model, inputs, labels):
        opt.zero_grad()
        total = 0.0
        for part in zip(inputs.split(5), labels.split(5), strict=True):  # of 5, 5 and 2
            loss = nn.functional.cross_entropy(model(part[0]), part[1]) * len(part[1]) / len(labels)
            loss.backward()
            total += loss.detach()
        return total

    for step in range(5):
        data = examples(step)
        large = opts[0].step(closure_of(opts[0], models[0], *data))
        small = opts[1].step(partial(accumulated, opts[1], models[1], *data))
        assert_close(small, large)
        opts[2].step(shards_of(opts[2], models[2], data, 3))
    assert_close(models[1].state_dict(), models[0].state_dict())
    assert (flat(models[2].parameters()) - flat(models[0].parameters())).abs().max() > 1e-3


# --------------------------------------------------------------------------------------------------------------- ASAM


def relu_pair(factor, seed=0):
    """A network whose first layer is scaled by `factor`, and its second by 1 / `factor`: the same function for each."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3, bias=False)).double()
    with torch.no_grad():
        model[0].weight.mul_(factor)
        model[0].bias.mul_(factor)
        model[2].weight.div_(factor)
    return model


def perturbed_loss(cls, model, backend, **how):
    opt, seen = cls(model.parameters(), SGD, rho=0.4, lr=0.0, **how, **backend), []
    inner = closure_of(opt, model, *examples())

    def closure():
        loss = inner()
        seen.append(loss.item())
        return loss

    opt.step(closure)
    return seen[-1]


@on_all_backends("how", {"p 2": {}, "p inf": {"p": math.inf}, "p 1.5": {"p": 1.5}, "3 inner": {"inner_steps": 3}}, dict)
def test_asam_sees_the_same_sharpness_in_a_rescaled_relu_pair_and_sam_does_not(how, backend):
    asam, sam = (
        [perturbed_loss(cls, relu_pair(c), backend, **more, **how) for c in (1, 0.1, 8)]
        for cls, more in ((ASAM, {"eta": 0.0}), (SAM, {}))
    )
    assert asam == pytest.approx([asam[0]] * 3, rel=1e-10)
    assert abs(sam[1] - sam[0]) > 1e-2
    assert abs(sam[2] - sam[0]) > 1e-2


@all_backends
@pytest.mark.parametrize("p", [1.5, 2.0, math.inf])
def test_a_step_of_asam_is_one_of_sam_where_all_weights_have_size_one(p, backend):
    models = [network(batch_norm=False), network(batch_norm=False)]
    for cls, model, how in zip((SAM, ASAM), models, ({}, {"eta": 0.0}), strict=True):
        with torch.no_grad():
            for w in model.parameters():
                w.sign_()
        opt = cls(model.parameters(), SGD, rho=0.3, lr=0.1, p=p, **how, **backend)
        opt.step(closure_of(opt, model, *examples()))
    assert_equal(models[0].state_dict(), models[1].state_dict())


# --------------------------------------------------------------------------------------------------- awkward gradients


def passes(opt, place):
    """Whether the present pass is one of those that `place` names."""
    return {"both": True, "first": not opt.at_perturbed_point, "second": opt.at_perturbed_point}.get(place, False)


def spoiled(opt, w, value, place):
    """A pass over 0.5 |w|^2 whose gradient has an entry of `value`, in the first pass, the second or both."""
    opt.zero_grad()
    loss = 0.5 * (w * w).sum()
    if passes(opt, place):
        loss = loss + (value - w.detach()[0]) * (w[0] - w.detach()[0])
    if not opt.second_order:
        loss.backward()
    return loss


def one_step(opt, closure, num_shards, form):
    if form == "step":
        opt.step([closure] * num_shards)
    else:
        closure()
        opt.first_step(zero_grad=True)
        closure()
        opt.second_step()


def in_both_forms(table):
    found = {name: (*v, "step") for name, v in table.items()}
    return found | {f"{name}, two steps": (*v, "two steps") for name, v in table.items() if name in TWO_STEP}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("place", ["first", "second", "both"])
@cases(in_both_forms(VARIANTS))
def test_a_gradient_that_is_not_finite_skips_the_step_of_every_variant(variant, place, value, backend):
    cls, how, num_shards, form = variant
    if cls is AverageSAM and place == "first":
        pytest.skip("its only pass is perturbed")
    how = {name: value for name, value in how.items() if name != "scale_filter"}  # which wants a matrix
    w = parameter(1.0, -2.0)
    opt = cls([w], torch.optim.AdamW, rho=0.5, **how, **ADAM, **backend)
    one_step(opt, partial(spoiled, opt, w, value, place), num_shards, form)
    assert_equal([w.detach()], [parameter(1.0, -2.0).detach()])
    assert opt.skipped_steps == 1
    assert not opt.state
    assert not opt.at_perturbed_point
    for _ in range(3):  # and it goes on
        one_step(opt, partial(spoiled, opt, w, 1.0, "none"), num_shards, form)
    assert opt.skipped_steps == 1
    assert opt.state[w]["step"] == 3


@pytest.mark.parametrize("place", ["first", "second"])
@cases(in_both_forms(VARIANTS))
def test_a_tensor_without_gradient_on_one_pass_is_restored_in_every_variant(variant, place, backend):
    """`there` has a gradient on both passes, `away` none on the first or the second."""
    cls, how, num_shards, form = variant
    there, away = nn.Parameter(torch.eye(2).double()), nn.Parameter(torch.eye(2).double())
    opt = cls([there, away], SGD, rho=0.5, lr=0.1, momentum=0.9, **how, **backend)

    def closure():
        opt.zero_grad()
        loss = 0.5 * (there * there).sum()
        if not passes(opt, place):
            loss = loss + away.sum()
        if not opt.second_order:
            loss.backward()
        return loss

    one_step(opt, closure, num_shards, form)
    stepped = torch.eye(2).double() - 0.1  # on a gradient of 1, at w
    reached = place == "first"  # by the descent: then it is stepped, though it was not perturbed
    assert (away.grad is not None) == reached
    assert_close(away.detach(), stepped if reached else torch.eye(2).double())
    assert not torch.equal(there, torch.eye(2).double())
    assert opt.skipped_steps == 0


@cases(in_both_forms(VARIANTS))
def test_a_gradient_of_zero_perturbs_nothing_and_a_descent_of_zero_moves_nothing(variant, backend):
    cls, how, num_shards, form = variant
    for place in ("first", "second"):
        w = nn.Parameter(torch.eye(2).double())
        opt, seen = cls([w], SGD, rho=0.5, lr=0.1, **how, **backend), []

        def closure(opt=opt, w=w, seen=seen, place=place):
            opt.zero_grad()
            seen.append(w.detach().clone())
            loss = (0.0 if passes(opt, place) else 1.0) * (w * w).sum()
            if not opt.second_order:
                loss.backward()
            return loss

        one_step(opt, closure, num_shards, form)
        if place == "second":
            assert_equal([w.detach()], [torch.eye(2).double()])
        elif cls is not AverageSAM:
            assert_equal([seen[1]], [torch.eye(2).double()])
        assert opt.skipped_steps == 0


@all_backends
def test_where_all_is_frozen_the_closure_runs_once_and_nothing_moves(backend):
    w = parameter(1.0, 2.0).requires_grad_(False)
    for groups in ([w], [{"params": []}, {"params": [w]}]):
        for cls in (SAM, ASAM, AverageSAM):
            opt, calls = cls(groups, SGD, lr=0.1, **backend), []
            assert opt.step(lambda calls=calls: calls.append(None) or 2.5) == 2.5
            assert len(calls) == 1
            opt.first_step()
            opt.second_step()
            assert all(torch.equal(eps, torch.zeros(2).double()) for eps in opt.perturbation())
    assert_equal([w], [parameter(1.0, 2.0)])


@all_backends
@pytest.mark.parametrize("cls", [SAM, ASAM, AverageSAM])
def test_groups_without_a_tensor_are_no_error(cls, backend):
    opt = cls([{"params": []}], SGD, lr=0.1, **backend)
    assert opt.step(lambda: 2.5) == 2.5
    assert opt.perturbation() == []
    opt.load_state_dict(opt.state_dict())


@all_backends
def test_a_frozen_tensor_is_neither_in_the_norm_nor_moved_by_weight_decay(backend):
    w, frozen = parameter(3.0, 4.0), parameter(9.0)
    opt = SAM([w, frozen.requires_grad_(False)], SGD, rho=0.5, lr=0.1, weight_decay=0.1, **backend)
    opt.step(partial(spoiled, opt, w, 0.0, "none"))
    assert_close(w.detach(), torch.tensor([3.0, 4.0]).double() * (1 - 0.1 * (1.1 + 0.1)))
    assert frozen == 9


@all_backends
@pytest.mark.parametrize("place", ["first", "second"])
def test_a_sparse_gradient_on_either_pass_is_refused_and_the_weights_are_at_w(place, backend):
    table = nn.Embedding(4, 2, sparse=True)
    before = table.weight.detach().clone()
    opt = SAM(table.parameters(), SGD, rho=0.5, lr=0.1, **backend)

    def closure():
        opt.zero_grad()
        loss = nn.functional.embedding(torch.tensor([1]), table.weight, sparse=passes(opt, place)).sum()
        loss.backward()
        return loss

    with pytest.raises(InputError, match="a gradient is sparse: make it dense"):
        opt.step(closure)
    assert_equal([table.weight], [before])
    assert not opt.at_perturbed_point


@all_backends
def test_a_second_step_that_raises_does_not_bar_the_next_step(backend):
    w = parameter(1.0, 2.0)
    opt = SAM([w], SGD, rho=0.5, lr=0.1, **backend)
    closure = partial(spoiled, opt, w, 0.0, "none")
    closure()
    opt.first_step(zero_grad=True)
    w.grad = torch.ones(2).double().to_sparse()
    with pytest.raises(InputError, match="a gradient is sparse"):
        opt.second_step()
    assert_equal([w], [parameter(1.0, 2.0)])
    opt.step(closure)


# ----------------------------------------------------------------------------------------------------- kinds of tensors


@cases(VARIANTS)
def test_tied_weights_are_perturbed_once(variant, backend):
    """Against the same function of one tensor, untied by hand."""
    cls, how, num_shards = variant
    torch.manual_seed(0)
    tied = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 4, bias=False)).double()
    tied[2].weight = tied[0].weight
    w = nn.Parameter(tied[0].weight.detach().clone())
    inputs = examples()[0]
    ends = []
    for params, run in (
        (list(tied.parameters()), tied),
        ([w], lambda x: torch.tanh(x @ w.T) @ w.T),
    ):
        opt = cls(params, SGD, rho=0.5, **MOMENTUM, **how, **backend)

        def closure(opt=opt, run=run):
            opt.zero_grad()
            loss = run(inputs).square().mean()
            if not opt.second_order:
                loss.backward()
            return loss

        for _ in range(3):
            opt.step([closure] * num_shards)
        ends.append(params)
    assert len(ends[0]) == 1
    assert tied[0].weight is tied[2].weight
    assert_close(ends[0][0].detach(), w.detach())


@all_backends
def test_two_parameters_that_share_memory_are_restored(backend):
    """Tied by `.data`, not as one object: torch steps the memory twice, and so does the base optimiser here."""

    def pair():
        w = parameter(1.0, 2.0)
        return w, nn.Parameter(w.data)

    def closure(opt, w, v):
        opt.zero_grad()
        loss = (w * w).sum() + 3 * v.sum()
        loss.backward()
        return loss

    params, reference = pair(), pair()
    opt = SAM(params, SGD, rho=0.5, lr=0.0, momentum=0.9, **backend)
    opt.step(partial(closure, opt, *params))
    assert_equal(params, reference)
    params, reference = pair(), pair()
    opt, bare = SAM(params, SGD, rho=0.0, **MOMENTUM, **backend), SGD(reference, **MOMENTUM)
    for _ in range(3):
        opt.step(partial(closure, opt, *params))
        bare.step(partial(closure, bare, *reference))
    assert_equal(params, reference)
    assert params[0].data_ptr() == params[1].data_ptr()


def conv_network():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 2), nn.Flatten(), nn.Linear(8, 3)]
    return nn.Sequential(*layers).double()


@cases(VARIANTS)
def test_channels_last_weights_give_the_same_training_and_stay_channels_last(variant, backend):
    cls, how, num_shards = variant
    models = [conv_network(), conv_network().to(memory_format=torch.channels_last)]
    strides = [w.stride() for w in models[1].parameters()]
    if cls is AverageSAM:
        pytest.skip("it draws eps in the order of the memory, which is another")
    inputs = torch.randn(12, 3, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = examples()[1]
    for model in models:
        opt = cls(model.parameters(), SGD, rho=0.3, **MOMENTUM, **how, **backend)
        for _ in range(3):
            closures = shards_of(opt, model, (inputs, labels), num_shards)
            opt.step(closures)
    assert [w.stride() for w in models[1].parameters()] == strides
    assert_close(models[1].state_dict(), models[0].state_dict(), 1e-9)


@cases(VARIANTS)
def test_gradients_set_to_zero_or_to_none_give_the_same_training(variant, backend):
    cls, how, num_shards = variant
    models = [network(), network()]
    for model, set_to_none in zip(models, (True, False), strict=True):
        opt = cls(model.parameters(), SGD, rho=0.3, **MOMENTUM, **how, **backend)
        for step in range(4):
            opt.step(shards_of(opt, model, examples(step), num_shards, set_to_none=set_to_none))
    assert_equal(models[0].state_dict(), models[1].state_dict())


@cases(VARIANTS)
def test_a_mixture_of_dtypes_trains_as_float64_does_within_its_precision(variant, backend):
    cls, how, num_shards = variant
    inputs, labels = examples()
    ends = []
    for dtype in (torch.float32, torch.float64):
        model = network(batch_norm=False)
        model[0].to(dtype)
        opt = cls(model.parameters(), SGD, rho=0.3, **MOMENTUM, **how, **backend)

        def closure(opt=opt, model=model, dtype=dtype):
            opt.zero_grad()
            hidden = torch.tanh(model[0](inputs.to(dtype)))
            loss = nn.functional.cross_entropy(model[3](hidden.double()), labels)
            if not opt.second_order:
                loss.backward()
            return loss

        for _ in range(3):
            opt.step([closure] * num_shards)
        assert [w.dtype for w in model.parameters()] == [dtype] * 2 + [torch.float64] * 2
        ends.append(torch.cat([w.detach().double().flatten() for w in model.parameters()]))
    if cls is not AverageSAM:  # which draws other numbers for another type
        assert_close(*ends, 1e-5)
    assert torch.isfinite(ends[0]).all()


# --------------------------------------------------------------------------------------------------------- batch norm


class Statistics:
    """Running statistics of a batch norm behind a linear layer, from torch's rule by hand: 0.9 old + 0.1 new."""

    def __init__(self, size):
        self.mean, self.var, self.batches = torch.zeros(size).double(), torch.ones(size).double(), 0

    def count(self, activations):
        self.mean = 0.9 * self.mean + 0.1 * activations.mean(0)
        self.var = 0.9 * self.var + 0.1 * activations.var(0)
        self.batches += 1

    def assert_equal(self, layer):
        assert_close(layer.running_mean, self.mean)
        assert_close(layer.running_var, self.var)
        assert layer.num_batches_tracked == self.batches


# how many passes of one step with closures a, b (or a and n-SAM's n) count under "frozen" and "eval": those at w
COUNTED = {
    "sam": (SAM, {}, {}, ["a"]),
    "msam": (SAM, {}, {"shards": 2}, ["a", "b"]),
    "n-sam of shards": (SAM, {}, {"shards": 2, "n": True}, ["n"]),
    "3 inner steps": (SAM, {"inner_steps": 3}, {}, ["a"]),
    "second order": (SAM, {"second_order": True}, {}, ["a"]),
    "average of shards": (AverageSAM, {}, {"shards": 2}, ["a", "b"]),
    "rho 0 of shards": (SAM, {"rho": 0.0}, {"shards": 2}, ["a", "b"]),
}


@pytest.mark.parametrize("statistics", ["frozen", "update", "eval"])
@cases(COUNTED)
def test_running_statistics_after_a_step_are_those_of_the_passes_that_count(variant, statistics, backend):
    cls, how, options, counted = variant
    model, passed = network(), []
    expected = Statistics(6)
    opt = cls(model.parameters(), SGD, **({"rho": 0.5} | how), lr=0.1, **backend)
    data = {name: examples(seed) for seed, name in enumerate("abn")}

    def recorded(name):
        inner = closure_of(opt, model, *data[name], statistics=statistics)

        def closure():
            activations = model[0](data[name][0]).detach()
            if not opt.in_second_pass or statistics == "update":
                expected.count(activations)
            passed.append(name if not opt.in_second_pass else name + "'")
            return inner()

        return closure

    closures = [recorded(name) for name in "ab"[: options.get("shards", 1)]]
    for _ in range(2):
        opt.step(closures, ascent_closure=recorded("n") if "n" in options else None)
        expected.assert_equal(model[1])
    assert [name for name in passed if "'" not in name] == counted * 2
    assert model[1].training
    assert model[1].track_running_stats


@all_backends
@pytest.mark.parametrize("statistics", ["frozen", "update", "eval"])
def test_each_choice_gives_the_descent_its_own_gradient(statistics, backend):
    """Batch statistics for frozen and update, running ones for eval: against autograd at w + eps by hand."""
    model = network()
    train(SGD(model.parameters(), lr=0.1), model, 3)
    moved = copy.deepcopy(model)
    opt = SAM(model.parameters(), SGD, rho=0.5, lr=0.1, **backend)
    before = [w.detach().clone() for w in model.parameters()]
    nn.functional.cross_entropy(moved(examples()[0]), examples()[1]).backward()
    length = flat([w.grad for w in moved.parameters()]).norm()
    with torch.no_grad():
        for w in moved.parameters():
            w.add_(0.5 * w.grad / length)
    moved.zero_grad()
    moved[1].train(statistics != "eval")
    nn.functional.cross_entropy(moved(examples()[0]), examples()[1]).backward()
    opt.step(closure_of(opt, model, *examples(), statistics=statistics))
    for w, old, other in zip(model.parameters(), before, moved.parameters(), strict=True):
        assert_close(w.detach(), old - 0.1 * other.grad)


@all_backends
@pytest.mark.parametrize("statistics", ["frozen", "update", "eval"])
def test_an_error_in_the_second_pass_leaves_weights_and_layers_as_after_the_first(statistics, backend):
    model, reference = network(), network()
    opt = SAM(model.parameters(), SGD, rho=0.5, lr=0.1, **backend)
    inner = closure_of(opt, model, *examples(), statistics=statistics)

    def closure():
        if opt.in_second_pass:
            with second_pass(model, statistics), second_pass(model, statistics):
                raise KeyboardInterrupt
        return inner()

    with pytest.raises(KeyboardInterrupt):
        opt.step(closure)
    reference(examples()[0])
    assert_equal(model.state_dict(), reference.state_dict())
    assert model[1].training
    assert model[1].track_running_stats


@all_backends
def test_statistics_of_the_whole_batch_are_those_of_sam_and_of_one_shard_are_its_own(backend):
    """Per batch: every closure runs the whole batch and takes the loss of its shard. With one shard's examples equal to
    the other's, the batch statistics are the shard's, and both ways agree."""
    inputs, labels = examples(size=6)
    data = torch.cat([inputs, inputs]), torch.cat([labels, labels])
    ends = []
    for per_batch in (False, True):
        model = network()
        opt = SAM(model.parameters(), SGD, rho=0.5, lr=0.1, **backend)

        def closure(part, opt=opt, model=model, per_batch=per_batch):
            opt.zero_grad()
            counts = not opt.in_second_pass and (part == 0 or not per_batch)
            with nullcontext() if counts else second_pass(model):
                where = slice(6 * part, 6 * part + 6)
                logits = model(data[0])[where] if per_batch else model(data[0][where])
            loss = nn.functional.cross_entropy(logits, data[1][where])
            loss.backward()
            return loss

        opt.step([partial(closure, 0), partial(closure, 1)])
        ends.append(model)
        assert model[1].num_batches_tracked == (1 if per_batch else 2)
    # gradients differ: a shard's examples move the statistics of the whole batch by half as much
    assert not torch.equal(ends[0][0].weight, ends[1][0].weight)
    expected = [Statistics(6), Statistics(6)]
    activations = [network()[0](part).detach() for part in (inputs, data[0])]
    expected[0].count(activations[0])
    expected[0].count(activations[0])
    expected[1].count(activations[1])
    for model, statistics in zip(ends, expected, strict=True):
        statistics.assert_equal(model[1])
