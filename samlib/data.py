"""Data sets as tensors on the device, split and shuffled by seed.

Digits come with scikit-learn. CIFAR-10 and CIFAR-100 are read from `<root>/<name>.npz` if it is there, else by
torchvision, which downloads and verifies them; the arrays are then kept as that npz. The root is the environment
variable SAMLIB_DATA, else ~/.cache/samlib.
"""

import hashlib
import os
import urllib.error
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from samlib.errors import InputError
from samlib.spec import DataSpec

DIGITS_TEST_SIZE = 797  # of 1,797; the same test images for every seed
DIGITS_SPLIT_SEED = 12345
FIELDS = ("train_images", "train_labels", "test_images", "test_labels")  # of an npz, with `classes`


@dataclass(frozen=True, slots=True, eq=False)
class Images:
    """A data set as it lies on disk: images (N, height, width, channels) and labels (N,), both uint8. Equal to itself
    alone, so that what follows from it can be kept."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    classes: tuple[str, ...]
    digest: str
    maximum: int = 255  # largest pixel value


@dataclass(frozen=True, slots=True)
class Split:
    """Inputs (n, channels, height, width) float32 and labels (n,) int64 on one device."""

    inputs: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, slots=True)
class Pixels:
    """The training images of a seed before scaling, for augmentation: uint8 (n, channels, height, width), and per
    channel what (pixel / 255 - mean) / sd takes to scale them; on one device."""

    images: Tensor
    mean: Tensor
    sd: Tensor


@dataclass(frozen=True, slots=True)
class Splits:
    """What one seed trains, chooses and reports on. Only the training labels may be noisy."""

    train: Split
    validation: Split
    test: Split
    num_classes: int
    digest: str
    pixels: Pixels | None = None  # of the training images, where they are to be augmented


# ---------------------------------------------------------------------------------------------- splits of one seed


def load(spec: DataSpec, seed: int, device: torch.device | str = "cpu", augmented: bool = False) -> Splits:
    """The splits of a seed: validation and training images drawn without overlap, label noise, scaling; with
    `augmented` also the pixels of the training images.

    Raises:
        InputError: more images asked for than there are, or a data set that is neither on disk nor downloadable, or
            whose file cannot be read, written or used.
    """
    images = read(spec.name)
    train, validation = draw(len(images.train_labels), spec, seed)
    labels = torch.from_numpy(images.train_labels.astype(np.int64))
    noisy = with_label_noise(labels[train], spec.label_noise, len(images.classes), generator(seed, "noise"))
    inputs, test_inputs = scaled(images, spec.scaling)

    def split(inputs: Tensor, labels: Tensor) -> Split:
        return Split(inputs.to(device).contiguous(), labels.to(device))

    return Splits(
        train=split(inputs[train], noisy),
        validation=split(inputs[validation], labels[validation]),
        test=split(test_inputs, torch.from_numpy(images.test_labels.astype(np.int64))),
        num_classes=len(images.classes),
        digest=images.digest,
        pixels=pixels(images, spec.scaling, train, device) if augmented else None,
    )


def pixels(images: Images, scaling: str, chosen: Tensor, device: torch.device | str) -> Pixels:
    """The chosen training images as they are, and the constants of their scaling."""
    of_channels = torch.from_numpy(images.train_images).permute(0, 3, 1, 2)
    mean, sd = scaling_constants(images, scaling)
    return Pixels(of_channels[chosen].contiguous().to(device), mean.to(device), sd.to(device))


def draw(available: int, spec: DataSpec, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of the training and the validation images of a seed, disjoint."""
    wanted = spec.validation_size + (spec.train_size or 1)
    if wanted > available:
        raise InputError(
            f"data.train_size = {spec.train_size} and data.validation_size = {spec.validation_size} ask for more than "
            f"the {available} training images of {spec.name}: use {available} at most together"
        )
    order = torch.randperm(available, generator=generator(seed, "split"))
    validation, rest = order[: spec.validation_size], order[spec.validation_size :]
    return rest[: spec.train_size], validation


def with_label_noise(labels: Tensor, share: float, num_classes: int, rng: torch.Generator) -> Tensor:
    """Labels of which exactly `share` (rounded to whole labels) are moved to another class, chosen uniformly."""
    count = round(share * len(labels))
    moved = torch.randperm(len(labels), generator=rng)[:count]
    shift = torch.randint(1, num_classes, (count,), generator=rng)
    noisy = labels.clone()
    noisy[moved] = (labels[moved] + shift) % num_classes
    return noisy


@lru_cache(maxsize=1)  # CIFAR takes seconds, and a sweep asks for it at the start of every run and measure
def scaled(images: Images, scaling: str) -> tuple[Tensor, Tensor]:
    """Training and test inputs as float32 (n, channels, height, width); others read them too, so copy what is changed.

    "standardize" takes its mean and sd per channel over all training images of the data set, before a seed draws from
    them. Images that a seed validates on or leaves out are among them, test images are not; so the inputs are the same
    for every seed.
    """
    train, test = (
        torch.from_numpy(array).permute(0, 3, 1, 2).float() / images.maximum
        for array in (images.train_images, images.test_images)
    )
    if scaling == "unit":
        return train, test
    if scaling == "symmetric":
        return train * 2 - 1, test * 2 - 1
    axes = (0, 2, 3)
    mean, sd = train.mean(axes, keepdim=True), train.std(axes, keepdim=True)
    return (train - mean) / sd, (test - mean) / sd


@lru_cache(maxsize=4)
def scaling_constants(images: Images, scaling: str) -> tuple[Tensor, Tensor]:
    """Mean and sd per channel, in units of the largest pixel value: what `scaled` subtracts, and then divides by."""
    channels = images.train_images.shape[-1]
    if scaling == "standardize":
        found = [torch.from_numpy(images.train_images[..., c]).float() / images.maximum for c in range(channels)]
        return torch.stack([c.mean() for c in found]), torch.stack([c.std() for c in found])
    mean, sd = {"unit": (0.0, 1.0), "symmetric": (0.5, 0.5)}[scaling]
    return torch.full((channels,), mean), torch.full((channels,), sd)


def batches(
    size: int, batch_size: int, drop_last: bool, rng: torch.Generator, device: torch.device | str = "cpu"
) -> Iterator[Tensor]:
    """Indices of one epoch's mini-batches, in a fresh random order. It goes to the device as a whole: sent batch by
    batch, the host would wait for the device each time."""
    order = torch.randperm(size, generator=rng).to(device)
    stop = size - size % batch_size if drop_last else size
    yield from (order[start : start + batch_size] for start in range(0, stop, batch_size))


def generator(seed: int, purpose: str) -> torch.Generator:
    """One generator per purpose, so that changing how much one of them draws leaves the others as they were."""
    digest = hashlib.sha256(f"{seed}:{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


# ---------------------------------------------------------------------------------------------- reading


def root() -> Path:
    return Path(os.environ.get("SAMLIB_DATA") or Path.home() / ".cache" / "samlib").expanduser()


def read(name: str) -> Images:
    """The arrays of a data set."""
    return _digits() if name == "digits" else _cifar(name, root())


@lru_cache(maxsize=1)
def _digits() -> Images:
    from sklearn.datasets import load_digits

    found = load_digits()
    images = found.images.astype(np.uint8)[..., None]
    labels = found.target.astype(np.uint8)
    order = np.random.RandomState(DIGITS_SPLIT_SEED).permutation(len(labels))
    test, train = order[:DIGITS_TEST_SIZE], order[DIGITS_TEST_SIZE:]
    arrays = (images[train], labels[train], images[test], labels[test])
    return Images(*arrays, tuple("0123456789"), _digest(arrays), maximum=16)


@lru_cache(maxsize=2)
def _cifar(name: str, folder: Path) -> Images:
    path = folder / f"{name}.npz"
    if not path.exists():
        _save_npz(path, *_from_torchvision(name, folder))
    try:
        with open(path, "rb") as stream, np.load(stream) as file:
            found = {field: file[field] for field in (*FIELDS, "classes")}
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"data file {path} cannot be read ({error}): delete it and run again") from error
    _check_form(path, found)
    arrays = tuple(found[field] for field in FIELDS)
    return Images(*arrays, tuple(str(label) for label in found["classes"]), _digest(arrays))


def _check_form(path: Path, found: dict[str, np.ndarray]) -> None:
    """
    Raises:
        InputError: an array of the npz is not of the form that `Images` describes, or a label has no class.
    """

    def require(fits: bool, field: str, what: str, wanted: str) -> None:
        if not fits:
            raise InputError(
                f"data file {path}: {field} is {what}, wanted is {wanted}: put it in that form, or delete the file "
                "and run again"
            )

    def form(field: str) -> str:
        return f"{found[field].dtype} of shape {found[field].shape}"

    classes = found["classes"]
    require(classes.ndim == 1, "classes", form("classes"), "names of shape (classes,)")
    for split in ("train", "test"):
        images, labels = found[f"{split}_images"], found[f"{split}_labels"]
        fits = images.dtype == np.uint8 and images.ndim == 4 and images.shape[-1] == 3 and images.size > 0
        require(fits, f"{split}_images", form(f"{split}_images"), "uint8 of shape (N, height, width, 3)")
        fits = labels.dtype == np.uint8 and labels.shape == images.shape[:1]
        require(fits, f"{split}_labels", form(f"{split}_labels"), f"uint8 of shape ({len(images)},)")
        largest = int(labels.max())
        require(largest < len(classes), f"{split}_labels", f"up to {largest}", f"0 to {len(classes) - 1}")


def _from_torchvision(name: str, folder: Path) -> tuple[tuple[np.ndarray, ...], list[str]]:
    from torchvision import datasets

    source = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        train, test = (source(str(folder), train=train, download=True) for train in (True, False))
    except (OSError, RuntimeError, urllib.error.URLError) as error:
        raise InputError(
            f"data.name = {name!r}: {folder / (name + '.npz')} is not there and torchvision could not download it "
            f"({error}). On a machine with a network run\n"
            f"    python -c \"from torchvision.datasets import {source.__name__} as D; D('{folder}', download=True)\"\n"
            f"or copy {name}.npz into {folder} (SAMLIB_DATA names another folder). "
            "The quick profile needs no download: --profile quick"
        ) from error
    arrays = (train.data, np.array(train.targets, np.uint8), test.data, np.array(test.targets, np.uint8))
    return arrays, train.classes


def _save_npz(path: Path, arrays: tuple[np.ndarray, ...], classes: list[str]) -> None:
    """Written under another name first, so that an interrupted write leaves no broken file behind.

    Raises:
        InputError: the folder is full or cannot be written.
    """
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.npz")
    try:
        try:
            np.savez(temporary, **dict(zip(FIELDS, arrays, strict=True)), classes=np.array(classes))
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(
            f"data folder {path.parent} cannot take {path.name} ({error.strerror}): make room or make it writable, or "
            "name another folder in SAMLIB_DATA"
        ) from error


def _digest(arrays: tuple[np.ndarray, ...]) -> str:
    """A digest of the pixels and labels, the same however they were stored."""
    found = hashlib.sha256()
    for array in arrays:
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()[:16]
