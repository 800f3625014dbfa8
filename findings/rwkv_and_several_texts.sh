#!/usr/bin/env bash
# transformers: RWKV writes nonsense as soon as it continues more than one text at a time. generate() with a batch of
# two prompts mixes their states, without an error, as long as use_cache is on, which is the default. One prompt at a
# time is right, and so is any batch with use_cache=False.
#
# The cause: where one token comes with a state, the layers multiply hidden states of shape (batch, 1, width) with a
# state of shape (batch, width). The result has shape (batch, batch, width): the texts have become tokens of one
# another. So logits have shape (2, 2, vocabulary) for a batch of two and one token each, and generate() reads the last.
#
# The documentation of state: "If passed along, the model uses the previous state in all the blocks (which will give the
# output for the input_ids provided as if the model add state_input_ids + input_ids as context)".
#
# Seen with transformers 5.24.0 (4.57.6 is no better), torch 2.13.0 and a model that learns a rule for 150 steps, each
# token the sum of the last two modulo 13: the share of right tokens in 8 texts that are continued by 16 tokens each
#     texts at a time   use_cache=False   default
#                   1              1.00      1.00
#                   2              1.00      0.17
#                   8              1.00      0.10
#     one token for each of 2 texts: logits of shape (2, 2, 13)
#
# For people who train small transformers and compare RWKV with them by what they write, or by tasks of which a batch is
# answered at a time: the validation loss, which needs no state, is right, and the texts are noise. Generate one text at
# a time, or pass use_cache=False. We found no report of this; huggingface/transformers#46612
# is of beam search.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile torch==2.13.0 transformers==5.24.0 numpy
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore - <<'P'
import torch
import torch.nn.functional as F
import transformers
from transformers import RwkvConfig, RwkvForCausalLM

transformers.logging.set_verbosity_error()
generator = torch.Generator().manual_seed(1)


def sequences(n, length):
    tokens = torch.randint(13, (n, 2), generator=generator)
    for _ in range(length - 2):
        tokens = torch.cat((tokens, tokens[:, -2:].sum(1, keepdim=True) % 13), dim=1)
    return tokens


torch.manual_seed(0)
model = RwkvForCausalLM(RwkvConfig(vocab_size=13, hidden_size=64, num_hidden_layers=2, context_length=64))
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
for _ in range(150):
    tokens = sequences(32, 16)
    loss = F.cross_entropy(model(tokens).logits[:, 1:-1].flatten(0, 1), tokens[:, 2:].flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
model.eval()
right = sequences(8, 24)
print('texts at a time   use_cache=False   default')
for size in (1, 2, 8):
    shares = []
    for options in ({'use_cache': False}, {}):
        written = [model.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=16, do_sample=False,
                                  eos_token_id=None, pad_token_id=0, **options) for prompts in right[:, :8].split(size)]
        shares.append((torch.cat(written)[:, 8:] == right[:, 8:]).float().mean().item())
    print(f'{size:15} {shares[0]:17.2f} {shares[1]:9.2f}')
    assert shares[0] > 0.95, 'the model has not learned the rule'
    assert shares[1] > 0.95 if size == 1 else shares[1] < 0.5, f'{size} texts at a time are not as described'
with torch.no_grad():
    expected = model(right[:2, :9], use_cache=False).logits[:, -1]
    state = model(right[:2, :8], use_cache=True).state
    logits = model(right[:2, 8:9], state=state, use_cache=True).logits
print('one token for each of 2 texts: logits of shape', tuple(logits.shape))
assert logits.shape == (2, 2, 13) and (logits[:, -1] - expected).abs().max() > 1, 'the state is not as described'
print(f'transformers {transformers.__version__}, torch {torch.__version__}: as described')
P
