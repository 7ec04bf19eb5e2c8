"""README.md and CITATION.cff: the table of findings is the current one, the example runs, links lead somewhere."""

import re
import tomllib
from pathlib import Path

import findings
import pytest
import torch
import yaml

from samlib import claims
from samlib.published import PAPERS
from samlib.store import open_store

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
EXAMPLE = re.search(r"```python\n(.*?)```", README, flags=re.DOTALL).group(1)


def test_the_table_of_findings_is_drawn_from_the_committed_records():
    verdicts = claims.verdicts("quick", open_store("quick", "results"))
    found = findings.findings(verdicts, full=findings.on_gpu("quick"))
    assert findings.replace_between_markers(README, found) == README


def test_the_example_trains_a_model():
    torch.manual_seed(0)
    images = torch.randn(64, 5)
    labels = images[:, :3].argmax(dim=1)
    model = torch.nn.Linear(5, 3)

    def loss() -> float:
        return torch.nn.functional.cross_entropy(model(images), labels).item()

    before = loss()
    exec(EXAMPLE, {"torch": torch, "model": model, "batches": [(images, labels)] * 20})
    assert loss() < 0.5 * before


def test_the_example_has_eight_lines_after_its_import():
    lines = [line for line in EXAMPLE.splitlines() if line]
    assert lines[0].startswith("from samlib.optim import")
    assert len(lines) == 9


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\((?!https?:)([^)]+)\)", README))))
def test_links_into_the_repository_lead_somewhere(target):
    assert (ROOT / target).exists()


def test_every_folder_of_the_map_exists():
    named = re.findall(r"^\| `([a-z]+)/", README, flags=re.MULTILINE)
    assert set(named) - {"runs"} <= {path.name for path in ROOT.iterdir() if path.is_dir()}
    assert {"samlib", "notebooks", "book", "results", "tests"} <= set(named)


def test_the_citation_names_the_four_papers_as_the_book_does():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    cited = {reference["title"].lower() for reference in citation["references"]}
    bibliography = (ROOT / "book" / "references.bib").read_text()
    titles = [re.search(rf"\{{{paper},.*?title = \{{(.*?)\}},\n", bibliography, re.DOTALL)[1] for paper in PAPERS]
    assert cited == {re.sub(r"[{}]", "", title).lower() for title in titles}


def test_the_citation_has_the_version_of_the_package():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
