"""One number, every layout: the same rows give the same losses, however they are spread over ranks and cut
into micro-batches."""

from __future__ import annotations

import json

import pytest
from runs import losses, metrics
from transformers import AutoModelForCausalLM

ROWS_PER_STEP = 4
STEPS = ("--max-train-steps", "10")
ULYSSES = ("--parallel_mode", "ulysses_attn")


def at_most(tokens: int | str) -> tuple[str, str]:
    return "--micro_batch_tokens", str(tokens)


LAYOUTS = {  # name -> (processes, batch size, accumulation, further flags)
    "batch 2 × 2": (1, 2, 2, at_most("auto")),
    "batch 4 × 1": (1, 4, 1, at_most("row")),
    "2 data-parallel": (2, 1, 2, at_most(64)),
    # A CPU's sums have one order anyway.
    "2 data-parallel, whole rows": (2, 1, 2, (*at_most("row"), "--deterministic")),
    "2 Ulysses": (2, 1, 4, (*ULYSSES, *at_most(300))),
    "4 Ulysses over 2 key/value heads": (4, 2, 2, (*ULYSSES, *at_most(1000))),
    "flex on the same placement": (
        1,
        4,
        1,
        ("--attn_engine", "flex", "--anchor_placement", "per_document", *at_most(300)),
    ),
}


@pytest.fixture(scope="module")
def one_process(launch, tmp_path_factory):
    """The run that all others are compared with: one process, whole rows, a row in a micro-batch."""
    output = tmp_path_factory.mktemp("runs") / "one"
    batch = ("--batch-size", "1", "--gradient-accumulate-every", "4", *at_most("row"))
    finished = launch(1, output, *STEPS, *batch)
    return output, finished.stdout


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_same_losses(name, launch, one_process, tmp_path):
    processes, batch_size, accumulation, flags = LAYOUTS[name]
    batch = ("--batch-size", str(batch_size), "--gradient-accumulate-every", str(accumulation))
    launch(processes, tmp_path / "run", *STEPS, *batch, *flags)
    expected, got = metrics(one_process[0]), metrics(tmp_path / "run")
    assert len(got) == len(expected) == 10
    for ours, theirs in zip(got, expected, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
        for key in ("step", "learning_rate", "target_tokens", "tokens_seen"):
            assert ours[key] == theirs[key]


FLEX = ("--attn_engine", "flex")
OTHER_ROWS = {  # name -> flags of one process, to which flex under Ulysses is compared
    "shared anchor": FLEX,
    "intra_doc": ("--attention_pattern", "intra_doc"),
    "intra_doc_reset": ("--attention_pattern", "intra_doc_reset"),
}


@pytest.mark.parametrize("name", OTHER_ROWS)
def test_other_patterns_and_placements_give_the_same_losses_on_two_ranks(name, launch, tmp_path):
    """One process, by flash where it can, on whole rows; and flex under Ulysses, on units."""
    flags = ("--max-train-steps", "4", *OTHER_ROWS[name])
    launch(1, tmp_path / "1", *flags, *at_most("row"))
    launch(2, tmp_path / "2", *flags, *FLEX, *ULYSSES, *at_most(100))
    one, two = losses(tmp_path / "1"), losses(tmp_path / "2")
    assert len(one) == 4 and two == pytest.approx(one, rel=1e-5)
    record = json.loads((tmp_path / "2" / "args.json").read_text())
    placement = "shared" if name == "shared anchor" else "none"
    assert record["flags"]["anchor_placement"] == placement and record["engine"] == "flex"


def test_a_run_leaves_its_record(one_process, tiny):
    output, printed = one_process
    assert losses(output)[-1] < losses(output)[0]
    record = json.loads((output / "args.json").read_text())
    data = record["data"]
    placed = data["document_tokens"] + data["anchors_added"] + data["pad_tokens"]
    assert placed == data["rows"] * 256
    assert data["documents"] == len(tiny.documents.read_text().splitlines())
    assert record["engine"] == "flash" and record["kernel"] == "torch_cpu"
    assert record["flags"]["anchor_placement"] == "per_document"
    assert record["versions"]["deepspeed"]
    assert f"{data['document_tokens']:,} tokens" in printed
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    for key in ("step_seconds", "tokens_per_second", "peak_memory_bytes"):
        assert all(step[key] > 0 for step in metrics(output))
    assert all(step["mfu"] is None for step in metrics(output))


def test_the_saved_model_is_plain_hugging_face(one_process, tiny):
    trained = AutoModelForCausalLM.from_pretrained(one_process[0] / "step-10")
    start = AutoModelForCausalLM.from_pretrained(tiny.model).state_dict()
    assert set(trained.state_dict()) == set(start)
    assert any(not weight.equal(start[name]) for name, weight in trained.state_dict().items())
    assert "anchor_context" not in (one_process[0] / "step-10" / "config.json").read_text()
