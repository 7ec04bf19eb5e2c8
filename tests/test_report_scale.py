"""One profile beside another, the last epoch beside the best one, and what a page says before there are records."""

import dataclasses
import math
import statistics

import pandas as pd
import pytest
import torch

from samlib import experiments, models, plots, published, report
from samlib import spec as specs_of
from samlib.experiments import Arm, asam_without_batchnorm, cifar, digits, optimizer_table, precision, sam_vs_sgd
from samlib.store import Record, Store
from samlib.study import Study, open_study

CLAIM = "coldenhoff-a-sam-beats-sgd-per-seed"


def study_of_gpu(folder, stem="sam_vs_sgd"):
    return Study(stem, "gpu", Store(folder, writable=True), experiments.arms(stem, "gpu"), varied=False)


def finish(store, arm, accuracies, status="done", best=0.0):
    """Records of the first seeds of an arm; the best test epoch is `best` points above the last one."""
    for spec, accuracy in zip(arm.specs, accuracies, strict=False):
        last = {"epoch": 2, "step": 2, "test_accuracy_pct": accuracy, "test_loss": 1.0, "train_loss": 0.5}
        final = {"last": last, "best_test": last | {"test_accuracy_pct": accuracy + best}}
        store.save(Record(specs_of.key(spec), specs_of.canonical(spec), status, final=final))


def arm_of(study, cell, role):
    (arm,) = study.pick([cell], [role])
    return arm


# ---------------------------------------------------------------------------------------------- what verdicts rest on


def test_what_verdicts_rest_on_comes_from_the_specs(tmp_path):
    study = study_of_gpu(tmp_path)
    finish(study.store, arm_of(study, "plain", "sgd"), [64.0, 65.0])
    finish(study.store, arm_of(study, "plain, tf32", "sam"), [64.0])  # decides nothing
    assert report.ground_text(study, sam_vs_sgd.DECIDES) == (
        "*Profile gpu: resnet18 on all training images of cifar10; 50 to 200 epochs, a batch of 128, 3 to 10 seeds an "
        "arm; 2 of 28 runs finished; thresholds bind.*"
    )
    assert report.ground_text(open_study("sam_vs_sgd"), [CLAIM]).startswith(
        "*Profile quick: cnn on 100 images of digits; 50 to 200 epochs, a batch of 32, 10 seeds an arm; 40 of 40"
    )


def test_a_profile_may_hold_miniatures_and_others(tmp_path):
    table = study_of_gpu(tmp_path, "optimizer_table")
    assert "6 of 7 claims judged by the sign alone" in report.ground_text(table, optimizer_table.DECIDES)
    assert "; judged by the sign alone.*" in report.ground_text(open_study("sam_vs_sgd"), sam_vs_sgd.DECIDES)
    nothing = report.ground_text(table, ["foret-svhn"])
    assert nothing == "*The profile gpu has no run that decides a claim of this page.*"


def test_the_page_opens_with_what_its_verdicts_rest_on(tmp_path):
    study = study_of_gpu(tmp_path)
    ground, verdicts = report.judged_text(study, [CLAIM]).split("\n\n")
    assert ground == report.ground_text(study, [CLAIM])
    assert verdicts == report.verdicts_text([study.verdict(CLAIM)])


# ---------------------------------------------------------------------------------------------- what is pending


def test_what_is_pending_comes_in_the_order_of_the_plan(tmp_path):
    study = study_of_gpu(tmp_path)
    finish(study.store, arm_of(study, "plain", "sgd"), [64.0] * 10)
    finish(study.store, arm_of(study, "plain", "sam"), [70.0, 71.0, 72.0])
    finish(study.store, arm_of(study, "plain", "sam_half"), [math.nan], status="diverged")  # is finished
    finish(study.store, arm_of(study, "plain", "sgd_double"), [65.0], status="failed")  # is not
    priorities = [arm_of(study, "plain", role).priority for role in ("sam", "sgd_double")]
    assert report.pending_text(study).splitlines() == [
        "Of 31 trainings on the profile gpu 14 are finished.",
        "",
        f"- pending at priority {priorities[0]}: plain: SAM (7), SAM, half the epochs (4)",
        f"- pending at priority {priorities[1]}: plain: SGD, twice the epochs (3); plain, tf32: SAM (3)",
    ]


def test_nothing_pending_lists_nothing():
    assert "\n" not in report.pending_text(open_study("sam_vs_sgd"))


def test_tables_say_pending_until_every_run_is_finished(tmp_path):
    study = study_of_gpu(tmp_path)
    assert set(report.means(study.frame(), ["test_accuracy_pct"])["test_accuracy_pct"]) == {"pending"}
    sgd, sam = (arm_of(study, "plain", role) for role in ("sgd", "sam"))
    finish(study.store, sgd, [math.nan] * 10, status="diverged")
    finish(study.store, sam, [70.0, 71.0])
    runs = study.frame(["plain"], ["sgd", "sam"])
    shown = report.means(runs, ["test_accuracy_pct"])["test_accuracy_pct"]
    assert shown["plain", "SGD"] == "none"  # all of them finished, and none of them left a value
    assert shown["plain", "SAM"].startswith("70.50 [")
    assert report.contrasts(runs, "test_accuracy_pct", [("sam", "sgd")]).iloc[0].tolist() == ["pending", "0"]
    assert report.ratios(runs, ["test_loss"], "sam", "sgd").iloc[0].tolist() == ["pending", "0"]
    beside = report.beside_the_paper(runs[runs["role"] == "sgd"], {"test_loss": {"sgd": 1.0}})
    assert beside["test_loss, ours"].tolist() == ["none"]


def test_a_choice_that_has_not_been_made_is_pending(tmp_path, monkeypatch):
    monkeypatch.setenv("SAMLIB_ROOT", str(tmp_path))
    study = study_of_gpu(tmp_path / "mine", "asam_without_batchnorm")
    choices = asam_without_batchnorm.GPU_TUNING
    assert report.tuning_text(study, choices).splitlines()[1:] == [
        "gpu, sam, optim.rho: best by its worst seed pending (20 of 20 runs)",
        "gpu, asam, optim.rho: best by its worst seed pending (20 of 20 runs)",
    ]
    assert report.tuning_text(study, ()) == "Nothing was chosen on the profile gpu."


def test_half_a_choice_is_none(tmp_path):
    """The best of the values that have been tried so far is not the chosen one."""
    study = study_of_gpu(tmp_path, "asam_without_batchnorm")
    choice = asam_without_batchnorm.GPU_TUNING[0]
    for spec in choice.arms[0].specs:
        last = {"epoch": 25, "step": 1, "validation_accuracy_pct": 60.0}
        study.store.save(Record(specs_of.key(spec), specs_of.canonical(spec), "done", final={"last": last}))
    lines = report.tuning_text(study, [choice]).splitlines()
    assert lines[1:] == [
        "gpu, sam, optim.rho: best by its worst seed pending (16 of 20 runs)",
        f"  {choice.grid[0]:g}: 60.0",
    ]


def test_fields_that_are_not_set_stay_empty():
    table = report.settings(open_study("batch_size").at("gpu"))
    assert set(table["updates"]) == {"", "39000"}


# ---------------------------------------------------------------------------------------------- two profiles


def test_a_study_at_its_own_profile_is_itself_and_at_another_the_committed_one():
    mine = open_study("sam_vs_sgd", seeds=[0, 1])
    assert mine.at("quick") is mine
    other = mine.at("gpu")
    assert (other.profile, other.varied, other.store.writable) == ("gpu", False, False)
    assert other.arms == experiments.arms("sam_vs_sgd", "gpu")
    assert other.store.folder.parts[-2:] == ("results", "gpu")
    assert mine.cells == list(sam_vs_sgd.CELLS)  # those of the choices apart


def test_outcomes_of_two_profiles_stand_beside_each_other(tmp_path):
    study = study_of_gpu(tmp_path)
    for role, accuracy in (("sgd", 64.0), ("sam", 70.0)):
        finish(study.store, arm_of(study, "plain", role), [accuracy + 0.1 * n + (role == "sam") * n for n in range(3)])
    quick = open_study("sam_vs_sgd")
    table = report.outcomes_beside([quick, study], [CLAIM, "coldenhoff-a-equal-gradient-budget", "foret-svhn"])
    assert table["gpu"].tolist() == ["reproduced", "pending", "no setting on this profile"]
    assert table["quick"].iloc[0] == f"{quick.verdict(CLAIM).outcome} (miniature)"
    varied = dataclasses.replace(study, varied=True)
    assert report.outcome_text(varied.verdict(CLAIM)) == "reproduced (varied)"
    decided = report.decided_text(study, [CLAIM, "foret-svhn"])
    assert decided == report.verdicts_text([study.verdict(CLAIM)])
    assert report.decided_text(study, ["foret-svhn"]).endswith("on the profile gpu yet.")


def test_rules_on_cells_a_profile_lacks():
    assert report.rules_text([CLAIM], Store("/nowhere").frame([])) == "This profile has no such cells."


def test_rules_beside_a_full_scale_have_its_thresholds(tmp_path):
    """A gain wholly within half a point is against the claim where points bind, and has a sign where they do not."""
    study = study_of_gpu(tmp_path)
    scores = {"sgd": (50.0,) * 4, "sam": (50.25, 49.75, 50.125, 49.875)}
    rows = [
        {"cell": "other", "role": role, "seed": seed, "status": "done"}
        | {"test_accuracy_pct": value, "test_accuracy_pct@best_test": value}
        for role, values in scores.items()
        for seed, value in enumerate(values)
    ]
    heads = [report.rules_text([CLAIM], pd.DataFrame(rows), one).split("\n")[0] for one in (study, None)]
    assert heads[0].endswith("would say: not reproduced")
    assert heads[1].endswith("would say: inconclusive")


def test_two_seeds_of_a_claim_about_spread_are_too_few_and_no_warning(tmp_path):
    """A first visit to a GPU may end after two seeds: warnings are errors here, and in a page they would be printed."""
    study = study_of_gpu(tmp_path, "asam_without_batchnorm")
    for role, accuracies in (("sam", [66.0, 68.0]), ("asam", [66.0, 67.0])):
        finish(study.store, arm_of(study, "published", role), accuracies)
    claim = "coldenhoff-c-asam-lower-variance"
    assert study.verdict(claim).outcome == "inconclusive"
    assert "would say: inconclusive" in report.rules_text([claim], study.frame(["published"]), study)
    assert report.spread_text([66.0, 67.0], [66.0, 68.0]).endswith("(n = 2)")
    assert report.spread_text([], [], "pending") == "pending (n = 0)"


# ---------------------------------------------------------------------------------------------- two epochs


def test_printed_means_are_those_of_the_table():
    rows = published.results().query("paper == 'coldenhoff2022' and table == 'T1'")
    expected = {m.lower(): statistics.fmean(rows[rows["method"] == m]["value"]) for m in ("SAM", "SGD")}
    assert report.printed_means("coldenhoff2022", "T1") == pytest.approx(expected)
    losses = report.printed_means("coldenhoff2022", "T2", "train_loss")
    assert losses["asam"] == pytest.approx((2.75e-4 + 2.5e-4 + 2.47e-4) / 3)


PRINTED = {"last": {("plain", "sgd"): 64.5}, "best_test": {("plain", "sgd"): 70.0, ("plain", "sam"): 71.0}}


def test_the_last_epoch_stands_beside_the_best_one(tmp_path):
    study = study_of_gpu(tmp_path)
    finish(study.store, arm_of(study, "plain", "sgd"), [64.0, 65.0, 66.0], best=1.0)
    table = report.epochs_beside(study.frame(["plain"]), PRINTED).loc["plain"]
    assert table.loc["SGD"].tolist() == [
        "65.00 [62.52, 67.48]",
        "64.50",
        "66.00 [63.52, 68.48]",
        "70.00",
        "3",
    ]
    assert table.loc["SAM"].tolist() == ["pending", "", "pending", "71.00", "0"]
    alone = report.epochs_beside(study.frame(["plain"]))
    assert list(alone.columns) == ["last epoch", "best test epoch", "n"]


def test_differences_from_the_paper_in_words(tmp_path):
    study = study_of_gpu(tmp_path)
    runs = study.frame(["plain"])
    assert report.epochs_text(runs, PRINTED, [("sam", "sgd")]).splitlines() == [
        "- plain, SGD, last epoch: the paper has 64.50 %, ours is pending.",
        "- plain, SGD, best test epoch: the paper has 70.00 %, ours is pending.",
        "- plain, SAM, best test epoch: the paper has 71.00 %, ours is pending.",
        "- plain, SAM - SGD: pending.",
    ]
    finish(study.store, arm_of(study, "plain", "sgd"), [64.0, 65.0, 66.0], best=1.0)
    finish(study.store, arm_of(study, "plain", "sam"), [70.0, 71.0, 72.0], best=0.25)
    lines = report.epochs_text(study.frame(["plain"]), PRINTED, [("sam", "sgd"), ("sam", "asam")]).splitlines()
    ours = [line.partition("; ours, ")[2] for line in lines[:3]]
    assert ours == [
        "65.00 [62.52, 67.48] (n = 3), is 0.5000 points above it, and our interval holds it.",
        "66.00 [63.52, 68.48] (n = 3), is 4.000 points below it, and our interval leaves it out.",
        "71.25 [68.77, 73.73] (n = 3), is 0.2500 points above it, and our interval holds it.",
    ]
    assert lines[3:] == [
        "- plain, SAM - SGD: 6.000 [6.000, 6.000] (n = 3) points at the last epoch, 5.250 [5.250, 5.250] at the best "
        "test epoch. Choosing the epoch by the test images changes it by -0.7500 [-0.7500, -0.7500].",
    ]


def test_a_single_seed_has_no_interval_to_hold_a_figure(tmp_path):
    study = study_of_gpu(tmp_path)
    finish(study.store, arm_of(study, "plain", "sgd"), [64.0])
    text = report.epochs_text(study.frame(["plain"]), {"last": {("plain", "sgd"): 64.5}}, [])
    assert text == "- plain, SGD, last epoch: the paper has 64.50 %; ours, 64.00 (n = 1), is 0.5000 points below it."


# ---------------------------------------------------------------------------------------------- experiment 07


@pytest.mark.parametrize(("profile", "extra"), [("quick", "large"), ("gpu", "small")])
def test_at_equal_updates_every_method_stands_with_both_batches(profile, extra):
    """Quick makes the large batch go on, gpu the small one stop: either way both are in one cell, once per seed."""
    study = open_study("optimizer_table").at(profile)
    again = study.frame([optimizer_table.EQUAL_UPDATES, optimizer_table.STOPPED])
    assert set(again["role"].str.contains("_large")) == {extra == "large"}
    equal = report.with_other_batch(again, study.frame([optimizer_table.TABLE]))
    assert set(equal["cell"]) == {"equal updates"}
    assert not equal.duplicated(["role", "seed"]).any()
    large = {role for role in equal["role"] if "_large" in role}
    assert {role.replace("_large", "") for role in large} == set(equal["role"]) - large
    assert len(large) == again["role"].nunique()


def test_at_equal_updates_of_gpu_both_batches_make_as_many():
    study = open_study("optimizer_table").at("gpu")
    again = study.frame([optimizer_table.STOPPED])
    equal = report.with_other_batch(again, study.frame([optimizer_table.TABLE]))
    large = equal[equal["role"].str.contains("_large")]
    assert set(again["train.updates"]) == set(large["train.epochs"] * (50_000 // large["train.batch_size"]))


# ---------------------------------------------------------------------------------------------- figures without runs


def test_figures_without_finished_runs_say_so(tmp_path):
    frame = Store(tmp_path).frame([Arm(role, "clean", digits.sgd("clean"), (0, 1)) for role in ("sgd", "sgd_double")])
    for figure in (
        plots.by_role(frame, "test_loss"),
        plots.paired_differences(frame, "test_loss", [("sgd_double", "sgd")]),
    ):
        assert [text.get_text() for text in figure.axes[0].texts] == ["No finished runs yet."]
    nothing = plots.paired_differences(frame, "test_loss", [("sam", "sgd")])
    assert [text.get_text() for text in nothing.axes[0].texts] == ["No cell has both of the methods compared."]


# ---------------------------------------------------------------------------------------------- sentences with numbers


def test_pages_say_how_long_gpu_trains():
    """Page 07 says a tenth of the paper's 200 epochs, page 14 thirty epochs, page 03 an eighth for the choice of radii:
    where this changes, change the sentences too."""
    assert cifar.BOCA.train.epochs == 10 * optimizer_table.GPU_SGD.train.epochs
    assert precision.CIFAR.train.epochs == 30
    assert cifar.without_norm("gpu").train.epochs == 8 * asam_without_batchnorm.GPU_TUNING_BASE.train.epochs


def test_weights_at_the_start_are_as_page_03_says():
    """Excess kurtosis -1.2 and sd 1/sqrt(27) for the miniature, none and sqrt(2 / (64 * 49)) for the ResNet-18."""
    for spec, shape, draws, sd, kurtosis in (
        (asam_without_batchnorm.WITHOUT.model, (1, 8, 8), 40, 1 / math.sqrt(27), -1.2),
        (cifar.without_norm("gpu").model, (3, 32, 32), 2, math.sqrt(2 / (64 * 7 * 7)), 0.0),
    ):
        models_of = [models.build(spec, shape, 10, torch.Generator().manual_seed(seed)) for seed in range(draws)]
        first = [next(weight for weight in model.parameters() if weight.ndim == 4) for model in models_of]
        weights = torch.cat([weight.detach().flatten() for weight in first]).double()
        assert weights.std().item() == pytest.approx(sd, rel=0.03)
        assert ((weights / sd) ** 4).mean().item() - 3 == pytest.approx(kurtosis, abs=0.1)
