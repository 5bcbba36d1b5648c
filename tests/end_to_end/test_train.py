"""Whole runs of train.py on the formats, models and flags that people bring."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import torch
from runs import ROOT, losses, metrics, weights
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    Mistral3Config,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

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


ROUNDS_FREQUENCIES = """
from accelerate import Accelerator

prepare = Accelerator.prepare

def fail_if_rounded(table, args):
    assert str(table.inv_freq.dtype) == "torch.float32", table.inv_freq.dtype

def prepare_and_round(self, model, optimizer):
    prepared = prepare(self, model, optimizer)
    for module in model.modules():
        if hasattr(module, "inv_freq"):
            module.inv_freq = module.inv_freq.bfloat16()
            module.register_forward_pre_hook(fail_if_rounded)
    return prepared

Accelerator.prepare = prepare_and_round
"""
"""What every process of a run runs first: `prepare` as DeepSpeed was before 0.19.2."""


def test_upstreams_flag_line_trains_in_bf16(launch, tmp_path):
    """Only the paths differ. Rows are longer than --seq-length, and no token of them is lost.

    A library rounds RoPE's frequencies on the way, and the run puts them right.
    """
    data, output = tmp_path / "rows.jsonl", tmp_path / "run"
    (tmp_path / "sitecustomize.py").write_text(ROUNDS_FREQUENCIES)
    tokens = write_tokenized(data, rows=3, row_tokens=10_001, vocab_size=512)
    finished = launch(
        2,
        output,
        *UPSTREAM_LINE.split(),
        *("--mixed_precision", "bf16", "--dataset", str(data)),
        PYTHONPATH=f"{tmp_path}:{ROOT}",
    )
    data_record = json.loads((output / "args.json").read_text())["data"]
    assert data_record["document_tokens"] == tokens and data_record["rows"] == 8
    assert len(losses(output)) == 3 and np.isfinite(losses(output)).all()
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
    # Logged before what counts as no step's time (the garbage collected after step 1, the models of steps 2,
    # 4 and 6), and at step 3.
    seconds = [step["step_seconds"] for step in steps]
    assert [seconds.index(value) for value in seconds] == [0, 1, 2, 3, 4, 4]
    for rank in (0, 1):
        trace = tmp_path / "run" / "profile" / f"steps-2-2.rank-{rank}.json.gz"
        assert json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert [step["learning_rate"] for step in steps[:3]] == [0, 0.005, 0.01] and steps[-1][
        "learning_rate"
    ] < 0.01
    data_record = json.loads((tmp_path / "run" / "args.json").read_text())["data"]
    assert data_record["anchors_added"] >= len(texts)
    step = tmp_path / "run" / "step-6"
    saved = AutoTokenizer.from_pretrained(step)
    assert saved.bos_token is None and saved.eos_token == "</s>"
    for name in ("tokenizer.json", "tokenizer_config.json", "foreign.py"):
        assert (step / name).read_bytes() == (model / name).read_bytes()
    assert "lm_head.weight" not in weights(step)  # tied: once
    assert list((tmp_path / "run").rglob("events.out.tfevents.*")), "no TensorBoard file"


def test_the_language_model_inside_another_is_trained_by_itself(launch, tiny, tmp_path):
    """As Mistral Small 3.1 keeps it: its configuration in `text_config`, its weights beside an eye's."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    config = Mistral3Config(
        text_config={"model_type": "mistral", "vocab_size": 512, "num_attention_heads": 4}
        | {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, **sizes},
        vision_config={"model_type": "pixtral", "num_attention_heads": 2, "head_dim": 16, **sizes},
        image_token_index=5,
    )
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tiny.model).save_pretrained(tmp_path / "model")
    finished = launch(
        1,
        tmp_path / "run",
        *("--model_name_or_path", str(tmp_path / "model"), "--max-train-steps", "3"),
    )
    assert "the language model inside mistral3" in finished.stdout
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run/step-3")
    assert isinstance(saved, MistralForCausalLM)
    assert saved.config.max_position_embeddings == 256


WATCHED = """\
import os
if "RANK" in os.environ:
    from anchor_context.data import prepare
    prepare_rows = prepare.prepare_rows

    def watched(*args, **settings):
        with open({calls!r}, "a") as stream:
            stream.write(os.environ["RANK"])
        return prepare_rows(*args, **settings)

    prepare.prepare_rows = watched
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
