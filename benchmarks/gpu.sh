#!/usr/bin/env bash
# What one (the first) CUDA device reaches, in parts that run alone:
#
#     bash benchmarks/gpu.sh                    # attention step run longest tests: at most 6.5 minutes
#     bash benchmarks/gpu.sh attention step     # these parts alone
#     bash benchmarks/gpu.sh --also             # the rest: flex plain offload memory paper large_tests
#
#     --seconds N         each part's limit, instead of its own
#     --results FOLDER    where <gpu>.json is written; default: benchmarks/results, with the tables of its README.md
#     --tiny              every part at the size of a test; needs no GPU
#
# A part is one process (`run` starts train.py besides). What it measures is printed and kept at once: a part that
# fails or is ended loses nothing that it had, and parts of several calls add up. PYTHON=… names another
# interpreter than .venv's or the path's.
set -euo pipefail
cd "$(dirname "$0")/.."

PARTS=() RESULTS=benchmarks/results LIMIT="" TINY=""
while [ $# -gt 0 ]; do
    case $1 in
    --also) PARTS+=(flex plain offload memory paper large_tests) ;;
    --seconds) LIMIT=$2 && shift ;;
    --results) RESULTS=$2 && shift ;;
    --tiny) TINY=yes ;;
    *) PARTS+=("$1") ;;
    esac
    shift
done
[ ${#PARTS[@]} -gt 0 ] || PARTS=(attention step run longest tests)

if [ -z "${PYTHON:-}" ]; then
    PYTHON=python
    [ ! -x .venv/bin/python ] || PYTHON=.venv/bin/python
fi
if [ -z "$TINY" ] && ! "$PYTHON" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())'; then
    echo "error: $PYTHON sees no CUDA device; install a CUDA build of torch (see README), or name PYTHON=" >&2
    exit 2
fi
"$PYTHON" -c 'import importlib.util as u, sys; sys.exit(not u.find_spec("liger_kernel"))' ||
    echo "note: liger-kernel is not installed (pip install liger-kernel==0.8.5): the tiled loss is measured instead"

export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-0}"
export PYTORCH_ALLOC_CONF=expandable_segments:True # long rows leave no room for fragments
export PYTHONUNBUFFERED=1
# What FlashAttention-4 compiled in one part is there for the next ones.
export FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED=1
mkdir -p "$RESULTS"
KEPT=$RESULTS/kept.jsonl # measured and not merged yet: also what a call left that was ended from outside
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT

# part SECONDS BENCHMARK FLAGS… -- THE SAME IN A TEST…: keeps every result itself, and looks at the clock itself,
# so that it ends before it is ended. Python takes up to 15 seconds to import what a benchmark needs.
part() {
    local limit=${LIMIT:-$1} benchmark=$2 flags=() tiny=()
    shift 2
    while [ "$1" != -- ]; do flags+=("$1") && shift; done
    [ -z "$TINY" ] || flags=("${@:2}")
    echo "== $benchmark ${flags[*]} (at most $limit s)"
    flags+=(--at_most_seconds $((limit > 30 ? limit - 15 : limit / 2)) --keep "$KEPT")
    timeout --kill-after 3 "$limit" "$PYTHON" "benchmarks/$benchmark" "${flags[@]}" ||
        echo "$benchmark did not finish (exit $?); what it measured until then is kept"
    collect
}

# whole SECONDS BENCHMARK FLAGS…: tells what it found in its last line alone.
whole() {
    local limit=${LIMIT:-$1} benchmark=$2
    shift 2
    echo "== $benchmark $* (at most $limit s)"
    if timeout --kill-after 3 "$limit" "$PYTHON" "benchmarks/$benchmark" "$@" >"$WORK/log"; then
        tail -n 1 "$WORK/log" >>"$KEPT"
        head -n -1 "$WORK/log"
    else
        echo "$benchmark did not finish (exit $?); the end of what it said:"
        tail -n 15 "$WORK/log"
    fi
    collect
}

collect() {
    [ -s "$KEPT" ] || return 0
    "$PYTHON" benchmarks/collect.py "$KEPT" --results "$RESULTS"
    rm "$KEPT"
}

for name in "${PARTS[@]}"; do
    case $name in
    attention) part 50 attention.py -- --row_lengths 256 --repeats 1 ;;
    step) part 85 train_step.py --repeats 1 -- --row_length 256 --repeats 1 --cases micro_batches:anchor ;;
    run) part 150 train_run.py --folder "$WORK" --steps 8 -- --folder "$WORK" --row_lengths 256 --steps 3 ;;
    longest) part 40 longest.py -- --first 256 --at_most_tokens 1024 ;;
    tests) part 65 gpu_tests.py -- --processes 1 ;;
    flex) part 120 attention.py --engines flex -- --engines flex --row_lengths 256 --repeats 1 ;;
    plain) part 60 train_step.py --cases plain_hf auto:anchor -- --cases plain_hf --row_length 256 --repeats 1 ;;
    offload) part 120 train_step.py --row_length 262144 --repeats 1 \
        --cases checkpointed:anchor offloaded:anchor tiled:anchor -- --row_length 256 --repeats 1 --cases offloaded:anchor ;;
    memory) whole 140 memory.py --variants anchor --at_most_seconds 120 --parts growth longest ;;
    paper) whole 200 paper.py --size gpu --seeds 0 ;;
    large_tests) part 300 gpu_tests.py --large -- --large ;;
    *) echo "error: no part is called $name" >&2 && exit 2 ;;
    esac
done
