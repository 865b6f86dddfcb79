"""Products of a few rows by a few vectors whose sums stay in registers, for compiled loops: LLVM's instructions.

A sum is taken in the order of its terms, one after the other, whatever is computed beside it: its bits are its own. Two
bfloat16 terms go in one step, the second before the first, each fused with the sum in float32; where the processor has
AVX-512 BF16, by its instruction for that, which gives the same bits but for subnormal terms (Intel SDM, VDPBF16PS).
Two int16 terms go in one step too, exactly: products and sums are int32.

Legend: N terms, each a float32, a pair of bfloat16 or a pair of int16.
"""

from typing import Any

import llvmlite.binding
import numpy as np
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
HAS_INT16_PAIRS = "+avx2" in _FEATURES
"""Whether an instruction multiplies and adds pairs of int16."""

ROWS = 6
"""Rows of a tile of floats; fewer are computed as so many."""

INT_ROWS = 4
"""Rows of a tile of integers: products take a register before they are added. 6 rows are a fifth slower on AVX2."""

VECTORS = 4 if "+avx512f" in _FEATURES else 1
"""Vectors of a tile: of 4, its sums fill 24 of AVX-512's 32 registers; of 1, 12 of AVX2's 16, of half the width."""

PAIRED = np.uint16 if _HAS_PAIRS else np.float32
"""What rows of bfloat16 are given as: their bits, or widened, so that nothing is left to do beside the products."""

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


def _called(builder: Any, name: str, kind: Any, *arguments: Any) -> Any:
    """Return what LLVM's function `name` makes of `arguments`, of type `kind`."""
    of = ir.FunctionType(kind, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, of, name), arguments)


def _fused(builder: Any, total: Any, x: Any, y: Any) -> Any:
    x, y = builder.bitcast(x, _FLOATS), builder.bitcast(y, _FLOATS)
    return _called(builder, f"llvm.fma.v{LANES}f32", _FLOATS, x, y, total)


def _fused_pairs(builder: Any, total: Any, x: Any, y: Any) -> Any:
    x, y = builder.bitcast(x, _PAIRS), builder.bitcast(y, _PAIRS)
    return _called(builder, "llvm.x86.avx512bf16.dpbf16ps.512", _FLOATS, total, x, y)


def _int16_pairs(builder: Any, total: Any, x: Any, y: Any) -> Any:
    """Add both products of each pair of int16, by the instruction for that where there is one."""
    if not HAS_INT16_PAIRS:
        half = ir.Constant(_WORDS, [16] * LANES)
        low = [builder.ashr(builder.shl(word, half), half) for word in (x, y)]
        high = [builder.ashr(word, half) for word in (x, y)]
        return builder.add(total, builder.add(builder.mul(*low), builder.mul(*high)))
    name, lanes = ("llvm.x86.avx512.pmaddw.d.512", 16) if "+avx512bw" in _FEATURES else ("llvm.x86.avx2.pmadd.wd", 8)
    sums = []
    for first in range(0, LANES, lanes):
        some = ir.Constant(ir.VectorType(_INT32, lanes), [*range(first, first + lanes)])
        part = [builder.shuffle_vector(word, word, some) for word in (x, y)]
        part = [builder.bitcast(word, ir.VectorType(ir.IntType(16), 2 * lanes)) for word in part]
        sums.append(_called(builder, name, ir.VectorType(_INT32, lanes), *part))
    both = sums[0] if len(sums) == 1 else builder.shuffle_vector(*sums, ir.Constant(_WORDS, [*range(LANES)]))
    return builder.add(total, both)


def _widened(builder: Any, words: Any) -> tuple[Any, Any]:
    """Return the second and the first bfloat16 of each of `words`, as float32."""
    second = builder.and_(words, ir.Constant(_WORDS, [0xFFFF0000] * LANES))
    return second, builder.shl(words, ir.Constant(_WORDS, [16] * LANES))


def _spread(builder: Any, word: Any) -> Any:
    """Return a vector whose every lane is `word`."""
    nothing = ir.Constant(_WORDS, ir.Undefined)
    one = builder.insert_element(nothing, builder.bitcast(word, _INT32), _INT32(0))
    return builder.shuffle_vector(one, nothing, ir.Constant(_WORDS, [0] * LANES))


def _start(context: Any, builder: Any, of: Any, arguments: Any, place: int) -> Any:
    """Return a pointer into the array that is argument `place`, to where the argument behind it says."""
    array = context.make_array(of.args[place])(context, builder, arguments[place])
    return builder.gep(array.data, [arguments[place + 1]])


def _vector(builder: Any, pointer: Any, kind: Any) -> Any:
    return builder.bitcast(pointer, kind.as_pointer())


def _emit(builder: Any, vectors: int, kinds: tuple[Any, Any], anew: bool, at: list[Any]) -> None:
    """Write the instructions of a tile; `at` are the arguments after `tile`, arrays as pointers to where they begin."""
    a, a_row, b, b_vector, b_term, c, c_row, count = at
    is_int, is_wide = kinds[1] == types.int32, kinds == (types.float32, types.uint32)
    rows, sum_kind = (INT_ROWS, _WORDS) if is_int else (ROWS, _FLOATS)
    added = _int16_pairs if is_int else _fused_pairs if kinds[0] == types.uint32 else _fused
    before, loop, end = builder.block, builder.append_basic_block("terms"), builder.append_basic_block("terms.end")
    columns = [builder.gep(b, [builder.mul(b_vector, _INT64(j))]) for j in range(vectors)]
    starts = [builder.gep(a, [builder.mul(a_row, _INT64(r))]) for r in range(rows)]
    places = [
        builder.gep(builder.gep(c, [builder.mul(c_row, _INT64(r))]), [_INT64(LANES * j)])
        for r in range(rows)
        for j in range(vectors)
    ]
    places = [_vector(builder, place, sum_kind) for place in places]
    zero = ir.Constant(sum_kind, [0] * LANES)
    begin = [zero if anew else builder.load(place, align=4) for place in places]
    builder.branch(loop)
    builder.position_at_end(loop)
    term = builder.phi(_INT64)
    term.add_incoming(_INT64(0), before)
    phis = [builder.phi(sum_kind) for _ in places]
    totals = [*phis]
    offset = builder.mul(term, b_term)
    words = [builder.load(_vector(builder, builder.gep(column, [offset]), _WORDS), align=4) for column in columns]
    loaded = [_widened(builder, word) if is_wide else (word,) for word in words]
    per_term = len(loaded[0])
    for step in range(per_term):  # of all rows before the other half, so that few vectors are held at once
        for r in range(rows):
            value = builder.add(builder.mul(term, _INT64(per_term)), _INT64(per_term - 1 - step))
            x = _spread(builder, builder.load(builder.gep(starts[r], [value])))
            for j in range(vectors):
                totals[r * vectors + j] = added(builder, totals[r * vectors + j], x, loaded[j][step])
    for phi, first, total in zip(phis, begin, totals, strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(total, loop)
    following = builder.add(term, _INT64(1))
    term.add_incoming(following, loop)
    builder.cbranch(builder.icmp_signed("<", following, count), loop, end)
    builder.position_at_end(end)
    for total, place in zip(totals, places, strict=True):
        builder.store(total, place, align=4)


def tile(vectors: int, anew: bool) -> Any:
    """Return a function for compiled loops that adds ROWS, or INT_ROWS, by `vectors` vectors of products to sums.

    Of `anew`, sums begin with 0. It is called with one-dimensional arrays, and for each where to begin:

        a, first, a_row: row r's terms stand side by side from first + r * a_row on; float32, or of pairs the first in
            the low half: uint32 of bfloat16 where PAIRED is uint16, else float32, two a term; int32 of int16.
        b, first, b_vector, b_term: term n of vector j is LANES values from first + j * b_vector + n * b_term on;
            float32, uint32 of bfloat16 or int32 of int16.
        c, first, c_row: the sums [rows, vectors * LANES], float32, of int16 int32.
        count: N, at least 1.
    """

    def dots(
        _: Any, a: Any, a_first: Any, a_row: Any, b: Any, b_first: Any, b_vector: Any, b_term: Any, c: Any,
        c_first: Any, c_row: Any, count: Any,
    ) -> Any:  # fmt: skip
        index = types.intp
        signature = types.void(a, index, index, b, index, index, index, c, index, index, index)

        def generate(context: Any, builder: Any, of: Any, arguments: Any) -> Any:
            a_at, b_at, c_at = (_start(context, builder, of, arguments, place) for place in (0, 3, 7))
            at = [a_at, arguments[2], b_at, *arguments[5:7], c_at, *arguments[9:]]
            _emit(builder, vectors, (a.dtype, b.dtype), anew, at)
            return context.get_dummy_value()

        return signature, generate

    return intrinsic(dots)


def _interleaved(_: Any, x: Any, first: Any, row: Any, out: Any, to: Any) -> Any:
    """Write LANES rows of as many int8 of `x`, `row` apart, as LANES / 2 vectors of int16 pairs, for compiled loops."""
    signature, half = types.void(x, types.intp, types.intp, out, types.intp), LANES // 2
    pairs, whole = ir.VectorType(ir.IntType(16), half), ir.VectorType(ir.IntType(8), LANES)
    wide = ir.VectorType(ir.IntType(16), LANES)
    zips = [[i // 2 + i % 2 * half for i in range(first, first + half)] for first in (0, half)]

    def generate(context: Any, builder: Any, of: Any, arguments: Any) -> Any:
        source, target = (_start(context, builder, of, arguments, place) for place in (0, 3))
        places = [builder.gep(source, [builder.mul(arguments[2], _INT64(r))]) for r in range(LANES)]
        vectors = [builder.load(_vector(builder, place, pairs), align=1) for place in places]
        for _ in range(4):  # each of log2(LANES) takes turns of the first half of all pairs and of the second
            vectors = [
                builder.shuffle_vector(vectors[i], vectors[i + half], ir.Constant(ir.VectorType(_INT32, half), turns))
                for i in range(half)
                for turns in zips
            ]
        for i, vector in enumerate(vectors):
            place = _vector(builder, builder.gep(target, [_INT64(i * half)]), wide)
            builder.store(builder.sext(builder.bitcast(vector, whole), wide), place, align=4)
        return context.get_dummy_value()

    return signature, generate


interleave: Any = intrinsic(_interleaved)
