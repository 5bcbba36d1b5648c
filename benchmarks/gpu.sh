#!/usr/bin/env bash
# The benchmarks of one device and the GPU tests on this machine's (first) CUDA device; writes
# benchmarks/results/<gpu>.json and the table in benchmarks/results/README.md. sequence_parallel.py is not
# among them: one GPU is one rank, and what it counts needs none.
#
#     bash benchmarks/gpu.sh              # PYTHON=… names another interpreter than .venv's or the path's
#
# Each part has its own limit, nine minutes together; one that fails or runs out leaves its place in the
# results empty, and says so.
set -euo pipefail
cd "$(dirname "$0")/.."

if [[ -z "${PYTHON:-}" ]]; then
    PYTHON=python
    [[ -x .venv/bin/python ]] && PYTHON=.venv/bin/python
fi
if ! "$PYTHON" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())'; then
    echo "error: $PYTHON sees no CUDA device; install a CUDA build of torch (see README), or name PYTHON=" >&2
    exit 2
fi
"$PYTHON" -c 'import importlib.util as u, sys; sys.exit(not u.find_spec("liger_kernel"))' ||
    echo "note: liger-kernel is not installed (pip install liger-kernel==0.8.5): the tiled loss is measured instead"

export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-0}"
export PYTORCH_ALLOC_CONF=expandable_segments:True # long rows leave no room for fragments
found="$(mktemp -d)"

part() { # name, seconds, command: the last line that it prints (not what it warns of) becomes $found/name.json
    local name="$1" limit="$2"
    shift 2
    echo "== $name (at most $limit s)"
    if timeout --kill-after 3 "$limit" "$@" >"$found/$name.log" 2>"$found/$name.err"; then
        tail -n 1 "$found/$name.log" >"$found/$name.json"
        head -n -1 "$found/$name.log"
    else
        echo "$name did not finish (exit $?); the end of what it said:"
        tail -n 15 "$found/$name.log" "$found/$name.err"
    fi
}

echo "== tests/gpu (at most 120 s)" # test_kernels.py ends with what compiles longest
timeout --kill-after 3 120 "$PYTHON" -m pytest -q tests/gpu/test_training.py tests/gpu/test_kernels.py 2>"$found/tests.err" | tee "$found/tests.log" | tail -n 5 || true

part attention 70 "$PYTHON" benchmarks/attention.py
part train_step 150 "$PYTHON" benchmarks/train_step.py --repeats 2
part memory 140 "$PYTHON" benchmarks/memory.py --variants anchor --at_most_seconds 120
part packing 40 "$PYTHON" benchmarks/packing.py --megabytes 8
left=$((530 - SECONDS)) # of the nine minutes; never 0, which `timeout` takes for no limit
part paper "$((left > 1 ? left : 1))" "$PYTHON" benchmarks/paper.py --size gpu --seeds 0

if ! "$PYTHON" benchmarks/collect.py "$found"; then
    echo "error: not collected; what the parts printed is kept in $found" >&2
    exit 1
fi
rm -rf "$found"
