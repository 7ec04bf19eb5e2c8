"""The training loop: against a plain loop written here, resumed at any epoch, and every choice of the spec felt."""

import dataclasses
import gc
import math
import weakref
from itertools import islice

import pytest
import torch
from torch.nn import functional

from samlib import data, half, train
from samlib import spec as specs_of
from samlib.closures import Closures, torch_smoothing
from samlib.errors import InputError
from samlib.spec import (
    CheckSpec,
    ConnectSpec,
    DataSpec,
    MeasureSpec,
    ModelSpec,
    OptimSpec,
    PathSpec,
    RunSpec,
    TrainSpec,
)
from samlib.store import Store

TINY = RunSpec(
    DataSpec(train_size=48, validation_size=16, label_noise=0.25),
    ModelSpec(width=4),
    OptimSpec("sam", rho=0.1),
    TrainSpec(epochs=3, batch_size=16),
)
CPU = torch.device("cpu")


def change(spec=TINY, **fields):
    return specs_of.override(spec, fields)


def numbers(record):
    return record.history | {f"final {name}": list(row.values()) for name, row in record.final.items()}


def make_steps(training, count):
    for indices in islice(training.batches_left(), count):
        training.take(indices)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path, writable=True)


def weights(store, spec):
    return torch.load(store.weights_path(specs_of.key(spec)), weights_only=True)


def same(one, two):
    return all(torch.equal(one[name], two[name]) for name in one)


# ------------------------------------------------------------------------------------------------ oracles


def plain_loop(spec):
    """SAM and SGD written out, without samlib's optimiser, batch-norm context or closures."""
    splits = data.load(spec.data, spec.seed)
    model = train.build_model(spec, splits, CPU)
    parameters = list(model.parameters())
    velocity = [torch.zeros_like(p) for p in parameters]
    order = data.generator(spec.seed, "order")
    steps = spec.train.epochs * (len(splits.train) // spec.train.batch_size)
    step = 0
    for _ in range(spec.train.epochs):
        model.train()
        for indices in data.batches(len(splits.train), spec.train.batch_size, True, order):
            lr = spec.optim.lr * 0.5 * (1 + math.cos(math.pi * step / steps))
            step += 1
            inputs, labels = splits.train.inputs[indices], splits.train.labels[indices]
            gradients = torch.autograd.grad(functional.cross_entropy(model(inputs), labels), parameters)
            if spec.optim.method == "sam":
                buffers = {name: value.clone() for name, value in model.named_buffers()}
                norm = torch.cat([g.flatten() for g in gradients]).norm()
                before = [p.detach().clone() for p in parameters]
                with torch.no_grad():
                    for p, g in zip(parameters, gradients, strict=True):
                        p += spec.optim.rho * g / norm
                gradients = torch.autograd.grad(functional.cross_entropy(model(inputs), labels), parameters)
                with torch.no_grad():
                    for p, w in zip(parameters, before, strict=True):
                        p.copy_(w)
                    for name, value in model.named_buffers():
                        value.copy_(buffers[name])
            with torch.no_grad():
                for p, g, v in zip(parameters, gradients, velocity, strict=True):
                    v.mul_(spec.optim.momentum).add_(g + spec.optim.weight_decay * p)
                    p -= lr * v
    return model.state_dict()


@pytest.mark.parametrize("method", ["sgd", "sam"])
def test_against_a_loop_written_out(store, method):
    spec = change(method=method)
    train.run(spec, store, "cpu")
    found = weights(store, spec)
    for name, expected in plain_loop(spec).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-5)


def test_sam_with_rho_zero_is_sgd_bit_for_bit(store):
    sgd, sam = change(method="sgd"), change(rho=0)
    assert numbers(train.run(sgd, store, "cpu")) == numbers(train.run(sam, store, "cpu"))
    assert same(weights(store, sgd), weights(store, sam))


def test_one_shard_is_sam_bit_for_bit(store):
    whole, shard = change(), change(shard_size=16)
    assert numbers(train.run(whole, store, "cpu")) == numbers(train.run(shard, store, "cpu"))


def test_shards_without_batch_norm_and_without_perturbation_are_the_whole_batch(store):
    """At rho -> 0 the mean of shard gradients is the gradient of the batch; ragged shards must be weighted by size."""
    whole, ragged = (change(norm="none", rho=0, lr=0.05, **extra) for extra in ({}, {"shard_size": 5}))
    train.run(whole, store, "cpu")
    train.run(ragged, store, "cpu")
    for a, b in zip(weights(store, whole).values(), weights(store, ragged).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------ hybrids

MSAM = change(num_shards=4, epochs=4)  # 12 steps
SGD = change(MSAM, method="sgd", num_shards=1)


def outcome(store, spec):
    return numbers(train.run(spec, store, "cpu")), weights(store, spec)


def agree(store, one, two):
    (numbers_of_one, weights_of_one), (numbers_of_two, weights_of_two) = outcome(store, one), outcome(store, two)
    return numbers_of_one == numbers_of_two and same(weights_of_one, weights_of_two)


@pytest.mark.parametrize("method", ["sam", "asam", "average_sam"])
def test_a_hybrid_whose_ascent_never_acts_is_sgd_bit_for_bit(store, method):
    """Shards, too, belong to the ascent: SGD steps on the whole mini-batch."""
    never = change(MSAM, method=method, ascent_from=0.5, ascent_until=0.51)
    assert agree(store, never, SGD)
    assert not agree(store, change(never, ascent_until=0.6), SGD)  # one step of twelve


def test_a_hybrid_whose_ascent_acts_in_every_step_is_msam_bit_for_bit(store):
    always = change(MSAM, ascent_from=0.04, ascent_until=0.96)
    assert specs_of.key(always) != specs_of.key(MSAM)
    assert agree(store, always, MSAM)


@pytest.mark.parametrize(
    ("window", "expected"),
    [
        ((0.0, 1.0), range(12)),
        ((0.0, 0.5), range(6)),
        ((0.5, 1.0), range(6, 12)),
        ((0.0, 0.2), range(2)),  # 2.4 steps
        ((0.2, 1.0), range(2, 12)),
        ((0.8, 1.0), range(10, 12)),  # 9.6 steps
        ((0.25, 0.75), range(3, 9)),
    ],
)
def test_the_first_and_the_last_step_of_the_ascent(window, expected):
    """Seen in a whole training, by the radius and the number of closures the optimiser was given."""
    training = train.Training.start(change(MSAM, ascent_from=window[0], ascent_until=window[1]), CPU)
    step, seen = training.optimizer.step, []

    def noted(closures, **options):
        seen.append((training.optimizer.param_groups[0]["rho"], len(closures)))
        return step(closures, **options)

    training.optimizer.step = noted
    training.go_on(lambda: None)
    assert seen == [(0.1, 4) if index in expected else (0.0, 1) for index in range(12)]


@pytest.mark.parametrize("share", [0.2, 0.5, 0.55, 0.8])
@pytest.mark.parametrize("steps", [1, 7, 100, 160, 300])
def test_the_two_directions_of_a_switch_divide_the_steps(share, steps):
    first, last = OptimSpec("sam", ascent_until=share), OptimSpec("sam", ascent_from=share)
    acts = [(train.ascends(first, step, steps), train.ascends(last, step, steps)) for step in range(steps)]
    assert all(one != other for one, other in acts)
    assert sum(one for one, _ in acts) == round(share * steps)


@pytest.mark.parametrize("first", ["sgd", "msam"])
def test_momentum_is_carried_over_the_switch(store, first):
    """By hand: half with one optimiser, half with another that is handed the momentum. Without it, not the same."""
    window = {"ascent_from": 0.5} if first == "sgd" else {"ascent_until": 0.5}
    hybrid = change(MSAM, **window)
    train.run(hybrid, store, "cpu")
    assert same(weights(store, hybrid), by_hand(first, hands_over=True))
    assert not same(weights(store, hybrid), by_hand(first, hands_over=False))


def by_hand(first, *, hands_over):
    parts = [SGD, MSAM] if first == "sgd" else [MSAM, SGD]
    one, two = (train.Training.start(spec, CPU) for spec in parts)
    make_steps(one, 2 * one.steps_per_epoch)
    two.model.load_state_dict(one.model.state_dict())
    two.epoch_order = one.epoch_order
    two.epoch, two.step = one.epoch, one.step
    if hands_over:
        for ours, theirs in zip(two.model.parameters(), one.model.parameters(), strict=True):
            two.optimizer.state[ours]["momentum_buffer"] = one.optimizer.state[theirs]["momentum_buffer"]
    make_steps(two, 2 * two.steps_per_epoch)
    return two.model.state_dict()


@pytest.mark.parametrize("window", [{"ascent_from": 0.4}, {"ascent_until": 0.4}], ids=str)
def test_a_hybrid_cut_before_or_after_its_switch_ends_as_if_it_had_not_been(store, window, tmp_path):
    """The switch is in the second of four epochs."""
    spec = change(MSAM, **window)
    whole, expected = outcome(store, spec)
    for cut in (1, 2):
        training, path = train.Training.start(spec, CPU), tmp_path / f"cut {cut}"
        make_steps(training, cut * training.steps_per_epoch)
        training.save(path)
        again = train.Training.start(spec, CPU)
        again.restore(train.read_checkpoint(path))
        again.go_on(lambda: None)
        assert numbers(again.record()) == whole
        assert same(again.model.state_dict(), expected)


def test_what_acts_of_the_perturbation_is_measured_where_the_last_step_had_one(store):
    assert train.run(change(MSAM, ascent_from=0.5), store, "cpu").perturbation["norm_ratio"] == pytest.approx(1, 1e-3)
    assert train.run(change(MSAM, ascent_until=0.5), store, "cpu").perturbation == {}


def test_sgd_takes_the_whole_mini_batch_whatever_the_shards(store):
    assert agree(store, change(SGD, num_shards=4), SGD)


def test_a_training_ends_after_its_updates_in_mid_epoch(store):
    """48 images in batches of 16: the fourth update is the first one of the second epoch."""
    record = train.run(change(SGD, train_size=48, epochs=2, updates=4), store, "cpu")
    assert (record.history["step"], record.history["epoch"]) == ([3, 4], [1, 2])
    assert record.history["lr"][-1] == pytest.approx(SGD.optim.lr * 0.5 * (1 + math.cos(math.pi * 3 / 4)))


def test_more_updates_than_the_epochs_make_are_refused(store):
    with pytest.raises(InputError, match=r"train\.updates = 7 .*train\.epochs = 2 make, 6"):
        train.run(change(SGD, train_size=48, epochs=2, updates=7), store, "cpu")


def test_one_cycle_rises_in_a_straight_line_and_falls_along_half_a_cosine():
    spec = OptimSpec(lr=0.5, schedule="one_cycle", warmup=0.2)
    found = [train.learning_rate(spec, step, 20) for step in range(21)]
    assert found[:5] == pytest.approx([0, 0.125, 0.25, 0.375, 0.5])
    assert found[4:] == pytest.approx([0.25 * (1 + math.cos(math.pi * step / 16)) for step in range(17)])
    assert train.learning_rate(OptimSpec(lr=0.5, schedule="one_cycle", warmup=0.0), 0, 20) == 0.5


def test_training_images_are_evaluated_as_seldom_as_asked_and_in_the_end(store):
    every, seldom = (train.run(change(epochs=5, eval_train_every=k), store, "cpu").history for k in (None, 2))
    for name in ("train_loss", "train_accuracy_pct"):
        assert [math.isnan(value) for value in seldom[name]] == [True, False, True, False, False]
        assert [seldom[name][epoch] for epoch in (1, 3, 4)] == [every[name][epoch] for epoch in (1, 3, 4)]
    assert seldom["test_loss"] == every["test_loss"]


# ------------------------------------------------------------------------------------------------ resuming


class CutError(Exception):
    pass


@pytest.mark.parametrize("method", ["sam", "average_sam"])
def test_cut_before_any_step_the_run_ends_as_if_it_had_not_been(store, monkeypatch, tmp_path, method):
    """In mid-epoch, between two epochs, and before the last step; with a partial last batch and dropout."""
    spec = change(dropout=0.3, epochs=3, drop_last=False, train_size=50, method=method)
    whole = train.run(spec, store, "cpu")
    expected = weights(store, spec)
    monkeypatch.setattr(train, "CHECKPOINT_SECONDS", 0.0)
    take = train.Training.take
    for cut in (1, 3, 4, 6, 11):
        other = Store(tmp_path / f"cut {cut}", writable=True)

        def until_the_cut(self, indices, cut=cut):
            if self.step == cut:
                raise CutError
            take(self, indices)

        with monkeypatch.context() as patch:
            patch.setattr(train.Training, "take", until_the_cut)
            with pytest.raises(CutError):
                train.run(spec, other, "cpu")
        assert other.load(whole.key) is None
        assert other.checkpoint_path(whole.key).exists()
        again = train.run(spec, other, "cpu")
        assert numbers(again) == numbers(whole)
        assert same(weights(other, spec), expected)
        assert not other.checkpoint_path(whole.key).exists()


def test_at_its_deadline_a_run_leaves_a_checkpoint_and_goes_on_from_there(store, monkeypatch, tmp_path):
    whole, other = train.run(TINY, store, "cpu"), Store(tmp_path / "cut", writable=True)
    ticks = iter(range(1000))
    with monkeypatch.context() as patch:
        patch.setattr(train.time, "monotonic", lambda: float(next(ticks)))
        assert train.run(TINY, other, "cpu", deadline=4.0) is None
    assert other.recorded() == []
    assert not other.weights_path(whole.key).exists()
    assert 0 < train.load_tensors(other.checkpoint_path(whole.key))["step"] < whole.history["step"][-1]
    assert numbers(train.run(TINY, other, "cpu", deadline=math.inf)) == numbers(whole)
    assert same(weights(other, TINY), weights(store, TINY))


def test_a_checkpoint_that_cannot_be_read_starts_the_run_over(store, capsys):
    path = store.checkpoint_path(specs_of.key(TINY))
    path.parent.mkdir(parents=True)
    path.write_bytes(b"half a checkpoint")
    assert train.run(TINY, store, "cpu").status == "done"
    assert str(path) in capsys.readouterr().err
    assert path.with_suffix(".aside").exists()


@pytest.mark.parametrize("spoil", [{"numerics": -1}, {"renamed": 1}])
def test_a_checkpoint_of_another_version_starts_the_run_over(store, monkeypatch, capsys, spoil):
    training = train.Training.start(TINY, CPU)
    make_steps(training, training.steps_per_epoch)
    path = store.checkpoint_path(specs_of.key(TINY))
    training.save(path)
    train.save_tensors(path, train.load_tensors(path) | spoil)
    record = train.run(TINY, store, "cpu")
    assert (record.status, record.history["epoch"]) == ("done", [1, 2, 3])
    assert "another version" in capsys.readouterr().err


def test_a_run_repeats_and_leaves_the_global_generator_alone(store, tmp_path):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    spec = change(dropout=0.3)
    one = train.run(spec, store, "cpu")
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert numbers(train.run(spec, Store(tmp_path / "again", writable=True), "cpu")) == numbers(one)


# ------------------------------------------------------------------------------------------------ what a record says


def test_the_record_of_a_run(store):
    record = train.run(TINY, store, "cpu")
    assert record.status == "done"
    assert record.history["epoch"] == [1, 2, 3]
    assert record.history["step"] == [3, 6, 9]
    assert len({len(column) for column in record.history.values()}) == 1
    assert record.final["last"]["epoch"] == 3
    best = max(record.history["test_accuracy_pct"])
    assert record.final["best_test"]["test_accuracy_pct"] == best
    validation = record.history["validation_accuracy_pct"]
    assert record.final["best_validation"]["epoch"] == validation.index(max(validation)) + 1
    assert record.perturbation["norm_ratio"] == pytest.approx(1, abs=1e-3)
    assert record.perturbation["cosine"] == pytest.approx(1, abs=1e-3)
    assert record.environment["torch"] == torch.__version__
    assert record.images_per_second > 0
    assert store.load(record.key).final["last"]["epoch"] == 3


def test_no_validation_split_no_best_validation_epoch(store):
    record = train.run(change(validation_size=0), store, "cpu")
    assert set(record.final) == {"last", "best_test"}
    assert math.isnan(record.final["last"]["validation_loss"])


def test_eval_every_skips_but_for_the_last_epoch(store):
    every, second = train.run(TINY, store, "cpu"), train.run(change(eval_every=2), store, "cpu")
    assert second.history["epoch"] == [2, 3]
    assert second.history["test_loss"] == every.history["test_loss"][1:]


def test_a_run_that_diverges_is_a_record(store):
    record = train.run(change(lr=1e6, norm="none", momentum=0.99, schedule="constant"), store, "cpu")
    assert record.status == "diverged"
    assert store.load(record.key).status == "diverged"
    assert not store.weights_path(record.key).exists()


def test_a_measure_of_a_run_that_diverged_is_a_diverged_record(store):
    parent = train.run(change(lr=1e6, norm="none", momentum=0.99, schedule="constant"), store, "cpu")
    record = train.run(MeasureSpec(parent.key), store, "cpu")
    assert (record.status, record.measures) == ("diverged", {})


def test_a_skipped_step_logs_no_perturbed_loss(store):
    training = train.Training.start(change(logged_loss="w+eps", num_shards=2), CPU)
    inputs = torch.full((16, 1, 8, 8), math.nan)
    assert math.isnan(training.step_on(inputs, torch.zeros(16, dtype=torch.int64)).item())


def test_statistics_per_batch_count_each_batch_once():
    counts = {}
    for statistics in ("shard", "batch"):
        training = train.Training.start(change(num_shards=4, shard_batchnorm=statistics), CPU)
        make_steps(training, training.steps_per_epoch)
        counts[statistics] = int(training.model[1].num_batches_tracked)
    assert counts == {"shard": 12, "batch": 3}


def test_what_a_checkpoint_holds_of_an_epoch_goes_to_the_device_of_the_run(tmp_path):
    """A checkpoint is read on the CPU; the losses of the further steps are on the device. `meta` stands for a GPU."""
    training, path = train.Training.start(TINY, CPU), tmp_path / "cut"
    make_steps(training, 2)
    training.save(path)
    again = train.Training.start(TINY, CPU)
    again.device = torch.device("meta")
    again.restore(train.read_checkpoint(path))
    assert [loss.device.type for loss in again.losses] == ["meta", "meta"]


def test_a_run_of_which_an_epoch_skips_every_step_has_diverged(store):
    spec = change(precision="fp16", loss_scale=2.0**60)
    record = train.run(spec, store, "cpu")
    assert (record.status, record.history["skipped_steps"]) == ("diverged", [3])
    assert train.run(change(spec, loss_scale=8.0), store, "cpu").history["skipped_steps"] == [0, 0, 0]


def test_no_step_leaves_its_images_behind():
    """They would stay until a garbage collection."""
    training = train.Training.start(change(num_shards=2), CPU)
    shards = training.closures(*train._tensors(training.splits.train))
    alive = weakref.ref(shards)
    gc.disable()
    try:
        training.optimizer.step(shards.one_by_one, weights=shards.weights)
        del shards
        assert alive() is None
    finally:
        gc.enable()


def test_evaluation_against_a_direct_computation(store):
    record = train.run(TINY, store, "cpu")
    splits = data.load(TINY.data, TINY.seed)
    model = train.trained_model(TINY, store, splits, CPU).eval()
    for name in ("train", "validation", "test"):
        split = getattr(splits, name)
        logits = model(split.inputs)
        assert record.final["last"][f"{name}_loss"] == pytest.approx(
            functional.cross_entropy(logits, split.labels).item(), rel=1e-5
        )
        hits = (logits.argmax(1) == split.labels).double().mean().item()
        assert record.final["last"][f"{name}_accuracy_pct"] == pytest.approx(100 * hits, abs=1e-6)


# ------------------------------------------------------------------------------------------------ the choices


@pytest.mark.parametrize(
    "fields",
    [
        {"rho": 0.2},
        {"p": math.inf},
        {"method": "asam", "rho": 0.5},
        {"method": "average_sam"},
        {"perturbed": "weights"},
        {"num_shards": 2},
        {"num_shards": 4, "shard_batchnorm": "batch"},
        {"second_pass_batchnorm": "update"},
        {"second_pass_batchnorm": "eval"},
        {"lr": 0.05},
        {"momentum": 0.0},
        {"nesterov": True},
        {"weight_decay": 0.01},
        {"weight_decay_in": "loss"},
        {"schedule": "constant"},
        {"clip": "descent", "clip_norm": 0.1},
        {"batch_size": 20},
        {"batch_size": 20, "drop_last": False},
        {"label_smoothing": 0.1},
        {"label_smoothing": 0.1, "smoothing_convention": "K-1"},
        {"precision": "bf16"},
        {"logged_loss": "w+eps"},
        {"dropout": 0.3},
        {"dropout": 0.3, "replay_dropout": True},
        {"norm": "group"},
        {"norm": "none"},
        {"label_noise": 0.0},
        {"scaling": "symmetric"},
        {"seed": 1},
    ],
    ids=str,
)
def test_every_choice_runs_and_moves_the_numbers(store, fields):
    plain, changed = train.run(TINY, store, "cpu"), train.run(change(**fields), store, "cpu")
    assert changed.status == "done"
    assert changed.history["running_loss"] != plain.history["running_loss"] or (
        changed.history["train_loss"] != plain.history["train_loss"]
    )


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ({"method": "asam", "scaled": "all"}, {"method": "asam", "scaled": "weights"}),
        ({"method": "asam", "eta": 0.01}, {"method": "asam", "eta": 0.1}),
        ({"num_shards": 4}, {"num_shards": 4, "shard_batchnorm": "batch"}),
        ({"clip": "descent", "clip_norm": 0.1}, {"clip": "descent", "clip_norm": 0.2}),
        ({"label_smoothing": 0.1}, {"label_smoothing": 0.1, "smoothing_convention": "K-1"}),
        ({"dropout": 0.3}, {"dropout": 0.3, "replay_dropout": True}),
    ],
    ids=str,
)
def test_choices_that_depend_on_another(store, one, two):
    assert numbers(train.run(change(**one), store, "cpu")) != numbers(train.run(change(**two), store, "cpu"))


def test_clipping_the_ascent_changes_nothing_where_it_is_normalised(store):
    """eps = rho g / ||g|| has the direction of g alone: clipping both passes is clipping the descent."""
    one, two = (change(clip=which, clip_norm=0.1, norm="none", lr=0.05) for which in ("descent", "both"))
    train.run(one, store, "cpu")
    train.run(two, store, "cpu")
    for a, b in zip(weights(store, one).values(), weights(store, two).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_clipped_sgd_takes_a_step_of_at_most_lr_times_the_norm():
    w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = train.ClippedSGD([w], clip_norm=0.5, lr=1.0)
    loss = optimizer.step(lambda: (optimizer.zero_grad(), value := 10 * w.square().sum(), value.backward())[1])
    assert loss.item() == 250
    assert (w - torch.tensor([3.0, 4.0])).norm().item() == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("convention", ["K", "K-1"])
def test_smoothing_conventions(convention):
    spec = change(label_smoothing=0.1, smoothing_convention=convention)
    found = torch_smoothing(spec, 10)
    target = functional.one_hot(torch.tensor([0]), 10).double() * (1 - found) + found / 10
    expected = 0.1 / 10 if convention == "K" else 0.1 / 9
    assert target[0, 1].item() == pytest.approx(expected)
    assert target.sum().item() == pytest.approx(1)


def test_weight_decay_in_the_loss_is_the_same_as_in_the_update_for_sgd(store):
    """For SGD both add wd * w to the gradient; for SAM they differ (tested above)."""
    one, two = (change(method="sgd", weight_decay=0.01, weight_decay_in=where) for where in ("update", "loss"))
    train.run(one, store, "cpu")
    train.run(two, store, "cpu")
    for a, b in zip(weights(store, one).values(), weights(store, two).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("choice", ["frozen", "eval"])
def test_second_pass_leaves_the_running_statistics(choice):
    """At lr -> 0 the weights stay, so the running statistics after a SAM epoch must be those of an SGD epoch."""
    found = []
    for fields in ({"method": "sgd"}, {"second_pass_batchnorm": choice}, {"second_pass_batchnorm": "update"}):
        training = train.Training.start(change(lr=1e-30, weight_decay=0.0, **fields), CPU)
        make_steps(training, training.steps_per_epoch)
        found.append(dict(training.model.named_buffers()))
    sgd, chosen, updated = found
    assert same(sgd, chosen)
    assert not same(sgd, updated)


def test_shards_of_a_batch():
    def sizes(spec, count):
        training = train.Training.start(spec, CPU)
        shards = Closures(spec, training.model, training.optimizer, torch.zeros(count, 1, 8, 8), torch.zeros(count))
        return [part.stop - part.start for part in shards.parts], shards.weights

    assert sizes(change(num_shards=4), 16) == ([4, 4, 4, 4], None)
    assert sizes(change(shard_size=6), 16)[0] == [6, 6, 4]
    assert sizes(change(shard_size=6), 16)[1] == pytest.approx([6 / 16, 6 / 16, 4 / 16])
    assert sizes(change(num_shards=3), 16)[0] == [5, 6, 5]
    assert sizes(change(num_shards=8), 3)[0] == [1, 1, 1]


# ------------------------------------------------------------------------------------------------ measures and checks


def test_a_measure_of_a_trained_model(store):
    parent = train.run(TINY, store, "cpu")
    spec = MeasureSpec(parent.key)
    record = train.run(spec, store, "cpu")
    assert record.status == "done"
    assert record.measures["lambda_max"] > 0
    store.weights_path(parent.key).unlink()
    assert train.run(spec, store, "cpu").measures == record.measures  # trained again, the same model


@pytest.mark.parametrize(
    "fields", [{"split": "test"}, {"mode": "train"}, {"rho": 0.2}, {"steps": 3}, {"shard_size": 12}]
)
def test_every_choice_of_a_measure_is_felt(store, fields):
    parent = train.run(TINY, store, "cpu").key
    plain = MeasureSpec(parent, "adversarial_sharpness")
    one = train.run(plain, store, "cpu").measures
    two = train.run(dataclasses.replace(plain, **fields), store, "cpu").measures
    assert one["adversarial_sharpness"] > 0
    assert one["adversarial_sharpness"] != two["adversarial_sharpness"]
    assert one["adversarial_sharpness"] == pytest.approx(one["perturbed_loss"] - one["loss"], rel=1e-4)


def halve(store, key):
    """What an import leaves of a run whose weights were exported in half precision."""
    store.half_weights_path(key).write_bytes(half.halved(store.weights_path(key).read_bytes()))
    store.weights_path(key).unlink()


def test_a_measure_of_weights_in_half_precision_says_so(store):
    parent = train.run(TINY, store, "cpu")
    spec, exact = MeasureSpec(parent.key), weights(store, TINY)
    record = train.run(spec, store, "cpu")
    assert "weights" not in record.environment
    halve(store, parent.key)
    again = train.run(spec, store, "cpu")
    assert again.environment["weights"] == "half"
    assert store.load(again.key).of_half_weights
    assert again.measures["lambda_max"] == pytest.approx(record.measures["lambda_max"], rel=0.02)
    assert again.measures != record.measures
    assert not store.weights_path(parent.key).exists()  # it was not trained again
    model = train.trained_model(TINY, store, data.load(TINY.data, TINY.seed), CPU)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, exact[name].half().float())
    assert all(torch.equal(buffer, exact[name]) for name, buffer in model.named_buffers())


def test_exact_weights_come_first_and_what_cannot_be_read_is_trained_again(store, capsys):
    parent = train.run(TINY, store, "cpu")
    spec, content = MeasureSpec(parent.key), store.weights_path(parent.key).read_bytes()
    record = train.run(spec, store, "cpu")
    halve(store, parent.key)
    store.weights_path(parent.key).write_bytes(content)
    assert numbers(train.run(spec, store, "cpu")) == numbers(record)
    store.weights_path(parent.key).write_bytes(b"broken")
    assert train.run(spec, store, "cpu").of_half_weights
    store.half_weights_path(parent.key).write_bytes(b"broken")
    again = train.run(spec, store, "cpu")
    assert numbers(again) == numbers(record)
    assert not again.of_half_weights
    assert capsys.readouterr().err.count("cannot be read") == 2


@pytest.mark.parametrize("rounded", [0, 1])
def test_a_path_with_an_end_in_half_precision_says_so(store, rounded):
    runs = [train.run(change(method=method), store, "cpu") for method in ("sgd", "sam")]
    spec = ConnectSpec(*(run.key for run in runs), path=PathSpec(shape="line", points=3))
    assert not train.run(spec, store, "cpu").of_half_weights
    halve(store, runs[rounded].key)
    assert train.run(spec, store, "cpu").environment["weights"] == "half"


def test_a_measure_without_its_run_says_so(store):
    with pytest.raises(InputError, match="has no record"):
        train.run(MeasureSpec("0" * 16), store, "cpu")


def test_a_check_is_a_record(store):
    record = train.run(CheckSpec("dual_norm", (("p", "2"),)), store)
    assert record.status == "done"
    assert record.measures["relative_gap"] < 1e-5


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: train.choose_device("tpu"), ["device", "tpu", "cpu or cuda"]),
        (lambda: train.choose_device("cuda"), ["cuda", "--device cpu"]),
    ],
)
def test_devices_that_are_not_there(call, words, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError) as error:
        call()
    for word in words:
        assert word in str(error.value)


def test_a_batch_larger_than_what_the_split_leaves_is_refused(store):
    spec = RunSpec(DataSpec(validation_size=950), train=TrainSpec(epochs=1, batch_size=128))
    with pytest.raises(InputError, match=r"batch_size = 128.*50 training images"):
        train.run(spec, store, "cpu")
