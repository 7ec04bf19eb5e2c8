"""What a run is: frozen dataclasses that name everything that can change a number.

    spec -> canonical JSON, fields at their default left out -> SHA-256 -> key

Leaving defaults out means that a field added later keeps every older key; a golden test pins the defaults and three
keys, so that changing a default fails loudly. Standard library only: nothing here needs torch.
"""

import dataclasses
import difflib
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from samlib.errors import InputError

# ---------------------------------------------------------------------------------------------- fields


def _field(default: Any, doc: str, **checks: Any) -> Any:
    """A dataclass field that carries its own documentation and the values it accepts."""
    return dataclasses.field(default=default, metadata={"doc": doc, **checks})


def _choice(default: str, options: tuple[str, ...], doc: str) -> Any:
    return _field(default, doc, options=options)


def _number(default: float | None, doc: str, low: float = -math.inf, high: float = math.inf, above: float = -math.inf):
    return _field(default, doc, low=low, high=high, above=above)


def _count(default: int | None, doc: str, low: int = 1) -> Any:
    return _field(default, doc, low=low, high=math.inf, above=-math.inf, whole=True)


# ---------------------------------------------------------------------------------------------- checking values


def _checked(cls: type, field: dataclasses.Field, value: Any) -> Any:
    where = f"{cls.__name__.removesuffix('Spec').lower()}.{field.name}"
    if "options" in field.metadata:
        return _checked_choice(where, value, field.metadata["options"])
    if isinstance(field.default, bool):
        if not isinstance(value, bool):
            raise InputError(f"{where} = {value!r}: use True or False")
        return value
    if value is None and field.default is None:
        return None
    return _checked_number(where, value, field.metadata)


def _checked_choice(where: str, value: Any, options: tuple[str, ...]) -> str:
    if value not in options:
        raise InputError(f"{where} = {value!r} is unknown: use one of {', '.join(options)}")
    return value


def _checked_number(where: str, value: Any, limits: Mapping[str, Any]) -> float:
    whole = limits.get("whole", False)
    value = math.inf if value == "inf" and not whole else value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value) or (whole and value % 1):
        raise InputError(f"{where} = {value!r}: use a {'whole ' if whole else ''}number")
    if not (limits["low"] <= value <= limits["high"] and value > limits["above"]):
        raise InputError(f"{where} = {value!r} is out of range: use {_range(limits)}")
    if value == math.inf and not where.endswith(".p"):
        raise InputError(f"{where} = inf: use a finite number")
    return int(value) if whole else float(value)


def _range(limits: Mapping[str, Any]) -> str:
    if limits["above"] > -math.inf:
        return f"a number above {limits['above']:g}"
    if limits["high"] < math.inf:
        return f"a number from {limits['low']:g} to {limits['high']:g}"
    return f"{limits['low']:g} or more"


def _check_seed(seed: Any, name: str = "seed") -> None:
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**31:
        raise InputError(f"{name} = {seed!r}: use a whole number from 0 to {2**31 - 1}")


def _nearest(name: str, names: list[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1) or difflib.get_close_matches(
        name, [candidate.split(".")[-1] for candidate in names], n=1
    )
    return f": did you mean {close[0]!r}?" if close else f": use one of {', '.join(names)}"


# ---------------------------------------------------------------------------------------------- the parts of a run


class _Part:
    """Checks every field of a part when it is made, so that a wrong spec never reaches a device."""

    __slots__ = ()

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if "doc" in field.metadata:
                object.__setattr__(self, field.name, _checked(type(self), field, getattr(self, field.name)))


@dataclass(frozen=True, slots=True)
class DataSpec(_Part):
    name: str = _choice("digits", ("digits", "cifar10", "cifar100"), "data set")
    train_size: int | None = _count(None, "training images drawn per seed; None takes all that are left")
    validation_size: int = _count(0, "images per seed held out of the training images, always with clean labels", low=0)
    label_noise: float = _number(0.0, "exact share of training labels moved to a wrong class, uniformly", low=0, high=1)
    scaling: str = _choice(
        "standardize",
        ("standardize", "unit", "symmetric"),
        "inputs: channel mean 0 and sd 1 over the data set's training images, or pixels in [0, 1], or in [-1, 1]",
    )


@dataclass(frozen=True, slots=True)
class AugmentSpec(_Part):
    """Random changes of the training images, drawn for every image anew, in this order: AutoAugment, flip, crop,
    cutout (of the scaled image), mixup."""

    autoaugment: bool = _field(False, "AutoAugment, the policy for CIFAR-10")
    flip: bool = _field(False, "left-right flip with probability 1/2")
    crop: str = _choice(
        "none", ("none", "zero", "reflect"), "random crop after padding 4 pixels with zeros or mirrored"
    )
    cutout: int = _count(0, "side of the square that is set to 0 after scaling, in pixels; 0 is no cutout", low=0)
    mixup: float = _number(0.0, "alpha of the Beta law of mixup; 0 is no mixup", low=0)


CIFAR_MODELS = ("resnet18", "resnet50", "resnet20", "resnet32", "mobilenet_v2", "wrn28_10", "wrn40_2")
STEMMED = ("resnet18", "resnet50")


@dataclass(frozen=True, slots=True)
class ModelSpec(_Part):
    name: str = _choice(
        "cnn", ("cnn", "mlp", *CIFAR_MODELS), "network: three convolutions, two hidden layers, or one made for CIFAR"
    )
    width: int = _count(
        8, "channels of the first convolution (the next two have 2 and 4 times as many), or units of each hidden layer"
    )
    norm: str = _choice("batch", ("batch", "group", "none"), "normalisation after each convolution or hidden layer")
    dropout: float = _number(0.0, "dropout before the classifier", low=0, high=0.999)
    stem: str = _choice(
        "cifar",
        ("cifar", "imagenet"),
        "resnet18 and resnet50: a 3x3 convolution, or one of 7x7 with stride 2 and max-pooling",
    )
    num_outputs: int | None = _count(None, "outputs of the classifier; None: one per class", low=2)

    def __post_init__(self) -> None:
        _Part.__post_init__(self)
        if self.norm == "group" and self.width % 4:
            raise InputError(f"model.width = {self.width} does not split into 4 groups: use a multiple of 4")
        if self.stem != "cifar" and self.name not in STEMMED:
            raise InputError(
                f"model.stem = {self.stem!r} needs model.name {' or '.join(STEMMED)}, got {self.name!r}: use 'cifar'"
            )
        if self.name in CIFAR_MODELS:
            self._check_fixed()

    def _check_fixed(self) -> None:
        fields = {field.name: field.default for field in dataclasses.fields(self)}
        for name in ("width", "dropout"):
            if getattr(self, name) != fields[name]:
                raise InputError(
                    f"model.{name} = {getattr(self, name)} is fixed in model.name = {self.name!r}: "
                    f"leave it at {fields[name]}"
                )
        if self.norm == "group":
            raise InputError(f"model.norm = 'group' is not for model.name = {self.name!r}: use 'batch' or 'none'")


@dataclass(frozen=True, slots=True)
class OptimSpec(_Part):
    method: str = _choice("sgd", ("sgd", "sam", "asam", "average_sam"), "optimiser; shards make SAM into mSAM")
    rho: float = _number(0.05, "radius of the perturbation", low=0)
    p: float = _number(2.0, "norm of the ball; inf is written as the string 'inf'", above=1)
    eta: float = _number(0.01, "ASAM: added to |w| in the scale of a weight", low=0)
    perturbed: str = _choice("all", ("all", "weights"), "tensors that are perturbed: all, or those with 2 or more axes")
    scaled: str = _choice("all", ("all", "weights"), "ASAM: tensors scaled by |w|: all, or those with 2 or more axes")
    num_shards: int = _count(1, "shards per mini-batch, each with its own ascent (mSAM)")
    shard_size: int | None = _count(None, "examples per ascent; sets the number of shards instead of num_shards")
    shard_batchnorm: str = _choice(
        "shard", ("shard", "batch"), "batch-norm statistics of a shard's passes: its own, or the whole mini-batch's"
    )
    ascent_from: float = _number(
        0.0, "share of the training steps before which SGD steps alone, on the whole mini-batch", low=0, high=1
    )
    ascent_until: float = _number(1.0, "share of the training steps from which SGD steps alone again", low=0, high=1)
    second_pass_batchnorm: str = _choice(
        "frozen", ("frozen", "update", "eval"), "batch norm at w + eps: running statistics frozen, updated, or used"
    )
    second_pass: str = _choice(
        "rounded",
        ("rounded", "two_products"),
        "low precision, layers at w + eps: as one product with the sum, or as two, one with w and one with eps",
    )
    lr: float = _number(0.1, "peak learning rate", above=0)
    momentum: float = _number(0.9, "momentum of SGD", low=0, high=1)
    nesterov: bool = _field(False, "Nesterov momentum")
    weight_decay: float = _number(0.0005, "coefficient on w in the gradient (PyTorch's convention)", low=0)
    weight_decay_in: str = _choice(
        "update", ("update", "loss"), "weight decay in the final update only, or in the loss of both passes"
    )
    schedule: str = _choice(
        "cosine",
        ("cosine", "constant", "one_cycle"),
        "learning rate per step: cosine to 0, constant, or linearly from 0 to the peak over warmup, then cosine to 0",
    )
    warmup: float = _number(0.05, "one_cycle: share of the steps before the peak", low=0, high=0.999)
    clip: str = _choice("none", ("none", "descent", "both"), "which gradients are clipped to clip_norm")
    clip_norm: float = _number(5.0, "largest Euclidean norm of a clipped gradient", above=0)

    def __post_init__(self) -> None:
        _Part.__post_init__(self)
        if self.shard_size is not None and self.num_shards != 1:
            raise InputError(
                f"optim.shard_size = {self.shard_size} and optim.num_shards = {self.num_shards} are both set: keep one"
            )
        if self.scaled != "all" and self.method != "asam":
            raise InputError(
                f"optim.scaled = {self.scaled!r} needs optim.method = 'asam', got {self.method!r}: use 'all'"
            )
        if self.ascent_from >= self.ascent_until:
            raise InputError(
                f"optim.ascent_from = {self.ascent_from} is not below optim.ascent_until = {self.ascent_until}: "
                "use a smaller one, or method 'sgd' for no ascent at all"
            )
        if self.method == "sgd" and self.is_hybrid:
            raise InputError(
                f"optim.ascent_from = {self.ascent_from} and optim.ascent_until = {self.ascent_until} need a method "
                "with an ascent, got 'sgd': leave them at 0 and 1"
            )
        if self.nesterov and self.momentum == 0:
            raise InputError("optim.nesterov = True needs optim.momentum above 0, got 0.0")
        if self.warmup != 0.05 and self.schedule != "one_cycle":
            raise InputError(
                f"optim.warmup = {self.warmup} needs optim.schedule = 'one_cycle', got {self.schedule!r}: "
                "leave it at 0.05"
            )

    @property
    def is_hybrid(self) -> bool:
        """Whether the ascent acts in a part of the training only."""
        return (self.ascent_from, self.ascent_until) != (0.0, 1.0)


@dataclass(frozen=True, slots=True)
class TrainSpec(_Part):
    epochs: int = _count(40, "passes over the training images")
    updates: int | None = _count(
        None, "steps after which training ends, in the middle of an epoch if need be; schedules end there too"
    )
    batch_size: int = _count(128, "examples per step")
    drop_last: bool = _field(True, "leave out the last, smaller batch of an epoch")
    label_smoothing: float = _number(0.0, "label smoothing epsilon", low=0, high=0.999)
    smoothing_convention: str = _choice(
        "K", ("K", "K-1"), "smoothing spreads epsilon over all K classes (PyTorch), or over the K-1 wrong ones"
    )
    precision: str = _choice(
        "fp32",
        ("fp32", "tf32", "fp16", "bf16"),
        "operands of convolutions and matrix products: float32, TF32, float16 or bfloat16; on a CPU emulated",
    )
    loss_scale: float = _number(
        1024.0, "fp16: factor on the loss in the backward pass, taken out of the gradients again", above=0
    )
    replay_dropout: bool = _field(False, "both passes of a SAM step use the same dropout masks")
    logged_loss: str = _choice("w", ("w", "w+eps"), "where the logged training loss is taken")
    eval_every: int = _count(1, "epochs between two evaluations; the last epoch is always evaluated")
    eval_train_every: int | None = _count(
        None, "epochs between two evaluations on the training images, of those that are made; None: each of them"
    )

    def __post_init__(self) -> None:
        _Part.__post_init__(self)
        if self.loss_scale != 1024 and self.precision != "fp16":
            raise InputError(
                f"train.loss_scale = {self.loss_scale} needs train.precision = 'fp16', got {self.precision!r}: "
                "leave it at 1024"
            )


@dataclass(frozen=True, slots=True)
class RunSpec:
    """One training run: everything that can change its numbers, and nothing else (device and workers do not)."""

    data: DataSpec = DataSpec()
    model: ModelSpec = ModelSpec()
    optim: OptimSpec = OptimSpec()
    train: TrainSpec = TrainSpec()
    augment: AugmentSpec = AugmentSpec()
    seed: int = 0
    split_seed: int | None = _field(None, "seed of the draw of the images and of the label noise; None: seed")

    def __post_init__(self) -> None:
        _check_seed(self.seed)
        if self.split_seed is not None:
            _check_seed(self.split_seed, "split_seed")
        if self.train.logged_loss == "w+eps" and (self.optim.method == "sgd" or self.optim.rho == 0):
            raise InputError("train.logged_loss = 'w+eps' needs a method other than sgd and optim.rho above 0: use 'w'")
        if self.train.logged_loss == "w+eps" and self.optim.is_hybrid:
            raise InputError(
                "train.logged_loss = 'w+eps' needs an ascent in every step, but optim.ascent_from = "
                f"{self.optim.ascent_from} and optim.ascent_until = {self.optim.ascent_until}: use 'w'"
            )
        if self.optim.second_pass != "rounded" and (self.optim.method == "sgd" or self.train.precision == "fp32"):
            raise InputError(
                f"optim.second_pass = {self.optim.second_pass!r} needs optim.method other than sgd and train.precision "
                "other than fp32: use 'rounded'"
            )
        if self.data.name == "digits":
            self._check_digits()
        shards, batch = num_shards(self), self.train.batch_size
        if shards > batch:
            raise InputError(
                f"optim.num_shards = {shards} is larger than train.batch_size = {batch}: use at most {batch} shards"
            )
        size = self.data.train_size
        if size is not None and self.train.drop_last and batch > size:
            raise InputError(
                f"train.batch_size = {batch} is larger than data.train_size = {size}, so every batch would be dropped: "
                f"use at most {size}, or train.drop_last = False"
            )

    def _check_digits(self) -> None:
        if self.model.name in CIFAR_MODELS:
            raise InputError(
                f"model.name = {self.model.name!r} needs data.name cifar10 or cifar100: use 'cnn' or 'mlp'"
            )
        if self.augment != AugmentSpec():
            raise InputError("augment needs data.name cifar10 or cifar100, got 'digits': leave its fields as they are")


@dataclass(frozen=True, slots=True)
class MeasureSpec(_Part):
    """One measure of one trained model, which it names by the key of the run that trained it."""

    parent: str
    measure: str = _choice(
        "lambda_max",
        ("lambda_max", "adversarial_sharpness", "first_layer_kurtosis", "asymmetry_factor"),
        "what is measured",
    )
    split: str = _choice("train", ("train", "test"), "images the loss is taken on, never augmented")
    images: int | None = _count(None, "images of the split, the first in its order; None: all")
    mode: str = _choice("eval", ("eval", "train"), "batch norm: running statistics, or those of the batch")
    rho: float = _number(0.05, "adversarial sharpness: radius", low=0)
    steps: int = _count(1, "adversarial sharpness: projected ascent steps")
    shard_size: int | None = _count(None, "adversarial sharpness: examples per ascent; None is one ascent over all")
    mu: float = _number(5.0, "asymmetry factor: distance along a direction; the table has multiples of it", above=0)
    directions: int = _count(30, "asymmetry factor: random directions, the same for every model")
    direction_law: str = _choice("uniform01", ("uniform01", "gaussian"), "asymmetry factor: law of their entries")
    direction_scale: str = _choice(
        "unit", ("unit", "filter"), "asymmetry factor: length of a direction 1, or filter by filter that of the weights"
    )

    def __post_init__(self) -> None:
        _Part.__post_init__(self)
        if not is_key(self.parent):
            raise InputError(f"measure.parent = {self.parent!r} is not a key: it is the 16 hex digits of a run")

    @property
    def column(self) -> str:
        """Name of the measure in a frame: the measure, and where it is not the default how it was taken."""
        settings = [
            f"{field.name}={getattr(self, field.name)}"
            for field in dataclasses.fields(self)
            if field.name not in ("parent", "measure") and getattr(self, field.name) != field.default
        ]
        return "@".join([self.measure, *settings])


@dataclass(frozen=True, slots=True)
class PathSpec(_Part):
    """A path between two trained models, and what is taken along it."""

    shape: str = _choice("bend", ("bend", "line"), "path: a polygonal chain with one trained bend, or a straight line")
    steps: int = _count(400, "bend: steps of its training")
    batch_size: int = _count(64, "bend: examples per step")
    lr: float = _number(0.02, "bend: peak learning rate, cosine to 0", above=0)
    momentum: float = _number(0.9, "bend: momentum of SGD", low=0, high=1)
    weight_decay: float = _number(0.0005, "bend: coefficient of the l2 term, taken at the point of the path", low=0)
    points: int = _count(13, "points of the path, evenly spaced in t, at which losses and errors are taken", low=3)
    grid: int | None = _count(
        None, "bend: in place of what lies along it, losses on a grid of its plane with so many points a side", low=2
    )
    test_labels: str = _choice(
        "true", ("true", "shifted"), "labels of the test images: their own, or each that of the image before (E-B4)"
    )
    end: str = _choice(
        "trained",
        ("trained", "random"),
        "last node: the second model, or an untrained network, the bend then beginning at the second model (E-B5)",
    )

    def __post_init__(self) -> None:
        _Part.__post_init__(self)
        if self.grid is not None and self.shape == "line":
            raise InputError(f"path.grid = {self.grid} needs a plane, and path.shape = 'line' has none: use 'bend'")


@dataclass(frozen=True, slots=True)
class ConnectSpec:
    """A path from one trained model to another, which it names by the keys of the runs that trained them.

    `seed` is that of t and of the mini-batches in the training of a bend, and of an untrained end.
    """

    start: str
    end: str
    path: PathSpec = PathSpec()
    seed: int = 0

    def __post_init__(self) -> None:
        _check_seed(self.seed)
        for name, parent in (("start", self.start), ("end", self.end)):
            if not is_key(parent):
                raise InputError(f"connect.{name} = {parent!r} is not a key: it is the 16 hex digits of a run")

    @property
    def values(self) -> tuple[str, ...]:
        """Names of the numbers it returns: barriers along a path, or the coordinates of the nodes in their plane."""
        return ("end_x", "bend_x", "bend_y") if self.path.grid else BARRIERS


# How far a path rises above the higher of its ends.
BARRIERS = ("train_loss_barrier", "train_error_barrier_pct", "test_loss_barrier", "test_error_barrier_pct")

# The exact checks of samlib.checks and the values each returns.
CHECKS = {
    "dual_norm": ("relative_gap", "norm_ratio"),
    "one_shard": ("max_relative_difference", "mean_of_ascents_difference"),
    "effective_jacobian": ("min_eigenvalue_sam_minus_sgd", "min_eigenvalue_msam_minus_sam", "formula_error"),
    "edge_of_stability": ("lambda_max", "edge_ratio", "stability_limit", "loss"),
}


@dataclass(frozen=True, slots=True)
class CheckSpec:
    """An exact check in float64: its name in samlib.checks, its settings, and a seed for its random numbers."""

    check: str
    settings: tuple[tuple[str, str | int | float], ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        _check_seed(self.seed)
        _checked_choice("check.check", self.check, tuple(CHECKS))
        object.__setattr__(self, "settings", tuple(sorted((str(k), v) for k, v in self.settings)))


Spec = RunSpec | MeasureSpec | ConnectSpec | CheckSpec
KINDS: dict[str, type] = {"train": RunSpec, "measure": MeasureSpec, "connect": ConnectSpec, "check": CheckSpec}


def num_shards(spec: RunSpec) -> int:
    """Shards per full mini-batch: optim.num_shards, or as many of optim.shard_size as the batch needs."""
    size = spec.optim.shard_size
    return spec.optim.num_shards if size is None else math.ceil(spec.train.batch_size / size)


def split_seed(spec: RunSpec) -> int:
    """The seed of the draw of a run's images and of their label noise."""
    return spec.seed if spec.split_seed is None else spec.split_seed


def second_run(spec: RunSpec) -> RunSpec:
    """The same training on the same images, from another initialisation and with another order of the batches."""
    return dataclasses.replace(spec, seed=spec.seed + SECOND_RUN, split_seed=split_seed(spec))


SECOND_RUN = 1000  # added to the seed


def parents(spec: Spec) -> tuple[str, ...]:
    """The keys of the runs whose models a spec needs."""
    match spec:
        case MeasureSpec():
            return (spec.parent,)
        case ConnectSpec():
            return (spec.start, spec.end)
        case _:
            return ()


# ---------------------------------------------------------------------------------------------- identity


def kind(spec: Spec) -> str:
    return next(name for name, cls in KINDS.items() if isinstance(spec, cls))


def canonical(spec: Spec) -> dict[str, Any]:
    """The spec as plain JSON data: its kind, and each field that differs from its default."""
    return {"kind": kind(spec), **_changed(spec)}


def key(spec: Spec) -> str:
    """16 hex digits that name the spec and its record."""
    if isinstance(spec, CheckSpec):  # its settings are free: 2 and 2.0 are equal, and written differently
        return _digest(canonical(spec))
    return _cached_key(spec)


@lru_cache(maxsize=1 << 14)  # a page has a few thousand specs and asks for their keys again and again
def _cached_key(spec: Spec) -> str:
    return _digest(canonical(spec))


def group(spec: Spec) -> str:
    """The key without the seed: replicates of one setting share it."""
    return _digest({name: value for name, value in canonical(spec).items() if name != "seed"})


def from_canonical(data: Mapping[str, Any]) -> Spec:
    """The inverse of `canonical`.

    Raises:
        InputError: unknown kind or field, or a value the field does not take.
    """
    name = data.get("kind")
    if name not in KINDS:
        raise InputError(f"spec.kind = {name!r} is unknown: use one of {', '.join(KINDS)}")
    return _build(KINDS[name], {field: value for field, value in data.items() if field != "kind"}, "spec")


def is_key(text: str) -> bool:
    return len(text) == 16 and set(text) <= set("0123456789abcdef")


def flat(spec: Spec) -> dict[str, Any]:
    """Every field, defaults too, by its dotted name ('optim.rho')."""
    return dict(_flat_items(spec))


def documentation(cls: type = RunSpec) -> dict[str, str]:
    """What each field means, by its dotted name."""
    found = {}
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.type):
            found |= {f"{field.name}.{name}": doc for name, doc in documentation(field.type).items()}
        else:
            found[field.name] = field.metadata.get("doc", field.name)
    return found


def _digest(data: Mapping[str, Any]) -> str:
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _changed(spec: Any) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for field in dataclasses.fields(spec):
        value = getattr(spec, field.name)
        if dataclasses.is_dataclass(value):
            if changed := _changed(value):
                out[field.name] = changed
        elif field.name == "settings":
            out[field.name] = {name: _plain(setting) for name, setting in value}
        elif value != field.default:
            out[field.name] = _plain(value)
    return out


def _plain(value: Any) -> Any:
    return "inf" if value == math.inf else value  # JSON has no infinity


def _flat_items(part: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        if dataclasses.is_dataclass(value):
            yield from _flat_items(value, f"{prefix}{field.name}.")
        elif field.name == "settings":
            yield from ((f"{prefix}{name}", setting) for name, setting in value)
        else:
            yield f"{prefix}{field.name}", value


# ---------------------------------------------------------------------------------------------- changing a spec


def override(spec: Spec, changes: Mapping[str, Any]) -> Spec:
    """The spec with some fields changed, by dotted name ('model.width') or by the last word where it is unique.

    Raises:
        InputError: an unknown or ambiguous name, or a value the field does not take.
    """
    if not isinstance(changes, Mapping):
        raise InputError(f"overrides = {changes!r}: use a mapping of fields to values, for example {{'epochs': 20}}")
    return _changed_together(spec, {field_name(spec, name): value for name, value in changes.items()})


def field_name(spec: Spec, name: str) -> str:
    """The dotted name of a field that is given in full or by its last word.

    Raises:
        InputError: no field has this name, or several have.
    """
    if not isinstance(name, str):
        raise InputError(f"overrides: {name!r} is no name of a field: use words such as 'epochs' or 'model.width'")
    names = list(flat(spec))
    if name in names:
        return name
    matches = [candidate for candidate in names if candidate.split(".")[-1] == name]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise InputError(f"overrides: {name!r} could be {' or '.join(matches)}: write one of these")
    raise InputError(f"overrides: {name!r} is no field of a {kind(spec)} spec{_nearest(name, names)}")


def _changed_together(part: Any, changes: Mapping[str, Any]) -> Any:
    """All at once: a spec that is sound after all changes may not be after the first."""
    inner: dict[str, dict[str, Any]] = {}
    values = {}
    for name, value in changes.items():
        head, _, rest = name.partition(".")
        if rest:
            inner.setdefault(head, {})[rest] = value
        else:
            values[head] = value
    values |= {head: _changed_together(getattr(part, head), nested) for head, nested in inner.items()}
    return dataclasses.replace(part, **values)


def _build(cls: type, data: Mapping[str, Any], where: str) -> Any:
    fields = {field.name: field for field in dataclasses.fields(cls)}
    values = {}
    for name, value in data.items():
        if name not in fields:
            raise InputError(f"{where}.{name} is no field{_nearest(name, list(fields))}")
        if dataclasses.is_dataclass(fields[name].type):
            value = _build(fields[name].type, value, name)
        elif name == "settings":
            value = tuple(value.items())
        values[name] = value
    try:
        return cls(**values)
    except TypeError as error:
        raise InputError(f"{where}: {error}") from None
