#!/usr/bin/env bash
# ProLong's last stage, LLaMA-3-8B from 65,536 to 524,288 tokens, on two nodes of 8 GPUs. On each of them, with
# the data, the model and --output-dir on storage that both see:
#
#     RANK_OF_MACHINE=0 FIRST_MACHINE=10.0.0.1 DATASET='data/*.jsonl' \
#         bash examples/recipes/prolong_8b_512k_two_nodes.sh       # RANK_OF_MACHINE=1 on the other
#
# The numbers are those of arXiv 2410.02660 and of train_512K.sh of github.com/princeton-nlp/ProLong ("its
# script"). Four nodes: a launch configuration of 4 machines and 32 processes, on each its --machine_rank, and
# either --ring_degree 4, or --gradient-accumulate-every 8: a step stays 16 rows. Networks and storage are
# described in anchor_context/parallel/README.md.
# --- expected, by expectations.py with --plan_gpu H100 --memory_gib 78
# engine   flash engine, kernel chosen there (the fastest that runs on the H100), data 1 × ring 2 × Ulysses 8
# memory   forwards of up to 11,520 tokens per rank (as many as fit, nothing recomputed), the longest 32,768
#   nothing recomputed                                               up to    11,520 tokens, 69.34 GiB
#   every 4th layer recomputed                                       up to    15,104 tokens, 69.52 GiB
#   every 2nd layer recomputed                                       up to    22,016 tokens, 70.08 GiB
#   every layer recomputed                                           up to    32,768 tokens, 30.38 GiB
#   of 70.20 GiB expected at most 70.08 GiB in the backward of layer 31 (weights 957 MiB, optimiser 5.61 GiB,
#            gradients 1.87 GiB, bucket of gradients 381 MiB, gathered weights 2.93 GiB, a new gradient 1002
#            MiB, gradients in reduction 4.16 GiB, activations 52.63 GiB, layer at work 602 MiB)
#   checkpointing auto (as far as needed), tiled MLP auto (where needed), Liger yes (--liger, for a GPU
#            elsewhere)
# pattern  anchor, anchors per_document
# steps    2,500 × 16 rows × 524,288 tokens
# work     the first step: 40 micro-batches a rank, the work that ranks wait for 1.000 of the mean
# ring     of its last micro-batch: imbalance 1.026, 23 tokens of keys and values sent per layer: 0.000 of a
#            plain ring's bytes
# hours    84.7 for 2.35e+21 operations on 16 × H100, at 50% of 989 bfloat16 TFLOP/s each, waiting as in the
#            first step
# --- end
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

LAUNCH=(
    --config_file accelerate_configs/two_node.yaml # 16 processes
    --machine_rank "${RANK_OF_MACHINE:-0}"
    --main_process_ip "${FIRST_MACHINE:-127.0.0.1}"
)
FLAGS=(
    --model_name_or_path "${MODEL:-princeton-nlp/Llama-3-8B-ProLong-64k-Base}" # what its first stage made
    --dataset "${DATASET:?name the files of the documents}"
    --seq-length 524288           # its script: 512K
    --rope-theta 128000000        # its script
    --attention_pattern anchor    # this project's; ProLong keeps documents apart, too (intra_doc)
    --gradient-accumulate-every 16 # its script: 8 million tokens a step; all 16 GPUs share each row
    --max-train-steps 2500        # its script: 20 billion tokens
    --learning-rate 5e-6          # its script
    --lr_scheduler_type cosine    # its script
    --min_lr_ratio 0.1            # its script: ends at a tenth of the rate
    --warmup_steps 250            # its script: a tenth of the steps
    --weight_decay 0.1            # its script
    --max_grad_norm 1             # its script
    --parallel_mode hybrid_attn   # this project's choice: exchanges of heads stay inside a node,
    --ulysses_degree 8            # as its script has them,
    --ring_degree 2               # and keys and values that are needed go between the two
    --liger yes                   # this project's choice: pip install liger-kernel==0.8.5
    --checkpoint_every 125        # its script: --save_steps
    --resume auto
    --output-dir output/prolong_8b_512k
)
exec python -m anchor_context.launch "${LAUNCH[@]}" train.py "${FLAGS[@]}" "$@"
