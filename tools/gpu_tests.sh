#!/usr/bin/env bash
# Runs every GPU test on a machine with one GPU, as processes side by side: engines take half a
# minute each to start, and share the GPU. Logs and a summary go to a folder.
#
#   tools/gpu_tests.sh FOLDER     PYTHON=python3 names the interpreter that has vLLM
#
# About 5 minutes on an H200 with 16 cores.
set -uo pipefail
out=$(mkdir -p "${1:?usage: tools/gpu_tests.sh FOLDER}" && cd "$1" && pwd)
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
kernels=tests/unit/attention_backend
export OMP_NUM_THREADS=2 FLUX_TEST_OUT=$out

part() { # part NAME ARGUMENTS...: one pytest process
    local name=$1
    shift
    "$python" -m pytest -m gpu -q -s -p no:cacheprovider "$@" >"$out/$name.log" 2>&1
    echo "$name: exit code $?, $(grep -aE '[0-9]+ (passed|failed)' "$out/$name.log" | tail -n 1)" \
        >>"$out/summary.txt"
}

: >"$out/summary.txt"
part serving_64 tests/gpu/test_serving.py -k H64 &
part serving_128 tests/gpu/test_serving.py -k H128 &
part sample_model tests/gpu/test_sample_model.py &
part batches tests/gpu/test_backend_batches.py &
part attention $kernels/test_kernels_fa3.py $kernels/test_kernels_prefill.py &
part others tests/unit --deselect $kernels/test_kernels_fa3.py \
    --deselect $kernels/test_kernels_prefill.py &
wait
cat "$out/summary.txt"
! grep -vqE 'exit code (0|5),' "$out/summary.txt"
