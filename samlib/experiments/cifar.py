"""The settings of the profiles gpu and paper that several experiments share: CIFAR, and the networks of the papers.

What `published_settings.csv` prints stands here as printed, and what the authors' public code settles as it does there.
What is left open is as the errata resolve it, else at the default of its field: for foret2021 momentum 0.9 and a cosine
schedule; for behdin2023 flip, padding with zeros and the CIFAR stem (E-M6). None of them says whether the last, smaller
batch of an epoch is used; it is left out, but for boca2023, whose 78,200 updates count it.

Gpu: what fits the minutes on one H200. A verdict needs a precision in which the perturbation that acts has a cosine of
0.95 or more with the one intended. bf16 leaves 0.56 at rho 0.05. In TF32 a ResNet-18 and a ResNet-20 a few steps old
had 0.97 or more, but the networks here, 20 steps old, on real images and with TF32 emulated on a CPU, had 0.93
(ResNet-18 with the stem for ImageNet) and 0.91 (MobileNetV2). So fp32 decides, with some rows in TF32 beside it, which
is what boca2023's code took and PyTorch's convolutions take by default.
Paper: fp32, where a paper does not say otherwise.
"""

import math

from samlib.spec import AugmentSpec, DataSpec, ModelSpec, OptimSpec, RunSpec, TrainSpec, override

PRECISION = {"gpu": "fp32", "paper": "fp32"}
SEEDS = tuple(range(5))

# The order in which runs on a rented GPU are worth making: batch 128 of coldenhoff2022 (A), C with its radii chosen
# first, batch 64, batch 16, what stands beside them for information, then the table of boca2023. By the conservative
# estimate (tests/test_profiles.py does the arithmetic) one run at a time takes 31 minutes for A, 16 for the choice, 73
# and 36 for C at published and at chosen radii, 22 for C with batch norm, 36, 43 and 20 for the next three: 277 for the
# 50 that they have, which hold A and the choice. Each ResNet-18 leaves most of the device idle; runs side by side, in
# processes or as graphs on streams, have not been tried on a GPU.
PLAIN_FIRST, CHOICE_OF_RHO, WITHOUT_NORM, WITH_NORM, BATCH_64, BATCH_16, BESIDE, TABLE, TABLE_BESIDE = range(1, 10)

# ---------------------------------------------------------------------------------------------- coldenhoff2022

# The paper's own first; 100 is a dev seed.
PLAIN_SEEDS = (20, 30, 40, 50, 60, 70, 80, 90, 110, 120)
WITHOUT_NORM_SEEDS = tuple(range(1, 11))
OWN = 3

RESNET18 = ModelSpec("resnet18", stem="imagenet", num_outputs=1000)
# A and B. Images in [-1, 1] are none augmented; the test images are looked at in every epoch, as the paper prints the
# best one, and the training images seldom, as that costs most of an evaluation.
PLAIN = RunSpec(
    data=DataSpec("cifar10", scaling="symmetric"),
    model=RESNET18,
    optim=OptimSpec(rho=0.05, lr=0.01, momentum=0.0, schedule="constant", second_pass_batchnorm="update"),
    train=TrainSpec(epochs=100, batch_size=128, eval_train_every=25),
)
# C, with batch norm; the claims are about curves of the training loss.
NORMALISED = RunSpec(
    data=DataSpec("cifar10", scaling="unit"),
    model=RESNET18,
    optim=OptimSpec(eta=0.0, lr=0.01, momentum=0.9, schedule="cosine", second_pass_batchnorm="update"),
    train=TrainSpec(epochs=200, batch_size=128, eval_every=2),
)


def plain(profile: str) -> dict[str, RunSpec]:
    """role -> spec of SGD and of SAM in A and B, at batch 128."""
    sgd = override(PLAIN, {"precision": PRECISION[profile]})
    return {"sgd": sgd, "sam": override(sgd, {"method": "sam"})}


def with_norm(profile: str) -> RunSpec:
    return override(NORMALISED, {"precision": PRECISION[profile]})


def without_norm(profile: str) -> RunSpec:
    """C: every norm layer replaced by the identity."""
    return override(with_norm(profile), {"model.norm": "none"})


# ---------------------------------------------------------------------------------------------- foret2021, behdin2023

BASIC = AugmentSpec(flip=True, crop="zero")
FORET_AUGMENT = {
    "basic": BASIC,
    "cutout": AugmentSpec(flip=True, crop="zero", cutout=16),
    "aa": AugmentSpec(flip=True, crop="zero", autoaugment=True),
}
FORET_LENGTH = {200: {"lr": 0.1, "weight_decay": 0.0005}, 1800: {"lr": 0.05, "weight_decay": 0.001}}
FORET_RHO = {"cifar10": 0.05, "cifar100": 0.1}


def foret(data: str, epochs: int, augment: str) -> dict[str, RunSpec]:
    """role -> spec of SGD and of SAM in a cell of Table 1: SAM in shards of 32, one for each of the 8 GPUs (E-X2)."""
    sgd = RunSpec(
        data=DataSpec(data),
        model=ModelSpec("wrn28_10"),
        optim=OptimSpec(rho=FORET_RHO[data], momentum=0.9, schedule="cosine", **FORET_LENGTH[epochs]),
        train=TrainSpec(epochs=epochs, batch_size=256, eval_train_every=epochs, precision=PRECISION["paper"]),
        augment=FORET_AUGMENT[augment],
    )
    return {"sgd": sgd, "sam": override(sgd, {"method": "sam", "shard_size": 32})}


BEHDIN_LR = {"resnet50": 0.5, "wrn28_10": 0.75}


def behdin(data: str, model: str) -> dict[str, RunSpec]:
    """role -> spec of SGD, of SAM with one ascent over the mini-batch, and of mSAM with 32 shards of 16."""
    sgd = RunSpec(
        data=DataSpec(data),
        model=ModelSpec(model),
        optim=OptimSpec(
            rho=0.2, lr=BEHDIN_LR[model], momentum=0.9, weight_decay=0.0005, schedule="one_cycle", warmup=0.05
        ),
        train=TrainSpec(
            epochs=200, batch_size=512, label_smoothing=0.1, eval_train_every=200, precision=PRECISION["paper"]
        ),
        augment=BASIC,
    )
    sam = override(sgd, {"method": "sam"})
    return {"sgd": sgd, "sam": sam, "msam": override(sam, {"num_shards": 32})}


# ---------------------------------------------------------------------------------------------- boca2023

BOCA_SEEDS = (42, 43, 44, 45, 46)  # that of the authors' code first
BOCA_LARGE_BATCH = 5000
# The code states TF32; "standardize" has the means and deviations it prints, to their four digits.
BOCA = RunSpec(
    data=DataSpec("cifar10"),
    model=ModelSpec("mobilenet_v2"),
    optim=OptimSpec(lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.0005, clip="descent", clip_norm=5.0),
    train=TrainSpec(epochs=200, batch_size=128, drop_last=False, eval_train_every=200, precision="tf32"),
    augment=AugmentSpec(autoaugment=True, flip=True, crop="reflect", cutout=16),
)


# ---------------------------------------------------------------------------------------------- counts

TRAIN_IMAGES = 50_000


def updates_per_epoch(spec: RunSpec) -> int:
    images, batch = TRAIN_IMAGES - spec.data.validation_size, spec.train.batch_size
    return images // batch if spec.train.drop_last else math.ceil(images / batch)


def stopped(spec: RunSpec, updates: int) -> RunSpec:
    """The same training, over after so many updates."""
    return override(spec, {"updates": updates, "epochs": math.ceil(updates / updates_per_epoch(spec))})
