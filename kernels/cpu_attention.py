"""Attention of the CPU over keys and values in pages: one loop for prompts, candidate trees and decoding tokens.

A page holds the slots of each key-value head as the products of kernels/dot_tiles.py read them: first the keys, 16
slots side by side for each of their values (bfloat16: for each two values), then the values, slot by slot (bfloat16:
each two slots side by side). A query reads from slot 0 on, one slot after the other: its bits are a function of its own
sequence alone, whatever is computed beside it, in whatever steps and pages.

Legend: T tokens of a step, B sequences, H heads, G key-value heads, D head size of keys, Dv of values, S slots, N
queries asked for, I items.
"""

from typing import Any

import numba
import numpy as np
import torch
from numba.extending import overload
from torch import Tensor

from kernels import dot_tiles
from kernels.compiled import as_float32, both, inline, memory, narrow, nearest, run
from kernels.dot_tiles import LANES, PAIRED, ROWS, VECTORS
from kernels.places import BY_ITS_NEIGHBOUR, Places
from kernels.rowwise import FARTHEST, exp

_ZERO, _HALF, _ONE, _NAN, _HIDDEN = (np.float32(value) for value in (0, 0.5, 1, np.nan, -np.inf))
_FAR = 2**62
_UNIT = np.float32(2**30)
"""What 1 is in the integers that weights are summed as: S of them are off by S / 2**31 at most."""
_LOWEST, _SIGN_SHIFT = np.int32(-(2**31)), np.int32(31)
_NO_SIGN, _INFINITE = np.int32(0x7FFFFFFF), np.int32(0x7F800000)
_LOW, _HALF_WORD = np.uint32(0xFFFF), np.uint32(16)

_anew, _anew_wide = dot_tiles.tile(1, anew=True), dot_tiles.tile(VECTORS, anew=True)
_more, _more_wide = dot_tiles.tile(1, anew=False), dot_tiles.tile(VECTORS, anew=False)


def page_sizes(dk: int, dv: int) -> tuple[int, int]:
    """Return the widths that keys and values of head size `dk` and `dv` take of a slot: in pairs, in whole vectors."""
    return -(-dk // 2) * 2, -(-dv // LANES) * LANES


def _rounded(row: Any, out: Any, pages: Any) -> None:
    """Write float32 `row` rounded to what `pages` hold: as it is, as the bits of bfloat16, or as these widened."""


@overload(_rounded)
def _rounded_to(row: Any, out: Any, pages: Any) -> Any:
    def narrowed(row: Any, out: Any, pages: Any) -> None:
        narrow(row, out)

    def rounded(row: Any, out: Any, pages: Any) -> None:
        bits, to = row.view(np.uint32), out.view(np.uint32)
        for i in range(row.size):
            to[i] = nearest(bits[i]) << _HALF_WORD

    def copied(row: Any, out: Any, pages: Any) -> None:
        for i in range(row.size):
            out[i] = row[i]

    return narrowed if out.dtype == numba.uint16 else rounded if pages.dtype == numba.uint32 else copied


@inline
def _scores(
    q: Any, rows: Any, q_row: Any, terms: Any, keys: Any, first: Any, vectors: Any, out: Any, column: Any, width: Any
) -> None:
    """Write products of `rows` queries and the keys of `vectors` times 16 slots."""
    for r in range(0, rows, ROWS):
        j = 0
        while j < vectors:
            at, to = first + j * terms * LANES, r * width + column + j * LANES
            if vectors - j >= VECTORS:
                _anew_wide(q, r * q_row, q_row, keys, at, terms * LANES, LANES, out, to, width, terms)
                j += VECTORS
            else:
                _anew(q, r * q_row, q_row, keys, at, terms * LANES, LANES, out, to, width, terms)
                j += 1


@inline
def _add_values(
    weights: Any, rows: Any, column: Any, width: Any, terms: Any, values: Any, first: Any, dv: Any, out: Any
) -> None:
    """Add `terms` weighted values to `out` [rows, dv]."""
    for r in range(0, rows, ROWS):
        j = 0
        while j < dv:
            at, to = r * width + column, r * dv + j
            if dv - j >= VECTORS * LANES:
                _more_wide(weights, at, width, values, first + j, LANES, dv, out, to, dv, terms)
                j += VECTORS * LANES
            else:
                _more(weights, at, width, values, first + j, LANES, dv, out, to, dv, terms)
                j += LANES


@inline
def _highest(row: Any, scale: Any, sink: Any) -> Any:
    """Return the highest of float32 `row` times `scale` and of `sink`; NaN if one of `row` is, of either sign."""
    bits, most, farthest = row.view(np.int32), _LOWEST, np.int32(0)
    for i in range(row.size):  # as integers, which compilers may compare in any order
        most = max(most, bits[i] ^ ((bits[i] >> _SIGN_SHIFT) & _NO_SIGN))
        farthest = max(farthest, bits[i] & _NO_SIGN)
    top = as_float32(most ^ ((most >> _SIGN_SHIFT) & _NO_SIGN)) * scale if farthest <= _INFINITE else _NAN
    return sink if sink > top else top


@inline
def _exponentials(row: Any, scale: Any, top: Any) -> None:
    """Overwrite `row` with exp(row * scale - top); 0 where that is tiny, or `top` is NaN."""
    for i in range(row.size):
        x = row[i] * scale - top
        part = exp(max(x, -FARTHEST))
        row[i] = part if x >= -FARTHEST else _ZERO


@inline
def _share(row: Any, top: Any, sink: Any) -> Any:
    """Return one over the sum of exponentials `row`, each at most 1, and that of `sink`; infinite if all are 0."""
    whole = np.int64(0)
    for i in range(row.size):  # integers may be summed in any order
        whole += np.int64(np.int32(row[i] * _UNIT + _HALF))
    total = np.float32(whole) / _UNIT
    if sink - top >= -FARTHEST:
        total += exp(sink - top)
    return _ONE / total


@inline
def _weigh(scores: Any, rows: Any, width: Any, scale: Any, sinks: Any, weights: Any, pages: Any) -> None:
    """Write softmax(scores * scale) into `weights`, rounded as `pages` are; of `rows` rows, r has sink r % len(sinks).

    Each pass is over all rows: what one hangs on is long known, which saves a quarter of the time.
    """
    tops, shares = np.empty(rows, np.float32), np.empty(rows, np.float32)
    for r in range(rows):
        tops[r] = _highest(scores[r * width : (r + 1) * width], scale, sinks[r % sinks.size])
    for r in range(rows):
        _exponentials(scores[r * width : (r + 1) * width], scale, tops[r])
    for r in range(rows):
        shares[r] = _share(scores[r * width : (r + 1) * width], tops[r], sinks[r % sinks.size])
    for r in range(rows):
        row = scores[r * width : (r + 1) * width]
        for i in range(width):
            row[i] *= shares[r]
        _rounded(row, weights[r * width : (r + 1) * width], pages)


@inline
def _hide(row: Any, first: Any, slot: Any, end: Any, tree: Any) -> None:
    """Hide scores `row` of what a query in `slot` does not see: slots before `first` and behind its own.

    Of a branch, in a slot from `end` on, also those of branches that it does not follow.
    """
    for i in range(first):
        row[i] = _HIDDEN
    for i in range(slot + 1, row.size):
        row[i] = _HIDDEN
    for i in range(end, slot):
        if not tree[slot - end, i - end]:
            row[i] = _HIDDEN


def _attend(
    q: Any, pages: Any, passing: Any, slots_of_page: Any, dk: Any, dv: Any, table: Any, tokens: Any, starts: Any,
    owners: Any, slots: Any, positions: Any, ends: Any, tree_of: Any, trees: Any, window: Any, scale: Any, sinks: Any,
    per_word: Any, value: Any, word: Any, out: Any,
) -> None:  # fmt: skip
    groups, words, kept, passed = pages.shape[1], pages.shape[2], pages.reshape(-1), passing.reshape(-1)
    share, per_term = sinks.size // groups, per_word * value.itemsize // word.itemsize
    k_width, v_width = (dk + per_word - 1) // per_word * per_word, (dv + LANES - 1) // LANES * LANES
    terms, values_at = k_width // per_word, slots_of_page * k_width // per_word
    for i in numba.prange(owners.size * groups):
        item, g = i // groups, i % groups
        owner, own = owners[item], tokens[starts[item] : starts[item + 1]]
        end, begin = 0, _FAR if window else 0
        for t in own:
            end = max(end, slots[t] + 1)
            if window:
                begin = min(begin, max(0, min(positions[t] - window + 1, ends[owner])))
        first_page, last_page = begin // slots_of_page, (end - 1) // slots_of_page
        base, width = first_page * slots_of_page, (last_page + 1 - first_page) * slots_of_page
        rows = (own.size * share + ROWS - 1) // ROWS * ROWS
        queries = np.zeros(rows * k_width, value.dtype)
        for n in range(own.size):
            for h in range(share):
                at = (n * share + h) * k_width
                _rounded(q[own[n], (g * share + h) * dk : (g * share + h + 1) * dk], queries[at : at + dk], pages)
        scores, weights = np.empty(rows * width, np.float32), np.empty(rows * width, value.dtype)
        weights[own.size * share * width :] = 0
        for page in range(first_page, last_page + 1):
            number = table[owner, page]
            memory_, at = passed if number < 0 else kept, (max(number, ~number) * groups + g) * words
            vectors = (min(end - page * slots_of_page, slots_of_page) + LANES - 1) // LANES
            column = page * slots_of_page - base
            _scores(
                queries.view(word.dtype), rows, terms * per_term, terms, memory_, at, vectors, scores, column, width
            )
        stop, tree = ends[owner], trees[tree_of[owner]]
        for n in range(own.size):
            slot = slots[own[n]]
            first = max(0, min(positions[own[n]] - window + 1, stop)) if window else 0
            for r in range(n * share, (n + 1) * share):
                _hide(scores[r * width : (r + 1) * width], first - base, slot - base, stop - base, tree)
        _weigh(scores, own.size * share, width, scale, sinks[g * share : (g + 1) * share], weights, pages)
        summed = np.zeros(rows * v_width, np.float32)
        for page in range(first_page, last_page + 1):
            number = table[owner, page]
            memory_, at = passed if number < 0 else kept, (max(number, ~number) * groups + g) * words + values_at
            count = (min(end - page * slots_of_page, slots_of_page) + per_word - 1) // per_word
            first, row = (page * slots_of_page - base) // per_word * per_term, width // per_word * per_term
            _add_values(weights.view(word.dtype), rows, first, row, count, memory_, at, v_width, summed)
        for n in range(own.size):
            for h in range(share):
                at = (n * share + h) * v_width
                for j in range(dv):
                    out[own[n], (g * share + h) * dv + j] = summed[at + j]


def _store_float32(
    x: Any, k_at: Any, v_at: Any, dk: Any, dv: Any, page: Any, offset: Any, beside: Any, pages: Any, passing: Any,
    slots_of_page: Any,
) -> None:  # fmt: skip
    groups, words, kept, passed = pages.shape[1], pages.shape[2], pages.reshape(-1), passing.reshape(-1)
    v_width = (dv + LANES - 1) // LANES * LANES
    for t in numba.prange(x.shape[0]):
        memory_, first_word = passed if page[t] < 0 else kept, max(page[t], ~page[t]) * groups * words
        for g in range(groups):
            at = first_word + g * words
            key_at = at + offset[t] // LANES * dk * LANES + offset[t] % LANES
            for i in range(dk):
                memory_[key_at + i * LANES] = x[t, k_at + g * dk + i]
            value_at = at + slots_of_page * dk + offset[t] * v_width
            for i in range(dv):
                memory_[value_at + i] = x[t, v_at + g * dv + i]


def _store_bfloat16(
    x: Any, k_at: Any, v_at: Any, dk: Any, dv: Any, page: Any, offset: Any, beside: Any, pages: Any, passing: Any,
    slots_of_page: Any,
) -> None:  # fmt: skip
    groups, words, kept, passed = pages.shape[1], pages.shape[2], pages.reshape(-1), passing.reshape(-1)
    terms, v_width = (dk + 1) // 2, (dv + LANES - 1) // LANES * LANES
    for t in numba.prange(x.shape[0]):
        key, first, second = np.zeros(2 * terms, np.uint16), np.empty(dv, np.uint16), np.zeros(dv, np.uint16)
        memory_, first_word = passed if page[t] < 0 else kept, max(page[t], ~page[t]) * groups * words
        for g in range(groups):
            at = first_word + g * words
            narrow(x[t, k_at + g * dk : k_at + (g + 1) * dk], key[:dk])
            key_at, key_words = at + offset[t] // LANES * terms * LANES + offset[t] % LANES, key.view(np.uint32)
            for i in range(terms):
                memory_[key_at + i * LANES] = key_words[i]
            if beside[t] == BY_ITS_NEIGHBOUR:
                continue
            value_at = at + slots_of_page * terms + offset[t] // 2 * v_width
            narrow(x[t, v_at + g * dv : v_at + (g + 1) * dv], first)
            if offset[t] % 2:
                for i in range(dv):
                    memory_[value_at + i] = (memory_[value_at + i] & _LOW) | (np.uint32(first[i]) << _HALF_WORD)
                continue
            if beside[t] >= 0:
                narrow(x[beside[t], v_at + g * dv : v_at + (g + 1) * dv], second)
            for i in range(dv):
                memory_[value_at + i] = np.uint32(first[i]) | (np.uint32(second[i]) << _HALF_WORD)


def _copy(pages: Any, passing: Any, sources: Any, targets: Any) -> None:
    for n in numba.prange(sources.size):
        if targets[n] < 0:
            passing[~targets[n]] = pages[sources[n]]
        else:
            pages[targets[n]] = pages[sources[n]]


_ATTEND, _COPY = both(_attend), both(_copy)
_STORE = {torch.float32: both(_store_float32), torch.bfloat16: both(_store_bfloat16)}

_FLOAT32 = np.empty(0, np.float32)
_VALUE_AND_WORD = {
    torch.float32: (_FLOAT32, _FLOAT32),
    torch.bfloat16: (np.empty(0, PAIRED), np.empty(0, np.uint32) if PAIRED is np.uint16 else _FLOAT32),
}
"""Of pages: in what queries and weights are written, and in what a tile reads them."""


def store(
    x: Tensor,
    columns: tuple[int, int],
    sizes: tuple[int, int],
    places: Places,
    pages: Tensor,
    passing: Tensor | None = None,
) -> None:
    """Store keys and values of tokens, rounded to the dtype of `pages`.

    Args:
        x: [T, *] float32, contiguous.
        columns: where keys of all heads begin, and where values do.
        sizes: D, Dv.
        places: of the tokens.
        pages: [pages, G, page, sum of `page_sizes`] float32 or bfloat16, contiguous.
        passing: others like these, whose numbers in `places` are ~0, ~1, ...
    """
    run(
        _STORE[pages.dtype], x.numel(), memory(x), *columns, *sizes, places.pages.numpy(), places.offsets.numpy(),
        places.beside.numpy(), *_words(pages, passing), places.page,
    )  # fmt: skip


def copy(pages: Tensor, passing: Tensor, sources: Tensor, targets: Tensor) -> None:
    """Copy whole `pages`: those of numbers `sources` [n] int64 to those of `targets` [n], which are others.

    Targets may be `passing` ones, as in `store`.
    """
    words = _words(pages, passing)
    run(_COPY, len(sources) * pages[0].numel(), *words, sources.numpy(), targets.numpy())


def gathered(pages: Tensor, passing: Tensor, numbers: Tensor) -> Tensor:
    """Return a copy of the pages of `numbers` [n] int64, of which those below 0 are `passing` ones, as in `store`."""
    out, passes = pages.new_empty(len(numbers), *pages.shape[1:]), numbers < 0
    out[~passes], out[passes] = pages[numbers[~passes]], passing[~numbers[passes]]
    return out


def stored_keys(pages: Tensor, dk: int) -> Tensor:
    """Return the keys that `store` put in `pages` [n, 1, page, *], one slot after the other [n * page, dk] float32."""
    per_word = 2 if pages.dtype == torch.bfloat16 else 1
    count, page, terms = len(pages), pages.shape[2], -(-dk // per_word)
    blocks = pages.flatten(1)[:, : page * terms * per_word].view(count, page // LANES, terms, LANES, per_word)
    return blocks.transpose(2, 3).reshape(count * page, terms * per_word)[:, :dk].float()


def attend(
    q: Tensor,
    heads: int,
    pages: Tensor,
    sizes: tuple[int, int],
    places: Places,
    trees: tuple[Tensor, Tensor],
    scale: float,
    out: Tensor,
    *,
    passing: Tensor | None = None,
    window: int | None = None,
    sinks: Tensor | None = None,
    read: Tensor | None = None,
) -> None:
    """Write softmax(q kᵀ scale) v over what each query sees into `out` [T, H * Dv] float32.

    Queries and weights are rounded to the dtype of `pages`; sums are float32.

    Args:
        q: [T, *] float32, contiguous; queries of all heads stand first.
        heads: H.
        pages: as `store` left them, with `passing`.
        sizes: D, Dv.
        places: of the tokens.
        trees: each sequence's tree [B] int64, and of each tree whether a branch sees another, and itself
            [trees, n, n] bool.
        scale: multiplies the scores.
        out: contiguous; rows beside those `read` are left as they are.
        passing: as `store` takes it.
        window: how many positions a query sees, which `trees` hide already; None for all.
        sinks: [H], one more score per head, which takes its share of the softmax and adds nothing.
        read: [N] int64, the tokens asked for; None for all.
    """
    tokens, starts, owners = places.items(heads // pages.shape[1], read)
    value, word = _VALUE_AND_WORD[pages.dtype]
    each = torch.full((heads,), float("-inf")) if sinks is None else sinks
    run(
        _ATTEND, len(tokens) * heads * 2**10, memory(q), *_words(pages, passing), places.page, *sizes,
        places.table.numpy(), tokens.numpy(), starts.numpy(), owners.numpy(), places.slots.numpy(),
        places.positions.numpy(), places.ends.numpy(), *(x.numpy() for x in trees), window or 0, np.float32(scale),
        memory(each), 4 // pages.itemsize, value, word, memory(out),
    )  # fmt: skip


def _words(pages: Tensor, passing: Tensor | None) -> list[Any]:
    """Return both as [pages, G, words], pairs of bfloat16 or float32."""
    flat = [each.flatten(2) for each in (pages, pages if passing is None else passing)]
    return [each.view(torch.uint32).numpy() if each.dtype == torch.bfloat16 else each.numpy() for each in flat]
