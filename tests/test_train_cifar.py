"""Training on colour images: augmentation, mixup, precisions, and the networks for CIFAR, on a few images of noise."""

import dataclasses
import math
from functools import partial

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters
from torch.nn import functional

from samlib import closures, data, sweep, train
from samlib import spec as specs_of
from samlib.arithmetic import arithmetic
from samlib.augment import Augmentation
from samlib.closures import Closures, StreamedClosures
from samlib.optim import SAM
from samlib.spec import AugmentSpec, DataSpec, ModelSpec, OptimSpec, RunSpec, TrainSpec
from samlib.store import Store
from samlib.two_products import two_products

CPU = torch.device("cpu")
SMALL = RunSpec(
    DataSpec("cifar10", train_size=40, validation_size=8),
    ModelSpec(width=4),
    OptimSpec("sam", rho=0.1),
    TrainSpec(epochs=3, batch_size=10),
)
EVERYTHING = AugmentSpec(autoaugment=True, flip=True, crop="reflect", cutout=8, mixup=0.2)


def change(spec=SMALL, **fields):
    return specs_of.override(spec, fields)


@pytest.fixture(autouse=True)
def images(tmp_path, monkeypatch):
    """48 training and 20 test images, in the form of an npz of CIFAR-10."""
    rng = np.random.default_rng(0)
    arrays = {
        f"{split}_{what}": rng.integers(high, size=(size, *shape), dtype=np.uint8)
        for split, size in (("train", 48), ("test", 20))
        for what, high, shape in (("images", 256, (32, 32, 3)), ("labels", 10, ()))
    }
    data._cifar.cache_clear()
    np.savez(tmp_path / "cifar10.npz", **arrays, classes=np.array([str(c) for c in range(10)]))
    monkeypatch.setenv("SAMLIB_DATA", str(tmp_path))
    yield arrays
    data._cifar.cache_clear()


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "runs", writable=True)


def weights(store, spec):
    return torch.load(store.weights_path(specs_of.key(spec)), weights_only=True)


def same(one, two):
    return all(torch.equal(one[name], two[name]) for name in one)


# ------------------------------------------------------------------------------------------------ augmentation


@pytest.mark.parametrize("scaling", ["standardize", "unit", "symmetric"])
def test_the_pixels_are_those_of_the_training_images_and_scale_to_its_inputs(images, scaling):
    splits = data.load(change(scaling=scaling).data, 3, augmented=True)
    pixels = splits.pixels
    assert pixels.images.dtype == torch.uint8
    in_channels = [c[:, None, None] for c in (pixels.mean, pixels.sd)]
    torch.testing.assert_close((pixels.images / 255 - in_channels[0]) / in_channels[1], splits.train.inputs)
    channels = images["train_images"].reshape(-1, 3).astype(np.float64) / 255
    expected = {
        "standardize": (channels.mean(0), channels.std(0, ddof=1)),
        "unit": (np.zeros(3), np.ones(3)),
        "symmetric": (np.full(3, 0.5), np.full(3, 0.5)),
    }
    for found, wanted in zip((pixels.mean, pixels.sd), expected[scaling], strict=True):
        np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-5)
    assert data.load(SMALL.data, 3).pixels is None


@pytest.mark.parametrize(
    ("field", "value"),
    [("autoaugment", True), ("flip", True), ("crop", "zero"), ("crop", "reflect"), ("cutout", 8), ("mixup", 0.2)],
)
def test_every_augmentation_is_felt_and_changes_the_training_alone(store, field, value):
    plain = train.run(change(lr=1e-30), store, "cpu").history
    changed = train.run(change(lr=1e-30, **{field: value}), store, "cpu").history
    assert changed["running_loss"] != plain["running_loss"]
    splits = [train.load_splits(spec, CPU) for spec in (SMALL, change(**{field: value}))]
    for name in train.SPLITS:
        assert torch.equal(*(getattr(of_spec, name).inputs for of_spec in splits))


def test_each_epoch_and_each_seed_draws_anew():
    training, other = (train.Training.start(change(seed, flip=True, crop="zero"), CPU) for seed in seeds_of(0, 1))
    chosen, labels = torch.arange(10), torch.zeros(10, dtype=torch.int64)
    first, second = (training.augmented(chosen, labels)[0] for _ in range(2))
    assert not torch.equal(first, second)
    draws = [t.augmentation.draw(10, (32, 32), t.draws).corner for t in (training, other)]
    assert not torch.equal(*draws)


def seeds_of(*seeds):
    return [dataclasses.replace(SMALL, seed=seed) for seed in seeds]


def test_a_training_step_is_that_of_the_augmented_batch_written_out():
    """One step of SGD with mixup and everything else: the same draws, and the loss of Zhang et al. by hand."""
    spec = dataclasses.replace(change(method="sgd", weight_decay=0.0, momentum=0.0, lr=0.1), augment=EVERYTHING)
    training, chosen = train.Training.start(spec, CPU), torch.arange(10)
    model, splits = train.build_model(spec, training.splits, CPU), training.splits
    rng = torch.Generator().manual_seed(data.generator(spec.seed, "augmentation").initial_seed())
    augmentation, pixels = Augmentation(**dataclasses.asdict(EVERYTHING)), splits.pixels
    drawn = augmentation.draw(10, (32, 32), rng)
    logits = model.train()(augmentation.apply(pixels.images[:10], drawn, pixels.mean, pixels.sd))
    log_p = logits.log_softmax(1)
    labels = splits.train.labels[:10]
    losses = -(drawn.share * log_p[range(10), labels] + (1 - drawn.share) * log_p[range(10), labels[drawn.partner]])
    grads = torch.autograd.grad(losses.mean(), list(model.parameters()))
    training.model.train()
    training.take(chosen)
    assert training.losses[0].item() == pytest.approx(losses.mean().item(), rel=1e-6)
    for found, before, grad in zip(training.model.parameters(), model.parameters(), grads, strict=True):
        torch.testing.assert_close(found, before - 0.1 * grad)


def test_the_shards_of_a_mixed_batch_keep_their_partners():
    """Without batch norm and ascent the mean over shards is the gradient of the batch."""
    spec = dataclasses.replace(change(rho=0.0, norm="none"), augment=EVERYTHING)
    whole, sharded = (train.Training.start(each, CPU) for each in (spec, change(spec, num_shards=5)))
    for training in (whole, sharded):
        training.model.train()
        training.take(torch.arange(10))
    torch.testing.assert_close(whole.losses[0], sharded.losses[0])
    for one, two in zip(whole.model.parameters(), sharded.model.parameters(), strict=True):
        torch.testing.assert_close(one, two)


def test_an_augmented_run_cut_in_mid_epoch_ends_as_if_it_had_not_been(store, tmp_path):
    spec = dataclasses.replace(SMALL, augment=EVERYTHING)
    whole, path = train.run(spec, store, "cpu"), tmp_path / "cut"
    for cut in (2, 4, 7):
        training = train.Training.start(spec, CPU)
        for _, indices in zip(range(cut), training.batches_left(), strict=False):
            training.take(indices)
        training.save(path)
        again = train.Training.start(spec, CPU)
        again.restore(train.read_checkpoint(path))
        again.go_on(lambda: None)
        assert again.record().history == whole.history
        assert same(again.model.state_dict(), weights(store, spec))


# ------------------------------------------------------------------------------------------------ precision


def test_looking_at_the_perturbation_changes_nothing(store):
    """Dropout draws from the global generator."""
    often, seldom = (
        train.run(change(precision="bf16", dropout=0.3, eval_every=every), store, "cpu") for every in (1, 3)
    )
    assert often.history["running_loss"][-1] == seldom.history["running_loss"][-1]
    assert same(
        weights(store, change(precision="bf16", dropout=0.3)), weights(store, specs_of.from_canonical(seldom.spec))
    )


@pytest.mark.parametrize("precision", ["tf32", "fp16", "bf16"])
def test_what_acts_of_the_perturbation_is_logged_in_low_precision(store, precision):
    record = train.run(change(precision=precision, rho=0.05), store, "cpu")
    for name in train.ACTING:
        column = record.history[f"perturbation_{name}"]
        assert len(column) == 3
        assert all(0 < value < 2 for value in column)
        assert column[-1] == record.perturbation[name]
    assert record.perturbation["cosine"] < 1 - 1e-9
    assert "perturbation_cosine" not in train.run(change(rho=0.05), store, "cpu").history
    assert "perturbation_cosine" not in train.run(change(precision=precision, method="sgd"), store, "cpu").history


def test_each_precision_has_numbers_of_its_own(store):
    losses = [train.run(change(precision=name), store, "cpu").history["running_loss"] for name in train_precisions()]
    assert len({tuple(found) for found in losses}) == 4
    for found in losses[1:]:
        assert found == pytest.approx(losses[0], rel=0.05)


def train_precisions():
    return ("fp32", "tf32", "fp16", "bf16")


def test_a_step_in_low_precision_is_that_of_a_model_called_in_it():
    spec = change(method="sgd", precision="bf16", weight_decay=0.0, momentum=0.0)
    training = train.Training.start(spec, CPU)
    model, split = train.build_model(spec, training.splits, CPU), training.splits.train
    with arithmetic("bf16", CPU):
        loss = functional.cross_entropy(model.train()(split.inputs[:10]).float(), split.labels[:10])
        grads = torch.autograd.grad(loss, list(model.parameters()))
    training.model.train()
    training.take(torch.arange(10))
    assert training.losses[0].item() == loss.item()
    for found, before, grad in zip(training.model.parameters(), model.parameters(), grads, strict=True):
        torch.testing.assert_close(found, before - spec.optim.lr * grad)


@pytest.mark.parametrize("graph", [False, True])
def test_a_step_with_two_products_is_that_written_out(graph):
    """bf16, both passes, without batch norm; with graph=True in the form of the step that a GPU captures."""
    spec = change(precision="bf16", second_pass="two_products", rho=0.05, norm="none")
    training = train.Training.start(spec, CPU, graph)
    model, split = train.build_model(spec, training.splits, CPU), training.splits.train
    opt = SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1, momentum=0.9, weight_decay=0.0005)

    def closure():
        opt.zero_grad()
        with arithmetic("bf16", CPU), two_products(opt):
            loss = functional.cross_entropy(model.train()(split.inputs[:10]), split.labels[:10])
        loss.backward()
        return loss

    opt.step(closure)
    training.model.train()
    training.take(torch.arange(10))
    for found, expected in zip(training.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def test_with_two_products_all_of_the_perturbation_acts(store):
    rounded, apart = (
        train.run(change(precision="bf16", rho=0.05, second_pass=how), store, "cpu")
        for how in ("rounded", "two_products")
    )
    assert rounded.history["running_loss"] != apart.history["running_loss"]
    assert rounded.perturbation["cosine"] < 0.999 < 0.9999 < apart.perturbation["cosine"] < 1
    assert apart.perturbation["norm_ratio"] == pytest.approx(1, abs=1e-3)


def test_the_loss_scale_leaves_gradients_that_need_none_and_saves_those_that_do(store):
    """Most gradients of a loss times 1e-8 are below float16's smallest number."""

    def gradient(scale, factor):
        training = train.Training.start(change(method="sgd", precision="fp16", loss_scale=scale), CPU)
        shards = Closures(training.spec, training.model, training.optimizer, *train._tensors(training.splits.train))
        shards._loss = lambda part, loss=shards._loss: loss(part) * factor
        shards.one_by_one[0]()
        return torch.cat([p.grad.flatten() for p in training.model.parameters()])

    large = gradient(1024.0, 1.0).double()
    for scale, factor, kept in ((8.0, 1.0, True), (2.0**30, 1e-8, True), (8.0, 1e-8, False)):
        found = gradient(scale, factor).double()
        assert (found @ large / found.norm() / large.norm() > 0.999) == kept


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("method", ["sgd", "sam", "average_sam"])
def test_an_overflow_in_fp16_skips_the_step_and_leaves_the_weights(method, graph):
    training = train.Training.start(change(method=method, precision="fp16", loss_scale=2.0**40), CPU, graph)
    before = [p.detach().clone() for p in training.model.parameters()]
    training.model.train()
    training.take(torch.arange(10))
    assert all(torch.equal(p, q) for p, q in zip(training.model.parameters(), before, strict=True))
    assert training.optimizer.skipped_steps == 1


# ------------------------------------------------------------------------------------------------ networks


@pytest.mark.parametrize(
    "fields",
    [
        {"model.name": "resnet20"},
        {"model.name": "resnet18", "stem": "imagenet", "num_outputs": 1000},
        {"model.name": "resnet18", "stem": "imagenet", "num_outputs": 1000, "norm": "none", "method": "asam", "eta": 0},
    ],
    ids=lambda fields: " ".join(str(value) for value in fields.values()),
)
def test_a_network_for_cifar_trains_and_is_measured(store, fields):
    spec = change(**fields, width=8, epochs=1, lr=0.001)
    record = train.run(spec, store, "cpu")
    assert record.status == "done"
    assert math.isfinite(record.final["last"]["test_loss"])
    measure = specs_of.MeasureSpec(record.key, "adversarial_sharpness", images=16)
    measured = train.run(measure, store, "cpu")
    everything = train.run(dataclasses.replace(measure, images=None), store, "cpu")
    assert measured.status == "done"
    assert measured.measures != everything.measures


# ------------------------------------------------------------------------------------------------ the step of a graph

METHODS = {
    "sgd": {"method": "sgd", "nesterov": True, "clip": "descent", "clip_norm": 0.5},
    "sam": {"clip": "descent", "clip_norm": 0.5},
    "msam": {"num_shards": 5},
    "msam, statistics of the batch": {"num_shards": 5, "shard_batchnorm": "batch"},
    "asam": {"method": "asam", "rho": 0.5},
    "average_sam": {"method": "average_sam"},
    "w+eps": {"logged_loss": "w+eps"},
    "update": {"second_pass_batchnorm": "update"},
}


@pytest.mark.parametrize("fields", METHODS.values(), ids=METHODS)
def test_the_step_that_is_made_a_graph_is_the_plain_one_up_to_rounding(fields):
    """On a CPU it runs eagerly, with the fused optimiser and the flat buffers; 36 images leave a smaller last batch."""
    spec = dataclasses.replace(change(drop_last=False, train_size=36, lr=0.02, **fields), augment=EVERYTHING)
    plain, graphed = (train.Training.start(spec, CPU, graph) for graph in (False, True))
    for training in (plain, graphed):
        training.go_on(lambda: None)
        assert training.status == "done"
    assert graphed.graphed.calls == 9
    for name, column in plain.record().history.items():
        assert graphed.record().history[name] == pytest.approx(column, rel=1e-3), name


@pytest.mark.parametrize(
    ("fields", "streamed"),
    [
        ({"num_shards": 5}, 12),
        ({"shard_size": 2, "method": "asam", "precision": "bf16"}, 12),
        ({"num_shards": 4}, 0),  # of unequal sizes
        ({"num_shards": 5, "shard_batchnorm": "batch"}, 0),
        ({"num_shards": 5, "clip": "both"}, 0),
        ({"num_shards": 5, "weight_decay_in": "loss"}, 0),
        ({"num_shards": 5, "logged_loss": "w+eps"}, 0),
        ({"num_shards": 5, "dropout": 0.5}, 0),
        ({"num_shards": 5, "precision": "fp16"}, 0),
        ({"num_shards": 5, "second_pass": "two_products", "precision": "bf16"}, 0),
        ({"method": "average_sam", "num_shards": 5}, 0),
        ({}, 0),
    ],
)
def test_in_a_graph_shards_have_weights_of_their_own_where_they_can(monkeypatch, fields, streamed):
    class Counted(StreamedClosures):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    made = []
    monkeypatch.setattr(train, "StreamedClosures", Counted)
    spec = change(**{"model.norm": "none"} if fields.get("second_pass") else {}, **fields)
    trainings = []
    for graph in (False, True):
        trainings.append(train.Training.start(spec, CPU, graph))
        trainings[-1].go_on(lambda: None)
    assert len(made) == streamed
    for name in ("running_loss", "train_loss", "test_loss"):
        expected, found = (training.record().history[name] for training in trainings)
        assert found == pytest.approx(expected, rel=1e-3 if spec.train.precision == "fp32" else 1e-2), name


def test_compiled_passes_are_the_plain_ones_up_to_rounding(store, monkeypatch):
    """And those of another run of the same network are there already."""
    spec = change(**{"model.name": "mlp"}, drop_last=False, train_size=36)
    plain = train.run(spec, store, "cpu")
    monkeypatch.setenv("SAMLIB_COMPILE", "1")
    counters.clear()
    for graph in (False, True):
        made = train.run(spec, store, "cpu", graph=graph)
        assert made.environment["compiled"] is True
        for name, column in plain.history.items():
            assert made.history[name] == pytest.approx(column, rel=1e-4, abs=1e-6), name
    graphs = counters["stats"]["unique_graphs"]
    assert graphs == 4  # batches of 10 and of 6, at w and with frozen statistics at w + eps
    train.run(dataclasses.replace(spec, seed=1), store, "cpu")
    assert counters["stats"]["unique_graphs"] == graphs


def test_passes_are_compiled_for_as_many_settings_as_there_are(store, monkeypatch):
    """torch gives up after eight shapes and states of one function. Without its kernels, which take seconds each."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    closures._compiled_call.cache_clear()
    try:
        for batch_size in (2, 3, 4, 5, 6):
            spec = change(batch_size=batch_size, epochs=1, train_size=12)
            assert train.run(spec, store, "cpu", compile=True).environment["compiled"]
    finally:
        closures._compiled_call.cache_clear()


def test_a_run_whose_passes_torch_cannot_compile_is_made_without():
    for fields in ({"precision": "bf16"}, {"replay_dropout": True, "dropout": 0.5}):
        assert not train.Training.start(change(**fields), CPU, compile=True).compiled
    emulated = change(**{"model.norm": "none"}, precision="bf16", second_pass="two_products")
    assert not train.can_compile(emulated, torch.device("cuda"))
    streamed = change(num_shards=5)
    assert not train.Training.start(streamed, CPU, graph=True, compile=True).compiled
    assert train.Training.start(streamed, CPU, compile=True).compiled
    assert train.Training.start(SMALL, CPU, compile=True).compiled
    assert not train.Training.start(SMALL, CPU).compiled


def test_a_run_with_a_graph_cut_in_mid_epoch_ends_as_if_it_had_not_been(store, tmp_path):
    spec, path = dataclasses.replace(SMALL, augment=EVERYTHING), tmp_path / "cut"
    whole = train.run(spec, store, "cpu", graph=True)
    training = train.Training.start(spec, CPU, graph=True)
    for _, indices in zip(range(6), training.batches_left(), strict=False):
        training.take(indices)
    training.save(path)
    again = train.Training.start(spec, CPU, graph=True)
    again.restore(train.read_checkpoint(path))
    again.go_on(lambda: None)
    assert again.record().history == whole.history
    assert same(again.model.state_dict(), weights(store, spec))


@pytest.mark.parametrize("begun_as_graph", [False, True])
def test_a_run_goes_on_in_the_way_it_was_begun(store, begun_as_graph):
    whole = train.run(SMALL, store, "cpu", graph=begun_as_graph)
    training = train.Training.start(SMALL, CPU, begun_as_graph)
    for _, indices in zip(range(6), training.batches_left(), strict=False):
        training.take(indices)
    training.save(store.checkpoint_path(specs_of.key(SMALL)))
    again = train.run(SMALL, store, "cpu", graph=not begun_as_graph)
    assert again.history == whole.history
    assert again.environment.get("graph", False) == begun_as_graph


def test_a_run_begun_in_a_way_that_is_impossible_now_is_made_again(store, capsys):
    """As a graph with dropout, and now among others."""
    spec = change(dropout=0.5)
    training, path = train.Training.start(spec, CPU, graph=True), store.checkpoint_path(specs_of.key(spec))
    training.take(next(training.batches_left()))
    training.save(path)
    sweep.run_all([spec], store, device="cpu", side_by_side=2)
    assert "in a way that is impossible here" in capsys.readouterr().err
    assert store.load(specs_of.key(spec)).status == "done"
    assert path.with_suffix(".aside").exists()


def test_a_run_without_one_sequence_of_operations_has_no_graph():
    for fields in ({"ascent_from": 0.5}, {"replay_dropout": True, "dropout": 0.5}):
        training = train.Training.start(change(**fields), CPU, graph=True)
        training.go_on(lambda: None)
        assert training.graphed is None
