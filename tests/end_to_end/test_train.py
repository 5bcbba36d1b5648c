"""Whole runs of train.py on the formats, models and flags that people bring."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import torch
from runs import ROOT, losses, metrics
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from anchor_context.demo import train_tokenizer

UPSTREAM_LINE = """
    --batch-size 1 --gradient-accumulate-every 2 --seed 2023 --max-train-steps 3 --learning-rate 1e-3
    --data-format tokenized --seq-length 4096 --model_max_position_embeddings 4096 --rope-theta 1000000
    --rope_scaling_type default --rope_scaling_factor 16 --max_grad_norm 1 --parallel_mode ulysses_attn
    --attn_engine flash --save_per_hours 5 --saving_interval 2 --min_steps_for_save 2
"""


def write_tokenized(path: Path, *, rows: int, row_tokens: int, vocab_size: int) -> int:
    """Rows as Long-Context-Data-Engineering writes them; returns how many tokens they have."""
    rng = np.random.default_rng(0)
    with path.open("w") as stream:
        for _ in range(rows):
            ids = rng.integers(2, vocab_size, row_tokens)
            ends = np.append(
                np.sort(rng.choice(np.arange(1, row_tokens), 9, replace=False)), row_tokens
            )
            ids[[0, *ends[:-1]]] = 1  # BOS
            source = [{"source": "web", "end": int(end)} for end in ends]
            stream.write(json.dumps({"input_ids": ids.tolist(), "source": source}) + "\n")
    return rows * row_tokens


def add_code(model: Path, *, marker: Path) -> None:
    """Give the model's folder code of its own; to import it makes the file `marker`."""
    (model / "foreign.py").write_text(f"from pathlib import Path\nPath({str(marker)!r}).touch()\n")
    for file, classes in (
        ("config.json", {"AutoConfig": "foreign.Config", "AutoModelForCausalLM": "foreign.Model"}),
        ("tokenizer_config.json", {"AutoTokenizer": [None, "foreign.Tokenizer"]}),
    ):
        settings = json.loads((model / file).read_text())
        (model / file).write_text(json.dumps(settings | {"auto_map": classes}))


def test_upstreams_flag_line_trains_in_bf16(launch, tmp_path):
    """Only the paths differ. Rows are longer than --seq-length, and no token of them is lost."""
    data, output = tmp_path / "rows.jsonl", tmp_path / "run"
    tokens = write_tokenized(data, rows=3, row_tokens=10_001, vocab_size=512)
    finished = launch(
        2,
        output,
        *UPSTREAM_LINE.split(),
        *("--mixed_precision", "bf16", "--dataset", str(data)),
    )
    data_record = json.loads((output / "args.json").read_text())["data"]
    assert data_record["document_tokens"] == tokens and data_record["rows"] == 8
    assert len(losses(output)) == 3 and np.isfinite(losses(output)).all()
    # check_rotary_precision ran on the prepared bf16 model, or the run had failed.
    assert {path.name for path in output.glob("step-*")} == {"step-2", "step-3"}, finished.stdout
    model = AutoModelForCausalLM.from_pretrained(output / "step-3", dtype="auto")
    assert model.dtype == torch.bfloat16
    assert model.config.rope_parameters == {"rope_type": "default", "rope_theta": 1e6}
    assert model.config.max_position_embeddings == 4096


def test_a_tokenizer_without_bos_trains_with_eos_as_the_anchor(launch, tmp_path):
    """Qwen's kind; EOS also stands inside the rows, at the end of every document."""
    model = tmp_path / "model"
    texts = ["def f(x):\n    return x + 1\n" * n for n in range(1, 60)]
    tokenizer = train_tokenizer(texts, vocab_size=300, bos=False)
    tokenizer.save_pretrained(model)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(model)
    add_code(model, marker=tmp_path / "foreign code ran")
    data = tmp_path / "documents.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))

    secrets = {name: f"the {name} of nobody" for name in ("HF_TOKEN", "WANDB_API_KEY")}
    finished = launch(
        2,
        tmp_path / "run",
        *("--model_name_or_path", str(model), "--dataset", str(data), "--max-train-steps", "6"),
        *(
            "--lr_scheduler_type",
            "cosine",
            "--warmup_steps",
            "2",
            "--learning-rate",
            "1e-2",
            "--tensorboard",
        ),
        *("--logging_steps", "3", "--saving_interval", "2", "--profile_steps", "2:2"),
        **secrets,
    )
    assert not (tmp_path / "foreign code ran").exists()
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    for secret in secrets.values():
        assert secret not in finished.stdout
        assert not [path for path in written if secret.encode() in path.read_bytes()]

    steps = metrics(tmp_path / "run")
    assert [step["step"] for step in steps] == [1, 2, 3, 4, 5, 6]
    assert all(0 <= step["data_wait_share"] <= 1 for step in steps)
    # Logged with the models of steps 2, 4 and 6, whose saving counts as no step's time, and at step 3.
    seconds = [step["step_seconds"] for step in steps]
    assert [seconds.index(value) for value in seconds] == [0, 0, 2, 3, 4, 4]
    for rank in (0, 1):
        trace = tmp_path / "run" / "profile" / f"steps-2-2.rank-{rank}.json.gz"
        assert json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert [step["learning_rate"] for step in steps[:3]] == [0, 0.005, 0.01] and steps[-1][
        "learning_rate"
    ] < 0.01
    data_record = json.loads((tmp_path / "run" / "args.json").read_text())["data"]
    assert data_record["anchors_added"] >= len(texts)
    saved = AutoTokenizer.from_pretrained(tmp_path / "run" / "step-6")
    assert saved.bos_token is None and saved.eos_token == "</s>"
    assert list((tmp_path / "run").rglob("events.out.tfevents.*")), "no TensorBoard file"


WATCHED = """\
import os
if "RANK" in os.environ:
    from anchor_context.data import packing
    prepare_rows = packing.prepare_rows

    def watched(*args, **settings):
        with open({calls!r}, "a") as stream:
            stream.write(os.environ["RANK"])
        return prepare_rows(*args, **settings)

    packing.prepare_rows = watched
"""


def test_bad_input_is_one_error_found_by_one_rank_and_leaves_nothing(launch, tmp_path):
    data, calls = tmp_path / "broken.jsonl", tmp_path / "calls"
    data.write_text('{"text": "fine"}\n{"text": "broken\n')
    (tmp_path / "sitecustomize.py").write_text(WATCHED.format(calls=str(calls)))
    path = {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    finished = launch(2, tmp_path / "run", "--dataset", str(data), expect=None, **path)
    assert finished.returncode != 0
    errors = [line for line in finished.stdout.splitlines() if "error:" in line]
    assert len(errors) == 1 and "broken.jsonl" in errors[0] and "line 2" in errors[0]
    assert "--skip_bad_documents" in errors[0]
    assert not (tmp_path / "run").exists()
    assert calls.read_text() == "0"
