"""A checkpoint is scored by lm-evaluation-harness, through its Python API, on a task of this machine."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from anchor_context.demo import tiny_llama, train_tokenizer

lm_eval = pytest.importorskip(
    "lm_eval", reason="lm_eval is not installed: pip install -r tests/requirements.txt"
)

QUESTIONS = [
    ("The sky is", [" blue", " made of old cheese", " seven"], 0),
    ("Two and two are", [" four", " a house by the sea", " green"], 0),
    ("A cat says", [" train", " meow", " yesterday at noon"], 1),
    ("Water is", [" dry", " loud and square", " wet"], 2),
]

TASK = """
task: local_choice
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{label}}}}"
doc_to_choice: "{{{{choices}}}}"
target_delimiter: ""
metric_list:
  - metric: acc
"""


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint as a run saves it (step-N: a plain model and its tokenizer), and the local task."""
    text = [question + " ".join(choices) for question, choices, _ in QUESTIONS]
    tokenizer = train_tokenizer(text, vocab_size=400)
    tokenizer.save_pretrained(tmp_path / "step-10")
    tiny_llama(tokenizer, hidden=32, layers=2).save_pretrained(tmp_path / "step-10")
    with (tmp_path / "questions.jsonl").open("w") as stream:
        for question, choices, label in QUESTIONS:
            stream.write(
                json.dumps({"question": question, "choices": choices, "label": label}) + "\n"
            )
    (tmp_path / "local_choice.yaml").write_text(TASK.format(data=tmp_path / "questions.jsonl"))
    return tmp_path


def log_likelihood(model, tokenizer, question: str, choice: str) -> float:
    """Of the choice after BOS and the question, computed here."""
    ids = tokenizer(question + choice)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    asked = len(tokenizer(question)["input_ids"])
    with torch.no_grad():
        logp = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(logp[i - 1, ids[i]].item() for i in range(asked, len(ids)))


def test_the_harness_scores_a_checkpoint_on_a_local_task(checkpoint, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(checkpoint / "cache"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    from lm_eval.tasks import TaskManager

    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={
            "pretrained": str(checkpoint / "step-10"),
            "dtype": "float32",
            "add_bos_token": True,
        },
        tasks=["local_choice"],
        task_manager=TaskManager(include_path=str(checkpoint), include_defaults=False),
        device="cpu",
        batch_size=2,
        bootstrap_iters=0,
    )
    tokenizer = AutoTokenizer.from_pretrained(checkpoint / "step-10")
    model = AutoModelForCausalLM.from_pretrained(checkpoint / "step-10").eval()
    samples = found["samples"]["local_choice"]
    assert len(samples) == len(QUESTIONS)
    right = 0
    for sample in samples:
        question, choices, label = QUESTIONS[sample["doc_id"]]
        expected = [log_likelihood(model, tokenizer, question, choice) for choice in choices]
        scored = [response[0] for response in sample["filtered_resps"]]
        assert scored == pytest.approx(expected, rel=1e-3)
        right += max(range(3), key=lambda i: expected[i]) == label
    assert found["results"]["local_choice"]["acc,none"] == right / len(QUESTIONS)
