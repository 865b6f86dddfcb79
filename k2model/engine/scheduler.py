"""Decides what the next step computes. Pure Python: knows token counts, no tensor.

A submission is planned when it comes: equal requests become one, what prompts share becomes segments, computed before
the prompts that continue them, and the rest is sorted by length, so that sequences in a step need little padding in
attention. A step takes from the first submission what is ready and fits, and from the next ones what room is left; one
submission is finished before the next is begun, so that its owner can write while the engine goes on.
"""

from collections import OrderedDict, deque
from collections.abc import Iterator
from collections.abc import Sequence as Items
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

from k2model.decoder.pages import PAGE
from k2model.engine.candidates import CandidateTree, candidate_tree
from k2model.engine.prefix import Segment, share
from k2model.engine.request import Completion, Request

_MAX_ROOTS = 8
"""Instructions kept from one submission to the next."""


@dataclass(slots=True)
class Submission:
    """Requests handed in together, and the future of their answers."""

    future: Future[list[Completion]]
    completions: list[Completion | None]
    num_open: int

    def finish(self, index: int, completion: Completion) -> None:
        """Record an answer; the last one resolves the future."""
        self.completions[index] = completion
        self.num_open -= 1
        if self.num_open == 0 and not self.future.done():
            self.future.set_result([c for c in self.completions if c is not None])

    def fail(self, error: BaseException) -> None:
        """Fail the whole submission."""
        if not self.future.done():
            self.future.set_exception(error)


@dataclass(eq=False, slots=True)
class Sequence:
    """One request on its way through the engine, with everyone who asked the same."""

    request: Request
    tree: CandidateTree | None
    """Of its candidates; None where tokens are generated."""
    owners: list[tuple[Submission, int]] = field(default_factory=list)
    """Submissions, and the request's place in each."""
    parent: Segment | None = None
    """What it continues."""
    num_computed_tokens: int = 0
    """Tokens computed for it: those of segments it was the first to need among them."""
    num_segment_tokens: int = 0
    """Those of segments alone."""

    @property
    def num_prefill_tokens(self) -> int:
        """Tokens of its prefill that no other sequence shares."""
        branches = len(self.tree.branches.token_ids) if self.tree else 0
        return len(self.request.prompt_ids) - (self.parent.end if self.parent else 0) + branches

    @property
    def num_shared_tokens(self) -> int:
        """Tokens of its prompt that were computed for others, or once for all."""
        return max(0, (self.parent.end if self.parent else 0) - self.num_segment_tokens)

    @property
    def num_kv_tokens(self) -> int:
        """Key-value slots it may come to hold while it decodes; scoring holds none."""
        request = self.request
        if not request.max_tokens:
            return 0
        return -(-(len(request.prompt_ids) + request.max_tokens) // PAGE) * PAGE

    @property
    def is_wanted(self) -> bool:
        """Whether anyone still waits for it."""
        return any(not submission.future.done() for submission, _ in self.owners)

    def finish(self, completion: Completion) -> None:
        """Answer everyone who asked; the first one's answer says what was computed for it."""
        first = replace(completion, shared_tokens=self.num_shared_tokens)
        other = replace(completion, computed_tokens=0, shared_tokens=len(self.request.prompt_ids))
        for place, (submission, index) in enumerate(self.owners):
            submission.finish(index, other if place else first)


Item = Segment | Sequence


def num_tokens(item: Item) -> int:
    """Return the tokens that a step computes for `item`."""
    return len(item.token_ids) if isinstance(item, Segment) else item.num_prefill_tokens


@dataclass(slots=True)
class Scheduler:
    """The waiting line."""

    max_num_batched_tokens: int
    """Tokens of one step; a longer prompt is cut."""
    max_num_kv_tokens: int
    """Key-value slots that decoding sequences may hold together, and shared segments at once; a longer one is alone."""
    _waiting: deque[deque[Item]] = field(default_factory=deque)
    _open: dict[Request, Sequence] = field(default_factory=dict)
    _roots: OrderedDict[tuple[int, ...], Segment] = field(default_factory=OrderedDict)

    def add(self, requests: Items[Request], submission: Submission) -> None:
        """Plan one submission and queue it."""
        new = []
        for index, request in enumerate(requests):
            same = self._open.get(request)
            if same is None:
                tree = candidate_tree(request.candidates) if request.candidates else None
                same = self._open[request] = Sequence(request, tree)
                new.append(same)
            same.owners.append((submission, index))
        by_root: dict[tuple[int, ...], list[Sequence]] = {}
        for sequence in new:
            request = sequence.request
            by_root.setdefault(request.prompt_ids[: request.num_prefix_tokens], []).append(sequence)
        items: deque[Item] = deque()
        for token_ids, sequences in by_root.items():
            items.extend(self._plan(token_ids, sequences))
        if items:
            self._waiting.append(items)

    def _plan(self, root_ids: tuple[int, ...], sequences: list[Sequence]) -> Iterator[Item]:
        """Yield `sequences`, which all begin with `root_ids`, and their segments, each before what continues it."""
        root = self._root(root_ids) if root_ids else None
        if root is not None and root.kv is None:
            yield from self._cut(root)
        for sequence, parent in zip(sequences, share([s.request.prompt_ids for s in sequences], root), strict=True):
            sequence.parent = parent
        below = [sequence for sequence in sequences if sequence.parent is not root]
        alone = [sequence for sequence in sequences if sequence.parent is root]
        yield from self._in_order(alone)
        for wave in self._waves(below, root):
            segments = {segment for sequence in wave for segment in _between(sequence.parent, root)}
            for segment in sorted(segments, key=lambda s: (s.end - len(s.token_ids), s.token_ids)):
                yield from self._cut(segment)
            yield from self._in_order(wave)

    def _root(self, token_ids: tuple[int, ...]) -> Segment:
        """Return the segment of instructions seen before, or a new one."""
        segment = self._roots.pop(token_ids, None) or Segment(token_ids)
        self._roots[token_ids] = segment
        if len(self._roots) > _MAX_ROOTS:
            self._roots.popitem(last=False)
        return segment

    def _waves(self, sequences: list[Sequence], root: Segment | None) -> Iterator[list[Sequence]]:
        """Yield `sequences` in runs whose segments fit into memory together, those under one branch side by side."""
        wave: list[Sequence] = []
        seen: set[Segment] = set()
        held = 0
        for sequence in sorted(sequences, key=lambda s: s.request.prompt_ids):
            fresh = [segment for segment in _between(sequence.parent, root) if segment not in seen]
            size = sum(len(segment.token_ids) for segment in fresh)
            if wave and held + size > self.max_num_kv_tokens:
                yield wave
                wave, seen, held = [], set(), 0
                fresh = _between(sequence.parent, root)
                size = sum(len(segment.token_ids) for segment in fresh)
            sequence.num_computed_tokens += size
            sequence.num_segment_tokens += size
            wave.append(sequence)
            seen.update(fresh)
            held += size
        if wave:
            yield wave

    def _in_order(self, sequences: list[Sequence]) -> Iterator[Item]:
        """Yield `sequences`: what is only scored first, then by length; what is longer than a step in pieces."""
        for sequence in sorted(sequences, key=lambda s: (s.request.max_tokens > 0, s.num_prefill_tokens)):
            while sequence.num_prefill_tokens > self.max_num_batched_tokens:
                begin = sequence.parent.end if sequence.parent else 0
                end = min(begin + self.max_num_batched_tokens, len(sequence.request.prompt_ids) - 1)
                if end <= begin:
                    break
                sequence.parent = Segment(sequence.request.prompt_ids[begin:end], sequence.parent)
                sequence.num_computed_tokens += end - begin
                sequence.num_segment_tokens += end - begin
                yield sequence.parent
            yield sequence

    def _cut(self, segment: Segment) -> Iterator[Segment]:
        """Yield `segment`, in pieces if it is longer than a step."""
        limit = self.max_num_batched_tokens
        while len(segment.token_ids) > limit:
            piece = Segment(segment.token_ids[:limit], segment.parent)
            yield piece
            segment.parent, segment.token_ids = piece, segment.token_ids[limit:]
        yield segment

    def has_waiting(self) -> bool:
        """Return whether anything waits for its prefill."""
        return bool(self._waiting)

    def next_prefill(self, num_decoding: int, num_kv_tokens_held: int) -> list[Item]:
        """Return what the next step prefills; empty if nothing fits now.

        Args:
            num_decoding: tokens of the step that decoding sequences take.
            num_kv_tokens_held: key-value slots promised to decoding sequences at present.
        """
        taken: list[Item] = []
        tokens = num_decoding
        for items in self._waiting:
            while items:
                item = items[0]
                if isinstance(item, Sequence) and not item.is_wanted:
                    self.close(item)
                    items.popleft()
                    continue
                if isinstance(item, Segment) and item.kv is not None:  # another submission wanted it, too
                    items.popleft()
                    continue
                if item.parent is not None and item.parent.kv is None:
                    break
                if isinstance(item, Segment) and item in taken:
                    break
                kv = item.num_kv_tokens if isinstance(item, Sequence) else 0
                if tokens and tokens + num_tokens(item) > self.max_num_batched_tokens:
                    break
                if kv and num_kv_tokens_held and num_kv_tokens_held + kv > self.max_num_kv_tokens:
                    break
                taken.append(items.popleft())
                tokens += num_tokens(item)
                num_kv_tokens_held += kv
        self._waiting = deque(items for items in self._waiting if items)
        return taken

    def shrink(self) -> None:
        """Halve the steps to come: memory was not enough."""
        self.max_num_batched_tokens = max(PAGE, self.max_num_batched_tokens // 2)

    def unshare(self, segment: Segment) -> None:
        """Let everything that waits for `segment` compute its tokens by itself: it cannot be computed for all."""
        if self._roots.get(segment.token_ids) is segment:
            del self._roots[segment.token_ids]
        for items in self._waiting:
            for item in items:
                if item.parent is segment:
                    item.parent = segment.parent
                    if isinstance(item, Segment):
                        item.token_ids = segment.token_ids + item.token_ids

    def close(self, sequence: Sequence) -> None:
        """Forget `sequence`: it is answered, and the same request would be computed anew."""
        self._open.pop(sequence.request, None)


def _between(segment: Segment | None, root: Segment | None) -> list[Segment]:
    """Return `segment` and its ancestors below `root`, the first one first."""
    found = []
    while segment is not None and segment is not root:
        found.append(segment)
        segment = segment.parent
    return found[::-1]
