#!/usr/bin/env bash
# What to ask of a GPU; made to take under ten minutes. An H200 has run its commands, but one by one and some with fewer
# rows. Each answer stands in results/ as soon as it is there:
#
#     results/measure_gpu.sh [FOLDER OF A CLONE OF nanoGPT]
#
# tests_cuda.txt        the tests that need a GPU: attention kernels against float64, a resumed run
# compiled_cuda.jsonl   compiled steps: the smallest, the middle and the largest row, and best
# bench_cuda.json       every row's step, not compiled
# compare_cuda.txt      attention kernels, dtypes, and compiling, turn by turn
# nanogpt_cuda.json     nanoGPT's step beside ours
# profile_cuda.txt      where a compiled step's time goes
cd "$(dirname "$0")/.." || exit 1
nanogpt=${1:-../nanoGPT}
python=${PYTHON:-python}

{
    git describe --always --dirty=+
    nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
    "$python" -c 'import torch; print("torch", torch.__version__)'
    "$python" -m pytest -q -rs test_model.py tests/test_promises.py -k gpu
} 2>&1 | tee results/tests_cuda.txt
"$python" bench.py swiglu best swiglu_18 swiglu_23 --json --seconds=3 | tee results/compiled_cuda.jsonl
"$python" -m results.bench --publish --compile=False --seconds=3
for what in attention dtype=bfloat16,float32 compile; do
    "$python" bench.py swiglu --compare="$what" --seconds=3
done 2>&1 | tee results/compare_cuda.txt
if [ -d "$nanogpt" ]; then
    "$python" -m results.nanogpt --publish --nanogpt="$nanogpt" --position=learned --d_ff=800 --seconds=3
else
    echo "no nanoGPT in $nanogpt: git clone https://github.com/karpathy/nanoGPT $nanogpt" >&2
fi
"$python" bench.py swiglu --profile >results/profile_cuda.txt
