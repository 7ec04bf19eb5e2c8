"""The networks of the bench, each with three random batches on the device, taken in turn."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from samlib import models

WIDTH, DEPTH = 32, 202  # of the MLP: two tensors a layer
NUM_CLASSES = 10
BATCHES = 3


def mlp404() -> nn.Module:
    """202 linear layers of width 32 with ReLU between them, 212,586 parameters in 404 tensors: all overhead.

    Weights from N(0, 2 / 32), so that neither signal nor gradient dies out over the depth.
    """
    layers: list[nn.Module] = []
    for index in range(DEPTH):
        linear = nn.Linear(WIDTH, WIDTH if index < DEPTH - 1 else NUM_CLASSES)
        nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "MLP-404": mlp404,
    "ResNet-20": models.resnet20,
    "MobileNetV2": models.mobilenet_v2,
    "ResNet-18": models.resnet18,
    "WRN-28-10": models.wrn28_10,
}


class Workload:
    """A network and its batches.

    Attributes:
        model: the module whose parameters are trained.
        inputs, targets: the present batch; `next_batch` moves on to the next of three.
    """

    def __init__(
        self, network: str, batch: int, device: torch.device, dtype: torch.dtype, *, compiled: bool = False
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.model = NETWORKS[network]().to(device, dtype)
        self._forward = torch.compile(self.model) if compiled else self.model
        shape = (batch, WIDTH) if network == "MLP-404" else (batch, 3, 32, 32)
        self._batches = [
            (
                torch.randn(shape, generator=generator).to(device, dtype),
                torch.randint(NUM_CLASSES, (batch,), generator=generator).to(device),
            )
            for _ in range(BATCHES if batch else 0)
        ]
        self._index = 0

    @property
    def params(self) -> list[Tensor]:
        return list(self.model.parameters())

    @property
    def batch(self) -> tuple[Tensor, Tensor]:
        return self._batches[self._index]

    def next_batch(self) -> None:
        self._index = (self._index + 1) % len(self._batches)

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self._forward(inputs), targets)

    def backward(self) -> Tensor:
        """Forward and backward on the present batch."""
        loss = self.loss(*self.batch)
        loss.backward()
        return loss

    def shards(self, num_shards: int) -> list[tuple[Tensor, Tensor]]:
        """The present batch in equal parts."""
        inputs, targets = self.batch
        return list(zip(inputs.chunk(num_shards), targets.chunk(num_shards), strict=True))
