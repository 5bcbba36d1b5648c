"""Whole runs of train.py on the formats, models and flags that people bring."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from runs import losses, metrics
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
    data = tmp_path / "documents.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))

    launch(
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
    )
    steps = metrics(tmp_path / "run")
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert [step["learning_rate"] for step in steps[:3]] == [0, 0.005, 0.01] and steps[-1][
        "learning_rate"
    ] < 0.01
    data_record = json.loads((tmp_path / "run" / "args.json").read_text())["data"]
    assert data_record["anchors_added"] >= len(texts)
    saved = AutoTokenizer.from_pretrained(tmp_path / "run" / "step-6")
    assert saved.bos_token is None and saved.eos_token == "</s>"
    assert list((tmp_path / "run").rglob("events.out.tfevents.*")), "no TensorBoard file"


def test_bad_input_is_one_error_and_leaves_nothing(launch, tmp_path):
    data = tmp_path / "broken.jsonl"
    data.write_text('{"text": "fine"}\n{"text": "broken\n')
    finished = launch(2, tmp_path / "run", "--dataset", str(data), expect=None)
    assert finished.returncode != 0
    errors = [line for line in finished.stdout.splitlines() if "error:" in line]
    assert len(errors) == 1 and "broken.jsonl" in errors[0] and "line 2" in errors[0]
    assert "--skip_bad_documents" in errors[0]
    assert not (tmp_path / "run").exists()
