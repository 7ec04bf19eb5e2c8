"""The profiles gpu and paper: each published setting has arms with its values or a reason why not, and what runs on gpu
has the published values too, comes in the order it is worth, and fits the minutes there are."""

import hashlib
import math
import re
from dataclasses import replace
from itertools import pairwise

import pandas as pd
import pytest

from samlib import claims, experiments, plots, published, report
from samlib import spec as specs_of
from samlib.experiments import asam_without_batchnorm, batch_size, cifar, optimizer_table, sam_vs_sgd, tuning
from samlib.rules.conventions import NOT_RUN, OUTCOMES
from samlib.spec import AugmentSpec, MeasureSpec, RunSpec
from samlib.store import Record, Store, open_store

STEMS = ("sam_vs_sgd", "batch_size", "asam_without_batchnorm", "msam_sweep", "optimizer_table")
ROWS = published.settings().set_index("setting_id")

# row -> experiment, cells and roles of the arms that run it
BASIC = ("sgd", "sam", "sgd_double")
SMALL, LARGE = (
    tuple(role for role in (*optimizer_table.ROLES, "sgd_double") if ("large" in role) == large)
    for large in (False, True)
)
COVERED = {
    **{
        f"foret-{data}-wrn-28-10-{epochs}": (
            "sam_vs_sgd",
            tuple(f"{short}_wrn{epochs}_{augment}" for augment in ("basic", "cutout", "aa")),
            BASIC,
        )
        for data, short in (("cifar-10", "c10"), ("cifar-100", "c100"))
        for epochs in (200, 1800)
    },
    **{
        f"behdin-{data}-{model}": ("msam_sweep", (cell,), ("sgd", "sam", "msam"))
        for data, model, cell in (
            ("cifar-10", "resnet50", "cifar10_resnet50"),
            ("cifar-10", "wrn2810", "cifar10_wrn"),
            ("cifar-100", "resnet50", "cifar100_resnet50"),
            ("cifar-100", "wrn2810", "cifar100_wrn"),
        )
    },
    "behdin-m-sweep": (
        "msam_sweep",
        ("cifar100_resnet50", "cifar100_wrn"),
        (
            "msam an eighth of the shards",
            "msam a quarter of the shards",
            "msam half the shards",
            "msam",
            "msam twice the shards",
        ),
    ),
    "behdin-lambda-max": ("msam_sweep", ("cifar100_resnet50", "cifar100_wrn"), ("sgd", "sam", "msam")),
    "behdin-hybrid": (
        "msam_sweep",
        ("cifar100_resnet50", "cifar100_wrn"),
        tuple(f"msam {part}" for s in (20, 50, 80) for part in (f"first {s}%", f"last {s}%")),
    ),
    "coldenhoff-a": ("sam_vs_sgd", ("plain",), ("sgd", "sam")),
    "coldenhoff-b": ("batch_size", ("batch=16", "batch=64", "batch=128"), ("sgd", "sam")),
    "coldenhoff-c": ("asam_without_batchnorm", ("published",), ("sam", "asam")),
    "boca-train-128": ("optimizer_table", ("table",), SMALL),
    "boca-train-5000": ("optimizer_table", ("table",), LARGE),
}
# row -> what of it no spec can say
NOT_EXPRESSIBLE = {
    "foret-cifar-10-shake-shake-std": "Shake-Shake",
    "foret-cifar-10-pyramidnet-std": "PyramidNet",
    "foret-cifar-10-pyramidnet+shakedrop-std": "PyramidNet",
    "foret-cifar-100-shake-shake-std": "Shake-Shake",
    "foret-cifar-100-pyramidnet-std": "PyramidNet",
    "foret-cifar-100-pyramidnet+shakedrop-std": "PyramidNet",
    "foret-svhn-wrn-28-10": "SVHN",
    "foret-svhn-shake-shake": "SVHN",
    "foret-fashion-mnist-wrn-28-10": "Fashion-MNIST",
    "foret-fashion-mnist-shake-shake": "Fashion-MNIST",
    "foret-imagenet": "ImageNet",
    "foret-finetune-b7": "EfficientNet",
    "foret-finetune-l2": "EfficientNet",
    "foret-finetune-imagenet": "EfficientNet",
    "foret-mutual-information": "PGDL",
    "behdin-cifar-10-vitb16": "ViT-B/16",
    "behdin-cifar-100-vitb16": "ViT-B/16",
    "behdin-imagenet-resnet50": "ImageNet",
    "behdin-imagenet-wrn502": "ImageNet",
    "behdin-imagenet-vits32": "ImageNet",
    "behdin-glue-cola": "GLUE",
    "behdin-glue-mrpc": "GLUE",
    "behdin-glue-sst-2": "GLUE",
    "behdin-glue-qqp": "GLUE",
}
# row -> the experiment that claims.yaml gives its claims to, and which is none of these five
ELSEWHERE = {
    "foret-label-noise": "label_noise",
    "foret-m-sharpness": "m_sharpness",
    "foret-hessian": "hessian_spectrum",
    "foret-second-order": "ablations",
    "foret-p-norm": "ablations",
    "foret-inner-steps": "ablations",
    "boca-sharpness-adv": "sharpness",
    "boca-sharpness-avg": "sharpness",
    "boca-asymmetry": "asymmetry",
    "boca-slices": "asymmetry",
    "boca-landscape": "loss_landscapes",
    "boca-mode-connectivity": "mode_connectivity",
}


def arms_of(row: str, profile: str):
    stem, cells, roles = COVERED[row]
    found = [arm for arm in experiments.arms(stem, profile) if arm.cell in cells and arm.role in roles]
    assert {(arm.cell, arm.role) for arm in found} == {(cell, role) for cell in cells for role in roles}
    return found


def numbers(text: str) -> set[float]:
    return {float(number) for number in re.findall(r"\d+(?:\.\d+)?", text)}


# ---------------------------------------------------------------------------------------------- published settings


def test_every_published_setting_is_run_or_listed_with_a_reason():
    places = [COVERED, NOT_EXPRESSIBLE, ELSEWHERE]
    assert sorted(row for place in places for row in place) == sorted(ROWS.index)
    for row, word in NOT_EXPRESSIBLE.items():
        assert word in f"{ROWS.dataset[row]} {ROWS.model[row]}", row
    named = {claim.experiment for claim in published.claims().values()}
    assert set(ELSEWHERE.values()) <= named - set(STEMS)


def stated(row: pd.Series) -> dict[str, object]:
    """The fields of a spec whose value a row gives for all its arms alike."""
    words = {
        "data.name": {"CIFAR-10": "cifar10", "CIFAR-100": "cifar100"}[row.dataset],
        "optim.lr": row.lr,
        "optim.momentum": row.momentum,
        "optim.weight_decay": row.weight_decay,
        "optim.nesterov": {"false": False, "yes": True}.get(row.nesterov),
        "optim.schedule": schedule(row.lr_schedule),
        "optim.warmup": 0.05 if row.warmup == "5%" else None,
        "optim.clip_norm": row.grad_clip_norm,
        "optim.clip": "none" if math.isnan(row.grad_clip_norm) else "descent",
        "optim.second_pass_batchnorm": batchnorm(f"{row.unstated} {row.artefact_says}"),
        "train.label_smoothing": row.label_smoothing,
        "data.scaling": {"[-1": "symmetric", "pixels": "unit"}.get(re.split(r"[ ,]", scaling_words(row))[0]),
    }
    return {field: value for field, value in words.items() if value is not None and value == value}


def schedule(text: object) -> str | None:
    return (
        next((name for name in ("constant", "cosine", "one cycle") if name in str(text)), "").replace(" ", "_") or None
    )


def batchnorm(text: str) -> str | None:
    return {True: "update"}.get("updated on both passes" in text) or {True: "frozen"}.get("second pass" in text)


def scaling_words(row: pd.Series) -> str:
    return str(row.normalisation_note).removeprefix("inputs scaled to ")


MODELS = {
    "WRN-28-10": {"wrn28_10"},
    "ResNet-50": {"resnet50"},
    "ResNet-50; WRN-28-10": {"resnet50", "wrn28_10"},
    "ResNet-18": {"resnet18"},
    "MobileNetV2, CIFAR variant": {"mobilenet_v2"},
}
ROWS_AND_PROFILES = [*((row, "paper") for row in COVERED), *((row, "gpu") for row in COVERED if "coldenhoff" in row)]


@pytest.mark.parametrize(("row", "profile"), ROWS_AND_PROFILES)
def test_arms_have_the_values_of_their_row(row, profile):
    printed, arms = ROWS.loc[row], arms_of(row, profile)
    for arm in arms:
        fields = specs_of.flat(arm.base)
        expected = stated(printed)
        assert {name: fields[name] for name in expected} == expected, (arm.cell, arm.role)
        assert arm.base.model.norm == ("none" if "identity" in printed.model else "batch")
        head = {"imagenet": 1000, "cifar": None}
        assert (arm.base.model.stem == "imagenet") == ("ImageNet stem" in printed.model)
        assert arm.base.model.num_outputs == head[arm.base.model.stem]
    assert {arm.base.model.name for arm in arms} == MODELS[printed.model.split(" (")[0]]
    assert {float(arm.base.train.batch_size) for arm in arms} == numbers(printed.batch_size)


@pytest.mark.parametrize(("row", "profile"), ROWS_AND_PROFILES)
def test_epochs_and_seeds_are_those_of_the_row(row, profile):
    printed, arms = ROWS.loc[row], arms_of(row, profile)
    epochs = {role: {arm.specs[0].train.epochs for arm in arms if arm.role == role} for role in {a.role for a in arms}}
    once = numbers(printed.epochs_sam)
    assert all(found == once for role, found in epochs.items() if role != "sgd_double")
    if "sgd_double" in epochs:
        assert "2E" in printed.epochs_baseline or "400 (128 only)" in printed.epochs_baseline
        assert epochs["sgd_double"] == {2 * number for number in once}
    if ";" in str(printed.seeds):
        own = tuple(int(number) for number in sorted(numbers(printed.seeds)))
        assert all(arm.seeds[: len(own)] == own for arm in arms)
    assert all(len(arm.seeds) >= printed.n_runs for arm in arms if not math.isnan(printed.n_runs))


def rhos_by_method(text: str) -> dict[str, set[float]]:
    """'SAM: 0.05;0.1 | average SAM: 0.5;1' -> {'sam': {0.05, 0.1}, 'average_sam': {0.5, 1.0}}."""
    found: dict[str, set[float]] = {}
    for method, values in re.findall(r"(average SAM|ASAM|SAM):? ([\d.;]+)", text):
        found[method.lower().replace(" ", "_")] = numbers(values)
    return found


@pytest.mark.parametrize(("row", "profile"), ROWS_AND_PROFILES)
def test_radii_and_shards_are_those_of_the_row(row, profile):
    printed, arms = ROWS.loc[row], arms_of(row, profile)
    ascending = [arm for arm in arms if arm.base.optim.method != "sgd"]
    found: dict[str, set[float]] = {}
    for arm in ascending:
        found.setdefault(arm.base.optim.method, set()).add(arm.base.optim.rho)
    assert found == (rhos_by_method(printed.rho) or {"sam": numbers(printed.rho)})
    sharded = [arm.base for arm in ascending if arm.role.startswith("msam") or not row.startswith("behdin")]
    if not pd.isna(printed.n_shards):
        assert {float(specs_of.num_shards(spec)) for spec in sharded} == numbers(printed.n_shards)
        sizes = {spec.train.batch_size / specs_of.num_shards(spec) for spec in sharded}
        assert sizes == numbers(printed.shard_size)
    assert all(specs_of.num_shards(arm.base) == 1 for arm in ascending if arm.base not in sharded)


AUGMENTATION = {
    "none": {AugmentSpec()},
    "basic (flip, pad 4, random crop) | +cutout | +autoaugment": {
        AugmentSpec(flip=True, crop="zero"),
        AugmentSpec(flip=True, crop="zero", cutout=16),
        AugmentSpec(flip=True, crop="zero", autoaugment=True),
    },
    # its code pads by reflection, and cuts out 16 pixels (E-B25)
    "flip, pad 4, random crop, AutoAugment, CutOut": {
        AugmentSpec(autoaugment=True, flip=True, crop="reflect", cutout=16)
    },
}
UNSTATED = {AugmentSpec(flip=True, crop="zero")}  # behdin2023 (E-M6)


@pytest.mark.parametrize("row", COVERED)
def test_images_are_augmented_as_the_row_says(row):
    assert {arm.base.augment for arm in arms_of(row, "paper")} == AUGMENTATION.get(ROWS.augmentation[row], UNSTATED)


def test_the_published_number_of_updates():
    """E-B11: 78,200 at batch 128, and 2,000 at batch 5000."""
    arms = {(arm.cell, arm.role): arm.specs[0] for arm in experiments.arms("optimizer_table", "paper")}
    updates = {role: arms["table", role].train.epochs * cifar.updates_per_epoch(arms["table", role]) for role in BOTH}
    assert updates == {"sgd": 78_200, "sgd_large": 2000}
    stopped = [spec.train for (cell, _), spec in arms.items() if cell == optimizer_table.STOPPED]
    assert {(train.updates, train.epochs) for train in stopped} == {(2000, 6)}


BOTH = ("sgd", "sgd_large")


def test_asam_scales_every_tensor_and_has_no_eta():
    """E-C6."""
    for profile in ("gpu", "paper"):
        for arm in arms_of("coldenhoff-c", profile):
            assert (arm.base.optim.eta, arm.base.optim.scaled, arm.base.optim.perturbed) == (0, "all", "all")


# ---------------------------------------------------------------------------------------------- gpu beside paper


def changed(a: RunSpec, b: RunSpec) -> set[str]:
    first, second = specs_of.flat(a), specs_of.flat(b)
    return {name for name in first if first[name] != second[name]}


@pytest.mark.parametrize(
    ("stem", "cells", "fields"),
    [
        ("sam_vs_sgd", ("plain",), set()),
        ("batch_size", tuple(batch_size.CIFAR_SIZES), set()),
        ("batch_size", tuple(batch_size.CIFAR_UPDATES), set()),
        ("asam_without_batchnorm", ("published",), set()),
        (
            "optimizer_table",
            ("table",),
            {"train.epochs", "train.drop_last", "train.eval_every", "train.eval_train_every", "train.precision"},
        ),
    ],
)
def test_gpu_differs_from_paper_in_nothing_else(stem, cells, fields):
    gpu, paper = (
        {(arm.cell, arm.role): arm.specs[0] for arm in experiments.arms(stem, profile) if arm.cell in cells}
        for profile in ("gpu", "paper")
    )
    assert gpu.keys() == paper.keys()
    for name in gpu:
        assert changed(gpu[name], paper[name]) == fields


def test_controls_of_precision_differ_in_precision_alone():
    for stem, cell, control in (
        ("sam_vs_sgd", "plain", "plain, tf32"),
        ("optimizer_table", "table", "table, tf32"),
    ):
        arms = {(arm.cell, arm.role): arm for arm in experiments.arms(stem, "gpu")}
        controls = {role: arm for (at, role), arm in arms.items() if at == control}
        assert "sam" in {role.split(" ")[0] for role in controls}
        for role, arm in controls.items():
            assert changed(arm.base, arms[cell, role].base) == {"train.precision"}
            assert control.endswith(f", {arm.base.train.precision}")
            assert arm.seeds == arms[cell, role].seeds[:3]


def test_at_equal_updates_every_batch_size_makes_as_many():
    cells = batch_size.panels("gpu")["equal updates"]
    arms = [arm.specs[0] for arm in experiments.arms("batch_size", "gpu") if arm.cell in cells]
    counts = {spec.train.updates or spec.train.epochs * cifar.updates_per_epoch(spec) for spec in arms}
    assert counts == {39_000}
    assert {spec.train.batch_size for spec in arms} == {16, 64, 128}
    for spec in arms:  # and no epoch is counted that is not begun
        assert 0 <= spec.train.epochs * cifar.updates_per_epoch(spec) - 39_000 < cifar.updates_per_epoch(spec)


def test_claims_about_spread_have_ten_seeds_and_the_others_three():
    arms = {(arm.cell, arm.role): len(arm.seeds) for stem in STEMS for arm in experiments.arms(stem, "gpu")}
    ten = {
        *((cell, role) for cell in ("batch=64", "batch=128", "plain") for role in ("sgd", "sam")),
        *(("published", role) for role in ("sam", "asam")),
    }
    assert {arm for arm, seeds in arms.items() if seeds == 10} == ten
    assert min(arms.values()) == 3


# ---------------------------------------------------------------------------------------------- keys


def keys(stem: str, profile: str) -> list[str]:
    return [specs_of.key(spec) for arm in experiments.arms(stem, profile) for spec in arm.specs]


@pytest.mark.parametrize("profile", ["gpu", "paper"])
def test_no_run_is_declared_twice_but_what_01_and_02_share(profile):
    found = {stem: keys(stem, profile) for stem in STEMS}
    assert all(len(set(of_stem)) == len(of_stem) for of_stem in found.values())
    every = [key for of_stem in found.values() for key in of_stem]
    shared = {key for key in every if every.count(key) > 1}
    both = {
        specs_of.key(spec)
        for arm in experiments.arms("sam_vs_sgd", profile)
        if arm.cell == "plain" and arm.role in ("sgd", "sam")
        for spec in arm.specs
    }
    assert shared == both <= set(found["batch_size"])


# The quick profile, whose records are committed, does not move when the other profiles do.
QUICK = {
    "batch_size": "7ef93f9a168ff62d",
    "asam_without_batchnorm": "b7cda9ddac9484cb",
    "msam_sweep": "80803970aae531d9",
    "optimizer_table": "4a3bd8f76fc8ac59",
}


@pytest.mark.parametrize("stem", QUICK)
def test_the_runs_of_quick_are_what_they_were(stem):
    found = {specs_of.key(spec) for spec in experiments.specs(experiments.arms(stem, "quick"))}
    assert hashlib.sha256("".join(sorted(found)).encode()).hexdigest()[:16] == QUICK[stem]


# ---------------------------------------------------------------------------------------------- order and minutes

GPU = [arm for stem in STEMS for arm in experiments.arms(stem, "gpu")]


def test_runs_come_in_the_order_they_are_worth():
    """Batch 128, C, batch 64, batch 16, the table of boca2023; in each the paper's own seeds first."""
    order = [specs_of.key(spec) for spec in experiments.in_order_of_worth(GPU)]
    stages = [
        [arm for arm in GPU if arm.cell == "plain" and arm.role in ("sgd", "sam")],
        [arm for arm in GPU if arm.cell == "published" and arm.role in ("asam", "sam")],
        [arm for arm in GPU if arm.cell == "batch=64"],
        [arm for arm in GPU if arm.cell == "batch=16"],
        [arm for arm in GPU if arm.cell == "table"],
    ]
    places = [[order.index(specs_of.key(spec)) for arm in stage for spec in arm.specs] for stage in stages]
    for earlier, later in pairwise(places):
        assert max(earlier) < min(later)
    for arm in GPU:
        placed = [order.index(specs_of.key(spec)) for spec in arm.specs]
        assert placed == sorted(placed), (arm.cell, arm.role)


def test_a_column_of_the_table_is_complete_before_the_next_one_begins():
    table = [arm for arm in GPU if arm.cell == "table"]
    seeds = [spec.seed for spec in experiments.in_order_of_worth(table)]
    assert seeds == sorted(seeds)


# A conservative estimate for one H200, on which nothing has been measured yet: 3.5 us a kernel, 60 % of 4.3 TB/s. A
# step of 128 images of the ResNet-18 with the stem for ImageNet is bound by its number of kernels, counted by dispatch:
# 225 forward and backward, 125 without batch norm. The bookkeeping of a step moves 20 bytes a parameter for SGD and 68
# for SAM. MobileNetV2, bound by memory, is estimated at 2.63 s an epoch for SAM, and half for SGD. In fp32, 35 % of 67
# TFLOP/s may hold it up instead.
KERNEL, BANDWIDTH, PARAMETERS = 3.5e-6, 0.6 * 4.3e12, 11.7e6
RESNET_FLOP, FP32_FLOPS = 0.22e9, 0.35 * 67e12
KERNELS = {"batch": 225, "none": 125}
MOBILENET_PASS = 2.63 / 2 / 50_000
RESNET_IMAGE = 1e-6  # forward alone, in large batches


def seconds(spec: RunSpec) -> float:
    """Of a run alone on the device."""
    passes = 1 if spec.optim.method in ("sgd", "average_sam") else 2
    updates = spec.train.updates or spec.train.epochs * cifar.updates_per_epoch(spec)
    if spec.model.name == "mobilenet_v2":
        step, image = passes * MOBILENET_PASS * spec.train.batch_size, MOBILENET_PASS / 3
    else:
        moved = {1: 20, 2: 68}[passes] * PARAMETERS / BANDWIDTH
        one_pass = KERNELS[spec.model.norm] * KERNEL
        if spec.train.precision == "fp32":
            one_pass = max(one_pass, spec.train.batch_size * RESNET_FLOP / FP32_FLOPS)
        step, image = passes * one_pass + moved, RESNET_IMAGE
    every, of_train = spec.train.eval_every, spec.train.eval_train_every or spec.train.eval_every
    looked_at = spec.train.epochs * (10_000 / every + 50_000 / of_train)
    return updates * step + looked_at * image


def minutes(arms) -> float:
    return sum(seconds(spec) for spec in experiments.specs([replace(arm, measures=()) for arm in arms])) / 60


SHARE = {"01 to 03": 50, "05 to 10": 50}
COLDENHOFF_ARMS = [arm for stem in STEMS[:3] for arm in experiments.arms(stem, "gpu")]
AT_TUNED_RADII = [  # declared once their radii have been chosen: at any others
    replace(arm, base=specs_of.override(arm.base, {"rho": 7 * arm.base.optim.rho}), seeds=arm.seeds[:5])
    for arm in COLDENHOFF_ARMS
    if arm.cell == "published" and arm.role in ("sam", "asam") and not asam_without_batchnorm.GPU_RHO
]


def test_minutes_of_single_runs():
    """The arithmetic by hand, once."""
    found = {(arm.cell, arm.role): seconds(arm.specs[0]) for arm in GPU}
    products = 128 * 0.22e9 / (0.35 * 67e12)  # of a step, more than its 225 kernels take
    assert found["plain", "sgd"] == pytest.approx(39_000 * (products + 20 * 11.7e6 / 2.58e12) + 1.2, abs=0.1)
    assert found["plain", "sam"] == pytest.approx(39_000 * (2 * products + 68 * 11.7e6 / 2.58e12) + 1.2, abs=0.1)
    of_tf32 = found["plain, tf32", "sam"]
    assert of_tf32 == pytest.approx(39_000 * (450 * 3.5e-6 + 68 * 11.7e6 / 2.58e12) + 1.2, abs=0.1)
    assert found["table", "sam rho=0.1"] == pytest.approx(20 * 2.63, rel=0.06)


def test_what_has_to_be_run_first_fits_its_share():
    """Batch 128 and the choice of radii for C. The rest waits for more minutes, or for a GPU that is faster than this
    estimate."""
    first = [arm for arm in COLDENHOFF_ARMS if arm.priority <= cifar.CHOICE_OF_RHO]
    assert minutes(first) <= SHARE["01 to 03"]
    assert minutes(COLDENHOFF_ARMS) > SHARE["01 to 03"]  # and the order is of use


def test_the_table_fits_its_share():
    arms = experiments.arms("optimizer_table", "gpu")
    assert minutes(arms) <= SHARE["05 to 10"]
    published = [replace(arm, base=specs_of.override(arm.base, {"epochs": 200}), seeds=arm.seeds[:1]) for arm in arms]
    assert minutes([arm for arm in published if arm.cell == "table"]) > SHARE["05 to 10"]


# ---------------------------------------------------------------------------------------------- choices


def test_radii_stand_in_the_module_once_their_choice_has_been_made_and_not_before():
    for choice in asam_without_batchnorm.GPU_TUNING:
        frame = open_store("gpu").frame(choice.arms)
        chosen = asam_without_batchnorm.GPU_RHO.get(choice.method)
        if set(frame["status"]) != {"done"}:
            assert chosen is None
            continue
        assert tuning.choose(tuning.validation_accuracies(frame.to_dict("records"), choice.field)) == chosen


def test_the_choice_looks_at_images_that_no_run_trains_on_and_at_seeds_of_its_own():
    for choice in asam_without_batchnorm.GPU_TUNING:
        published_arm = next(arm for arm in GPU if (arm.cell, arm.role) == ("published", choice.method))
        assert published_arm.base.optim.rho in choice.grid
        for arm in choice.arms:
            assert changed(arm.base, published_arm.base) <= {
                "optim.rho",
                "data.validation_size",
                "train.epochs",
                "train.eval_every",
            }
            assert arm.base.data.validation_size == 5000
            assert set(arm.seeds) == set(tuning.DEV_SEEDS)
    assert not {seed for arm in GPU if not arm.tuning for seed in arm.seeds} & set(tuning.DEV_SEEDS)


def test_arms_at_chosen_radii(monkeypatch):
    monkeypatch.setattr(asam_without_batchnorm, "GPU_RHO", {"sam": 0.1, "asam": 2.0})
    arms = {arm.role: arm for arm in experiments.arms("asam_without_batchnorm", "gpu") if arm.cell == "tuned"}
    assert {role: arm.base.optim.rho for role, arm in arms.items()} == {"sam": 0.1, "asam": 2.0}
    for role, arm in arms.items():
        beside = next(other for other in GPU if (other.cell, other.role) == ("published", role))
        assert changed(arm.base, beside.base) == {"optim.rho"}
        assert (arm.curves, arm.seeds) == (beside.curves, beside.seeds[:5])


# ---------------------------------------------------------------------------------------------- verdicts

BOUND = {
    profile: [
        (claim, stem) for stem in STEMS for claim, bound in experiments.load(stem).DECIDES.items() if bound.get(profile)
    ]
    for profile in ("gpu", "paper")
}


def test_which_claims_are_decided():
    every = {claim for stem in STEMS for claim in experiments.load(stem).DECIDES}
    on_gpu, on_paper = ({claim for claim, _ in BOUND[profile]} for profile in ("gpu", "paper"))
    assert every - on_paper == {"foret-svhn", "foret-fashion-mnist"}
    assert on_gpu == {claim for claim in every if claim.startswith(("coldenhoff", "boca"))}


def made_up(spec) -> Record:
    """A record of a run with plausible numbers that depend on its key."""
    key = specs_of.key(spec)
    draw = int(key[:4], 16) / 16**4
    if isinstance(spec, MeasureSpec):
        names = {"first_layer_kurtosis": ("first_layer_kurtosis", "quantile_ratio", "range", "sd")}
        values = dict.fromkeys(names.get(spec.measure, (spec.measure,)), 1 + draw)
        return Record(key, specs_of.canonical(spec), "done", measures=values)
    last = {"test_accuracy_pct": 60 + draw, "train_accuracy_pct": 99.0}
    last |= {"test_loss": 1 + draw, "train_loss": 0.1 + draw, "running_loss": 0.2 + draw}
    epochs = [epoch for epoch in range(1, spec.train.epochs + 1) if epoch % spec.train.eval_every == 0]
    epochs = epochs[-len(epochs) // 2 :] if spec.train.epochs <= 200 else epochs[-1:]
    history = {"epoch": [float(epoch) for epoch in epochs], "step": [float(epoch) for epoch in epochs]}
    history |= {name: [value * (1 - 0.001 * i) for i in range(len(epochs))] for name, value in last.items()}
    final = {"last": last, "best_test": last}
    return Record(key, specs_of.canonical(spec), "done", history=history, final=final)


@pytest.fixture(scope="module")
def full_stores(tmp_path_factory):
    """Stores with a record of every run of a profile."""
    stores = {profile: Store(tmp_path_factory.mktemp(profile), writable=True) for profile in ("gpu", "paper")}
    for profile, store in stores.items():
        for spec in experiments.all_specs(profile, STEMS):
            store.save(made_up(spec))
    return stores


@pytest.mark.parametrize(("profile", "claim"), [(p, claim) for p, bound in BOUND.items() for claim, _ in bound])
def test_every_rule_can_judge_the_arms_it_is_bound_to(profile, claim, full_stores):
    """Roles, cells, curves and measures are there: with records of all runs there is an outcome, and an interval for
    every part that asks for one."""
    found = claims.verdict(claim, profile, full_stores[profile])
    assert found.outcome in set(OUTCOMES) - {NOT_RUN}
    # the spread at batch 16 has three seeds, and is shown for information or one of three
    few = "batch=16" if claim.endswith("variance") and profile == "gpu" else None
    judged = [part for part in found.parts if "seeds with" not in part.statistic and "-Forsythe" not in part.statistic]
    assert judged
    assert [part.name for part in judged if math.isnan(part.low) and part.name != few] == []
    assert "missing" not in found.reason


@pytest.mark.parametrize(("profile", "claim"), [(p, claim) for p, bound in BOUND.items() for claim, _ in bound])
def test_only_the_shortened_table_is_a_miniature(profile, claim):
    """Its claims are about 200 epochs; the one about short trainings is not."""
    stem, _ = experiments.decides(claim, profile)
    shortened = profile == "gpu" and stem == "optimizer_table" and "short-training" not in claim
    assert experiments.published_scale(stem, profile, claim) is not shortened


def test_the_short_trainings_of_boca2023_have_20_to_50_epochs():
    for profile in ("gpu", "paper"):
        _, (cell,) = experiments.decides("boca-short-training-mobilenetv3-sam-worse", profile)
        arms = [arm for arm in experiments.arms("optimizer_table", profile) if arm.cell == cell]
        assert {20 <= arm.specs[0].train.epochs <= 50 for arm in arms} == {True}


# ---------------------------------------------------------------------------------------------- pages


def test_a_page_can_be_about_cells_that_a_profile_lacks():
    nothing = open_store("gpu").frame([])
    assert list(report.contrasts(nothing, "test_loss", [("sam", "sgd")]).columns) == ["difference of test_loss", "n"]
    assert report.caption("Test loss", nothing, "test_loss") == "*Test loss: this profile has no such arms.*"
    assert plots.against(nothing, "train.batch_size", "test_loss").axes[0].texts


def test_the_cells_of_a_page_are_those_of_its_profile():
    for profile in experiments.PROFILES:
        cells = {arm.cell for arm in batch_size.arms(profile)}
        panels = batch_size.panels(profile)
        assert {cell for panel in panels.values() for cell in panel} <= cells
        assert panels["equal epochs"] == experiments.decides("coldenhoff-b-small-batch-better", profile)[1]


def test_table_1_of_foret2021_has_a_cell_for_each_printed_figure_of_its_network():
    printed = published.results().query("paper == 'foret2021' and table == 'T1' and model == 'WRN-28-10'")
    for data, epochs in ((data, epochs) for data in ("CIFAR-10", "CIFAR-100") for epochs in (200, 1800)):
        rows = printed[(printed["dataset"] == data) & (printed["epochs"] == epochs)]
        cells = [cell for cell in sam_vs_sgd.TABLE_1 if cell.startswith(f"{data.replace('CIFAR-', 'c')}_wrn{epochs}_")]
        assert rows["augmentation"].nunique() == len(cells) == 3
