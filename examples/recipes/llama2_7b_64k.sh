#!/usr/bin/env bash
# LLaMA-2-7B to 65,536 tokens: the run of the AnchorAttention paper (arXiv 2411.13476), on one node of 8 GPUs.
#
#     DATASET='data/*.jsonl' bash examples/recipes/llama2_7b_64k.sh
#
# "Table 1" is the paper's table of training configurations. Its data are SlimPajama's, 2 billion tokens cut at
# 64K; here a line of DATASET is a document ({"text": …}), and the rows of 65,536 tokens are packed from them.
# --- expected, by expectations.py with --plan_gpu H100 --memory_gib 78
# engine   flash engine, kernel chosen there (the fastest that runs on the H100), data 1 × ring 1 × Ulysses 8
# memory   forwards of up to 8,192 tokens per rank (whole rows fit, nothing recomputed), the longest 8,192
#   nothing recomputed                                               up to     8,192 tokens, 52.43 GiB
#   of 70.20 GiB expected at most 52.43 GiB in the backward of layer 31 (weights 1.57 GiB, optimiser 9.41 GiB,
#            gradients 3.14 GiB, bucket of gradients 381 MiB, gathered weights 2.20 GiB, a new gradient 250
#            MiB, gradients in reduction 1.10 GiB, activations 34.23 GiB, layer at work 172 MiB)
#   checkpointing auto (as far as needed), tiled MLP auto (where needed), Liger yes (--liger, for a GPU
#            elsewhere)
# pattern  anchor, anchors per_document
# steps    2,000 × 8 rows × 65,536 tokens
# work     the first step: 8 micro-batches a rank, the work that ranks wait for 1.000 of the mean
# hours    3.3 for 4.64e+19 operations on 8 × H100, at 50% of 989 bfloat16 TFLOP/s each, waiting as in the
#            first step
# --- end
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

FLAGS=(
    --model_name_or_path "${MODEL:-meta-llama/Llama-2-7b-hf}" # table 1
    --dataset "${DATASET:?name the files of the documents}"
    --seq-length 65536           # table 1: 64K
    --rope-theta 5000000         # table 1: 5 × 10⁶ at 64K
    --attention_pattern anchor   # the paper's own
    --gradient-accumulate-every 8 # table 1: 8 rows a step, 0.5 million tokens; all 8 GPUs share each row
    --max-train-steps 2000       # table 1
    --learning-rate 2e-5         # table 1; it names no schedule, and the authors' script has none
    --weight_decay 0.1           # table 1: AdamW, whose β are 0.9 and 0.95 there and in train.py
    --max_grad_norm 1            # the default of the authors' script under DeepSpeed
    --parallel_mode ulysses_attn # the authors' script
    --liger yes                  # this project's choice: pip install liger-kernel==0.8.5
    --checkpoint_every 100       # this project's choice, as what follows
    --resume auto
    --output-dir output/llama2_7b_64k
)
exec python -m anchor_context.launch --config_file accelerate_configs/single_node.yaml train.py "${FLAGS[@]}" "$@"
