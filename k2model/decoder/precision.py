"""Precisions: what a decoder rounds its values to, by kind of layer.

A float product is of values rounded to the layer's dtype and is summed in float32, so that 16-bit weights save memory
and sums lose nothing. Norms, softmax, the residual stream and routing are float32 in every precision. Queries and the
weights of values are rounded to bfloat16 where keys are, and are float32 elsewhere.
"""

from dataclasses import dataclass

import torch

from schemas.errors import SpecError


@dataclass(frozen=True, kw_only=True, slots=True)
class Precision:
    """One row of the table."""

    attention: torch.dtype
    """Of the linears of attention, where they are floats."""
    feed_forward: torch.dtype
    """Of dense feed-forwards, experts and shared experts, where they are floats."""
    head: torch.dtype
    """Of the output embedding."""
    key_values: torch.dtype
    """What keys and values, or latents, are rounded to and kept as; on the CPU float16 is kept as float32."""
    expand: bool
    """Whether linears stored as INT8 or INT4 are computed as floats too."""


def _all(dtype: torch.dtype) -> Precision:
    return Precision(attention=dtype, feed_forward=dtype, head=dtype, key_values=dtype, expand=True)


PRECISIONS = {
    "int8": Precision(
        attention=torch.bfloat16,
        feed_forward=torch.bfloat16,
        head=torch.bfloat16,
        key_values=torch.bfloat16,
        expand=False,
    ),
    # float16 has three bits more than bfloat16, and normed inputs of attention fit its range; a gate times up may not.
    "mixed": Precision(
        attention=torch.float16,
        feed_forward=torch.bfloat16,
        head=torch.bfloat16,
        key_values=torch.float16,
        expand=True,
    ),
    "bf16": _all(torch.bfloat16),
    "fp32": _all(torch.float32),
}
"""`int8` computes the conversion to W8A8, and INT4 as it is stored; the others the checkpoint's own weights."""


def find_precision(name: str) -> Precision:
    """Return the precision called `name`. Raises: SpecError."""
    if name not in PRECISIONS:
        raise SpecError(f'there is no precision "{name}"', remedy=f"give one of: {', '.join(PRECISIONS)}")
    return PRECISIONS[name]
