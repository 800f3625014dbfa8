#!/usr/bin/env bash
# transformers: whether the texts of a packed batch see each other depends on use_cache. DataCollatorWithFlattening
# packs texts into one row, with position_ids that start from 0 in each text. With use_cache=False each text sees itself
# alone, as if it were the only one. With use_cache=True, the default in training, too, each text sees all texts before
# it as well. Gradient checkpointing, which should trade memory for time and change no result, turns the cache off, and
# so gives another loss. An attention_mask of ones, which masks nothing, lets the texts see each other even without the
# cache.
#
# The documentation of use_cache: "If set to True, cache key value states are returned and can be used to speed up
# decoding". The library looks for packed texts where it is given no mask and makes no cache, "i.e. generally a training
# setup" (masking_utils.py; huggingface/transformers#39194). But model(**batch) makes a cache in training, too. The
# library's Trainer turns it off, so one's own loop computes another loss than the Trainer. The mask of ones was
# reported in #46634. The page on padding-free training says that it relies on FlashAttention; in fact sdpa and eager
# attention keep the texts apart as well, if there is neither a cache nor a mask.
#
# Seen with transformers 5.24.0 and torch 2.13.0, a Llama of random weights in training mode, three texts: the loss per
# token, which should be one number:
#     each text alone                              5.1590
#     packed, use_cache=False                      5.1590
#     packed, gradient checkpointing               5.1590
#     packed, use_cache=True, the default          4.8918
#     packed, use_cache=False and a mask of ones   4.8918
#
# For people who train small transformers in a loop of their own: the model learns to look at texts that have nothing to
# do with the one it continues, and nothing says so. Pass use_cache=False with packed texts, and no mask.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile torch==2.13.0 transformers==5.24.0 numpy
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore - <<'P'
import torch
import transformers
from transformers import DataCollatorWithFlattening, LlamaConfig, LlamaForCausalLM

transformers.logging.set_verbosity_error()
generator = torch.Generator().manual_seed(0)
texts = [torch.randint(50, (length,), generator=generator) for length in (20, 30, 40)]
batch = DataCollatorWithFlattening()([{'input_ids': text.tolist()} for text in texts])
assert batch['position_ids'].tolist() == [[*range(20), *range(30), *range(40)]] and 'attention_mask' not in batch
ones = torch.ones_like(batch['input_ids'])
config = LlamaConfig(vocab_size=50, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                     initializer_range=0.2)
assert config.use_cache
for attention in ('sdpa', 'eager'):
    torch.manual_seed(0)
    config._attn_implementation = attention
    model = LlamaForCausalLM(config).train()
    losses = [model(input_ids=text[None], labels=text[None], use_cache=False).loss * (len(text) - 1) for text in texts]
    alone = (sum(losses) / sum(len(text) - 1 for text in texts)).item()
    default = model(**batch).loss.item()
    without_cache = model(**batch, use_cache=False).loss.item()
    masked = model(**batch, use_cache=False, attention_mask=ones).loss.item()
    model.gradient_checkpointing_enable()
    checkpointed = model(**batch).loss.item()
    print(attention, f'each text alone                              {alone:.4f}',
          f'packed, use_cache=False                      {without_cache:.4f}',
          f'packed, gradient checkpointing               {checkpointed:.4f}',
          f'packed, use_cache=True, the default          {default:.4f}',
          f'packed, use_cache=False and a mask of ones   {masked:.4f}', sep='\n    ')
    assert abs(without_cache - alone) < 1e-4 and abs(checkpointed - alone) < 1e-4, 'packed texts are not kept apart'
    assert abs(default - alone) > 0.01 and abs(masked - default) < 1e-4, 'packed texts are kept apart with a cache, too'
print(f'transformers {transformers.__version__}, torch {torch.__version__}: as described')
P
