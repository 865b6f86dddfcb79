"""What the engine is asked and what it answers. Token ids; text only where an answer must match or end at it."""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol


@dataclass(frozen=True, slots=True)
class Candidate:
    """A continuation of the prompt whose probability is asked for."""

    token_ids: tuple[int, ...]
    num_scored: int
    """Only the last `num_scored` tokens count; those before are given, such as the words of a question."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How a generated token is drawn."""

    temperature: float = 0.0
    """0: the likeliest token, always."""
    top_p: float = 1.0
    """Draw among the likeliest tokens whose probabilities reach this sum."""
    seed: int = 0
    """Of this request's own random numbers."""


@dataclass(frozen=True, slots=True)
class Grammar:
    """What the generated text must match."""

    kind: str
    """`json_schema`, `regex`, or `choices` (a JSON list of strings)."""
    text: str


GREEDY = Sampling()


# Not frozen, though nothing changes them: there is one of these for each row, and a frozen one takes 3.3 µs, not 1.0.
@dataclass(kw_only=True, slots=True, unsafe_hash=True)
class Request:
    """One prompt, with candidates to score, or with a number of tokens to generate."""

    prompt_ids: tuple[int, ...]
    num_prefix_tokens: int = 0
    """The first tokens of the prompt, which requests to come will share, too: instructions. They are kept when all that
    waits is answered; what else prompts share is found."""
    candidates: tuple[Candidate, ...] = ()
    max_tokens: int = 0
    stop_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    """Generation ends before the first of these."""
    sampling: Sampling = GREEDY
    grammar: Grammar | None = None


# As Request.
@dataclass(kw_only=True, slots=True, unsafe_hash=True)
class Completion:
    """The answer to one request."""

    logprobs: tuple[float, ...] = ()
    """For each candidate: the sum over its scored tokens of ln P(token given all before, and that a candidate's token
    follows). Those of a label set, as probabilities, sum to 1."""
    token_ids: tuple[int, ...] = ()
    """Generated tokens, without the stop token."""
    finish_reason: str = ""
    """`stop` or `length`; empty when nothing was to be generated."""
    error: str = ""
    """Why there is no answer: computing this request alone failed."""
    computed_tokens: int = field(default=0, compare=False)
    """Tokens computed because of this request and no other; depends on what was waiting beside it."""
    shared_tokens: int = field(default=0, compare=False)
    """Tokens of the prompt that were computed for others, or once for all."""


class Work(NamedTuple):
    """What a model computed."""

    tokens: int = 0
    dropped_experts: int = 0
    """Experts that tokens were routed to and a router threshold dropped, of all layers."""
    unread_tokens: int = 0
    """Of `tokens`, those whose last layer kept keys and values alone, since nothing is read there."""


class SupportsSubmit(Protocol):
    """What the flow needs of an engine."""

    busy_seconds: float
    """Time spent computing since it was opened."""

    def submit(self, requests: Sequence[Request]) -> Future[list[Completion]]:
        """Return a future of one completion per request, in order."""
        ...

    def take_work(self) -> Work:
        """Return what was computed since this was last asked, so that everything is told once."""
        ...
