"""The arrows of the design: which module of samlib may import which, read from the source."""

import ast
from pathlib import Path

import pytest

import samlib

FOLDER = Path(samlib.__file__).parent

# module -> what it may import: modules of samlib, and third parties. Left of the records PyTorch, right of them pandas.
RECORDS = {"errors", "spec", "experiments", "store"}
MAY_IMPORT = {
    "errors": set(),
    "spec": {"errors"},
    "experiments": {"errors", "spec", "experiments"},
    "data": {"errors", "spec", "torch", "torchvision", "sklearn", "numpy"},
    "models": {"errors", "spec", "torch", "torchvision"},
    "augment": {"errors", "torch"},
    "optim": {"errors", "flat", "perturbation", "torch"},
    "flat": {"torch"},
    "perturbation": {"torch"},
    "batchnorm": {"errors", "torch"},
    "overlap": {"torch"},
    "substitute": {"torch"},
    "shards": {"errors", "batchnorm", "flat", "overlap", "substitute", "torch"},
    "graph": {"errors", "optim", "perturbation", "shards", "torch"},
    "two_products": {"optim", "torch"},
    "arithmetic": {"errors", "measures", "torch"},
    "measures": {"errors", "batchnorm", "measures", "optim", "perturbation", "torch", "numpy", "scipy"},
    "checks": {"errors", "optim", "perturbation", "torch", "numpy", "scipy"},
    "provenance": {"torch"},
    "closures": {"arithmetic", "batchnorm", "graph", "spec", "torch", "two_products"},
    "train": {
        "errors",
        "half",
        "spec",
        "store",
        "data",
        "models",
        "optim",
        "batchnorm",
        "measures",
        "checks",
        "provenance",
        "arithmetic",
        "augment",
        "closures",
        "graph",
        "torch",
    },
    "store": {"errors", "spec", "experiments", "pandas"},
    "half": {"torch"},
    "pack": {"errors", "experiments", "half", "spec", "store"},
    "estimate": {"errors", "experiments", "spec", "store"},
    "lanes": {"graph", "spec", "store", "train", "torch"},
    "probe": {"estimate", "lanes", "provenance", "spec", "store", "train", "torch"},
    "sweep": {"arithmetic", "errors", "estimate", "lanes", "spec", "store", "train", "torch", "tqdm"},
    "stats": {"errors", "numpy", "scipy"},
    "published": {"errors", "pandas", "yaml"},
    "rules": {"errors", "rules", "stats", "published", "pandas"},
    "claims": {"errors", "experiments", "store", "rules", "published"},
    "plots": {"errors", "stats", "matplotlib", "numpy", "pandas", "seaborn"},
    "study": {"errors", "experiments", "spec", "store", "claims", "published", "sweep", "pandas"},
    "report": {"claims", "experiments", "plots", "published", "rules", "stats", "study", "numpy", "pandas"},
    "compare": {"experiments", "spec", "store", "claims", "pandas"},
    "verify": {"spec", "store", "sweep", "train"},
    "export": RECORDS | {"pandas"},
    "bench": {
        "arithmetic",
        "batchnorm",
        "bench",
        "closures",
        "data",
        "errors",
        "graph",
        "measures",
        "models",
        "numpy",
        "optim",
        "provenance",
        "pytorch_optimizer",
        "shards",
        "spec",
        "torch",
        "tqdm",
        "train",
        "two_products",
    },
    "__main__": RECORDS
    | {"bench", "claims", "compare", "estimate", "export", "pack", "probe", "provenance", "sweep", "verify", "torch"},
    "__init__": set(),
}
STANDARD_LIBRARY = __import__("sys").stdlib_module_names


def files():
    return sorted(FOLDER.rglob("*.py"))


def layer(path):
    """The part of samlib a file belongs to: its module, or its package."""
    return path.relative_to(FOLDER).parts[0].removesuffix(".py")


def imported(path):
    """Every import of a file, also inside functions: the part of samlib, or the third party."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} line {node.lineno}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            top, *rest = name.split(".")
            if top != "samlib":
                if top not in STANDARD_LIBRARY:
                    yield top
            elif rest:
                yield rest[0]


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(FOLDER)))
def test_imports_follow_the_arrows(path):
    assert set(imported(path)) <= MAY_IMPORT[layer(path)]


def test_every_allowed_arrow_is_used():
    used = {}
    for path in files():
        used.setdefault(layer(path), set()).update(imported(path))
    assert {name: allowed - used.get(name, set()) for name, allowed in MAY_IMPORT.items() if allowed - used[name]} == {}
