"""Steps whose attention kernels on a card compute.

Every kernel reads keys from slot 0 on, in blocks of the same slots, as k2model/decoder/step.py wants it.

Legend: T tokens of the step, B sequences, H heads, G key-value heads, D head size, R rank + rope of latents.
"""

import functools
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from k2model.decoder.branches import Branches
from k2model.decoder.pages import PagePool, table_of
from k2model.decoder.step import Span, Step
from kernels import cpu


class CardStep(Step):
    """A step whose tables are on a card, too."""

    _passes = False

    def __init__(self, pool: PagePool, spans: Sequence[Span]) -> None:
        """Lay out `spans`. Raises: as `Step`."""
        super().__init__(pool, spans)
        prompts = [span for span in spans if not span.decodes]
        sizes = [span.size for span in prompts]
        table, decoding = self.table.to(torch.int32), slice(self.num_prompt_tokens, None)
        self._prompts = prompts
        self._copies = self._copies.to(pool.device)
        self._pages_of_tokens = self.table[self.owners, self.slots // pool.page].to(pool.device)
        self._offsets = (self.slots % pool.page).to(pool.device)
        self._table = table[: len(prompts)].to(pool.device)
        self._decode_table = table[self.owners[decoding]].to(pool.device)
        self._lens = (self.slots[decoding] + 1).to(torch.int32).to(pool.device)
        self._cu_seqlens = self._int32([0, *accumulate(sizes)])
        self._starts = self._int32([span.start for span in prompts])
        self._ends = self._int32([span.end for span in prompts])
        self._max_seqlen = max(sizes, default=0)
        self._found_words: dict[int | None, tuple[Tensor, Tensor]] = {}

    def _copy(self, pages: Tensor, sources: Tensor, targets: Tensor) -> None:
        pages[targets] = pages[sources]

    def attend(
        self, q: Tensor, kept: Tensor, layer: int, window: int | None, scale: float, sinks: Tensor | None
    ) -> Tensor:
        """Store keys and values; return each query's attention [T, H * D] float32.

        Args:
            q: [T, H, D] float32; rounded to the dtype of keys, which the kernels multiply it with.
            kept: [T, G, 2 D], keys and values side by side.
            layer: the layer's number.
            window: how many positions a query sees.
            scale: multiplies the scores.
            sinks: [H], one more score per head.
        """
        from kernels.paged_attention import paged_decode

        k, v = self.store(kept, layer).chunk(2, dim=-1)
        q = cpu.rounded(q, k.dtype)
        prompts = self.num_prompt_tokens
        out = [self.prefilled(q[:prompts], k, v, self._table, window, scale, sinks)] if prompts else []
        if len(self._lens):
            table = self._decode_table
            out.append(paged_decode(q[prompts:], k, v, table, self._lens, scale, window=window, sinks=sinks))
        return torch.cat(out).float().flatten(1)

    def store(self, kept: Tensor, layer: int) -> Tensor:
        """Store what is kept of the step's tokens [T, G, width] in layer `layer`, and return the layer's pages."""
        pages = self.begun(layer)
        pages[self._pages_of_tokens, :, self._offsets] = kept
        return pages

    def prefilled(
        self, q: Tensor, k: Tensor, v: Tensor, table: Tensor, window: int | None, scale: float, sinks: Tensor | None
    ) -> Tensor:
        """Return attention of the prompts' queries [P, H, D] over k and v [pages, G, page, *], found by `table`."""
        from kernels.paged_prefill import Trees, paged_prefill

        of, visible = self._tree_words(window)
        return paged_prefill(
            q, k, v, table, self._cu_seqlens, self._starts, self._max_seqlen, scale, window=window, sinks=sinks,
            ends=self._ends, trees=Trees(of, self._positions32, visible),
        )  # fmt: skip

    @functools.cached_property
    def card_prompt_pages(self) -> tuple[Tensor, Tensor]:
        """The pages that prompts read [n] int64, each once, and where each stands among them [B, width] int32."""
        used, places = table_of([pages.ids for pages in self.pages[: len(self._prompts)]]).unique(return_inverse=True)
        return used.to(self.pool.device), places.to(torch.int32).to(self.pool.device)

    def latent_decode(self, q: Tensor, latents: Tensor, scale: float, rank: int) -> Tensor:
        """Return attention of decoding queries [N, H, R] over latents [pages, 1, page, R], as [N, H, rank] float32."""
        from kernels.mla import mla_decode

        q = cpu.rounded(q, latents.dtype)
        return mla_decode(q, latents[:, 0], self._decode_table, self._lens, scale, rank=rank).float()

    @functools.cached_property
    def _positions32(self) -> Tensor:
        return self.positions[: self.num_prompt_tokens].to(torch.int32)

    def _tree_words(self, window: int | None) -> tuple[Tensor, Tensor]:
        """Return each span's tree [B] int32, and the trees as kernels/paged_prefill.py reads them."""
        if window not in self._found_words:
            keys = [(span.branches, span.end % 32 if span.branches.token_ids else 0) for span in self._prompts]
            trees = {key: number for number, key in enumerate(dict.fromkeys(keys))}
            words = [_words(branches, shift, window) for branches, shift in trees]
            height, width = (max(tree.shape[axis] for tree in words) for axis in (0, 1))
            visible = torch.zeros(len(words), height, width, dtype=torch.int32)
            for tree, into in zip(words, visible, strict=True):
                into[: tree.shape[0], : tree.shape[1]] = tree
            self._found_words[window] = self._int32([trees[key] for key in keys]), visible.to(self.pool.device)
        return self._found_words[window]

    def _int32(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32).to(self.pool.device)


@functools.lru_cache(maxsize=1024)
def _words(branches: Branches, shift: int, window: int | None) -> Tensor:
    """Return what `branches` see of each other, behind a prompt that ends `shift` slots behind a multiple of 32."""
    from kernels.paged_prefill import visible_words

    count = len(branches.token_ids)
    visible = torch.zeros(count, count, dtype=torch.bool)
    for branch, ancestors in enumerate(branches.ancestors):
        visible[branch, list(ancestors)] = True
    if window is not None:
        depths = torch.tensor(branches.depths)
        visible &= depths[:, None] - depths < window
    return visible_words(visible, shift) if count else torch.zeros(1, 1, dtype=torch.int32)
