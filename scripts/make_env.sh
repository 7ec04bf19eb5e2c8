#!/usr/bin/env bash
# Sets up the environment of the study in $VENV from requirements.lock, then samlib itself, editable.
#
#   scripts/make_env.sh                 install (what `make env` calls)
#   scripts/make_env.sh requirements    print the requirements that would be installed after torch, and stop
#
# VENV    where to install (.venv)
# TORCH   default: the wheels of PyPI, which on Linux carry CUDA (about 6 GB on disk)
#         cpu:     PyTorch's CPU index, which must be reachable (about 2 GB)
# PYTHON  an interpreter of your choice, 3.11 to 3.13; by default the first one found (uv may also fetch one)
#
# Exit codes: 0 done, 1 an installation step failed, 2 this machine or a setting does not allow it (nothing written).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV=${VENV:-.venv}
TORCH=${TORCH:-default}
LOCK=requirements.lock
CPU_INDEX=${CPU_INDEX:-https://download.pytorch.org/whl/cpu}

refuse() { printf 'make env: %s\n' "$@" >&2; exit 2; }

# Everything but torch and torchvision; with CPU wheels also without what only their CUDA builds need.
requirements() {
    local without='^(torch|torchvision)=='
    [ "$TORCH" = cpu ] && without='^(torch|torchvision|triton|nvidia-[a-z0-9-]+|cuda-[a-z-]+)=='
    grep -E '^[a-z0-9]' "$LOCK" | grep -vE "$without"
}

torch_pins() { grep -E '^(torch|torchvision)==' "$LOCK"; }

check_settings() {
    case $TORCH in
        default | cpu) ;;
        *) refuse "TORCH=$TORCH is unknown: use TORCH=default (wheels of PyPI) or TORCH=cpu (PyTorch's CPU index)." ;;
    esac
    if [ -e "$VENV" ] && [ ! -e "$VENV/pyvenv.cfg" ]; then
        refuse "VENV=$VENV exists and is not a virtual environment: move it away or name another folder (VENV=...)."
    fi
}

# The download stays in the cache of pip or uv, so that an interrupted installation goes on; uv links from its cache.
gigabytes_needed() {
    if [ "$TORCH" = cpu ] || [ "$(uname -s)" != Linux ]; then
        echo 3
    elif command -v uv >/dev/null; then
        echo 7
    else
        echo 10
    fi
}

check_disk() {
    [ -e "$VENV/.complete" ] && return
    local needed free
    needed=$(gigabytes_needed)
    free=$(($(df -Pk . | awk 'NR == 2 { print $4 }') / 1024 / 1024))
    if [ "$free" -lt "$needed" ]; then
        refuse "$free GB are free in $PWD, the environment needs about $needed GB." \
            "Free some space, clone into a larger disk, or take the CPU build of torch, which needs 3 GB: make env TORCH=cpu"
    fi
}

supported() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
}

find_python() {
    local candidate
    if [ -n "${PYTHON:-}" ]; then
        supported "$PYTHON" || refuse "PYTHON=$PYTHON is not a Python 3.11, 3.12 or 3.13: name one that is, or leave PYTHON out."
        echo "$PYTHON"
        return
    fi
    for candidate in python3.11 python3.12 python3.13 python3 python; do
        if supported "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    command -v uv >/dev/null && { echo '>=3.11,<3.14'; return; } # uv fetches one
    refuse "no Python 3.11, 3.12 or 3.13 on the PATH: install one, name it (PYTHON=/path/to/python), or install uv" \
        "(https://docs.astral.sh/uv), which fetches it by itself."
}

create_venv() {
    [ -x "$VENV/bin/python" ] && return
    local python
    python=$(find_python)
    echo "make env: $VENV with $python"
    if command -v uv >/dev/null; then
        uv venv --quiet --python "$python" "$VENV"
    else
        "$python" -c 'import ensurepip, venv' 2>/dev/null ||
            refuse "$python has no venv module: install it (Debian and Ubuntu: apt-get install python3-venv), or install uv."
        "$python" -m venv "$VENV"
    fi
}

pip_install() {
    if command -v uv >/dev/null; then
        uv pip install --compile-bytecode --python "$VENV/bin/python" "$@" # as pip does; each process starts seconds sooner
    else
        "$VENV/bin/python" -m pip install --disable-pip-version-check "$@"
    fi
}

install_torch() {
    if [ "$TORCH" = cpu ]; then
        # its own index and nothing else: the index also holds other, older packages
        pip_install --no-deps --index-url "$CPU_INDEX" $(torch_pins) ||
            { echo "make env: no CPU wheels from $CPU_INDEX; where it cannot be reached use plain 'make env'." >&2; exit 1; }
    else
        pip_install --no-deps $(torch_pins)
    fi
}

install() {
    check_settings
    if [ -e "$VENV/.complete" ] && [ "$(cat "$VENV/.complete")" != "$TORCH" ]; then
        echo "make env: $VENV holds torch of TORCH=$(cat "$VENV/.complete"); making it anew with TORCH=$TORCH"
        rm -rf "$VENV"
    fi
    check_disk
    create_venv
    rm -f "$VENV/.complete"
    echo "make env: installing $(grep -cE '^[a-z0-9]' "$LOCK") pinned packages (a few minutes the first time)"
    install_torch
    requirements >"$VENV/requirements.txt"
    pip_install --no-deps -r "$VENV/requirements.txt"
    pip_install --no-deps --no-build-isolation -e .
    echo "$TORCH" >"$VENV/.complete"
    echo "make env: done, $("$VENV/bin/python" -c 'import sys, torch; print("Python", sys.version.split()[0], "torch", torch.__version__)')"
}

case ${1:-install} in
    install) install ;;
    requirements) check_settings; requirements ;;
    *) refuse "unknown word '$1': use 'install' or 'requirements'." ;;
esac
