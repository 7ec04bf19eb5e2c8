"""The code on the pages of the book that teach the library runs, block after block, as a reader would type it."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

BOOK = Path(__file__).resolve().parent.parent / "book"
PAGES = ["optimisers", "speed"]


def blocks(page):
    return re.findall(r"^```python\n(.*?)^```", (BOOK / f"{page}.md").read_text(), flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs_and_trains(page):
    torch.manual_seed(0)
    inputs = torch.randn(64, 5)
    targets = inputs[:, :3].argmax(dim=1)
    model = nn.Sequential(nn.Linear(5, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 3))
    loss_fn = nn.functional.cross_entropy
    names = {"torch": torch, "model": model, "loss_fn": loss_fn, "batches": [(inputs, targets)] * 20}
    before = loss_fn(model(inputs), targets).item()
    assert len(blocks(page)) >= 2
    for block in blocks(page):
        exec(block, names)
    assert loss_fn(model(inputs), targets).item() < 0.5 * before
