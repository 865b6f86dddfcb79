"""A card where there is none: decoders with keys and values in pages, every operator its Triton kernel, interpreted."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import library

from k2model.compress.recipe import prepare_int8
from k2model.decoder.model import Decoder, page_pool
from k2model.decoder.precision import PRECISIONS, Precision
from k2model.formats.checkpoint import open_checkpoint
from kernels import float_gemm, label_score, norm, ops, quantize, routing
from kernels import int8_gemm as gemm
from tests.kernel_cases import DEVICE, matmul_row_by_row, quick_interpreter

CARD = torch.device(DEVICE)

ON_CARD: dict[str, Any] = {
    "quantize_rows": quantize.quantize_rows,
    "rms_norm_quantize": ops._rms_norm_quantize_on_card,
    "swiglu_quantize": quantize.swiglu_quantize,
    "int8_linear": gemm.int8_linear,
    "int8_swiglu": ops._int8_swiglu_on_card,
    "token_logprobs": label_score.token_logprobs,
    "route": routing.route,
    "rms_norm": norm.rms_norm,
    "float_linear": float_gemm.float_linear,
    "row_matmul": float_gemm.row_matmul,
    "token_logits": float_gemm.token_logits,
    "argmax_token": float_gemm.argmax_token,
}
"""What torch's dispatcher calls where tensors are on a card."""


@contextmanager
def card() -> Iterator[None]:
    """Compute as on a card: on one, or with its kernels on CPU tensors, in tiles that numpy is not slow with."""
    if DEVICE == "cuda":
        yield
        return
    with quick_interpreter(), pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setattr(np, "matmul", matmul_row_by_row)
        for name in ("FLOAT_TILE", "FLOAT32_TILE"):
            patch.setattr(float_gemm, name, getattr(float_gemm, name) | {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 32})
        warnings.filterwarnings("ignore", message=".*[Oo]verrid")
        operators = library.Library("k2batch", "IMPL")
        try:
            for name, function in ON_CARD.items():
                operators.impl(name, function, "CPU", allow_override=True)
            yield
        finally:
            operators._destroy()


def card_decoder(folder: Path, precision: Precision = PRECISIONS["fp32"], page: int = 16) -> Decoder:
    """Return the decoder of a checkpoint as it is on a card, with small pages."""
    source = open_checkpoint(str(folder)) if precision.expand else prepare_int8(str(folder))
    decoder = Decoder.from_weights(source.config(), source.weights(), precision, CARD)
    decoder.pool = page_pool(decoder.config, precision.key_values, CARD, page)
    return decoder
