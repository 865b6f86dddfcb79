"""Decides what the next step computes. Pure Python: knows token counts, no tensor.

Submissions are served in order, and inside one, requests of one shape together and short ones first, so that sequences
of equal length stand side by side and need no padding. A step's spare room goes to the next submission. One submission
is finished before the next is begun, so that its owner can write while the engine goes on.
"""

from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field

from k2model.engine.candidates import candidate_tree
from k2model.engine.request import Completion, Request


@dataclass(slots=True)
class Submission:
    """Requests handed in together, and the future of their answers."""

    future: Future[list[Completion]]
    completions: list[Completion | None]
    num_open: int


@dataclass(slots=True)
class Sequence:
    """One request on its way through the engine."""

    request: Request
    submission: Submission
    index: int
    output_ids: list[int] = field(default_factory=list)

    @property
    def num_prefill_tokens(self) -> int:
        """Tokens of its prefill that no other sequence shares."""
        nodes = len(candidate_tree(self.request.candidates).token_ids) if self.request.candidates else 0
        return len(self.request.prompt_ids) - self.request.num_prefix_tokens + nodes

    @property
    def num_kv_tokens(self) -> int:
        """Key-value slots it holds while it decodes; scoring holds none."""
        return len(self.request.prompt_ids) + self.request.max_tokens if self.request.max_tokens else 0

    def shape(self) -> tuple[object, ...]:
        """Return what sequences must have in common to form a group."""
        request = self.request
        prefix = request.prompt_ids[: request.num_prefix_tokens]
        return (len(request.prompt_ids), request.max_tokens, prefix, request.candidates)

    def finish(self, completion: Completion) -> None:
        """Record the answer; the last one of a submission resolves its future."""
        submission = self.submission
        submission.completions[self.index] = completion
        submission.num_open -= 1
        if submission.num_open == 0 and not submission.future.done():
            submission.future.set_result([c for c in submission.completions if c is not None])

    def fail(self, error: BaseException) -> None:
        """Fail the whole submission."""
        if not self.submission.future.done():
            self.submission.future.set_exception(error)


@dataclass(slots=True)
class Scheduler:
    """The waiting line."""

    max_num_batched_tokens: int
    """Tokens of one step; a longer sequence is a step of its own."""
    max_num_kv_tokens: int
    """Key-value slots that decoding sequences may hold together; a longer one decodes alone."""
    _waiting: deque[deque[Sequence]] = field(default_factory=deque)

    def add(self, sequences: list[Sequence]) -> None:
        """Queue one submission's sequences."""
        order = sorted(sequences, key=lambda s: (s.request.max_tokens, s.num_prefill_tokens, s.index))
        self._waiting.append(deque(order))

    def has_waiting(self) -> bool:
        """Return whether any sequence waits for its prefill."""
        return bool(self._waiting)

    def next_prefill(self, num_kv_tokens_held: int) -> list[list[Sequence]]:
        """Return the groups of the next prefill step, each of sequences of one shape; empty if none fits now.

        Args:
            num_kv_tokens_held: key-value slots that decoding sequences hold at present.
        """
        groups: dict[tuple[object, ...], list[Sequence]] = {}
        tokens = 0
        while self._waiting:
            sequence = self._waiting[0][0]
            size, kv = sequence.num_prefill_tokens, sequence.num_kv_tokens
            if groups and tokens + size > self.max_num_batched_tokens:
                break
            if kv and num_kv_tokens_held and num_kv_tokens_held + kv > self.max_num_kv_tokens:
                break
            self._waiting[0].popleft()
            if not self._waiting[0]:
                self._waiting.popleft()
            if sequence.submission.future.done():  # failed or cancelled while it waited
                continue
            groups.setdefault(sequence.shape(), []).append(sequence)
            tokens += size
            num_kv_tokens_held += kv
        return list(groups.values())
