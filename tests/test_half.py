"""Weights in half precision: the rounding of NumPy, what is left as it is, and files that are smaller for it."""

from io import BytesIO

import numpy as np
import pytest
import torch

from samlib import models
from samlib.half import ERROR, halved, in_half, is_half
from samlib.spec import ModelSpec


def file_of(state):
    file = BytesIO()
    torch.save(state, file)
    return file.getvalue()


def read(content):
    return torch.load(BytesIO(content), weights_only=True)


@pytest.fixture
def network():
    """A network whose batch norms have seen images."""
    generator = torch.Generator().manual_seed(0)
    model = models.build(ModelSpec(width=32), (1, 8, 8), 10, generator)
    model.train()(torch.randn(16, 1, 8, 8, generator=generator))
    return model


def test_weights_are_rounded_as_numpy_rounds_them_and_the_statistics_are_not(network):
    state = network.state_dict()
    found = in_half(state)
    assert list(found) == list(state)
    parameters = dict(network.named_parameters())
    assert parameters.keys() < state.keys()
    for name, tensor in state.items():
        if name in parameters:
            expected = tensor.numpy().astype(np.float16)
            assert found[name].dtype == torch.float16
            assert np.array_equal(found[name].numpy(), expected)
        else:
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor)
    assert is_half([state, found])
    assert not is_half([state, state])


def test_the_largest_error_is_half_a_unit_in_the_last_of_eleven_bits():
    w = torch.logspace(-14, 15, 100_001, base=2)
    error = (in_half({"w": w})["w"].float() - w) / w
    assert 0.99 * ERROR < error.abs().max() <= ERROR


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([65504.0, 1.0], torch.float16),
        ([65520.0, 1.0], torch.float32),  # rounds to infinity
        ([1.0, 1e-9], torch.float16),  # 0 beside 1 is lost in the last bits of the tensor
        ([3e-8, 1e-9], torch.float32),
        ([1e-6, 3e-6], torch.float32),  # below 6e-5 there are fewer bits
        ([0.0, 0.0], torch.float16),
        ([float("nan"), 1.0], torch.float32),
        ([float("inf"), 1.0], torch.float32),
    ],
    ids=str,
)
def test_a_tensor_that_float16_does_not_hold_stays_as_it_is(values, dtype):
    w = torch.tensor(values)
    found = in_half({"w": w, "other": torch.tensor([0.1])})
    assert found["w"].dtype == dtype
    assert found["other"].dtype == torch.float16
    if dtype == torch.float32:
        assert torch.equal(found["w"].nan_to_num(), w.nan_to_num())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool])
def test_other_types_stay_as_they_are(dtype):
    w = torch.tensor([0, 1]).to(dtype)
    found = in_half({"w": w})["w"]
    assert found.dtype == dtype
    assert torch.equal(found, w)


def test_a_file_takes_half_the_room_and_its_bytes_repeat(network):
    content = file_of(network.state_dict())
    half = halved(content)
    assert len(half) < 0.6 * len(content)
    assert half == halved(content)
    assert is_half([read(half)])
    assert all(torch.equal(a, b) for a, b in zip(read(halved(half)).values(), read(half).values(), strict=True))


def test_views_leave_the_buffer_they_are_cut_from_behind():
    """The weights of a flat optimiser are such views, and a file holds whole storages."""
    buffer = torch.full((100_000,), 0.5)
    state = {"w": buffer[:4], "large": buffer[4:8] * 1e6, "running_mean": buffer[8:12]}
    state["kept"] = torch.full((100_000,), 1e6)[:4]
    assert len(halved(file_of(state))) < 5000
    kept = read(halved(file_of(state)))
    assert {name: tensor.dtype for name, tensor in kept.items()} == {
        "w": torch.float16,
        "large": torch.float32,
        "running_mean": torch.float32,
        "kept": torch.float32,
    }
