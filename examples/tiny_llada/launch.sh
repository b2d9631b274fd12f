#!/bin/sh
# Starts or resumes the training in the background: launch.sh RUN_FOLDER [train.py's options].
# Large allocations stay with the process (a fifth faster here: no page faults on every step).
here=$(dirname "$0")
run=$1
shift
mkdir -p "$run"
tune=glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=1073741824
tune=$tune:glibc.malloc.trim_threshold=8589934592:glibc.malloc.top_pad=67108864
GLIBC_TUNABLES=$tune OMP_NUM_THREADS=1 nohup setsid nice -n "${NICE:-0}" "${PYTHON:-python}" \
    "$here/train.py" --run "$run" --export "$here/checkpoint" "$@" >> "$run/out.log" 2>&1 &
