"""What the four papers report: their numbers, settings and claims, and the errata, read once from `results/published`.

results()   one printed number per row        settings()  one experiment configuration per row
claims()    the 69 claims and their rules     errata()    the inconsistencies and what this study does about them
"""

import copy
import re
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from samlib.errors import InputError

PAPERS = ("foret2021", "behdin2023", "boca2023", "coldenhoff2022")
OWN = "this-study"  # in place of a paper: a claim of ours, with a rule fixed before the runs like the others
PRIORITIES = ("core", "extended", "beyond-one-GPU")


@dataclass(frozen=True, slots=True)
class Claim:
    """A sentence of a paper, or of ours, that can be tested, and the rule fixed for it before any run.

    `published` holds the paper's own figures; `note` and `confound` are empty where there is nothing to add.
    """

    id: str
    experiment: str
    paper: str
    where: str
    statement: str
    comparison: str
    statistic: str
    reproduced_if: str
    not_reproduced_if: str
    inconclusive_if: str
    published: dict[str, Any]
    priority: str
    note: str = ""
    confound: str = ""


@dataclass(frozen=True, slots=True)
class Erratum:
    """An inconsistency in the papers. `top` marks the ones that change a conclusion or a number most."""

    id: str
    about: str
    top: bool
    certainty: str
    title: str
    text: str


# ---------------------------------------------------------------------------------------------- what the reader calls


def claims() -> dict[str, Claim]:
    """Every claim by its id, in the order of the file."""
    return copy.deepcopy(_claims())


def claim(claim_id: str) -> Claim:
    """One claim.

    Raises:
        InputError: no claim has this id.
    """
    if claim_id not in _claims():
        raise InputError(f"claim = {claim_id!r} is unknown: use an id of results/published/claims.yaml")
    return copy.deepcopy(_claims()[claim_id])


def conventions() -> dict[str, Any]:
    """The conventions that hold for every rule, as worded at the top of `claims.yaml`."""
    return dict(parse_claims_file(claims_text())["conventions"])


def results() -> pd.DataFrame:
    """`published_results.csv`: one printed number per row, the unit in `metric`; NaN where the paper does not say."""
    return _table("published_results.csv", "row_id").copy()


def settings() -> pd.DataFrame:
    """`published_settings.csv`: one experiment configuration per row; NaN where the paper does not say."""
    return _table("published_settings.csv", "setting_id").copy()


def errata() -> tuple[Erratum, ...]:
    """The entries of `errata.md` in the order of the file."""
    return _errata()


def folder() -> Path:
    """Where the files lie: inside an installed wheel, or in `results/published` of a checkout.

    Raises:
        InputError: they are in neither place.
    """
    package = Path(__file__).parent
    for place in (package / "_published", package.parent / "results" / "published"):
        if (place / "claims.yaml").is_file():
            return place
    raise InputError(f"results/published is missing beside {package}: restore the checkout or reinstall samlib")


# ---------------------------------------------------------------------------------------------- claims


def parse_claims(text: str) -> dict[str, Claim]:
    """The claims in the text of a `claims.yaml`, of this or of an older revision.

    Raises:
        InputError: not YAML, a key given twice, a field missing, unknown or empty, an id used twice, an unknown paper
            or priority. The message names the claim and the field.
    """
    found: dict[str, Claim] = {}
    for entry in parse_claims_file(text)["claims"]:
        claim = _checked(entry)
        if claim.id in found:
            raise InputError(f"claims.yaml: id = {claim.id!r} is used twice: give every claim its own")
        found[claim.id] = claim
    return found


def parse_claims_file(text: str) -> dict[str, Any]:
    """The whole file as plain data; a key that stands twice in one mapping is an error."""
    try:
        content = yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        raise InputError(f"claims.yaml is not readable: {error}") from error
    if not isinstance(content, dict) or not {"conventions", "claims"} <= content.keys():
        raise InputError("claims.yaml: the keys 'conventions' and 'claims' are needed at the top")
    return content


class _StrictLoader(yaml.SafeLoader):
    """YAML keeps the last of two equal keys without a word; a note lost that way would never be missed."""


def _mapping_without_repeats(loader: _StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if key in seen:
            raise InputError(f"claims.yaml line {key_node.start_mark.line + 1}: key {key!r} is given twice: merge them")
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_without_repeats)


def _checked(entry: dict[str, Any]) -> Claim:
    name = entry.get("id", "(without id)")
    known = {field.name for field in fields(Claim)}
    missing = known - {"note", "confound"} - entry.keys()
    if missing or entry.keys() - known:
        raise InputError(
            f"claims.yaml, {name}: missing {sorted(missing)}, unknown {sorted(entry.keys() - known)}; "
            f"the fields are {', '.join(field.name for field in fields(Claim))}"
        )
    for field in sorted(entry.keys() - {"published"}):
        if not isinstance(entry[field], str) or not entry[field].strip():
            raise InputError(f"claims.yaml, {name}: {field} = {entry[field]!r}: use a sentence or a name")
    _check_choice(name, "paper", entry["paper"], (*PAPERS, OWN))
    _check_choice(name, "priority", entry["priority"], PRIORITIES)
    if not isinstance(entry["published"], dict):
        raise InputError(f"claims.yaml, {name}: published = {entry['published']!r}: use a mapping, maybe empty")
    return Claim(**entry)


def _check_choice(name: str, field: str, value: str, options: tuple[str, ...]) -> None:
    if value not in options:
        raise InputError(f"claims.yaml, {name}: {field} = {value!r} is unknown: use one of {', '.join(options)}")


# ---------------------------------------------------------------------------------------------- errata

# **E-B2 [top] (certain) title.** text
_ENTRY = re.compile(r"^\*\*(?P<id>E-\w+)(?P<top> \[top\])? \((?P<certainty>[^)]*)\) (?P<title>.+?)\*\* ?(?P<text>.*)$")


def parse_errata(text: str) -> tuple[Erratum, ...]:
    """The entries in the text of an `errata.md`; `about` is the heading an entry stands under.

    Raises:
        InputError: a line opens like an entry and is not one, or an id stands twice.
    """
    found: dict[str, Erratum] = {}
    about = ""
    for line in text.splitlines():
        if line.startswith("## "):
            about = line.removeprefix("## ")
        elif line.startswith("**"):
            entry = _erratum(line, about)
            if entry.id in found:
                raise InputError(f"errata.md: {entry.id} stands twice: give every entry its own id")
            found[entry.id] = entry
    return tuple(found.values())


def _erratum(line: str, about: str) -> Erratum:
    entry = _ENTRY.match(line)
    if entry is None:
        raise InputError(f"errata.md: {line[:60]!r} is not an entry: write **E-X1 [top] (certainty) title.** text")
    return Erratum(
        id=entry["id"],
        about=about,
        top=entry["top"] is not None,
        certainty=entry["certainty"],
        title=entry["title"].rstrip(".:"),
        text=entry["text"],
    )


# ---------------------------------------------------------------------------------------------- files, each read once


@cache
def _claims() -> dict[str, Claim]:
    return parse_claims(claims_text())


@cache
def claims_text() -> str:
    """The text of `claims.yaml`; a rule's digest covers part of it."""
    return (folder() / "claims.yaml").read_text(encoding="utf-8")


@cache
def _errata() -> tuple[Erratum, ...]:
    return parse_errata((folder() / "errata.md").read_text(encoding="utf-8"))


@cache
def _table(name: str, id_column: str) -> pd.DataFrame:
    table = pd.read_csv(folder() / name)
    repeated = table[id_column][table[id_column].duplicated()]
    if len(repeated):
        raise InputError(f"{name}: {id_column} = {repeated.iloc[0]!r} is used twice: give every row its own")
    return table
