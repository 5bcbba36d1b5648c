"""The counted traffic adds up and starts afresh."""

from __future__ import annotations

import pytest

from anchor_context.parallel.traffic import Traffic


def test_sums_by_kind_until_taken():
    traffic = Traffic()
    traffic.add("ring_kv", sent=10, received=4)
    traffic.add("ring_kv", sent=1, received=0)
    traffic.add("ulysses", sent=3, received=3)
    assert traffic.take() == {
        "ring_kv": {"sent": 11, "received": 4, "exchanges": 2},
        "ulysses": {"sent": 3, "received": 3, "exchanges": 1},
    }
    assert traffic.take() == {}


def test_an_unknown_kind_is_a_mistake():
    with pytest.raises(AssertionError):
        Traffic().add("ring", sent=1, received=1)
