"""`inspect --ranks`: the figures are those of the plans that a run makes."""

from __future__ import annotations

import numpy as np
import pytest
from data_samples import prepare, write_token_rows

from anchor_context.data.__main__ import main
from anchor_context.data.loader import Dealing, make_loader
from anchor_context.data.ranks import PAIR_PRICE, Way, best_way, ways_to_share


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    lengths = np.random.default_rng(0).lognormal(np.log(60), 1.0, 150).astype(int) + 1
    documents = [[5 + i % 90 for i in range(n)] for n in lengths]
    data = write_token_rows(folder / "d.jsonl", [documents])
    return prepare(data, folder, data_format="tokenized", seq_length=1024)


@pytest.mark.parametrize(("name", "stage"), [("ZeRO 1", 1), ("ZeRO 2 and 3", 3)])
def test_the_loaders_steps_are_as_even_as_told(prepared, name, stage):
    rows = 4 * (len(prepared) // 4)
    ways = ways_to_share(
        prepared, pattern="anchor", ranks=4, rows_per_rank=1, micro_batch_tokens=300
    )
    (told,) = (way for way in ways if name in way.name)
    loader = make_loader(
        prepared,
        pattern="anchor",
        seed=0,
        batch_size=1,
        accumulation=1,
        data_rank=0,
        data_degree=4,
        total_rows=rows,
        dealing=Dealing(micro_batch_tokens=300, zero_stage=stage, pair_price=PAIR_PRICE),
    ).dataset
    steps = [batch for batch in loader if batch["is_last"]]
    assert len(steps) == rows // 4
    # The loader shuffles rows, so single steps differ; a rank's mean work does not.
    assert told.imbalance == pytest.approx(
        np.mean([batch["work_imbalance"] for batch in steps]), rel=0.15
    )
    assert 1 <= told.imbalance < 2 and told.sent_bytes == 0


def test_a_ring_is_more_even_and_sends(prepared):
    ways = {
        way.name: way
        for way in ways_to_share(
            prepared, pattern="anchor", ranks=4, rows_per_rank=1, micro_batch_tokens=300
        )
    }
    assert set(ways) == {
        "data parallel, ZeRO 1",
        "data parallel, ZeRO 2 and 3",
        "ring_attn",
        "hybrid_attn, Ulysses 2 × ring 2",
    }
    assert ways["ring_attn"].imbalance < ways["data parallel, ZeRO 2 and 3"].imbalance
    assert ways["ring_attn"].sent_bytes > 0


def test_the_way_taken_waits_least_and_of_close_ones_sends_least():
    def way(name, stages, imbalance, sent):
        return Way(name, stages, imbalance, 1.0, sent)

    ways = [
        way("a", (1,), 1.02, 0),
        way("b", (2, 3), 1.30, 0),
        way("c", (1, 2, 3), 1.00, 10),
        way("d", (1, 2, 3), 1.01, 5),
    ]
    assert best_way(ways, zero_stage=1).name == "a"
    assert best_way(ways, zero_stage=3).name == "d"


def test_the_command_prints_it(prepared, capsys):
    main(["inspect", str(prepared.directory), "--ranks", "4", "--rows", "0"])
    shown = capsys.readouterr().out
    assert f"longest document {prepared.longest_document:,} tokens" in shown
    assert "ring_attn" in shown and "under ZeRO 3 I would take: " in shown
    for flags, says in ((("--ranks", "0"), "must be at least 1"), (("--ranks", "900"), "only")):
        with pytest.raises(ValueError, match=says):
            main(["inspect", str(prepared.directory), *flags])
