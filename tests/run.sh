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
python -m pytest "${selection[@]}" "${arguments[@]}"
