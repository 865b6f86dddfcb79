"""What the tests of Triton kernels share: the device they run on, outputs poisoned first, ragged inputs."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels import aot

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""A card, or this process under Triton's interpreter."""


def random(*shape: int, seed: int = 0, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return normal values, the same for a seed on every machine."""
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype).to(DEVICE)


def random_int8(*shape: int, seed: int = 0) -> Tensor:
    """Return int8 values over their whole range, -128 too."""
    return torch.randint(-128, 128, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8).to(DEVICE)


@contextmanager
def poisoned_outputs() -> Iterator[None]:
    """Make torch.empty return NaN, or the dtype's smallest integer, so that what a kernel does not write shows."""
    real = {name: getattr(torch, name) for name in ("empty", "empty_like")}

    def poison(name: str) -> Any:
        def make(*args: Any, **options: Any) -> Tensor:
            out: Tensor = real[name](*args, **options)
            return out.fill_(float("nan") if out.is_floating_point() else torch.iinfo(out.dtype).min)

        return make

    with pytest.MonkeyPatch.context() as patch:
        for name in real:
            patch.setattr(torch, name, poison(name))
        yield


@contextmanager
def quick_interpreter() -> Iterator[None]:
    """Let Triton patch its language once a module, not at every call of a jitted function by another: half the time."""
    if DEVICE == "cuda":
        yield
        return
    from triton.runtime import interpreter

    real = interpreter._patch_lang
    scopes: dict[int, Any] = {}

    def patch_once(function: Any) -> Any:
        key = id(function.__globals__)
        if key not in scopes:
            scopes[key] = real(function)
        return interpreter._LangPatchScope()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", patch_once)
        try:
            yield
        finally:
            for scope in reversed(scopes.values()):
                scope.restore()


MATMUL = np.matmul


def matmul_row_by_row(a: Any, b: Any, dtype: Any = None) -> Any:
    """Return a @ b; of floats without BLAS, which gives a row other bits in another place."""
    return np.einsum("mk,kn->mn", a, b) if dtype == np.float32 else MATMUL(a, b, dtype=dtype)


def assert_attention_code(cases: list[aot.Case]) -> None:
    """Compile the cases: tensor-core products, keys loaded beside them, no spills."""
    for case, code in zip(cases, aot.compile_cases(cases), strict=True):
        product = "HGMMA" if case.capability == 90 else "HMMA"
        assert code.faults(case.capability, product, "LDGSTS") == [], (case.constants, code)


def route_on_card(
    logits: Tensor, correction_bias: Tensor | None, num_experts_per_tok: int, **config: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Call the Triton kernel as `kernels.ops.route` calls it, whatever the device."""
    from kernels.routing import route

    usual = {"n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0, "threshold": 1.0}
    return route(logits, correction_bias, num_experts_per_tok, **usual | config)
