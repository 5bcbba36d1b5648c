# Sourced by demo_llama.sh and tests/run.sh: leaves a `python` in PATH that has the requirements.
#
#   source setup.sh [REQUIREMENTS_FILE …]      default: requirements.txt
#
# Uses the active environment if it satisfies them, else makes and fills .venv beside this file.

_root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
[ $# -gt 0 ] || set -- requirements.txt

_satisfied() { # does this Python have every requirement, in a version that fits?
    "$1" - "${@:2}" <<'PYTHON' 2>/dev/null
import sys
from importlib.metadata import version
from packaging.requirements import Requirement

for name in sys.argv[1:]:
    for line in open(name):
        line = line.split("#")[0].strip()
        if line:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                assert requirement.specifier.contains(version(requirement.name).split("+")[0])
PYTHON
}

_files=()
for _file in "$@"; do _files+=("$_root/$_file"); done

if command -v python >/dev/null && _satisfied python "${_files[@]}"; then
    echo "setup: the active environment has what is needed ($(command -v python))"
else
    if [ ! -x "$_root/.venv/bin/python" ]; then
        _python=$(command -v python3 || command -v python) || { echo "setup: no Python found" >&2; exit 1; }
        "$_python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
            { echo "setup: $_python is older than Python 3.11; activate a newer one" >&2; exit 1; }
        echo "setup: making $_root/.venv with $("$_python" --version)"
        "$_python" -m venv "$_root/.venv"
    fi
    if ! _satisfied "$_root/.venv/bin/python" "${_files[@]}"; then
        echo "setup: installing ${*} (once; a few minutes)"
        _arguments=()
        for _file in "${_files[@]}"; do _arguments+=(-r "$_file"); done
        "$_root/.venv/bin/python" -m pip install --quiet --disable-pip-version-check packaging "${_arguments[@]}"
    fi
    source "$_root/.venv/bin/activate"
    echo "setup: using $_root/.venv"
fi
