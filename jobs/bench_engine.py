"""The engine's speed on fixed works: token ids in, answers out, with what is shared computed inside the clock.

Works `1` and `2` are those that peers were measured by, and the line is the one that they print. The others show what
offline work brings: many labels, long tickets, many instructions, answers that match a schema. Prompts come from files,
or are made of the sample tickets.
"""

import itertools
import json
import os
import random
import resource
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from k2model.engine.engine import Engine
from k2model.engine.request import Candidate, Completion, Grammar, Request
from k2model.formats.checkpoint import DEFAULT_CHECKPOINT
from k2model.tokenizer import Tokenizer
from pipelines.prompts import Prompts
from schemas.errors import K2Error, SpecError
from schemas.runs import Task

WORKS = {"1": 512, "2": 128, "labels77": 512, "long": 32, "mixed": 512, "json": 64}
"""Each work, and of how many tickets it is."""

_GENERATED_TOKENS = 32
_JSON_TOKENS = 64
_LONG_TOKENS = 1500
_NUM_INSTRUCTIONS = 8
_WARM_UP_TICKETS = 2
_QUIET_S = 45.0
"""The longest wait for other processes to be quiet before a timed pass."""
_QUIET_CORES = 0.25
_PROC_STAT = Path("/proc/stat")

_TASK = Task(
    name="team",
    kind="choose",
    labels={
        "access": "passwords, codes and locked accounts",
        "billing": "invoices, cards and amounts charged",
        "cancel": "the end of a plan or an order",
        "defect": "errors, crashes and slow pages",
        "feature": "wishes and ideas",
        "parcel": "what was sent: late, lost, broken or wrong",
        "refund": "money back",
        "other": "everything else, thanks included",
    },
    guidelines="Choose the team that must act first. If the customer names several problems, the one that costs the "
    "most counts. Judge by what is asked, not by how it is asked.",
)
_SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {
            "team": {"enum": list(_TASK.labels)},
            "urgent": {"type": "boolean"},
            "summary": {"type": "string", "maxLength": 120},
        },
        "required": ["team", "urgent", "summary"],
        "additionalProperties": False,
    }
)


@dataclass(frozen=True, slots=True)
class Ticket:
    """One prompt: instructions, and what is the ticket's own."""

    prefix_ids: tuple[int, ...]
    body_ids: tuple[int, ...]


@dataclass(slots=True)
class _Timed:
    """Requests, and the timed passes over them."""

    requests: list[Request]
    seconds: list[float] = field(default_factory=list)
    foreign_cores: list[float] = field(default_factory=list)
    """Cores that other processes used meanwhile; empty where /proc does not tell."""
    completions: list[Completion] = field(default_factory=list)

    def figures(self, tickets: Sequence[Ticket]) -> dict[str, Any]:
        """Return seconds and rates; tokens are those generated, or the tickets' own where labels are scored."""
        tokens = sum(len(c.token_ids) for c in self.completions) or sum(len(t.body_ids) for t in tickets)
        median, best = statistics.median(self.seconds), min(self.seconds)
        return {
            "seconds": [round(s, 3) for s in self.seconds],
            "tickets_per_s": round(len(tickets) / median, 2),
            "tickets_per_s_best": round(len(tickets) / best, 2),
            "tokens_per_s": round(tokens / median, 1),
            "tokens_per_s_best": round(tokens / best, 1),
            "foreign_cores": self.foreign_cores,
        }


def engine(
    checkpoint: str = DEFAULT_CHECKPOINT,
    *,
    work: str = "1",
    tickets: str = "",
    labels: str = "",
    limit: int = 0,
    rounds: int = 3,
    precision: str = "int8",
) -> dict[str, Any]:
    """Return tickets and tokens per second of one work, in the fields of the peers' line.

    Before the clock runs, two tickets are computed. A timed pass begins without any key or value of the one before,
    once other processes are quiet or 45 s have passed. Two works are compared with another one, in turn, as
    `ratio`, their throughput over its: 77 labels with 2, and answers of a schema with as many free tokens.

    Args:
        checkpoint: what to run.
        work: of `WORKS`. `1`, `labels77`, `long` and `mixed` score labels; `2` generates 32 tokens greedily, `json` up
            to 64 that match a schema.
        tickets: one JSON object a line with `prefix_ids` and `body_ids`; without it, 512 are made of the samples.
        labels: JSON object of label to token id; comes with `tickets`.
        limit: tickets; 0 for the work's own number.
        rounds: timed passes.
        precision: of what is computed.

    Raises: SpecError for files that do not hold this, or prompts longer than the model's context. K2Error if a request
        cannot be computed.
    """
    if bool(tickets) != bool(labels):
        raise SpecError(f"bench engine: {tickets=} but {labels=}", remedy="give both --tickets and --labels, or none")
    given = _read_tickets(tickets, labels) if tickets else None
    opened = Engine.open(checkpoint, precision=precision)
    try:
        every, label_ids = given or _sample_tickets(opened.tokenizer, opened.max_position_embeddings)
        chosen = _chosen(work, every, limit or WORKS[work])
        passes = _passes(opened, work, chosen, label_ids)
        for _, one in itertools.product(range(rounds), passes):
            _pass(opened, one)
    finally:
        opened.close()
    facts = {
        "engine": f"k2batch-{precision}",
        "work": int(work) if work.isdigit() else work,
        "tickets": len(chosen),
        **passes[0].figures(chosen),
        "peak_rss_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / _BYTES_OF_MIB),
        "checkpoint": checkpoint,
    }
    if len(passes) > 1:
        ratios = [b / a for a, b in zip(passes[0].seconds, passes[1].seconds, strict=True)]
        facts |= {"against": passes[1].figures(chosen), "ratio": round(statistics.median(ratios), 3)}
    return facts


_BYTES_OF_MIB = 2**20 if sys.platform == "darwin" else 2**10
"""In units of `ru_maxrss`: bytes on macOS, kilobytes on Linux."""


def as_text(facts: dict[str, Any]) -> str:
    """Return a measurement as the line that the peers print."""
    return f"JSON {json.dumps(facts)}"


def _chosen(work: str, every: Sequence[Ticket], n: int) -> list[Ticket]:
    """Return the `n` tickets of a work, or as many as there are."""
    if work == "long":
        return [_long(every, index) for index in range(min(n, len(every)))]
    if work == "mixed":
        return [replace(t, prefix_ids=_turned(t.prefix_ids, i % _NUM_INSTRUCTIONS)) for i, t in enumerate(every[:n])]
    return list(every[:n])


def _long(every: Sequence[Ticket], index: int) -> Ticket:
    """Return ticket `index` continued by those that follow it, to 1,500 tokens or a few more."""
    body: list[int] = []
    while len(body) < _LONG_TOKENS:
        body += every[index % len(every)].body_ids
        index += 1
    return Ticket(every[0].prefix_ids, tuple(body))


def _turned(ids: tuple[int, ...], number: int) -> tuple[int, ...]:
    """Return instructions as long as `ids` that share no beginning with those of another number."""
    start = number * len(ids) // _NUM_INSTRUCTIONS
    return ids[start:] + ids[:start]


def _passes(opened: Engine, work: str, tickets: Sequence[Ticket], label_ids: Sequence[int]) -> list[_Timed]:
    """Return the requests of a work, and after them those it is compared with, warmed up."""
    # `num_prefix_tokens` would keep the instructions from one pass to the next, out of the clock. That these prompts
    # share them, the engine finds by itself.
    asked = [Request(prompt_ids=ticket.prefix_ids + ticket.body_ids, max_tokens=1) for ticket in tickets]
    vocab_size = opened.decoder.config.vocab_size
    if work == "2":
        sets = [[replace(request, max_tokens=_GENERATED_TOKENS) for request in asked]]
    elif work == "json":
        grammar = Grammar("json_schema", _SCHEMA)
        bound = [replace(request, max_tokens=_JSON_TOKENS, grammar=grammar) for request in asked]
        lengths = [len(completion.token_ids) for completion in _compute(opened, bound)]
        free = [replace(request, max_tokens=length) for request, length in zip(asked, lengths, strict=True)]
        sets = [bound, free]
    elif work == "labels77":
        labels = labels77(vocab_size)
        sets = [_scored(asked, labels), _scored(asked, labels[:2])]
    else:
        sets = [_scored(asked, [Candidate((token_id,), 1) for token_id in label_ids])]
    for requests in sets:
        _compute(opened, requests[:_WARM_UP_TICKETS])
    return [_Timed(requests) for requests in sets]


def _scored(asked: Sequence[Request], candidates: Sequence[Candidate]) -> list[Request]:
    return [replace(request, candidates=tuple(candidates), max_tokens=0) for request in asked]


def labels77(vocab_size: int) -> list[Candidate]:
    """Return 77 labels of 1 to 4 tokens, drawn from `vocab_size` ids, that share first words as names of intents do.

    Each ends in a token of its own, so that none is the beginning of another one.
    """
    ids = random.Random(77).sample(range(vocab_size), 77 + 12)
    words, ends = ids[:12], ids[12:]
    labels = [(*(words[(i // 4 + 5 * k) % 12] for k in range(i % 4)), end) for i, end in enumerate(ends)]
    return [Candidate(token_ids, len(token_ids)) for token_ids in labels]


def _compute(opened: Engine, requests: Sequence[Request]) -> list[Completion]:
    """Return the answers. Raises: SpecError if one is too long; K2Error if one failed."""
    try:
        completions = opened.submit(requests).result()
    except ValueError as error:
        raise SpecError(f"bench engine: {error}", remedy="choose another --work or --checkpoint") from error
    failure = next((completion.error for completion in completions if completion.error), None)
    if failure is not None:
        raise K2Error(
            f"bench engine: a request failed: {failure}", remedy="are the ids of this checkpoint's tokenizer?"
        )
    return completions


def _pass(opened: Engine, timed: _Timed) -> None:
    """Compute all requests once, and note how long it took."""
    _wait_for_quiet()
    before, start = _foreign_s(), time.perf_counter()
    timed.completions = _compute(opened, timed.requests)
    seconds = time.perf_counter() - start
    after = _foreign_s()
    timed.seconds.append(seconds)
    if before is not None and after is not None:
        timed.foreign_cores.append(round(max(0.0, after - before) / seconds, 2))


def _wait_for_quiet() -> None:
    """Wait until other processes use less than a quarter of a core, or for `_QUIET_S`."""
    stop = time.monotonic() + _QUIET_S
    while time.monotonic() < stop:
        before = _foreign_s()
        time.sleep(1)
        after = _foreign_s()
        if before is None or after is None or after - before < _QUIET_CORES:
            return


def _foreign_s() -> float | None:
    """Return the processor seconds that all other processes have used since the machine started; None if not Linux."""
    try:
        fields = [int(word) for word in _PROC_STAT.read_text().split("\n", 1)[0].split()[1:9]]
    except OSError:
        return None
    idle = fields[3] + fields[4]
    return (sum(fields) - idle) / os.sysconf("SC_CLK_TCK") - time.process_time()


def _read_tickets(tickets: str, labels: str) -> tuple[list[Ticket], list[int]]:
    """Return the prompts and the label tokens of two files. Raises: SpecError that names the line."""
    where = tickets
    try:
        rows = []
        for number, line in enumerate(Path(tickets).read_text(encoding="utf-8").splitlines(), 1):
            where = f"{tickets} line {number}"
            row = json.loads(line)
            rows.append(Ticket(tuple(map(int, row["prefix_ids"])), tuple(map(int, row["body_ids"]))))
        where = labels
        label_ids = [int(token_id) for token_id in json.loads(Path(labels).read_text(encoding="utf-8")).values()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        remedy = "tickets: a JSON object a line with prefix_ids and body_ids; labels: an object of label to token id"
        raise SpecError(f"{where}: {type(error).__name__}: {error}", remedy=remedy) from error
    if not rows or not label_ids or not all(row.body_ids for row in rows):
        raise SpecError(f"{tickets}, {labels}: no ticket, an empty body, or no label", remedy="give at least one each")
    return rows, label_ids


def _sample_tickets(tokenizer: Tokenizer, max_prompt_tokens: int) -> tuple[list[Ticket], list[int]]:
    """Return 512 prompts of one instruction and some 80 tokens each, and the first tokens of eight labels.

    A ticket is sample tickets one after the other, cut to a length drawn from a lognormal distribution: 16 to 400
    tokens. The same checkpoint gets the same prompts.
    """
    rng = random.Random(7)
    texts = _sample_texts()
    prompts = Prompts([_TASK], tokenizer, max_prompt_tokens)
    made: list[Ticket] = []
    for _ in range(512):
        length = round(min(400.0, max(16.0, rng.lognormvariate(4.3, 0.6))))
        ids: list[int] = []
        while len(ids) < length:
            ids += tokenizer.encode(f"{rng.choice(texts)} ")
        (request,) = prompts.requests(tokenizer.decode(ids[:length]))
        cut = request.num_prefix_tokens
        made.append(Ticket(request.prompt_ids[:cut], request.prompt_ids[cut:]))
    return made, list(dict.fromkeys(candidate.token_ids[0] for candidate in request.candidates))


def _sample_texts() -> list[str]:
    """Return the clean texts of the support samples, each once."""
    found: list[str] = []
    for path in sorted((Path(__file__).parent / "samples").glob("support-*.parquet")):
        column = pq.read_table(path, columns=["body"])["body"].cast("binary").to_pylist()
        found += [value.decode(errors="replace") for value in column if value]
    return [text for text in dict.fromkeys(found) if text.isprintable() and 20 < len(text) < 300]
