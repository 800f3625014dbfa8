"""The two models of the log: a flash-attention transformer, and PyTorch's tutorial model where the log began.

Read it from leaf to root. It needs torch alone, and uses flash-attn where that is installed.
Shapes: B batch, T time (tokens), C channels (n_embd), H heads, D head width (C / H), V vocabulary.
"""

import math
import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

# ---- attention: q (B, T, H, D) and k, v (B, S, H, D) to (B, T, H, D), causal ---------------------------------------
# Training reads a whole text: T = S. Generation adds one token to the S - 1 of the cache: T = 1, and it sees them all.

CHUNK = 256  # queries per chunk: fewer waste less work on the future, more make larger matrix products


def naive_attention(q, k, v, dropout=0.0):
    """softmax(q k' / sqrt(D)) v, where no query sees a later key (Vaswani et al., 2017). The fast kernels compute the
    same, and are tested against this."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, T or S, D)
    T, S = q.size(2), k.size(2)
    future = torch.full((T, S), -math.inf, dtype=q.dtype, device=q.device).triu(1 + S - T)
    weights = torch.softmax(q / math.sqrt(q.size(-1)) @ k.mT + future, dim=-1)  # (B, H, T, S)
    return (F.dropout(weights, dropout) @ v).transpose(1, 2)


def chunked_attention(q, k, v, dropout=0.0):
    """The formula for CHUNK queries at a time, and for the keys that they may see: four chunks do 5/8 of the work, many
    do half. baddbmm adds the mask within the product, which saves a pass over the scores."""
    (B, T, H, D), S, outputs = q.shape, k.size(1), []
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # (B H, T or S, D)
    for start in range(0, T, CHUNK):
        queries, seen = q[:, start : start + CHUNK], S - T + min(T, start + CHUNK)  # seen: how many keys they see
        future = torch.full((queries.size(1), seen), -math.inf, dtype=q.dtype, device=q.device).triu(1 + S - T + start)
        weights = torch.softmax(torch.baddbmm(future, queries, k[:, :seen].mT, alpha=1 / math.sqrt(D)), dim=-1)
        outputs.append(F.dropout(weights, dropout) @ v[:, :seen])
    return torch.cat(outputs, dim=1).view(B, H, T, D).transpose(1, 2)


def sdpa_attention(q, k, v, dropout=0.0):
    """PyTorch's fused kernels: cuDNN, FlashAttention 2 or memory-efficient attention, whichever the machine allows."""
    if q.size(1) < k.size(1):  # nothing to gain for a query or two; on Hopper cuDNN would plan anew for each length
        return naive_attention(q, k, v, dropout)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True).transpose(1, 2)


def flash_attention(q, k, v, dropout=0.0):
    """The flash-attn package (FlashAttention-2: Dao, 2023). It takes (B, T, H, D) as it is."""
    import flash_attn  # here, since it runs on some GPUs only

    return flash_attn.flash_attn_func(q, k, v, dropout_p=dropout, causal=True)


ATTENTION = {'naive': naive_attention, 'chunked': chunked_attention, 'sdpa': sdpa_attention, 'flash': flash_attention}


# ---- the layers ----------------------------------------------------------------------------------------------------


@dataclass
class Config:
    """The shape of a model. train.py's knobs explain all but vocab_size, and hold the only defaults."""

    vocab_size: int
    block_size: int
    n_layer: int
    n_head: int
    n_embd: int
    d_ff: int
    dropout: float
    activation: str  # a key of ACTIVATION
    position: str  # 'rotary' or 'learned'
    attention: str  # a key of ATTENTION
    embedding_norm: bool
    head_gate: bool
    value_residual: bool

    def __post_init__(self):
        if self.n_embd % self.n_head:
            sys.exit(f'n_embd={self.n_embd} is not divisible by n_head={self.n_head}: change one of them.')


def rotary_table(block_size, width, base=10000.0):
    """Cosines and sines, (2, T, 1, 1, D/2): position t turns pair i by t / base^(2i/D) (Su et al., 2021)."""
    if width % 2:
        sys.exit(f'positions need an even width to turn, and {width} is an odd number: change n_embd or n_head.')
    # built in float64 and used in float32: in bfloat16, neighbouring positions would share an angle
    frequency = base ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angle = torch.outer(torch.arange(block_size, dtype=torch.float64), frequency)
    return torch.stack((angle.cos(), angle.sin()))[:, :, None, None].float()


def rotate(x, cos, sin):
    """Turn each pair (x[i], x[i + D/2]) of x (B, T, 2, H, D) by its position's angle: q·k then depends on distance."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).type_as(x)


class Cache:
    """The keys and values of the text so far, layer by layer: a new token then costs one token's work, not that of the
    whole text."""

    def __init__(self):
        self.length, self.layers = 0, {}

    def extend(self, layer, k, v):
        """Append k and v (B, T, H, D) to a layer's; returns all of that layer's, (B, length + T, H, D)."""
        if layer in self.layers:
            k, v = (torch.cat(pair, dim=1) for pair in zip(self.layers[layer], (k, v), strict=True))
        self.layers[layer] = k, v
        return k, v


class Attention(nn.Module):
    """Causal multi-head self-attention with one fused projection for queries, keys and values."""

    def __init__(self, c, is_first):
        super().__init__()
        self.n_head, self.dropout, self.attend = c.n_head, c.dropout, ATTENTION[c.attention]
        self.qkv = nn.Linear(c.n_embd, 3 * c.n_embd)
        self.proj = nn.Linear(c.n_embd, c.n_embd)
        self.gate = nn.Linear(c.n_embd, c.n_head) if c.head_gate else None
        self.mix = nn.Parameter(torch.full((2,), 0.5)) if c.value_residual and not is_first else None

    def forward(self, x, rotary=None, cache=None, first_values=None):
        """x (B, T, C) to (B, T, C), and the first block's values (B, T, H, D), which all later blocks receive."""
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head)  # (B, T, 3, H, D)
        qk, v = qkv.split((2, 1), dim=2)  # the backward of a split is one copy; that of slices adds tensors of zeros
        q, k = (qk if rotary is None else rotate(qk, *rotary)).unbind(2)  # (B, T, H, D) each
        v = v.squeeze(2)
        first_values = v if first_values is None else first_values
        if self.mix is not None:  # the first block's come straight from the tokens (Zhou et al., 2024)
            v = self.mix[0] * v + self.mix[1] * first_values
        if cache is not None:
            k, v = cache.extend(self, k, v)
        # the kernels do not know model.eval(): without this condition dropout stays on in validation
        y = self.attend(q, k, v, self.dropout if self.training else 0.0)
        if self.gate is not None:  # each token scales each head by 0 to 2, at first by 1 (Qiu et al., 2025)
            y = y * (2 * self.gate(x).sigmoid())[..., None]
        return self.proj(y.reshape(B, T, C)), first_values


def swiglu(x):
    """Half of the channels, each scaled by a learned gate: (B, T, 2 d_ff) to (B, T, d_ff) (Shazeer, 2020)."""
    gate, value = x.chunk(2, dim=-1)
    return F.silu(gate) * value


ACTIVATION = {'gelu': (F.gelu, 1), 'swiglu': (swiglu, 2)}  # the function, and its inputs per output


class FeedForward(nn.Module):
    """C -> d_ff -> C through GELU (Hendrycks and Gimpel, 2016) or SwiGLU."""

    def __init__(self, c):
        super().__init__()
        self.activation, inputs = ACTIVATION[c.activation]
        self.fc = nn.Linear(c.n_embd, inputs * c.d_ff)
        self.proj = nn.Linear(c.d_ff, c.n_embd)

    def forward(self, x):
        return self.proj(self.activation(self.fc(x)))


class Block(nn.Module):
    """Attention, then feed-forward. Each reads a normalised copy of the stream and adds to the stream (pre-norm)."""

    def __init__(self, c, is_first):
        super().__init__()
        self.attn_norm, self.attn = nn.LayerNorm(c.n_embd), Attention(c, is_first)
        self.mlp_norm, self.mlp = nn.LayerNorm(c.n_embd), FeedForward(c)
        self.drop = nn.Dropout(c.dropout)

    def forward(self, x, rotary=None, cache=None, first_values=None):
        y, first_values = self.attn(self.attn_norm(x), rotary, cache, first_values)
        x = x + self.drop(y)
        return x + self.drop(self.mlp(self.mlp_norm(x))), first_values


# ---- the models ----------------------------------------------------------------------------------------------------


class LanguageModel(nn.Module):
    """What both models share. Called with tokens (B, T), a model returns logits (B, T, V). Called with targets (B, T)
    as well, it returns the mean loss in nats per token; targets of -1 do not count."""

    def num_params(self):
        """Parameters as the log counts them: without the learned positions (nanoGPT leaves them out, too)."""
        return sum(p.numel() for name, p in self.named_parameters() if name != 'positions')

    def loss(self, logits, targets):
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, generator=None):
        """Continue idx (B, T): yields max_new_tokens next tokens, (B, 1) each.

        temperature divides the logits; 0 takes the likeliest token. top_k keeps the k likeliest. Call model.eval()
        first. The model sees the last block_size tokens; when there are more, it reads the newer half again.
        """
        idx, cache = idx[:, -self.block_size :], Cache()
        for _ in range(max_new_tokens):
            if idx.size(1) > self.block_size:
                idx, cache = idx[:, -(self.block_size // 2 + 1) :], Cache()
            # forward itself, not the compiled call, which would compile again for each length
            logits = self.forward(idx[:, cache.length :], cache=cache)[:, -1].float()  # (B, V)
            if top_k is not None and top_k < logits.size(-1):
                logits[logits < logits.topk(top_k).values[:, -1:]] = -math.inf
            if temperature == 0:
                new = logits.argmax(dim=-1, keepdim=True)
            else:
                logits = logits / min(max(temperature, 1e-9), 1e9)  # or float32 would have no number for some
                new = torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)
            idx = torch.cat((idx, new), dim=1)
            yield new


class Transformer(LanguageModel):
    """The flash model, rows 4 to 15 of the log: a pre-norm decoder whose output projection is its embedding."""

    def __init__(self, c):
        super().__init__()
        self.block_size, self.vocab_size = c.block_size, c.vocab_size
        self.embedding = nn.Embedding(math.ceil(c.vocab_size / 8) * 8, c.n_embd)  # tensor cores want multiples of 8
        self.positions = nn.Parameter(torch.empty(c.block_size, c.n_embd)) if c.position == 'learned' else None
        self.drop, self.embedding_norm = nn.Dropout(c.dropout), c.embedding_norm
        self.blocks = nn.ModuleList(Block(c, i == 0) for i in range(c.n_layer))
        self.norm = nn.LayerNorm(c.n_embd)
        if c.position == 'rotary':
            self.register_buffer('rotary', rotary_table(c.block_size, c.n_embd // c.n_head), persistent=False)
        self.initialise(c.n_layer)

    def initialise(self, n_layer):
        """GPT-2's: weights from N(0, 0.02²), biases 0. Each block adds two projections to the stream; their scale,
        divided by sqrt(2 n_layer), keeps the stream's variance independent of depth."""
        for name, p in self.named_parameters():
            if name.endswith('gate.weight'):
                nn.init.zeros_(p)
            elif p.dim() > 1:
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * n_layer) if name.endswith('proj.weight') else 0.02)
            elif name.endswith('bias'):
                nn.init.zeros_(p)

    def forward(self, idx, targets=None, cache=None):
        start = cache.length if cache is not None else 0
        stop = start + idx.size(1)
        x = self.embedding(idx)  # (B, T, C)
        if self.positions is not None:
            x = x + self.positions[start:stop]
        if self.embedding_norm:  # blocks then add to channels of size 1, not 0.02
            x = F.rms_norm(x, (x.size(-1),))
        rotary = self.rotary[:, start:stop] if self.positions is None else None
        x, first_values = self.drop(x), None
        for block in self.blocks:
            x, first_values = block(x, rotary, cache, first_values)
        if cache is not None:
            cache.length = stop
        logits = F.linear(self.norm(x), self.embedding.weight)  # (B, T, V padded to a multiple of 8)
        if targets is None:
            return logits[..., : self.vocab_size]  # the padding stands for no text and is never sampled
        return self.loss(logits, targets)


class TorchTransformer(LanguageModel):
    """The PyTorch model, rows 1 to 3: the post-norm nn.TransformerEncoder of PyTorch's language-modelling tutorial,
    https://pytorch.org/tutorials/beginner/transformer_tutorial.html. Its positions are sinusoids (Vaswani et al.,
    2017), its activation is ReLU, and nn.MultiheadAttention picks the kernel."""

    def __init__(self, c):
        super().__init__()
        self.block_size = c.block_size
        self.embedding = nn.Embedding(c.vocab_size, c.n_embd)
        self.drop = nn.Dropout(c.dropout)
        layer = nn.TransformerEncoderLayer(c.n_embd, c.n_head, c.d_ff, c.dropout, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, c.n_layer, enable_nested_tensor=False)
        self.head = nn.Linear(c.n_embd, c.vocab_size)
        cos, sin = rotary_table(c.block_size, c.n_embd)  # sinusoids have the same angles, (T, 1, 1, C/2)
        self.register_buffer('sinusoids', torch.stack((sin, cos), dim=-1).flatten(1), persistent=False)  # (T, C)
        self.register_buffer('mask', nn.Transformer.generate_square_subsequent_mask(c.block_size), persistent=False)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        nn.init.uniform_(self.head.weight, -0.1, 0.1)
        nn.init.zeros_(self.head.bias)

    def forward(self, idx, targets=None, cache=None):  # the cache stays empty: it reads the whole text again
        T = idx.size(1)
        x = self.embedding(idx) * math.sqrt(self.embedding.embedding_dim) + self.sinusoids[:T]  # (B, T, C)
        x = self.encoder(self.drop(x), mask=self.mask[:T, :T], is_causal=True)
        logits = self.head(x)  # (B, T, V)
        return logits if targets is None else self.loss(logits, targets)


MODELS = {'flash': Transformer, 'torch': TorchTransformer}


def build_model(c, vocab_size):
    """The model that the knobs c describe, its initial weights a pure function of them and of the seed."""
    torch.manual_seed(c.seed)
    shape = {name: getattr(c, name) for name in Config.__dataclass_fields__ if name != 'vocab_size'}
    return MODELS[c.model](Config(vocab_size, **shape))
