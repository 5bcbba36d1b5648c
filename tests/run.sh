#!/usr/bin/env bash
# Sets up and tests: the default suite in under fifteen minutes on two cores; --slow adds the torture tests.
# Other arguments go to pytest: bash tests/run.sh tests/unit -k packing
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source setup.sh requirements.txt tests/requirements.txt

selection=(-m "not slow")
arguments=()
for argument in "$@"; do
    if [ "$argument" = --slow ]; then selection=(); else arguments+=("$argument"); fi
done
ruff format --check .
ruff check .
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
# DeepSpeed's CPU Adam is compiled here: a compilation that was killed elsewhere leaves a lock for good.
export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$PWD/.pytest_cache/torch_extensions}
# Two files at a time: most tests are of one thread. The tests of a file share what they made, so stay together.
python -m pytest -n 2 --dist loadfile "${selection[@]}" "${arguments[@]}"
