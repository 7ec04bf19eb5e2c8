"""Declarations: every claim of an experiment is bound, every arm is well formed, and choices follow their rule."""

import pandas as pd
import pytest

from samlib import experiments, published
from samlib import spec as specs_of
from samlib.errors import InputError
from samlib.experiments import Arm, Pair, digits, measure, path, sam_vs_sgd, tuning
from samlib.spec import MeasureSpec, OptimSpec, RunSpec
from samlib.store import open_store

EVERY_PROFILE = [(stem, profile) for stem in experiments.STEMS for profile in experiments.PROFILES]


@pytest.mark.parametrize("stem", experiments.STEMS)
def test_an_experiment_decides_exactly_the_claims_that_name_it(stem):
    named = {claim.id for claim in published.claims().values() if claim.experiment == stem}
    assert set(experiments.load(stem).DECIDES) == named


@pytest.mark.parametrize(("stem", "profile"), EVERY_PROFILE)
def test_bound_cells_exist(stem, profile):
    cells = {arm.cell for arm in experiments.arms(stem, profile) if not arm.tuning}
    for claim in experiments.load(stem).DECIDES:
        assert set(experiments.decides(claim, profile)[1]) <= cells


@pytest.mark.parametrize(("stem", "profile"), EVERY_PROFILE)
def test_no_two_arms_share_a_name_and_every_spec_comes_after_its_parent(stem, profile):
    arms = experiments.arms(stem, profile)
    assert len({(arm.cell, arm.role) for arm in arms}) == len(arms)
    seen = set()
    for spec in experiments.specs(arms):
        if isinstance(spec, MeasureSpec):
            assert spec.parent in seen
        seen.add(specs_of.key(spec))


def test_twice_and_half_the_epochs():
    epochs = {(arm.cell, arm.role): arm.specs[0].train.epochs for arm in sam_vs_sgd.arms("quick")}
    for cell in sam_vs_sgd.CELLS:
        assert epochs[cell, "sgd_double"] == 2 * epochs[cell, "sgd"] == 2 * epochs[cell, "sam"]
        assert epochs[cell, "sam_half"] * 2 == epochs[cell, "sam"]


def test_arms_of_a_cell_differ_in_the_method_alone():
    arms = {arm.role: arm.base for arm in sam_vs_sgd.comparison("noise40")}
    sgd, sam = specs_of.flat(arms["sgd"]), specs_of.flat(arms["sam"])
    assert {name for name in sgd if sgd[name] != sam[name]} == {"optim.method", "optim.rho"}


CHOICES = [(stem, choice) for stem in experiments.STEMS for choice in getattr(experiments.load(stem), "TUNING", ())]


@pytest.mark.parametrize(
    ("stem", "choice"), CHOICES, ids=[f"{stem} {c.cell} {c.method} {c.field}" for stem, c in CHOICES]
)
def test_chosen_settings_follow_the_stated_rule_on_the_committed_tuning_records(stem, choice):
    frame = open_store("quick").frame(choice.arms)
    assert set(frame["status"]) == {"done"}
    found = tuning.validation_accuracies(frame.to_dict("records"), choice.field)
    assert {len(accuracies) for accuracies in found.values()} == {len(tuning.DEV_SEEDS)}
    assert tuning.choose(found) == choice.chosen
    assert min(found) < choice.chosen < max(found)  # the grid goes on to both sides of the choice


@pytest.mark.parametrize("stem", experiments.STEMS)
def test_choices_are_run_on_seeds_of_their_own(stem):
    """And what was chosen is what the arms that are reported use."""
    arms = experiments.arms(stem, "quick")
    choices = getattr(experiments.load(stem), "TUNING", ())
    assert [arm for arm in arms if arm.tuning] == list(tuning.arms(choices))
    assert not {seed for arm in arms if not arm.tuning for seed in arm.seeds} & set(tuning.DEV_SEEDS)


def test_the_setting_with_less_noise_is_not_tuned():
    assert sam_vs_sgd.RHO["noise20"] == sam_vs_sgd.RHO["noise40"]
    assert sam_vs_sgd.LR["noise20"] == sam_vs_sgd.LR["noise40"] == digits.LR["clean"]


def test_the_choice_goes_by_the_worst_seed_then_by_the_mean_then_to_the_smaller():
    rows = pd.DataFrame({"rho": [0.1, 0.1, 0.4, 0.4], "validation_accuracy_pct": [80.0, 82.0, 95.0, 10.0]})
    found = tuning.validation_accuracies(rows.to_dict("records"), "rho")
    assert found == {0.1: [80.0, 82.0], 0.4: [95.0, 10.0]}
    assert tuning.choose(found) == 0.1
    assert tuning.choose(found | {0.2: [80.0, 83.0]}) == 0.2
    assert tuning.choose(found | {0.05: [82.0, 80.0]}) == 0.05


def test_a_variation_has_keys_of_its_own_and_leaves_tuning_alone():
    plain = experiments.arms("sam_vs_sgd", "quick")
    varied = experiments.arms("sam_vs_sgd", "quick", seeds=[3, 7], overrides={"epochs": 4, "model.width": 12})
    for before, after in zip(plain, varied, strict=True):
        if before.tuning:
            assert before == after
            continue
        assert (before.role, before.cell) == (after.role, after.cell)
        assert after.seeds == (3, 7)
        assert not {specs_of.key(s) for s in before.specs} & {specs_of.key(s) for s in after.specs}
    epochs = {arm.role: arm.specs[0].train.epochs for arm in varied if arm.cell == "clean"}
    assert epochs == {"sgd": 4, "sam": 4, "sgd_double": 8, "sam_half": 2}


def test_fields_that_only_fit_together_may_be_changed_together():
    both = {"num_shards": 64, "batch_size": 64}
    for changes in (both, dict(reversed(both.items())), {"train_size": 100, "batch_size": 16}):
        assert experiments.arms("sam_vs_sgd", "quick", overrides=changes)


def test_measures_belong_to_the_member_they_are_taken_of():
    arm = Arm("sgd", "cell", RunSpec(), (0, 1), (measure("lambda_max"),))
    for member in arm.specs:
        assert [spec.parent for spec in arm.measures_of(member)] == [specs_of.key(member)]


def test_in_order_of_worth_pairs_are_complete_early_and_what_is_measured_follows_its_run():
    sam, sgd = RunSpec(optim=OptimSpec("sam")), RunSpec()
    later = Arm("later", "cell", RunSpec(optim=OptimSpec("asam")), (0,), priority=2)
    first = Arm("sam", "cell", sam, (1, 0), (measure("lambda_max"),))
    second = Arm("sgd", "cell", sgd, (0, 1, 2))
    joined = Pair("path", "cell", path(), (1,), start=first, end=second)
    found = experiments.in_order_of_worth([later, first, second, joined])
    sam_1, sam_0 = first.specs
    expected = [sam_0, *first.measures_of(sam_0), second.specs[0], sam_1, *first.measures_of(sam_1), second.specs[1]]
    expected += [joined.ends[0][1], *joined.specs, second.specs[2], *later.specs]
    assert found == expected
    assert sorted(map(specs_of.key, found)) == sorted(
        map(specs_of.key, experiments.specs([later, first, second, joined]))
    )


def test_titles_say_which_run_it_is_and_what_is_measured_of_it():
    arm = Arm("sgd", "cell", RunSpec(), (0, 1), (measure("lambda_max", split="test"),))
    found = experiments.titles([("sam_vs_sgd", arm), ("batch_size", arm)])
    assert found[specs_of.key(arm.specs[1])] == "sam_vs_sgd / cell / sgd, seed 1"
    taken = arm.measures_of(arm.specs[0])[0]
    assert found[specs_of.key(taken)] == "sam_vs_sgd / cell / sgd, seed 0: lambda_max@split=test"
    assert len(found) == 4


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: experiments.arms("sam_vs_adam", "quick"), ["experiment", "sam_vs_adam", "sam_vs_sgd"]),
        (lambda: experiments.arms("sam_vs_sgd", "fast"), ["profile", "fast", "quick"]),
        (lambda: experiments.arms("sam_vs_sgd", "quick", seeds=0), ["seeds", "0"]),
        (lambda: experiments.arms("sam_vs_sgd", "quick", seeds=[1, 1]), ["seeds", "once"]),
        (lambda: experiments.arms("sam_vs_sgd", "quick", seeds="3"), ["seeds", "'3'"]),
        (lambda: experiments.arms("sam_vs_sgd", "quick", seeds=[-1]), ["seed", "-1"]),
        (lambda: experiments.arms("sam_vs_sgd", "quick", seeds=[[1]]), ["seeds", "[[1]]", "whole"]),
        (lambda: experiments.arms("sam_vs_sgd", "quick", overrides="epochs"), ["overrides", "mapping"]),
        (lambda: experiments.arms("sam_vs_sgd", "quick", overrides={5: 1}), ["overrides", "5"]),
        (lambda: experiments.arms("sam_vs_sgd", "quick", overrides={"seed": 1}), ["seed", "seeds"]),
        (lambda: experiments.arms("sam_by_hand", "quick", overrides={"epohcs": 3}), ["epohcs", "epochs"]),
        (lambda: experiments.arms("sam_vs_sgd", "quick", overrides={"epohcs": 3}), ["epohcs", "epochs"]),
    ],
)
def test_bad_names_are_refused_before_anything_runs(call, words):
    with pytest.raises(InputError) as error:
        call()
    for word in words:
        assert word in str(error.value)
