"""What `k2batch bench kernels` measures: kernels at the shapes of four models, beside what one would otherwise call."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from kernels import cpu, ops, reference

_TOKENS = {"cpu": (1, 32, 512), "cuda": (1, 16, 64, 512, 4096, 16384)}
_KEYS = {"cpu": (256, 2048), "cuda": (1024, 8192, 32768)}
_SEQUENCES = {"cpu": 8, "cuda": 64}
_CPU_EXPERTS = 16
"""All 384 of K2 are 17 GB; a CPU times this many. One a token is Qwen3's share; Moonlight's is 1.5, K2's 0.33."""
_PAGE = 64


@dataclass(frozen=True, slots=True)
class Model:
    """The shapes of one model's layers."""

    name: str
    hidden_size: int
    linears: dict[str, tuple[int, int]]
    """Name to [N, K]."""
    intermediate_size: int
    """Of an expert, or of the dense layer."""
    heads: tuple[int, int, int] | None
    """Query heads, key-value heads, head_dim; None where attention is latent."""
    latent_heads: int = 0
    """Heads over a latent of 512 + 64."""
    experts: tuple[int, int] | None = None
    """Experts and experts per token."""
    vocab_size: int = 0


MODELS = (
    Model("SmolLM2-135M", 576, {"qkv": (960, 576), "gate_up": (3072, 576), "down": (576, 1536)}, 1536, (9, 3, 64),
          vocab_size=49152),
    Model("Moonlight-16B-A3B", 2048, {"q": (3072, 2048), "shared gate_up": (5632, 2048)}, 1408, None, 16, (64, 6)),
    Model("Qwen3-30B-A3B", 2048, {"qkv": (5120, 2048), "o": (2048, 4096)}, 768, (32, 4, 128), 0, (128, 8)),
    Model("Kimi-K2", 7168, {"q_b": (12288, 1536), "o": (7168, 8192)}, 2048, None, 64, (384, 8)),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One kernel at one shape."""

    kernel: str
    model: str
    shape: str
    size: int
    """Tokens, or keys of a decoding sequence: the axis of the plot."""
    ours: Callable[[], object]
    peer: Callable[[], object]
    peer_name: str
    operations: float = 0
    rate: str = "int8"
    """Of the operations: int8, bfloat16 or float32."""
    bytes: float = 0
    """Read once and written once, as little as any version could."""


def cases(model: Model, device: str) -> Iterator[Case]:
    """Yield what is measured of one model on "cpu" or "cuda", each with tensors of its own."""
    for tokens in _TOKENS[device]:
        yield from _row_cases(model, tokens, device)
        yield from _linear_cases(model, tokens, device)
        if model.experts:
            yield _expert_case(model, model.experts, tokens, device)
        if model.heads and tokens >= 64:
            yield _prefill_case(model, model.heads, tokens, device)
        if model.vocab_size:
            yield _label_case(model, tokens, device)
        if device == "cpu" and model.heads and not model.experts and tokens >= 64:
            yield _layer_case(model, model.heads, tokens)
    for keys in _KEYS[device]:
        yield _decode_case(model, keys, device) if model.heads else _latent_case(model, keys, device)


def _row_cases(model: Model, tokens: int, device: str) -> Iterator[Case]:
    """Yield the fused row kernels; a peer runs the same steps one by one."""
    d, f, dtype = model.hidden_size, model.intermediate_size, _activation_dtype(device)
    x, residual, weight = _random(device, tokens, d), _random(device, tokens, d), _random(device, d)
    gate_up = _random(device, tokens, 2 * f)
    wide = dtype.itemsize
    yield Case(
        kernel="rms_norm_quantize", model=model.name, shape=f"{tokens}x{d}", size=tokens,
        ours=lambda: ops.rms_norm_quantize(x, residual, weight, 1e-6),
        peer=lambda: reference.quantize_rows(functional.rms_norm(x + residual, (d,), weight, 1e-6)),
        peer_name="functional.rms_norm, then amax, divide, round", bytes=tokens * d * (3 * wide + 1),
    )  # fmt: skip
    yield Case(
        kernel="swiglu_quantize", model=model.name, shape=f"{tokens}x{2 * f}", size=tokens,
        ours=lambda: ops.swiglu_quantize(gate_up),
        peer=lambda: reference.quantize_rows(functional.silu(gate_up[:, :f]) * gate_up[:, f:]),
        peer_name="silu, multiply, then amax, divide, round", bytes=tokens * f * (2 * wide + 1),
    )  # fmt: skip


def _linear_cases(model: Model, tokens: int, device: str) -> Iterator[Case]:
    """Yield the INT8 product with its scales; the peer is the same layer in bfloat16."""
    dtype = _activation_dtype(device)
    for name, (n, k) in model.linears.items():
        x, x_scale = random_int8(device, tokens, k), torch.rand(tokens, device=device)
        weight, scale = random_int8(device, n, k), torch.rand(n, device=device)
        float_x, float_weight = x.bfloat16(), weight.bfloat16()
        yield Case(
            kernel="int8_linear", model=f"{model.name} {name}", shape=f"{tokens}x{k}x{n}", size=tokens,
            ours=partial(ops.int8_linear, x, x_scale, weight, scale, None, dtype),
            peer=partial(functional.linear, float_x, float_weight), peer_name="functional.linear in bfloat16",
            operations=2 * tokens * n * k, bytes=n * k + tokens * (k + n * dtype.itemsize),
        )  # fmt: skip


def _expert_case(model: Model, experts: tuple[int, int], tokens: int, device: str) -> Case:
    """Return one INT8 expert layer after its router; the peer is a loop over experts in bfloat16."""
    count, chosen = experts
    if device == "cpu" and count > _CPU_EXPERTS:
        count, chosen = _CPU_EXPERTS, max(1, chosen * _CPU_EXPERTS // count)
    d, f = model.hidden_size, model.intermediate_size
    x = _random(device, tokens, d)
    gate_up, gate_up_scale = random_int8(device, count, 2 * f, d), torch.rand(count, 2 * f, device=device)
    down, down_scale = random_int8(device, count, d, f), torch.rand(count, d, device=device)
    drawn = torch.rand(tokens, count, device=device).argsort(dim=1)[:, :chosen].sort(dim=1).values
    weights = torch.rand(tokens, chosen, device=device)
    visited = len(drawn.unique())
    runner = _experts_on_card if device == "cuda" else _experts_on_cpu
    float_gate_up, float_down = gate_up.bfloat16(), down.bfloat16()
    return Case(
        kernel="experts", model=model.name, shape=f"{tokens}x{d}, {chosen} of {count} x {f}", size=tokens,
        ours=runner(x, drawn, weights, (gate_up, gate_up_scale), (down, down_scale)),
        peer=lambda: _experts_in_a_loop(x.bfloat16(), drawn, weights, float_gate_up, float_down),
        peer_name="a loop over experts in bfloat16",
        operations=tokens * chosen * 6 * d * f, bytes=visited * 3 * d * f + tokens * d * 2 * x.dtype.itemsize,
    )  # fmt: skip


def _prefill_case(model: Model, heads: tuple[int, int, int], tokens: int, device: str) -> Case:
    """Return causal attention over sequences of 128 tokens, packed; the peer is SDPA over the same, as a batch."""
    h, g, head_dim = heads
    length = min(tokens, 128)
    count = tokens // length
    q, k, v = (_random(device, tokens, n, head_dim) for n in (h, g, g))
    batch_q, batch_k, batch_v = (t.view(count, length, -1, head_dim).transpose(1, 2) for t in (q, k, v))
    scale = head_dim**-0.5
    if device == "cuda":
        from kernels.attention import packed_prefill

        starts = torch.arange(0, tokens + 1, length, dtype=torch.int32, device=device)
        ours: Callable[[], object] = lambda: packed_prefill(q, k, v, starts, length, scale)  # noqa: E731
    else:
        ours = _attended(q.flatten(1), h, k, v, torch.arange(count).repeat_interleave(length), length, scale)
    return Case(
        kernel="prefill attention", model=model.name, shape=f"{count} of {length}, {h}/{g} heads of {head_dim}",
        size=tokens, ours=ours, peer_name="SDPA",
        peer=lambda: functional.scaled_dot_product_attention(
            batch_q, batch_k, batch_v, is_causal=True, enable_gqa=True
        ),
        operations=count * h * length * (length + 1) * 2 * head_dim, rate=_float_rate(device),
        bytes=tokens * head_dim * (2 * h + 2 * g) * q.dtype.itemsize,
    )  # fmt: skip


def _decode_case(model: Model, keys: int, device: str) -> Case:
    """Return one token of each sequence attending to `keys` cached ones; the peer is SDPA."""
    assert model.heads is not None
    (h, g, head_dim), count = model.heads, _SEQUENCES[device]
    q = _random(device, count, h, head_dim)
    k, v = (_random(device, count, g, keys, head_dim) for _ in "kv")
    scale = head_dim**-0.5
    if device == "cuda":
        from kernels.paged_attention import paged_decode

        table = torch.randperm(count * keys // _PAGE, device=device).int().view(count, -1)
        pages = (count, g, -1, _PAGE, head_dim)
        paged_k, paged_v = (t.view(pages).transpose(1, 2).reshape(-1, g, _PAGE, head_dim) for t in (k, v))
        lens = torch.full((count,), keys, dtype=torch.int32, device=device)
        ours: Callable[[], object] = lambda: paged_decode(q, paged_k, paged_v, table, lens, scale)  # noqa: E731
    else:
        ours = _attended(q.flatten(1), h, _rows(k), _rows(v), torch.arange(count), keys, scale)
    return Case(
        kernel="decode attention", model=model.name, shape=f"{count} x {keys} keys, {h}/{g} heads of {head_dim}",
        size=keys, ours=ours, peer_name="SDPA",
        peer=lambda: functional.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True),
        operations=count * h * keys * 4 * head_dim, rate=_float_rate(device), bytes=k.nbytes + v.nbytes,
    )  # fmt: skip


def _latent_case(model: Model, keys: int, device: str) -> Case:
    """Return the same over latents of 512 + 64, absorbed; the peer is SDPA, which reads the latent for each head."""
    count, h = _SEQUENCES[device], model.latent_heads
    q, latent = _random(device, count, h, 576), _random(device, count, 1, keys, 576)
    scale = 192**-0.5
    if device == "cuda":
        from kernels.mla import mla_decode

        table = torch.randperm(count * keys // _PAGE, device=device).int().view(count, -1)
        paged, lens = latent.view(-1, _PAGE, 576), torch.full((count,), keys, dtype=torch.int32, device=device)
        ours: Callable[[], object] = lambda: mla_decode(q, paged, table, lens, scale)  # noqa: E731
    else:
        rows = _rows(latent)
        ours = _attended(q.flatten(1), h, rows, rows[..., :512], torch.arange(count), keys, scale)
    return Case(
        kernel="latent decode attention", model=model.name, shape=f"{count} x {keys} keys, {h} heads", size=keys,
        ours=ours, peer_name="SDPA",
        peer=lambda: functional.scaled_dot_product_attention(
            q[:, :, None], latent, latent[..., :512], scale=scale, enable_gqa=True
        ),
        operations=count * h * keys * 2 * (576 + 512), rate=_float_rate(device), bytes=latent.nbytes,
    )  # fmt: skip


def _rows(x: Tensor) -> Tensor:
    """Return x [B, G, S, D] as rows of tokens [B * S, G, D]."""
    return x.transpose(1, 2).flatten(0, 1)


def _attended(q: Tensor, h: int, k: Tensor, v: Tensor, owners: Tensor, keys: int, scale: float) -> Callable[[], object]:
    """Return attention [B, H, L, Dv] of the last queries of each sequence, over `keys` rows of k and v in pages."""
    from kernels import cpu_attention
    from kernels.places import Places

    sizes, count, (g, d) = (k.shape[2], v.shape[2]), len(k) // keys, k.shape[1:]
    table = torch.arange(-(-keys // _PAGE) * count).view(count, -1)
    slots, ends = torch.arange(keys).repeat(count), torch.full((count,), keys)
    pages = torch.zeros(table.numel(), g, _PAGE, sum(cpu_attention.page_sizes(*sizes)), dtype=k.dtype)
    every = Places(table, torch.arange(count).repeat_interleave(keys), slots, slots, ends, _PAGE)
    rows = torch.cat([k.flatten(1), v.flatten(1)], dim=1).float()
    cpu_attention.store(rows, (0, g * d), sizes, every, pages)
    last = slots.view(count, keys)[:, -(len(q) // count) :].flatten()
    places, out = Places(table, owners, last, last, ends, _PAGE), torch.empty(len(q), h * sizes[1])
    trees = torch.zeros(count, dtype=torch.int64), torch.zeros(1, 0, 0, dtype=torch.bool)

    def attended() -> Tensor:
        cpu_attention.attend(q, h, pages, sizes, places, trees, scale, out)
        return out.view(count, -1, h, sizes[1]).transpose(1, 2)

    return attended


def _label_case(model: Model, tokens: int, device: str) -> Case:
    """Return the log-probabilities of 8 tokens a row; the peer makes all logits."""
    d, v = model.hidden_size, model.vocab_size
    hidden, head = _random(device, tokens, d), _random(device, v, d).bfloat16()
    token_ids = torch.randint(v, (tokens, 8), device=device)
    return Case(
        kernel="token_logprobs", model=model.name, shape=f"{tokens}x{d}x{v}", size=tokens,
        ours=lambda: ops.token_logprobs(hidden, head, token_ids),
        peer=lambda: functional.linear(hidden.bfloat16(), head).float().log_softmax(-1).gather(1, token_ids),
        peer_name="all logits in bfloat16, log_softmax", operations=2 * tokens * d * v, rate=_float_rate(device),
        bytes=head.nbytes,
    )  # fmt: skip


def _layer_case(model: Model, heads: tuple[int, int, int], tokens: int) -> Case:
    """Return a whole dense decoder layer over packed sequences of 128 tokens; the peer is its bare INT8 products."""
    from k2model.config import AttentionConfig
    from k2model.decoder.attention import Attention
    from k2model.decoder.feed_forward import FeedForward
    from k2model.decoder.linear import Int8Linear
    from k2model.decoder.model import Layer
    from k2model.decoder.pages import PagePool
    from k2model.decoder.step import Span, Step
    from kernels.cpu_attention import page_sizes

    (h, g, head_dim), d, f = heads, model.hidden_size, model.intermediate_size
    shapes = ((h + 2 * g) * head_dim, d), (d, h * head_dim), (2 * f, d), (d, f)
    qkv, o, gate_up, down = (Int8Linear(random_int8("cpu", n, k), torch.rand(n) * 1e-4) for n, k in shapes)
    config = AttentionConfig(
        num_attention_heads=h, num_key_value_heads=g, head_dim=head_dim,
        qkv_bias=False, o_bias=False, qk_norm=False, sinks=False,
    )  # fmt: skip
    attention = Attention(config, 0, qkv, o, None, None, None, 1e-5)
    layer = Layer(torch.ones(d), attention, torch.ones(d), FeedForward(gate_up, down), 1e-5)
    length = min(tokens, 128)
    pool = PagePool(1, g, sum(page_sizes(head_dim, head_dim)), torch.float32, torch.device("cpu"))
    x, step = _random("cpu", tokens, d), Step(pool, [Span((0,) * length)] * (tokens // length))
    rope = _random("cpu", tokens, head_dim // 2), _random("cpu", tokens, head_dim // 2)
    products = [(random_int8("cpu", tokens, k), linear.weight) for linear, (_, k) in
                zip((qkv, o, gate_up, down), shapes, strict=True)]  # fmt: skip
    return Case(
        kernel="decoder layer", model=model.name, shape=f"{tokens} tokens", size=tokens,
        ours=lambda: layer.forward(x, None, rope, step, None, torch.float32),
        peer=lambda: [cpu.int8_matmul(*pair) for pair in products], peer_name="its INT8 products alone",
        operations=sum(2 * tokens * n * k for n, k in shapes), bytes=sum(n * k for n, k in shapes),
    )  # fmt: skip


def _experts_on_cpu(
    x: Tensor, expert_ids: Tensor, expert_weights: Tensor, gate_up: tuple[Tensor, Tensor], down: tuple[Tensor, Tensor]
) -> Callable[[], Tensor]:
    """Return a call of the decoder's experts, their router's choices made already."""
    from k2model.decoder.feed_forward import FeedForward, run_experts
    from k2model.decoder.linear import Int8Linear

    pairs = zip(*gate_up, *down, strict=True)
    experts = [FeedForward(Int8Linear(a, b), Int8Linear(c, e)) for a, b, c, e in pairs]
    return partial(run_experts, experts, x, expert_ids, expert_weights)


def _experts_on_card(
    x: Tensor, expert_ids: Tensor, expert_weights: Tensor, gate_up: tuple[Tensor, Tensor], down: tuple[Tensor, Tensor]
) -> Callable[[], Tensor]:
    from kernels.experts import int8_experts

    counts = torch.full((len(x),), expert_ids.shape[1], dtype=torch.int32, device=x.device)
    ids = expert_ids.int()
    return lambda: int8_experts(
        *ops.quantize_rows(x), ids, expert_weights, counts, *gate_up, *down, out_dtype=x.dtype
    )  # fmt: skip


def _experts_in_a_loop(x: Tensor, expert_ids: Tensor, expert_weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Return what most people write."""
    out = torch.zeros_like(x)
    for expert in range(len(gate_up)):
        rows, slots = torch.where(expert_ids == expert)
        gate, up = functional.linear(x[rows], gate_up[expert]).chunk(2, dim=-1)
        y = functional.linear(functional.silu(gate) * up, down[expert])
        out.index_add_(0, rows, y * expert_weights[rows, slots, None].to(y.dtype))
    return out


def _activation_dtype(device: str) -> torch.dtype:
    return torch.bfloat16 if device == "cuda" else torch.float32


def _float_rate(device: str) -> str:
    return "bfloat16" if device == "cuda" else "float32"


def _random(device: str, *shape: int) -> Tensor:
    return torch.randn(shape, device=device).to(_activation_dtype(device))


def random_int8(device: str, *shape: int) -> Tensor:
    """Return random int8; never zeros, on which a card runs faster than on data."""
    return torch.randint(-127, 128, shape, dtype=torch.int8, device=device)
