"""Two transformer language models: a modern one, and the tutorial model with which the lab notebook begins.

Read attention as a formula, then the layers from leaf to root, then the models. The last section computes the same
attention faster: skip it at first. Needs torch, and flash-attn where that is chosen. A config holds a run's settings.
Shapes: B batch, T tokens, S keys, C channels (n_embd), H heads, D head width (C / H), V vocabulary.
"""

import math
import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


def naive_attention(q, k, v, dropout=0.0):
    """softmax(q k' / sqrt(D)) v, where no query attends to a later key (Vaswani et al., 2017).

    Queries q (B, T, H, D), keys k and values v (B, S, H, D) give (B, T, H, D). The queries are those of the last T
    tokens: all in training, T = S. In generation T = 1, and the new token's query attends to all S keys."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, T or S, D)
    T, S = q.size(2), k.size(2)
    future = torch.full((T, S), -math.inf, dtype=q.dtype, device=q.device).triu(1 + S - T)  # 0 where a query may look
    weights = torch.softmax(q / math.sqrt(q.size(-1)) @ k.mT + future, dim=-1)  # (B, H, T, S)
    return (F.dropout(weights, dropout) @ v).transpose(1, 2)


# ---- the layers ----------------------------------------------------------------------------------------------------


def rotary_table(block_size, width, base=10000.0):
    """Cosines and sines of the angles by which position t rotates pair i: t / base^(2i/width) radians (Su et al.,
    2021). Shape (2, block_size, 1, 1, width/2). Exits if the width is odd."""
    if width % 2:
        sys.exit(f'positions need an even width to turn, and {width} is an odd number: change n_embd or n_head.')
    # computed in float64 and kept in float32: in bfloat16, neighbouring positions would share an angle
    frequency = base ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angle = torch.outer(torch.arange(block_size, dtype=torch.float64), frequency)
    return torch.stack((angle.cos(), angle.sin()))[:, :, None, None].float()


def apply_rotary(x, cos, sin):
    """Rotate each pair (x[i], x[i + D/2]) of x (B, T, 2, H, D), queries and keys, by the angle of its position, in
    float32. Positions then enter the product of query and key only by their distance. cos, sin: (T, 1, 1, D/2)."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).type_as(x)


def shift(x):
    """Each token of x (B, S, H, D) at the place of the next one; zeros at the first place, and the last is left out."""
    return F.pad(x, (0, 0, 0, 0, 1, -1))


@dataclass
class Shared:
    """What the blocks of one forward pass share beside the residual stream."""

    rotary: torch.Tensor | None  # cosines and sines of the T positions, (2, T, 1, 1, D/2)
    cache: dict | None  # in generation: each block's keys and values of the text so far, (B, S - T, H, D)
    first_values: torch.Tensor | None = None  # the first block's, (B, T, H, D), for the value residual


class Attention(nn.Module):
    """Causal multi-head self-attention with one fused projection for queries, keys and values."""

    def __init__(self, config, is_first):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.exclude_self = config.exclude_self
        self.induction_heads = config.induction_heads
        self.attention_fn = ATTENTION[config.attention]
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.proj = nn.Linear(config.n_embd, config.n_embd)
        self.gate = nn.Linear(config.n_embd, config.n_head) if config.head_gate else None
        self.value_mix = nn.Parameter(torch.full((2,), 0.5)) if config.value_residual and not is_first else None

    def forward(self, x, shared):
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head)  # (B, T, 3, H, D)
        # the backward of slicing pads each gradient with zeros and sums them; that of split does not
        qk, v = qkv.split((2, 1), dim=2)  # (B, T, 2, H, D), (B, T, 1, H, D)
        if shared.rotary is not None:
            qk = apply_rotary(qk, *shared.rotary)
        q, k = qk.unbind(2)  # (B, T, H, D) each
        v = v.squeeze(2)  # (B, T, H, D)
        if shared.first_values is None:
            shared.first_values = v
        if self.value_mix is not None:  # mix in the first block's, made from the bare embeddings (Zhou et al., 2024)
            v = self.value_mix[0] * v + self.value_mix[1] * shared.first_values
        if shared.cache is not None:
            old_k, old_v = shared.cache.get(self, (k[:, :0], v[:, :0]))  # (B, S - T, H, D)
            k, v = torch.cat((old_k, k), dim=1), torch.cat((old_v, v), dim=1)  # (B, S, H, D)
            shared.cache[self] = k, v
        if self.induction_heads:  # they find a token's value by the key of the token before (cf. Olsson et al., 2022)
            first, others = k.split((self.induction_heads, self.n_head - self.induction_heads), dim=2)
            k = torch.cat((shift(first), others), dim=2)
        if self.exclude_self:  # token t finds a key of zeros and those of tokens 0 to t - 1 (cf. Kitaev et al., 2020)
            k, v = shift(k), shift(v)
        # attention functions do not know model.eval(): without this condition dropout stays on in validation
        y = self.attention_fn(q, k, v, self.dropout if self.training else 0.0)  # (B, T, H, D)
        if self.gate is not None:  # each token scales each head by 0 to 2, at first by 1 (Qiu et al., 2025)
            y = y * (2 * self.gate(x).sigmoid())[..., None]
        return self.proj(y.reshape(B, T, C))


def swiglu(x):
    """SiLU of the first half of the channels times the second: (B, T, 2 d_ff) to (B, T, d_ff) (Shazeer, 2020)."""
    gate, value = x.chunk(2, dim=-1)
    return F.silu(gate) * value


class FeedForward(nn.Module):
    """C -> d_ff -> C through GELU (Hendrycks and Gimpel, 2016) or SwiGLU, for each token alone."""

    def __init__(self, config):
        super().__init__()
        self.activation, projections = {'gelu': (F.gelu, 1), 'swiglu': (swiglu, 2)}[config.activation]
        self.fc = nn.Linear(config.n_embd, projections * config.d_ff)
        self.proj = nn.Linear(config.d_ff, config.n_embd)

    def forward(self, x):
        return self.proj(self.activation(self.fc(x)))


class Block(nn.Module):
    """Attention, then feed-forward. Each reads the normalised residual stream x (B, T, C) and adds to it (pre-norm)."""

    def __init__(self, config, is_first):
        super().__init__()
        self.attn_norm = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config, is_first)
        self.mlp_norm = nn.LayerNorm(config.n_embd)
        self.mlp = FeedForward(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x, shared):
        x = x + self.drop(self.attn(self.attn_norm(x), shared))
        return x + self.drop(self.mlp(self.mlp_norm(x)))


# ---- the models ----------------------------------------------------------------------------------------------------


class LanguageModel(nn.Module):
    """What both models share. Called with tokens (B, T), a model returns logits (B, T, V). Called with targets (B, T)
    as well, it returns the mean loss in nats per token; targets of -1 do not count."""

    def num_params(self):
        """The number of parameters as the notebook counts them: without learned positions, which nanoGPT omits too."""
        return sum(p.numel() for name, p in self.named_parameters() if name != 'positions')

    def loss(self, logits, targets):
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, generator=None, unused_ids=()):
        """Continue idx (B, T): yields max_new_tokens next tokens, (B, 1) each. Call model.eval() first.

        The temperature divides the logits; 0 takes the likeliest token. Only the top_k likeliest are drawn, unused_ids
        never. The model sees at most block_size tokens: of a longer text, the newer half is read into a new cache."""
        idx = idx[:, -self.block_size :]
        cache = {}
        for _ in range(max_new_tokens):
            if idx.size(1) > self.block_size:
                idx = idx[:, -(self.block_size // 2 + 1) :]
                cache = {}
            # forward itself, not the compiled call, which would compile again for each length
            logits = self.forward(idx, cache=cache)[:, -1].float()  # (B, V)
            logits[:, list(unused_ids)] = -math.inf
            if top_k is not None and top_k < logits.size(-1):
                logits[logits < logits.topk(top_k).values[:, -1:]] = -math.inf
            if temperature == 0:
                new = logits.argmax(dim=-1, keepdim=True)  # (B, 1)
            else:
                logits = logits / min(max(temperature, 1e-9), 1e9)  # the clamp avoids overflow and underflow
                new = torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)
            idx = torch.cat((idx, new), dim=1)
            yield new


class Transformer(LanguageModel):
    """The flash model, run 4 and all later ones: a pre-norm decoder whose output projection is its embedding."""

    def __init__(self, config, vocab_size):
        super().__init__()
        self.block_size = config.block_size
        self.vocab_size = vocab_size
        self.embedding = nn.Embedding(math.ceil(vocab_size / 8) * 8, config.n_embd)  # tensor cores want multiples of 8
        learned = config.position == 'learned'
        self.positions = nn.Parameter(torch.empty(config.block_size, config.n_embd)) if learned else None
        rotary = None if learned else rotary_table(config.block_size, config.n_embd // config.n_head)
        self.register_buffer('rotary', rotary, persistent=False)
        self.drop = nn.Dropout(config.dropout)
        self.embedding_norm = config.embedding_norm
        self.blocks = nn.ModuleList(Block(config, i == 0) for i in range(config.n_layer))
        self.norm = nn.LayerNorm(config.n_embd)
        self.initialise(config.n_layer)

    def initialise(self, n_layer):
        """GPT-2's initialisation (Radford et al., 2019). Each block adds two projections to the residual stream; their
        standard deviation, divided by sqrt(2 n_layer), keeps the stream's variance independent of depth."""
        for name, p in self.named_parameters():
            if name.endswith(('embedding.weight', 'positions', 'qkv.weight', 'fc.weight')):
                nn.init.normal_(p, std=0.02)
            elif name.endswith('proj.weight'):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * n_layer))
            elif name.endswith(('bias', 'gate.weight')):
                nn.init.zeros_(p)
            elif not name.endswith(('norm.weight', 'value_mix')):  # which were made with 1 and 0.5
                raise ValueError(f'{name} is initialised by no rule of Transformer.initialise: add one.')

    def forward(self, idx, targets=None, cache=None):
        start = cache[self.blocks[0].attn][0].size(1) if cache else 0  # position of the first token not in the cache
        stop = idx.size(1)
        x = self.embedding(idx[:, start:])  # (B, T, C), the residual stream
        if self.positions is not None:
            x = x + self.positions[start:stop]
        if self.embedding_norm:  # to a mean square of 1: the blocks' outputs would outweigh weights of size 0.02
            x = F.rms_norm(x, (x.size(-1),))
        x = self.drop(x)
        shared = Shared(self.rotary[:, start:stop] if self.positions is None else None, cache)
        for block in self.blocks:
            x = block(x, shared)
        logits = F.linear(self.norm(x), self.embedding.weight)  # (B, T, V padded to a multiple of 8)
        if targets is None:
            return logits[..., : self.vocab_size]  # the padding stands for no token and is never sampled
        # but it takes part in the loss's softmax: 0.007 nats at step 0, 4e-6 at the end (1032 logits for 1025 tokens)
        return self.loss(logits, targets)


class TorchTransformer(LanguageModel):
    """The PyTorch model, runs 1 to 3: the post-norm nn.TransformerEncoder of PyTorch's former language tutorial (linked
    in README.md), with 6 layers in place of 2. Its positions are sinusoids (Vaswani et al., 2017), its activation is
    ReLU, and nn.MultiheadAttention chooses the attention kernel."""

    def __init__(self, config, vocab_size):
        super().__init__()
        self.block_size = config.block_size
        self.embedding = nn.Embedding(vocab_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        layer = nn.TransformerEncoderLayer(config.n_embd, config.n_head, config.d_ff, config.dropout, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, config.n_layer, enable_nested_tensor=False)
        self.head = nn.Linear(config.n_embd, vocab_size)
        cos, sin = rotary_table(config.block_size, config.n_embd)  # sinusoids have the same angles, (T, 1, 1, C/2)
        self.register_buffer('sinusoids', torch.stack((sin, cos), dim=-1).flatten(1), persistent=False)  # (T, C)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        nn.init.uniform_(self.head.weight, -0.1, 0.1)
        nn.init.zeros_(self.head.bias)

    def forward(self, idx, targets=None, cache=None):  # the cache stays empty: it reads the whole text again
        T = idx.size(1)
        x = self.embedding(idx) * math.sqrt(self.embedding.embedding_dim) + self.sinusoids[:T]  # (B, T, C)
        mask = nn.Transformer.generate_square_subsequent_mask(T, device=x.device, dtype=x.dtype)
        x = self.encoder(self.drop(x), mask=mask, is_causal=True)
        logits = self.head(x)  # (B, T, V)
        return logits if targets is None else self.loss(logits, targets)


def build_model(config, vocab_size):
    """The model that a config describes. Its initial weights depend on the config alone, which holds the seed."""
    if config.n_embd % config.n_head:
        sys.exit(f'n_embd={config.n_embd} is not divisible by n_head={config.n_head}: change one of them.')
    torch.manual_seed(config.seed)
    model = Transformer if config.model == 'flash' else TorchTransformer
    return model(config, vocab_size)


# ---- attention, faster: the arguments and results of naive_attention, against which it is tested -------------------

CHUNK = 256  # queries per chunk: fewer waste less work on masked scores, more make larger matrix products


def chunked_attention(q, k, v, dropout=0.0):
    """The formula for CHUNK queries at a time. Each chunk multiplies only the keys up to its last query: 5/8 of T x T
    for four chunks, towards 1/2 for many."""
    B, T, H, D = q.shape
    S = k.size(1)
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # (B H, T or S, D)
    outputs = []
    for start in range(0, T, CHUNK):
        stop = min(start + CHUNK, T)
        n_keys = S - T + stop
        future = torch.full((stop - start, n_keys), -math.inf, dtype=q.dtype, device=q.device).triu(1 + S - T + start)
        # baddbmm adds the mask within the product, which saves a pass over the scores, (B H, CHUNK, n_keys)
        scores = torch.baddbmm(future, q[:, start:stop], k[:, :n_keys].mT, alpha=1 / math.sqrt(D))
        outputs.append(F.dropout(torch.softmax(scores, dim=-1), dropout) @ v[:, :n_keys])
    return torch.cat(outputs, dim=1).view(B, H, T, D).transpose(1, 2)


def sdpa_attention(q, k, v, dropout=0.0):
    """PyTorch's fused kernels: cuDNN, FlashAttention-2 or memory-efficient attention, whichever the machine allows."""
    # with T < S, is_causal=True aligns the mask top-left: the query of a new token would attend to the first key only
    if q.size(1) < k.size(1):
        return naive_attention(q, k, v, dropout)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, T, D)
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True).transpose(1, 2)


def flash_attention(q, k, v, dropout=0.0):
    """The flash-attn package (FlashAttention-2: Dao, 2023). It takes (B, T, H, D), and aligns the mask bottom-right."""
    from flash_attn import flash_attn_func  # here, since it runs on some GPUs only

    return flash_attn_func(q, k, v, dropout_p=dropout, causal=True)


ATTENTION = {'naive': naive_attention, 'chunked': chunked_attention, 'sdpa': sdpa_attention, 'flash': flash_attention}
