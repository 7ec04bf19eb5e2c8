"""14: SAM in low precision, a result of our own (`paper: this-study`).

A perturbation of norm rho is about rho / sqrt(n) in each of n weights, and where a product rounds its weights, what
acts is round(w + eps) - round(w). Each arm is one precision of convolutions and matrix products; its records hold how
much of eps acts. `two products` is SAM whose second pass multiplies with w and with eps apart (`samlib.two_products`).

Quick: the MLP of `digits` on few clean images, with its learning rate, and the products of a CPU rounded as a GPU does
(`samlib.arithmetic`). It has 9,098 weights, and rho 0.05 is 5.2e-4 in each, 35 times the 1.5e-5 of ResNet-18: rounding
takes less of it. A width of 512 would come to 9.1e-5, and to four times the time, which is why it is not run. A run
takes 0.3 to 1 s. SGD in fp32 trains as in experiment 04, but is evaluated at other epochs: its records there are older
than the rules here.

Gpu: CIFAR-10, 30 epochs, 5 seeds. Seconds of a run of ResNet-18 by the conservative estimate for an H200 (an epoch of
SGD takes 1.0 s and one of SAM 2.0 s with operands of 16 bits, twice that in TF32; in fp32 333 TFLOP of a SAM epoch at
40 TFLOP/s are 8.3 s):

    16 bits: SGD 30, SAM 61, two products 90      TF32: SGD 61, SAM 122      fp32: SGD 125, SAM 250

FIRST, bf16 beside fp16 at rho 0.05, is 182 s a seed: 9 minutes for three seeds, for all five by the estimate that the
engine aims at. It decides what becomes of the perturbation. REFERENCE, fp32 at rho 0.05 and the remedy, is 465 s a
seed, and decides what it costs; AS_BY_DEFAULT, TF32, 183 s; LARGER, rho 0.1, 494 s. BESIDE is MobileNetV2, 2.3 million
weights, about as dear as ResNet-18 in 16 bits and half as dear in fp32: it decides nothing, the same rules are shown.
"""

from samlib.experiments import Arm, cifar, digits, measure
from samlib.spec import DataSpec, MeasureSpec, ModelSpec, RunSpec, TrainSpec, override

TITLE = "Does SAM survive low precision?"
PUBLISHED_SCALE = frozenset({"gpu"})  # the claims are about it

DECIDES = {
    "study-bf16-turns-the-perturbation": {"quick": ("clean",), "gpu": ("resnet18",)},
    "study-bf16-shrinks-the-gain": {"quick": ("clean",), "gpu": ("resnet18",)},
    "study-bf16-flattens-less": {"quick": ("clean",), "gpu": ("resnet18",)},
    "study-two-products-restore-the-gain": {"quick": ("clean",), "gpu": ("resnet18",)},
    "study-fp16-and-tf32-keep-the-gain": {"quick": ("clean",), "gpu": ("resnet18",)},
}

PRECISIONS = ("fp32", "tf32", "fp16", "bf16")
RHOS = (0.05, 0.1)
QUICK_SEEDS = digits.SEEDS[:5]

CIFAR = RunSpec(
    data=DataSpec("cifar10"),
    model=ModelSpec("resnet18"),
    train=TrainSpec(epochs=30, batch_size=128, eval_every=5, eval_train_every=30),
    augment=cifar.BASIC,
)
SEEDS = tuple(range(5))
CURVATURE = {"quick": (measure("lambda_max"),), "gpu": (measure("lambda_max", images=1000),)}
# After the experiments of the papers.
FIRST, REFERENCE, AS_BY_DEFAULT, LARGER, BESIDE = range(cifar.TABLE_BESIDE + 1, cifar.TABLE_BESIDE + 6)


def arms(profile: str) -> tuple[Arm, ...]:
    match profile:
        case "quick":
            digits_mlp = override(digits.sgd("clean"), {"eval_every": 20})
            return grid("clean", digits_mlp, QUICK_SEEDS, CURVATURE["quick"])
        case "gpu":
            mobilenet = override(CIFAR, {"model.name": "mobilenet_v2"})
            return (
                *grid("resnet18", CIFAR, SEEDS, CURVATURE["gpu"]),
                *grid("mobilenet_v2", mobilenet, SEEDS, CURVATURE["gpu"]),
            )
        case _:
            return ()


def grid(cell: str, sgd: RunSpec, seeds: tuple[int, ...], measures: tuple[MeasureSpec, ...]) -> tuple[Arm, ...]:
    """SGD, and SAM at each radius, in each precision; and the remedy for bf16 at the first radius."""
    found = {}
    for precision in PRECISIONS:
        found[f"sgd {precision}"] = override(sgd, {"precision": precision})
        for rho in RHOS:
            sam = {"method": "sam", "optim.rho": rho, "precision": precision}
            found[f"sam rho={rho:g} {precision}"] = override(sgd, sam)
    bf16 = found[f"sam rho={RHOS[0]:g} bf16"]
    found[f"sam rho={RHOS[0]:g} bf16 two products"] = override(bf16, {"second_pass": "two_products"})
    return tuple(Arm(role, cell, spec, seeds, measures, priority=priority(cell, spec)) for role, spec in found.items())


def priority(cell: str, spec: RunSpec) -> int:
    if cell == "mobilenet_v2":
        return BESIDE
    if spec.optim.method == "sam" and spec.optim.rho != RHOS[0]:
        return LARGER
    if spec.optim.second_pass == "two_products":
        return REFERENCE
    return {"bf16": FIRST, "fp16": FIRST, "fp32": REFERENCE, "tf32": AS_BY_DEFAULT}[spec.train.precision]
