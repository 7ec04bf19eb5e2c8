"""The book: built once from the committed notebooks and records, then read as a browser without a network would."""

import hashlib
import re
import shutil
import urllib.parse
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import build
import check_browser
import findings
import nbformat
import pytest
from markdown_it import MarkdownIt

from samlib import claims, published
from samlib.claims import Verdict
from samlib.errors import InputError
from samlib.rules.conventions import INFORMATION, OUTCOMES, Part
from samlib.store import open_store

ROOT = Path(__file__).resolve().parent.parent
LOADS = dict.fromkeys(("script", "img", "iframe", "source", "video", "audio", "embed"), "src")
LOADS |= {"link": "href", "object": "data"}
CODE = ("pre", "code", "script", "style")
NOT_LOADED = ("search", "next", "prev", "author", "canonical", "index")  # rel of a link that fetches nothing


def digests(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def make(notebooks: Path, out: Path) -> int:
    arguments = ["--notebooks", str(notebooks), "--profile", "quick", "--store", "results", "--out", str(out)]
    return build.main(arguments)


@pytest.fixture(scope="module")
def html(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("book")
    tracked = [ROOT / "book", ROOT / "notebooks"]
    before = [digests(folder) for folder in tracked]
    assert make(ROOT / "notebooks", out) == 0
    assert [digests(folder) for folder in tracked] == before
    return out / "html"


class Page(HTMLParser):
    """What a page loads, links to, names, and says (code and scripts left out)."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path, self.loads, self.links, self.ids, self.text, self.code = path, [], [], set(), [], 0
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.ids.add(given.get("id"))
        self.code += tag in CODE
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        if LOADS.get(tag) in given and given.get("rel") not in NOT_LOADED:
            self.loads.append(given[LOADS[tag]])

    def handle_endtag(self, tag):
        self.code -= tag in CODE

    def handle_data(self, data):
        if not self.code:
            self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join("".join(self.text).split())


@pytest.fixture(scope="module")
def pages(html) -> dict[str, Page]:
    return {name: Page(html / f"{name}.html") for name in build.pages()}


def is_foreign(address: str) -> bool:
    return bool(urllib.parse.urlsplit(address).netloc)


# ---------------------------------------------------------------------------------------------- no other host


def test_no_page_loads_anything_from_another_host(html):
    loads = [load for path in html.rglob("*.html") if "_static" not in path.parts for load in Page(path).loads]
    assert len(loads) > 100
    assert [load for load in loads if is_foreign(load)] == []


def test_no_style_sheet_loads_anything_from_another_host(html):
    foreign = re.compile(r"(?:@import|url\()\s*[\"']?(?:https?:)?//")
    assert [path.name for path in html.rglob("*.css") if foreign.search(path.read_text(encoding="utf-8"))] == []


def test_what_a_page_loads_is_there(pages):
    local = [(page.path, load) for page in pages.values() for load in page.loads if not load.startswith("data:")]
    missing = [load for path, load in local if not (path.parent / urllib.parse.urlsplit(load).path).is_file()]
    assert missing == []


def test_formulas_are_set_by_the_mathjax_of_the_book(pages):
    assert 'class="math' in pages["method"].path.read_text(encoding="utf-8")
    assert any("mathjax/" in load for load in pages["method"].loads)


# ---------------------------------------------------------------------------------------------- links


def targets(pages: dict[str, Page]) -> Iterator[tuple[Page, Path, str]]:
    for page in pages.values():
        for link in page.links:
            parts = urllib.parse.urlsplit(link)
            if not parts.scheme and not parts.netloc:
                path = (page.path.parent / urllib.parse.unquote(parts.path)).resolve() if parts.path else page.path
                yield page, path, parts.fragment


def test_links_within_the_book_lead_to_a_page_and_a_place_on_it(pages):
    known = {page.path.resolve(): page.ids for page in pages.values()}
    found = list(targets(pages))
    assert len(found) > 100
    assert [(page.path.name, path.name) for page, path, _ in found if not path.is_file()] == []
    assert [
        (page.path.name, path.name, place)
        for page, path, place in found
        if place and path.resolve() in known and place not in known[path.resolve()]
    ] == []


# ---------------------------------------------------------------------------------------------- what is drawn


def test_the_findings_are_the_verdicts(pages):
    verdicts = claims.verdicts("quick", open_store("quick", "results"))
    beside = claims.verdicts("gpu", open_store("gpu", "results"))
    source = pages["intro"].path.read_text(encoding="utf-8")
    for outcome in OUTCOMES[:3]:
        expected, more = (sum(verdict.outcome == outcome for verdict in found) for found in (verdicts, beside))
        assert source.count(f'class="verdict verdict-{outcome.replace(" ", "-")}"') == expected + more
        assert f"{expected} {outcome}" in pages["intro"].words
    for words in findings.tally_on_cifar(beside).split(" `gpu`"):  # code is not among the words
        assert words in pages["intro"].words


def test_every_claim_has_its_rule_on_the_protocol_page(pages):
    assert {f"claim-{name}" for name in published.claims()} <= pages["protocol"].ids


def test_every_convention_stands_on_the_protocol_page(pages):
    for name in published.conventions():
        assert name.replace("_", " ") in pages["protocol"].words


def test_every_erratum_stands_on_the_errata_page(pages):
    entries = published.errata()
    assert len(entries) == 67
    assert {entry.id.lower() for entry in entries} <= pages["errata"].ids


def test_no_markup_is_left_as_text(pages):
    for name, page in pages.items():
        assert not re.search(r"\{(cite|doc|ref|eq)[:}]", page.words), name
        assert "**" not in page.words, name


# ---------------------------------------------------------------------------------------------- when it does not build


def test_a_missing_notebook_is_bad_input_and_nothing_is_written(tmp_path, capsys):
    assert make(tmp_path / "none", tmp_path / "out") == 2
    assert "has no executed 00_sam_by_hand.ipynb" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_notebook_without_its_outputs_is_bad_input(tmp_path, capsys):
    for page in build.pages():
        if page.startswith("notebooks/"):
            unrun = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1")])
            nbformat.write(unrun, tmp_path / f"{page.removeprefix('notebooks/')}.ipynb")
    assert make(tmp_path, tmp_path / "out") == 2
    assert "has no executed 00_sam_by_hand.ipynb, 01_sam_vs_sgd.ipynb" in capsys.readouterr().err


def test_a_warning_fails_the_build_and_leaves_the_book_before_it(tmp_path, capsys):
    notebooks = tmp_path / "notebooks"
    shutil.copytree(ROOT / "notebooks", notebooks, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    path = notebooks / "99_scoreboard.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.append(nbformat.v4.new_markdown_cell("See {doc}`nowhere`."))
    nbformat.write(notebook, path)
    kept = tmp_path / "out" / "html" / "index.html"
    kept.parent.mkdir(parents=True)
    kept.write_text("the last good book")
    assert make(notebooks, tmp_path / "out") == 1
    assert "nowhere" in capsys.readouterr().err
    assert kept.read_text() == "the last good book"


# ---------------------------------------------------------------------------------------------- Markdown


def reference_texts() -> list[str]:
    errata = [text for entry in published.errata() for text in (entry.title, entry.text, entry.certainty)]
    fields = ("statement", "where", "comparison", "statistic", "reproduced_if", "not_reproduced_if", "note", "confound")
    return errata + [getattr(claim, field) for claim in published.claims().values() for field in fields]


def unrendered(markdown: str) -> str:
    """Markdown as its author wrote it: only *emphasis* and `code` may have become markup, text is itself."""
    tokens = MarkdownIt().parseInline(markdown)[0].children
    marks = {"em_open": lambda _: "*", "em_close": lambda _: "*", "code_inline": lambda token: f"`{token.content}`"}
    return "".join(marks.get(token.type, lambda token: token.content)(token) for token in tokens)


def test_reference_texts_survive_markdown_to_the_letter():
    texts = [" ".join(text.split()) for text in reference_texts() if text]
    assert len(texts) > 400
    assert [unrendered(findings.plain(text).replace(r"\|", "|")) for text in texts] == texts


@pytest.mark.parametrize(
    ("text", "markdown"),
    [
        ("0.5*1e-4*sum", r"0.5\*1e-4\*sum"),
        ("is *not* zero-mean", "is *not* zero-mean"),
        ("rho*g/||g||^2", r"rho\*g/\|\|g\|\|^2"),
        ("`eval_rho` true", "`eval_rho` true"),
        ("x_1 <0.01 [art] $5", r"x\_1 \<0.01 \[art\] \$5"),
    ],
)
def test_only_code_and_emphasis_stay_markup(text, markdown):
    assert findings.plain(text) == markdown


def verdict(outcome: str, **fields) -> Verdict:
    part = Part("clean", "sam - sgd of test_accuracy_pct", 1.8234, 1.25, 2.39, 10, "supports")
    extra = Part("noise20", "beside the point", 9.0, 8.0, 10.0, 10, INFORMATION)
    standard = {"parts": (part, extra), "published": {"mean_difference": 6.54}, "rule_digest": "", "miniature": True}
    return Verdict("coldenhoff-a-equal-gradient-budget", outcome, profile="quick", reason="why", **(standard | fields))


def test_a_finding_shows_the_deciding_statistic_its_interval_and_the_paper():
    text = findings.findings([verdict("reproduced"), verdict("not run")])
    assert "1 reproduced, 0 not reproduced, 0 inconclusive, 1 not run" in text
    row = text.splitlines()[-1]
    assert r"1.823 \[1.25, 2.39\], n = 10" in row
    assert "beside the point" not in row
    assert "*coldenhoff2022, III.A text*" in row
    assert "reproduced<br>*miniature*" in row
    assert "mean difference 6.54" in row


def test_a_finding_without_a_statistic_gives_its_reason():
    row = findings.findings([verdict("inconclusive", parts=(), published={}, miniature=False)]).splitlines()[-1]
    assert row.endswith("| inconclusive | why | not printed |")


def test_nothing_decided_shows_no_empty_table():
    assert "|" not in findings.findings([verdict("not run")])


def full(outcome: str) -> Verdict:
    part = Part("plain", "sam - sgd of test_accuracy_pct", 6.5, 6.0, 7.0, 10, "supports")
    return replace(verdict(outcome), profile="gpu", miniature=False, parts=(part,))


def test_a_verdict_at_full_scale_stands_beside_the_miniature_once_it_is_there():
    alone = findings.findings([verdict("inconclusive")])
    pending = findings.findings([verdict("inconclusive")], full=[full("not run")])
    assert pending.splitlines()[-1] == alone.splitlines()[-1]
    assert "Of the 1 claims that have runs on CIFAR-10, the profile `gpu`, none is decided yet." in pending
    lines = findings.findings([verdict("inconclusive")], full=[full("reproduced")]).splitlines()
    assert lines[-3].split(" | ")[3] == "On CIFAR-10"
    assert lines[-1].split(" | ")[1] == "inconclusive<br>*miniature*"
    assert lines[-1].split(" | ")[3].startswith(r"reproduced<br>plain: sam - sgd of test\_accuracy\_pct: 6.5 \[6, 7\]")
    assert lines[0].startswith("Of 1 claims on the profile `quick`")
    assert "`gpu`, 1 are decided, the runs of the others are pending." in lines[2]


def test_a_claim_without_a_verdict_at_full_scale_has_an_empty_place_there():
    other = replace(verdict("reproduced"), claim="coldenhoff-a-sam-beats-sgd-per-seed")
    lines = findings.findings([verdict("inconclusive"), other], full=[full("reproduced")]).splitlines()
    assert [line.split(" | ")[3] == "" for line in lines[-2:]] == [False, True]


def test_a_claim_decided_at_full_scale_alone_has_its_row():
    lines = findings.findings([verdict("not run", parts=())], full=[full("reproduced")]).splitlines()
    assert lines[-1].split(" | ")[1:4:2] == ["not run<br>*miniature*", lines[-1].split(" | ")[3]]


def test_gpu_does_not_stand_beside_itself():
    assert findings.on_gpu("gpu") == []
    assert {found.profile for found in findings.on_gpu("quick")} == {"gpu"}


@pytest.mark.parametrize("template", ["no marker", "{END} {BEGIN}", "{BEGIN} {BEGIN} {END}", "{BEGIN} {END} {END}"])
def test_missing_markers_are_named(template):
    text = template.format(BEGIN=findings.BEGIN, END=findings.END)
    with pytest.raises(InputError, match="once each and in this order"):
        findings.replace_between_markers(text, "new")


def test_what_stands_around_the_markers_stays():
    text = f"before {findings.BEGIN} old {findings.END} after"
    replaced = findings.replace_between_markers(text, "new")
    assert replaced.startswith("before ")
    assert replaced.endswith(" after")
    assert "old" not in replaced


# ---------------------------------------------------------------------------------------------- the browser check


def test_requests_of_a_page_are_told_from_those_of_the_browser():
    def event(url: str, initiator: str) -> dict:
        return {"params": {"url": url, "initiator": initiator, "method": "GET"}}

    log = {
        "events": [
            event("https://update.example/service", "not an origin"),
            event("https://cdn.example/mathjax.js", "null"),
            event("file:///book/intro.html", "null"),
            {"params": {"url": "https://update.example/service"}},
            {},
        ]
    }
    assert check_browser.requests(log) == ["https://cdn.example/mathjax.js"]
