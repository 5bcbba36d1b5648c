"""The communication account adds up and starts afresh."""

from __future__ import annotations

import pytest

from anchor_context.parallel.account import CommAccount


def test_sums_by_kind_until_taken():
    account = CommAccount()
    account.add("ring_kv", sent=10, received=4)
    account.add("ring_kv", sent=1, received=0)
    account.add("ulysses", sent=3, received=3)
    assert account.take() == {
        "ring_kv": {"sent": 11, "received": 4, "exchanges": 2},
        "ulysses": {"sent": 3, "received": 3, "exchanges": 1},
    }
    assert account.take() == {}


def test_an_unknown_kind_is_a_mistake():
    with pytest.raises(AssertionError):
        CommAccount().add("ring", sent=1, received=1)
