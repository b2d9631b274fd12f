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

[ -x "$venv/bin/pip" ] || "$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

if [ $# = 0 ]; then
    pip install --quiet 'pip>=25.1' # the first to know --group
    pip install --quiet --group card-tests -e ".[${EXTRAS:-cuda}]"
else
    pip install --quiet --no-index --find-links "$1" --requirement "$1/requirements.txt"
fi
"$venv/bin/python" -c 'import torch; assert torch.cuda.is_available(), "torch finds no card"'
echo "setup: done. VENV=$venv make gpu-test"
