"""The exact checks behind the page "What does one step of SAM do?": what two papers prove, computed in float64.

| check | claim | source |
|---|---|---|
| `dual_norm` | the closed-form perturbation maximises <eps, g> over the p-ball | foret2021, equation 2 |
| `one_shard` | one shard is SAM; m shards average m independent ascents | behdin2023, equations 4 to 6 |
| `effective_jacobian` | the mean linear operator grows from SGD to SAM to mSAM | behdin2023, Lemma 3.4, Theorem 3.1 |
| `edge_of_stability` | at the edge of stability mSAM is flattest, then SAM, then SGD | behdin2023, Theorem 3.2 |

Each check takes plain values and a seed for its random numbers and returns numbers; whether they support the claim is
decided by the rules in `samlib.rules`. Each compares `samlib.optim` with something that does not use it. The theory of
behdin2023 leaves the division by the gradient norm out (errata E-M5), so the last two checks use `normalize=False`.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from inspect import signature
from itertools import combinations

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linprog, minimize
from torch import Tensor

from samlib.errors import InputError
from samlib.optim import SAM
from samlib.perturbation import perturbation


def run(check: str, settings: dict[str, str | int | float], seed: int) -> dict[str, float]:
    """The values of one check.

    Args:
        check: "dual_norm", "one_shard", "effective_jacobian" or "edge_of_stability".
        settings: the arguments of that function by name, without the seed.
        seed: of every random number in it.

    Raises:
        InputError: an unknown check, a setting that it does not have or needs, or a value that it does not know.
    """
    if check not in CHECKS:
        raise InputError(f"check: {check!r} is unknown; choose one of {', '.join(CHECKS)}")
    wanted = sorted(set(signature(CHECKS[check]).parameters) - {"seed"})
    if sorted(settings) != wanted:
        raise InputError(f"settings of {check}: {sorted(settings)} given, {wanted} needed; name exactly these")
    return CHECKS[check](**settings, seed=seed)


# --------------------------------------------------------------------------------------- foret2021, equation 2


def dual_norm(p: float | str, *, seed: int) -> dict[str, float]:
    """Compare the closed form of eps = argmax {<eps, g> : ||eps||_p <= rho} with a numerical maximum.

    The gradient is 15 Gaussian numbers in three tensors, which share one norm; the radius is random as well.

    Args:
        p: norm of the ball, 1 < p <= inf, a number or its name ("1.5", "inf").
        seed: of the gradient, the radius and the start of the maximisation.

    Returns:
        relative_gap = |<eps, g> - best| / best; norm_ratio = ||eps||_p / rho.
    """
    p = _exponent(p)
    rng = np.random.default_rng(seed)
    g, rho = rng.standard_normal(15), rng.uniform(0.05, 2.0)
    matrix, vector, number = torch.from_numpy(g).split([8, 6, 1])
    tensors = [matrix.view(2, 4), vector, number.view(())]
    eps = torch.cat([e.flatten() for e in perturbation(tensors, tensors, rho, p=p)]).numpy()
    best = rho * g @ maximiser(g, p, rng)
    return {"relative_gap": float(abs(eps @ g - best) / best), "norm_ratio": float(np.linalg.norm(eps, p) / rho)}


def maximiser(g: np.ndarray, p: float, rng: np.random.Generator) -> np.ndarray:
    """The e in the unit p-ball with the largest <e, g>, found by a solver that does not know the closed form.

    p = inf is a linear program (HiGHS); a finite p is a smooth convex problem (SLSQP from a random interior point).
    """
    if p == math.inf:
        return linprog(-g, bounds=(-1, 1)).x
    ball = {
        "type": "ineq",
        "fun": lambda e: 1 - np.sum(np.abs(e) ** p),
        "jac": lambda e: -p * np.sign(e) * np.abs(e) ** (p - 1),
    }
    start = rng.uniform(-0.5, 0.5, len(g)) / len(g)
    options = {"ftol": 1e-15, "maxiter": 1000}
    e = minimize(lambda e: -g @ e, start, jac=lambda e: -g, constraints=ball, method="SLSQP", options=options).x
    return e / max(1, np.linalg.norm(e, p))  # what the solver's tolerance let stick out of the ball


def _exponent(p: float | str) -> float:
    try:
        value = float(p)
    except ValueError:
        value = math.nan
    if not value > 1:
        raise InputError(f"p: {p!r} is not a norm of this check; give 1 < p <= inf")
    return value


# --------------------------------------------------------------------------------------- behdin2023, equations 4 to 6


def one_shard(*, seed: int) -> dict[str, float]:
    """Compare one mSAM update with one shard to SAM, and with three shards to the mean of three separate ascents.

    A stateless two-layer network (no batch norm), 12 examples, rho 0.1, learning rate 0.1.

    Returns:
        max_relative_difference: of the update with `step([closure])` from that with `step(closure)`, and from SAM
        written out in three lines. mean_of_ascents_difference: of the update with three shards from the mean of three
        such SAM updates, one per shard. Both as max |a - b| / max |b|.
    """
    rng = torch.Generator().manual_seed(seed)
    weights = [torch.randn(shape, generator=rng, dtype=torch.float64) for shape in [(5, 8), (8,), (8, 3)]]
    x, y = torch.randn(12, 5, generator=rng, dtype=torch.float64), torch.randint(3, (12,), generator=rng)
    rho, lr = 0.1, 0.1
    optimizer = partial(SAM, base_optimizer=torch.optim.SGD, rho=rho, lr=lr)
    whole = partial(_network_loss, x=x, y=y)
    shards = [partial(_network_loss, x=x[i], y=y[i]) for i in torch.randperm(12, generator=rng).split(4)]

    one = _update(optimizer, weights, [whole])
    separate = [_sam_by_hand(weights, shard, rho, lr) for shard in shards]
    return {
        "max_relative_difference": max(
            _difference(one, _update(optimizer, weights, whole)),
            _difference(one, _sam_by_hand(weights, whole, rho, lr)),
        ),
        "mean_of_ascents_difference": _difference(_update(optimizer, weights, shards), sum(separate) / 3),
    }


def _network_loss(weights: Sequence[Tensor], x: Tensor, y: Tensor) -> Tensor:
    hidden = torch.tanh(x @ weights[0] + weights[1])
    return F.cross_entropy(hidden @ weights[2], y)


def _sam_by_hand(weights: Sequence[Tensor], loss: Callable, rho: float, lr: float) -> Tensor:
    """-lr * grad L(w + rho g / ||g||), without the optimiser; flat."""
    g = _flat_gradient(loss, weights)
    eps = (rho * g / g.norm()).split([w.numel() for w in weights])
    return -lr * _flat_gradient(loss, [w + e.view_as(w) for w, e in zip(weights, eps, strict=True)])


def _flat_gradient(loss: Callable, weights: Sequence[Tensor]) -> Tensor:
    leaves = [w.clone().requires_grad_() for w in weights]
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss(leaves), leaves)])


def _difference(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


# --------------------------------------------------------------------------------------- behdin2023, Lemma 3.4


def effective_jacobian(*, seed: int) -> dict[str, float]:
    """Compare the mean linear operators J of one step, w <- (I - lr J) w, on a quadratic loss.

    Six examples with random positive semi-definite Hessians H_i of rank 2 in 4 dimensions. All 15 batches of four are
    equally likely, and for mSAM all 3 cuts of a batch into two shards of two. With H_S the mean over a batch or a
    shard S,

        J_SGD = E H_B,    J_SAM = E H_B (I + rho H_B),    J_mSAM = E H_S (I + rho H_S).

    Since E H_S = E H_B, they differ by rho E H_B^2 and by rho (E H_S^2 - E H_B^2), both positive semi-definite: the
    second because H_B is the mean of its shards and squaring is operator convex. J is measured by stepping the real
    optimisers from every basis vector.

    Returns:
        min_eigenvalue_sam_minus_sgd and min_eigenvalue_msam_minus_sam: smallest eigenvalues of the differences of the
        measured J. formula_error: largest |measured - formula| entry of the three, relative to the largest entry of J,
        with the expectations taken from moments (`mean_operator`) and not by enumeration.
    """
    rng = torch.Generator().manual_seed(seed)
    factors = torch.randn(6, 4, 2, generator=rng, dtype=torch.float64)
    hessians, rho = factors @ factors.mT, 0.3
    batches = [list(batch) for batch in combinations(range(6), 4)]
    cuts = [cut for batch in batches for cut in _halves(batch)]
    sgd = _mean_step(hessians, partial(torch.optim.SGD, lr=1.0), batches)
    unnormalised = partial(SAM, base_optimizer=torch.optim.SGD, rho=rho, normalize=False, lr=1.0)
    sam = _mean_step(hessians, unnormalised, batches)
    msam = _mean_step(hessians, unnormalised, cuts)
    formulae = [mean_operator(hessians, 4, 0.0), mean_operator(hessians, 4, rho), mean_operator(hessians, 2, rho)]
    return {
        "min_eigenvalue_sam_minus_sgd": _eigenvalues(sam - sgd)[0].item(),
        "min_eigenvalue_msam_minus_sam": _eigenvalues(msam - sam)[0].item(),
        "formula_error": max(_difference(*pair) for pair in zip([sgd, sam, msam], formulae, strict=True)),
    }


def mean_operator(hessians: Tensor, size: int, rho: float) -> Tensor:
    """E [H_S (I + rho H_S)] for S a uniformly random subset of `size` of the n examples; a shard of a batch is one.

    From the moments: E H_S^2 = M / size + (1 - 1/size) (n H^2 - M) / (n - 1), where H is the mean of the per-example
    Hessians (n, d, d) and M that of their squares, since (n H^2 - M) / (n - 1) is the mean of H_i H_j over i != j.
    """
    n, mean = len(hessians), hessians.mean(0)
    squares = torch.einsum("nij,njk->ik", hessians, hessians) / n
    pairs = (n * mean @ mean - squares) / (n - 1)
    return mean + rho * (squares / size + (1 - 1 / size) * pairs)


def _mean_step(hessians: Tensor, optimizer: Callable, batches: Sequence) -> Tensor:
    """J = I - W1 at learning rate 1, averaged over `batches`; the columns of W = I are all basis vectors at once."""
    identity = torch.eye(hessians.shape[-1], dtype=hessians.dtype)
    updates = [_update(optimizer, [identity], _quadratic_losses(hessians, batch)) for batch in batches]
    return -torch.stack(updates).mean(0).view_as(identity)


def _quadratic_losses(hessians: Tensor, batch: Sequence) -> Callable | list[Callable]:
    """The loss 1/2 tr W' H W of a batch of examples, or those of its shards if it is a batch of shards."""
    if isinstance(batch[0], list):
        return [_quadratic_losses(hessians, shard) for shard in batch]
    mean = hessians[batch].mean(0)
    return lambda weights: 0.5 * (weights[0] * (mean @ weights[0])).sum()


def _halves(batch: list[int]) -> Iterator[list[list[int]]]:
    """The cuts of a batch into two shards of equal size, each once: the first example names its shard."""
    first, rest = batch[0], batch[1:]
    for others in combinations(rest, len(batch) // 2 - 1):
        yield [[first, *others], [i for i in rest if i not in others]]


def _eigenvalues(matrix: Tensor) -> Tensor:
    """Eigenvalues of the symmetric part, ascending; NaN if an entry is not finite."""
    if not matrix.isfinite().all():
        return torch.full(matrix.shape[:1], math.nan)
    return torch.linalg.eigvalsh((matrix + matrix.mT) / 2)


# --------------------------------------------------------------------------------------- behdin2023, Theorem 3.2

EXAMPLES, FEATURES = 32, 64
BATCH_SIZE, SHARD_SIZE = 16, 4
STEPS = 400
MEASURED = range(205, STEPS + 1, 15)  # an odd distance, since the oscillation at the edge has period two
BEYOND_THE_LIMIT = 1.5  # curvature of the start in units of SGD's limit 2 / lr at the last step
FIRST_LR = 0.25  # step sizes and rho in units of the last step size
RHO = 0.5


def edge_of_stability(method: str, *, seed: int) -> dict[str, float]:
    """Train a toy regression along the edge of stability of `method` and measure the curvature it has there.

    Model: f(x) = sum_j u_j v_j x_j, a diagonal two-layer linear network with 128 weights for 32 examples, squared loss.
    The labels come from such a network, so the loss can be zero, and it is on a continuum of weights: (c u, v / c) fits
    as well as (u, v) and is sharper the less balanced it is. The start, u = 1 and v = 0, is unbalanced and sharp.

    A minimum is linearly stable in the mean if the top eigenvalue of the method's mean operator J (`mean_operator`) is
    at most 2 / lr. The step size grows slowly, to where the start is unstable. Beyond the limit the fit oscillates,
    which takes |u^2 - v^2| and with it the curvature down until the limit holds again: the curvature follows the
    falling limit, in bursts around it. Over whole bursts the oscillation neither grows nor shrinks, so it is the mean
    along the way that sits at the limit; hence the averages over the second half of the run.

    The constants come from theory. `BEYOND_THE_LIMIT` > 1, so that even SGD has to move. `RHO`: at SGD's last limit
    rho lambda = 1, so that for noise-free batches lambda + rho lambda^2 = 2 / lr puts SAM at 0.62 of SGD. `FIRST_LR`:
    about where the start ceases to be stable for SAM, by the same equation at 0.27. Inputs have mean and variance 1, so
    that an example has curvature which the batch averages out and E H_S^2 exceeds E H_B^2.
    Sizes, the growth of the step size and the averaging were settled by how closely runs follow their own limit, on
    seeds from 1000 on; seeds 0 to 19, the study's, had not been run before. The methods share data, start, batches and
    step sizes.

    Args:
        method: "sgd", "sam" or "msam" (4 shards of 4 examples in each random batch of 16).
        seed: of data, labels and batches.

    Returns:
        Means over the steps `MEASURED`: lambda_max, the top Hessian eigenvalue of the full loss; edge_ratio, lr / 2
        times the top eigenvalue of J, 1 at the edge; loss, the full loss; stability_limit = 2 / lr, the limit of
        lambda_max for SGD. NaN if the run diverges.

    Raises:
        InputError: another method.
    """
    if method not in ("sgd", "sam", "msam"):
        raise InputError(f"method: {method!r} is unknown; choose sgd, sam or msam")
    rng = torch.Generator().manual_seed(seed)
    x, y, start = _regression(rng)
    last_lr = BEYOND_THE_LIMIT * 2 / _eigenvalues(example_hessians(start, x, y).mean(0))[-1].item()
    rho = 0.0 if method == "sgd" else RHO * last_lr
    shard_size = SHARD_SIZE if method == "msam" else BATCH_SIZE
    trajectory = _trajectory(start, x, y, last_lr, rho, shard_size, rng)
    values = [_at_the_edge(w, x, y, lr, rho, shard_size) for w, lr in trajectory]
    names = ("lambda_max", "edge_ratio", "loss", "stability_limit")
    return dict(zip(names, np.mean(values, axis=0).tolist(), strict=True))


def _trajectory(
    start: Tensor, x: Tensor, y: Tensor, last_lr: float, rho: float, shard_size: int, rng: torch.Generator
) -> Iterator[tuple[Tensor, float]]:
    """The weights and step size after each step in `MEASURED`; fresh random batches, one ascent per shard."""
    w = start.clone().requires_grad_()
    optimizer = SAM([w], torch.optim.SGD, rho, normalize=False, lr=last_lr)  # rho = 0 is SGD, bit for bit
    for step in range(1, STEPS + 1):
        lr = optimizer.param_groups[0]["lr"] = last_lr * (FIRST_LR + (1 - FIRST_LR) * step / STEPS)
        batch = torch.randperm(EXAMPLES, generator=rng)[:BATCH_SIZE]
        losses = [partial(_diagonal_loss, x=x[shard], y=y[shard]) for shard in batch.split(shard_size)]
        optimizer.step([_closure(optimizer, [w], loss) for loss in losses])
        if step in MEASURED:
            yield w.detach(), lr


def _at_the_edge(
    w: Tensor, x: Tensor, y: Tensor, lr: float, rho: float, shard_size: int
) -> tuple[float, float, float, float]:
    """lambda_max, edge_ratio, loss and stability_limit of one point of the run."""
    hessians = example_hessians(w, x, y)
    lambda_max = _eigenvalues(hessians.mean(0))[-1].item()
    edge_ratio = lr / 2 * _eigenvalues(mean_operator(hessians, shard_size, rho))[-1].item()
    return lambda_max, edge_ratio, _diagonal_loss([w], x, y).item(), 2 / lr


def _regression(rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs (n, d) around a common mean, labels of a linear teacher, and the unbalanced start w = (u, v) = (1, 0)."""
    x = 1.0 + torch.randn(EXAMPLES, FEATURES, generator=rng, dtype=torch.float64)
    teacher = 0.3 * torch.randn(FEATURES, generator=rng, dtype=torch.float64)
    return x, x @ teacher, torch.stack([torch.ones_like(teacher), torch.zeros_like(teacher)])


def _diagonal_loss(weights: Sequence[Tensor], x: Tensor, y: Tensor) -> Tensor:
    """1/2 mean (f(x) - y)^2 with f(x) = <x, u v> and weights = [w], the rows of w being u and v."""
    return 0.5 * (x @ weights[0].prod(0) - y).square().mean()


def example_hessians(w: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Hessians (n, 2d, 2d) of 1/2 (f(x_i) - y_i)^2 in (u, v): grad f grad f' plus the residual times the Hessian of f.

    grad f = (v x, u x), and the Hessian of f has diag(x) in its two off-diagonal blocks.
    """
    u, v = w
    slopes, residuals = torch.cat([x * v, x * u], 1), x @ (u * v) - y
    cross = torch.diag_embed(residuals[:, None] * x)
    zero = torch.zeros_like(cross)
    blocks = torch.cat([torch.cat([zero, cross], 2), torch.cat([cross, zero], 2)], 1)
    return slopes[:, :, None] * slopes[:, None, :] + blocks


# --------------------------------------------------------------------------------------- steps of the real optimisers


def _update(optimizer: Callable, weights: Sequence[Tensor], losses: Callable | list[Callable]) -> Tensor:
    """What one step adds to the weights, flat. `losses`: one function of the weights, or a list with one per shard."""
    w = [t.clone().requires_grad_() for t in weights]
    opt = optimizer(w)
    if isinstance(losses, list):
        opt.step([_closure(opt, w, loss) for loss in losses])
    else:
        opt.step(_closure(opt, w, losses))
    return torch.cat([(new.detach() - old).flatten() for new, old in zip(w, weights, strict=True)])


def _closure(optimizer: torch.optim.Optimizer, weights: Sequence[Tensor], loss: Callable) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(weights)
        value.backward()
        return value

    return closure


CHECKS = {
    "dual_norm": dual_norm,
    "one_shard": one_shard,
    "effective_jacobian": effective_jacobian,
    "edge_of_stability": edge_of_stability,
}
