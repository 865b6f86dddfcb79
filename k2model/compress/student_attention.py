"""Attention of a model that is trained, and the packing of its batches. Plain PyTorch.

In INT8 and float32 the CPU computes what the engine computes, to the bit. Rows are picked by index_select: the gradient
of x[index] adds up in the order its threads come.

Legend: T packed tokens, H heads, G key-value heads, P tokens of the instructions that all examples share.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from k2model.compress.examples import Batch, Forks
from k2model.config import AttentionConfig
from k2model.decoder.branches import Branches
from k2model.decoder.pages import PAGE, table_of
from k2model.decoder.step import trees_of
from kernels import cpu, cpu_attention
from kernels.places import Places

_FEW = 12
"""Examples whose attention torch's own operations compute at once."""


class Few(NamedTuple):
    """Sequences of like lengths: little is padded, and caches hold their scores."""

    tokens: Tensor
    """[few, own] int64: the packed token in each place behind what they share; behind a sequence's last, that again."""
    positions: Tensor
    """[few, own] int64."""
    hidden: Tensor
    """[few, own, own] bool: places that each place does not see."""
    start: int
    """The tokens they share before these, the first of the pack."""

    def to(self, device: torch.device) -> "Few":
        """Return the same on `device`."""
        return Few(self.tokens.to(device), self.positions.to(device), self.hidden.to(device), self.start)


class _EngineAttention(torch.autograd.Function):
    """What the engine computes; the gradient is that of torch's own operations in as many digits."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        kv: Tensor,
        packed: "Packed",
        config: AttentionConfig,
        window: int | None,
        kept: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(q, kv)
        ctx.others = packed, config, window
        ctx.dtype = torch.bfloat16 if kept == torch.bfloat16 and cpu.has_bfloat16_product() else torch.float32
        return packed.engine_attended(q, kv, config, window, kept)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inputs = [x.detach().to(ctx.dtype).requires_grad_() for x in ctx.saved_tensors]
        packed, config, window = ctx.others
        with torch.enable_grad():
            q, kv = inputs
            y = packed.attend_in_torch(q, kv, config, window)
        found = torch.autograd.grad(y, inputs, grads[0].to(ctx.dtype))
        return *(each.float() for each in found), None, None, None, None


class Packed:
    """A batch as one pass: the instructions once, then each example's own tokens and branches, without padding."""

    def __init__(self, batch: Batch, forks: Sequence[Forks], device: torch.device) -> None:
        """Pack `batch`, each example with the branches of its `forks`."""
        start = len(batch.prefix_ids)
        own = [
            (example.prompt_ids[start:], asked.branches) for example, asked in zip(batch.examples, forks, strict=True)
        ]
        ids, positions, ends = [*batch.prefix_ids], [*range(start)], []
        for token_ids, branches in own:
            ends.append(len(ids) + len(token_ids))
            ids += [*token_ids, *branches.token_ids]
            end = start + len(token_ids)
            positions += [*range(start, end), *(end + depth for depth in branches.depths)]
        self.token_ids, self.positions = torch.tensor(ids).to(device), torch.tensor(positions).to(device)
        self.ends = torch.tensor(ends)
        """[examples] the packed place behind each prompt, where its branches begin."""
        self._start, self._own, self._device = start, own, device
        self._sizes = torch.tensor([len(token_ids) + len(branches.token_ids) for token_ids, branches in own])
        self._found_few: tuple[list[Few], Tensor] | None = None
        self._found_places: tuple[Tensor, Places, Places] | None = None
        self._found_trees: dict[int | None, tuple[Tensor, Tensor]] = {}

    def attend(self, q: Tensor, kv: Tensor, config: AttentionConfig, window: int | None, kept: torch.dtype) -> Tensor:
        """Return [T, H * head_dim] as the engine computes it of keys and values kept as `kept`.

        Args:
            q: [T, H, head_dim] float32.
            kv: [T, G, 2 * head_dim] float32.
            config: the layer's.
            window: how far back a token sees.
            kept: dtype of keys and values, float32 or bfloat16.
        """
        if q.device.type != "cpu" or q.dtype != torch.float32:  # torch's own operations come near enough
            return self.attend_in_torch(q, kv, config, window)
        y: Tensor = _EngineAttention.apply(q, kv, self, config, window, kept)  # type: ignore[no-untyped-call]
        return y

    def attend_in_torch(self, q: Tensor, kv: Tensor, config: AttentionConfig, window: int | None) -> Tensor:
        """Return the same by torch's own operations, in the dtype of `q` and `kv`; what is shared is never copied."""
        few_at_once, places = self._few_at_once()
        q = q * config.softmax_scale
        past_k, past_v = kv[: self._start].transpose(0, 1).split(config.head_dim, dim=-1)  # [G, P, head_dim] each
        attended = [_few_attended(q, kv, past_k, past_v, few, window) for few in few_at_once]
        return torch.cat(attended).index_select(0, places)

    def engine_attended(
        self, q: Tensor, kv: Tensor, config: AttentionConfig, window: int | None, kept: torch.dtype
    ) -> Tensor:
        """Return what `attend` does, without a gradient."""
        stored, stored_places, places = self._places()
        sizes = config.head_dim, config.head_dim
        width = sum(cpu_attention.page_sizes(*sizes))
        pages = torch.zeros(int(stored_places.table.max()) + 1, kv.shape[1], PAGE, width, dtype=kept)
        k, v = kv.index_select(0, stored).split(config.head_dim, dim=-1)
        columns = 0, k.shape[1] * config.head_dim
        cpu_attention.store(torch.cat([k.flatten(1), v.flatten(1)], dim=1), columns, sizes, stored_places, pages)
        out = torch.empty(len(q), q.shape[1] * config.head_dim)
        cpu_attention.attend(
            q.reshape(len(q), -1).contiguous(), q.shape[1], pages, sizes, places, self._trees(window),
            config.softmax_scale, out, window=window,
        )  # fmt: skip
        return out

    def _trees(self, window: int | None) -> tuple[Tensor, Tensor]:
        """Return `trees_of` the instructions, if there are any, and the examples: the same for every layer."""
        if window not in self._found_trees:
            instructions = [Branches()] if self._start else []
            self._found_trees[window] = trees_of([*instructions, *(branches for _, branches in self._own)], window)
        return self._found_trees[window]

    def _places(self) -> tuple[Tensor, Places, Places]:
        """Return the packed tokens that are stored, where these stand in pages, and where the packed tokens do.

        Tokens of the instructions in the page in which examples part from them are stored once more for each.
        """
        if self._found_places is None:
            start, first = self._start, 1 if self._start else 0
            whole = start // PAGE
            rows = [[*range(-(-start // PAGE))]] if first else []
            tokens = [torch.arange(start)] if first else []
            slots, used, begin = [*tokens], -(-start // PAGE), start
            for size in self._sizes.tolist():
                count = -(-(start + size) // PAGE) - whole
                rows.append([*range(whole), *range(used, used + count)])
                used += count
                tokens.append(torch.cat([torch.arange(whole * PAGE, start), torch.arange(begin, begin + size)]))
                slots.append(torch.arange(whole * PAGE, start + size))
                begin += size
            table, ends = table_of(rows), torch.tensor([start] * first + [start + len(ids) for ids, _ in self._own])
            owners = torch.arange(len(rows)).repeat_interleave(torch.tensor([len(each) for each in slots]))
            of_slots = torch.cat(slots)
            stored = Places(table, owners, of_slots, of_slots, ends, PAGE)
            sizes = torch.cat([torch.tensor([start] * first, dtype=torch.int64), self._sizes])
            owners = torch.arange(len(rows)).repeat_interleave(sizes)
            firsts = torch.tensor([0] * first + [start] * len(self._own))
            in_order = torch.arange(len(owners)) - (sizes.cumsum(0) - sizes)[owners] + firsts[owners]
            packed = Places(table, owners, in_order, self.positions.cpu(), ends, PAGE)
            self._found_places = torch.cat(tokens), stored, packed
        return self._found_places

    def _few_at_once(self) -> tuple[list[Few], Tensor]:
        """Return the instructions and then examples, a few at a time, and where each packed token stands in all."""
        if self._found_few is None:
            start, device = self._start, self._device
            found, end, places = [], start, torch.arange(len(self.token_ids))
            if start:
                own = torch.arange(start)
                found.append(Few(own[None], own[None], (own > own[:, None])[None], 0))
            firsts = self._sizes.cumsum(0) - self._sizes + start
            for few in self._sizes.argsort(stable=True).split(_FEW):
                own = torch.arange(int(self._sizes[few].max())).expand(len(few), -1)
                tokens = firsts[few, None] + own.minimum(self._sizes[few, None] - 1)
                stands = own < self._sizes[few, None]
                places[tokens[stands]] = torch.arange(end, end + stands.numel()).view_as(stands)[stands]
                end += stands.numel()
                hidden = own[:, None] > own[:, :, None]
                for one, number in enumerate(few.tolist()):
                    _hide_branches(hidden[one], len(self._own[number][0]), self._own[number][1])
                found.append(Few(tokens, self.positions.cpu()[tokens], hidden, start))
            self._found_few = [few.to(device) for few in found], places.to(device)
        return self._found_few


def _hide_branches(hidden: Tensor, end: int, branches: Branches) -> None:
    """Let each branch behind the first `end` places see those and its ancestors, in `hidden` [own, own]."""
    for branch, ancestors in enumerate(branches.ancestors):
        hidden[end + branch, end:] = True
        hidden[end + branch, [end + ancestor for ancestor in ancestors]] = False


def _few_attended(q: Tensor, kv: Tensor, past_k: Tensor, past_v: Tensor, few: Few, window: int | None) -> Tensor:
    """Return the attention of a few sequences [few * own, H * head_dim], of scaled queries.

    Args:
        q: [T, H, head_dim].
        kv: [T, G, 2 * head_dim].
        past_k: [G, P, head_dim], what all of them read unless they are the instructions themselves.
        past_v: as `past_k`.
        few: the sequences.
        window: how far back a token sees.
    """
    (batch, own), start, (groups, _, d) = few.tokens.shape, few.start, past_k.shape
    queries, keys = (x.index_select(0, few.tokens.flatten()).view(batch, own, groups, -1, x.shape[2]) for x in (q, kv))
    queries = queries.permute(2, 0, 3, 1, 4).reshape(groups * batch, -1, d)  # [G * few, H / G * own, head_dim]
    own_k, own_v = keys.permute(2, 0, 3, 1, 4).reshape(groups * batch, own, -1).split(d, dim=-1)
    hidden = few.hidden
    if window is not None:
        hidden = hidden | (few.positions[:, :, None] - few.positions[:, None] >= window)
    bias = torch.zeros(hidden.shape, dtype=q.dtype, device=q.device).masked_fill_(hidden, float("-inf"))
    of_own = torch.bmm(queries, own_k.transpose(1, 2)).view(groups, batch, -1, own, own) + bias[:, None]
    if start:
        of_past = torch.bmm(queries.view(groups, -1, d), past_k.transpose(1, 2)).view(groups, batch, -1, own, start)
        if window is not None:
            far = few.positions[:, :, None] - torch.arange(start, device=q.device) >= window
            of_past = of_past.masked_fill(far[:, None], float("-inf"))
        scores = torch.cat([of_past, of_own], dim=-1).view(*queries.shape[:2], start + own)
        of_past, of_own = torch.softmax(scores, dim=-1).split([start, own], dim=-1)
        out = torch.bmm(of_own, own_v) + torch.bmm(of_past.reshape(groups, -1, start), past_v).view(*queries.shape)
    else:
        out = torch.bmm(torch.softmax(of_own, dim=-1).view(*queries.shape[:2], own), own_v)
    return out.view(groups, batch, -1, own, d).permute(1, 3, 0, 2, 4).reshape(batch * own, -1)
