"""How long runs take on this machine, and what of a study fits into a limited time.

A cost model counts passes and images; what was measured here (finished records, then a probe) says by which factor the
model is off. Where nothing was measured the model stands alone, and an estimate says so. Nothing here needs torch.
"""

import math
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from samlib import experiments
from samlib import spec as specs_of
from samlib.errors import InputError
from samlib.experiments import Arm
from samlib.spec import CheckSpec, ConnectSpec, MeasureSpec, RunSpec, Spec
from samlib.store import Record, RecordError, Store

# ---------------------------------------------------------------------------------------------- the cost model

TRAIN_IMAGES = {"digits": 1000, "cifar10": 50_000, "cifar100": 50_000}
TEST_IMAGES = {"digits": 797, "cifar10": 10_000, "cifar100": 10_000}
# Millions of multiply-adds of one image forward; the two small networks count for what they take in time, several times
# that, since no processor is at its best with them.
MEGAMACS = {
    "cnn": 0.2,
    "mlp": 0.01,
    "resnet20": 41,
    "resnet32": 69,
    "mobilenet_v2": 91,
    "wrn40_2": 328,
    "resnet18": 555,
    "resnet50": 1298,
    "wrn28_10": 5243,
}
IMAGENET_STEM = 1 / 15  # of the multiply-adds that the stem for CIFAR leads to
FORWARD = 0.5  # of the time of a forward and a backward pass
PRODUCTS = 12  # of the Hessian with a vector, for its largest eigenvalue; each costs two passes
LOADING_SECONDS = 0.01  # of images and a model that are measured
CHECK_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Machine:
    """Seconds of a pass before it has seen an image, and multiply-adds per second."""

    latency: float
    speed: float


ONE_CORE, ONE_GPU = Machine(0.7e-3, 19e9), Machine(3e-3, 40e12)


def modelled(spec: Spec, run: RunSpec | None = None, machine: Machine = ONE_CORE) -> float:
    """Seconds that a spec takes by counting.

    Args:
        run: the training run that a measure or a path belongs to.
    """
    run = run or RunSpec()
    match spec:
        case RunSpec():
            return training(spec, machine) + evaluations(spec, machine)
        case MeasureSpec():
            return LOADING_SECONDS + _seconds(*_measured(spec, run), run, machine)
        case ConnectSpec():
            return _seconds(*_connected(spec, run), run, machine)
        case CheckSpec():
            return CHECK_SECONDS


def training(run: RunSpec, machine: Machine) -> float:
    """Seconds of the steps of a training, as modelled."""
    batch, ascending = run.train.batch_size, _ascending(run)
    passes = 1 - ascending + 2 * ascending * specs_of.num_shards(run) if ascending else 1
    return steps(run) * _seconds(passes, batch * (1 + ascending), run, machine)


def evaluations(run: RunSpec, machine: Machine) -> float:
    """Seconds of the evaluations of a training, as modelled."""
    epochs, every = steps(run) / steps_per_epoch(run), run.train.eval_every
    count = math.ceil(epochs / every)
    count_train = math.ceil(epochs / math.lcm(every, run.train.eval_train_every or 1))
    images = count * (TEST_IMAGES[run.data.name] + run.data.validation_size) + count_train * train_images(run)
    return _seconds(3 * count, FORWARD * images, run, machine)


def steps(run: RunSpec) -> int:
    """Of a whole training."""
    return run.train.updates or run.train.epochs * steps_per_epoch(run)


def steps_per_epoch(run: RunSpec) -> int:
    images, batch = train_images(run), run.train.batch_size
    return max(1, images // batch if run.train.drop_last else math.ceil(images / batch))


def train_images(run: RunSpec) -> int:
    return run.data.train_size or TRAIN_IMAGES[run.data.name] - run.data.validation_size


def _ascending(run: RunSpec) -> float:
    """The share of the steps that have an ascent."""
    return 0.0 if run.optim.method in ("sgd", "average_sam") else run.optim.ascent_until - run.optim.ascent_from


def _measured(spec: MeasureSpec, run: RunSpec) -> tuple[float, float]:
    """Passes, and images that are passed forward and backward."""
    images = spec.images or (train_images(run) if spec.split == "train" else TEST_IMAGES[run.data.name])
    times = {
        "lambda_max": 2.0 * PRODUCTS,
        "adversarial_sharpness": 2.0 + spec.steps,
        "asymmetry_factor": FORWARD * spec.directions * 17,  # two sides at eight distances, and the middle
        "first_layer_kurtosis": 0.0,
    }[spec.measure]
    return times * math.ceil(images / (spec.shard_size or 1000)), times * images


def _connected(spec: ConnectSpec, run: RunSpec) -> tuple[float, float]:
    trained = spec.path.steps if spec.path.shape == "bend" else 0
    points = spec.path.grid**2 if spec.path.grid else spec.path.points
    images = train_images(run) + TEST_IMAGES[run.data.name]
    return trained + 2 * FORWARD * points, trained * spec.path.batch_size + FORWARD * points * images


def _seconds(passes: float, images: float, run: RunSpec, machine: Machine) -> float:
    macs = 1e6 * MEGAMACS[run.model.name] * (IMAGENET_STEM if run.model.stem == "imagenet" else 1)
    return passes * machine.latency + 3 * images * macs / machine.speed


# ---------------------------------------------------------------------------------------------- what was measured

SAME_SETTING, SAME_PROBE, SAME_NETWORK, MODEL = "records", "a probe", "records of the network", "the cost model"


@dataclass(frozen=True, slots=True)
class Estimate:
    """How long a run takes, and what that is known from."""

    seconds: float
    source: str


class Speed:
    """How fast one device is, as far as it is known.

    Each finished record says by which factor the model is off, for its setting (network, data, method, shards,
    precision, batch size; or what is measured of which network) and, more roughly, for its network; a probe says so
    for a setting. The factors of a setting come before those of a probe, and these before those of a network.

    Args:
        device: as records name it; those of another device do not count.
        machine: what the model assumes.
    """

    def __init__(self, device: str | None = None, machine: Machine = ONE_CORE) -> None:
        self.device, self.machine = device, machine
        self.runs: dict[str, RunSpec] = {}
        self.factors: dict[tuple[str, str], list[float]] = defaultdict(list)

    def know(self, specs: Iterable[Spec]) -> None:
        """Training runs that measures and paths may belong to."""
        self.runs |= {specs_of.key(spec): spec for spec in specs if isinstance(spec, RunSpec)}

    def learn(self, record: Record) -> None:
        """Takes in a record, if it is of this device and ended well."""
        if record.status != "done" or record.stale or record.environment.get("device") != self.device:
            return
        spec = specs_of.from_canonical(record.spec)
        self.know([spec])
        run = self.run_of(spec)
        factor = record.wall_seconds / modelled(spec, run, self.machine)
        self.factors[SAME_SETTING, setting(spec, run)].append(factor)
        if isinstance(spec, RunSpec):
            self.factors[SAME_NETWORK, network(spec)].append(factor)

    def learn_probe(self, probe: Mapping[str, Any]) -> None:
        """Takes in one entry of `Store.probes`, if it is of this device."""
        if probe["device"] == self.device:
            spec = specs_of.from_canonical(probe["spec"])
            seconds = steps(spec) * spec.train.batch_size / probe["images_per_second"]
            self.factors[SAME_PROBE, setting(spec)].append(seconds / training(spec, self.machine))

    def learn_stores(self, stores: Sequence[Store]) -> None:
        """Takes in what these stores hold, runs before what was measured of them."""
        for store in stores:
            for probe in store.probes():
                self.learn_probe(probe)
        for record in sorted(readable(stores), key=lambda record: record.spec["kind"] != "train"):
            self.learn(record)

    def run_of(self, spec: Spec) -> RunSpec | None:
        """The training run that a measure or a path belongs to."""
        return next((self.runs[key] for key in specs_of.parents(spec) if key in self.runs), None)

    def estimate(self, spec: Spec) -> Estimate:
        run = self.run_of(spec)
        trained = spec if isinstance(spec, RunSpec) else run
        names = [(SAME_SETTING, setting(spec, run)), (SAME_PROBE, setting(spec, run))]
        names += [(SAME_NETWORK, network(trained))] if trained else []
        name = next((name for name in names if self.factors.get(name)), None)
        factor = statistics.median(self.factors[name]) if name else 1.0
        return Estimate(factor * modelled(spec, run, self.machine), name[0] if name else MODEL)


def readable(stores: Sequence[Store]) -> list[Record]:
    """The records of these stores but for those that cannot be used."""
    found = []
    for store in stores:
        for key in store.recorded():
            with suppress(RecordError):
                found.append(store.load(key))
    return found


def elsewhere(stores: Sequence[Store]) -> Speed:
    """How fast the GPU is on which these stores were last added to, for a plan on a machine without one."""
    made = [(record.finished, record.environment.get("device")) for record in readable(stores)]
    made += [(probe["finished"], probe["device"]) for store in stores for probe in store.probes()]
    found = Speed(max(made, default=("", None))[1], ONE_GPU)
    found.learn_stores(stores)
    return found


# Fields that leave the speed of a step as it is, and the shards, which are counted.
SAME_SPEED = {
    *("seed", "split_seed", "data.train_size", "data.validation_size", "data.label_noise", "data.scaling"),
    *("optim.num_shards", "optim.shard_size", "optim.ascent_from", "optim.ascent_until", "optim.rho", "optim.eta"),
    *("optim.lr", "optim.momentum", "optim.weight_decay", "optim.schedule", "optim.warmup", "optim.clip_norm"),
    *("train.epochs", "train.updates", "train.drop_last", "train.eval_every", "train.eval_train_every"),
    *("train.label_smoothing", "train.smoothing_convention", "train.loss_scale"),
}


def setting(spec: Spec, run: RunSpec | None = None) -> str:
    """What two specs share that run at one speed."""
    match spec:
        case RunSpec():
            how = {name: value for name, value in specs_of.flat(spec).items() if name not in SAME_SPEED}
            return f"{how} {specs_of.num_shards(spec)}"
        case MeasureSpec():
            return f"{network(run)} {replace(spec, parent='0' * 16)}"
        case ConnectSpec():
            return f"{network(run)} {spec.path}"
        case CheckSpec():
            return spec.check


def network(run: RunSpec | None) -> str:
    return f"{run.data.name} {run.model}" if run else "?"


# ---------------------------------------------------------------------------------------------- the plan


DURATION = re.compile(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")


def duration(text: str) -> float:
    """Seconds of a time limit such as 9m, 90s or 1h30m.

    Raises:
        InputError: the text is none.
    """
    match = DURATION.fullmatch(text)
    hours, minutes, seconds = (int(part or 0) for part in match.groups()) if match else (0, 0, 0)
    found = 3600 * hours + 60 * minutes + seconds
    if not found:
        raise InputError(f"time-limit = {text!r}: use hours, minutes and seconds as in 9m, 90s or 1h30m")
    return float(found)


@dataclass(slots=True)
class Row:
    """What is pending of one arm: runs and measures, how many of them fit into the time, how many seconds they take,
    and after how many the last of them ends."""

    stem: str
    arm: Arm
    runs: int = 0
    fit: int = 0
    seconds: float = 0.0
    ends: float = 0.0
    sources: tuple[str, ...] = ()

    def claims(self, profile: str) -> list[str]:
        """The claims that the cell of the arm decides; none if settings are chosen on it."""
        bound = {} if self.arm.tuning else experiments.load(self.stem).DECIDES
        return [claim for claim, cells in bound.items() if self.arm.cell in cells.get(profile, ())]


def plan(
    arms: Sequence[tuple[str, Arm]], todo: Sequence[Spec], speed: Speed, trained: Iterable[str], limit: float = math.inf
) -> list[Row]:
    """One row per arm with something to do, in the order in which their last runs end.

    Args:
        arms: experiment and arm.
        todo: what is pending, each spec after the runs it needs.
        trained: keys of runs whose weights are there; what is measured of others trains them again first.
        limit: seconds there are.
    """
    owner = _owners(arms)
    rows: dict[int, Row] = {}
    now, left, trained = 0.0, limit, set(trained)
    for spec in todo:
        index, key, own = owner[specs_of.key(spec)], specs_of.key(spec), speed.estimate(spec)
        again = [parent for parent in specs_of.parents(spec) if parent not in trained]
        seconds = own.seconds + sum(speed.estimate(speed.runs[parent]).seconds for parent in again)
        trained.update((key, *again))
        row = rows.setdefault(index, Row(*arms[index]))
        now += seconds
        row.runs, row.seconds, row.ends = row.runs + 1, row.seconds + seconds, now
        row.sources = tuple(dict.fromkeys((*row.sources, own.source)))
        if seconds <= left:
            row.fit, left = row.fit + 1, left - seconds
        elif isinstance(spec, RunSpec):
            left = 0.0  # begun, and gone on with in the next call
    return sorted(rows.values(), key=lambda row: row.ends)


def _owners(arms: Sequence[tuple[str, Arm]]) -> dict[str, int]:
    """Key -> the first arm that has it as a member or a measure, else the first that needs it."""
    found: dict[str, int] = {}
    for index, (_, arm) in enumerate(arms):
        for member in arm.specs:
            for spec in (member, *arm.measures_of(member)):
                found.setdefault(specs_of.key(spec), index)
    for index, (_, arm) in enumerate(arms):
        for run in arm.parents:
            found.setdefault(specs_of.key(run), index)
    return found


def report(rows: Sequence[Row], profile: str, limit: float = math.inf) -> str:
    """The plan as text: for each arm what is pending and what of it fits into the time, the minutes it takes and what
    they are known from, the minutes until it is complete, and the claims it decides."""
    lines = []
    for row in rows:
        fits = "" if limit == math.inf else f", {row.fit} of them in the time"
        lines.append(
            f"{row.stem} / {row.arm.cell} / {row.arm.role} (priority {row.arm.priority}): {row.runs} runs{fits}"
        )
        lines.append(
            f"  {row.seconds / 60:.2f} min by {' and '.join(row.sources)}, complete after {row.ends / 60:.2f} min"
        )
        lines.append(f"  decides {', '.join(row.claims(profile)) or 'nothing'}")
    total = f"{sum(row.runs for row in rows)} runs pending, {sum(row.seconds for row in rows) / 60:.2f} min in all"
    fit = sum(row.fit for row in rows)
    lines.append(total if limit == math.inf else f"{total}; {fit} of them fit into {limit / 60:.2f} min")
    return "\n".join(lines)
