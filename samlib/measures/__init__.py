"""Measures of a model's loss surface: plain values in, plain floats out.

::

    loss = WeightLoss(model, inputs, targets)       the loss as a function of the weights
    lambda_max(loss)                                top eigenvalue of its Hessian
    adversarial(loss, rho=0.05, shard_size=128)     rise of the loss at the worst point of a ball
    asymmetry_factors(loss, mus=[5.0])              how unevenly it rises to the two sides of random directions
    acting_perturbation(opt, "bf16")                what is left of an optimiser's perturbation after rounding
    effective_perturbation(w, eps, "bf16")          the same of given weights and eps
    connectivity.train_bend(...), connectivity.along(...)       a path between two sets of weights, and the loss on it
    weight_tails(first_layer(loss.weights()))       how heavy the tails of a layer's weights are
"""

from samlib.measures.asymmetry import asymmetry_factors, random_directions
from samlib.measures.hessian import lambda_max
from samlib.measures.loss import WeightLoss
from samlib.measures.precision import LowPrecisionWarning, acting_perturbation, effective_perturbation
from samlib.measures.sharpness import adversarial
from samlib.measures.tails import first_layer, weight_histogram, weight_tails

__all__ = [
    "LowPrecisionWarning",
    "WeightLoss",
    "acting_perturbation",
    "adversarial",
    "asymmetry_factors",
    "effective_perturbation",
    "first_layer",
    "lambda_max",
    "random_directions",
    "weight_histogram",
    "weight_tails",
]
