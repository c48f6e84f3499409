# Makes the Python environment that the scripts of this repository use; sourced, not run.
#
#   source examples/environment.sh [EXTRA ...]      for example: source examples/environment.sh dev
#
# STEP_VENV   where the environment is (default: .venv in the repository); kept and reused when nothing changed
# STEP_TORCH  the torch to install (default: torch==2.13.0)
# pip's own settings (index, proxy, certificates) apply as they are.

step_root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
STEP_VENV="${STEP_VENV:-$step_root/.venv}"
STEP_TORCH="${STEP_TORCH:-torch==2.13.0}"

step_python() {
    local candidate
    for candidate in python3.11 python3 python; do
        if "$candidate" -c 'import sys; raise SystemExit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: Python 3.11 is needed (megatron-core 0.16.1 is tested with it) and was not found; install it and run again" >&2
    return 1
}

step_environment() {
    local extras stamp wanted
    extras="$(IFS=,; echo "$*")"
    stamp="$STEP_VENV/.step-megatron-${extras:-base}"
    wanted="$(cat "$step_root/setup.py" <(echo "$STEP_TORCH $step_root") | sha256sum)"
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
        return
    fi
    echo "environment: installing into $STEP_VENV (a few minutes the first time)"
    [ -x "$STEP_VENV/bin/python" ] || "$(step_python)" -m venv "$STEP_VENV"
    # torch by itself first, and exactly: a range could bring another build.
    echo "environment: $STEP_TORCH"
    "$STEP_VENV/bin/python" -m pip install --quiet --disable-pip-version-check "$STEP_TORCH" "setuptools>=69,<83" wheel pybind11 ninja
    echo "environment: step-megatron${extras:+[$extras]}"
    "$STEP_VENV/bin/python" -m pip install --quiet --disable-pip-version-check --no-build-isolation -e "$step_root${extras:+[$extras]}"
    echo "$wanted" > "$stamp"
    echo "environment: ready after ${SECONDS} s"
}

step_environment "$@"
export PATH="$STEP_VENV/bin:$PATH"
export PYTHONUNBUFFERED=1
