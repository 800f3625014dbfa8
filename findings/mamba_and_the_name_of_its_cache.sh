#!/usr/bin/env bash
# transformers 5: Mamba hands out its cache under a name under which it does not take it back. Its output has
# past_key_values, the name by which every loop for Llama or GPT-2 knows the cache, and model(token,
# past_key_values=output.past_key_values) runs without an error, but ignores it: each new token is computed as if it
# were the first of a text. Mamba wants cache or cache_params. With Llama and GPT-2 it is the other way round: their
# output has cache_params, too, and they ignore it.
#
# The two kinds of model once had two names for it. Now it is called cache, and each output gives it under both old
# names as well, for the sake of older programs. But a model accepts only the old name that was its own, and any other
# goes into **kwargs, where nobody looks for it. All that is said, once in a process, when the output is read, is
# "`past_key_values`/`cache_params` are deprecated. Use `cache` instead.", which sounds as if both would still do.
# The documentation of Mamba's use_cache: "If set to `True`, the `cache` is returned and can be used to quickly generate
# the next logits".
#
# Seen with transformers 5.24.0 and torch 2.13.0, models of random weights, 12 tokens one by one after 12 others: the
# largest error of a logit if the cache is read and given by each name, and if each token is computed alone
#                        cache past_key_values    cache_params      the token alone
#     GPT-2            3.1e-06         3.1e-06         8.5e+00              8.5e+00
#     Llama            5.7e-06         5.7e-06         7.6e+00              7.6e+00
#     Mamba            2.6e-06         8.9e+00         2.6e-06              8.9e+00
#     Mamba 2          2.7e-06         5.8e+00         2.7e-06              5.8e+00
#
# For people who train small transformers and try Mamba beside them, with one sampling loop for both: the validation
# loss is right and the samples are not, and one takes it that Mamba remembers nothing. Pass cache=output.cache, or call
# generate(), which is right. We found no report of this.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile torch==2.13.0 transformers==5.24.0 numpy
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore - <<'P'
import torch
import transformers
from transformers import (GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Mamba2Config, Mamba2ForCausalLM,
                          MambaConfig, MambaForCausalLM)

transformers.logging.set_verbosity_error()
NAMES = ('cache', 'past_key_values', 'cache_params')
small = dict(vocab_size=50, hidden_size=64, num_hidden_layers=2, initializer_range=0.2)
kinds = {
    'GPT-2': (GPT2LMHeadModel, 'cache_params',
              GPT2Config(vocab_size=50, n_embd=64, n_layer=2, n_head=4, initializer_range=0.2)),
    'Llama': (LlamaForCausalLM, 'cache_params', LlamaConfig(intermediate_size=128, num_attention_heads=4, **small)),
    'Mamba': (MambaForCausalLM, 'past_key_values', MambaConfig(state_size=8, **small)),
    'Mamba 2': (Mamba2ForCausalLM, 'past_key_values',
                Mamba2Config(state_size=8, num_heads=8, head_dim=16, n_groups=1, **small)),
}
tokens = torch.randint(50, (4, 24), generator=torch.Generator().manual_seed(1))
print(f'{"":8}', *(f'{name:>15}' for name in NAMES), f'{"the token alone":>20}')
for kind, (cls, ignored, config) in kinds.items():
    torch.manual_seed(0)
    model = cls(config).eval()
    with torch.no_grad():
        right, alone = model(tokens, use_cache=False).logits[:, 12:], torch.empty(4, 12, 50)
        for i in range(12):
            alone[:, i] = model(tokens[:, 12 + i, None], use_cache=False).logits[:, 0]
        errors, nothing = {}, {}
        for name in NAMES:
            output, logits = model(tokens[:, :12], use_cache=True), []
            for token in tokens[:, 12:].split(1, dim=1):
                cache = getattr(output, name)
                assert cache is not None, f'the output of {kind} has no {name}'
                output = model(token, use_cache=True, **{name: cache})
                logits.append(output.logits)
            logits = torch.cat(logits, dim=1)
            errors[name], nothing[name] = (logits - right).abs().max().item(), (logits - alone).abs().max().item()
    difference = (alone - right).abs().max().item()
    print(f'{kind:8}', *(f'{errors[name]:15.1e}' for name in NAMES), f'{difference:20.1e}', flush=True)
    for name in NAMES:
        if name == ignored:
            assert errors[name] > 1 and nothing[name] < 1e-3, f'{kind} takes notice of {name}'
        else:
            assert errors[name] < 1e-3, f'{kind} does not take {name}'
print(f'transformers {transformers.__version__}, torch {torch.__version__}: as described')
P
