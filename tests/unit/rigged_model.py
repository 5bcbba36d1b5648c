"""A model that answers prompts as a test wants it to, with all that `evaluate` asks of a real one."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor
from transformers import GenerationConfig


class RiggedModel:
    """Generates `answer(prompt)` after each prompt, and keeps the shapes of its batches."""

    device = torch.device("cpu")
    config = SimpleNamespace()
    generation_config = GenerationConfig()

    def __init__(self, tokenizer, answer: Callable[[str], str]):
        self.tokenizer, self.answer = tokenizer, answer
        self.batches: list[tuple[int, ...]] = []

    def generate(self, prompts: Tensor, *, attention_mask: Tensor, generation_config) -> Tensor:
        assert attention_mask.all() and not generation_config.do_sample
        self.batches.append(tuple(prompts.shape))
        texts = self.tokenizer.batch_decode(prompts, skip_special_tokens=True)
        new = [
            self.tokenizer(self.answer(text), add_special_tokens=False)["input_ids"]
            for text in texts
        ]
        new = [row[: generation_config.max_new_tokens] for row in new]
        width, pad = max(map(len, new)), generation_config.pad_token_id
        answers = torch.tensor([row + [pad] * (width - len(row)) for row in new])
        return torch.cat((prompts, answers), dim=1)
