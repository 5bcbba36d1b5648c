#!/usr/bin/env bash
# Qwen3-8B-Base to 131,072 tokens, on one node of 8 GPUs.
#
#     DATASET='data/*.jsonl' bash examples/recipes/qwen3_8b_128k.sh
#
# Qwen3 was trained to 32,768 tokens and is served up to 131,072 by YaRN with a factor of 4 ("the card": that of
# Qwen/Qwen3-8B). Nobody has published a training at that length: here the model learns with the RoPE that it
# is served with, by the steps, batch and rate of the AnchorAttention paper at 128K ("table 1": arXiv
# 2411.13476), which trained a smaller, earlier Qwen so. Qwen has no BOS: its EOS is the anchor.
# --- expected, by expectations.py with --plan_gpu H100 --memory_gib 78
# engine   flash engine, kernel chosen there (the fastest that runs on the H100), data 1 × ring 1 × Ulysses 8
# memory   forwards of up to 8,704 tokens per rank (as many as fit, nothing recomputed), the longest 16,384
#   nothing recomputed                                               up to     8,704 tokens, 69.77 GiB
#   every 4th layer recomputed                                       up to    11,264 tokens, 69.38 GiB
#   every 2nd layer recomputed                                       up to    16,384 tokens, 69.76 GiB
#   of 70.20 GiB expected at most 69.77 GiB in the backward of layer 35 (weights 1.91 GiB, optimiser 11.44
#            GiB, gradients 3.81 GiB, bucket of gradients 381 MiB, gathered weights 3.11 GiB, a new gradient
#            1.16 GiB, gradients in reduction 5.22 GiB, activations 42.55 GiB, layer at work 204 MiB)
#   checkpointing auto (as far as needed), tiled MLP auto (where needed), Liger yes (--liger, for a GPU
#            elsewhere)
# pattern  anchor, anchors per_document
# steps    2,000 × 8 rows × 131,072 tokens
# work     the first step: 14 micro-batches a rank, the work that ranks wait for 1.000 of the mean
# hours    7.9 for 1.12e+20 operations on 8 × H100, at 50% of 989 bfloat16 TFLOP/s each, waiting as in the
#            first step
# --- end
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

FLAGS=(
    --model_name_or_path "${MODEL:-Qwen/Qwen3-8B-Base}"
    --dataset "${DATASET:?name the files of the documents}"
    --seq-length 131072          # the card: 131,072; table 1: 128K
    --rope_scaling_type yarn     # the card
    --rope_scaling_factor 4      # the card: from 32,768, which the model's config.json has
    --attention_pattern anchor   # the paper's own
    --gradient-accumulate-every 8 # table 1: 8 rows a step, 1 million tokens; all 8 GPUs share each row
    --max-train-steps 2000       # table 1
    --learning-rate 2e-5         # table 1
    --weight_decay 0.1           # table 1
    --parallel_mode ulysses_attn # the authors' script
    --liger yes                  # this project's choice: pip install liger-kernel==0.8.5
    --checkpoint_every 100       # this project's choice, as what follows
    --resume auto
    --output-dir output/qwen3_8b_128k
)
exec python -m anchor_context.launch --config_file accelerate_configs/single_node.yaml train.py "${FLAGS[@]}" "$@"
