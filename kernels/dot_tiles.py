"""Products of a few rows by a few vectors whose sums stay in registers, for compiled loops: LLVM's instructions.

A sum is taken in the order of its terms, one after the other, whatever is computed beside it: its bits are its own. Two
bfloat16 terms go in one step, the second before the first, each fused with the sum in float32; where the processor has
AVX-512 BF16, by its instruction for that, which gives the same bits but for subnormal terms (Intel SDM, VDPBF16PS).

Legend: N terms, each a float32 or a pair of bfloat16.
"""

from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba import types
from numba.core import cgutils, config
from numba.extending import intrinsic

LANES = 16
"""Values of a vector."""

_ASKED: str | None = getattr(config, "CPU_FEATURES")  # noqa: B009 (set from the environment as it is imported)
_FEATURES = (llvmlite.binding.get_host_cpu_features().flatten() if _ASKED is None else _ASKED).split(",")
"""What numba compiles for, as LLVM says it."""
_HAS_PAIRS = "+avx512bf16" in _FEATURES

ROWS = 6
"""Rows of a tile; fewer are computed as so many."""

VECTORS = 4 if "+avx512f" in _FEATURES else 1
"""Vectors of a tile: of 4, its sums fill 24 of AVX-512's 32 registers; of 1, 12 of AVX2's 16, of half the width."""

_INT32, _INT64 = ir.IntType(32), ir.IntType(64)
_FLOATS, _WORDS = ir.VectorType(ir.FloatType(), LANES), ir.VectorType(_INT32, LANES)


class _BFloat16(ir.Type):  # type: ignore[misc]
    """LLVM's `bfloat`, which llvmlite has no name for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat16)

    def __hash__(self) -> int:
        return hash(_BFloat16)


_PAIRS = ir.VectorType(_BFloat16(), 2 * LANES)


def _widened(builder: Any, words: Any) -> tuple[Any, Any]:
    """Return the second and the first bfloat16 of each of `words`, as float32."""
    second = builder.and_(words, ir.Constant(_WORDS, [0xFFFF0000] * LANES))
    first = builder.shl(words, ir.Constant(_WORDS, [16] * LANES))
    return builder.bitcast(second, _FLOATS), builder.bitcast(first, _FLOATS)


def _terms(builder: Any, words: Any, paired: bool) -> Any:
    """Return `words` as `_added` takes them."""
    if not paired:
        return (builder.bitcast(words, _FLOATS),)
    return (builder.bitcast(words, _PAIRS),) if _HAS_PAIRS else _widened(builder, words)


def _added(builder: Any, total: Any, x: Any, y: Any, paired: bool) -> Any:
    """Return `total` plus the products of `x` and `y`."""
    if paired and _HAS_PAIRS:
        of = ir.FunctionType(_FLOATS, [_FLOATS, _PAIRS, _PAIRS])
        dot = cgutils.get_or_insert_function(builder.module, of, "llvm.x86.avx512bf16.dpbf16ps.512")
        return builder.call(dot, [total, *x, *y])
    of = ir.FunctionType(_FLOATS, [_FLOATS] * 3)
    fused = cgutils.get_or_insert_function(builder.module, of, f"llvm.fma.v{LANES}f32")
    for one, other in zip(x, y, strict=True):
        total = builder.call(fused, [one, other, total])
    return total


def _spread(builder: Any, word: Any) -> Any:
    """Return a vector whose every lane is `word`."""
    nothing = ir.Constant(_WORDS, ir.Undefined)
    one = builder.insert_element(nothing, word, _INT32(0))
    return builder.shuffle_vector(one, nothing, ir.Constant(_WORDS, [0] * LANES))


def _vector(builder: Any, pointer: Any, kind: Any) -> Any:
    return builder.bitcast(pointer, kind.as_pointer())


def _emit(builder: Any, vectors: int, paired: bool, anew: bool, at: list[Any]) -> None:
    """Write the instructions of a tile; `at` are the arguments after `tile`, arrays as pointers to where they begin."""
    a, a_row, b, b_vector, b_term, c, c_row, count = at
    before, loop, end = builder.block, builder.append_basic_block("terms"), builder.append_basic_block("terms.end")
    columns = [builder.gep(b, [builder.mul(b_vector, _INT64(j))]) for j in range(vectors)]
    starts = [builder.gep(a, [builder.mul(a_row, _INT64(r))]) for r in range(ROWS)]
    sums = [
        [builder.gep(builder.gep(c, [builder.mul(c_row, _INT64(r))]), [_INT64(LANES * j)]) for j in range(vectors)]
        for r in range(ROWS)
    ]
    zero = ir.Constant(_FLOATS, [0.0] * LANES)
    begin = [
        [zero if anew else builder.load(_vector(builder, place, _FLOATS), align=4) for place in row] for row in sums
    ]
    builder.branch(loop)
    builder.position_at_end(loop)
    term = builder.phi(_INT64)
    term.add_incoming(_INT64(0), before)
    totals = [[builder.phi(_FLOATS) for _ in range(vectors)] for _ in range(ROWS)]
    offset = builder.mul(term, b_term)
    loaded = []
    for column in columns:
        words = builder.load(_vector(builder, builder.gep(column, [offset]), _WORDS), align=4)
        loaded.append(_terms(builder, words, paired))
    for r in range(ROWS):
        word = builder.bitcast(builder.load(builder.gep(starts[r], [term])), _INT32)
        x = _terms(builder, _spread(builder, word), paired)
        for j in range(vectors):
            total = totals[r][j]
            total.add_incoming(begin[r][j], before)
            begin[r][j] = _added(builder, total, x, loaded[j], paired)
            total.add_incoming(begin[r][j], loop)
    following = builder.add(term, _INT64(1))
    term.add_incoming(following, loop)
    builder.cbranch(builder.icmp_signed("<", following, count), loop, end)
    builder.position_at_end(end)
    for row, places in zip(begin, sums, strict=True):
        for total, place in zip(row, places, strict=True):
            builder.store(total, _vector(builder, place, _FLOATS), align=4)


def tile(vectors: int, anew: bool) -> Any:
    """Return a function for compiled loops that adds ROWS by `vectors` vectors of products to float32 sums.

    Of `anew`, sums begin with 0. It is called with one-dimensional arrays, and for each where to begin:

        a, first, a_row: row r's terms stand side by side from first + r * a_row on; uint32, pairs of bfloat16 with the
            first in the low half, or float32.
        b, first, b_vector, b_term: term n of vector j is LANES values from first + j * b_vector + n * b_term on.
        c, first, c_row: the sums [ROWS, vectors * LANES], float32.
        count: N, at least 1.
    """

    def dots(
        _: Any, a: Any, a_first: Any, a_row: Any, b: Any, b_first: Any, b_vector: Any, b_term: Any, c: Any,
        c_first: Any, c_row: Any, count: Any,
    ) -> Any:  # fmt: skip
        index = types.intp
        signature = types.void(a, index, index, b, index, index, index, c, index, index, index)
        paired = b.dtype == types.uint32

        def generate(context: Any, builder: Any, of: Any, arguments: Any) -> Any:
            def begin(place: int) -> Any:
                array = context.make_array(of.args[place])(context, builder, arguments[place])
                return builder.gep(array.data, [arguments[place + 1]])

            at = [begin(0), arguments[2], begin(3), *arguments[5:7], begin(7), *arguments[9:]]
            _emit(builder, vectors, paired, anew, at)
            return context.get_dummy_value()

        return signature, generate

    return intrinsic(dots)
