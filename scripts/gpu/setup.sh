#!/usr/bin/env bash
# Make VENV with stock vLLM for CUDA, this project and what its tests need.
#
#   setup.sh [BUNDLE]      from the network, or from a folder that bundle.sh made
#
# EXTRAS=cuda,xformers has the attention backend on xformers as well.
# An environment of its own: vLLM's CPU build, which `make setup` installs, is the same folder vllm/.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

venv=${VENV:-.venv-cuda}
python=${PYTHON:-python3}

fail() {
    printf '\nsetup: %s\n' "$*" >&2
    exit 1
}

# Triton compiles what starts its kernels, at the first one.
command -v cc >/dev/null || command -v gcc >/dev/null || command -v clang >/dev/null ||
    fail "no C compiler, which Triton needs (Debian, Ubuntu: apt-get install gcc)"
headers=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
[ -e "$headers/Python.h" ] ||
    fail "no Python.h in $headers, which Triton needs (Debian, Ubuntu: apt-get install python3-dev)"

[ -x "$venv/bin/pip" ] || "$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

if [ $# = 0 ]; then
    pip install --quiet 'pip>=25.1' # the first to know --group
    pip install --quiet --group card-tests -e ".[${EXTRAS:-cuda}]"
else
    pip install --quiet --no-index --find-links "$1" --requirement "$1/requirements.txt"
fi
"$venv/bin/python" -c 'import torch; torch.cuda.init()' ||
    fail "torch finds no card. Its CUDA: $("$venv/bin/python" -c 'import torch; print(torch.version.cuda)')." \
        "The driver: $(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1 || true)" \
        "(CUDA 13 wants 580 or newer; docs/installing.md)"
echo "setup: done. VENV=$venv make gpu-test"
