"""`run(spec) -> Record`: the only training loop of the study, and the one step that needs a device."""

import dataclasses
import math
import os
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from samlib import batchnorm, checks, data, models, optim, provenance
from samlib import spec as specs_of
from samlib.arithmetic import arithmetic
from samlib.augment import Augmentation
from samlib.closures import Closures, Mixed, StreamedClosures, can_stream, compiled, in_layout
from samlib.errors import InputError
from samlib.graph import GraphedStep, Streams, assign, make_static, streams
from samlib.half import is_half
from samlib.measures import WeightLoss, asymmetry, connectivity, hessian, precision, sharpness, tails
from samlib.spec import CheckSpec, ConnectSpec, MeasureSpec, OptimSpec, RunSpec, Spec
from samlib.store import NUMERICS, Record, Store, parent_run, parent_spec

Measured = tuple[dict[str, float], dict[str, list[float]]]  # values, and columns of equal length

CHECKPOINT_SECONDS = 60.0  # between two checkpoints of a run
MEASURE_BATCH = 1000  # images whose graph is held at a time; changes no number in eval mode
SPLITS = ("train", "validation", "test")
RESUMED = ("epoch", "step", "seconds", "history", "epoch_order", "losses", "skipped")
CHECKPOINT = {*RESUMED, "numerics", "graph", "compiled", "model", "optimizer", "random", "cuda_random", "draws"}
ACTING = ("norm_ratio", "cosine", "unmoved_fraction")  # of the perturbation, at the precision of a run
STEPS_AHEAD = 100  # that the host may be ahead of a GPU, so that a clock on the host and a deadline mean something

# ---------------------------------------------------------------------------------------------- one run


def run(
    spec: Spec,
    store: Store,
    device: str | None = None,
    deadline: float = math.inf,
    report: Callable[["Training"], None] | None = None,
    graph: bool | None = None,
    compile: bool | None = None,
) -> Record | None:
    """Turns a spec into its record and saves it. A run that was cut goes on from its checkpoint.

    Args:
        spec: a training run, a measure of one or a path between two (their records must be in the store; their weights
            are trained again if they are gone), or an exact check.
        store: where the record, the weights and the checkpoint go.
        device: 'cpu', 'cuda', or None for a GPU where there is one. Checks always run on the CPU.
        deadline: the value of `time.monotonic()` at which a training leaves a checkpoint behind and stops. Measures,
            paths and checks, which cannot go on where they stopped, do not look at it.
        report: called with the training before each of its steps.
        graph: make the step of a training one CUDA graph, where it has one sequence of operations; on a CPU the same
            step eagerly. It differs from the plain one by rounding. None: as the environment variable SAMLIB_GRAPH
            says, and not without it until `tests/test_graph_cuda.py` and `tests/test_train_cuda.py` have passed on a
            GPU.
        compile: make the passes of a training in kernels of torch.compile, which takes a minute or so for the first run
            of a network. It differs from the plain ones by rounding, and leaves out runs at an emulated precision, with
            `replay_dropout` or `two_products`, and shards that a graph has on streams of their own. None: as the
            environment variable SAMLIB_COMPILE says.

    A run that was cut goes on in the way it was begun, whatever `graph` and `compile` say.

    Returns:
        The record; None for a training that the deadline cut.

    Raises:
        InputError: the spec asks for something this machine does not have.
    """
    chosen = choose_device(device)
    with arithmetic("fp32", chosen):  # but for the steps of a run of another precision
        match spec:
            case RunSpec():
                record = train(spec, store, chosen, deadline, report, graph, compile)
            case MeasureSpec():
                record = measure(spec, store, chosen)
            case ConnectSpec():
                record = connect(spec, store, chosen)
            case CheckSpec():
                record = check(spec)
    return None if record is None else finish(record, store)


def finish(record: Record, store: Store) -> Record:
    """Saves the record of a run; its checkpoint has had its day."""
    store.save(record)
    store.checkpoint_path(record.key).unlink(missing_ok=True)
    return record


def train(
    spec: RunSpec,
    store: Store,
    device: torch.device,
    deadline: float = math.inf,
    report: Callable[["Training"], None] | None = None,
    graph: bool | None = None,
    compile: bool | None = None,
) -> Record | None:
    """Trains a model, keeps its weights, and returns its record; None where the deadline came first."""
    with torch.random.fork_rng():  # dropout draws from the global generator
        steps = turns(spec, store, device, deadline, report, graph, compile)
        while True:
            try:
                next(steps)
            except StopIteration as end:
                return end.value


def turns(
    spec: RunSpec,
    store: Store,
    device: torch.device,
    deadline: float = math.inf,
    report: Callable[["Training"], None] | None = None,
    graph: bool | None = None,
    compile: bool | None = None,
    side_by_side: int = 1,
    slot: int = 0,
) -> Generator[None, None, Record | None]:
    """`train`, a step in each turn, so that trainings can go on side by side; returns at its end what `train` does.
    torch's global generators have to be this training's own in each turn.

    Args:
        side_by_side: how many trainings there may be at a time; the record says so.
        slot: of streams, no other training's at the same time; 0 is that of a training alone.
    """
    checkpoint = store.checkpoint_path(specs_of.key(spec))
    state = read_checkpoint(checkpoint)
    if state is not None:  # the optimiser's state is one with the way its steps are made
        graph, compile = state["graph"], state["compiled"]
    training = Training.start(spec, device, graph, compile, side_by_side, slot)
    if state is not None and (training.graph, training.compiled) == (graph, compile):
        training.restore(state)
    elif state is not None:
        set_aside(checkpoint, "its steps were made in a way that is impossible here")
    yield from training.turns(partial(training.save, checkpoint), deadline, report)
    if training.status == "running":
        return None
    if training.status == "done":
        save_tensors(store.weights_path(specs_of.key(spec)), training.model.state_dict())
    return training.record()


def measure(spec: MeasureSpec, store: Store, device: torch.device) -> Record:
    """One measure of one trained model."""
    parent = parent_spec(store, spec)
    splits = load_splits(parent, device)
    state = trained_weights(parent, store, device)
    started = time.perf_counter()
    if state is None:  # its training diverged
        return _record(spec, "diverged", started, data_digest=splits.digest, device=device)
    model, made = with_weights(parent, state, splits, device), made_of(state)
    inputs, labels = (tensor[: spec.images] for tensor in _tensors(getattr(splits, spec.split)))
    batch_size = MEASURE_BATCH if spec.mode == "eval" else None  # in train mode the batch is part of the loss
    loss = WeightLoss(model, inputs, labels, batch_size=batch_size, train_mode=spec.mode == "train")
    values, table = MEASURES[spec.measure](loss, spec)
    status = "done" if all(math.isfinite(value) for value in values.values()) else "diverged"
    content = {"measures": values, "table": table, "data_digest": splits.digest}
    return _record(spec, status, started, **content, device=device, made=made)


def lambda_max(loss: WeightLoss, spec: MeasureSpec) -> Measured:
    return hessian.lambda_max(loss), {}


def adversarial_sharpness(loss: WeightLoss, spec: MeasureSpec) -> Measured:
    found = sharpness.adversarial(loss, spec.rho, steps=spec.steps, shard_size=spec.shard_size)
    return {"adversarial_sharpness": found.pop("sharpness"), **found}, {}


def first_layer_kurtosis(loss: WeightLoss, spec: MeasureSpec) -> Measured:
    """Of the weights alone: split, mode and radius do not matter."""
    weights = tails.first_layer(loss.weights())
    found = tails.weight_tails(weights)
    return {"first_layer_kurtosis": found.pop("kurtosis"), **found}, tails.weight_histogram(weights)


def asymmetry_factor(loss: WeightLoss, spec: MeasureSpec) -> Measured:
    """The factor at mu, and the two changes of the loss along the first direction at 2/5 of it (boca2023, Figure 6)."""
    mus = [spec.mu * multiple for multiple in asymmetry.MULTIPLES]
    how = {"directions": spec.directions, "law": spec.direction_law, "scale": spec.direction_scale}
    rows = asymmetry.asymmetry_factors(loss, mus, **how)
    at = dict(zip(asymmetry.MULTIPLES, rows, strict=True))
    values = {name: at[1.0][name] for name in ("asymmetry_factor", "no_minimum")}
    values |= {name: at[asymmetry.SLICE][name] for name in ("rise_plus", "rise_minus")}
    return values | {"weight_norm": asymmetry.norm(loss.weights()).item()}, columns(rows)


# Name of a measure -> its values, and the table behind them where it has one.
MEASURES: dict[str, Callable[[WeightLoss, MeasureSpec], Measured]] = {
    "lambda_max": lambda_max,
    "adversarial_sharpness": adversarial_sharpness,
    "asymmetry_factor": asymmetry_factor,
    "first_layer_kurtosis": first_layer_kurtosis,
}


def connect(spec: ConnectSpec, store: Store, device: torch.device) -> Record:
    """One path between two trained models: losses and errors along it, or losses on a grid of its plane."""
    runs = connected_runs(spec, store)
    splits = load_splits(runs[0], device)
    states = [trained_weights(run, store, device) for run in runs]
    started = time.perf_counter()
    if None in states:  # a training diverged
        return _record(spec, "diverged", started, data_digest=splits.digest, device=device)
    ends = [with_weights(run, state, splits, device) for run, state in zip(runs, states, strict=True)]
    model, nodes = ends[0], path_nodes(spec, runs[0], ends, splits, device)
    train, test = _tensors(splits.train), _tensors(splits.test)
    if spec.path.test_labels == "shifted":
        test = test[0], test[1].roll(1)  # test images lie in a random order
    taken = _plane_losses if spec.path.grid else _path_losses
    values, table = taken(spec, model, nodes, train, test)
    status = "done" if all(map(math.isfinite, values.values())) else "diverged"
    content = {"measures": values, "table": table, "data_digest": splits.digest}
    return _record(spec, status, started, **content, device=device, made=made_of(*states))


def connected_runs(spec: ConnectSpec, store: Store) -> list[RunSpec]:
    """The two runs a path joins.

    Raises:
        InputError: the store has no record of one, or they are of unlike networks or trained on unlike images.
    """
    runs = [parent_run(store, key, f"connect.{name}") for name, key in (("start", spec.start), ("end", spec.end))]
    images, networks = ([(run.data, specs_of.split_seed(run)) for run in runs], [run.model for run in runs])
    for what, (of_start, of_end) in (("images", images), ("networks", networks)):
        if of_start != of_end:
            raise InputError(f"connect.end = {spec.end} has other {what} than connect.start = {spec.start}: use one")
    return runs


def path_nodes(
    spec: ConnectSpec, run: RunSpec, ends: list[nn.Module], splits: data.Splits, device: torch.device
) -> list[connectivity.Weights]:
    """The nodes of a path; a bend is trained on the training images of the two runs."""
    start, end = map(connectivity.weights_of, ends)
    bend = None
    if spec.path.end == "random":  # as published: the second model is where the bend begins, not the end (E-B5)
        untrained = build_model(run, splits, device, data.generator(spec.seed, "untrained end"))
        bend, end = end, connectivity.weights_of(untrained)
    if spec.path.shape == "line":
        return [start, end]
    path = spec.path
    bend = connectivity.train_bend(
        ends[0],
        start,
        end,
        endless_batches(splits.train, path.batch_size, data.generator(spec.seed, "path order")),
        steps=path.steps,
        lr=path.lr,
        momentum=path.momentum,
        weight_decay=path.weight_decay,
        bend=bend,
        rng=data.generator(spec.seed, "path t"),
    )
    return [start, bend, end]


def endless_batches(split: data.Split, batch_size: int, rng: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Mini-batches of one epoch after another; of all images where there are fewer than a batch has."""
    size = min(batch_size, len(split))
    while True:
        for indices in data.batches(len(split), size, True, rng):
            chosen = indices.to(split.labels.device)
            yield split.inputs[chosen], split.labels[chosen]


def _path_losses(
    spec: ConnectSpec,
    model: nn.Module,
    nodes: list[connectivity.Weights],
    train: connectivity.Labelled,
    test: connectivity.Labelled,
) -> Measured:
    last = spec.path.points - 1
    table = connectivity.along(model, nodes, [index / last for index in range(last + 1)], train, test)
    values = {
        f"{split}_{what}_barrier{unit}": connectivity.barrier(table[f"{split}_{what}{unit}"])
        for split in ("train", "test")
        for what, unit in (("loss", ""), ("error", "_pct"))
    }
    return values, table


def _plane_losses(
    spec: ConnectSpec,
    model: nn.Module,
    nodes: list[connectivity.Weights],
    train: connectivity.Labelled,
    test: connectivity.Labelled,
) -> Measured:
    if not all(torch.isfinite(w).all() for w in nodes[1]):  # the bend diverged, and there is no plane
        return dict.fromkeys(spec.values, math.nan), {}
    plane = connectivity.plane(*nodes)
    values = {"end_x": plane.end[0], "bend_x": plane.bend[0], "bend_y": plane.bend[1]}
    return values, connectivity.on_grid(model, plane, spec.path.grid, train, test)


def check(spec: CheckSpec) -> Record:
    """One exact check, in float64 on the CPU."""
    started = time.perf_counter()
    values = checks.run(spec.check, dict(spec.settings), spec.seed)
    return _record(spec, "done", started, measures=values, device=torch.device("cpu"))


def trained_model(spec: RunSpec, store: Store, splits: data.Splits, device: torch.device) -> nn.Module | None:
    """The model a run ended with; None for a run that diverged."""
    state = trained_weights(spec, store, device)
    return None if state is None else with_weights(spec, state, splits, device)


def trained_weights(spec: RunSpec, store: Store, device: torch.device) -> dict[str, Tensor] | None:
    """The weights a run ended with, in half precision where only these are there; trained again where all are gone (its
    record stays as it is). None for a run that diverged."""
    record = store.load(specs_of.key(spec))
    diverged = record is not None and record.usable and record.status == "diverged"
    while path := store.trained_path(specs_of.key(spec)):  # one that cannot be read is set aside
        if (state := load_tensors(path)) is not None:
            return state
    if diverged or train(spec, store, device).status != "done":
        return None
    store.checkpoint_path(specs_of.key(spec)).unlink(missing_ok=True)
    return load_tensors(store.weights_path(specs_of.key(spec)))


def with_weights(spec: RunSpec, state: dict[str, Tensor], splits: data.Splits, device: torch.device) -> nn.Module:
    """The network of a run with these weights, in float32."""
    model = build_model(spec, splits, device)
    model.load_state_dict(state)
    return model


def made_of(*states: dict[str, Tensor]) -> dict[str, str]:
    """What the record of a measure or a path says of the weights it was made of."""
    return {"weights": "half"} if is_half(states) else {}


# ---------------------------------------------------------------------------------------------- the training loop


@dataclass
class Training:
    """Everything that changes while a model trains; saved and resumed as a whole."""

    spec: RunSpec
    device: torch.device
    splits: data.Splits
    model: nn.Module
    optimizer: torch.optim.Optimizer
    order: torch.Generator
    epoch_order: Tensor  # the state of `order` from which the batches of this epoch were drawn
    augmentation: Augmentation
    draws: torch.Generator  # of the augmentation, on the device
    forward: Callable[[Tensor], Tensor]  # the model, or the same compiled
    graph: bool = False
    compiled: bool = False
    side_by_side: int = 1
    slot: int = 0  # of the streams of a graph
    graphed: GraphedStep | None = None
    epoch: int = 0
    step: int = 0
    seconds: float = 0.0
    status: str = "running"
    history: list[dict[str, float]] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)  # of the steps of this epoch
    skipped: int = 0  # steps before this epoch that were skipped for a gradient that was not finite

    @classmethod
    def start(
        cls,
        spec: RunSpec,
        device: torch.device,
        graph: bool | None = None,
        compile: bool | None = None,
        side_by_side: int = 1,
        slot: int = 0,
    ) -> "Training":
        """A training that has made no step; arguments as for `run` and `turns`."""
        graph = os.environ.get("SAMLIB_GRAPH") == "1" if graph is None else graph
        compile = os.environ.get("SAMLIB_COMPILE") == "1" if compile is None else compile
        graph = graph and can_be_graph(spec, side_by_side)
        streamed = graph and can_stream(spec, spec.train.batch_size)
        compile = compile and can_compile(spec, device) and not streamed
        splits = load_splits(spec, device)
        model = build_model(spec, splits, device)
        torch.manual_seed(data.generator(spec.seed, "dropout").initial_seed())
        optimizer = build_optimizer(spec, model, graph)
        if graph:
            make_static(optimizer)
        order = data.generator(spec.seed, "order")
        draws = torch.Generator(device).manual_seed(data.generator(spec.seed, "augmentation").initial_seed())
        augmentation = Augmentation(**dataclasses.asdict(spec.augment))
        forward = compiled(model, spec) if compile else model
        drawn = order, order.get_state(), augmentation, draws
        training = cls(spec, device, splits, model, optimizer, *drawn, forward, graph, compile, side_by_side, slot)
        if training.steps_per_epoch == 0:
            raise InputError(
                f"train.batch_size = {spec.train.batch_size} is larger than the {len(splits.train)} training images: "
                "use fewer, or train.drop_last = False"
            )
        if training.steps > spec.train.epochs * training.steps_per_epoch:
            raise InputError(
                f"train.updates = {spec.train.updates} is more than train.epochs = {spec.train.epochs} make, "
                f"{spec.train.epochs * training.steps_per_epoch}: raise the epochs"
            )
        return training

    @property
    def steps_per_epoch(self) -> int:
        size, batch = len(self.splits.train), self.spec.train.batch_size
        return size // batch if self.spec.train.drop_last else math.ceil(size / batch)

    @property
    def steps(self) -> int:
        """Of the whole training."""
        return self.spec.train.updates or self.spec.train.epochs * self.steps_per_epoch

    @property
    def steps_of_epoch(self) -> int:
        """Made in this epoch so far."""
        return self.step - self.epoch * self.steps_per_epoch

    def go_on(
        self,
        save: Callable[[], None],
        deadline: float = math.inf,
        report: Callable[["Training"], None] | None = None,
    ) -> None:
        """Trains to the end or the deadline."""
        for _ in self.turns(save, deadline, report):
            pass

    def turns(
        self,
        save: Callable[[], None],
        deadline: float = math.inf,
        report: Callable[["Training"], None] | None = None,
    ) -> Iterator[None]:
        """Trains to the end or the deadline, a step in each turn, calling `save` about once a minute and at the
        deadline, and `report` before each step. Only turns count in `seconds`."""
        saved = began = time.monotonic()
        for indices in self.batches_left():
            now = time.monotonic()
            if now > min(deadline, saved + CHECKPOINT_SECONDS):
                self.wait()
                self.seconds += time.monotonic() - began
                save()
                saved = began = time.monotonic()
                if now > deadline:
                    return
            if report is not None:
                report(self)
            self.take(indices)
            if self.step % STEPS_AHEAD == 0:
                self.wait()
            self.seconds += time.monotonic() - began
            yield
            began = time.monotonic()

    def wait(self) -> None:
        """Until a GPU has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def batches_left(self) -> Iterator[Tensor]:
        """The indices of every mini-batch from this step on, for as long as the training runs."""
        train, settings = self.splits.train, self.spec.train
        while self.status == "running":
            self.model.train()
            self.order.set_state(self.epoch_order)
            whole = data.batches(len(train), settings.batch_size, settings.drop_last, self.order, self.device)
            yield from islice(whole, self.steps_of_epoch, self.steps - self.epoch * self.steps_per_epoch)

    def take(self, chosen: Tensor) -> None:
        """A step on these images, and what follows the last one of an epoch."""
        settings = self.spec.optim
        ascent = ascends(settings, self.step, self.steps)
        lr = learning_rate(settings, self.step, self.steps)
        # with rho 0 a SAM makes the step of its base optimiser, on the same momentum
        assign(self.optimizer, lr=lr, rho=settings.rho if ascent else 0.0)
        if self.graph and len(chosen) == self.spec.train.batch_size:
            loss = self.as_graph(chosen)(chosen)
        else:
            loss = self.one_step(chosen, ascent)
        self.losses.append(loss)
        self.step += 1
        if self.steps_of_epoch == self.steps_per_epoch or self.step == self.steps:
            self.end_epoch()

    def end_epoch(self) -> None:
        """After the last step of an epoch, or of a training that ends within one."""
        self.epoch += 1
        self.epoch_order = self.order.get_state()
        running_loss, made = torch.stack(self.losses).mean().item(), len(self.losses)
        skipped = getattr(self.optimizer, "skipped_steps", 0)
        if skipped - self.skipped == made:  # nothing moves any more
            running_loss = math.nan
        self.losses, self.skipped = [], skipped
        self.log(running_loss)

    def as_graph(self, chosen: Tensor) -> GraphedStep:
        """The step of this training as a graph, made once."""
        if self.graphed is None:
            drawn = [self.draws] if self.augmentation.active else []
            step = partial(self.one_step, ascent=self.spec.optim.method != "sgd")
            stream = self.streams.capture if self.streams else None
            self.graphed = GraphedStep(step, self.optimizer, [chosen], generators=drawn, stream=stream)
        return self.graphed

    @property
    def streams(self) -> Streams | None:
        """None on a CPU."""
        return streams(self.device, self.slot) if self.device.type == "cuda" else None

    def augmented(self, chosen: Tensor, labels: Tensor) -> tuple[Tensor, Mixed | None]:
        """These training images, augmented, and what of others is mixed into them."""
        pixels = self.splits.pixels
        images = pixels.images[chosen]
        drawn = self.augmentation.draw(len(images), tuple(images.shape[2:]), self.draws)
        inputs = self.augmentation.apply(images, drawn, pixels.mean, pixels.sd)
        return inputs, None if drawn.partner is None else Mixed(labels[drawn.partner], drawn.share)

    def one_step(self, chosen: Tensor, ascent: bool) -> Tensor:
        """One step of any method on these training images, and the loss that is logged."""
        labels, mixed = self.splits.train.labels[chosen], None
        if self.augmentation.active:
            inputs, mixed = self.augmented(chosen, labels)
        else:
            inputs = self.splits.train.inputs[chosen]
        return self.step_on(inputs, labels, mixed, ascent)

    def step_on(self, inputs: Tensor, labels: Tensor, mixed: Mixed | None = None, ascent: bool = True) -> Tensor:
        closures = self.closures(inputs, labels, mixed, whole=not ascent)
        if self.graph and ascent and can_stream(self.spec, len(labels)):
            loss = self.optimizer.step(StreamedClosures(closures, self.streams.shards if self.streams else ()))
        elif isinstance(self.optimizer, optim.SAM):
            loss = self.optimizer.step(
                closures.one_by_one, weights=closures.weights, replay_rng=self.spec.train.replay_dropout
            )
        else:
            loss = self.optimizer.step(closures.one_by_one[0])
        return closures.perturbed_loss() if self.spec.train.logged_loss == "w+eps" else loss.detach()

    def log(self, running_loss: float) -> None:
        """Evaluates where an evaluation is due, and ends a training that is over or has diverged."""
        last = self.step == self.steps
        if not math.isfinite(running_loss):
            self.status = "diverged"
        elif last:
            self.status = "done"
        if self.status == "running" and self.epoch % self.spec.train.eval_every:
            return
        row = {"epoch": self.epoch, "step": self.step, "lr": float(self.optimizer.param_groups[0]["lr"])}
        row["running_loss"] = running_loss
        if self.spec.train.precision == "fp16":
            row["skipped_steps"] = self.skipped
        if self.spec.train.precision != "fp32" and self.spec.optim.method in ("sam", "asam"):
            acting = self.effective_perturbation() if self.status != "diverged" else {}
            row |= {f"perturbation_{name}": acting.get(name, math.nan) for name in ACTING}
        for name in SPLITS:
            evaluated = name != "train" or self.evaluates_train()
            row |= evaluate(self.model, getattr(self.splits, name), name) if evaluated else not_evaluated(name)
            if evaluated and name != "validation" and not math.isfinite(row[f"{name}_loss"]):
                self.status = "diverged"
        self.history.append(row)

    def evaluates_train(self) -> bool:
        """Whether the training images are looked at too, where an evaluation is made."""
        every = self.spec.train.eval_train_every
        return every is None or self.epoch % every == 0 or self.status != "running"

    def record(self) -> Record:
        images = self.step * self.spec.train.batch_size
        return _record(
            self.spec,
            self.status,
            time.perf_counter() - self.seconds,
            history=columns(self.history),
            final=selected(self.history),
            perturbation=self.effective_perturbation() if self.status == "done" else {},
            data_digest=self.splits.digest,
            images_per_second=images / self.seconds,
            device=self.device,
            made=self.execution(),
        )

    def execution(self) -> dict[str, bool | int]:
        """How the steps were made, where it was not the plain way."""
        made = {"graph": self.graph, "compiled": self.compiled}
        made["side_by_side"] = self.side_by_side if self.side_by_side > 1 else 0
        return {name: value for name, value in made.items() if value}

    def effective_perturbation(self) -> dict[str, float]:
        """How much of the perturbation here acts at the run's precision, on the first images in order (a mini-batch, or
        a shard of one where the ascent is taken per shard). Empty where the last step had no ascent."""
        ascent = ascends(self.spec.optim, self.step - 1, self.steps)
        if self.spec.optim.method not in ("sam", "asam") or not ascent:
            return {}
        self.model.train()
        size = self.spec.train.batch_size
        closures = self.closures(*(t[:size] for t in _tensors(self.splits.train)))
        with batchnorm.second_pass(self.model, "frozen"), torch.random.fork_rng():  # dropout draws as if nothing was
            closures.one_by_one[0]()
        weights = [p.detach() for group in self.optimizer.param_groups for p in group["params"]]
        if self.spec.optim.second_pass == "two_products":  # eps is rounded alone, as if it were added to nothing
            weights = [torch.zeros_like(w) for w in weights]
        found = precision.effective_perturbation(weights, self.optimizer.perturbation(), self.spec.train.precision)
        self.optimizer.zero_grad(set_to_none=not self.graph)
        return found

    def closures(self, *batch: Any, whole: bool = False) -> Closures:
        """The closures of a step on these images, labels and what is mixed in."""
        how = {"whole": whole, "in_place": self.graph, "forward": self.forward}
        return Closures(self.spec, self.model, self.optimizer, *batch, **how)

    def save(self, path: Path) -> None:
        save_tensors(
            path,
            {name: getattr(self, name) for name in RESUMED}
            | {
                "numerics": NUMERICS,
                "graph": self.graph,
                "compiled": self.compiled,
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "draws": self.draws.get_state(),
                "random": torch.get_rng_state(),
                "cuda_random": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            },
        )

    def restore(self, state: dict[str, Any]) -> None:
        """Goes back to a checkpoint of a training that was started in the same way; the run is then the same as one
        that was never cut."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.graph:
            make_static(self.optimizer)
        self.draws.set_state(state["draws"])
        torch.set_rng_state(state["random"])
        if state["cuda_random"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_random"], self.device)
        for name in RESUMED:
            setattr(self, name, state[name])
        self.losses = [loss.to(self.device) for loss in self.losses]  # a checkpoint is read on the CPU


def read_checkpoint(path: Path) -> dict[str, Any] | None:
    """What `Training.save` wrote; None if there is none. That of other code, which may not fit or may mix two sets of
    numbers, is set aside."""
    state = load_tensors(path)
    if state is not None and (state.get("numerics") != NUMERICS or set(state) != CHECKPOINT):
        set_aside(path, "it was written by another version of samlib")
        return None
    return state


# ---------------------------------------------------------------------------------------------- building blocks


def load_splits(spec: RunSpec, device: torch.device) -> data.Splits:
    augmented = Augmentation(**dataclasses.asdict(spec.augment)).active
    return data.load(spec.data, specs_of.split_seed(spec), device, augmented)


def build_model(
    spec: RunSpec, splits: data.Splits, device: torch.device, rng: torch.Generator | None = None
) -> nn.Module:
    """The untrained network of a run, from the weights its seed draws unless another generator is given."""
    image_shape = tuple(splits.train.inputs.shape[1:])
    rng = data.generator(spec.seed, "init") if rng is None else rng
    model = models.build(spec.model, image_shape, splits.num_classes, rng).to(device)
    return model.to(memory_format=torch.channels_last) if device.type == "cuda" else model


def build_optimizer(run: RunSpec, model: nn.Module, graph: bool = False) -> torch.optim.Optimizer:
    """The optimiser of a run, with its base optimiser, weight decay, clipping and filters; for a `graph` with a fused
    base and flat buffers."""
    spec = run.optim
    base = partial(
        ClippedSGD if spec.clip != "none" else torch.optim.SGD,
        lr=spec.lr,
        momentum=spec.momentum,
        nesterov=spec.nesterov,
        weight_decay=spec.weight_decay if spec.weight_decay_in == "update" else 0.0,
        **({"clip_norm": spec.clip_norm} if spec.clip != "none" else {}),
        **({"fused": True} if graph else {}),
    )
    parameters = list(model.parameters())
    perturb_filter = _with_axes if spec.perturbed == "weights" else None
    flat = {"flat": True} if graph else {}
    if spec.method == "sgd" and run.train.precision == "fp16":  # a gradient may overflow, and SAM skips such a step
        return optim.SAM(parameters, base, 0.0, **flat)
    if spec.method == "sgd":
        return base(parameters)
    if spec.method == "average_sam":
        return optim.AverageSAM(parameters, base, spec.rho, seed=run.seed, perturb_filter=perturb_filter, **flat)
    settings: dict[str, Any] = {"p": spec.p, "perturb_filter": perturb_filter, **flat}
    if spec.method == "sam":
        return optim.SAM(parameters, base, spec.rho, **settings)
    scale_filter = _with_axes if spec.scaled == "weights" else None
    return optim.ASAM(parameters, base, spec.rho, eta=spec.eta, scale_filter=scale_filter, **settings)


class ClippedSGD(torch.optim.SGD):
    """SGD that first scales the gradient it is given to norm `clip_norm` if it is longer (under SAM: the gradient at
    w + eps, averaged over shards)."""

    def __init__(self, params: Iterable[Tensor], clip_norm: float, **settings: Any) -> None:
        super().__init__(params, **settings)
        self.clip_norm = clip_norm

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        loss = None if closure is None else closure()
        nn.utils.clip_grad_norm_([p for group in self.param_groups for p in group["params"]], self.clip_norm)
        super().step()
        return loss


def can_be_graph(spec: RunSpec, side_by_side: int = 1) -> bool:
    """Whether a graph may keep the step of a run: it has one sequence of operations, and no dropout where other graphs
    run at the same time, which would draw from the same generator."""
    other_sequences = spec.optim.is_hybrid or spec.train.replay_dropout
    return not (other_sequences or (spec.model.dropout and side_by_side > 1))


def can_compile(spec: RunSpec, device: torch.device) -> bool:
    """Whether torch.compile may make the passes of a run: nothing in them is emulated, replayed or made in parts."""
    emulated = device.type == "cpu" and spec.train.precision != "fp32"
    return not (emulated or spec.train.replay_dropout or spec.optim.second_pass == "two_products")


def ascends(spec: OptimSpec, step: int, steps: int) -> bool:
    """Whether the ascent of the method acts in a step, counted from 0.

    It does from step round(ascent_from * steps) up to, and without, round(ascent_until * steps): two hybrids that
    switch at one share, in opposite directions, divide the steps between them.
    """
    return spec.method != "sgd" and round(spec.ascent_from * steps) <= step < round(spec.ascent_until * steps)


def learning_rate(spec: OptimSpec, step: int, steps: int) -> float:
    """The learning rate of a step: constant, or from lr down to 0 along half a cosine; `one_cycle` rises to lr first,
    in a straight line from 0."""
    if spec.schedule == "constant":
        return spec.lr
    first = spec.warmup * steps if spec.schedule == "one_cycle" else 0.0
    if step < first:
        return spec.lr * step / first
    return 0.5 * spec.lr * (1 + math.cos(math.pi * (step - first) / (steps - first)))


def choose_device(name: str | None) -> torch.device:
    """
    Raises:
        InputError: a GPU was asked for by name and there is none.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        raise InputError(f"device = {name!r} is unknown: use cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("device = 'cuda': PyTorch sees no GPU here. Use --device cpu, or a machine with a GPU")
    return torch.device(name)


@torch.no_grad()
def evaluate(model: nn.Module, split: data.Split, name: str, batch_size: int = 1024) -> dict[str, float]:
    """Mean cross entropy and accuracy in percent, in eval mode; NaN for an empty split."""
    if not len(split):
        return not_evaluated(name)
    model.eval()
    loss, correct = torch.zeros((), device=split.inputs.device), torch.zeros((), device=split.inputs.device)
    for inputs, labels in zip(split.inputs.split(batch_size), split.labels.split(batch_size), strict=True):
        logits = model(in_layout(inputs))
        loss += functional.cross_entropy(logits, labels, reduction="sum")
        correct += (logits.argmax(1) == labels).sum()
    size = len(split)
    return {f"{name}_loss": loss.item() / size, f"{name}_accuracy_pct": 100 * correct.item() / size}


def not_evaluated(name: str) -> dict[str, float]:
    return {f"{name}_loss": math.nan, f"{name}_accuracy_pct": math.nan}


def selected(history: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """The rows of the last, the best-test and the best-validation epoch (the first one, where several are equal)."""
    if not history:
        return {}
    rows = {"last": history[-1], "best_test": max(history, key=lambda row: row["test_accuracy_pct"])}
    if not math.isnan(history[-1]["validation_accuracy_pct"]):
        rows["best_validation"] = max(history, key=lambda row: row["validation_accuracy_pct"])
    return {name: dict(row) for name, row in rows.items()}


def columns(rows: list[dict[str, float]]) -> dict[str, list[float]]:
    return {name: [row[name] for row in rows] for name in rows[0]} if rows else {}


def save_tensors(path: Path, content: dict[str, Any]) -> None:
    """Written under a temporary name, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{time.monotonic_ns()}")
    torch.save(content, temporary)
    temporary.replace(path)


def load_tensors(path: Path) -> dict[str, Any] | None:
    """What `save_tensors` wrote, on the CPU; None if it is not there or cannot be read, which is said and set aside."""
    if not path.exists():
        return None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken pickle can raise anything
        set_aside(path, f"it cannot be read ({type(error).__name__})")
        return None


def set_aside(path: Path, reason: str) -> None:
    """Nothing is lost, and what it held is made again."""
    print(f"{path}: {reason}. Moved to {path.replace(path.with_suffix('.aside'))} and made again.", file=sys.stderr)


def _record(
    spec: Spec,
    status: str,
    started: float,
    *,
    device: torch.device,
    made: Mapping[str, Any] = MappingProxyType({}),
    **content: Any,
) -> Record:
    return Record(
        key=specs_of.key(spec),
        spec=specs_of.canonical(spec),
        status=status,
        environment=provenance.environment(device.type) | made,
        wall_seconds=time.perf_counter() - started,
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
        **content,
    )


def _tensors(split: data.Split) -> tuple[Tensor, Tensor]:
    return split.inputs, split.labels


def _with_axes(tensor: Tensor) -> bool:
    return tensor.ndim > 1
