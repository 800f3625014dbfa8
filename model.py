"""The two models of the log: a flash-attention transformer, and PyTorch's tutorial model where the log began.

Reads from leaf to root: attention kernels, rotary positions, key-value cache, attention, feed-forward, block,
model. Needs torch alone; flash-attn is used where it is installed and can run.
Shapes: B batch, T time (tokens), C channels (n_embd), H heads, D head width (C / H), V vocabulary.
"""

import importlib
import math
import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

# ---- attention kernels: q (B, T, H, D) and k, v (B, S, H, D) to (B, T, H, D), causal -------------------------------
# T = S when a whole text is read; T = 1 when one token is added to the S - 1 of the cache, and sees them all.

CHUNK = 256  # queries of chunked_attention: fewer waste less on the future, more make larger matrix products


def naive_attention(q, k, v, dropout=0.0):
    """softmax(q k' / sqrt(D)) v in plain PyTorch: the reference that the fast kernels are tested against."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, T or S, D)
    T, S = q.size(2), k.size(2)
    future = torch.full((T, S), -math.inf, dtype=q.dtype, device=q.device).triu(1 + S - T)
    weights = torch.softmax(q / math.sqrt(q.size(-1)) @ k.mT + future, dim=-1)  # (B, H, T, S)
    return (F.dropout(weights, dropout) @ v).transpose(1, 2)


def chunked_attention(q, k, v, dropout=0.0):
    """The naive formula for CHUNK queries at a time, on the keys that these may see: nearly half of the work is never
    done. On a CPU in bfloat16 a layer takes 24 ms where PyTorch's kernel takes 40 (results/bench_cpu.json)."""
    past, parts = k.size(1) - q.size(1), []
    for start in range(0, q.size(1), CHUNK):
        seen = past + start + CHUNK
        parts.append(naive_attention(q[:, start : start + CHUNK], k[:, :seen], v[:, :seen], dropout))
    return torch.cat(parts, dim=1)


def sdpa_attention(q, k, v, dropout=0.0):
    """PyTorch's fused kernels: cuDNN, FlashAttention 2 or memory-efficient attention, as the machine allows."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=q.size(2) > 1)
    return y.transpose(1, 2)


def find_flash():
    """The flash-attn that is installed, as (version, its flash_attn_func); (None, None) if there is none."""
    for version, module in ((2, 'flash_attn'), (3, 'flash_attn_interface'), (4, 'flash_attn.cute')):
        try:
            return version, importlib.import_module(module).flash_attn_func
        except (ImportError, AttributeError):  # a binary built for another torch raises ImportError as well
            continue
    return None, None


FLASH_VERSION, flash_attn_func = find_flash()


def flash_attention(q, k, v, dropout=0.0):
    """The flash-attn package (FlashAttention-2: Dao, 2023), which takes (B, T, H, D) as it is."""
    y = flash_attn_func(q, k, v, causal=True, **({'dropout_p': dropout} if dropout else {}))
    return y[0] if isinstance(y, tuple) else y  # FlashAttention 3 and 4 return the log-sum-exp too


ATTENTION = {'naive': naive_attention, 'chunked': chunked_attention, 'sdpa': sdpa_attention, 'flash': flash_attention}


def choose_attention(attention, device, dtype, dropout=0.0):
    """Resolve 'auto' to the fastest kernel that runs here; returns (name, sentence on why).

    Exits with the reason if 'flash' is asked for where it cannot run.
    """
    device = torch.device(device)
    obstacle = None
    if FLASH_VERSION is None:
        obstacle = 'flash-attn is not installed'
    elif device.type != 'cuda' or torch.cuda.get_device_capability(device) < (8, 0):
        obstacle = 'flash-attn needs a CUDA device of capability 8.0 or more'
    elif dtype not in (torch.bfloat16, torch.float16):
        obstacle = 'flash-attn needs bfloat16 or float16'
    elif dropout and FLASH_VERSION > 2:
        obstacle = f'FlashAttention {FLASH_VERSION} has no attention dropout'
    if attention == 'auto' and device.type == 'cpu' and (dropout or dtype == torch.bfloat16):
        return 'chunked', "PyTorch's CPU kernel is slow in bfloat16 and has no dropout"
    if attention == 'auto':
        return ('sdpa', obstacle) if obstacle else ('flash', f'FlashAttention {FLASH_VERSION}')
    if attention == 'flash' and obstacle:
        sys.exit(f'--attention=flash cannot run here: {obstacle}. --attention=auto takes what can.')
    return attention, 'as asked'


# ---- the parts -----------------------------------------------------------------------------------------------------


@dataclass
class Config:
    """The shape of a model. train.py's knobs of the same names say what each is, and hold the only defaults."""

    vocab_size: int
    block_size: int
    n_layer: int
    n_head: int
    n_embd: int
    d_ff: int
    dropout: float
    activation: str  # 'gelu' or 'swiglu'
    position: str  # 'rotary' or 'learned'
    attention: str  # a key of ATTENTION
    embedding_norm: bool
    head_gate: bool

    def __post_init__(self):
        if self.n_embd % self.n_head:
            sys.exit(f'n_embd={self.n_embd} is not divisible by n_head={self.n_head}: change one of them.')
        if self.position == 'rotary' and self.n_embd // self.n_head % 2:
            width = self.n_embd // self.n_head
            sys.exit(f'rotary positions need an even head width; n_embd / n_head is {width}: change n_head.')


def rotary_table(block_size, width, base=10000.0):
    """Cosines and sines, each (T, 1, 1, D/2): position t turns pair i by t / base^(2i/D) (Su et al., 2021)."""
    # float64 while building, float32 in use: in bfloat16, neighbouring positions would get the same angle
    frequency = base ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angle = torch.outer(torch.arange(block_size, dtype=torch.float64), frequency)
    return angle.cos().float()[:, None, None], angle.sin().float()[:, None, None]


def rotate(x, cos, sin):
    """Turn each pair (x[i], x[i + D/2]) of x (B, T, 2, H, D) by its position's angle: q·k then depends on distances."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).type_as(x)


class Cache:
    """Keys and values of the text so far, (B, block_size, H, D) each, a pair a layer: generating token t then costs
    one token's work instead of t."""

    def __init__(self, block_size):
        self.block_size, self.length, self.layers = block_size, 0, {}

    def extend(self, layer, k, v):
        """Append k and v (B, T, H, D) to a layer's; returns all of that layer's, (B, length + T, H, D)."""
        if layer not in self.layers:
            B, _, H, D = k.shape
            self.layers[layer] = k.new_empty(B, self.block_size, H, D), v.new_empty(B, self.block_size, H, D)
        end = self.length + k.size(1)
        for past, new in zip(self.layers[layer], (k, v), strict=True):
            past[:, self.length : end] = new
        return (past[:, :end] for past in self.layers[layer])


class Attention(nn.Module):
    """Causal multi-head self-attention with one fused projection for queries, keys and values."""

    def __init__(self, c):
        super().__init__()
        self.n_head, self.dropout, self.attend = c.n_head, c.dropout, ATTENTION[c.attention]
        self.qkv = nn.Linear(c.n_embd, 3 * c.n_embd)
        self.proj = nn.Linear(c.n_embd, c.n_embd)
        self.gate = nn.Linear(c.n_embd, c.n_head) if c.head_gate else None

    def forward(self, x, rotary=None, cache=None):
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head)  # (B, T, 3, H, D)
        qk, v = qkv.split((2, 1), dim=2)  # in backward one copy, where slices would add up tensors of zeros
        q, k = (qk if rotary is None else rotate(qk, *rotary)).unbind(2)  # (B, T, H, D) each
        v = v.squeeze(2)
        if cache is not None:
            k, v = cache.extend(self, k, v)
        # the kernels are functions and do not know model.eval(): forgetting this keeps dropout on in validation
        # (README.md asks whether that is how the log's dropout was broken)
        y = self.attend(q, k, v, self.dropout if self.training else 0.0)
        if self.gate is not None:  # each token says how much of each head it wants (Qiu et al., 2025); 1 at first
            y = y * (2 * self.gate(x).sigmoid())[..., None]
        return self.proj(y.reshape(B, T, C))


class GELU(nn.Module):
    """C -> d_ff -> C through GELU (Hendrycks and Gimpel, 2016)."""

    def __init__(self, c):
        super().__init__()
        self.fc = nn.Linear(c.n_embd, c.d_ff)
        self.proj = nn.Linear(c.d_ff, c.n_embd)

    def forward(self, x):
        return self.proj(F.gelu(self.fc(x)))


class SwiGLU(nn.Module):
    """C -> d_ff -> C with a learned gate on each hidden unit (Shazeer, 2020); gate and value share one projection."""

    def __init__(self, c):
        super().__init__()
        self.fc = nn.Linear(c.n_embd, 2 * c.d_ff)
        self.proj = nn.Linear(c.d_ff, c.n_embd)

    def forward(self, x):
        gate, value = self.fc(x).chunk(2, dim=-1)
        return self.proj(F.silu(gate) * value)


ACTIVATION = {'gelu': GELU, 'swiglu': SwiGLU}


class Block(nn.Module):
    """Attention, then feed-forward, each on a normalised copy of the stream and added back to it (pre-norm)."""

    def __init__(self, c):
        super().__init__()
        self.attn_norm, self.attn = nn.LayerNorm(c.n_embd), Attention(c)
        self.mlp_norm, self.mlp = nn.LayerNorm(c.n_embd), ACTIVATION[c.activation](c)
        self.drop = nn.Dropout(c.dropout)

    def forward(self, x, rotary=None, cache=None):
        x = x + self.drop(self.attn(self.attn_norm(x), rotary, cache))
        return x + self.drop(self.mlp(self.mlp_norm(x)))


# ---- the models ----------------------------------------------------------------------------------------------------


class LanguageModel(nn.Module):
    """What both models share. Called with tokens (B, T), a model returns logits (B, T, V); with targets (B, T) as
    well, the mean loss in nats per token, -1 marking targets that do not count."""

    caches = False  # whether forward takes a Cache

    def num_params(self):
        """Parameters as the log counts them: without the learned positions (nanoGPT leaves them out too)."""
        return sum(p.numel() for name, p in self.named_parameters() if name != 'positions')

    def loss(self, logits, targets):
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, generator=None):
        """Continue idx (B, T): yields max_new_tokens next tokens, (B, 1) each, as they come.

        temperature: divides the logits; 0 takes the likeliest token. top_k: only among the k likeliest.
        generator: torch's, for samples that repeat. Call model.eval() first. The model sees the last block_size
        tokens; when the cache is full, the newer half of them is read afresh.
        """
        idx = new = idx[:, -self.block_size :]
        cache = Cache(self.block_size) if self.caches else None
        for _ in range(max_new_tokens):
            if cache is None:
                new = idx[:, -self.block_size :]
            elif cache.length + new.size(1) > self.block_size:
                new, cache = idx[:, -(self.block_size // 2 + 1) :], Cache(self.block_size)
            logits = (self(new, cache=cache) if self.caches else self(new))[:, -1].float()  # (B, V)
            if top_k is not None and top_k < logits.size(-1):
                logits[logits < logits.topk(top_k).values[:, -1:]] = -math.inf
            if temperature == 0:
                new = logits.argmax(dim=-1, keepdim=True)
            else:
                new = torch.multinomial((logits / temperature).softmax(dim=-1), 1, generator=generator)
            idx = torch.cat((idx, new), dim=1)
            yield new


class Transformer(LanguageModel):
    """The flash model, rows 4 to 15 of the log: a pre-norm decoder whose output projection is its embedding."""

    caches = True

    def __init__(self, c):
        super().__init__()
        self.block_size, self.vocab_size = c.block_size, c.vocab_size
        self.embedding = nn.Embedding(math.ceil(c.vocab_size / 8) * 8, c.n_embd)  # tensor cores want multiples of 8
        self.positions = nn.Parameter(torch.empty(c.block_size, c.n_embd)) if c.position == 'learned' else None
        self.drop, self.embedding_norm = nn.Dropout(c.dropout), c.embedding_norm
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.norm = nn.LayerNorm(c.n_embd)
        if c.position == 'rotary':
            cos, sin = rotary_table(c.block_size, c.n_embd // c.n_head)
            self.register_buffer('cos', cos, persistent=False)
            self.register_buffer('sin', sin, persistent=False)
        self.initialise(c.n_layer)

    def initialise(self, n_layer):
        """GPT-2's: weights from N(0, 0.02²), biases 0. Each block adds two projections to the stream; dividing their
        scale by sqrt(2 n_layer) keeps the stream's variance independent of depth."""
        for name, p in self.named_parameters():
            if name.endswith('gate.weight'):
                nn.init.zeros_(p)
            elif p.dim() > 1:
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * n_layer) if name.endswith('proj.weight') else 0.02)
            elif name.endswith('bias'):
                nn.init.zeros_(p)

    def forward(self, idx, targets=None, cache=None):
        start = cache.length if cache is not None else 0
        end = start + idx.size(1)
        x = self.embedding(idx)  # (B, T, C)
        if self.positions is not None:
            x = x + self.positions[start:end]
        if self.embedding_norm:  # blocks add to a stream of size 1 a channel, not 0.02
            x = F.rms_norm(x, (x.size(-1),))
        rotary = (self.cos[start:end], self.sin[start:end]) if self.positions is None else None
        x = self.drop(x)
        for block in self.blocks:
            x = block(x, rotary, cache)
        if cache is not None:
            cache.length = end
        logits = F.linear(self.norm(x), self.embedding.weight)  # (B, T, V padded to a multiple of 8)
        if targets is None:
            return logits[..., : self.vocab_size]  # the padding has no text: it is never sampled
        return self.loss(logits, targets)


class TorchTransformer(LanguageModel):
    """The PyTorch model, rows 1 to 3: the language-modelling tutorial's post-norm nn.TransformerEncoder.

    https://pytorch.org/tutorials/beginner/transformer_tutorial.html; its knobs position, activation and attention
    are fixed: sinusoids (Vaswani et al., 2017), ReLU, and whatever nn.MultiheadAttention picks.
    """

    def __init__(self, c):
        super().__init__()
        self.block_size = c.block_size
        self.embedding = nn.Embedding(c.vocab_size, c.n_embd)
        self.drop = nn.Dropout(c.dropout)
        layer = nn.TransformerEncoderLayer(c.n_embd, c.n_head, c.d_ff, c.dropout, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, c.n_layer, enable_nested_tensor=False)
        self.head = nn.Linear(c.n_embd, c.vocab_size)
        cos, sin = rotary_table(c.block_size, c.n_embd)  # the same angles as the sinusoids', (T, 1, 1, C/2)
        sinusoids = torch.stack((sin, cos), dim=-1).view(c.block_size, c.n_embd)
        self.register_buffer('sinusoids', sinusoids, persistent=False)
        mask = nn.Transformer.generate_square_subsequent_mask(c.block_size)
        self.register_buffer('mask', mask, persistent=False)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        nn.init.uniform_(self.head.weight, -0.1, 0.1)
        nn.init.zeros_(self.head.bias)

    def forward(self, idx, targets=None):
        T = idx.size(1)
        x = self.embedding(idx) * math.sqrt(self.embedding.embedding_dim) + self.sinusoids[:T]  # (B, T, C)
        x = self.encoder(self.drop(x), mask=self.mask[:T, :T], is_causal=True)
        logits = self.head(x)  # (B, T, V)
        return logits if targets is None else self.loss(logits, targets)


MODELS = {'flash': Transformer, 'torch': TorchTransformer}
