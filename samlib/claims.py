"""What the records say about each claim of the four papers.

    claim -> its rule -> Verdict(outcome, parts, published, rule_digest, miniature, ...)

`results/published/claims.yaml` words the claims, their rules and the conventions that hold for every rule. The
conventions are functions in `samlib.rules.conventions`; a rule, in `samlib.rules.<experiment>`, is then the wording of
its claim, line for line. A rule is committed before the records it judges: `rule_digest` changes with the rule, with
every convention and every interval it reaches, with its wording and with the cells it is bound to, and a test compares
it with the digest at the commit of each record.
"""

import ast
import hashlib
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from samlib import experiments, published
from samlib.errors import InputError
from samlib.experiments import Arm
from samlib.published import Claim
from samlib.rules import RULES
from samlib.rules.conventions import INFORMATION, NOT_REPRODUCED, NOT_RUN, REPRODUCED, Decision, Part
from samlib.store import Store


@dataclass(frozen=True, slots=True)
class Verdict:
    """The outcome for one claim on one profile.

    `miniature` marks a verdict on other data or networks than the published ones, by the sign alone; `varied` one on a
    reader's own variation of the settings; `reason` says what the outcome rests on or what is in its way.
    """

    claim: str
    outcome: str
    parts: tuple[Part, ...]
    published: dict[str, Any]
    rule_digest: str
    miniature: bool
    profile: str
    reason: str
    varied: bool = False


# ---------------------------------------------------------------------------------------------- verdicts


def verdicts(profile: str, store: Store) -> list[Verdict]:
    """The verdict on every claim, in the order of `claims.yaml`.

    Raises:
        InputError: unknown profile, a rule without a claim, or an experiment with a claim that has no rule.
    """
    check_rules()
    return [verdict(claim_id, profile, store) for claim_id in published.claims()]


def verdict(claim_id: str, profile: str, store: Store) -> Verdict:
    """The verdict on one claim from the records of a store.

    Raises:
        InputError: unknown claim or profile.
    """
    stem, _ = experiments.decides(claim_id, experiments.check_profile(profile))
    return judge(claim_id, profile, store, experiments.arms(stem, profile) if stem else ())


def judge(claim_id: str, profile: str, store: Store, arms: Sequence[Arm], *, varied: bool = False) -> Verdict:
    """The verdict from these arms of the claim's experiment; `varied` says that a reader changed seeds or fields.

    Raises:
        InputError: unknown claim or profile.
    """
    claim = published.claim(claim_id)
    stem, cells = experiments.decides(claim_id, profile)
    digest = rule_digest(claim_id, profile=profile) if claim_id in RULES else ""
    absent = _nothing_to_judge(claim, profile, stem, cells, arms)
    if absent:
        return Verdict(claim_id, NOT_RUN, (), claim.published, digest, False, profile, absent, varied)
    miniature = not experiments.published_scale(stem, profile, claim_id)
    frame = store.frame([arm for arm in arms if arm.cell in cells])
    outcome, parts, notes = applied(claim_id, frame, miniature)
    met = {REPRODUCED: claim.reproduced_if, NOT_REPRODUCED: claim.not_reproduced_if}.get(outcome, "")
    half = int(frame["half_weights"].sum()) if "half_weights" in frame else 0
    rounded = f"{half} measures of these runs were taken of weights rounded to half precision" if half else ""
    reason = "; ".join(filter(None, (met, notes, rounded)))
    marked = miniature and outcome != NOT_RUN
    return Verdict(claim_id, outcome, parts, claim.published, digest, marked, profile, reason, varied)


def applied(claim_id: str, frame: Any, miniature: bool) -> Decision:
    """What the rule of a claim makes of a frame: outcome, parts and notes.

    Without NumPy's warning where an arm has two seeds: the bootstrap of a spread then leaves a single one, which has
    none, and the rule draws no conclusion from two seeds anyway. The statistics themselves stay as they are, since
    their code is part of the digest of each rule."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Degrees of freedom", RuntimeWarning)
        return RULES[claim_id](frame, miniature)


def check_rules() -> None:
    """Every rule has a claim, and every claim of an experiment that exists has a rule.

    Raises:
        InputError: naming those that do not.
    """
    claims = published.claims()
    orphans = sorted(RULES.keys() - claims.keys())
    if orphans:
        raise InputError(f"rules {orphans} have no claim: add the claim to claims.yaml or take the rule out")
    bare = [name for name, claim in claims.items() if claim.experiment in experiments.STEMS and name not in RULES]
    if bare:
        raise InputError(f"claims {bare} have no rule although their experiment exists: write it in samlib/rules")


def _nothing_to_judge(claim: Claim, profile: str, stem: str | None, cells: Sequence[str], arms: Sequence[Arm]) -> str:
    """Why no record can bear on a claim on this profile; empty if one can."""
    if claim.priority == "beyond-one-GPU":
        return "needs many accelerators, or weights and data outside this study"
    if stem is None:
        return f"experiment {claim.experiment} does not exist yet"
    unbound = [cell for cell in cells if cell not in {arm.cell for arm in arms}]
    if unbound:
        return f"{stem} has no arm in the cells {', '.join(unbound)} on the profile {profile}"
    return "" if cells else f"{stem} has no setting for this claim on the profile {profile}"


# ---------------------------------------------------------------------------------------------- for tables


def row(verdict: Verdict) -> dict[str, Any]:
    """A verdict as one row of the scoreboard: plain strings and truth values."""
    claim = published.claim(verdict.claim)
    deciding = [part for part in verdict.parts if part.outcome != INFORMATION]
    return {
        "claim": verdict.claim,
        "paper": claim.paper,
        "where": claim.where,
        "outcome": verdict.outcome,
        "statistic": "; ".join(map(part_text, deciding)),
        "published": published_text(verdict.published),
        "profile": verdict.profile,
        "miniature": verdict.miniature,
        "varied": verdict.varied,
        "reason": verdict.reason,
        "rule": verdict.rule_digest,
    }


def part_text(part: Part) -> str:
    """For example 'clean: sam - sgd of test_accuracy_pct, paired by seed: 1.82 [1.25, 2.39], n = 10'."""
    interval = "" if math.isnan(part.low) else f" [{part.low:.4g}, {part.high:.4g}]"
    return f"{part.name}: {part.statistic}: {part.estimate:.4g}{interval}, n = {part.n}"


def published_text(figures: Any) -> str:
    """The paper's figures on one line: 'sam 71.22, 70.77, 70.98; mean difference 6.54'."""
    if isinstance(figures, dict):
        return "; ".join(f"{str(name).replace('_', ' ')} {_nested_text(value)}" for name, value in figures.items())
    return ", ".join(map(published_text, figures)) if isinstance(figures, list) else str(figures)


def _nested_text(figures: Any) -> str:
    return f"({published_text(figures)})" if isinstance(figures, dict) else published_text(figures)


# ---------------------------------------------------------------------------------------------- digests


@dataclass(frozen=True, slots=True)
class Sources:
    """The texts that hold all that decides a claim, at one revision.

    `rules` is `samlib/rules/conventions.py` followed by the rules of the experiment that the claim names, `wording` is
    `claims.yaml`, `experiment` that experiment's module in `samlib/experiments` (empty while it does not exist),
    `statistics` is `samlib/stats.py`.
    """

    rules: str
    wording: str
    experiment: str
    statistics: str


def sources(claim_id: str) -> Sources:
    """The texts as they are now.

    Raises:
        InputError: unknown claim.
    """
    stem = published.claim(claim_id).experiment
    rules = _text("rules/conventions.py") + (_text(f"rules/{stem}.py") if claim_id in RULES else "")
    experiment = _text(f"experiments/{stem}.py") if stem in experiments.STEMS else ""
    return Sources(rules, published.claims_text(), experiment, _text("stats.py"))


def _text(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


def rule_digest(claim_id: str, at: Sources | None = None, profile: str = "quick") -> str:
    """Sixteen hex digits over all that decides a claim. Comments, docstrings and layout do not count.

    That is: its rule with every definition the rule reaches among the conventions and the rules beside it; the
    definitions of `stats` those call, and what they reach there; the claim's own entry in `DECIDES` for the profile,
    and `PUBLISHED_SCALE`, with what the two reach in the experiment; and the wording of its statistic and conditions.
    What the cells hold is not part of it: it is in the key of each record.

    Args:
        at: the texts of an older revision; by default those of now.
        profile: whose cells count, so that another profile may be bound later.

    Raises:
        InputError: there is no such rule or claim in these texts, or the experiment does not bind it.
    """
    return _digest(claim_id, sources(claim_id) if at is None else at, profile)


@cache
def _digest(claim_id: str, at: Sources, profile: str) -> str:
    rules, wording = _definitions(at.rules), _wording(at.wording)
    body = next((node for node in rules.values() if _decides(node, claim_id)), None)
    if body is None or claim_id not in wording:
        raise InputError(f"claim = {claim_id!r} has no rule, or no entry in claims.yaml, at this revision")
    reached = _reached(_names(body), rules)
    called = _attributes_of("stats", [body, *(rules[name] for name in reached)])
    statistics = _definitions(at.statistics)
    lines = [claim_id, "rule", _normal_form(body), *_code(reached, rules)]
    lines += ["stats", *_code(_reached(called, statistics), statistics)]
    lines += ["experiment", *_binding(claim_id, at.experiment, profile), "wording", *wording[claim_id]]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _binding(claim_id: str, experiment: str, profile: str) -> list[str]:
    """The cells bound to a claim on a profile, and the profiles of published scale, as its experiment declares them."""
    if not experiment:
        return []
    declared = _definitions(experiment)
    profiles = _entry(getattr(declared.get("DECIDES"), "value", None), claim_id)
    if profiles is None or "PUBLISHED_SCALE" not in declared:
        raise InputError(
            f"claim = {claim_id!r} has no entry in DECIDES, or its experiment no PUBLISHED_SCALE, at this revision: "
            "write the two at the top level, DECIDES as one dict literal"
        )
    cells = _entry(profiles, profile)
    reached = _reached((_names(cells) if cells else set()) | {"PUBLISHED_SCALE"}, declared)
    return [_normal_form(cells) if cells else "no cells", *_code(reached, declared)]


def _entry(literal: ast.expr | None, key: str) -> ast.expr | None:
    """The value of one key in a dict literal."""
    if not isinstance(literal, ast.Dict):
        return None
    entries = zip(literal.keys, literal.values, strict=True)
    return {name.value: value for name, value in entries if isinstance(name, ast.Constant)}.get(key)


def _code(names: Iterable[str], definitions: Mapping[str, ast.stmt]) -> list[str]:
    return [f"{name}={_normal_form(definitions[name])}" for name in sorted(names)]


@cache
def _wording(claims_text: str) -> dict[str, tuple[str, ...]]:
    """The experiment each claim names, and the sentences its rule puts into code."""
    claims = published.parse_claims(claims_text)
    return {
        name: (
            claim.experiment,
            claim.statistic,
            claim.reproduced_if,
            claim.not_reproduced_if,
            claim.inconclusive_if,
        )
        for name, claim in claims.items()
    }


@cache
def _definitions(source: str) -> dict[str, ast.stmt]:
    """What a module defines at its top level, by name."""
    found: dict[str, ast.stmt] = {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = node
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            found |= dict.fromkeys(_assigned(node), node)
    return found


def _assigned(node: ast.Assign | ast.AnnAssign) -> list[str]:
    """The names on the left; a loop variable of a comprehension on the right is not one."""
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]


def _decides(node: ast.stmt, claim_id: str) -> bool:
    """Whether a definition is decorated with `@rule(claim_id, ...)`."""
    calls = [call for call in getattr(node, "decorator_list", []) if isinstance(call, ast.Call) and call.args]
    return any(
        isinstance(call.func, ast.Name)
        and call.func.id == "rule"
        and isinstance(call.args[0], ast.Constant)
        and call.args[0].value == claim_id
        for call in calls
    )


def _reached(names: Iterable[str], definitions: Mapping[str, ast.stmt]) -> set[str]:
    """Those of the names that are defined, and the names of the definitions that those use in turn."""
    reached: set[str] = set()
    waiting = set(names)
    while waiting:
        new = (waiting & definitions.keys()) - reached
        reached |= new
        waiting = {used for name in new for used in _names(definitions[name])}
    return reached


def _names(tree: ast.AST) -> set[str]:
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


def _attributes_of(module: str, trees: Iterable[ast.AST]) -> set[str]:
    """X for every `module.X` in the trees."""
    return {
        node.attr
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == module
    }


def _normal_form(node: Any) -> str:
    """A syntax tree as text, the same on every Python: what a version adds empty, and docstrings, are left out."""
    if isinstance(node, list):
        return f"[{','.join(_normal_form(item) for item in node if not _is_docstring(item))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    return f"{type(node).__name__}({','.join(_normal_fields(node))})"


def _normal_fields(node: ast.AST) -> Iterator[str]:
    for name, value in ast.iter_fields(node):
        if isinstance(node, ast.JoinedStr):  # Python 3.12 puts empty pieces into some f-strings
            value = [piece for piece in value if not (isinstance(piece, ast.Constant) and piece.value == "")]
        if value not in (None, []) and name not in ("ctx", "kind", "type_comment"):
            yield f"{name}={_normal_form(value)}"


def _is_docstring(node: Any) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
