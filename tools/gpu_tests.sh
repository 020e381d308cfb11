#!/usr/bin/env bash
# Runs every GPU test, as processes side by side: engines take half a minute each to start, and
# share the GPU. Logs and a summary go to a folder.
#
#   tools/gpu_tests.sh FOLDER     PYTHON=python3 names the interpreter that has vLLM
#
# On one GPU: serving by head size, the sample model, freeing KV, the probe, drafters, offloading,
# families and formats of weights, what is compiled after the start, learned sinks, float8 KV
# caches, the backend's batches with the benchmarks' head split, and the kernels. Where two GPUs are
# visible, pipeline and tensor parallel 2 beside them: small models, for tensor parallel by head
# size, and Llama 3.1 8B's widths (benchmarks/shapes, or FLUX_TEST_8B_SHAPE=FOLDER). On two H200s
# with 64 cores the tensor-parallel ones took under 3 minutes. The summary names what did not run.
set -uo pipefail
out=$(mkdir -p "${1:?usage: tools/gpu_tests.sh FOLDER}" && cd "$1" && pwd)
[[ -z ${FLUX_TEST_8B_SHAPE:-} ]] || FLUX_TEST_8B_SHAPE=$(realpath "$FLUX_TEST_8B_SHAPE")
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
kernels=tests/unit/attention_backend
export OMP_NUM_THREADS=2 FLUX_TEST_OUT=$out
unset VLLM_PORT # else every engine tries the same ports; vLLM takes free ones without it

part() { # part NAME ARGUMENTS...: one pytest process
    local name=$1
    shift
    "$python" -m pytest -m gpu -q -s -p no:cacheprovider "$@" >"$out/$name.log" 2>&1
    echo "$name: exit code $?, $(grep -aE '[0-9]+ (passed|failed)' "$out/$name.log" | tail -n 1)" \
        >>"$out/summary.txt"
}

not_run() { # not_run NAME WHY
    echo "$1: not run, $2" >>"$out/summary.txt"
}

parts_of_two() { # tensor and pipeline parallel 2; its engines on one GPU take the second, which has less to do
    local file=tests/gpu/test_tensor_parallel.py gpus
    gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
    if ((gpus < 2)); then
        not_run tensor_parallel "needs two CUDA GPUs; ${gpus:-none} visible here"
        not_run pipeline_parallel "needs two CUDA GPUs; ${gpus:-none} visible here"
        return
    fi
    export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-1,0}
    part pipeline_parallel tests/gpu/test_pipeline_parallel.py &
    part tensor_parallel_64 $file -k H64 &
    part tensor_parallel_128 $file -k H128 &
    part tensor_parallel_8b $file -k 8b_widths &
    wait
}

: >"$out/summary.txt"
part serving_64 tests/gpu/test_serving.py -k H64 &
part serving_128 tests/gpu/test_serving.py -k H128 &
part sample_model tests/gpu/test_sample_model.py &
part free_kv tests/gpu/test_free_kv.py &
part probe tests/gpu/test_probe.py &
part drafters_eagle tests/gpu/test_drafters.py -k eagle &
part drafters tests/gpu/test_drafters.py -k "not eagle" &
part connectors tests/gpu/test_connectors.py &
part families tests/gpu/test_families.py &
part no_compiling tests/gpu/test_no_compiling.py &
part learned_sinks tests/gpu/test_learned_sinks.py &
part float8_cache tests/gpu/test_float8_cache.py &
part batches tests/gpu/test_backend_batches.py tests/gpu/test_head_split.py &
part attention $kernels/test_kernels_fa3.py $kernels/test_kernels_prefill.py &
# Data needs the package datasets, and no GPU.
part others tests/unit --ignore tests/unit/training/data --deselect $kernels/test_kernels_fa3.py \
    --deselect $kernels/test_kernels_prefill.py &
parts_of_two &
wait
cat "$out/summary.txt"
! grep -vqE 'exit code (0|5),|: not run, ' "$out/summary.txt"
