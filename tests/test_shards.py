"""Shards: the closures against a loop by hand, the passes for all shards against the closures and torch.func."""

import copy
import gc
import math
import time
import warnings
import weakref
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from samlib.errors import InputError
from samlib.optim import ASAM, SAM
from samlib.perturbation import perturbation
from samlib.shards import Shards, _obstacle_to_compile

compiles = pytest.mark.skipif(_obstacle_to_compile() is not None, reason=str(_obstacle_to_compile()))

SGD = torch.optim.SGD
BATCH = 12


class Residual(nn.Module):
    """A block with batch norm of its own momentum, as in a ResNet."""

    def __init__(self, width):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width, momentum=0.3)

    def forward(self, x):
        return torch.relu(x + self.norm(self.conv(x)))


def network(norm="batch", dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    norms = {"batch": lambda: nn.BatchNorm2d(4), "group": lambda: nn.GroupNorm(2, 4), "none": nn.Identity}
    middle = [Residual(4)] if norm == "batch" else [nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)]
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), norms[norm](), *middle, *head).to(dtype)


def batch(seed=0, size=BATCH, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(size, 3, 5, 5, generator=generator, dtype=dtype)
    return inputs, torch.randint(3, (size,), generator=generator)


loss_fn = partial(functional.cross_entropy, label_smoothing=0.1)


def states(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_close(found, expected, tolerance=1e-12):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@contextmanager
def threads(number):
    """With one, nothing can overlap."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def one_thread():
    with threads(1):
        yield


@pytest.fixture(params=["vmap", "overlapped"])
def passes(request):
    with threads(2 if request.param == "overlapped" else 1):
        yield request.param


def train(passes, model, make, steps=3, weights=None, **options):
    """The losses of a few steps and the model's state after them."""
    opt = make(model.parameters(), SGD, lr=0.1, momentum=0.9, weight_decay=1e-3)
    losses = []
    for step in range(steps):
        shards = Shards(opt, model, loss_fn, *batch(step), passes=passes, **options)
        assert shards.passes == passes
        losses.append(opt.step(shards, weights=weights))
    return torch.stack(losses), states(model)


# ------------------------------------------------------------------------------------------------------- the closures


def test_closures_in_turn_are_a_loop_by_hand():
    by_hand, model = network(), network()
    opt = SAM(model.parameters(), SGD, rho=0.1, lr=0.1)
    inputs, targets = batch()
    total = [torch.zeros_like(w) for w in by_hand.parameters()]
    for start in range(0, BATCH, 3):
        x, y = inputs[start : start + 3], targets[start : start + 3]
        first = torch.autograd.grad(loss_fn(by_hand(x), y), list(by_hand.parameters()))
        norm = torch.sqrt(sum((g * g).sum() for g in first))
        moved = copy.deepcopy(by_hand)  # whose running statistics are thrown away
        with torch.no_grad():
            for w, g in zip(moved.parameters(), first, strict=True):
                w += 0.1 * g / norm
        second = torch.autograd.grad(loss_fn(moved(x), y), list(moved.parameters()))
        total = [t + g / 4 for t, g in zip(total, second, strict=True)]
    with torch.no_grad():
        for w, g in zip(by_hand.parameters(), total, strict=True):
            w -= 0.1 * g
    opt.step(Shards(opt, model, loss_fn, inputs, targets, num_shards=4))
    assert_close(states(model), states(by_hand))


@pytest.mark.parametrize(
    "size, options, expected",
    [
        (12, {"num_shards": 4}, [3, 3, 3, 3]),
        (12, {"shard_size": 4}, [4, 4, 4]),
        (12, {"shard_size": 5}, [5, 5, 2]),
        (12, {"shard_size": 40}, [12]),
        (5, {"num_shards": 5}, [1, 1, 1, 1, 1]),
        (7, {"num_shards": 1}, [7]),
    ],
)
def test_sizes_of_shards(size, options, expected):
    model = network("none")
    shards = Shards(SAM(model.parameters(), SGD, lr=0.1), model, loss_fn, *batch(size=size), **options)
    assert shards.sizes == expected
    assert len(shards) == len(expected)
    assert shards.weights == (None if len(set(expected)) == 1 else expected)


def test_sizes_differ_by_at_most_one_where_num_shards_does_not_divide_the_batch():
    model = network("none")
    opt = SAM(model.parameters(), SGD, lr=0.1)
    for size in range(1, 14):
        for num_shards in range(1, size + 1):
            sizes = Shards(opt, model, loss_fn, *batch(size=size), num_shards=num_shards).sizes
            assert sum(sizes) == size
            assert len(sizes) == num_shards
            assert max(sizes) - min(sizes) <= 1


def test_weights_of_ragged_shards_make_the_mean_over_examples():
    model = network("none")
    opt = SAM(model.parameters(), SGD, rho=0.0, lr=0.1)
    inputs, targets = batch()
    shards = Shards(opt, model, loss_fn, inputs, targets, shard_size=5)
    loss = opt.step(shards)
    expected = network("none")
    mean = loss_fn(expected(inputs), targets)
    mean.backward()
    assert_close(loss, mean.detach())
    assert_close([w.grad for w in model.parameters()], [w.grad for w in expected.parameters()])


@pytest.mark.parametrize("statistics, tracked", [("frozen", 4), ("update", 8), ("eval", 4)])
def test_statistics_act_in_the_second_pass_only(statistics, tracked):
    model = network()
    opt = SAM(model.parameters(), SGD, rho=0.1, lr=0.1)
    opt.step(Shards(opt, model, loss_fn, *batch(), num_shards=4, statistics=statistics))
    assert model[1].num_batches_tracked == tracked


def test_a_plain_optimizer_and_the_second_order_gradient_take_the_closures_too():
    model = network()
    shards = Shards(SGD(model.parameters(), lr=0.1), model, loss_fn, *batch(), num_shards=1)
    assert shards[0]() == loss_fn(network()(batch()[0]), batch()[1])
    assert all(w.grad is not None for w in model.parameters())
    opt = SAM(model.parameters(), SGD, rho=0.1, second_order=True, lr=0.1)
    before = states(model)
    opt.step(Shards(opt, model, loss_fn, *batch(), num_shards=2))
    assert opt.skipped_steps == 0
    assert not torch.equal(model[0].weight, before["0.weight"])


def test_a_finished_step_keeps_no_batch_alive(passes):
    model = network()
    opt = SAM(model.parameters(), SGD, rho=0.1, lr=0.1)
    inputs, targets = batch()
    kept = weakref.ref(inputs)
    gc.disable()  # a cycle would wait for the collector, and a GPU's memory with it
    try:
        opt.step(Shards(opt, model, loss_fn, inputs, targets, num_shards=2, passes="sequential"))
        opt.step(Shards(opt, model, loss_fn, inputs, targets, num_shards=2, passes=passes))
        del inputs
        assert kept() is None
    finally:
        gc.enable()


# --------------------------------------------------------------------------------------------- passes for all shards

METHODS = {
    "SAM": partial(SAM, rho=0.1),
    "ASAM": partial(ASAM, rho=0.5),
    "ASAM on matrices": partial(ASAM, rho=0.5, scale_filter=lambda w: w.ndim > 1),
    "p = inf": partial(SAM, rho=0.01, p=math.inf),
    "p = 3": partial(SAM, rho=0.1, p=3.0),
    "unnormalised": partial(SAM, rho=0.1, normalize=False),
}


@pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("norm", ["batch", "group", "none"])
def test_steps_are_the_closures_steps(make, norm, passes):
    expected = train("sequential", network(norm), make, num_shards=4)
    assert_close(train(passes, network(norm), make, num_shards=4), expected)


@pytest.mark.parametrize("statistics", ["frozen", "update", "eval"])
@pytest.mark.parametrize("weights", [None, [4.0, 1.0, 1.0, 2.0]], ids=["equal", "weighted"])
def test_running_statistics_end_as_the_closures_leave_them(statistics, weights, passes):
    options = {"make": METHODS["SAM"], "num_shards": 4, "statistics": statistics, "weights": weights}
    expected = train("sequential", network(), **options)
    found = train(passes, network(), **options)
    assert found[1]["1.num_batches_tracked"] == (24 if statistics == "update" else 12)
    assert_close(found, expected)


def test_a_batch_norm_layer_called_twice_and_one_in_eval_mode_and_one_without_statistics(passes):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.shared = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.2)
            self.fixed, self.bare = nn.BatchNorm2d(4), nn.BatchNorm2d(4, track_running_stats=False)
            self.unused, self.last = nn.BatchNorm2d(4), nn.Linear(36, 3)

        def forward(self, x):
            x = self.shared(torch.tanh(self.shared(self.first(x))))
            return self.last(self.bare(self.fixed(x)).flatten(1))

    torch.manual_seed(0)
    model = Odd().double()
    model.fixed.eval()
    twin = copy.deepcopy(model)
    for statistics in ("frozen", "update", "eval"):
        options = {"make": METHODS["SAM"], "num_shards": 3, "statistics": statistics}
        expected = train("sequential", model, **options)
        assert_close(train(passes, twin, **options), expected)
    assert twin.shared.num_batches_tracked == 2 * 3 * 3 * 4
    assert twin.unused.num_batches_tracked == 0


class Operations(TorchDispatchMode):
    """(name, arguments) of each operation."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found.append((func.overloadpacket.__name__, args))
        return func(*args, **(kwargs or {}))


def test_the_batch_norm_of_all_shards_is_one_call_that_knows_the_weights():
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(18, 3)).to(torch.float64)
    opt = SAM(model.parameters(), SGD, lr=0.1)
    shards = Shards(opt, model, loss_fn, *batch(), num_shards=4, passes="vmap")
    with Operations() as operations:
        opt.step(shards)
    calls = [args for name, args in operations.found if name == "native_batch_norm"]
    assert [args[0].shape[1] for args in calls] == [4 * 2, 4 * 2]  # one a pass
    for x, weight, bias, *_ in calls:
        assert weight.shape == bias.shape == x.shape[1:2]


class Functional(nn.Module):
    """Batch norm by torch's function, with what a layer may leave out, and statistics that no layer holds."""

    def __init__(self, statistics, affine, training):
        super().__init__()
        self.linear = nn.Linear(75, 3)
        self.register_buffer("mean", torch.tensor([0.1, 0.2, 0.3]) if statistics else None)
        self.register_buffer("var", torch.tensor([1.0, 2.0, 3.0]) if statistics else None)
        self.gain = nn.Parameter(torch.tensor([0.5, 1.0, 2.0])) if affine else None
        self.training_ = training

    def forward(self, x):
        x = self.linear(x.flatten(1))
        out = functional.batch_norm(x, self.mean, self.var, self.gain, training=self.training_, eps=0.1)
        constant = torch.arange(6.0).to(out).view(2, 3)  # that does not depend on the shard
        return out + functional.batch_norm(constant, None, None, self.gain, training=True).sum()


@pytest.mark.parametrize(
    "statistics, affine, training", [(False, True, True), (True, True, False), (False, False, True)]
)
def test_batch_norm_as_a_function(statistics, affine, training, passes):
    torch.manual_seed(0)
    model = Functional(statistics, affine, training).to(torch.float64)
    in_turn, at_once = (train(way, copy.deepcopy(model), SAM, num_shards=4) for way in ("sequential", passes))
    assert_close(at_once, in_turn)


def test_statistics_that_no_layer_holds_are_not_lost_without_a_word():
    model = Functional(statistics=True, affine=True, training=True).to(torch.float64)
    opt = SAM(model.parameters(), SGD, lr=0.1)
    with pytest.raises(RuntimeError, match="running_mean") as caught:
        opt.step(Shards(opt, model, loss_fn, *batch(), num_shards=4, passes="vmap"))
    assert "passes='sequential'" in caught.value.__notes__[0]
    opt.step(Shards(opt, model, loss_fn, *batch(), num_shards=4, passes="sequential"))


def test_batch_norm_as_the_whole_model(passes):
    x, y = torch.randn(8, 3, dtype=torch.float64), torch.zeros(8, 3, dtype=torch.float64)
    model = nn.BatchNorm1d(3).double()
    twin = copy.deepcopy(model)
    opt, other = (SAM(one.parameters(), SGD, rho=0.1, lr=0.1) for one in (model, twin))
    opt.step(Shards(opt, model, functional.mse_loss, x, y, num_shards=2, passes="sequential"))
    other.step(Shards(other, twin, functional.mse_loss, x, y, num_shards=2, passes=passes))
    assert_close(states(twin), states(model))


def test_shards_of_one_example_have_the_gradients_of_torch_func(passes):
    model = network("group")
    inputs, targets = batch()
    opt = SAM(model.parameters(), SGD, lr=0.1)
    params = list(model.parameters())
    losses, found = Shards(opt, model, loss_fn, inputs, targets, shard_size=1, passes=passes).gradients_at_w(params)

    def loss(weights, x, y):
        return loss_fn(functional_call(model, weights, (x[None],)), y[None])

    weights = {name: w.detach() for name, w in model.named_parameters()}
    expected = vmap(grad(loss), in_dims=(None, 0, 0))(weights, inputs, targets)
    assert_close([torch.stack(list(of_all)) for of_all in found], list(expected.values()))
    assert_close(losses, loss_fn(model(inputs), targets, reduction="none").detach())


def test_identical_shards_are_sam(passes):
    x, y = batch(size=3)
    model, expected = network(), network()
    opt, sam = (SAM(one.parameters(), SGD, rho=0.1, lr=0.1) for one in (model, expected))
    shards = Shards(opt, model, loss_fn, x.repeat(4, 1, 1, 1), y.repeat(4), num_shards=4, passes=passes)
    opt.step(shards)
    sam.step(Shards(sam, expected, loss_fn, x, y, num_shards=1, passes="sequential"))
    assert_close(list(model.parameters()), list(expected.parameters()))


def test_frozen_tensors_and_tensors_that_the_loss_does_not_reach(passes):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.spare = network(), nn.Linear(2, 2).double()
            self.body[0].weight.requires_grad_(False)

        def forward(self, x):
            return self.body(x)

    torch.manual_seed(0)
    model = Net()
    twin, before = copy.deepcopy(model), states(model)
    expected = train("sequential", model, METHODS["ASAM"], num_shards=4)
    assert_close(train(passes, twin, METHODS["ASAM"], num_shards=4), expected)
    assert torch.equal(twin.spare.weight, before["spare.weight"])  # not even decayed
    assert twin.spare.weight.grad is None
    assert twin.body[0].weight.grad is None


def test_a_tensor_that_is_not_perturbed_and_tied_tensors(passes):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))

    torch.manual_seed(0)
    model = Tied().double()
    twin = copy.deepcopy(model)
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)

    def made(one):
        rest = [w for name, w in one.named_parameters() if not name.startswith("c")]
        return SAM([{"params": rest}, {"params": one.c.parameters(), "rho": 0.0}], SGD, rho=0.2, lr=0.1)

    opt, other = made(model), made(twin)
    opt.step(Shards(opt, model, functional.mse_loss, x, y, num_shards=3, passes="sequential"))
    shards = Shards(other, twin, functional.mse_loss, x, y, num_shards=3, passes=passes)
    perturbed, still = ([*group["params"]] for group in other.param_groups)
    _, grads = shards.gradients_at_w(perturbed)
    eps = [perturbation(perturbed, one, 0.2) for one in zip(*grads, strict=True)]
    eps = [torch.stack(each) for each in zip(*eps, strict=True)]
    found = shards.mean_gradients([*perturbed, *still], [*eps, None, None])
    assert_close(found, [w.grad for group in opt.param_groups for w in group["params"]])


def test_channels_last_and_a_loss_that_is_a_module(passes):
    model, twin = network().to(memory_format=torch.channels_last), network()
    inputs, targets = batch()
    opt, other = (SAM(one.parameters(), SGD, rho=0.1, lr=0.1) for one in (model, twin))
    last = inputs.to(memory_format=torch.channels_last)
    loss = opt.step(Shards(opt, model, nn.CrossEntropyLoss(), last, targets, num_shards=4, passes=passes))
    in_turn = Shards(other, twin, functional.cross_entropy, inputs, targets, num_shards=4, passes="sequential")
    expected = other.step(in_turn)
    assert_close((loss, states(model)), (expected, states(twin)))


def test_bfloat16_weights_are_perturbed_as_in_place(passes):
    model, twin = (network("none", torch.bfloat16) for _ in range(2))
    inputs, targets = batch(dtype=torch.bfloat16)
    opt, other = (SAM(one.parameters(), SGD, rho=0.1, lr=0.1) for one in (model, twin))
    opt.step(Shards(opt, model, loss_fn, inputs, targets, num_shards=2, passes="sequential"))
    other.step(Shards(other, twin, loss_fn, inputs, targets, num_shards=2, passes=passes))
    grads = [[w.grad.float() for w in one.parameters()] for one in (twin, model)]
    torch.testing.assert_close(*grads, rtol=0.05, atol=2e-3)


def test_dropout_draws_a_mask_for_each_shard(passes):
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(75, 3)).double()
    x = batch(size=1)[0].repeat(8, 1, 1, 1)
    opt = SAM(model.parameters(), SGD, lr=0.1)
    shards = Shards(opt, model, loss_fn, x, torch.zeros(8, dtype=torch.long), num_shards=8, passes=passes)
    losses, _ = shards.gradients_at_w(list(model.parameters()))
    assert len(losses.unique()) == 8


def test_passes_leave_weights_gradients_and_modes(passes):
    model = network()
    model[0].weight.requires_grad_(False)
    model[1].weight.grad = torch.ones_like(model[1].weight)
    opt = SAM(model.parameters(), SGD, lr=0.1)
    weights = {name: (w, w.clone(), w._version, w.grad, w.requires_grad) for name, w in model.named_parameters()}
    attributes = [(module.training, getattr(module, "track_running_stats", None)) for module in model.modules()]
    params = [w for w in model.parameters() if w.requires_grad]
    for statistics in ("frozen", "update", "eval"):
        shards = Shards(opt, model, loss_fn, *batch(), num_shards=4, statistics=statistics, passes=passes)
        losses, grads = shards.gradients_at_w(params)
        means = shards.mean_gradients(params, grads)
    assert not any(t.requires_grad for t in (losses, *means, *(one for of_all in grads for one in of_all)))
    now = dict(model.named_parameters())
    for name, (w, value, version, grad_, requires_grad) in weights.items():
        assert now[name] is w
        assert torch.equal(w, value)
        assert w._version == version
        assert w.grad is grad_
        assert w.requires_grad == requires_grad
    assert attributes == [(module.training, getattr(module, "track_running_stats", None)) for module in model.modules()]


def test_an_exception_leaves_the_model_and_says_how_to_do_without(passes):
    model = network()
    opt = SAM(model.parameters(), SGD, lr=0.1)
    before, params = states(model), list(model.parameters())

    def with_item(outputs, targets):
        return loss_fn(outputs, targets) / outputs.norm().item()

    def raises(outputs, targets):
        raise RuntimeError("of the model")

    shards = Shards(opt, model, with_item if passes == "vmap" else raises, *batch(), num_shards=4, passes=passes)
    with pytest.raises(RuntimeError) as caught:
        shards.gradients_at_w(params)
    assert "passes='sequential'" in caught.value.__notes__[0]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    shards.loss_fn = loss_fn
    _, grads = shards.gradients_at_w(params)
    shards.loss_fn = raises
    with pytest.raises(RuntimeError):
        shards.mean_gradients(params, grads)
    assert all(w is now for w, now in zip(params, model.parameters(), strict=True))
    assert model[1].track_running_stats
    shards.loss_fn = partial(functional.cross_entropy, reduction="none")
    with pytest.raises(InputError, match="mean over the examples"):
        shards.gradients_at_w(params)


# --------------------------------------------------------------------------------------------------- overlapped passes


class Slow(torch.autograd.Function):
    """Nothing, with a backward pass that takes as long as it is told."""

    @staticmethod
    def forward(ctx, x, seconds):
        ctx.seconds = seconds
        return x.clone()

    @staticmethod
    def backward(ctx, grad_output):
        time.sleep(ctx.seconds)
        return grad_output, None


def test_overlapped_steps_are_the_same_to_the_last_bit_wherever_a_backward_ran():
    def trained(seconds):
        model, delays = network(dtype=torch.float32), iter(seconds)
        model[0].register_forward_hook(lambda module, args, output: Slow.apply(output, next(delays)))
        opt = SAM(model.parameters(), SGD, rho=0.1, lr=0.1, momentum=0.9)
        losses = [
            opt.step(Shards(opt, model, loss_fn, *batch(step, dtype=torch.float32), num_shards=4, passes="overlapped"))
            for step in range(3)
        ]
        return torch.stack(losses), list(states(model).values())

    with threads(2):
        expected = trained([0.0] * 24)
        for seconds in ([0.02, 0, 0, 0], [0, 0.02, 0, 0.01], [0, 0, 0.02, 0]):
            found = trained(seconds * 6)
            assert torch.equal(found[0], expected[0])
            assert all(map(torch.equal, found[1], expected[1]))


def test_overlapped_shards_may_be_of_different_sizes():
    model, twin = network(), network()
    opt, other = (SAM(one.parameters(), SGD, rho=0.1, lr=0.1) for one in (model, twin))
    for step in range(3):
        cut = {"shard_size": 5, "statistics": "update"}
        expected = opt.step(Shards(opt, model, loss_fn, *batch(step), **cut, passes="sequential"))
        with threads(2):
            found = other.step(Shards(other, twin, loss_fn, *batch(step), **cut, passes="overlapped"))
        assert_close(found, expected)
    assert_close(states(twin), states(model))


def test_overlapped_passes_under_autocast():
    model = nn.Sequential(nn.Flatten(), nn.Linear(75, 40), nn.ReLU(), nn.Linear(40, 3))
    twin = copy.deepcopy(model)
    inputs, targets = batch(dtype=torch.float32)
    opt, other = (SAM(one.parameters(), SGD, rho=0.1, lr=0.1) for one in (model, twin))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = opt.step(Shards(opt, model, loss_fn, inputs, targets, num_shards=4, passes="sequential"))
        with threads(2):
            found = other.step(Shards(other, twin, loss_fn, inputs, targets, num_shards=4, passes="overlapped"))
    assert_close(found, expected)  # in float32 the losses would differ
    grads = [[w.grad for w in one.parameters()] for one in (twin, model)]
    torch.testing.assert_close(*grads, rtol=0.05, atol=2e-3)


class Branches(nn.Module):
    """A tensor that some inputs reach, and two whose gradient autograd returns as one tensor."""

    def __init__(self):
        super().__init__()
        self.often, self.sometimes = nn.Linear(2, 1), nn.Linear(2, 1)
        self.a, self.b = nn.Parameter(torch.ones(3, 1)), nn.Parameter(torch.ones(3, 1))

    def forward(self, x):
        out = self.often(x) + self.a + self.b
        return out + self.sometimes(x) if x.sum() > 0 else out


def test_tensors_that_only_some_shards_reach_and_gradients_that_are_one_tensor():
    torch.manual_seed(0)
    model = Branches().double()
    twin = copy.deepcopy(model)
    x = torch.tensor([[1.0, 1.0]] * 3 + [[-1.0, -2.0]] * 3 + [[3.0, 1.0]] * 3, dtype=torch.float64)
    y = torch.linspace(-1, 1, 9, dtype=torch.float64)[:, None]
    opt, other = (SAM(one.parameters(), SGD, rho=0.2, lr=0.1) for one in (model, twin))
    opt.step(Shards(opt, model, functional.mse_loss, x, y, num_shards=3, passes="sequential"))
    with threads(2):
        other.step(Shards(other, twin, functional.mse_loss, x, y, num_shards=3, passes="overlapped"))
    assert_close(states(twin), states(model))


def test_draws_of_overlapped_passes_are_those_of_the_generator_in_the_order_of_the_shards():
    def trained():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(75, 3)).double()
        opt = SAM(model.parameters(), SGD, rho=0.1, lr=0.1)
        for step in range(5):
            opt.step(Shards(opt, model, loss_fn, *batch(step), num_shards=4, passes="overlapped"))
        return states(model)

    with threads(2):
        first = trained()
        assert all(torch.equal(value, first[name]) for name, value in trained().items())


def test_replayed_masks_take_the_closures():
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(75, 3)).double()
    twin = copy.deepcopy(model)
    opt, other = (SAM(one.parameters(), SGD, rho=0.1, lr=0.1) for one in (model, twin))
    torch.manual_seed(0)
    opt.step(Shards(opt, model, loss_fn, *batch(), num_shards=4, passes="sequential"), replay_rng=True)
    torch.manual_seed(0)
    with threads(2):
        other.step(Shards(other, twin, loss_fn, *batch(), num_shards=4), replay_rng=True)
    assert_close(states(twin), states(model))


class Checkpointed(nn.Module):
    """Computes an activation again in the backward pass, when the passes of other shards have other weights."""

    def __init__(self, reentrant):
        super().__init__()
        self.body, self.head = nn.Linear(75, 6), nn.Linear(6, 3)
        self.reentrant = reentrant

    def forward(self, x):
        x = x.flatten(1).requires_grad_()
        return self.head(checkpoint(lambda y: torch.tanh(self.body(torch.sin(y))), x, use_reentrant=self.reentrant))


@pytest.mark.parametrize("num_threads", [1, 2], ids=["vmap", "overlapped"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_passes_that_fail_give_way_to_the_closures_with_one_warning(reentrant, num_threads):
    torch.manual_seed(0)
    model = Checkpointed(reentrant).double()
    twin = copy.deepcopy(model)
    opt, other = (METHODS["ASAM"](one.parameters(), SGD, lr=0.1, momentum=0.9) for one in (model, twin))
    num_shards, named = (12, "vmap") if num_threads == 1 else (4, "overlapped")
    with threads(num_threads):
        for step in range(3):
            shards = Shards(other, twin, loss_fn, *batch(step), num_shards=num_shards)
            assert shards.passes == ("sequential" if step else named)
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                found = other.step(shards)
            assert [f"passes='{named}' failed" in str(one.message) for one in said] == ([] if step else [True])
            assert all(one.filename == __file__ for one in said)
            assert shards.passes == "sequential"
            in_turn = Shards(opt, model, loss_fn, *batch(step), num_shards=num_shards, passes="sequential")
            assert_close(found, opt.step(in_turn))
        assert_close(states(twin), states(model))
        with pytest.raises(RuntimeError) as caught:
            other.step(Shards(other, twin, loss_fn, *batch(), num_shards=num_shards, passes=named))
    assert caught.value.__notes__ == [f"This came from passes='{named}' of Shards: passes='sequential' does without."]


def both_ways(model, inputs, targets, passes, loss_of=lambda model: loss_fn, steps=3, **options):
    """(states, warnings) after steps of the closures, and after steps of `passes`; None: of what is chosen."""
    found = []
    for way in ("sequential", passes):
        one = copy.deepcopy(model)
        opt = SAM(one.parameters(), SGD, rho=0.2, lr=0.1, momentum=0.9)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for _ in range(steps):
                opt.step(Shards(opt, one, loss_of(one), inputs, targets, num_shards=4, passes=way, **options))
        assert [name for name, _ in one.named_parameters()] == [name for name, _ in model.named_parameters()]
        found.append((states(one), [str(one.message) for one in said]))
    return found


class Shared(nn.Module):
    """One layer with two names."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(75, 75)
        self.features = nn.Sequential(self.linear, nn.Tanh(), self.linear, nn.BatchNorm1d(75))
        self.head = nn.Linear(75, 3)

    def forward(self, x):
        return self.head(self.features(self.linear(x.flatten(1))))


class Listed(nn.Module):
    """A weight that a list holds, too, and that is taken from there."""

    def __init__(self):
        super().__init__()
        self.weight, self.head = nn.Parameter(torch.randn(75, 6) / 8), nn.Linear(6, 3)
        self.weights = [self.weight]

    def forward(self, x):
        return self.head(torch.tanh(x.flatten(1) @ self.weights[0]))

    def __deepcopy__(self, memo):
        new = Listed().double()
        new.load_state_dict(self.state_dict())
        return new


def test_a_layer_with_two_names(passes):
    torch.manual_seed(0)
    (expected, _), (found, _) = both_ways(Shared().double(), *batch(), passes)
    assert_close(found, expected)


def penalised(model):
    def loss(outputs, targets):
        return loss_fn(outputs, targets) + 0.1 * sum(w.square().sum() for w in model.parameters())

    return loss


def headless(model):
    return lambda outputs, targets: loss_fn(model.linear(outputs.repeat(1, 25))[:, :3], targets)


@pytest.mark.parametrize("loss_of", [penalised, headless])
def test_overlapped_losses_may_use_the_weights(loss_of):
    torch.manual_seed(0)
    with threads(2):
        (expected, _), (found, _) = both_ways(Shared().double(), *batch(), "overlapped", loss_of)
    assert_close(found, expected)


@pytest.mark.parametrize("loss_of", [penalised, headless])
def test_under_vmap_losses_that_use_the_weights_are_refused(loss_of):
    model = Shared().double()
    opt = SAM(model.parameters(), SGD, lr=0.1)
    with pytest.raises(RuntimeError, match="by another way than the modules that hold them"):
        opt.step(Shards(opt, model, loss_of(model), *batch(), num_shards=4, passes="vmap"))


def test_weights_that_nothing_can_stand_in_for_are_noticed(passes):
    torch.manual_seed(0)
    model = Listed().double()
    with pytest.raises(RuntimeError, match="by another way than the modules that hold them"):
        both_ways(model, *batch(), passes)
    with threads(2):
        (expected, _), (found, said) = both_ways(model, *batch(), None)
    assert_close(found, expected)
    assert ["by another way than the modules that" in message for message in said] == [True]


class Sometimes(nn.Module):
    """A block that only some inputs enter."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(75, 6), nn.BatchNorm1d(6, momentum=0.3), nn.Linear(6, 3)

    def forward(self, x):
        x = self.first(x.flatten(1))
        return self.last(self.norm(x) if x.sum() > 0 else x)


@pytest.mark.parametrize("statistics", ["frozen", "update", "eval"])
def test_batch_norm_that_only_some_shards_reach(statistics):
    torch.manual_seed(0)
    model = Sometimes().double()
    with threads(2):
        (expected, _), (found, _) = both_ways(model, *batch(), "overlapped", statistics=statistics)
    assert 0 < expected["norm.num_batches_tracked"] < (24 if statistics == "update" else 12)
    assert_close(found, expected)


class MaxNorm(nn.Linear):
    def forward(self, x):
        self.weight.data = torch.renorm(self.weight.data, 2, 0, 0.5)
        return super().forward(x)


class Doubled(torch.autograd.Function):
    """Twice the linear layer's output, whose own backward pass adds to the gradients of the layer."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer, ctx.x = layer, x.detach()
        return 2 * layer(x)

    @staticmethod
    def backward(ctx, grad_output):
        x = ctx.x.requires_grad_()
        with torch.enable_grad():
            (2 * ctx.layer(x)).backward(grad_output)
        return x.grad, None


class Reversible(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(75, 6), nn.Linear(6, 3)

    def forward(self, x):
        return Doubled.apply(self.first(x.flatten(1)), self.second)


class Center(nn.Module):
    """Outputs less a running mean, which it keeps in one of three ways."""

    def __init__(self, way):
        super().__init__()
        self.linear, self.way = nn.Linear(75, 3), way
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("var", torch.ones(3))

    def forward(self, x):
        x = self.linear(x.flatten(1))
        if self.way == "function":
            return functional.batch_norm(x, self.mean, self.var, training=True)
        mean = x.detach().mean(0)
        if self.way == "data":
            self.mean.data.mul_(0.9).add_(mean, alpha=0.1)
        else:
            self.mean = 0.9 * self.mean + 0.1 * mean
        return x - self.mean


STATEFUL = {
    "max norm": lambda: nn.Sequential(nn.Flatten(), MaxNorm(75, 3)),
    "spectral norm": lambda: nn.Sequential(nn.Flatten(), nn.utils.parametrizations.spectral_norm(nn.Linear(75, 3))),
    "input": lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Flatten(), nn.Dropout(0.2), nn.Linear(75, 3)),
    "reversible": Reversible,
    "batch norm as a function": partial(Center, "function"),
    "data": partial(Center, "data"),
    "another tensor": partial(Center, "another"),
}


@pytest.mark.parametrize("make", STATEFUL.values(), ids=STATEFUL)
def test_passes_that_change_the_model_or_the_inputs_leave_the_step_to_the_closures(make):
    torch.manual_seed(0)
    model, (inputs, targets) = make().double(), batch()
    found = []
    for number in (1, 2):
        one = copy.deepcopy(model)
        opt = SAM(one.parameters(), SGD, rho=0.2, lr=0.1, momentum=0.9)
        torch.manual_seed(1)
        with threads(number), warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for _ in range(3):
                opt.step(Shards(opt, one, loss_fn, inputs.clone(), targets, num_shards=4))
        found.append(states(one))
        assert len(said) == number - 1
    assert_close(found[1], found[0])


@pytest.mark.parametrize("name", ["max norm", "spectral norm", "input", "reversible", "another tensor"])
def test_passes_asked_for_by_name_that_change_something_are_refused(name):
    model = STATEFUL[name]().double()
    opt = SAM(model.parameters(), SGD, lr=0.1)
    with threads(2), pytest.raises(RuntimeError, match="a pass changes a parameter, a buffer or an input"):
        opt.step(Shards(opt, model, loss_fn, *batch(), num_shards=4, passes="overlapped"))


def test_gradients_outside_of_the_optimiser_are_those_of_the_closures():
    found = []
    for number in (1, 2):
        model = network()
        opt = SAM(model[:-1].parameters(), SGD, rho=0.1, lr=0.1)
        with threads(number), warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            opt.step(Shards(opt, model, loss_fn, *batch(), num_shards=4))
        assert ["the optimiser does not train" in str(one.message) for one in said] == [True] * (number - 1)
        found.append([model[-1].weight.grad, states(model)])
    assert_close(*found)


def test_a_loss_knows_in_which_pass_it_is(passes):
    model = network()
    opt = SAM(model.parameters(), SGD, rho=0.1, lr=0.1)
    known = []

    def loss(outputs, targets):
        known.append((opt.at_perturbed_point, opt.in_second_pass))
        return loss_fn(outputs, targets)

    opt.step(Shards(opt, model, loss, *batch(), num_shards=4, passes=passes))
    times = 1 if passes == "vmap" else 4
    assert known == [(False, False)] * times + [(True, True)] * times
    assert not opt.at_perturbed_point


@pytest.mark.parametrize("statistics", ["frozen", "update", "eval"])
def test_a_second_pass_that_fails_leaves_the_step_to_the_closures(statistics):
    found = []
    for number in (1, 2):
        model = network()
        opt = SAM(model.parameters(), SGD, rho=0.1, lr=0.1, momentum=0.9)

        def loss(outputs, targets, opt=opt):
            return loss_fn(Slow.apply(outputs, 0) if opt.in_second_pass else outputs, targets)

        with threads(number), warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for step in range(2):
                shards = Shards(opt, model, loss, *batch(step), num_shards=4, statistics=statistics)
                value = opt.step(shards)
        assert len(said) == number - 1
        assert all(one.filename == __file__ for one in said)
        found.append([value, states(model)])
    assert_close(*found)


def test_where_vmap_fails_passes_overlap():
    model = network("none")
    opt = SAM(model.parameters(), SGD, lr=0.1)

    def penalised(outputs, targets):
        return loss_fn(outputs, targets) + 0.1 * sum(w.square().sum() for w in model.parameters())

    chosen = []
    with threads(2), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(3):
            shards = Shards(opt, model, penalised, *batch(), num_shards=12)
            chosen.append(shards.passes)
            opt.step(shards)
    assert chosen == ["vmap", "overlapped", "overlapped"]
    assert len(said) == 1


def test_batch_norm_that_a_pass_switches_to_eval_sees_the_statistics(passes):
    class Attacked(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.last = nn.BatchNorm1d(75), nn.Linear(75, 3)

        def forward(self, x):
            self.norm.eval()
            fixed = self.norm(x.flatten(1))
            self.norm.train()
            return self.last(fixed) + 0 * self.norm(fixed).sum()

    torch.manual_seed(0)
    model = Attacked().double()
    model.norm.running_var.fill_(4.0)
    opt = SAM(model.parameters(), SGD, lr=0.1)
    shards = Shards(opt, model, loss_fn, *batch(), num_shards=2, passes=passes)
    losses, _ = shards.gradients_at_w(list(model.parameters()))
    model.norm.running_mean.zero_()
    model.norm.running_var.fill_(4.0)
    assert_close(losses[0], shards[0]().detach())


class Plain(nn.Module):
    """Holds what has no address or no version."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(75, 3)
        self.register_buffer("adjacency", torch.eye(75).to_sparse())
        with torch.inference_mode():
            self.register_buffer("gain", torch.full((3,), 2.0))

    def forward(self, x):
        return self.linear((self.adjacency @ x.flatten(1).T).T) * self.gain.clone()


def test_buffers_of_other_kinds_are_no_reason_to_warn():
    model = Plain()
    opt = SAM(model.parameters(), SGD, lr=0.1)
    with threads(2), warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            shards = Shards(opt, model, loss_fn, *batch(dtype=torch.float32), num_shards=4)
            opt.step(shards)
    assert shards.passes == "overlapped"


def test_parameters_that_share_memory_take_the_closures():
    model = nn.Sequential(nn.Flatten(), nn.Linear(75, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[3].weight.data = model[2].weight.data.t()
    with threads(2):
        assert made(model, num_shards=4).passes == "sequential"
        with pytest.raises(InputError, match="two parameters share memory"):
            made(model, num_shards=4, passes="overlapped")


def test_backward_passes_in_python_are_overlapped_only_by_name():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(75, 3)

        def forward(self, x):
            return Slow.apply(self.linear(x.flatten(1)), 0)

    with threads(2):
        (expected, _), (found, said) = both_ways(Net().double(), *batch(), "overlapped", steps=1)
        assert_close(found, expected)
        assert not said
        (expected, _), (found, said) = both_ways(Net().double(), *batch(), None)
    assert_close(found, expected)
    assert "SlowBackward may use the model in its backward pass" in said[0]
    assert len(said) == 1


def test_a_sparse_gradient_is_refused_whatever_is_chosen():
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Flatten(), nn.Linear(6, 2))
    opt = SAM(model.parameters(), SGD, lr=0.1)
    inputs, targets = torch.randint(5, (8, 2)), torch.randint(2, (8,))
    for given in (None, "overlapped", "sequential"):
        with threads(2), pytest.raises(InputError, match="a gradient is sparse"):
            opt.step(Shards(opt, model, loss_fn, inputs, targets, num_shards=2, passes=given))


def test_weights_that_the_optimiser_does_not_train_are_left_alone(passes):
    found = []
    for way in ("sequential", passes):
        model = network()
        opt = SAM(model[-1].parameters(), SGD, rho=0.1, lr=0.1)
        opt.step(Shards(opt, model, loss_fn, *batch(), num_shards=4, passes=way))
        found.append(states(model))
    assert_close(*found)


def test_fewer_threads_at_the_step_than_before_are_no_error():
    model, twin = network(), network()
    opt, other = (SAM(one.parameters(), SGD, rho=0.1, lr=0.1) for one in (model, twin))
    opt.step(Shards(opt, model, loss_fn, *batch(), num_shards=4, passes="sequential"))
    with threads(2):
        shards = Shards(other, twin, loss_fn, *batch(), num_shards=4, passes="overlapped")
    other.step(shards)
    assert_close(states(twin), states(model))


def test_hooks_on_saved_tensors_around_a_step_take_the_closures():
    model = network()
    opt = SAM(model.parameters(), SGD, lr=0.1)
    saved = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)
    with threads(2), hooks, pytest.warns(UserWarning, match="hooks on saved tensors"):
        opt.step(Shards(opt, model, loss_fn, *batch(), num_shards=4))
    assert saved


def test_a_loss_with_one_axis_of_one_entry_is_taken():
    model = network()
    with threads(2):
        (expected, _), (found, said) = both_ways(model, *batch(), None, lambda _: lambda *given: loss_fn(*given)[None])
    assert_close(found, expected)
    assert not said


def test_an_error_of_the_model_comes_out_of_the_closures():
    model = network()
    opt = SAM(model.parameters(), SGD, lr=0.1)

    def raises(outputs, targets):
        raise ZeroDivisionError("of the model")

    with threads(2), pytest.warns(UserWarning, match="of the model"), pytest.raises(ZeroDivisionError) as caught:
        opt.step(Shards(opt, model, raises, *batch(), num_shards=4))
    assert not hasattr(caught.value, "__notes__")
    no_mean = partial(functional.cross_entropy, reduction="none")
    with threads(2), pytest.raises(InputError, match="mean over the examples"):
        opt.step(Shards(opt, model, no_mean, *batch(), num_shards=4, passes="overlapped"))


# --------------------------------------------------------------------------------------------------------- compilation


def tiny(norm):
    """Compiles quickly."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 2, 3, bias=False), norm, nn.Flatten(), nn.Linear(18, 3)).double()


@pytest.mark.parametrize("passes", [pytest.param("vmap", marks=compiles), "sequential", "overlapped"], indirect=True)
@pytest.mark.parametrize("statistics", ["frozen", "update", "eval"])
def test_compiled_steps_are_the_closures_steps_and_compile_once(statistics, passes):
    model, twin = tiny(nn.BatchNorm2d(2)), tiny(nn.BatchNorm2d(2))
    opt = METHODS["ASAM"](model.parameters(), SGD, lr=0.1, momentum=0.9)
    other = METHODS["ASAM"](twin.parameters(), SGD, lr=0.1, momentum=0.9, flat=True, fused=True)

    def step(seed, stance):
        options = {"num_shards": 4, "statistics": statistics}
        expected = opt.step(Shards(opt, model, loss_fn, *batch(seed), **options, passes="sequential"))
        with torch.compiler.set_stance(stance):  # a new object each step: what is compiled must not be the object's
            own = {"passes": passes, "compile": "aot_eager"}
            shards = Shards(other, twin, lambda *outputs: loss_fn(*outputs), *batch(seed), **options, **own)
            assert shards.passes == passes
            assert_close(other.step(shards), expected)
        assert_close(states(twin), states(model))

    step(0, "default")
    for seed in range(1, 5):
        step(seed, "fail_on_recompile")


@compiles
def test_compiled_passes_with_frozen_and_unreached_tensors_and_another_batch_size():
    model = nn.ModuleDict({"body": tiny(nn.GroupNorm(1, 2)), "spare": nn.Linear(2, 2)}).double()
    model.forward = lambda x: model["body"](x)
    model["body"][0].weight.requires_grad_(False)
    opt, params = SAM(model.parameters(), SGD, lr=0.1), [w for w in model.parameters() if w.requires_grad]
    for size in (12, 8):
        means = []
        for compiled in (False, "aot_eager"):
            shards = Shards(opt, model, loss_fn, *batch(size=size), num_shards=4, passes="vmap", compile=compiled)
            _, grads = shards.gradients_at_w(params)
            means.append(shards.mean_gradients(params, grads, [0.1, 0.2, 0.3, 0.4]))
        assert means[1][-1] is None
        assert_close(*[mean[:-2] for mean in means])


@compiles
def test_what_is_compiled_goes_with_its_model_and_does_not_count_against_others():
    alive = []
    with torch._dynamo.config.patch(recompile_limit=1):  # above the limit torch raises
        for width in (1, 2, 3):
            model = nn.Sequential(nn.Flatten(), nn.Linear(75, width), nn.Linear(width, 3)).double()
            opt = SAM(model.parameters(), SGD, lr=0.1)
            shards = Shards(opt, model, loss_fn, *batch(), num_shards=2, passes="vmap", compile="eager")
            shards[0]()
            shards.gradients_at_w(list(model.parameters()))
            alive.append(weakref.ref(model))
    del model, opt, shards
    gc.collect()
    assert not any(one() for one in alive)


@compiles
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's own, where it resumes after the break
def test_a_model_that_cannot_be_compiled_whole_is_refused_by_torch():
    def breaks(outputs, targets):
        torch._dynamo.graph_break()
        return loss_fn(outputs, targets)

    model = network("none")
    opt = SAM(model.parameters(), SGD, lr=0.1)
    shards = Shards(opt, model, breaks, *batch(), num_shards=2, passes="vmap", compile="eager")
    with pytest.raises(torch._dynamo.exc.Unsupported) as caught:
        shards.gradients_at_w(list(model.parameters()))
    assert any("passes='sequential'" in note for note in caught.value.__notes__)
    assert shards[0]() == loss_fn(model(batch()[0][:6]), batch()[1][:6])  # a closure is compiled in parts


@pytest.mark.parametrize("second_order", [True, False])
def test_closures_that_cannot_be_compiled_run_as_they_are(second_order):
    model = network("none")
    given = model if second_order else torch.compile(model, backend="eager")
    opt = SAM(model.parameters(), SGD, rho=0.1, second_order=second_order, lr=0.1)
    # a backend that does not exist, for which torch.compile would raise
    loss = opt.step(Shards(opt, given, loss_fn, *batch(), num_shards=2, compile="no such"))
    assert_close(loss, loss_fn(network("none")(batch()[0]), batch()[1]).detach())


# ------------------------------------------------------------------------------------------------- choice and refusals


def made(model, opt=None, size=BATCH, **options):
    opt = opt or SAM(model.parameters(), SGD, lr=0.1)
    return Shards(opt, model, loss_fn, *batch(size=size, dtype=torch.float32), **options)


class Large(nn.Module):
    """As many parameters as it is told, which nothing computes with."""

    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1).expand(size))


CHOICES = [  # parameters, shards of a batch of 12, the choice with one thread, with two
    (10_000, 1, "sequential", "sequential"),
    (10_000, 2, "sequential", "overlapped"),
    (10_000, 12, "vmap", "vmap"),
    (10_000, 9, "sequential", "overlapped"),  # ragged
    (270_000, 6, "sequential", "overlapped"),
    (270_000, 12, "vmap", "overlapped"),
    (2_000_000, 12, "sequential", "overlapped"),
    (2_000_000_000, 2, "sequential", "sequential"),
]


@pytest.mark.parametrize("size, num_shards, with_one, with_two", CHOICES)
@pytest.mark.parametrize("compiled", [pytest.param(True, marks=compiles), False])
def test_choice_by_shape_and_threads(size, num_shards, with_one, with_two, compiled):
    model = Large(size)
    with threads(1):
        assert made(model, num_shards=num_shards, compile=compiled).passes == with_one
    with threads(2):
        assert made(model, num_shards=num_shards, compile=compiled).passes == with_two


def test_copies_for_many_shards_are_not_made_unasked():
    for number in (1, 2):
        with threads(number):
            assert made(Large(450_000), size=600, num_shards=300).passes == "sequential"


def test_a_choice_by_name_is_taken():
    for passes in ("sequential", "overlapped", "vmap"):
        with threads(2):
            assert made(network("none", torch.float32), num_shards=4, passes=passes).passes == passes


def overlaps(model, opt=None):
    return made(model, opt, num_shards=2, passes="overlapped")


def test_what_cannot_overlap():
    model = network("none", torch.float32)
    with pytest.raises(InputError, match="'overlapped' is impossible: torch's number of threads, 1, has no half"):
        overlaps(model)
    with threads(2):
        assert overlaps(model).passes == "overlapped"
        hooked = network("none", torch.float32)
        hooked[0].register_full_backward_hook(lambda *_: None)
        with pytest.raises(InputError, match="backward hooks on layers, which would run in another thread"):
            overlaps(hooked)
        assert made(hooked, num_shards=2).passes == "sequential"
        inputs, targets = (t.to("meta") for t in batch())
        with pytest.raises(InputError, match="a tensor is on meta"):
            Shards(SGD(model.parameters()), model, loss_fn, inputs, targets, num_shards=2, passes="overlapped")
        with pytest.raises(InputError, match="a tensor is on meta"):
            overlaps(network("none", torch.float32).to("meta"))
        handle = nn.modules.module.register_module_full_backward_hook(lambda *_: None)
        try:
            assert made(model, num_shards=2).passes == "sequential"
        finally:
            handle.remove()
        assert made(model, num_shards=2).passes == "overlapped"


@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_on_parameters_act_whatever_is_chosen(register):
    model = network("none")
    getattr(model[0].weight, register)(lambda w: None)
    for number, num_shards, named in ((2, 2, "overlapped"), (1, 12, "vmap")):
        with threads(number):
            assert made(model, num_shards=num_shards).passes == "sequential"
            with pytest.raises(InputError, match="parameters have hooks"):
                made(model, num_shards=num_shards, passes=named)


def test_a_scaler_is_refused():
    model = network("none", torch.float32)
    opt = SAM(model.parameters(), SGD, lr=0.1)
    with pytest.raises(InputError, match="Shards"):
        opt.step(made(model, opt, num_shards=2), scaler=torch.amp.GradScaler("cpu"))


class Renorm(nn.BatchNorm1d):
    def forward(self, x):
        return (x - self.running_mean[:, None]) / self.running_var[:, None].sqrt()


def with_layer(layer):
    return nn.Sequential(nn.Flatten(2), layer)


@pytest.mark.parametrize(
    "model, reason",
    [
        (with_layer(nn.BatchNorm1d(3, momentum=None)), "momentum=None"),
        (with_layer(nn.SyncBatchNorm(3)), "SyncBatchNorm"),
        (with_layer(Renorm(3)), "Renorm"),
        (with_layer(nn.InstanceNorm1d(3, affine=True, track_running_stats=True)), "InstanceNorm1d"),
        (with_layer(nn.GRU(25, 3)), "GRU"),
        (torch.compile(network("none", torch.float32), backend="eager"), "compiled"),
    ],
    ids=["cumulative", "sync", "own forward", "instance", "recurrent", "compiled"],
)
def test_models_whose_shards_cannot_have_weights_of_their_own(model, reason, passes):
    assert made(model, num_shards=12).passes == "sequential"
    with pytest.raises(InputError, match=f"passes = '{passes}' is impossible: .*{reason}"):
        made(model, num_shards=12, passes=passes)


def test_settings_that_take_the_closures(passes):
    model, other = network("none", torch.float32), nn.Parameter(torch.ones(1))
    for opt, reason in [
        (SAM(model.parameters(), SGD, second_order=True, lr=0.1), "second_order"),
        (SAM(model.parameters(), SGD, inner_steps=2, lr=0.1), "inner_steps"),
        (SAM([*model.parameters(), other], SGD, lr=0.1), "not parameters of model"),
    ]:
        assert made(model, opt, num_shards=12).passes == "sequential"
        with pytest.raises(InputError, match=reason):
            made(model, opt, num_shards=12, passes=passes)
    with pytest.raises(InputError, match=r"sizes \[2, 5\]"):
        made(model, shard_size=5, passes="vmap")


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "num_shards = None and shard_size = None"),
        ({"num_shards": 2, "shard_size": 2}, "give one of the two"),
        ({"num_shards": 13}, "num_shards = 13: it must be from 1 to the batch size, 12"),
        ({"num_shards": 0}, "num_shards = 0"),
        ({"shard_size": 0}, "shard_size = 0"),
        ({"num_shards": 2, "statistics": "thawed"}, "statistics = 'thawed'"),
        ({"num_shards": 2, "passes": "threads"}, "passes = 'threads': give one of 'sequential', 'overlapped', 'vmap'"),
    ],
)
def test_bad_input_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        made(network("none"), **options)


def test_targets_of_another_length_are_refused():
    model = network("none")
    with pytest.raises(InputError, match="12 examples and targets 11"):
        Shards(SAM(model.parameters(), SGD, lr=0.1), model, loss_fn, batch()[0], batch()[1][1:], num_shards=2)


def test_a_torch_that_cannot_compile_autograd_takes_the_closures(monkeypatch):
    monkeypatch.setattr("samlib.shards._obstacle_to_compile", lambda: "torch 2.11 cannot compile a call of autograd")
    model = network()
    opt = SAM(model.parameters(), SGD, lr=0.1)
    shards = partial(Shards, opt, model, loss_fn, *batch(0), num_shards=12, compile="eager")
    assert shards().passes == "sequential"
    with pytest.raises(InputError, match=r"passes = 'vmap' is impossible: torch 2\.11"):
        shards(passes="vmap")
