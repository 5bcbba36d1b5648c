#!/usr/bin/env bash
# LLaMA-3.1-8B to 524,288 tokens on one node of 8 GPUs.
#
#     DATASET='data/*.jsonl' bash examples/recipes/llama31_8b_512k.sh
#
# The numbers are those of ProLong's last stage (arXiv 2410.02660; "its script" is train_512K.sh of
# github.com/princeton-nlp/ProLong), which starts from LLaMA-3-8B-Instruct after a stage at 64K. LLaMA-3.1 knows
# 128K: so this project chose to leave out that stage, and to train a twentieth of the tokens, 1 billion;
# ProLong's own amount is in prolong_8b_512k_two_nodes.sh. Half of the tokens and more should lie in long
# documents: ProLong has a fifth of them in documents of 524,288, two fifths in documents of 65,536.
# --- expected, by expectations.py with --plan_gpu H100 --memory_gib 78
# engine   flash engine, kernel chosen there (the fastest that runs on the H100), data 1 × ring 1 × Ulysses 8
# memory   forwards of up to 9,984 tokens per rank (as many as fit, nothing recomputed), the longest 65,536
#   nothing recomputed                                               up to     9,984 tokens, 69.78 GiB
#   every 4th layer recomputed                                       up to    13,056 tokens, 69.84 GiB
#   every 2nd layer recomputed                                       up to    18,944 tokens, 70.15 GiB
#   every layer recomputed                                           up to    65,536 tokens, 52.31 GiB
#   of 70.20 GiB expected at most 70.15 GiB in the backward of layer 31 (weights 1.87 GiB, optimiser 11.22
#            GiB, gradients 3.74 GiB, bucket of gradients 381 MiB, gathered weights 2.93 GiB, a new gradient
#            1002 MiB, gradients in reduction 4.40 GiB, activations 44.13 GiB, layer at work 518 MiB)
#   checkpointing auto (as far as needed), tiled MLP auto (where needed), Liger yes (--liger, for a GPU
#            elsewhere)
# pattern  anchor, anchors per_document
# steps    120 × 16 rows × 524,288 tokens
# work     the first step: 88 micro-batches a rank, the work that ranks wait for 1.000 of the mean
# hours    7.9 for 1.13e+20 operations on 8 × H100, at 50% of 989 bfloat16 TFLOP/s each, waiting as in the
#            first step
# --- end
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

FLAGS=(
    --model_name_or_path "${MODEL:-meta-llama/Llama-3.1-8B}"
    --dataset "${DATASET:?name the files of the documents}"
    --seq-length 524288           # its script: 512K
    --rope_scaling_type default   # LLaMA-3, which it starts from, has no stretching besides the base
    --rope-theta 128000000        # its script
    --attention_pattern anchor    # this project's; ProLong keeps documents apart, too (intra_doc)
    --gradient-accumulate-every 16 # its script: 8 million tokens a step; all 8 GPUs share each row
    --max-train-steps 120         # this project's choice: 1 billion tokens (its script: 2,500 steps)
    --learning-rate 5e-6          # its script
    --lr_scheduler_type cosine    # its script
    --min_lr_ratio 0.1            # its script: ends at a tenth of the rate
    --warmup_steps 12             # its script: a tenth of the steps
    --weight_decay 0.1            # its script
    --max_grad_norm 1             # its script
    --parallel_mode ulysses_attn  # its script: 8 GPUs share a row
    --liger yes                   # this project's choice: pip install liger-kernel==0.8.5
    --checkpoint_every 20         # this project's choice, as what follows
    --resume auto
    --output-dir output/llama31_8b_512k
)
exec python -m anchor_context.launch --config_file accelerate_configs/single_node.yaml train.py "${FLAGS[@]}" "$@"
