"""What is measured: cases, each a network with variants to compare, and the goals. Data only; loads no torch.

Three kinds of case are timed. A *step* is everything a training loop does for one batch: forward, backward, zero_grad,
optimiser. *Bookkeeping* is what SAM adds to its two forward-backwards: `first_step`, `second_step` and a `zero_grad`
after each, hence norm, copy, ascent, restore, the base optimiser's step and clearing the gradients. Forward, backward
and the placement of prepared gradients in between are not timed. A gradient is placed as autograd would do it: a new
tensor where `.grad` is None, otherwise added to the one there. An implementation that gathers gradients into a buffer
pays for that here; one that keeps them bound to its buffer does not, but pays for the addition in its steps.

In these two no variant treats batch norm: running statistics are updated in both passes, by everyone.

An *engine* case is the whole step of `samlib.train.Training`, which is a step of a training with all that the study
does: images drawn and augmented, the learning rate, running statistics kept from the second pass, clipping, weight
decay. What it is compared with does all of that too, on images that are on the device (`bench.engine`).

An *anchor* case is the engine's step of SGD beside a loop written by hand for one network (`bench.anchor`). A *start*
case has no ratios: it is the time from the start of a process to the engine's first step with a compiled model, in two
processes, of which the second finds what the first has compiled.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from samlib.errors import InputError

SGD, FUSED_SGD, FLOOR = "SGD", "SGD fused", "2 x forward-backward"
PLAIN = "plain two-step SAM"
PEER, FAIR_PEER = "pytorch_optimizer foreach", "pytorch_optimizer foreach, fused SGD"
FOREACH, FLAT = "SAM foreach", "SAM flat"
OURS = FLAT  # the backend that the goals are for
AGAIN = f"{OURS}, again"  # the same code twice: its distance from 1 is what the bench cannot resolve
SHARDS = (4, 8, 16)

COMPILED = ", model compiled"  # suffix of a variant whose model goes through torch.compile; the optimiser does not
COMPILED_OURS, COMPILED_PEER = f"{OURS}, compiled", f"{PEER}, compiled"  # here the optimiser does


ENGINE, ENGINE_SGD = "engine SAM", "engine SGD"
GRAPH, GRAPH_SGD = "engine SAM, graph", "engine SGD, graph"
ENGINE_AGAIN, GRAPH_AGAIN = f"{ENGINE}, again", f"{GRAPH}, again"
INPUT, INPUT_GRAPH = "input pipeline", "input pipeline, graph"
LOOP_PLAIN, LOOP_SGD = f"loop, {PLAIN}", "loop, SGD"
LOOP_PEER, LOOP_FAIR_PEER = f"loop, {PEER}", f"loop, {FAIR_PEER}"
ENGINE_SHARDS = (4, 8)
SEEDS = 4  # trainings side by side
ANCHOR = "loop by hand, SGD"
PARTS = ("rows", "equality", "failures", "engine", "start", "precision")  # of a record, each a list
SIDE_BY_SIDE = f"{GRAPH}, {SEEDS} seeds side by side"


@dataclass(frozen=True, slots=True)
class Comparison:
    """variant / reference, at most `goal` where there is one."""

    variant: str
    reference: str
    goal: float | None = None


@dataclass(frozen=True, slots=True)
class Case:
    """What one process measures.

    Attributes:
        kind: "step", "bookkeeping", "engine", "anchor", "start", or "precision", whose rows are those of
            `precision.rows`.
        clock: what the ratio is of, on a CPU: "cpu", the process's time on all its threads, or "wall". On a GPU it is
            the time between two events.
        processes: fresh processes, since where its memory lies moves a variant by up to 10 %.
        block: steps between two readings of the clock of a CPU, and of an anchor case; for a GPU it is
            `variants.BLOCK`.
        precision: of the passes, in an engine, anchor or start case; the others are in fp32.
    """

    section: str
    network: str
    batch: int
    comparisons: tuple[Comparison, ...]
    rounds: int
    processes: int = 3
    threads: int = 1
    kind: str = "step"
    clock: str = "cpu"
    block: int = 1
    precision: str = "fp32"

    @property
    def timed(self) -> list[str]:
        """The variants that occur in a comparison, each once."""
        return list(dict.fromkeys(name for one in self.comparisons for name in (one.variant, one.reference)))


def msam(num_shards: int, way: str = "") -> str:
    """Name of our mSAM; `way` is the passes, which are chosen by shape without it, and whether they are compiled."""
    return f"mSAM, {num_shards} shards{way and ', '}{way}"


def engine_msam(num_shards: int, way: str) -> str:
    """Name of the engine's mSAM: way "eager", "graph", whose shards run one by one, or "streams", side by side."""
    return f"engine mSAM, {num_shards} shards, {way}"


STEP = (
    Comparison(OURS, FLOOR, 1.05),
    Comparison(OURS, SGD, 1.55),
    Comparison(OURS, FAIR_PEER, 0.70),
    Comparison(OURS, PEER, 0.70),
    Comparison(OURS, PLAIN),
    Comparison(AGAIN, OURS),
    Comparison(FOREACH, FLOOR),
    Comparison(FOREACH, FAIR_PEER),
    Comparison(SGD, FLOOR),
    Comparison(FUSED_SGD, FLOOR),
    Comparison(PLAIN, FLOOR),
    Comparison(PEER, FLOOR),
    Comparison(FAIR_PEER, FLOOR),
)
COMPILED_STEP = (
    Comparison(OURS + COMPILED, SGD, 1.30),
    Comparison(OURS + COMPILED, SGD + COMPILED),
    Comparison(OURS + COMPILED, FLOOR + COMPILED),
    Comparison(OURS + COMPILED, OURS),
)
CONV_STEP = tuple(replace(one, goal=None) for one in STEP)
BOOKKEEPING = (
    Comparison(OURS, FAIR_PEER, 0.45),
    Comparison(OURS, PEER, 0.45),
    Comparison(OURS, PLAIN),
    Comparison(AGAIN, OURS),
    Comparison(FOREACH, FAIR_PEER, 0.45),
    Comparison(FOREACH, PLAIN),
    Comparison(FAIR_PEER, PLAIN),
    Comparison(PEER, PLAIN),
)
COMPILED_BOOKKEEPING = (
    Comparison(COMPILED_OURS, FAIR_PEER, 0.45),
    Comparison(COMPILED_OURS, PEER, 0.45),
    Comparison(COMPILED_OURS, COMPILED_PEER),
    Comparison(COMPILED_OURS, PLAIN),
    Comparison(COMPILED_OURS, OURS),
    Comparison(COMPILED_PEER, PEER),
)
MSAM = (
    Comparison(msam(4), OURS, 1.10),
    Comparison(msam(8), OURS, 1.5),
    Comparison(msam(16), OURS, 1.5),
    *(Comparison(msam(shards, way), OURS) for shards in SHARDS for way in ("sequential", "overlapped", "vmap")),
)
MSAM_COMPILED = (
    Comparison(msam(4, "compiled"), OURS, 1.10),
    Comparison(msam(16, "compiled"), OURS, 1.15),
    Comparison(msam(16, "vmap compiled"), OURS),
    Comparison(msam(4, "compiled"), OURS + COMPILED),
    Comparison(msam(16, "compiled"), OURS + COMPILED),
    Comparison(OURS + COMPILED, OURS),
)


ENGINE_STEP = (
    Comparison(ENGINE, LOOP_FAIR_PEER),
    Comparison(ENGINE, LOOP_PEER),
    Comparison(ENGINE, LOOP_PLAIN),
    Comparison(ENGINE, ENGINE_SGD),
    Comparison(ENGINE_SGD, LOOP_SGD),
    Comparison(ENGINE_AGAIN, ENGINE),
    Comparison(INPUT, ENGINE),
)
ENGINE_COMPILED = (
    Comparison(ENGINE + COMPILED, LOOP_FAIR_PEER + COMPILED),
    Comparison(ENGINE + COMPILED, LOOP_PLAIN + COMPILED),
    Comparison(ENGINE + COMPILED, ENGINE),
    Comparison(LOOP_PLAIN + COMPILED, LOOP_PLAIN),
)
ENGINE_CPU = {"MLP": (128, 20, 30), "small CNN": (128, 5, 30), "ResNet-20": (16, 1, 15)}  # batch, block, rounds
ENGINE_GPU = ("ResNet-20", "WRN-40-2", "MobileNetV2", "ResNet-18", "ResNet-50", "WRN-28-10")
ENGINE_PRECISIONS = ("fp32", "tf32", "fp16", "bf16")
EPOCH = 50_000  # images
EPOCH_GOALS = {  # seconds of an epoch of SAM on an H200, at the cheapest precision
    "ResNet-20": 0.30,
    "WRN-40-2": 0.95,
    "MobileNetV2": 1.75,
    "ResNet-18": 1.25,
    "ResNet-50": 4.2,
    "WRN-28-10": 9.0,
}
COMPILED_CPU = ("ResNet-20", 16)
COMPILED_GPU = ("ResNet-18", "ResNet-20", "MobileNetV2", "WRN-28-10")
PEER_GOALS = {"ResNet-20": 0.25, "MobileNetV2": 0.45, "ResNet-18": 0.75, "WRN-28-10": 0.97}
COMPILED_PEER_GOALS = {"ResNet-18": 0.85}
ENGINE_MSAM_GOALS = {("ResNet-18", 4): 1.2, ("ResNet-18", 8): 1.4, ("WRN-28-10", 8): 1.15}


def engine_gpu(network: str, precision: str) -> tuple[Comparison, ...]:
    """What the engine is compared with on a GPU, where it also runs as a graph.

    mSAM on streams has no scaled loss.
    """
    ways = ["graph", *(["streams"] if precision != "fp16" else [])]
    return (
        Comparison(GRAPH, LOOP_FAIR_PEER, PEER_GOALS.get(network)),
        Comparison(GRAPH, LOOP_PEER),
        Comparison(GRAPH, LOOP_PLAIN),
        Comparison(GRAPH, ENGINE),
        Comparison(ENGINE, LOOP_FAIR_PEER),
        Comparison(ENGINE, ENGINE_SGD),
        Comparison(GRAPH, GRAPH_SGD, 2.03),
        Comparison(ENGINE_SGD, LOOP_SGD),
        Comparison(GRAPH_AGAIN, GRAPH),
        Comparison(INPUT_GRAPH, GRAPH, 0.01),
        *(
            Comparison(engine_msam(shards, way), GRAPH, ENGINE_MSAM_GOALS.get((network, shards)))
            for shards in ENGINE_SHARDS
            for way in ways
        ),
        # twice the images a second of one training: 4 steps in the time of 2
        *([Comparison(SIDE_BY_SIDE, GRAPH, SEEDS / 2)] if network == "ResNet-20" else []),
    )


def engine_gpu_compiled(network: str) -> tuple[Comparison, ...]:
    """The strongest form of everyone: kernels of torch.compile in the loops, the engine and its graph."""
    goal = COMPILED_PEER_GOALS.get(network)
    return (
        Comparison(GRAPH + COMPILED, LOOP_FAIR_PEER + COMPILED, goal),
        Comparison(GRAPH + COMPILED, LOOP_PLAIN + COMPILED, goal),
        Comparison(ENGINE + COMPILED, LOOP_FAIR_PEER + COMPILED),
        Comparison(ENGINE + COMPILED, LOOP_PLAIN + COMPILED),
        Comparison(GRAPH + COMPILED, GRAPH_SGD + COMPILED, 2.03),
        Comparison(GRAPH + COMPILED, GRAPH),
        Comparison(GRAPH, LOOP_FAIR_PEER + COMPILED),
        Comparison(LOOP_PLAIN + COMPILED, LOOP_PLAIN),
    )


ANCHOR_NETWORK = "airbench-style"
ANCHOR_CPU = (Comparison(ENGINE_SGD, ANCHOR),)
ANCHOR_GPU = (Comparison(GRAPH_SGD, ANCHOR, 1.3), Comparison(ENGINE_SGD, ANCHOR))
ANCHOR_GPU_COMPILED = (
    Comparison(GRAPH_SGD + COMPILED, ANCHOR + COMPILED, 1.3),
    Comparison(GRAPH_SGD + COMPILED, GRAPH_SGD),
    Comparison(ANCHOR + COMPILED, ANCHOR),
)
START_GOALS = {"empty": 90.0, "filled": 20.0}  # seconds on a GPU, by what the cache of torch.compile holds
START_GPU = ("ResNet-18", "ResNet-20")


BOOKKEEPING_NETWORKS = ("ResNet-20", "MobileNetV2", "ResNet-18", "WRN-28-10")  # the issue sets goals for them
CONVOLUTIONS = {  # with the batch: what a CPU can do in minutes
    "cpu": [("ResNet-20", 128), ("MobileNetV2", 8)],
    "cuda": [("ResNet-20", 128), ("MobileNetV2", 128), ("ResNet-18", 128), ("WRN-28-10", 128)],
}
PRECISION_NETWORKS = ("small CNN", "MLP", "ResNet-20", "ResNet-18")


def sections(device: str) -> dict[str, list[Case]]:
    """The cases by section, in the order in which they run."""
    found = {
        "mlp": [Case("mlp", "MLP-404", 16, STEP, rounds=60)],
        "mlp-compiled": [Case("mlp-compiled", "MLP-404", 16, COMPILED_STEP, rounds=60)],
        "bookkeeping": [
            *(_bookkeeping("bookkeeping", network, BOOKKEEPING) for network in BOOKKEEPING_NETWORKS),
            _bookkeeping("bookkeeping", "MLP-404", tuple(replace(one, goal=None) for one in BOOKKEEPING)),
        ],
        "bookkeeping-compiled": [
            _bookkeeping("bookkeeping-compiled", network, COMPILED_BOOKKEEPING) for network in BOOKKEEPING_NETWORKS
        ],
        "conv": [
            Case("conv", network, batch, CONV_STEP, rounds=15, threads=2) for network, batch in CONVOLUTIONS[device]
        ],
        "msam": [Case("msam", "ResNet-20", 128, MSAM, rounds=15, threads=2, clock="wall")],
        "msam-compiled": [Case("msam-compiled", "ResNet-20", 128, MSAM_COMPILED, rounds=15, threads=2, clock="wall")],
    }
    return found | (_gpu_sections() if device == "cuda" else _cpu_sections())


def _cpu_sections() -> dict[str, list[Case]]:
    compiled, batch = COMPILED_CPU
    return {
        "engine": [
            Case("engine", network, batch, ENGINE_STEP, rounds=rounds, kind="engine", block=block)
            for network, (batch, block, rounds) in ENGINE_CPU.items()
        ],
        "engine-compiled": [Case("engine-compiled", compiled, batch, ENGINE_COMPILED, rounds=15, kind="engine")],
        "anchor": [Case("anchor", ANCHOR_NETWORK, 32, ANCHOR_CPU, rounds=15, kind="anchor", block=8)],
        "start-compiled": [_start("start-compiled", "small CNN", 128, "fp32")],
        "precision": [
            Case("precision", network, 0, (), rounds=1, processes=1, kind="precision") for network in PRECISION_NETWORKS
        ],
    }


def _gpu_sections() -> dict[str, list[Case]]:
    """An anchor's block is an epoch of 50,000 images, whose augmentation is made at once."""
    found = {_engine_section(precision): _engine_cases(precision) for precision in ENGINE_PRECISIONS}
    for precision in ENGINE_PRECISIONS:
        found[f"{_engine_section(precision)}-compiled"] = _engine_cases(precision, compiled=True)
    for section, comparisons in (("anchor", ANCHOR_GPU), ("anchor-compiled", ANCHOR_GPU_COMPILED)):
        how = {"rounds": 15, "processes": 1, "kind": "anchor", "block": EPOCH // 1024, "precision": "fp16"}
        found[section] = [Case(section, ANCHOR_NETWORK, 1024, comparisons, **how)]
    found["start-compiled"] = [_start("start-compiled", network, 128, "fp16") for network in START_GPU]
    return found


def _start(section: str, network: str, batch: int, precision: str) -> Case:
    """Its second process finds what the first one has compiled."""
    return Case(section, network, batch, (), rounds=1, processes=2, kind="start", precision=precision)


def _bookkeeping(section: str, network: str, comparisons: tuple[Comparison, ...]) -> Case:
    return Case(section, network, 0, comparisons, rounds=41, kind="bookkeeping")


def _engine_section(precision: str) -> str:
    return "engine" if precision == "fp32" else f"engine-{precision}"


def _engine_cases(precision: str, compiled: bool = False) -> list[Case]:
    section = _engine_section(precision) + ("-compiled" if compiled else "")
    settings = {"rounds": 15, "processes": 1, "kind": "engine", "precision": precision}
    return [
        Case(section, name, 128, engine_gpu_compiled(name) if compiled else engine_gpu(name, precision), **settings)
        for name in (COMPILED_GPU if compiled else ENGINE_GPU)
    ]


def cases(
    device: str, only: Sequence[str] | None = None, *, rounds: int | None = None, quick: bool = False
) -> list[Case]:
    """The cases of some sections.

    Args:
        device: "cpu" or "cuda".
        only: sections, or SECTION/NETWORK for one of its networks; all of them for None.
        rounds: in place of each case's own number.
        quick: one small network a section, two rounds, one process, nothing compiled: to see that it runs.

    Raises:
        InputError: an unknown section, network or device, or no rounds.
    """
    if device not in ("cpu", "cuda"):
        raise InputError(f"device = {device!r} is unknown: use cpu or cuda")
    known = sections(device)
    if rounds is not None and rounds < 2:
        raise InputError(f"rounds = {rounds}: an interval needs 2 or more")
    chosen = [case for name in only or known for case in _named(name, known)]
    if quick:
        first = {case.section: case for case in reversed(chosen) if not case.section.endswith("-compiled")}
        chosen = [_quick(case) for case in reversed(first.values())]
    return [replace(case, rounds=rounds or case.rounds) for case in chosen]


def _named(name: str, known: dict[str, list[Case]]) -> list[Case]:
    section, _, network = name.partition("/")
    if section not in known:
        raise InputError(f"section = {section!r} is unknown: use one of {', '.join(known)}")
    found = [case for case in known[section] if network in ("", case.network)]
    if not found:
        networks = ", ".join(case.network for case in known[section])
        raise InputError(f"network = {network!r} is not in the section {section}: use one of {networks}")
    return found


def _quick(case: Case) -> Case:
    comparisons = case.comparisons if case.section in ("mlp", "engine") else case.comparisons[:1]
    return replace(case, batch=min(case.batch, 8), comparisons=comparisons, rounds=2, processes=1, threads=1)
