"""scripts/reproduce.py: which exit code the chain ends with, and what it leaves behind."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import reproduce

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "scripts"


def ending(code: int, *, verdict: bool = False, then: str = "pass"):
    return reproduce.Step("a step", ("-c", f"import os, sys; {then}; sys.exit({code})"), verdict)


@pytest.fixture
def chain(tmp_path, monkeypatch):
    """Runs the driver with other steps, in a checkout of its own, and returns its exit code and what it noted."""
    (tmp_path / "runs" / "quick").mkdir(parents=True)
    monkeypatch.setenv("SAMLIB_ROOT", str(tmp_path))

    def run(*steps):
        monkeypatch.setattr(reproduce, "steps", lambda *_: list(steps))
        code = reproduce.main(["--profile", "quick"])
        note = tmp_path / "runs" / "quick" / "exit_code"
        return code, note.read_text() if note.exists() else None

    return run


@pytest.mark.parametrize(("code", "outcome"), [(0, 0), (1, 1), (2, 2), (3, 1), (77, 1)])
def test_a_step_that_fails_ends_with_1_and_bad_input_with_2(code, outcome):
    assert ending(code).run({}) == outcome


def test_only_the_comparison_may_end_with_3():
    assert ending(3, verdict=True).run({}) == 3
    assert [step.verdict for step in reproduce.steps("quick", Path("runs"))] == [False, False, False, True]


@pytest.mark.parametrize("code", [0, 1, 2, 3])
def test_the_outcome_is_returned_noted_and_printed(chain, capsys, code):
    assert chain(ending(0), ending(code, verdict=True)) == (code, f"{code}\n")
    assert f"(exit code {code})" in capsys.readouterr().out


def test_tuning_runs_are_made_on_request():
    first, asked = (reproduce.steps("quick", Path("runs"), tuning)[0].arguments for tuning in (False, True))
    assert asked == (*first, "--tuning")
    made = subprocess.run(["make", "-n", "reproduce", "TUNING=1"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "reproduce.py --profile quick --tuning" in made.stdout


def test_no_step_runs_after_a_failed_one(chain, tmp_path):
    reached = tmp_path / "reached"
    assert chain(ending(1), ending(0, then=f"open({str(reached)!r}, 'w')"))[0] == 1
    assert not reached.exists()


def test_a_book_of_an_earlier_run_is_not_announced(chain, tmp_path, capsys):
    html = tmp_path / "runs" / "quick" / "book" / "html"
    html.mkdir(parents=True)
    (html / "index.html").touch()
    time.sleep(0.05)
    chain(ending(1))
    assert "not built by this run" in capsys.readouterr().out
    chain(ending(0, then=f"open({str(html / 'index.html')!r}, 'w').write('new')"))
    assert (html / "index.html").as_uri() in capsys.readouterr().out


def test_every_step_has_one_thread_and_on_quick_one_instruction_set_and_no_gpu(chain, tmp_path):
    seen = tmp_path / "seen"
    chain(ending(0, then=f"import json; json.dump(dict(os.environ), open({str(seen)!r}, 'w'))"))
    expected = reproduce.ONE_THREAD | reproduce.PINNED
    assert expected["CUDA_VISIBLE_DEVICES"] == ""
    assert expected.items() <= json.loads(seen.read_text()).items()


def test_the_gpu_profile_sees_the_gpu():
    assert "CUDA_VISIBLE_DEVICES" not in reproduce.variables("gpu")
    assert reproduce.variables("gpu")["OMP_NUM_THREADS"] == "1"


def test_make_and_the_driver_pin_the_same():
    printed = subprocess.run(
        ["make", "-n", "test-notebooks"], capture_output=True, text=True, cwd=SCRIPTS.parent
    ).stdout
    line = next(line for line in printed.splitlines() if line.startswith("env "))
    assert dict(word.split("=", 1) for word in line.split() if re.match(r"[A-Z_]+=", word)) == reproduce.PINNED
    makefile = (SCRIPTS.parent / "Makefile").read_text()
    assert dict(re.findall(r"^export (\w+) := (.*)$", makefile, re.MULTILINE)) == reproduce.ONE_THREAD


@pytest.mark.parametrize("path", sorted(SCRIPTS.glob("pinned*.env")), ids=lambda path: path.name)
def test_a_pin_is_a_name_and_a_value_per_line(path):
    assert all(re.fullmatch(r"[A-Z0-9_]+=\w*", line) for line in path.read_text().splitlines())


def test_an_unknown_profile_is_bad_input_and_nothing_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SAMLIB_ROOT", str(tmp_path))
    assert reproduce.main(["--profile", "qick"]) == 2
    assert "profile = 'qick' is unknown: use one of quick" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_interruption_reaches_the_step_once_and_lets_it_tidy_up(tmp_path):
    started, tidied = tmp_path / "started", tmp_path / "tidied"
    step = f"""
import time
try:
    open({str(started)!r}, "w")
    time.sleep(300)
except KeyboardInterrupt:
    time.sleep(0.5)  # a second interrupt would end this
    open({str(tidied)!r}, "w")
"""
    driver = f"""
import signal, sys
sys.path.insert(0, {str(SCRIPTS)!r})
import reproduce
signal.signal(signal.SIGTERM, reproduce.interrupt)
reproduce.steps = lambda *_: [reproduce.Step("long", ("-c", {step!r}))]
sys.exit(reproduce.main([]))
"""
    process = subprocess.Popen([sys.executable, "-c", driver], stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 30
    while not started.exists() and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "make reproduce PROFILE=quick` goes on from here" in errors
    assert tidied.exists()
