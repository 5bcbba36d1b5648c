# Sourced by demo_llama.sh and tests/run.sh: leaves a `python` in PATH that has the requirements.
#
#   source setup.sh [REQUIREMENTS_FILE …]      default: requirements.txt
#
# Uses the active environment if it satisfies them, else makes and fills .venv beside this file.

_setup() {
    local root files=() file python arguments=() pip
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
    [ $# -gt 0 ] || set -- requirements.txt
    for file in "$@"; do files+=("$root/$file"); done

    if command -v python >/dev/null && _satisfied python "${files[@]}"; then
        echo "setup: the active environment has what is needed ($(command -v python))"
        return
    fi
    if _satisfied "$root/.venv/bin/python" "${files[@]}"; then
        source "$root/.venv/bin/activate"
        echo "setup: using $root/.venv (in your own shell: source $root/.venv/bin/activate)"
        return
    fi
    if ! "$root/.venv/bin/python" -m pip --version >/dev/null 2>&1; then
        python=$(command -v python3 || command -v python) || { echo "setup: no Python found" >&2; exit 1; }
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
            { echo "setup: $python is older than Python 3.11; activate a newer one" >&2; exit 1; }
        echo "setup: making $root/.venv with $("$python" --version)"
        "$python" -m venv "$root/.venv" ||
            { echo "setup: no virtual environment could be made (on Debian: apt install python3-venv)" >&2; exit 1; }
    fi
    echo "setup: installing $* (once; a few minutes)"
    for file in "${files[@]}"; do arguments+=(-r "$file"); done
    pip=("$root/.venv/bin/python" -m pip install --quiet --disable-pip-version-check)
    "${pip[@]}" packaging wheel # wheel, or an old pip complains of packages that it has to build
    "${pip[@]}" "${arguments[@]}"
    source "$root/.venv/bin/activate"
    echo "setup: using $root/.venv (in your own shell: source $root/.venv/bin/activate)"
}

# Does this Python have every requirement, in a version that fits?
_satisfied() {
    "$1" - "${@:2}" <<'PYTHON' 2>/dev/null
import sys
from importlib.metadata import version
from packaging.requirements import Requirement

for name in sys.argv[1:]:
    for line in open(name):
        line = line.split("#")[0].strip()
        if line:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate():
                assert requirement.specifier.contains(version(requirement.name).split("+")[0])
PYTHON
}

_setup "$@"
