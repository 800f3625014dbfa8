#!/usr/bin/env bash
# torch.set_float32_matmul_precision('medium') on a CPU: its documentation says that the flag "currently only affects
# one native device type: CUDA". On a CPU with AMX it makes every float32 matrix product round its inputs to bfloat16,
# so a program that sets the flag for its GPU computes less exactly on such a CPU, without a word. 'high' does not.
#
# Seen with torch 2.13.0 on an Intel Xeon with AMX (the largest error of a 512 x 512 product against float64):
#     highest 9.4e-05
#     high    9.4e-05
#     medium  7.6e-02
# Here machine.py compares the errors of one product before it uses the setting.
set -euo pipefail
if ! grep -qw amx_bf16 /proc/cpuinfo; then
    echo 'skipped: this CPU has no AMX'
    exit 0
fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
cd "$folder"
"$folder/venv/bin/python" - <<'P'
import torch

a, b = torch.rand(2, 512, 512, generator=torch.Generator().manual_seed(0))
exact, errors = a.double() @ b.double(), {}
for precision in ('highest', 'high', 'medium'):
    torch.set_float32_matmul_precision(precision)
    errors[precision] = (a @ b - exact).abs().max().item()
    print(f'{precision:7} {errors[precision]:.1e}')
assert 'only affects one native device type: CUDA' in torch.set_float32_matmul_precision.__doc__, 'the page has changed'
assert errors['high'] == errors['highest'] < 1e-3 and errors['medium'] > 100 * errors['highest'], 'the CPU has changed'
print(f'torch {torch.__version__}: as described')
P
