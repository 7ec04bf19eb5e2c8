"""Where a record was made: the commit, and how it is told where there is no history."""

import pytest

from samlib import provenance


@pytest.mark.parametrize(("named", "dirty"), [("a" * 40, False), ("a" * 40 + "-dirty", True)])
def test_the_commit_may_be_named_where_the_history_did_not_travel(monkeypatch, named, dirty):
    monkeypatch.setenv("SAMLIB_COMMIT", named)
    assert provenance.commit() == {"commit": "a" * 40, "dirty": dirty}


def test_the_threads_are_those_in_force():
    import torch

    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert provenance.environment("cpu")["threads"] == threads
    finally:
        torch.set_num_threads(before)


def test_without_a_name_it_is_that_of_the_checkout(monkeypatch):
    monkeypatch.delenv("SAMLIB_COMMIT", raising=False)
    found = provenance.commit()
    assert found == {} or (len(found["commit"]) == 40 and found["dirty"] in (True, False))
