"""The checks behind sam_by_hand: their own oracles, and that they would notice a wrong answer. Seeds from 1000 on."""

import itertools
import math

import numpy as np
import pytest
import torch

from samlib import checks
from samlib.errors import InputError
from samlib.optim import SAM

SEEDS = (1000, 1001, 1002)
METHODS = ("sgd", "sam", "msam")


class TestRun:
    @pytest.mark.parametrize(
        ("check", "settings", "columns"),
        [
            ("dual_norm", {"p": "inf"}, {"relative_gap", "norm_ratio"}),
            ("one_shard", {}, {"max_relative_difference", "mean_of_ascents_difference"}),
            (
                "effective_jacobian",
                {},
                {"min_eigenvalue_sam_minus_sgd", "min_eigenvalue_msam_minus_sam", "formula_error"},
            ),
            ("edge_of_stability", {"method": "sgd"}, {"lambda_max", "edge_ratio", "loss", "stability_limit"}),
        ],
    )
    def test_values_are_plain_finite_floats_and_the_same_for_the_same_seed(self, check, settings, columns):
        values = checks.run(check, settings, 1000)
        assert set(values) == columns
        assert all(type(value) is float and math.isfinite(value) for value in values.values())
        assert checks.run(check, settings, 1000) == values

    @pytest.mark.parametrize(
        ("check", "settings", "message"),
        [
            ("dual_nrom", {}, "check: 'dual_nrom' is unknown"),
            ("one_shard", {"p": 2}, r"settings of one_shard: \['p'\] given, \[\] needed"),
            ("dual_norm", {}, r"settings of dual_norm: \[\] given, \['p'\] needed"),
            ("dual_norm", {"p": "two"}, "p: 'two'"),
            ("dual_norm", {"p": 1.0}, r"p: 1\.0"),
            ("edge_of_stability", {"method": "adam"}, "method: 'adam' is unknown"),
        ],
    )
    def test_bad_input_is_named(self, check, settings, message):
        with pytest.raises(InputError, match=message):
            checks.run(check, settings, 1000)


class TestDualNorm:
    @pytest.mark.parametrize("seed", SEEDS)
    @pytest.mark.parametrize("p", ["1.5", "2", "4", "inf", 1.2, 10.0])
    def test_closed_form_is_the_maximum(self, p, seed):
        values = checks.dual_norm(p, seed=seed)
        assert values["relative_gap"] < 1e-9
        assert values["norm_ratio"] == pytest.approx(1, abs=1e-12)

    @pytest.mark.parametrize("p", [1.5, 2, 4, math.inf])
    def test_maximiser_agrees_with_an_exhaustive_search_in_two_dimensions(self, p):
        g, rng = np.array([0.3, -1.2]), np.random.default_rng(0)
        angle = np.linspace(0, 2 * np.pi, 200_001)
        circle = np.stack([np.cos(angle), np.sin(angle)])
        top = (g @ circle / np.linalg.norm(circle, p, axis=0)).max()
        found = checks.maximiser(g, p, rng)
        assert g @ found == pytest.approx(top, rel=1e-8)
        assert np.linalg.norm(found, p) <= 1 + 1e-12

    @pytest.mark.parametrize("p", ["1.5", "4", "inf"])
    def test_the_euclidean_perturbation_would_be_found_out(self, p, monkeypatch):
        def euclidean(weights, grads, rho, *, p):
            norm = torch.cat([g.flatten() for g in grads]).norm()
            return [rho * g / norm for g in grads]

        monkeypatch.setattr(checks, "perturbation", euclidean)
        values = checks.dual_norm(p, seed=1000)
        assert values["relative_gap"] > 1e-2
        assert abs(values["norm_ratio"] - 1) > 1e-2


class TestOneShard:
    @pytest.mark.parametrize("seed", SEEDS)
    def test_identities_hold_to_rounding(self, seed):
        assert max(checks.one_shard(seed=seed).values()) < 1e-12

    def test_another_radius_would_be_found_out(self, monkeypatch):
        by_hand = checks._sam_by_hand
        monkeypatch.setattr(checks, "_sam_by_hand", lambda w, loss, rho, lr: by_hand(w, loss, 1.01 * rho, lr))
        assert min(checks.one_shard(seed=1000).values()) > 1e-6


class TestEffectiveJacobian:
    @pytest.mark.parametrize("seed", SEEDS)
    def test_operators_grow_and_follow_the_formulae(self, seed):
        values = checks.effective_jacobian(seed=seed)
        assert values["formula_error"] < 1e-13
        # strictly here, since six Hessians of rank 2 span the four dimensions in every batch
        assert values["min_eigenvalue_sam_minus_sgd"] > 1e-3
        assert values["min_eigenvalue_msam_minus_sam"] > 1e-3

    @pytest.mark.parametrize("size", [1, 2, 4, 5])
    def test_mean_operator_is_the_enumerated_mean(self, size):
        factors = torch.randn(5, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1000))
        hessians = factors @ factors.mT
        means = [hessians[list(subset)].mean(0) for subset in itertools.combinations(range(5), size)]
        wanted = sum(h + 0.7 * h @ h for h in means) / len(means)
        torch.testing.assert_close(checks.mean_operator(hessians, size, 0.7), wanted, rtol=1e-13, atol=1e-13)

    def test_halves_are_the_three_cuts_of_four(self):
        cuts = [sorted(map(sorted, cut)) for cut in checks._halves([3, 5, 6, 9])]
        assert sorted(cuts) == [[[3, 5], [6, 9]], [[3, 6], [5, 9]], [[3, 9], [5, 6]]]

    def test_normalised_ascent_would_be_found_out(self, monkeypatch):
        """The lemma is about the un-normalised ascent: with the division by the norm the formulae do not hold."""
        monkeypatch.setattr(checks, "SAM", lambda *args, normalize, **kwargs: SAM(*args, **kwargs))
        assert checks.effective_jacobian(seed=1000)["formula_error"] > 1e-3


class TestEdgeOfStability:
    def test_example_hessians_equal_autograd(self):
        x, y, _ = checks._regression(torch.Generator().manual_seed(1000))
        w = torch.randn(2, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1001))
        found = checks.example_hessians(w, x, y)
        for i in (0, 31):

            def loss(flat, i=i):
                return checks._diagonal_loss([flat.view(2, 64)], x[i : i + 1], y[i : i + 1])

            wanted = torch.autograd.functional.hessian(loss, w.flatten())
            torch.testing.assert_close(found[i], wanted, rtol=1e-12, atol=1e-12)

    def test_weights_that_fit_equally_well_differ_in_curvature(self):
        x, y, _ = checks._regression(torch.Generator().manual_seed(1000))
        teacher = torch.linalg.lstsq(x, y).solution
        curvature = []
        for scale in (1.0, 3.0):
            balanced = teacher.abs().sqrt()
            w = torch.stack([scale * balanced, teacher.sign() * balanced / scale])
            assert checks._diagonal_loss([w], x, y) < 1e-20
            curvature.append(checks._eigenvalues(checks.example_hessians(w, x, y).mean(0))[-1])
        assert curvature[1] > 2 * curvature[0]

    @pytest.mark.parametrize("seed", SEEDS[:2])
    def test_runs_sit_at_their_edge_and_order_as_the_theorem_says(self, seed):
        found = {method: checks.edge_of_stability(method, seed=seed) for method in METHODS}
        assert all(0.9 < values["edge_ratio"] < 1.1 for values in found.values())
        assert found["msam"]["lambda_max"] < found["sam"]["lambda_max"] < found["sgd"]["lambda_max"]
        assert len({values["stability_limit"] for values in found.values()}) == 1

    def test_a_run_below_the_edge_is_seen(self, monkeypatch):
        """At step sizes for which the start is stable there is no edge to meet."""
        monkeypatch.setattr(checks, "BEYOND_THE_LIMIT", 0.3)
        assert checks.edge_of_stability("sgd", seed=1000)["edge_ratio"] < 0.5

    def test_a_diverged_run_is_nan(self):
        assert checks._eigenvalues(torch.full((3, 3), math.inf)).isnan().all()
