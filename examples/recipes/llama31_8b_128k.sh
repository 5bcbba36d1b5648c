#!/usr/bin/env bash
# LLaMA-3.1-8B on rows of 131,072 tokens, the length that it was made for, on one node of 8 GPUs.
#
#     DATASET='data/*.jsonl' bash examples/recipes/llama31_8b_128k.sh
#
# RoPE stays as the model's config.json has it (base 500,000, stretched 8 times from 8,192 tokens by the type
# llama3): it was trained to 128K with it ("The Llama 3 Herd of Models", arXiv 2407.21783). Steps, batch and rate
# are those of the AnchorAttention paper for LLaMA-3-8B at 128K ("table 1": arXiv 2411.13476), which had to
# stretch RoPE itself (its base: 10⁷).
# --- expected, by expectations.py with --plan_gpu H100 --memory_gib 78
# engine   flash engine, kernel chosen there (the fastest that runs on the H100), data 1 × ring 1 × Ulysses 8
# memory   forwards of up to 9,984 tokens per rank (as many as fit, nothing recomputed), the longest 16,384
#   nothing recomputed                                               up to     9,984 tokens, 69.78 GiB
#   every 4th layer recomputed                                       up to    13,056 tokens, 69.84 GiB
#   every 2nd layer recomputed                                       up to    16,384 tokens, 64.12 GiB
#   of 70.20 GiB expected at most 69.84 GiB in the backward of layer 31 (weights 1.87 GiB, optimiser 11.22
#            GiB, gradients 3.74 GiB, bucket of gradients 381 MiB, gathered weights 2.93 GiB, a new gradient
#            1002 MiB, gradients in reduction 4.40 GiB, activations 43.98 GiB, layer at work 357 MiB)
#   checkpointing auto (as far as needed), tiled MLP auto (where needed), Liger yes (--liger, for a GPU
#            elsewhere)
# pattern  anchor, anchors per_document
# steps    2,000 × 8 rows × 131,072 tokens
# work     the first step: 12 micro-batches a rank, the work that ranks wait for 1.000 of the mean
# hours    7.6 for 1.09e+20 operations on 8 × H100, at 50% of 989 bfloat16 TFLOP/s each, waiting as in the
#            first step
# --- end
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

FLAGS=(
    --model_name_or_path "${MODEL:-meta-llama/Llama-3.1-8B}"
    --dataset "${DATASET:?name the files of the documents}"
    --seq-length 131072          # table 1: 128K
    --attention_pattern anchor   # the paper's own
    --gradient-accumulate-every 8 # table 1: 8 rows a step, 1 million tokens; all 8 GPUs share each row
    --max-train-steps 2000       # table 1
    --learning-rate 2e-5         # table 1
    --weight_decay 0.1           # table 1
    --parallel_mode ulysses_attn # the authors' script
    --liger yes                  # this project's choice: pip install liger-kernel==0.8.5
    --checkpoint_every 100       # this project's choice, as what follows
    --resume auto
    --output-dir output/llama31_8b_128k
)
exec python -m anchor_context.launch --config_file accelerate_configs/single_node.yaml train.py "${FLAGS[@]}" "$@"
