"""Where and by what a record was made: versions, device, threads, commit."""

import os
import platform
import subprocess
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def environment(device: str) -> dict[str, Any]:
    """The part of a record that may differ between two machines whose numbers agree."""
    import torch

    return _machine(device) | {"threads": torch.get_num_threads()}


@lru_cache(maxsize=4)
def _machine(device: str) -> dict[str, Any]:
    import torch

    return {
        "samlib": _version("samlib"),
        "torch": torch.__version__,
        "numpy": _version("numpy"),
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
        "device": torch.cuda.get_device_name() if device == "cuda" else _cpu(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        **commit(),
    }


def commit() -> dict[str, Any]:
    """The commit of the checkout samlib runs from and whether samlib differs from it; empty outside a checkout.

    Where the files travel without their history, as to a rented machine, SAMLIB_COMMIT names it: the output of
    `git describe --always --abbrev=40 --dirty --exclude '*'`, taken where the history is.
    """
    if named := os.environ.get("SAMLIB_COMMIT"):
        return {"commit": named.removesuffix("-dirty"), "dirty": named.endswith("-dirty")}
    folder = Path(__file__).resolve().parent.parent
    head = _git(folder, "rev-parse", "HEAD")
    if head is None:
        return {}
    changed = _git(folder, "status", "--porcelain", "--", "samlib", "results/published")
    return {"commit": head, "dirty": bool(changed)}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or os.uname().machine


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
