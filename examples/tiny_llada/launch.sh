#!/bin/sh
# Starts or resumes the training: launch.sh [--wait] RUN_FOLDER [train.py's options].
# In the background, where it survives a closed terminal; with --wait in the foreground, to its end.
# Large allocations stay with the process (a fifth faster here: no page faults on every step).
here=$(dirname "$0")
wait=
if [ "$1" = --wait ]; then
    wait=yes
    shift
fi
run=$1
shift
mkdir -p "$run"
tune=glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=1073741824
tune=$tune:glibc.malloc.trim_threshold=8589934592:glibc.malloc.top_pad=67108864
export GLIBC_TUNABLES=$tune OMP_NUM_THREADS=1
set -- nice -n "${NICE:-0}" "${PYTHON:-python}" \
    "$here/train.py" --run "$run" --export "$here/checkpoint" "$@"
if [ "$wait" ]; then
    exec "$@" >> "$run/out.log" 2>&1
fi
nohup setsid "$@" >> "$run/out.log" 2>&1 &
