#!/usr/bin/env bash
# Make OUT: xformers, and the newest Triton that its kernel runs with. At once when it is there.
#
#   xformers.sh VENV OUT     then: PYTHONPATH=OUT:. VENV/bin/python -m pytest ...
#
# Not in the environment itself: the other tests run with a newer Triton. The download is 240 MB.
set -euo pipefail

packages=("xformers==0.0.35" "triton==3.8.*")

venv=$1 out=$2
[ -e "$out/xformers" ] && exit

making="$out.making"
rm -rf "$making" "$out"
"$venv/bin/python" -m pip install --quiet --no-deps --target "$making" "${packages[@]}"
mv "$making" "$out"
