"""Curvature of the loss: the top eigenvalue of its Hessian, from Hessian-vector products."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
from torch import Tensor

from samlib.errors import InputError
from samlib.measures.loss import WeightLoss, check_count

# Lanczos vectors kept: on small trained networks the top eigenvalue stands alone and 8 need half the products of
# SciPy's default of 20; at initialisation, where it does not, they need no more.
_KRYLOV = 8


def lambda_max(loss: WeightLoss, *, iterations: int = 100, tolerance: float = 1e-3, seed: int = 0) -> dict[str, float]:
    """Largest algebraic eigenvalue of the Hessian of `loss`, with its l2 term and label smoothing if it has them.

    "Largest" has a sign: eigenvalues 1 and -5 give 1. Implicitly restarted Lanczos (ARPACK, through
    `scipy.sparse.linalg.eigsh`) in double precision, on products by double backward in the precision of the model.
    With several batches each product passes over the data again; a single batch keeps its graph and is faster.

    Args:
        loss: the loss as a function of the weights; its batches do not change the result, except in train mode.
        iterations: restarts allowed to Lanczos, each of at most 8 products.
        tolerance: relative residual at which Lanczos stops; the error of the eigenvalue is of second order in it.
        seed: of the starting vector; the same seed gives the same number.

    Returns:
        lambda_max; residual = ||Hv - lambda_max v|| / |lambda_max| of its unit eigenvector, which bounds the relative
        distance to the nearest eigenvalue; products = Hessian-vector products used; converged. lambda_max and residual
        are NaN if the restarts did not suffice or the Hessian is not finite, as for a diverged model.

    Raises:
        InputError: iterations below 1, or a tolerance that is not positive.
    """
    check_count("iterations", iterations)
    if not tolerance > 0:
        raise InputError(f"tolerance: {tolerance!r} is not positive; 1e-3 is usual")
    with loss.measuring():
        product = _HessianProduct(loss)
        try:
            value, vector = _top_pair(product, iterations, tolerance, np.random.default_rng(seed))
            residual = np.linalg.norm(product(vector) - value * vector) / (abs(value) or 1.0)
        except (ArpackNoConvergence, FloatingPointError):
            value = residual = float("nan")
    return {
        "lambda_max": float(value),
        "residual": float(residual),
        "products": product.count,
        "converged": bool(np.isfinite(value)),
    }


class _HessianProduct:
    """v -> Hv on flat double-precision vectors of length `size`; counts its calls."""

    def __init__(self, loss: WeightLoss):
        self.loss = loss
        self.count = 0
        self.sizes = [w.numel() for w in loss.parameters]
        self.size = sum(self.sizes)
        single = loss.batch_size >= len(loss)
        self.kept = list(self._gradients()) if single else None  # several graphs at once could exceed the memory

    def __call__(self, vector: np.ndarray) -> np.ndarray:
        """Hv; FloatingPointError if it is not finite."""
        self.count += 1
        v, total = self._split(vector), [torch.zeros_like(w) for w in self.loss.weights()]
        for gradient in self.kept or self._gradients():
            torch._foreach_add_(total, _product(gradient, self.loss.parameters, v))
        flat = torch.cat([t.flatten() for t in total]).double().cpu().numpy()
        if not np.isfinite(flat).all():
            raise FloatingPointError("the Hessian-vector product is not finite")
        return flat

    def _gradients(self) -> Iterator[Sequence[Tensor]]:
        """The gradient of each term of the loss, with a graph to the weights."""
        with torch.enable_grad():
            for term in self.loss.terms():
                yield torch.autograd.grad(term, self.loss.parameters, create_graph=True, materialize_grads=True)

    def _split(self, vector: np.ndarray) -> list[Tensor]:
        parts = torch.from_numpy(vector.reshape(-1)).split(self.sizes)
        return [part.to(w).view_as(w) for part, w in zip(parts, self.loss.weights(), strict=True)]


def _product(gradient: Sequence[Tensor], weights: Sequence[Tensor], v: Sequence[Tensor]) -> Sequence[Tensor]:
    """d<gradient, v>/dw by a second backward pass; an entry without a graph is constant in w and adds nothing."""
    pairs = [(g, u) for g, u in zip(gradient, v, strict=True) if g.requires_grad]
    if not pairs:
        return [torch.zeros_like(w) for w in weights]
    outputs, directions = zip(*pairs, strict=True)
    return torch.autograd.grad(outputs, weights, directions, retain_graph=True, materialize_grads=True)


def _top_pair(
    product: _HessianProduct, iterations: int, tolerance: float, rng: np.random.Generator
) -> tuple[float, np.ndarray]:
    """Top eigenvalue and its unit eigenvector; ArpackNoConvergence if `iterations` restarts do not suffice."""
    if product.size <= _KRYLOV:  # ARPACK needs more dimensions than vectors it keeps
        values, vectors = np.linalg.eigh(np.stack([product(e) for e in np.eye(product.size)]))
        return values[-1], vectors[:, -1]
    random = rng.standard_normal(product.size)
    start = product(random)  # half a power iteration, and a Hessian of zeros shows before ARPACK trips over it
    if not start.any():
        return 0.0, random / np.linalg.norm(random)
    operator = LinearOperator((product.size, product.size), matvec=product, dtype=np.float64)
    values, vectors = eigsh(operator, 1, which="LA", v0=start, ncv=_KRYLOV, maxiter=iterations, tol=tolerance)
    return values[0], vectors[:, 0]
