"""The order of the files: `make test` deals out whole files to processes; with the longest first these end together.

And Ctrl-C, which tests send to what they start."""

import signal

import pytest

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job, and so would be all that it starts
    signal.signal(signal.SIGINT, signal.default_int_handler)

LONGEST = (
    "test_sweep.py",
    "test_notebooks.py",
    "test_distributed.py",
    "test_book.py",
    "test_rules_asymmetry.py",
    "test_bench.py",
    "test_claims.py",
    "test_flat.py",
    "test_compare.py",
    "test_connect.py",
    "test_execute.py",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):  # alone, a process keeps the order of the command line
        items.sort(key=lambda item: rank(item.path.name))


def rank(name: str) -> int:
    """Then come the stored notebooks, then what is short."""
    return LONGEST.index(name) if name in LONGEST else len(LONGEST) + (not name.endswith(".ipynb"))
