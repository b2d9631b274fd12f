#!/usr/bin/env bash
# Make BUNDLE, all that setup.sh needs on a machine without a network: some gigabytes of wheels.
#
#   PYTHON_VERSION=3.12 bundle.sh BUNDLE      the Python of that machine; default: this one's
#
# Take BUNDLE and a clone there; then: bash scripts/gpu/setup.sh BUNDLE && VENV=.venv-cuda make gpu-test
set -euo pipefail
bundle=$(mkdir -p "$1" && cd "$1" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

# pip and tomllib: a Python of 3.11 or newer; the one of `make setup` where there is one.
python=${PYTHON:-$(command -v .venv/bin/python python3.11 python3 | head -n 1 || true)}
"$python" -c 'import pip, tomllib' 2>/dev/null || {
    echo "bundle: ${python:-python3} is no Python >= 3.11 with pip; name one by PYTHON=..." >&2
    exit 2
}
version=${PYTHON_VERSION:-$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')}
platforms=()
for glibc in {5..39}; do
    platforms+=(--platform "manylinux_2_${glibc}_x86_64")
done
for name in 2014 2010 1; do
    platforms+=(--platform "manylinux${name}_x86_64")
done

"$python" -m pip wheel --quiet --no-deps --wheel-dir "$bundle" .
"$python" - >"$bundle/requirements.txt" <<'PYTHON'
import os
import tomllib

with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)
extras = os.environ.get("EXTRAS", "cuda")
print(f"vllm-elastic[{extras}]", *project["dependency-groups"]["card-tests"], sep="\n")
PYTHON
"$python" -m pip download --only-binary=:all: --python-version "$version" "${platforms[@]}" \
    --find-links "$bundle" --dest "$bundle" --requirement "$bundle/requirements.txt"
du -sh "$bundle"
