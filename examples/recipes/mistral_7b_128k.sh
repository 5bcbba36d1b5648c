#!/usr/bin/env bash
# Mistral-7B-v0.3 to 131,072 tokens, as the AnchorAttention paper trained it (arXiv 2411.13476), on one node of 8
# GPUs.
#
#     DATASET='data/*.jsonl' bash examples/recipes/mistral_7b_128k.sh
#
# "Table 1" is the paper's table of training configurations. Version 0.3 has no sliding window, 0.1 has one (their
# config.json).
# --- expected, by expectations.py with --plan_gpu H100 --memory_gib 78
# engine   flash engine, kernel chosen there (the fastest that runs on the H100), data 1 × ring 1 × Ulysses 8
# memory   forwards of up to 11,264 tokens per rank (as many as fit, nothing recomputed), the longest 16,384
#   nothing recomputed                                               up to    11,264 tokens, 69.08 GiB
#   every 4th layer recomputed                                       up to    14,848 tokens, 69.55 GiB
#   every 2nd layer recomputed                                       up to    16,384 tokens, 57.75 GiB
#   of 70.20 GiB expected at most 69.55 GiB in the backward of layer 31 (weights 1.69 GiB, optimiser 10.13
#            GiB, gradients 3.38 GiB, bucket of gradients 381 MiB, gathered weights 2.21 GiB, a new gradient
#            256 MiB, gradients in reduction 1.12 GiB, activations 50.01 GiB, layer at work 406 MiB)
#   checkpointing auto (as far as needed), tiled MLP auto (where needed), Liger yes (--liger, for a GPU
#            elsewhere)
# pattern  anchor, anchors per_document
# steps    2,000 × 8 rows × 131,072 tokens
# work     the first step: 11 micro-batches a rank, the work that ranks wait for 1.000 of the mean
# hours    7.3 for 1.04e+20 operations on 8 × H100, at 50% of 989 bfloat16 TFLOP/s each, waiting as in the
#            first step
# --- end
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

FLAGS=(
    --model_name_or_path "${MODEL:-mistralai/Mistral-7B-v0.3}" # table 1
    --dataset "${DATASET:?name the files of the documents}"
    --seq-length 131072          # table 1: 128K
    --rope-theta 10000000        # table 1: 10⁷ at 128K
    --attention_pattern anchor   # the paper's own
    --gradient-accumulate-every 8 # table 1: 8 rows a step, 1 million tokens; all 8 GPUs share each row
    --max-train-steps 2000       # table 1
    --learning-rate 2e-5         # table 1
    --weight_decay 0.1           # table 1
    --parallel_mode ulysses_attn # the authors' script
    --liger yes                  # this project's choice: pip install liger-kernel==0.8.5
    --checkpoint_every 100       # this project's choice, as what follows
    --resume auto
    --output-dir output/mistral_7b_128k
)
exec python -m anchor_context.launch --config_file accelerate_configs/single_node.yaml train.py "${FLAGS[@]}" "$@"
