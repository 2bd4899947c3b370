#!/usr/bin/env bash
# All checks and benchmarks on a GPU in one call of under nine minutes: benchmarks/gpu.sh [FOLDER FOR RESULTS]
# Needs a bare Python with torch, triton, transformers, pluggy and pytest, a C compiler and Python's headers: nothing is
# installed. PYTHON names another.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
results=${1:-bench-output/gpu}
python=${PYTHON:-python3}
export PYTHONPATH="$PWD:$PWD/kernels:$PWD/adapters/hf:$PWD/benchmarks:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-${TMPDIR:-/tmp}/paged-triton-cache}"  # what one part compiled, the next has
mkdir -p "$results"
# The project isn't installed: its plugin for transformers is found by what an installation would have left here.
installed=$(mktemp -d)
trap 'rm -r "$installed"' EXIT
mkdir "$installed/paged_core-0.dist-info"
printf 'Name: paged-core\nVersion: 0\n' > "$installed/paged_core-0.dist-info/METADATA"
printf '[paged_core]\nhf = paged_hf.plugin\n' > "$installed/paged_core-0.dist-info/entry_points.txt"
export PYTHONPATH="$installed:$PYTHONPATH"

# What is to run, and for how many seconds at most, of those that are left of all; a part that fails or is cut short
# doesn't keep the others from running.
part() {
    local name=$1 limit=$2 left=$((525 - SECONDS))
    shift 2
    if ((left < 10)); then
        echo "$name: no time left"
        return 1
    fi
    local began=$SECONDS status=0
    timeout -k 5 $((limit < left ? limit : left)) "$@" > "$results/$name.log" 2>&1 || status=$?
    echo "$name: exit $status after $((SECONDS - began)) s"
    return $status
}

if ! part probe 60 "$python" -c '
import platform, torch, triton
print("python", platform.python_version(), "torch", torch.__version__, "triton", triton.__version__)
from paged_kernels.triton.elementwise import silu_mul
x = torch.ones(1, 1, device="cuda")
print(torch.cuda.get_device_name(), silu_mul(x, x).item())'; then
    tail -n 5 "$results/probe.log"
    echo "no kernel runs here: Triton wants a GPU, a C compiler and Python's headers"
    exit 1
fi
cat "$results/probe.log"

# Compiling for the GPU takes most of the checks' time, on one core each.
workers=()
"$python" -c 'import xdist' 2> /dev/null && workers=(-n 8 --dist loadgroup)
# Warnings of other versions are no failures; elsewhere they are errors.
part checks 130 "$python" -m pytest "${workers[@]}" -q -W ignore -p no:cacheprovider --continue-on-collection-errors tests/kernels/test_triton_attention.py \
    tests/kernels/test_triton_sharing.py tests/kernels/test_triton_elementwise.py tests/kernels/test_triton_forwards.py tests/core/builtin/test_triton_backend.py \
    tests/core/execution/test_batch.py tests/core/execution/test_graphs.py tests/core/engine/test_lookahead.py tests/core/execution/test_memory_profile.py \
    tests/adapters/hf/test_hf_gpu.py tests/adapters/hf/test_hf_graphs.py tests/adapters/hf/test_hf_device_map.py
part kernels 90 "$python" benchmarks/bench_gpu_kernels.py --only decode,prefill,store,helpers \
    --json "$results/gpu-kernels.json"
part offline-7b 110 "$python" benchmarks/bench_gpu.py --models 7b --json "$results/gpu-offline-7b.json"
part offline-13b 150 "$python" benchmarks/bench_gpu.py --models 13b --json "$results/gpu-offline-13b.json"
part flex 60 "$python" benchmarks/bench_gpu_kernels.py --only flex --json "$results/gpu-flex.json"
part tiles 60 "$python" benchmarks/bench_gpu_tiles.py --json "$results/gpu-tiles.json"

tail -n 4 "$results/checks.log"
tail -n 20 "$results/tiles.log"
"$python" benchmarks/gpu_table.py "$results"
