"""Random changes of training images: whole batches of uint8 images, on the device they lie on, a draw for every image.

The order is that of the code of boca2023 (erratum E-B25): AutoAugment, flip, crop, scaling to mean 0 and sd 1, cutout,
and after them mixup. `Augmentation.draw` takes every random number of a batch from one generator, and
`Augmentation.apply` is a function of the images and of those numbers. Neither reads a value on the host, and all shapes
depend on the batch alone, so both fit in one CUDA graph with the generator registered to it; the first call for an
image size and a device makes constants and has to come before the capture.

AutoAugment (Cubuk et al. 2019, https://arxiv.org/abs/1805.09501, the policy for CIFAR-10) means torchvision's
`AutoAugment(AutoAugmentPolicy.CIFAR10)` on uint8 tensors: the results are equal, pixel by pixel. On PIL images, which
boca2023 used, torchvision rounds colour, contrast, sharpness and autocontrast otherwise: by 1 of 255, for contrast by
2 at most. Every image gets two rounds, each with one of `ACTIONS`. An action is a table of 256 values, a blend with
another image, or a table of places to take pixels from; for all others that table or blend changes nothing. So the
work does not grow with the number of actions. A compiler that fuses a product and a sum rounds once less, so a blend
may there differ by 1 of 255.
"""

import math
import numbers
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from samlib.errors import InputError

CROPS = ("none", "zero", "reflect")
PAD = 4  # pixels on each side, before a crop to the old size

# ---------------------------------------------------------------------------------------------- the policy

# The 25 sub-policies for CIFAR-10: twice (operation, its probability, magnitude 0 to 9; 0 where it has none).
POLICY = (
    (("Invert", 0.1, 0), ("Contrast", 0.2, 6)),
    (("Rotate", 0.7, 2), ("TranslateX", 0.3, 9)),
    (("Sharpness", 0.8, 1), ("Sharpness", 0.9, 3)),
    (("ShearY", 0.5, 8), ("TranslateY", 0.7, 9)),
    (("AutoContrast", 0.5, 0), ("Equalize", 0.9, 0)),
    (("ShearY", 0.2, 7), ("Posterize", 0.3, 7)),
    (("Color", 0.4, 3), ("Brightness", 0.6, 7)),
    (("Sharpness", 0.3, 9), ("Brightness", 0.7, 9)),
    (("Equalize", 0.6, 0), ("Equalize", 0.5, 0)),
    (("Contrast", 0.6, 7), ("Sharpness", 0.6, 5)),
    (("Color", 0.7, 7), ("TranslateX", 0.5, 8)),
    (("Equalize", 0.3, 0), ("AutoContrast", 0.4, 0)),
    (("TranslateY", 0.4, 3), ("Sharpness", 0.2, 6)),
    (("Brightness", 0.9, 6), ("Color", 0.2, 8)),
    (("Solarize", 0.5, 2), ("Invert", 0.0, 0)),
    (("Equalize", 0.2, 0), ("AutoContrast", 0.6, 0)),
    (("Equalize", 0.2, 0), ("Equalize", 0.6, 0)),
    (("Color", 0.9, 9), ("Equalize", 0.6, 0)),
    (("AutoContrast", 0.8, 0), ("Solarize", 0.2, 8)),
    (("Brightness", 0.1, 3), ("Color", 0.7, 0)),
    (("Solarize", 0.4, 5), ("AutoContrast", 0.9, 0)),
    (("TranslateY", 0.9, 9), ("TranslateY", 0.7, 9)),
    (("AutoContrast", 0.9, 0), ("Solarize", 0.8, 3)),
    (("Equalize", 0.8, 0), ("Invert", 0.1, 0)),
    (("TranslateY", 0.7, 9), ("AutoContrast", 0.9, 0)),
)
LARGEST = {  # the amount at magnitude 9; degrees, and for blends the distance of the ratio from 1
    "ShearY": 0.3,
    "Rotate": 30.0,
    "Brightness": 0.9,
    "Color": 0.9,
    "Contrast": 0.9,
    "Sharpness": 0.9,
}
TRANSLATION = 150 / 331  # of the side, at magnitude 9
SIGNED = {*LARGEST, "TranslateX", "TranslateY"}


class Action(NamedTuple):
    """An operation of AutoAugment at one magnitude and sign (1 where it has none)."""

    operation: str
    magnitude: int = 0
    sign: int = 1


def _action(step: tuple[str, float, int], sign: int) -> Action:
    operation, _, magnitude = step
    return Action(operation, magnitude, sign if operation in SIGNED else 1)


# All that a round of AutoAugment can do to an image; `Draws.actions` holds places in this list.
ACTIONS = (Action("Identity"), *sorted({_action(step, sign) for pair in POLICY for step in pair for sign in (-1, 1)}))
OPERATIONS = sorted({action.operation for action in ACTIONS})


# ---------------------------------------------------------------------------------------------- drawing


@dataclass(frozen=True, slots=True)
class Draws:
    """The random numbers of one batch of n images, on the generator's device; None for what is off.

    The loss of a batch under mixup is, example by example, share * loss(label) + (1 - share) * loss(label[partner]).
    """

    actions: Tensor | None  # (n, 2) int64, places in ACTIONS of the two rounds of AutoAugment
    flip: Tensor | None  # (n,) int64, 1 to flip
    corner: Tensor | None  # (n, 2) int64, top and left of the crop in the padded image, 0 to 8
    centre: Tensor | None  # (n, 2) int64, row and column of the centre of the square cut out
    partner: Tensor | None  # (n,) int64, a permutation: the image mixed in
    share: Tensor | None  # (n,) float32, the share of the image itself


@dataclass(frozen=True, slots=True)
class Augmentation:
    """What is done to every training image, and in this order.

    Args:
        autoaugment: the policy of AutoAugment for CIFAR-10: one of 25 pairs of operations, with torchvision's
            probabilities and magnitudes; black comes in from outside, the nearest pixel is taken.
        flip: left-right flip with probability 1/2.
        crop: "zero" or "reflect" pads 4 black or mirrored pixels on every side and crops back at a random place.
        cutout: side in pixels of a square that is set to 0, the mean, after scaling (DeVries & Taylor 2017,
            https://arxiv.org/abs/1708.04552). Its centre is any pixel of the image with equal chance: row r gives the
            rows from r - side // 2 to r - side // 2 + side - 1, and what lies outside of the image is left away.
            For an even side that is their code and that of boca2023; for an odd one these cut side - 1. 0 is off.
        mixup: alpha of the law Beta(alpha, alpha) of a share (Zhang et al. 2018, https://arxiv.org/abs/1710.09412),
            0 is off. Each image has its own share, as the paper's vicinal distribution has it. Their code draws one
            for a batch, to compute less: the loss has the same mean then, and a larger variance.

    Raises:
        InputError: a value of the wrong type or outside its range.
    """

    autoaugment: bool = False
    flip: bool = False
    crop: str = "none"
    cutout: int = 0
    mixup: float = 0.0

    def __post_init__(self) -> None:
        for name in ("autoaugment", "flip"):
            _require(isinstance(getattr(self, name), bool), name, getattr(self, name), "use True or False")
        _require(self.crop in CROPS, "crop", self.crop, f"use one of {', '.join(CROPS)}")
        _require(_is_count(self.cutout, 0), "cutout", self.cutout, "use a number of pixels, 0 for no cutout")
        number = isinstance(self.mixup, numbers.Real) and not isinstance(self.mixup, bool)
        fits = number and math.isfinite(self.mixup) and self.mixup >= 0
        _require(fits, "mixup", self.mixup, "use alpha above 0, or 0 for no mixup")

    @property
    def active(self) -> bool:
        """Whether anything random is done to an image."""
        return self != Augmentation()

    @torch.no_grad()
    def draw(self, batch: int, size: tuple[int, int], rng: torch.Generator) -> Draws:
        """Every random number of a batch.

        Args:
            batch: number of images n.
            size: height and width of the images, 5 pixels or more each.
            rng: the generator they are taken from; its device is that of the draws.

        Raises:
            InputError: a batch or size outside its range.
        """
        _require(_is_count(batch, 1), "batch", batch, "use 1 image or more")
        _check_size(size)
        return Draws(
            actions=_draw_actions(batch, rng) if self.autoaugment else None,
            flip=torch.randint(2, (batch,), generator=rng, device=rng.device) if self.flip else None,
            corner=torch.randint(2 * PAD + 1, (batch, 2), generator=rng, device=rng.device) if self._crops else None,
            centre=_draw_centre(batch, size, rng) if self.cutout else None,
            partner=_draw_permutation(batch, rng) if self.mixup else None,
            share=_draw_beta(batch, self.mixup, rng) if self.mixup else None,
        )

    @torch.no_grad()
    def apply(self, images: Tensor, draws: Draws, mean: Tensor, sd: Tensor) -> Tensor:
        """The images changed as drawn, scaled to (pixel / 255 - mean) / sd.

        Args:
            images: (n, 3, height, width) uint8, 5 pixels or more high and wide; left as they are.
            draws: what `draw` gave for n images of this size.
            mean, sd: three numbers each, one per channel, of pixels between 0 and 1; on the device of the images.

        Returns:
            (n, 3, height, width) float32.

        Raises:
            InputError: an argument of another form, or draws of another augmentation, batch or device.
        """
        self._check(images, draws, mean, sd)
        images, source = _autoaugmented(images, draws.actions) if self.autoaugment else (images, None)
        if self.flip or self._crops:
            window = _window(images, self.crop, draws)
            source = window if source is None else source.gather(1, window)
        if source is not None:
            images = _moved(images, source)
        inputs = images.float().div_(255).sub_(mean.reshape(3, 1, 1)).div_(sd.reshape(3, 1, 1))
        if self.cutout:
            inputs.masked_fill_(_square(inputs, draws.centre, self.cutout), 0.0)
        return _mixed(inputs, draws.partner, draws.share) if self.mixup else inputs

    @property
    def _crops(self) -> bool:
        return self.crop != "none"

    def _check(self, images: Tensor, draws: Draws, mean: Tensor, sd: Tensor) -> None:
        form = images.dtype == torch.uint8 and images.ndim == 4 and images.shape[1] == 3
        found = f"{images.dtype} {tuple(images.shape)}"
        _require(form, "images", found, "give uint8 images of shape (n, 3, height, width)")
        _check_size(tuple(images.shape[2:]))
        for name, value in (("mean", mean), ("sd", sd)):
            fits = value.numel() == 3 and value.is_floating_point() and value.device == images.device
            found = f"{value.dtype} {tuple(value.shape)} on {value.device}"
            _require(fits, name, found, f"give 3 floats, one per channel, on {images.device}")
        wanted = {"actions": self.autoaugment, "flip": self.flip, "corner": self._crops, "centre": self.cutout}
        for name, on in {**wanted, "partner": self.mixup, "share": self.mixup}.items():
            value = getattr(draws, name)
            fits = (value is None) != bool(on) and (value is None or value.device == images.device)
            fits = fits and (value is None or len(value) == len(images))
            found = None if value is None else f"{tuple(value.shape)} on {value.device}"
            _require(
                fits, f"draws.{name}", found, f"draw {len(images)} images with {self} and an rng on {images.device}"
            )


def _require(fits: bool, field: str, value: object, remedy: str) -> None:
    if not fits:
        raise InputError(f"augmentation: {field} = {value!r}: {remedy}")


def _is_count(value: object, low: int) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and value >= low


def _check_size(size: tuple[int, int]) -> None:
    fits = isinstance(size, tuple) and len(size) == 2 and all(_is_count(side, PAD + 1) for side in size)
    _require(fits, "size", size, f"use images of {PAD + 1} pixels or more, as (height, width)")


def _draw_actions(batch: int, rng: torch.Generator) -> Tensor:
    """A sub-policy for every image, of which each step is done with its probability, left or right, more or less."""
    tables = _policy_tables(rng.device)
    policy = torch.randint(len(POLICY), (batch,), generator=rng, device=rng.device)
    sign = torch.randint(2, (batch, 2, 1), generator=rng, device=rng.device)
    done = torch.rand(batch, 2, generator=rng, device=rng.device) <= tables.probability[policy]
    return tables.chosen[policy].gather(2, sign).squeeze(2) * done


def _draw_centre(batch: int, size: tuple[int, int], rng: torch.Generator) -> Tensor:
    return torch.stack([torch.randint(side, (batch,), generator=rng, device=rng.device) for side in size], 1)


def _draw_permutation(batch: int, rng: torch.Generator) -> Tensor:
    # torch.randperm may work on the host; two equal keys of 53 bits do not happen
    return torch.rand(batch, generator=rng, device=rng.device, dtype=torch.float64).argsort()


def _draw_beta(batch: int, alpha: float, rng: torch.Generator) -> Tensor:
    """Beta(alpha, alpha) as X / (X + Y) of two Gamma(alpha), each drawn as Gamma(alpha + 1) * U^(1 / alpha).

    In logarithms, as for a small alpha X and Y themselves are below every float.
    """
    shape = torch.full((2, batch), alpha + 1.0, dtype=torch.float64, device=rng.device)
    # torch.distributions takes no generator; this is the sampler that it calls
    gamma = torch._standard_gamma(shape, generator=rng).log()
    uniform = 1 - torch.rand(2, batch, generator=rng, device=rng.device, dtype=torch.float64)  # never 0
    x, y = gamma + uniform.log() / alpha
    return torch.sigmoid(x - y).float()


# ---------------------------------------------------------------------------------------------- moving pixels

# A source (n, height * width [+ 1]) names for every pixel the one it is taken from, by row * width + column. The number
# height * width names a black pixel outside of the image.


def _moved(images: Tensor, source: Tensor) -> Tensor:
    n, channels, height, width = images.shape
    pixels = functional.pad(images.flatten(2), (0, 1))
    source = source[:, None, : height * width].expand(n, channels, height * width)
    return pixels.gather(2, source).view(n, channels, height, width)


def _window(images: Tensor, crop: str, draws: Draws) -> Tensor:
    """The source (n, height * width) of flip and then crop."""
    height, width = images.shape[2:]
    rows, columns = _crop_tables(height, width, crop, images.device)
    top, left = (0, 0) if draws.corner is None else draws.corner.unbind(1)
    flip = 0 if draws.flip is None else draws.flip
    source = rows[top].unsqueeze(-1) + columns[flip, left].unsqueeze(-2)
    return source.clamp_(max=height * width).flatten(1)


@lru_cache(maxsize=16)
def _crop_tables(height: int, width: int, crop: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """For every top of a crop its rows, (tops, height), and for 0 or 1 flips and every left its columns, (2, lefts,
    width): they add up to a source, to height * width or more where one is outside."""
    rows, columns = _places(height, crop), _places(width, crop)
    mirrored = width - 1 - columns
    outside = height * width

    def filled(places: Tensor, side: int, step: int = 1) -> Tensor:
        return (places * step).masked_fill((places < 0) | (places >= side), outside)

    columns = torch.stack([columns, mirrored])
    return filled(rows, height, width).to(device), filled(columns, width).to(device)


def _places(side: int, crop: str) -> Tensor:
    """Where in the image the pixels of a crop lie, for every offset: (offsets, side)."""
    pad = 0 if crop == "none" else PAD
    places = torch.arange(2 * pad + 1)[:, None] + torch.arange(side) - pad
    return places if crop != "reflect" else side - 1 - (side - 1 - places.abs()).abs()


def _square(inputs: Tensor, centre: Tensor, side: int) -> Tensor:
    """Mask (n, 1, height, width) of the pixels that cutout sets to 0."""
    height, width = inputs.shape[2:]
    first = centre - side // 2
    rows, columns = (
        torch.arange(length, device=inputs.device) - first[:, axis, None] for axis, length in enumerate((height, width))
    )
    rows, columns = ((places >= 0) & (places < side) for places in (rows, columns))
    return (rows[:, :, None] & columns[:, None, :]).unsqueeze(1)


def _mixed(inputs: Tensor, partner: Tensor, share: Tensor) -> Tensor:
    share = share.view(-1, 1, 1, 1)
    return inputs[partner].mul_(1 - share).add_(inputs.mul_(share))


# ---------------------------------------------------------------------------------------------- AutoAugment


def _autoaugmented(images: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
    """The images after both rounds but for the last move of pixels, and the source (n, height * width + 1) of that.

    An action either moves pixels or changes their values, so within a round the two may change places.
    """
    tables = _action_tables(*images.shape[2:], images.device)
    first, second = actions.unbind(1)
    images = _moved(_recoloured(images, first, tables), tables.source[first])
    return _recoloured(images, second, tables), tables.source[second]


def _recoloured(images: Tensor, action: Tensor, tables: "_ActionTables") -> Tensor:
    """The images (n, 3, height, width) uint8 with the values of their pixels changed."""
    pixels = images.flatten(2).long()
    images = _lookup(pixels, action, tables).gather(2, pixels).view_as(images)
    return _blended(images, action, tables)


def _lookup(pixels: Tensor, action: Tensor, tables: "_ActionTables") -> Tensor:
    """The new value of each value, (n, 3, 256) uint8, from pixels (n, 3, height * width) int64."""
    count = torch.zeros(*pixels.shape[:2], 256, dtype=torch.int32, device=pixels.device)
    count.scatter_add_(2, pixels, count.new_ones(1).expand_as(pixels))
    at_most = count.cumsum(2, dtype=torch.int32)  # pixels of this value or a darker one
    value = torch.arange(256, dtype=torch.float32, device=pixels.device)
    operation = tables.operation[action].view(-1, 1, 1)
    lookup = torch.where(_is(operation, "AutoContrast"), _stretched(at_most, value), tables.lookup[action])
    return torch.where(_is(operation, "Equalize"), _equalized(at_most, at_most - count, value), lookup)


def _stretched(at_most: Tensor, value: Tensor) -> Tensor:
    """Linear, from the range of values that a channel has to 0 to 255; a channel of one value is left as it is."""
    darkest, brightest = (at_most == 0).sum(2, keepdim=True), (at_most < at_most[..., -1:]).sum(2, keepdim=True)
    flat = darkest == brightest
    scale = (255 / (brightest - darkest).float()).masked_fill_(flat, 1.0)
    return ((value - darkest.masked_fill_(flat, 0)) * scale).clamp_(0, 255).to(torch.uint8)


def _equalized(at_most: Tensor, below: Tensor, value: Tensor) -> Tensor:
    """Steps of equally many pixels. The brightest value does not count; fewer than 255 others change nothing."""
    without_brightest = at_most.masked_fill(at_most == at_most[..., -1:], 0).amax(2, keepdim=True)
    step = without_brightest // 255
    lookup = (below + step // 2) // step.clamp(min=1)
    return torch.where(step == 0, value, lookup.clamp_(max=255)).to(torch.uint8)


def _blended(images: Tensor, action: Tensor, tables: "_ActionTables") -> Tensor:
    """Between the image (ratio 1) and a grey, flat or blurred one (ratio 0), or beyond the image."""
    images = images.float()
    grey = (0.2989 * images[:, 0] + 0.587 * images[:, 1] + 0.114 * images[:, 2]).floor_().unsqueeze(1)
    operation, ratio, rest = (
        table[action].view(-1, 1, 1, 1) for table in (tables.operation, tables.ratio, tables.rest)
    )
    other = torch.where(_is(operation, "Contrast"), grey.mean((1, 2, 3), keepdim=True), grey)
    other = torch.where(_is(operation, "Sharpness"), _blurred(images), other)
    return images.mul_(ratio).add_(other.mul_(rest)).clamp_(0, 255).to(torch.uint8)


def _blurred(images: Tensor) -> Tensor:
    """Each pixel with weight 5 among its 8 neighbours; those at the border stay. Never a tie: 13 is odd."""
    rows = images[:, :, :-2] + images[:, :, 1:-1] + images[:, :, 2:]
    total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * images[:, :, 1:-1, 1:-1]
    blurred = images.clone()
    blurred[:, :, 1:-1, 1:-1] = total.div_(13).round_()
    return blurred


def _is(operation: Tensor, name: str) -> Tensor:
    return operation == OPERATIONS.index(name)


# ---------------------------------------------------------------------------------------------- constants of a device


class _PolicyTables(NamedTuple):
    probability: Tensor  # (25, 2) of each step of a sub-policy
    chosen: Tensor  # (25, 2, 2) place in ACTIONS of each step, with sign - and +


@lru_cache(maxsize=16)
def _policy_tables(device: torch.device) -> _PolicyTables:
    probability = [[probability for _, probability, _ in pair] for pair in POLICY]
    chosen = [[[ACTIONS.index(_action(step, sign)) for sign in (-1, 1)] for step in pair] for pair in POLICY]
    return _PolicyTables(torch.tensor(probability, device=device), torch.tensor(chosen, device=device))


class _ActionTables(NamedTuple):
    """Row a is what action a does."""

    operation: Tensor  # (actions,) place in OPERATIONS
    source: Tensor  # (actions, height * width + 1) int64
    lookup: Tensor  # (actions, 1, 256) uint8, of the actions whose table does not depend on the image
    ratio: Tensor  # (actions,) of the image in a blend
    rest: Tensor  # (actions,) of the other one


@lru_cache(maxsize=16)
def _action_tables(height: int, width: int, device: torch.device) -> _ActionTables:
    ratios = [_ratio(action) for action in ACTIONS]
    tables = _ActionTables(
        operation=torch.tensor([OPERATIONS.index(action.operation) for action in ACTIONS]),
        source=torch.stack([_source(action, height, width) for action in ACTIONS]),
        lookup=torch.stack([_fixed_lookup(action) for action in ACTIONS]).unsqueeze(1),
        ratio=torch.tensor(ratios),
        rest=torch.tensor([1 - ratio for ratio in ratios]),
    )
    return _ActionTables(*(table.to(device) for table in tables))


def _amount(action: Action, largest: float) -> float:
    """Ten magnitudes from 0 to the largest, as the float32 that torchvision takes."""
    return action.sign * torch.linspace(0, largest, 10)[action.magnitude].item()


def _ratio(action: Action) -> float:
    blend = action.operation in ("Color", "Contrast", "Sharpness")
    return 1 + _amount(action, LARGEST[action.operation]) if blend else 1.0


def _fixed_lookup(action: Action) -> Tensor:
    """(256,) uint8: the new value of each value."""
    value = torch.arange(256, dtype=torch.uint8)
    if action.operation == "Invert":
        return 255 - value
    if action.operation == "Solarize":
        return torch.where(value >= torch.linspace(255, 0, 10)[action.magnitude], 255 - value, value)
    if action.operation == "Posterize":
        lost = round(action.magnitude / (9 / 4))  # bits of 8
        return value >> lost << lost
    if action.operation == "Brightness":
        return ((1 + _amount(action, LARGEST["Brightness"])) * value).clamp(0, 255).to(torch.uint8)
    return value


def _source(action: Action, height: int, width: int) -> Tensor:
    """(height * width + 1,) int64: for every pixel and the one outside, where it comes from.

    In float64. Torchvision computes these places in float32, and the nearest pixel is the same: at 32 x 32 no place is
    closer than 0.001 pixels to the middle between two.
    """
    y, x = torch.meshgrid(
        *(torch.arange(side, dtype=torch.float64) - (side - 1) / 2 for side in (height, width)), indexing="ij"
    )
    if action.operation == "Rotate":
        angle = math.radians(_amount(action, LARGEST["Rotate"]))
        y, x = math.sin(angle) * x + math.cos(angle) * y, math.cos(angle) * x - math.sin(angle) * y
    elif action.operation == "ShearY":
        y = y + _amount(action, LARGEST["ShearY"]) * (x + width / 2)  # the left edge stays
    elif action.operation == "TranslateX":
        x = x - int(_amount(action, TRANSLATION * width))
    elif action.operation == "TranslateY":
        y = y - int(_amount(action, TRANSLATION * height))
    row, column = ((place + (side - 1) / 2).round().long() for place, side in ((y, height), (x, width)))
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    outside = height * width
    return functional.pad((row * width + column).masked_fill(~inside, outside).flatten(), (0, 1), value=outside)
