"""A model's answers to prompts, in batches, and how long they will take.

Guarantees: greedy, so that the same model gives the same answers. Prompts of one batch have equally many
tokens, so that nothing is padded or masked.
Costs: one prefill per batch and a step on its key-value cache per new token; only the last token's logits are
computed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Protocol, TypeVar

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

Generate = Callable[..., Tensor]
"""generate(prompts (N, S) int64, new_tokens=int) -> (N, new tokens) int64"""

BATCH_TOKENS = 16_384
"""Of the prompts in a batch, where its size is not given: enough to fill a GPU, and a cache that is small."""


class Question(Protocol):
    token_ids: list[int]

    @property
    def new_tokens(self) -> int:
        """That may be generated."""


Asked = TypeVar("Asked", bound=Question)


def batches_of(prompts: Sequence[Asked], batch_size: int | None) -> Iterator[list[Asked]]:
    """Prompts of equal size and as many new tokens, the shortest first, `batch_size` at a time.

    Without a size, as many as have `BATCH_TOKENS`, and at least one.
    """

    def size(prompt: Question) -> tuple[int, int]:
        return len(prompt.token_ids), prompt.new_tokens

    for (tokens, _), same in groupby(sorted(prompts, key=size), key=size):
        of_size, at_once = list(same), batch_size or max(1, BATCH_TOKENS // tokens)
        for first in range(0, len(of_size), at_once):
            yield of_size[first : first + at_once]


def generated_texts(
    generate: Generate,
    prompts: Sequence[Asked],
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int | None,
    seen: Callable[[int], None] = lambda number: None,
) -> Iterator[tuple[Asked, str]]:
    """Every prompt with what is generated after it, in batches; `seen` is told how many each one had."""
    for batch in batches_of(prompts, batch_size):
        generated = generate(
            torch.tensor([prompt.token_ids for prompt in batch]), new_tokens=batch[0].new_tokens
        )
        for prompt, token_ids in zip(batch, generated.tolist(), strict=True):
            yield prompt, tokenizer.decode(token_ids, skip_special_tokens=True)
        seen(len(batch))


def greedy(model: PreTrainedModel, *, pad_id: int) -> Generate:
    """The model's own `generate`, plainly greedy: nothing of its generation config but the end token.

    `pad_id`, a special token, stands behind the answers that end before others of their batch.
    """

    @torch.inference_mode()
    def generate(prompts: Tensor, *, new_tokens: int) -> Tensor:
        prompts, own = prompts.to(model.device), model.generation_config
        plain = GenerationConfig(
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=pad_id,
            eos_token_id=own.eos_token_id,
        )
        # transformers fills what a config leaves unset (penalties, suppressed tokens) from the model's.
        model.generation_config = plain
        try:
            output = model.generate(
                prompts, attention_mask=torch.ones_like(prompts), generation_config=plain
            )
        finally:
            model.generation_config = own
        return output[:, prompts.shape[1] :]

    return generate


def estimated_seconds(
    generate: Generate, prompts: Sequence[Question], *, batch_size: int | None
) -> float:
    """About what `generated_texts` will take, measured on an eighth and a quarter of the longest prompt.

    A prefill of S tokens takes a·S + b·S²; a decoding step of a batch what as many prompts of one token take,
    which leaves out reading their cache. Batches that fill a GPU better than one prompt does, and answers
    that end early, take less.
    """
    longest = max((prompt.token_ids for prompt in prompts), key=len)
    eighth, quarter = max(len(longest) // 8, 1), max(len(longest) // 4, 2)
    batches = list(batches_of(prompts, batch_size))

    def seconds(tokens: int, *, at_once: int = 1) -> float:
        batch, start = torch.tensor([longest[:tokens]] * at_once), time.perf_counter()
        generate(batch, new_tokens=1).tolist()  # waits for the device
        return time.perf_counter() - start

    seconds(quarter)  # the first call of a size pays for more than itself
    short, long = seconds(eighth), seconds(quarter)
    b = max((long / quarter - short / eighth) / (quarter - eighth), 0.0)
    a = max(long / quarter - b * quarter, 0.0)
    step = {
        number: min(seconds(1, at_once=number) for _ in range(2))
        for number in {len(batch) for batch in batches}
    }
    return math.fsum(
        len(batch) * (a * tokens + b * tokens**2) + batch[0].new_tokens * step[len(batch)]
        for batch in batches
        if (tokens := len(batch[0].token_ids))
    )
