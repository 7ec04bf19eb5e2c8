"""Tails of weights: against the textbook formula, the distributions they are named after, and by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from samlib import models, train
from samlib.errors import InputError
from samlib.measures import first_layer, weight_histogram, weight_tails
from samlib.spec import DataSpec, MeasureSpec, ModelSpec, RunSpec, TrainSpec
from samlib.store import Store

FACTOR = st.sampled_from([-1000.0, -0.5, 1e-3, 3.0])


def drawn(size, seed=0, law="standard_normal"):
    return torch.from_numpy(getattr(np.random.default_rng(seed), law)(size=size))


def kurtosis_by_hand(w):
    """G2 of Joanes and Gill 1998, from the sums of powers."""
    n, d = len(w), w - w.mean()
    g2 = n * (d**4).sum() / (d**2).sum() ** 2 - 3
    return (n - 1) / ((n - 2) * (n - 3)) * ((n + 1) * g2 + 6)


@pytest.mark.parametrize("size", [4, 5, 72, 1000])
def test_kurtosis_is_the_corrected_one(size):
    w = drawn(size)
    assert weight_tails(w)["kurtosis"] == pytest.approx(kurtosis_by_hand(w.numpy()), rel=1e-10)


def test_kurtosis_of_five_weights_by_hand():
    """-2, -1, 0, 1, 2: m2 = 2, m4 = 34/5, g2 = -1.3, G2 = 4/6 * (6 * -1.3 + 6) = -1.2."""
    assert weight_tails(torch.tensor([-2.0, -1, 0, 1, 2]))["kurtosis"] == pytest.approx(-1.2)


@pytest.mark.parametrize(
    ("law", "kurtosis", "ratio"),
    [
        ("standard_normal", 0.0, 2.8070 / 1.1503),
        ("random", -1.2, None),
        ("laplace", 3.0, math.log(200) / math.log(4)),
    ],
)
def test_many_weights_have_the_tails_of_their_law(law, kurtosis, ratio):
    """The means of 200 samples, within four of their standard errors."""
    samples = [drawn(2000, seed, law) for seed in range(200)]
    found = {name: np.array([weight_tails(w)[name] for w in samples]) for name in ("kurtosis", "quantile_ratio")}
    for name, expected in (("kurtosis", kurtosis), ("quantile_ratio", ratio)):
        if expected is not None:
            error = found[name].std() / math.sqrt(len(samples))
            assert found[name].mean() == pytest.approx(expected, abs=4 * error + 0.01)


def test_the_correction_takes_the_bias_of_small_samples_away():
    """72 normal weights, as in the first convolution of the small network: 0, not the -0.08 of the plain moments."""
    found = np.array([weight_tails(drawn(72, seed))["kurtosis"] for seed in range(2000)])
    assert found.mean() == pytest.approx(0, abs=4 * found.std() / math.sqrt(len(found)))
    assert found.std() / math.sqrt(len(found)) < 0.015


def test_quantiles_and_range_by_hand():
    found = weight_tails(torch.tensor([[1.0, -2.0], [3.0, -4.0], [5.0, 0.0]]))
    assert found["quantile_ratio"] == pytest.approx(4.975 / 3.75)  # of 0, 1, 2, 3, 4, 5 at 0.995 and 0.75
    assert found["sd"] == pytest.approx(np.std([1, -2, 3, -4, 5, 0], ddof=1))
    assert found["range"] == pytest.approx(9 / found["sd"])
    assert found["weights"] == 6


@given(FACTOR)
def test_the_scale_and_the_sign_of_the_weights_do_not_matter(factor):
    plain, scaled = weight_tails(drawn(72)), weight_tails(factor * drawn(72))
    for name in ("kurtosis", "quantile_ratio", "range"):
        assert scaled[name] == pytest.approx(plain[name], rel=1e-9)
    assert scaled["sd"] == pytest.approx(abs(factor) * plain["sd"])


def test_half_precision_weights_are_measured_in_double():
    w = drawn(500).to(torch.bfloat16)
    assert weight_tails(w) == weight_tails(w.double())


@pytest.mark.parametrize("w", [torch.full((8,), 0.1), torch.tensor([1.0, 2, math.nan, 3]), torch.zeros(5)])
def test_weights_without_spread_or_not_finite_have_no_tails(w):
    found = weight_tails(w)
    assert all(math.isnan(found[name]) for name in ("kurtosis", "quantile_ratio", "range"))
    assert sum(weight_histogram(w)["count"]) == 0


def test_weights_that_are_nearly_all_zero_have_no_ratio():
    found = weight_tails(torch.tensor([0.0, 0, 0, 0, 0, 0, 0, 1]))
    assert math.isnan(found["quantile_ratio"])
    assert found["kurtosis"] > 0


@pytest.mark.parametrize("measure", [weight_tails, weight_histogram])
def test_too_few_weights_are_refused(measure):
    with pytest.raises(InputError, match="weights: 3 are too few to have tails, use at least 4"):
        measure(torch.tensor([1.0, 2, 3]))


def test_the_histogram_counts_every_weight_once_in_standard_deviations():
    w = drawn(72).reshape(8, 1, 3, 3)
    found = weight_histogram(w)
    z = (w / w.std()).flatten()
    expected = [int(((z >= a) & (z < b)).sum()) for a, b in zip(found["left"], found["right"], strict=True)]
    assert found["count"] == expected
    assert sum(found["count"]) == 72
    assert found["left"][1:] == found["right"][:-1]
    assert (found["left"][0], found["right"][-1]) == (-8, 8)
    assert weight_histogram(100 * w) == found


def test_weights_beyond_the_last_edge_are_counted_there():
    w = torch.cat([drawn(400), torch.tensor([1e6, -1e6])])  # some 14 standard deviations out
    found = weight_histogram(w)
    assert (found["count"][0], found["count"][-1], sum(found["count"])) == (1, 1, 402)


@pytest.mark.parametrize("norm", ["none", "batch", "group"])
def test_the_first_layer_is_the_first_convolution(norm):
    network = models.build(ModelSpec(norm=norm), (1, 8, 8), 10, torch.Generator())
    weights = list(network.parameters())
    assert first_layer(weights) is network[0].weight
    assert network[0].weight.numel() == 72
    assert first_layer(weights[1:]) is not network[0].weight


def test_a_network_without_such_a_layer_is_refused():
    with pytest.raises(InputError, match="no tensor has two axes"):
        first_layer([torch.ones(3), torch.ones(4)])


def test_the_measure_of_a_trained_model_is_that_of_its_weights(tmp_path):
    run = RunSpec(DataSpec(train_size=40), ModelSpec(norm="none"), train=TrainSpec(epochs=1, batch_size=20))
    store = Store(tmp_path, writable=True)
    parent = train.run(run, store, "cpu")
    record = train.run(MeasureSpec(parent.key, "first_layer_kurtosis"), store, "cpu")
    weights = torch.load(store.weights_path(parent.key), weights_only=True)["0.weight"]
    assert (record.status, record.measures["weights"]) == ("done", 72)
    assert record.measures["first_layer_kurtosis"] == pytest.approx(
        kurtosis_by_hand(weights.double().flatten().numpy())
    )
    assert record.table == weight_histogram(weights)
    assert store.load(record.key).measures["quantile_ratio"] == pytest.approx(record.measures["quantile_ratio"])
