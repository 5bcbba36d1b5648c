#!/usr/bin/env bash
# Sets up and trains. On a machine without a GPU: a tiny LLaMA on two CPU processes, with DeepSpeed ZeRO-3,
# Ulysses and AnchorAttention, on the Python standard library's source code. With GPUs: on all of them.
#
# From the environment: MODEL DATASET DATA_FORMAT SEQ_LENGTH ENGINE PARALLEL_MODE NPROC MAX_STEPS LEARNING_RATE
# OUTPUT; further flags of train.py go behind the command: bash demo_llama.sh --attention_pattern full
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source setup.sh requirements.txt

# Debugging: uncomment, start, and attach VS Code with "Attach to train.py" (see README).
# export DEBUGPY=1

GPUS=$(python -c 'import torch; print(torch.cuda.device_count())')
OUTPUT=${OUTPUT:-output/demo_llama}
SEQ_LENGTH=${SEQ_LENGTH:-4096}
MAX_STEPS=${MAX_STEPS:-120}
PARALLEL_MODE=${PARALLEL_MODE:-ulysses_attn}
ENGINE=${ENGINE:-flash}
DATA_FORMAT=${DATA_FORMAT:-raw_json}
if [ "$GPUS" -gt 0 ]; then
    NPROC=${NPROC:-$GPUS} CONFIG=accelerate_configs/single_node.yaml PRECISION=bf16
else
    NPROC=${NPROC:-2} CONFIG=accelerate_configs/cpu.yaml PRECISION=no
    export DS_ACCELERATOR=cpu # or every process of DeepSpeed warns that it found no GPU
fi

if [ -e "$OUTPUT/args.json" ] && [[ " $* " != *" --resume"[\ =]* ]]; then
    echo "$OUTPUT holds an earlier run; nothing was resumed and nothing overwritten:"
    python -m anchor_context.summary "$OUTPUT"
    echo "Continue it with    MAX_STEPS=$((2 * MAX_STEPS)) bash demo_llama.sh --resume auto"
    echo "or start another    OUTPUT=output/another bash demo_llama.sh${*:+ $*}"
    [ $# -eq 0 ] || { echo "error: these flags were not used: $*" >&2; exit 2; }
    exit 0
fi

LAYOUT=(--parallel_mode "$PARALLEL_MODE")
if [ -z "${MODEL:-}" ] && [ "$PARALLEL_MODE" = ulysses_attn ]; then
    # The tiny model has four heads for Ulysses to split; what ranks are left over train other rows.
    for degree in 1 2 4; do [ $((NPROC % degree)) -ne 0 ] || ULYSSES=$degree; done
    LAYOUT+=(--ulysses_degree "$ULYSSES")
fi
if [ -z "${MODEL:-}" ] || [ -z "${DATASET:-}" ]; then
    [ -e output/demo_data/model/config.json ] || python -m anchor_context.demo output/demo_data
fi
[ -n "${MODEL:-}" ] || LEARNING_RATE=${LEARNING_RATE:-2e-3} # random weights bear, and need, a high rate
MODEL=${MODEL:-output/demo_data/model}
DATASET=${DATASET:-output/demo_data/documents.jsonl}

export TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# As `accelerate launch`, and with the exit code of train.py: 75 where a signal stopped it (see README). In the
# place of this shell, so that signals reach it.
exec python -m anchor_context.launch --config_file "$CONFIG" --num_processes "$NPROC" train.py \
    --model_name_or_path "$MODEL" \
    --dataset "$DATASET" \
    --data-format "$DATA_FORMAT" \
    --seq-length "$SEQ_LENGTH" \
    --attn_engine "$ENGINE" \
    "${LAYOUT[@]}" \
    --mixed_precision "$PRECISION" \
    --max-train-steps "$MAX_STEPS" \
    --learning-rate "${LEARNING_RATE:-2e-5}" \
    --lr_scheduler_type cosine \
    --warmup_steps "$((MAX_STEPS < 10 ? MAX_STEPS : 10))" \
    --checkpoint_every "$MAX_STEPS" \
    --output-dir "$OUTPUT" \
    "$@"

# The real thing, LLaMA-2-7B at 65,536 tokens on one machine with 8 GPUs:
#
# python -m anchor_context.launch --config_file accelerate_configs/single_node.yaml train.py \
#     --model_name_or_path meta-llama/Llama-2-7b-hf --rope-theta 1000000 \
#     --dataset 'data/slimpajama-packed-256k/*.jsonl' --data-format tokenized --seq-length 65536 \
#     --attn_engine flash --parallel_mode ulysses_attn --gradient_checkpointing full \
#     --batch-size 1 --gradient-accumulate-every 8 --max-train-steps 2000 --learning-rate 2e-5 \
#     --checkpoint_every 100 --resume auto --output-dir output/llama-2-7b-64k
#
# On two machines, on each of them (RANK_OF_MACHINE 0 on the first, 1 on the second):
#
# python -m anchor_context.launch --config_file accelerate_configs/two_node.yaml \
#     --machine_rank $RANK_OF_MACHINE --main_process_ip $FIRST_MACHINE --main_process_port 29500 train.py \
#     … the same flags, with --parallel_mode hybrid_attn --ulysses_degree 8 --ring_degree 2
