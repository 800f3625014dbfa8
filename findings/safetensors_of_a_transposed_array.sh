#!/usr/bin/env bash
# safetensors 0.8.0: safetensors.numpy.save_file and save write a transposed NumPy array, a column-ordered one or a
# slice with steps as if it were row-ordered. The file has the right shape and the wrong numbers, and neither saving nor
# loading says so. Version 0.7.0 wrote the same arrays rightly; safetensors.torch refuses such tensors with an error.
#
# The cause: 0.8.0 copies the memory from the array's address on, where 0.7.0 called tobytes(). The documentation says
# that tensors "need to be contiguous and dense", as it did before. A column-ordered array is dense, and NumPy calls it
# contiguous, too (flags.f_contiguous). Reported for scikit-learn's arrays as safetensors/safetensors#825, open.
#
# Seen with numpy 2.4.6: in how many of 24 places a wrong number was loaded
#     safetensors 0.7.0 {'row-ordered': 0, 'transposed': 0, 'column-ordered': 0, 'every second column': 0}
#     safetensors 0.8.0 {'row-ordered': 0, 'transposed': 22, 'column-ordered': 22, 'every second column': 23}
#
# For people who train small transformers: whoever turns GPT-2's weights (Conv1D, which keeps them transposed) into
# those of linear layers, or the other way round, by w.T and save_file gets a checkpoint of noise, with all names and
# shapes right. Save np.ascontiguousarray(w.T).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
cat > compare.py <<'P'
import sys
from importlib.metadata import version

import numpy as np
from safetensors.numpy import load, load_file, save, save_file

w = np.arange(24, dtype=np.float32)
arrays = {'row-ordered': w.reshape(4, 6), 'transposed': w.reshape(6, 4).T,
          'column-ordered': np.asfortranarray(w.reshape(4, 6)),
          'every second column': np.arange(48, dtype=np.float32).reshape(4, 12)[:, ::2]}
save_file(arrays, 'file.safetensors')
loaded = load_file('file.safetensors')
wrong = {name: int((loaded[name] != array).sum()) for name, array in arrays.items()}
print('safetensors', version('safetensors'), wrong)
assert all(np.array_equal(array, loaded[name]) for name, array in load(save(arrays)).items()), 'save is not save_file'
assert all(loaded[name].shape == array.shape for name, array in arrays.items())
assert wrong['row-ordered'] == 0
others = [wrong[name] for name in list(arrays)[1:]]
assert max(others) == 0 if sys.argv[1] == 'right' else min(others) > 12, 'this version is not as described'
P
for version in 0.7.0 0.8.0; do
    python3 -m venv "$version"
    "$version/bin/pip" install --quiet --no-compile safetensors=="$version" numpy==2.4.6
    "$version/bin/python" compare.py "$([ "$version" = 0.7.0 ] && echo right || echo wrong)"
done
echo 'as described'
