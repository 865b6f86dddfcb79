"""Rotation and the write into pages against the plain twin, bit for bit, and the machine code."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels import aot, reference, rope
from kernels.cpu import ShapeError
from tests.kernel_cases import DEVICE, poisoned_outputs, random

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SLOTS = torch.tensor([3, -1, 63, 17, 16, -7, 0])
"""Of seven tokens, in 4 pages of 16: the first, the last, across a border, and two that are padding."""


def step(
    t: int, h: int, g: int, d: int, dv: int, dtype: torch.dtype, cache_dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Return the arguments of one step whose q, k and v are columns of one projection, as a decoder has them."""
    qkv = random(t, h * d + g * d + g * dv, dtype=dtype)
    q, k, v = qkv.split([h * d, g * d, g * dv], dim=1)
    angles = random(t, d // 2, seed=1, scale=100.0)
    return {
        "q": q.unflatten(1, (h, d)),
        "k": k.unflatten(1, (g, d)),
        "v": v.unflatten(1, (g, dv)),
        "cos": angles.cos(),
        "sin": angles.sin(),
        "key_cache": random(4, g, 16, d, seed=2, dtype=cache_dtype or dtype),
        "value_cache": random(4, g, 16, dv, seed=3, dtype=cache_dtype or dtype),
        "slots": SLOTS[:t].to(DEVICE),
    }


def run(function: Callable[..., Tensor], arguments: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return rotated queries and both caches after `function`, which gets caches of its own."""
    caches = {name: arguments[name].clone() for name in ("key_cache", "value_cache")}
    q = function(**(arguments | caches))
    return q, caches["key_cache"], caches["value_cache"]


def of_tokens(arguments: dict[str, Tensor], tokens: Tensor) -> dict[str, Tensor]:
    """Return the step of some of its tokens."""
    return {name: tensor if "cache" in name else tensor[tokens] for name, tensor in arguments.items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("t", "h", "g", "d", "dv"),
    [(1, 1, 1, 2, 1), (7, 6, 2, 24, 20), (5, 9, 3, 64, 64), (2, 20, 1, 96, 128), (3, 4, 4, 128, 16)],
)
def test_rope_and_store_is_its_twin(t: int, h: int, g: int, d: int, dv: int, dtype: torch.dtype) -> None:
    arguments = step(t, h, g, d, dv, dtype)
    with poisoned_outputs():
        got = run(rope.rope_and_store, arguments)
    on_processor = {name: tensor.cpu() for name, tensor in arguments.items()}
    for part, expected in zip(got, run(reference.rope_and_store, on_processor), strict=True):
        assert torch.equal(part.cpu(), expected)


def test_caches_of_another_dtype_are_rounded_once() -> None:
    arguments = step(7, 4, 2, 16, 8, torch.float32, cache_dtype=torch.bfloat16)
    on_processor = {name: tensor.cpu() for name, tensor in arguments.items()}
    for part, expected in zip(
        run(rope.rope_and_store, arguments), run(reference.rope_and_store, on_processor), strict=True
    ):
        assert torch.equal(part.cpu(), expected)


def test_padding_leaves_the_caches_alone() -> None:
    arguments = step(7, 4, 2, 16, 8, torch.float32)
    arguments["slots"] = torch.full_like(arguments["slots"], -1)
    _, key_cache, value_cache = run(rope.rope_and_store, arguments)
    assert torch.equal(key_cache, arguments["key_cache"])
    assert torch.equal(value_cache, arguments["value_cache"])


def test_a_rotation_keeps_length_and_the_relative_angle() -> None:
    """Turned by p and by p + 5, a query and a key meet as turned by 0 and by 5."""
    q, k = random(1, 1, 32).repeat(9, 1, 1), random(1, 1, 32, seed=1).repeat(9, 1, 1)
    positions = torch.arange(9, device=DEVICE)
    angles = positions[:, None] * 10000 ** (-torch.arange(16, device=DEVICE) / 16)
    key_cache, value_cache = torch.zeros(1, 1, 16, 32, device=DEVICE), torch.zeros(1, 1, 16, 32, device=DEVICE)
    turned = rope.rope_and_store(q, k, k, angles.cos(), angles.sin(), key_cache, value_cache, positions)
    torch.testing.assert_close(turned.norm(dim=-1), q.norm(dim=-1))
    scores = [(turned[p, 0] * key_cache[0, 0, p + 5]).sum() for p in range(4)]
    # Sums of 32 float32 products of size up to 10: 1e-5.
    torch.testing.assert_close(torch.stack(scores), scores[0].repeat(4), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_has_the_same_bits_among_any_others(dtype: torch.dtype) -> None:
    arguments = step(7, 5, 2, 24, 12, dtype)
    whole = run(rope.rope_and_store, arguments)
    shuffled = torch.randperm(7, generator=torch.Generator().manual_seed(4))
    parts = run(rope.rope_and_store, of_tokens(arguments, shuffled))
    assert torch.equal(parts[0], whole[0][shuffled.to(DEVICE)])
    assert torch.equal(parts[1], whole[1])
    assert torch.equal(parts[2], whole[2])
    alone = run(rope.rope_and_store, of_tokens(arguments, torch.tensor([3])))  # slot 17: page 1, its second token
    assert torch.equal(alone[0], whole[0][3:4])
    assert torch.equal(alone[1][1, :, 1], whole[1][1, :, 1])
    assert torch.equal(alone[2][1, :, 1], whole[2][1, :, 1])


@pytest.mark.parametrize("block_h", [1, 4, 16])
def test_the_tile_changes_no_bit(block_h: int, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = step(3, 6, 3, 24, 12, torch.float32)
    expected = run(rope.rope_and_store, arguments)
    monkeypatch.setattr(rope, "tile", lambda heads, half: (block_h, 16))
    for part, want in zip(run(rope.rope_and_store, arguments), expected, strict=True):
        assert torch.equal(part, want)


def test_no_tokens_make_no_rows() -> None:
    arguments = of_tokens(step(2, 4, 2, 16, 8, torch.float32), torch.arange(0))
    assert list(rope.rope_and_store(**arguments).shape) == [0, 4, 16]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("k", lambda x: x[:, :1], "k .* must be"),
        ("v", lambda x: x[:1], "v .* must be"),
        ("cos", lambda x: x[:, :4], "cos .* must be"),
        ("slots", lambda x: x[:1], "slots .* must be"),
        ("key_cache", lambda x: x[:, :, :8], "key_cache .* must be"),
        ("q", lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), "heads of q"),
        ("value_cache", lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), "value_cache must be contiguous"),
        ("sin", lambda x: x.t().contiguous().t(), "sin must be contiguous"),
    ],
)
def test_what_does_not_fit_is_refused(name: str, change: Callable[[Tensor], Tensor], message: str) -> None:
    arguments = step(2, 4, 2, 16, 8, torch.float32)
    arguments[name] = change(arguments[name])
    with pytest.raises(ShapeError, match=message):
        rope.rope_and_store(**arguments)


def test_an_odd_head_size_is_refused() -> None:
    arguments = step(2, 4, 2, 15, 8, torch.float32)
    with pytest.raises(ShapeError, match="odd"):
        rope.rope_and_store(**arguments)


def case(heads: int, head_dim: int, capability: int, dtype: str = "bf16") -> aot.Case:
    """Return how a step is launched for 8 key-value heads and pages of 16."""
    block_h, block_half = rope.tile(heads, head_dim // 2)
    pointers = ("q_ptr", "k_ptr", "v_ptr", "key_cache_ptr", "value_cache_ptr", "q_out_ptr")
    types = dict.fromkeys(pointers, f"*{dtype}")
    types |= {"cos_ptr": "*fp32", "sin_ptr": "*fp32", "slots_ptr": "*i64"}
    types |= dict.fromkeys(("stride_qt", "stride_kt", "stride_vt"), "i32")
    constants = {"H": heads, "G": 8, "PAGE": 16, "HALF": head_dim // 2, "Dv": head_dim}
    blocks = {"BLOCK_H": block_h, "BLOCK_HALF": block_half, "BLOCK_DV": 2 * block_half}
    return aot.Case(
        kernel="kernels.rope:_rope_and_store_kernel",
        types=types,
        constants=constants | blocks,
        aligned=list(types),
        capability=capability,
        options={"enable_fp_fusion": False},
    )


def test_the_machine_code_has_no_faults() -> None:
    cases = [case(32, 128, 90), case(64, 64, 90), case(32, 128, 80), case(12, 96, 80, "fp32")]
    for launched, code in zip(cases, aot.compile_cases(cases), strict=True):
        assert code.faults(launched.capability) == []
        assert code.registers <= 64  # two thousand threads, a full multiprocessor
        # Queries and keys are 1024 pairs on 128 threads, 8 columns of either half each, and values 16 columns: in
        # bfloat16 6 loads of 16 bytes. Cosines, sines and the slot come on top.
        if launched.types["q_ptr"] == "*bf16":
            assert code.instructions["LDG"] <= 6 + 4 + 1
