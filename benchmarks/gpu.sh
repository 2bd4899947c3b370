#!/usr/bin/env bash
# All checks and benchmarks on a GPU in one call of under nine minutes: benchmarks/gpu.sh [FOLDER FOR RESULTS]
# Needs a bare Python with torch, triton, transformers, pluggy and pytest: nothing is installed. PYTHON names another.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
results=${1:-bench-output/gpu}
python=${PYTHON:-python3}
export PYTHONPATH="$PWD:$PWD/kernels:$PWD/adapters/hf:$PWD/benchmarks:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
mkdir -p "$results"

# What is to run, and for how many seconds at most; a part that fails or is cut short doesn't keep the others from running.
part() {
    local name=$1 limit=$2
    shift 2
    local began=$SECONDS
    timeout -k 5 "$limit" "$@" > "$results/$name.log" 2>&1
    echo "$name: exit $? after $((SECONDS - began)) s"
}

# Warnings of other versions are no failures; elsewhere they are errors.
part checks 140 "$python" -m pytest -q -W ignore -p no:cacheprovider tests/kernels/test_triton_attention.py \
    tests/kernels/test_triton_elementwise.py tests/kernels/test_triton_forwards.py tests/core/test_triton_backend.py \
    tests/core/test_batch.py tests/core/test_graphs.py tests/core/test_lookahead.py tests/core/test_memory_profile.py \
    tests/adapters/test_hf_gpu.py tests/adapters/test_hf_graphs.py tests/adapters/test_hf_device_map.py
part kernels 110 "$python" benchmarks/bench_gpu_kernels.py --json "$results/gpu-kernels.json"
part offline 270 "$python" benchmarks/bench_gpu.py --json "$results/gpu-offline.json"

tail -n 4 "$results/checks.log"
"$python" benchmarks/gpu_table.py "$results"
