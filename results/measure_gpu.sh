#!/usr/bin/env bash
# Measure on a GPU what the pages need; made to take under ten minutes. Each answer is in results/ as soon as it is there:
#
#     results/measure_gpu.sh [FOLDER OF A CLONE OF nanoGPT]
#
# tests_cuda.txt        the tests that need a GPU: attention kernels against float64, a recorded step, a resumed run
# bench_cuda.json       the compiled step of the smallest, the middle and the largest model, of PyTorch's, and of best
# compare_cuda.txt      attention kernels, dtypes, and compiling, interleaved
# nanogpt_cuda.json     nanoGPT's step beside ours
# profile_cuda.txt      where a compiled step's time goes
#
# As one command it has not run yet; an NVIDIA H200 has run its parts, some with other arguments.
cd "$(dirname "$0")/.." || exit 1
nanogpt=${1:-../nanoGPT}
python=${PYTHON:-python}

{
    git describe --always --dirty=+
    nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
    "$python" -c 'import torch; print("torch", torch.__version__)'
    "$python" -m pytest -q -rs test_model.py tests/test_promises.py -k gpu
} 2>&1 | tee results/tests_cuda.txt
"$python" -m results.bench --publish config/{cosine,swiglu,swiglu_18,swiglu_23,learned,best}.py --seconds=3
for what in attention dtype=bfloat16,float32 compile; do
    "$python" bench.py swiglu --compare="$what" --seconds=3
done 2>&1 | tee results/compare_cuda.txt
if [ -d "$nanogpt" ]; then
    "$python" -m results.nanogpt --publish --nanogpt="$nanogpt" --position=learned --d_ff=800 --seconds=3
    "$python" -m results.nanogpt --publish --nanogpt="$nanogpt" --position=learned --d_ff=512 --seconds=3 \
        --n_layer=4 --n_head=4 --n_embd=128 --batch_size=12 --block_size=64
else
    echo "no nanoGPT in $nanogpt: git clone https://github.com/karpathy/nanoGPT $nanogpt" >&2
fi
"$python" bench.py swiglu --profile >results/profile_cuda.txt
