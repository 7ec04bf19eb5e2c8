"""Training as on a GPU, on a CUDA runtime that runs no kernel (`fake_cuda.c`): where things lie, what waits for what,
and what a CUDA graph takes. What kernels compute is tested on a GPU (`test_graph_cuda.py` and others)."""

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

TRITON = find_spec("triton")
HEADERS = Path(TRITON.origin).parent / "backends" / "nvidia" / "include" if TRITON else Path("none")
LAUNCHES = 20  # of two replayed steps, with what is copied in and set before them
REFUSED = {
    "item": "cudaStreamSynchronize",
    "truth": "cudaStreamSynchronize",
    "mask": "cudaStreamSynchronize",
    "nonzero": "cudaStreamSynchronize",
    "waiting": "cudaDeviceSynchronize",
    "a loose branch": "a branch has not joined",
    "a tensor of numbers": "",  # torch 2.15 itself refuses these three, the runtime those of torch 2.11
    "a tensor of the host": "",
    "to the host": "",
    "two devices": "",  # refused by torch itself
}

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real GPU"),
    pytest.mark.skipif(torch.version.cuda is None, reason="needs a PyTorch with CUDA"),
    pytest.mark.skipif(not (HEADERS / "cuda_runtime_api.h").exists(), reason="needs the headers of CUDA"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler"),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Case -> part -> counters; a string for a case that failed."""
    folder, here = tmp_path_factory.mktemp("fake_cuda"), Path(__file__).parent
    library = folder / "fake_cuda.so"
    named = "-Wl,-soname,libcuda.so.1"  # libraries that need the driver find it loaded already
    call = ["cc", "-O1", "-w", "-shared", "-fPIC", f"-I{HEADERS}", named, "-o", library, here / "fake_cuda.c"]
    subprocess.run(call, check=True, timeout=60)
    paths = os.pathsep.join([str(here.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "LD_PRELOAD": str(library), "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    call = [sys.executable, here / "fake_cuda_worker.py", folder]
    done = subprocess.run(call, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def of(found, start):
    """The cases of these names; those that failed are the business of the first test."""
    chosen = {name: case for name, case in found.items() if name.startswith(start) and not isinstance(case, str)}
    assert chosen
    return chosen


def test_every_case_runs_without_an_error_or_a_warning(found):
    failed = [f"{name}\n{case}" for name, case in found.items() if isinstance(case, str)]
    assert not failed, "\n\n".join(failed)


def test_nothing_is_refused(found):
    for name, case in of(found, "").items():
        if not name.startswith("planted"):
            assert {part: counters.get("refused", "") for part, counters in case.items()} == dict.fromkeys(case, ""), (
                name
            )


def test_a_step_is_captured_whole_and_replayed_without_waiting(found):
    for name, case in of(found, "graph").items():
        if not case["setting"]["graph"]:  # a hybrid, which has no one sequence
            continue
        capture, steps = case["capture"], case["steps"]
        assert (capture["graphs"], capture["replays"], capture["beside"], capture["to_host"]) == (1, 1, 0, 0), name
        assert capture["captured"] > 100, name
        assert (steps["waits"], steps["to_host"], steps["to_device"], steps["replays"]) == (0, 0, 0, 2), name
        assert steps["launches"] <= LAUNCHES, name


def test_an_eager_step_waits_for_an_answer_for_each_ascent_and_for_its_update_and_for_nothing_else(found):
    for name, case in of(found, "eager").items():
        steps, setting = case["steps"], case["setting"]
        asked = setting["shards"] + 1 if setting["shards"] or setting["precision"] == "fp16" else 0
        assert steps["to_host"] <= 2 * asked, name  # a hybrid does not ascend in both
        assert steps["waits"] == steps["to_host"], name  # no other waiting: memory of the host is pinned, if any


def test_what_no_graph_can_hold_is_refused(found):
    assert of(found, "planted: nothing")["planted: nothing"]["all"]["graphs"] == 1
    assert of(found, "planted: branches")["planted: branches"]["all"]["graphs"] == 1
    for fault, words in REFUSED.items():
        outcome = found[f"planted: {fault}"]["all"]
        assert outcome["raised"], fault
        assert words in outcome["refused"], fault


def test_work_that_goes_past_a_capture_is_seen(found):
    outcome = found["planted: beside"]["all"]
    assert outcome["raised"] == ""
    assert outcome["beside"] > 0
