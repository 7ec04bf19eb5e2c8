"""The figures of the papers arrive as printed, and a slip in the files that hold them is an error, not a surprise."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from samlib import published
from samlib.errors import InputError

CLAIM = """
conventions: {interval: "95%"}
claims:
- id: one
  experiment: sam_by_hand
  paper: foret2021
  where: "section 2"
  statement: "s"
  comparison: "c"
  statistic: "t"
  reproduced_if: "a"
  not_reproduced_if: "b"
  inconclusive_if: "never"
  published: {value: [1, 2], note: "inner"}
  priority: core
  note: "outer"
"""


# ---------------------------------------------------------------------------------------------- the committed files


def test_numbers_and_settings_are_all_there():
    results, settings = published.results(), published.settings()
    assert (len(results), len(settings)) == (864, 52)
    placeholders = results[results["value"].isna()]
    assert sorted(placeholders["origin"].value_counts().items()) == [("figure_only", 5), ("missing", 6)]
    assert set(results["paper"]) == set(settings["paper"]) == set(published.PAPERS)


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ({"paper": "coldenhoff2022", "table": "T1", "method": "SAM", "seed": 20}, 71.22),
        ({"paper": "coldenhoff2022", "table": "T2", "method": "ASAM", "seed": 3, "metric": "train_loss"}, 2.47e-4),
        ({"paper": "boca2023", "table": "T1", "method": "SGD", "metric": "test_loss"}, 0.2197),
        # E-B2: printed under rho = 0.1, measured at rho = 0.05
        ({"paper": "boca2023", "table": "T2", "method": "SGD", "eval_m": 5000, "eval_rho": 0.05}, 0.258),
    ],
)
def test_a_printed_number_is_found_by_its_place(where, value):
    rows = published.results()
    for column, wanted in where.items():
        rows = rows[rows[column] == wanted]
    assert rows["value"].tolist() == [pytest.approx(value, rel=1e-12)]


def test_accuracies_and_errors_are_per_cent():
    rows = published.results()
    percent = rows[rows["metric"].str.contains(r"(?:accuracy|error)\w*_pct$") & ~rows["metric"].str.contains("axis")]
    assert len(percent) > 400
    assert percent["value"].dropna().between(0, 100).all()


def test_shards_fill_the_batch():
    rows = published.results().dropna(subset=["shard_size", "num_shards", "batch_size"])
    assert len(rows) > 100
    assert (rows["shard_size"] * rows["num_shards"] == rows["batch_size"]).all()


def test_claims_are_complete():
    claims = published.claims()
    assert len(claims) == 69
    priorities = [claim.priority for claim in claims.values()]
    assert [priorities.count(name) for name in published.PRIORITIES] == [55, 8, 6]
    assert all(claim.id == key and claim.experiment for key, claim in claims.items())
    assert claims["foret-t1-sam-beats-sgd-cifar"].published["c10_wrn200_basic"] == {"sam": 2.7, "sgd": 3.5}
    assert "95%" in published.conventions()["interval"]


def test_figures_quoted_in_a_claim_agree_with_the_table():
    table = published.results().query("paper == 'coldenhoff2022' and table == 'T1'")
    quoted = published.claims()["coldenhoff-a-sam-beats-sgd-per-seed"].published
    for method in ("SAM", "SGD"):
        assert table[table["method"] == method].sort_values("seed")["value"].tolist() == quoted[method.lower()]
    differences = [a - b for a, b in zip(quoted["sam"], quoted["sgd"], strict=True)]
    assert differences == pytest.approx(quoted["difference"])
    assert sum(differences) / 3 == pytest.approx(quoted["mean_difference"], abs=0.005)


def test_errata_are_parsed_whole():
    errata = published.errata()
    assert len(errata) == 67
    assert sum(entry.top for entry in errata) == 15
    by_id = {entry.id: entry for entry in errata}
    swapped = by_id["E-B2"]
    assert (swapped.about, swapped.top, swapped.certainty) == ("boca2023", True, "certain")
    assert swapped.title == "Table 2: the m=5000 columns rho=0.05 and rho=0.1 are swapped"
    assert swapped.text.startswith("All ten rows match the csv")
    assert by_id["E-C1"].certainty == "settled by the authors' public code and curves"
    assert not any("**" in entry.title + entry.text for entry in errata)


def test_every_erratum_that_is_referred_to_exists():
    known = {entry.id for entry in published.errata()}
    text = (published.folder() / "claims.yaml").read_text() + (published.folder() / "README.md").read_text()
    referred = set(re.findall(r"E-[A-Z]\d+", text))
    assert len(referred) > 5
    assert referred <= known


def test_the_readme_counts_what_is_there():
    readme = (published.folder() / "README.md").read_text()
    assert "| 864, of which 11 hold no value" in readme
    assert "| 69: 55 core, 8 extended, 6 beyond one GPU |" in readme
    assert "| 67, of which 15 are tagged" in readme


def test_what_is_handed_out_cannot_spoil_the_cache():
    mine = published.results()
    mine["value"] = 0.0
    assert published.results()["value"].max() > 1
    published.claims().clear()
    assert len(published.claims()) == 69
    published.claim("foret-rho-sweep").published["default_rho"] = 1.0
    published.claims()["foret-rho-sweep"].published["default_rho"] = 1.0
    assert published.claim("foret-rho-sweep").published["default_rho"] == 0.05


def test_an_unknown_claim_is_named():
    with pytest.raises(InputError, match="claim = 'foret-t2' is unknown"):
        published.claim("foret-t2")


# ---------------------------------------------------------------------------------------------- slips in the files


def test_a_note_inside_published_does_not_hide_the_note_of_the_claim():
    claim = published.parse_claims(CLAIM)["one"]
    assert (claim.note, claim.published["note"], claim.published["value"]) == ("outer", "inner", [1, 2])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('note: "outer"', 'note: "outer"\n  note: "again"', "line 17: key 'note' is given twice"),
        ("[1, 2]", "{a: 1, a: 2}", "key 'a' is given twice"),
        ("  priority: core", "  priority: urgent", "priority = 'urgent' is unknown: use one of core"),
        ("paper: foret2021", "paper: foret", "paper = 'foret' is unknown"),
        ("experiment: sam_by_hand", "experiment: ''", "experiment = ''"),
        ('statistic: "t"', "statistic: 3", "statistic = 3"),
        ('  where: "section 2"\n', "", "missing ['where']"),
        ("  priority: core", "  priority: core\n  colour: red", "unknown ['colour']"),
        ('published: {value: [1, 2], note: "inner"}', "published: none", "published = 'none'"),
        ("claims:\n", "claims: {\n", "not readable"),
        ("claims:\n", "entries:\n", "the keys 'conventions' and 'claims'"),
    ],
)
def test_a_slip_in_claims_is_named(old, new, message):
    assert old in CLAIM
    with pytest.raises(InputError, match=re.escape(message)):
        published.parse_claims(CLAIM.replace(old, new))


def test_an_id_used_twice_is_refused():
    entry = CLAIM.split("claims:\n")[1]
    with pytest.raises(InputError, match="id = 'one' is used twice"):
        published.parse_claims(CLAIM + entry)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("**E-X1 m is unclear.** text", "is not an entry"),
        ("**E-X1 (certain) a.** b\n**E-X1 (open) c.** d", "E-X1 stands twice"),
    ],
)
def test_a_slip_in_the_errata_is_named(text, message):
    with pytest.raises(InputError, match=message):
        published.parse_errata(text)


# ---------------------------------------------------------------------------------------------- where the files lie


def _run_in(package: Path, code: str) -> str:
    """Runs code in a fresh interpreter that imports samlib from `package` and nowhere else."""
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(package)!r}); {code}"],
        capture_output=True,
        text=True,
        check=False,
        cwd=package,
    )
    return done.stdout + done.stderr


@pytest.fixture
def package(tmp_path):
    """A copy of the two modules alone, as they would lie in site-packages."""
    source = Path(published.__file__).parent
    (tmp_path / "samlib").mkdir()
    for name in ("__init__.py", "errors.py", "published.py"):
        shutil.copy(source / name, tmp_path / "samlib" / name)
    return tmp_path


def test_an_installed_wheel_reads_its_own_copy(package):
    shutil.copytree(published.folder(), package / "samlib" / "_published")
    (package / "results" / "published").mkdir(parents=True)
    (package / "results" / "published" / "claims.yaml").write_text("somebody else's file")
    code = "from samlib import published as p; print(p.__file__.startswith(sys.path[0]), len(p.claims()))"
    assert _run_in(package, code) == "True 69\n"


def test_files_that_are_nowhere_are_named(package):
    output = _run_in(package, "from samlib import published as p; p.claims()")
    assert "InputError: results/published is missing" in output
