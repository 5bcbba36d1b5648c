"""One number, every layout: ring, hybrid, and data × sequence, on rows chosen to break them."""

from __future__ import annotations

import pytest
from runs import metrics
from sequence_rows import KINDS, ROW, write_rows
from transformers import AutoTokenizer

from anchor_context.data.options import DataOptions
from anchor_context.data.prepare import prepare_rows

RING, ULYSSES = ("--parallel_mode", "ring_attn"), ("--parallel_mode", "ulysses_attn")
HYBRID = ("--parallel_mode", "hybrid_attn", "--ring_degree", "2", "--ulysses_degree", "2")
LAYOUTS = {  # name -> (processes, data degree, --micro_batch_tokens, further flags)
    "ring 2": (2, 1, "100", RING),
    "ring 4": (4, 1, "row", RING),
    "hybrid 2 x 2": (4, 1, "64", HYBRID),
    "data 2 x ring 2": (4, 2, "auto", (*RING, "--ring_degree", "2")),
    "data 2 x Ulysses 2": (4, 2, "30", (*ULYSSES, "--ulysses_degree", "2")),
}
IN_THE_DEFAULT_SUITE = ("ring 2", "anchor"), ("hybrid 2 x 2", "anchor")
ROWS_PER_STEP = 4


@pytest.fixture(scope="module")
def rows(tiny, tmp_path_factory):
    """The flags that select the rows."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    tokenizer = AutoTokenizer.from_pretrained(tiny.model)
    write_rows(path, bos=tokenizer.bos_token_id, vocab_size=len(tokenizer))
    return ("--dataset", str(path), "--data-format", "tokenized", "--seq-length", str(ROW))


@pytest.fixture(scope="module")
def one_process(launch, rows, tmp_path_factory):
    """metrics of the run on one process, of each pattern once."""
    runs = {}

    def run(pattern: str) -> list[dict]:
        if pattern not in runs:
            output = tmp_path_factory.mktemp("one") / pattern
            flags = flags_of(pattern, batch_size=1, accumulation=ROWS_PER_STEP)
            launch(1, output, *rows, *flags, "--micro_batch_tokens", "row")
            runs[pattern] = metrics(output)
        return runs[pattern]

    return run


def flags_of(pattern: str, *, batch_size: int, accumulation: int) -> tuple[str, ...]:
    return (
        *("--attention_pattern", pattern, "--max-train-steps", "10"),
        *("--batch-size", str(batch_size), "--gradient-accumulate-every", str(accumulation)),
    )


def cases():
    for name in LAYOUTS:
        for pattern in ("anchor", "full"):
            slow = () if (name, pattern) in IN_THE_DEFAULT_SUITE else pytest.mark.slow
            yield pytest.param(name, pattern, marks=slow, id=f"{name}, {pattern}")


@pytest.mark.parametrize(("name", "pattern"), cases())
def test_every_layout_gives_the_losses_of_one_process(
    name, pattern, launch, rows, one_process, tmp_path
):
    processes, data_degree, tokens, flags = LAYOUTS[name]
    settings = flags_of(pattern, batch_size=2, accumulation=ROWS_PER_STEP // 2 // data_degree)
    settings += ("--micro_batch_tokens", tokens)
    launch(processes, tmp_path / "run", *rows, *settings, *flags)
    expected, got = one_process(pattern), metrics(tmp_path / "run")
    assert len(got) == len(expected) == 10
    for ours, theirs in zip(got, expected, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
        assert ours["target_tokens"] == theirs["target_tokens"]
        kinds = set(ours["comm_bytes"])
        assert (kinds >= {"ring_kv", "ring_grad"}) == ("ring" in flags[1] or flags == HYBRID)
        assert ("ulysses" in kinds) == ("ulysses" in flags[1] or flags == HYBRID)
    assert expected[-1]["loss"] < expected[0]["loss"]


def test_the_rows_are_the_ones_meant(tiny, rows, tmp_path):
    """Every kind of row reaches the model as it stands in the file, and the last is mostly padding."""
    tokenizer = AutoTokenizer.from_pretrained(tiny.model)
    prepared = prepare_rows(
        rows[1],
        DataOptions(data_format="tokenized", seq_length=ROW),
        tokenizer=tokenizer,
        vocab_size=len(tokenizer),
        anchor_placement="per_document",
        cache_dir=tmp_path,
    )
    laid = [prepared.row(i).document_lengths().tolist() for i in range(len(prepared))]
    for lengths in KINDS.values():
        assert laid.count(lengths) == 4
    assert laid[-1][0] == 20 and prepared.target_counts[-1] == 19
    assert prepared.pad_counts[-1] == ROW - 20
