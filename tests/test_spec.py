"""Specs: identity, round trips, overrides, and an error for every kind of wrong value."""

import dataclasses
import json
import math
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from samlib import spec as specs_of
from samlib.errors import InputError
from samlib.spec import AugmentSpec, CheckSpec, DataSpec, MeasureSpec, ModelSpec, OptimSpec, RunSpec, TrainSpec

# Changing a default gives every committed record a new meaning under its old key. If that is meant, raise
# store.NUMERICS, refresh the records, and write the new defaults here.
DEFAULTS = {
    "data.name": "digits",
    "data.train_size": None,
    "data.validation_size": 0,
    "data.label_noise": 0.0,
    "data.scaling": "standardize",
    "model.name": "cnn",
    "model.width": 8,
    "model.norm": "batch",
    "model.dropout": 0.0,
    "model.stem": "cifar",
    "model.num_outputs": None,
    "optim.method": "sgd",
    "optim.rho": 0.05,
    "optim.p": 2.0,
    "optim.eta": 0.01,
    "optim.perturbed": "all",
    "optim.scaled": "all",
    "optim.num_shards": 1,
    "optim.shard_size": None,
    "optim.shard_batchnorm": "shard",
    "optim.ascent_from": 0.0,
    "optim.ascent_until": 1.0,
    "optim.second_pass_batchnorm": "frozen",
    "optim.second_pass": "rounded",
    "optim.lr": 0.1,
    "optim.momentum": 0.9,
    "optim.nesterov": False,
    "optim.weight_decay": 0.0005,
    "optim.weight_decay_in": "update",
    "optim.schedule": "cosine",
    "optim.warmup": 0.05,
    "optim.clip": "none",
    "optim.clip_norm": 5.0,
    "train.epochs": 40,
    "train.updates": None,
    "train.batch_size": 128,
    "train.drop_last": True,
    "train.label_smoothing": 0.0,
    "train.smoothing_convention": "K",
    "train.precision": "fp32",
    "train.loss_scale": 1024.0,
    "train.replay_dropout": False,
    "train.logged_loss": "w",
    "train.eval_every": 1,
    "train.eval_train_every": None,
    "augment.autoaugment": False,
    "augment.flip": False,
    "augment.crop": "none",
    "augment.cutout": 0,
    "augment.mixup": 0.0,
    "seed": 0,
    "split_seed": None,
}
MEASURE_DEFAULTS = {
    "parent": "0" * 16,
    "measure": "lambda_max",
    "split": "train",
    "images": None,
    "mode": "eval",
    "rho": 0.05,
    "steps": 1,
    "shard_size": None,
    "mu": 5.0,
    "directions": 30,
    "direction_law": "uniform01",
    "direction_scale": "unit",
}


def test_defaults_are_pinned():
    assert specs_of.flat(RunSpec()) == DEFAULTS
    assert specs_of.flat(MeasureSpec(parent="0" * 16)) == MEASURE_DEFAULTS


@pytest.mark.parametrize(
    ("spec", "key"),
    [
        (RunSpec(), "1c8392ad8a7667bf"),
        (RunSpec(DataSpec(train_size=600), optim=OptimSpec("sam", rho=0.4, p=math.inf), seed=3), "ad8f05d2e26c0806"),
        (CheckSpec("dual_norm", (("p", "inf"),), 2), "ea297ce2ef59217b"),
    ],
)
def test_keys_are_pinned(spec, key):
    assert specs_of.key(spec) == key


def test_a_field_at_its_default_is_left_out():
    assert specs_of.canonical(RunSpec()) == {"kind": "train"}
    assert specs_of.canonical(RunSpec(optim=OptimSpec(rho=0.1))) == {"kind": "train", "optim": {"rho": 0.1}}


def test_whole_and_real_numbers_of_one_value_share_a_key():
    assert specs_of.key(RunSpec(optim=OptimSpec(rho=1))) == specs_of.key(RunSpec(optim=OptimSpec(rho=1.0)))
    assert specs_of.key(RunSpec(train=TrainSpec(epochs=2.0))) == specs_of.key(RunSpec(train=TrainSpec(epochs=2)))


def test_group_leaves_out_the_seed_only():
    one, two = RunSpec(seed=1), RunSpec(seed=2)
    assert specs_of.key(one) != specs_of.key(two)
    assert specs_of.group(one) == specs_of.group(two) != specs_of.group(RunSpec(DataSpec("cifar10")))


@given(
    rho=st.floats(0, 10),
    p=st.one_of(st.just(math.inf), st.floats(1.01, 50)),
    width=st.integers(1, 64),
    seed=st.integers(0, 2**31 - 1),
    method=st.sampled_from(["sgd", "sam", "asam", "average_sam"]),
)
def test_canonical_round_trip_through_json(rho, p, width, seed, method):
    spec = RunSpec(model=ModelSpec(width=width), optim=OptimSpec(method, rho=rho, p=p), seed=seed)
    text = json.dumps(specs_of.canonical(spec), allow_nan=False)
    assert specs_of.from_canonical(json.loads(text)) == spec


@pytest.mark.parametrize(
    "spec",
    [MeasureSpec("0" * 16, "adversarial_sharpness", rho=0.1), CheckSpec("edge_of_stability", (("method", "sam"),), 4)],
)
def test_canonical_round_trip_of_the_other_kinds(spec):
    assert specs_of.from_canonical(specs_of.canonical(spec)) == spec


def test_a_measure_names_its_protocol_where_it_is_not_the_default():
    assert MeasureSpec("0" * 16).column == "lambda_max"
    assert MeasureSpec("0" * 16, "adversarial_sharpness", rho=0.1, split="test").column == (
        "adversarial_sharpness@split=test@rho=0.1"
    )


def test_num_shards_from_either_field():
    assert specs_of.num_shards(RunSpec(optim=OptimSpec("sam", num_shards=4))) == 4
    assert specs_of.num_shards(RunSpec(optim=OptimSpec("sam", shard_size=50))) == 3


def test_override_by_dotted_name_and_by_unique_last_word():
    spec = specs_of.override(RunSpec(), {"epochs": 20, "model.width": 32})
    assert (spec.train.epochs, spec.model.width) == (20, 32)
    assert specs_of.override(spec, {}) == spec


def test_every_field_is_documented():
    documented = specs_of.documentation(RunSpec)
    assert set(documented) == set(DEFAULTS)
    assert all(len(text) > 3 for text in documented.values())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: OptimSpec(rho=-0.1), ["optim.rho", "-0.1", "0 or more"]),
        (lambda: OptimSpec(rho=math.nan), ["optim.rho", "nan"]),
        (lambda: OptimSpec(rho=math.inf), ["optim.rho", "finite"]),
        (lambda: OptimSpec(p=1), ["optim.p", "above 1"]),
        (lambda: OptimSpec(method="samm"), ["optim.method", "samm", "average_sam"]),
        (lambda: OptimSpec(lr=0), ["optim.lr", "above 0"]),
        (lambda: OptimSpec(nesterov=1), ["optim.nesterov", "True or False"]),
        (lambda: OptimSpec("sam", scaled="weights"), ["optim.scaled", "asam", "'sam'"]),
        (lambda: OptimSpec(nesterov=True, momentum=0), ["nesterov", "momentum"]),
        (lambda: OptimSpec(num_shards=2, shard_size=8), ["shard_size", "num_shards", "keep one"]),
        (lambda: OptimSpec("sam", ascent_from=0.5, ascent_until=0.5), ["ascent_from", "0.5", "ascent_until", "below"]),
        (lambda: OptimSpec("sam", ascent_until=1.5), ["ascent_until", "1.5", "from 0 to 1"]),
        (lambda: OptimSpec("sgd", ascent_until=0.5), ["ascent_until", "0.5", "'sgd'"]),
        (lambda: OptimSpec("sgd", ascent_from=0.5), ["ascent_from", "0.5", "'sgd'"]),
        (
            lambda: RunSpec(optim=OptimSpec("sam", ascent_from=0.5), train=TrainSpec(logged_loss="w+eps")),
            ["logged_loss", "ascent_from", "0.5", "use 'w'"],
        ),
        (lambda: ModelSpec("resnet"), ["model.name", "resnet", "cnn"]),
        (lambda: ModelSpec(width=6, norm="group"), ["model.width", "6", "multiple of 4"]),
        (lambda: ModelSpec("cnn", stem="imagenet"), ["model.stem", "imagenet", "resnet18", "'cnn'"]),
        (lambda: ModelSpec("resnet18", width=16), ["model.width", "16", "resnet18", "8"]),
        (lambda: ModelSpec("resnet18", dropout=0.5), ["model.dropout", "0.5", "resnet18"]),
        (lambda: ModelSpec("wrn28_10", norm="group"), ["model.norm", "group", "wrn28_10"]),
        (lambda: RunSpec(model=ModelSpec("resnet20")), ["model.name", "resnet20", "cifar10"]),
        (lambda: RunSpec(augment=AugmentSpec(flip=True)), ["augment", "cifar10", "digits"]),
        (lambda: AugmentSpec(crop="mirror"), ["augment.crop", "mirror", "reflect"]),
        (lambda: OptimSpec(warmup=0.1), ["optim.warmup", "0.1", "one_cycle", "cosine"]),
        (lambda: TrainSpec(loss_scale=2.0), ["train.loss_scale", "2.0", "fp16", "fp32"]),
        (lambda: OptimSpec("sam", second_pass="twice"), ["optim.second_pass", "twice", "two_products"]),
        (
            lambda: RunSpec(optim=OptimSpec("sam", second_pass="two_products")),
            ["optim.second_pass", "two_products", "fp32", "'rounded'"],
        ),
        (
            lambda: RunSpec(optim=OptimSpec(second_pass="two_products"), train=TrainSpec(precision="bf16")),
            ["optim.second_pass", "sgd", "'rounded'"],
        ),
        (lambda: DataSpec("mnist"), ["data.name", "mnist", "digits"]),
        (lambda: DataSpec(label_noise=1.5), ["data.label_noise", "1.5", "from 0 to 1"]),
        (lambda: TrainSpec(epochs=2.5), ["train.epochs", "2.5", "whole"]),
        (lambda: TrainSpec(epochs="ten"), ["train.epochs", "ten"]),
        (lambda: TrainSpec(epochs=True), ["train.epochs", "True"]),
        (lambda: RunSpec(seed=-1), ["seed", "-1"]),
        (lambda: RunSpec(seed=1.0), ["seed", "1.0"]),
        (lambda: RunSpec(optim=OptimSpec("sam", num_shards=129)), ["num_shards", "129", "128"]),
        (lambda: RunSpec(data=DataSpec(train_size=100)), ["batch_size", "128", "100", "drop_last"]),
        (lambda: MeasureSpec("abc"), ["measure.parent", "abc"]),
        (lambda: specs_of.override(RunSpec(), {"epoch": 3}), ["epoch", "epochs"]),
        (lambda: specs_of.override(RunSpec(), {"name": "cnn"}), ["name", "data.name", "model.name"]),
        (lambda: specs_of.from_canonical({"kind": "trian"}), ["kind", "trian", "train"]),
        (lambda: specs_of.from_canonical({"kind": "train", "optim": {"rhoo": 1}}), ["rhoo", "rho"]),
        (lambda: specs_of.from_canonical({"kind": "measure"}), ["parent"]),
    ],
)
def test_bad_values_name_the_field_the_value_and_the_remedy(make, words):
    with pytest.raises(InputError) as error:
        make()
    for word in words:
        assert word in str(error.value)


def test_specs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        RunSpec().seed = 3


def test_needs_the_standard_library_only():
    code = "import sys, samlib.spec; print([m for m in ('torch', 'numpy', 'pandas') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
