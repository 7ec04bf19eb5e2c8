"""Models: sizes, shapes, and initial weights that depend on their own generator only."""

import pytest
import torch

from samlib import data, models
from samlib.spec import ModelSpec


def build(seed=0, channels=1, **fields):
    return models.build(ModelSpec(**fields), channels, 10, data.generator(seed, "init"))


@pytest.mark.parametrize(("norm", "parameters"), [("batch", 7234), ("group", 7234), ("none", 7178)])
def test_parameter_counts(norm, parameters):
    assert sum(p.numel() for p in build(norm=norm).parameters()) == parameters


@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 32), (3, 5)])
def test_output_shape(channels, size):
    assert build(channels=channels)(torch.zeros(4, channels, size, size)).shape == (4, 10)


def test_no_norm_means_none():
    kinds = {type(module).__name__ for module in build(norm="none").modules()}
    assert not {name for name in kinds if "Norm" in name}


def test_dropout_is_there_only_if_asked_for():
    assert not [m for m in build().modules() if isinstance(m, torch.nn.Dropout)]
    assert [m.p for m in build(dropout=0.25).modules() if isinstance(m, torch.nn.Dropout)] == [0.25]


def test_initial_weights_come_from_the_generator_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = build(seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    for a, b in zip(one.parameters(), build(seed=3).parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(next(one.parameters()), next(build(seed=4).parameters()))
