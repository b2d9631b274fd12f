#!/usr/bin/env bash
# What a card makes of LLaDA-8B's shapes, with random weights. `make gpu-bench` calls it.
#
#   PYTHON=.venv-cuda/bin/python bench.sh
#
# Passes by kind first; then runs of the test model are recorded and replayed through LLaDA-8B's
# passes. Tables and JSON are in OUT. SIZES are the model's and the batches' (`bench card --help`),
# COUNT the problems that are recorded with short and with long prompts.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

python=${PYTHON:-.venv/bin/python}
out=${OUT:-out/gpu-bench}
model=examples/tiny_llada/checkpoint
read -ra sizes <<<"${SIZES:-}"

command -v "$python" >/dev/null || {
    echo "$python not found: bash scripts/gpu/setup.sh (a card), or make setup (a CPU)" >&2
    exit 2
}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
mkdir -p "$out"
failed=0

# Name, seconds, arguments of `bench`. One that fails or hangs does not stop the next.
bench() {
    local name=$1 seconds=$2
    shift 2
    timeout -k 10 "$seconds" "$python" -m vllm_elastic.bench "$@" 2>"$out/$name.log" |
        tee "$out/$name.txt"
    local status=${PIPESTATUS[0]}
    ((status == 0)) && return
    echo "$name failed with $status: $out/$name.log" >&2
    failed=1
}

bench card 600 card "${sizes[@]}" ${CANVAS:+--canvas $CANVAS} --json "$out/card.json"
bench card-whole 300 card --whole-passes --batch-size 1 4 16 "${sizes[@]}" ${CANVAS:+--canvas $CANVAS} \
    --json "$out/card-whole.json"

"$python" examples/tiny_llada/heldout.py "$out" --count "${COUNT:-32}" || exit 1
for prompts in short long; do
    runs=()
    for policy in none dual-cache elastic elastic-block; do
        run=$out/$prompts-$policy.jsonl
        bench "record-$prompts-$policy" 180 run --model $model --dtype bfloat16 --batch-size 16 \
            --prompts "$out/heldout_$prompts.jsonl" --out "$run" \
            --elastic-config "{\"policy\": \"$policy\"}"
        [[ -s $run ]] && runs+=("$run")
    done
    ((${#runs[@]})) && bench "replay-$prompts" 900 replay --async-scheduling "${runs[@]}" "${sizes[@]}" \
        --json "$out/replay-$prompts.json"
done
exit $failed
