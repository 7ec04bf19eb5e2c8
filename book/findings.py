"""The tables of the book and of README.md that are drawn from verdicts, claims and errata, as Markdown.

python book/findings.py README.md      rewrites the table of findings between its two markers
"""

import argparse
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from samlib import claims, experiments, published
from samlib.bench import table as bench_table
from samlib.errors import InputError
from samlib.rules.conventions import INFORMATION, NOT_RUN, OUTCOMES, Part
from samlib.store import open_store

BENCH = Path(__file__).resolve().parent.parent / "results" / "bench"
MOST_LINES = 4  # of statistics in one row of the table
REAL = "gpu"  # the profile whose verdicts stand beside those of another
BEGIN, END = "<!-- findings: begin -->", "<!-- findings: end -->"


# ---------------------------------------------------------------------------------------------- verdicts


def findings(
    verdicts: Sequence[claims.Verdict], mark: Callable[[str], str] = str, full: Sequence[claims.Verdict] = ()
) -> str:
    """How many claims came out which way, then a row for each that was decided.

    Args:
        mark: dresses the outcome.
        full: the verdicts on CIFAR-10, which get a column as soon as one of them is decided.
    """
    beside = {verdict.claim: verdict for verdict in full if verdict.outcome != NOT_RUN}
    decided = [verdict for verdict in verdicts if verdict.outcome != NOT_RUN or verdict.claim in beside]
    words = "\n\n".join([tally(verdicts), *([tally_on_cifar(full)] if full else [])])
    if not decided:
        return f"{words}\n"
    head = ["Claim", "Outcome", "Statistic, mean and 95 % interval", "Published"]
    rows = [finding(verdict, mark) for verdict in decided]
    if beside:
        head.insert(3, "On CIFAR-10")
        for verdict, row in zip(decided, rows, strict=True):
            row.insert(3, on_cifar(beside.get(verdict.claim), mark))
    return f"{words}\n\n{table(head, rows)}\n"


def on_gpu(profile: str) -> list[claims.Verdict]:
    """The verdicts from the committed records on CIFAR-10, to stand beside those of another profile."""
    if profile == REAL:
        return []
    return claims.verdicts(REAL, open_store(REAL, "results"))


def tally_on_cifar(verdicts: Sequence[claims.Verdict]) -> str:
    bound = [verdict for verdict in verdicts if experiments.decides(verdict.claim, verdict.profile)[1]]
    decided = [verdict for verdict in bound if verdict.outcome != NOT_RUN]
    left = f"{len(decided)} are decided, the runs of the others are pending" if decided else "none is decided yet"
    return f"Of the {len(bound)} claims that have runs on CIFAR-10, the profile `{REAL}`, {left}."


def on_cifar(verdict: claims.Verdict | None, mark: Callable[[str], str]) -> str:
    """The outcome on CIFAR-10 and what it rests on; empty where nothing is decided."""
    if verdict is None:
        return ""
    outcome, statistic = finding(verdict, mark)[1:3]
    return f"{outcome}<br>{statistic}"


def tally(verdicts: Sequence[claims.Verdict]) -> str:
    counts = Counter(verdict.outcome for verdict in verdicts)
    profiles = sorted({verdict.profile for verdict in verdicts})
    parts = ", ".join(f"{counts[outcome]} {outcome}" for outcome in OUTCOMES)
    return f"Of {len(verdicts)} claims on the profile {', '.join(f'`{name}`' for name in profiles)}: {parts}."


def finding(verdict: claims.Verdict, mark: Callable[[str], str]) -> list[str]:
    claim = published.claims()[verdict.claim]
    parts = [part for part in verdict.parts if part.outcome != INFORMATION]
    return [
        f"{plain(claim.statement)}<br>*{claim.paper}, {plain(claim.where)}*",
        mark(verdict.outcome) + ("<br>*miniature*" if verdict.miniature else ""),
        "<br>".join(plain(text) for text in statistics(parts)) or plain(verdict.reason),
        plain(claims.published_text(verdict.published)) or "not printed",
    ]


def statistics(parts: Sequence[Part]) -> list[str]:
    """Every part on a line of its own; where there are many, one line per statistic with its range over settings."""
    if len(parts) <= MOST_LINES:
        return [claims.part_text(part) for part in parts]
    lines = []
    for statistic in dict.fromkeys(part.statistic for part in parts):
        same = [part for part in parts if part.statistic == statistic]
        span = f"{min(p.estimate for p in same):.4g} to {max(p.estimate for p in same):.4g}"
        lines.append(f"{statistic}: {span} over {', '.join(p.name for p in same)}; n = {min(p.n for p in same)} each")
    return lines


# ---------------------------------------------------------------------------------------------- claims and errata


def conventions() -> str:
    rows = [
        [f"**{name.replace('_', ' ')}**", plain(claims.published_text(text))]
        for name, text in published.conventions().items()
    ]
    return table(["Convention", "Meaning"], rows) + "\n"


def rules() -> str:
    """Every claim with its rule, one heading per paper, and one for this study."""
    known = published.claims().values()
    sections = [
        f"### {paper}\n\n" + "\n".join(rule(claim) for claim in known if claim.paper == paper)
        for paper in (*published.PAPERS, published.OWN)
    ]
    return "\n".join(sections)


def rule(claim: published.Claim) -> str:
    scope = "" if claim.priority == "core" else f", {claim.priority.replace('-', ' ')}"
    fields = [
        ("where", claim.where),
        ("compared", claim.comparison),
        ("statistic", claim.statistic),
        ("reproduced if", claim.reproduced_if),
        ("not reproduced if", claim.not_reproduced_if),
        ("inconclusive if", claim.inconclusive_if),
        ("published", claims.published_text(claim.published)),
        ("confound", claim.confound),
        ("note", claim.note),
    ]
    lines = [f"- {name}: {plain(text)}" for name, text in fields if text]
    head = f"**{claim.id}** ({claim.experiment}{scope}). {plain(claim.statement)}"
    return "\n".join([f"(claim-{claim.id})=", head, "", *lines, ""])


def errata() -> str:
    """Every erratum under the heading it belongs to, after links to those that change a conclusion."""
    entries = published.errata()
    top = [f"- [{entry.id}](#{entry.id.lower()}): {plain(entry.title.rstrip('.;'))}" for entry in entries if entry.top]
    parts = [f"## The {len(top)} that change most", "", *top, ""]
    for about, group in groupby(entries, key=lambda entry: entry.about):
        parts += [f"## {about}", "", *(erratum(entry) for entry in group)]
    return "\n".join(parts)


def erratum(entry: published.Erratum) -> str:
    end = "" if entry.title.endswith((";", ":")) else "."
    head = f"**{entry.id}** ({plain(entry.certainty)}) **{plain(entry.title)}{end}**"
    return f"({entry.id.lower()})=\n{head} {plain(entry.text)}\n"


# ---------------------------------------------------------------------------------------------- the bench


def speed() -> str:
    """The ratios of every committed run of the bench, machine by machine."""
    return "\n\n".join(bench_table.markdown({**record, "precision": []}) for record in bench_records()) + "\n"


def precision() -> str:
    """What acts of a perturbation in low precision, from the same runs."""
    head = ["network, weights", "rho", "precision", "norm ratio", "cosine", "unmoved", "rounding norm"]
    head += ["rise error", "gradient error", "gradient error at w", "change error", "time"]
    rows = [precision_row(row) for record in bench_records() for row in record["precision"]]
    return table(head, rows) + "\n"


def precision_row(row: dict[str, Any]) -> list[str]:
    def both(name: str) -> str:
        return "" if row[name] is None else f"{row[name]:.3g} / {row[f'{name}_two_products']:.3g}"

    at_w = "" if row["gradient_error_at_w"] is None else f"{row['gradient_error_at_w']:.3g}"
    time = [] if row["time_ratio"] is None else [f"{row[name]:.2f}" for name in ("time_ratio", "time_low", "time_high")]
    return [
        f"{row['network']}, {row['weights']:,}",
        f"{row['rho']:g}",
        row["precision"],
        *(f"{row[name]:.3g}" for name in ("norm_ratio", "cosine", "unmoved_fraction", "rounding_norm")),
        both("rise_error"),
        both("gradient_error"),
        at_w,
        both("change_error"),
        "{} [{}, {}]".format(*time) if time else "",
    ]


def bench_records() -> list[dict[str, Any]]:
    return [bench_table.load(path) for path in sorted(BENCH.glob("*.json"))]


# ---------------------------------------------------------------------------------------------- Markdown

_EMPHASIS = re.compile(r"(?<![\w)|*])\*(?=[^\s*])([^*]*[^\s*])\*(?![\w(|*])")


def plain(text: str) -> str:
    """Text of the reference files made safe for a Markdown table: `code` and *emphasis* between blanks stay markup."""
    pieces = re.split(r"(`[^`]+`)", " ".join(text.split()))
    return "".join(piece.replace("|", r"\|") if piece.startswith("`") else escaped(piece) for piece in pieces)


def escaped(text: str) -> str:
    kept = _EMPHASIS.sub("\x00\\1\x00", text)
    return re.sub(r"([*|<>$_\[\]~`])", r"\\\1", kept).replace("\x00", "*")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


# ---------------------------------------------------------------------------------------------- README.md


def replace_between_markers(text: str, new: str) -> str:
    """The text with what stands between the two markers replaced.

    Raises:
        InputError: the markers are not there, once each and in order.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in after:
        raise InputError(f"the markers {BEGIN!r} and {END!r} are needed, once each and in this order: restore them")
    return f"{before}{BEGIN}\n\n{new}\n{END}{after}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="findings.py", description="rewrite the findings in a file")
    parser.add_argument("file", type=Path)
    parser.add_argument("--profile", default="quick")
    parser.add_argument("--store", default="results")
    args = parser.parse_args(argv)
    try:
        verdicts = claims.verdicts(args.profile, open_store(args.profile, args.store))
        found = findings(verdicts, full=on_gpu(args.profile))
        text = replace_between_markers(args.file.read_text(encoding="utf-8"), found)
    except InputError as error:
        print(f"error: {args.file}: {error}", file=sys.stderr)
        return 2
    args.file.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
