"""The networks: the small one that a model spec builds, and those of the papers for CIFAR, as plain functions."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from samlib.errors import InputError
from samlib.spec import STEMMED, ModelSpec

GROUPS = 4  # of group norm; the spec sees to it that they divide the width


def build(spec: ModelSpec, image_shape: tuple[int, int, int], num_classes: int, rng: torch.Generator) -> nn.Module:
    """A network with weights drawn from `rng` (the global generator is left as it was).

    Args:
        spec: which network, how wide, which normalisation. Without normalisation ("none") the networks for CIFAR
            have an identity in place of each of their norm layers, and no bias more, as in coldenhoff2022's code.
        image_shape: channels, height and width: (1, 8, 8) for digits, (3, 32, 32) for CIFAR.
        num_classes: size of the output, unless the spec sets another: classes beyond those of the data are then
            never right, and are learnt to be improbable.
        rng: generator of the initial weights, on the CPU so that every device starts from the same point.

    Raises:
        InputError: the spec asks for fewer outputs than there are classes.
    """
    outputs = spec.num_outputs or num_classes
    if outputs < num_classes:
        raise InputError(f"model.num_outputs = {outputs} is fewer than the {num_classes} classes: use {num_classes}")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(rng.initial_seed())  # torch.nn draws from the CPU's default generator
        if spec.name == "mlp":
            return mlp(math.prod(image_shape), outputs, spec.width, spec.norm, spec.dropout)
        if spec.name == "cnn":
            return small_cnn(image_shape[0], outputs, spec.width, spec.norm, spec.dropout)
        stem = {"stem": spec.stem} if spec.name in STEMMED else {}
        model = CIFAR[spec.name](outputs, **stem)
        return without_norm(model) if spec.norm == "none" else model


def small_cnn(
    in_channels: int, num_classes: int, width: int = 8, norm: str = "batch", dropout: float = 0.0
) -> nn.Module:
    """Three 3x3 convolutions, the last two with stride 2, a 2x2 grid of features, and a linear classifier.

    (n, in_channels, h, w) -> (n, num_classes), for any h, w of 5 or more. Width 8 on digits: 7,234 parameters with
    batch or group norm, 7,178 without (a bias takes the place of the norm).
    """
    widths = (width, 2 * width, 4 * width)
    before = (in_channels, width, 2 * width)
    blocks: list[nn.Module] = []
    for start, end, stride in zip(before, widths, (1, 2, 2), strict=True):
        blocks += [nn.Conv2d(start, end, 3, stride, padding=1, bias=norm == "none"), *_norm(norm, end), nn.ReLU()]
    head = [_AveragePool2x2(2), nn.Flatten(), *([nn.Dropout(dropout)] if dropout else [])]
    return nn.Sequential(*blocks, *head, nn.Linear(4 * widths[-1], num_classes))


class _AveragePool2x2(nn.AdaptiveAvgPool2d):
    """Does nothing where there is nothing to average, as on digits: PyTorch's own takes 8 % of a step there."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.shape[-2:] == (2, 2) else super().forward(x)


def mlp(in_features: int, num_classes: int, width: int = 64, norm: str = "batch", dropout: float = 0.0) -> nn.Module:
    """Two hidden layers of `width` units and a linear classifier.

    (n, ...) with `in_features` numbers each -> (n, num_classes). Width 64 on digits: 9,098 parameters with batch or
    group norm, 8,970 without (a bias takes the place of the norm). A step takes a quarter of the time of `small_cnn`.
    """
    layers: list[nn.Module] = [nn.Flatten()]
    for before in (in_features, width):
        layers += [nn.Linear(before, width, bias=norm == "none"), *_norm(norm, width, nn.BatchNorm1d), nn.ReLU()]
    return nn.Sequential(*layers, *([nn.Dropout(dropout)] if dropout else []), nn.Linear(width, num_classes))


def _norm(name: str, channels: int, batch_norm: type[nn.Module] = nn.BatchNorm2d) -> list[nn.Module]:
    layers = {"batch": batch_norm, "group": partial(nn.GroupNorm, GROUPS), "none": None}
    return [layers[name](channels)] if layers[name] else []


# -------------------------------------------------------------------------------------------------- CIFAR networks
#
# All take (n, 3, 32, 32), in any number of classes; parameters are stated for 10. torchvision is imported where it is
# used: that takes 2 s, and the quick profile needs none of these. Convolutions are drawn from N(0, 2 / fan_out).


def resnet20(num_classes: int = 10) -> nn.Module:
    """ResNet-20 of He et al. 2016, section 4.2: stages of 16, 32, 64 channels, 3 blocks each; 269,722 parameters.

    The shortcut is theirs for CIFAR, option A: where the shape changes, every second pixel, and zeros for the new
    channels. It has no parameters.
    """
    return _cifar_resnet(3, num_classes)


def resnet32(num_classes: int = 10) -> nn.Module:
    """As `resnet20`, with 5 blocks a stage; 464,154 parameters."""
    return _cifar_resnet(5, num_classes)


def resnet18(num_classes: int = 10, stem: str = "cifar") -> nn.Module:
    """torchvision's ResNet-18; 11,173,962 parameters with the CIFAR stem.

    Args:
        num_classes: size of the output.
        stem: "cifar", a 3x3 convolution of stride 1 and no max-pool, or "imagenet", torchvision's own (7x7, stride 2,
            max-pool; 11,181,642 parameters).

    Raises:
        InputError: unknown stem.
    """
    from torchvision.models import resnet18

    return _with_stem(resnet18(num_classes=num_classes), stem)


def resnet50(num_classes: int = 10, stem: str = "cifar") -> nn.Module:
    """torchvision's ResNet-50, as `resnet18`; 23,520,842 parameters with the CIFAR stem."""
    from torchvision.models import resnet50

    return _with_stem(resnet50(num_classes=num_classes), stem)


def mobilenet_v2(num_classes: int = 10) -> nn.Module:
    """MobileNetV2 in the CIFAR variant of boca2023; 2,296,922 parameters.

    torchvision's network with four changes, those of kuangliu/pytorch-cifar, which alone give boca2023's number: stride
    1 in the stem and in the second stage; a 1x1 expansion in the first block although its ratio is 1; a 1x1 convolution
    as the shortcut where a block of stride 1 changes the number of channels; ReLU without the limit of 6. No dropout.
    """
    from torchvision.models import MobileNetV2

    stages = [(1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1)]
    strides = (1, 1, 2, 2, 1, 2, 1)
    setting = [[*stage, stride] for stage, stride in zip(stages, strides, strict=True)]
    model = MobileNetV2(num_classes, inverted_residual_setting=setting, block=_InvertedResidual, dropout=0.0)
    first, last = model.features[0], model.features[-1]
    first[0].stride = (1, 1)
    first[2] = last[2] = nn.ReLU(inplace=True)
    return model


def wrn28_10(num_classes: int = 10) -> nn.Module:
    """WRN-28-10 of Zagoruyko and Komodakis 2016: 4 blocks a stage, ten times as wide; 36,479,194 parameters."""
    return _wide_resnet(4, 10, num_classes)


def wrn40_2(num_classes: int = 10) -> nn.Module:
    """WRN-40-2: 6 blocks a stage, twice as wide; 2,243,546 parameters."""
    return _wide_resnet(6, 2, num_classes)


# Name in a model spec -> the network.
CIFAR: dict[str, Callable[..., nn.Module]] = {
    found.__name__: found for found in (resnet18, resnet50, resnet20, resnet32, mobilenet_v2, wrn28_10, wrn40_2)
}


def without_norm(model: nn.Module) -> nn.Module:
    """The same model, each of its batch-norm layers replaced by an identity."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.Identity())
    return model


def _cifar_resnet(blocks: int, num_classes: int) -> nn.Module:
    from torchvision.models.resnet import BasicBlock

    layers: list[nn.Module] = [*_conv_norm(3, 16, 3), nn.ReLU(inplace=True)]
    channels = 16
    for width in (16, 32, 64):
        for _ in range(blocks):
            shortcut = None if width == channels else _PaddedShortcut(width - channels)
            layers.append(BasicBlock(channels, width, stride=width // channels, downsample=shortcut))
            channels = width
    return _drawn(nn.Sequential(*layers, *_classifier(channels, num_classes)))


class _PaddedShortcut(nn.Module):
    def __init__(self, new_channels: int) -> None:
        super().__init__()
        self.new_channels = new_channels

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, self.new_channels))


def _with_stem(model: nn.Module, stem: str) -> nn.Module:
    if stem not in ("cifar", "imagenet"):
        raise InputError(f"stem = {stem!r} is unknown: use cifar or imagenet")
    if stem == "cifar":
        model.conv1 = _drawn(nn.Conv2d(3, 64, 3, padding=1, bias=False))
        model.maxpool = nn.Identity()
    return model


class _InvertedResidual(nn.Module):
    def __init__(self, before: int, after: int, stride: int, expand_ratio: int, norm_layer: object = None) -> None:
        super().__init__()
        hidden = expand_ratio * before
        self.conv = nn.Sequential(
            *_conv_norm(before, hidden, 1),
            nn.ReLU(inplace=True),
            *_conv_norm(hidden, hidden, 3, stride, groups=hidden),
            nn.ReLU(inplace=True),
            *_conv_norm(hidden, after, 1),
        )
        self.adds = stride == 1
        self.shortcut = nn.Sequential(*(_conv_norm(before, after, 1) if self.adds and before != after else []))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.shortcut(x) if self.adds else self.conv(x)


def _wide_resnet(blocks: int, widening: int, num_classes: int) -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1, bias=False)]
    channels = 16
    for width, stride in ((16 * widening, 1), (32 * widening, 2), (64 * widening, 2)):
        for index in range(blocks):
            layers.append(_PreActivationBlock(channels, width, 1 if index else stride))
            channels = width
    head = [nn.BatchNorm2d(channels), nn.ReLU(inplace=True), *_classifier(channels, num_classes)]
    return _drawn(nn.Sequential(*layers, *head))


class _PreActivationBlock(nn.Module):
    """Norm and ReLU before each convolution; a 1x1 convolution is the shortcut where the number of channels changes."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.activation = nn.Sequential(nn.BatchNorm2d(before), nn.ReLU(inplace=True))
        self.residual = nn.Sequential(
            *_conv_norm(before, after, 3, stride),
            nn.ReLU(inplace=True),
            nn.Conv2d(after, after, 3, padding=1, bias=False),
        )
        self.shortcut = nn.Conv2d(before, after, 1, stride, bias=False) if before != after else None

    def forward(self, x: Tensor) -> Tensor:
        active = self.activation(x)
        return self.residual(active) + (x if self.shortcut is None else self.shortcut(active))


def _conv_norm(before: int, after: int, size: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(before, after, size, stride, padding=size // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(after)]


def _classifier(channels: int, num_classes: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes)]


def _drawn(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model
