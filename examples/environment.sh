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

# A virtual environment with a working pip at $STEP_VENV; one whose making was interrupted or failed is repaired.
step_virtual_environment() {
    local python
    if "$STEP_VENV/bin/python" -m pip --version > /dev/null 2>&1; then
        return
    fi
    python="$(step_python)" || return
    if ! "$python" -c 'import ensurepip, venv' 2> /dev/null; then
        echo "error: $python cannot make virtual environments; install the package python3.11-venv (Debian, Ubuntu:" \
            "apt-get install python3.11-venv), or name an environment that has pip in STEP_VENV, and run again" >&2
        return 1
    fi
    # Only what `venv` made may be cleared: STEP_VENV may name a folder of something else by mistake.
    if [ -n "$(ls -A "$STEP_VENV" 2> /dev/null)" ] && [ ! -e "$STEP_VENV/pyvenv.cfg" ]; then
        echo "error: $STEP_VENV is not a virtual environment; name another folder in STEP_VENV, or move its content away" >&2
        return 1
    fi
    # pip alone may be missing, as in environments that uv makes: then the packages that are there are kept.
    if "$STEP_VENV/bin/python" -m ensurepip > /dev/null 2>&1 && "$STEP_VENV/bin/python" -m pip --version > /dev/null 2>&1; then
        return
    fi
    if ! "$python" -m venv --clear "$STEP_VENV"; then
        echo "error: could not make $STEP_VENV with $python; on Debian and Ubuntu install the package python3.11-venv, and see" \
            "that the disk has room; then run again" >&2
        return 1
    fi
}

# Path of nvcc as setup.py looks for it, nothing if there is none.
step_nvcc() {
    "$STEP_VENV/bin/python" -c 'import runpy, sys; print(runpy.run_path(sys.argv[1])["find_nvcc"]() or "")' \
        "$step_root/kernels/step_kernels/toolkit.py"
}

step_environment() {
    local extras stamp wanted nvcc
    extras="$(IFS=,; echo "$*")"
    stamp="$STEP_VENV/.step-megatron-${extras:-base}"
    # Native code is built by the installation: a change of it installs again.
    wanted="$(cat "$step_root/setup.py" "$step_root"/csrc/*/* <(echo "$STEP_TORCH $step_root") | sha256sum)"
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
        return
    fi
    echo "environment: installing into $STEP_VENV (a few minutes the first time)"
    step_virtual_environment || return
    # torch by itself first, and exactly: a range could bring another build.
    echo "environment: $STEP_TORCH"
    "$STEP_VENV/bin/python" -m pip install --quiet --disable-pip-version-check "$STEP_TORCH" "setuptools>=69,<83" wheel pybind11 ninja
    nvcc="$(step_nvcc)"
    echo "environment: step-megatron${extras:+[$extras]}"
    "$STEP_VENV/bin/python" -m pip install --quiet --disable-pip-version-check --no-build-isolation -e "$step_root${extras:+[$extras]}"
    # The native code is built before the packages that an extra brings are there, and nvcc may be one of them.
    if [ -z "$nvcc" ] && [ "${STEP_CUDA:-auto}" != 0 ] && nvcc="$(step_nvcc)" && [ -n "$nvcc" ]; then
        echo "environment: CUDA kernels, by $nvcc"
        (cd "$step_root" && "$STEP_VENV/bin/python" setup.py -q build_ext --inplace)
    fi
    echo "$wanted" > "$stamp"
    echo "environment: ready after ${SECONDS} s"
}

step_environment "$@"
export PATH="$STEP_VENV/bin:$PATH"
export PYTHONUNBUFFERED=1
