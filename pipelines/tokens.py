"""What a job will compute, before it runs: its tokens as if each row were asked alone, and what sharing takes off.

Tokenizes the rows as the run will, a unit at a time, and shares what the engine shares; no model is opened.
"""

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from k2model.engine.candidates import candidate_tree
from k2model.engine.prefix import Segment, share
from k2model.engine.request import Request
from pipelines.annotate import Asked, SupportsPrompts, ask, row_texts
from pipelines.read import read_unit
from schemas.errors import RowError, SchemaMismatch
from schemas.runs import Plan, Unit

MAX_ROWS = 20_000
"""A job of more rows is estimated from whole units, drawn at random until they hold as many."""

_SEED = 0


@dataclass(kw_only=True, slots=True)
class Tokens:
    """Tokens of a job."""

    rows: int = 0
    """Rows read."""
    is_estimate: bool = False
    """Whether only some units were read; what follows is then scaled up to all rows."""
    rejects: Counter[str] = field(default_factory=Counter)
    """Rows that will be rejected, by error code."""
    unreadable: list[str] = field(default_factory=list)
    """Why units could not be read; their rows are not counted."""
    prompt_tokens: int = 0
    """As if each row were asked alone."""
    duplicates: int = 0
    """Taken off by prompts that occurred before in their unit."""
    instructions: int = 0
    """Taken off by instructions, which each worker process computes once; one process is assumed."""
    beginnings: int = 0
    """Taken off by what else prompts of a unit begin with alike."""
    scored: int = 0
    """Added by labels: the tokens after which one of several may follow."""
    generated: int = 0
    """Added by written answers, at most; not among `computed_tokens`."""

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens whose computation is shared."""
        return self.duplicates + self.instructions + self.beginnings

    @property
    def computed_tokens(self) -> int:
        """Tokens the model will compute before it writes."""
        return self.prompt_tokens - self.cached_tokens + self.scored

    def scaled(self, rows: int) -> "Tokens":
        """Return the same as an estimate for `rows` rows."""
        factor = rows / self.rows if self.rows else 0.0
        names = ("prompt_tokens", "duplicates", "instructions", "beginnings", "scored", "generated")
        totals = {name: round(getattr(self, name) * factor) for name in names}
        rejects = Counter({code: round(count * factor) for code, count in self.rejects.items()})
        return Tokens(rows=self.rows, is_estimate=True, rejects=rejects, unreadable=self.unreadable, **totals)


def count_tokens(plan: Plan, prompts: SupportsPrompts, *, max_rows: int = MAX_ROWS) -> Tokens:
    """Return the tokens of the job, as `count_orders` does for the planned order of its text columns."""
    return count_orders(plan, prompts, [plan.columns.text], max_rows=max_rows)[plan.columns.text]


def count_orders(
    plan: Plan, prompts: SupportsPrompts, orders: Sequence[tuple[str, ...]], *, max_rows: int = MAX_ROWS
) -> dict[tuple[str, ...], Tokens]:
    """Return the tokens of the job for each of these orders of its text columns, counted on the same rows.

    Estimated, from units drawn by a fixed seed, if all orders together have more than `max_rows` rows to tokenize.
    Memory for shared beginnings is taken to suffice, as it does but for beginnings of more than 32,768 tokens.

    Raises: StorageError.
    """
    units = _draw(plan.units, max_rows // len(orders))
    names = (plan.columns.id, *plan.columns.text)
    counts = {order: Tokens() for order in orders}
    roots: dict[tuple[str, ...], set[tuple[int, ...]]] = {order: set() for order in orders}
    for unit in units:
        try:
            table = read_unit(unit, columns=names)
        except SchemaMismatch as error:
            for tokens in counts.values():
                tokens.unreadable.append(error.message)
            continue
        for order, tokens in counts.items():
            tokens.rows += table.num_rows
            texts = row_texts(table, replace(plan.columns, text=order))
            _add_unit(tokens, ask(texts, prompts), roots[order])
    if len(units) < len(plan.units):
        counts = {order: tokens.scaled(plan.rows) for order, tokens in counts.items()}
    for order, tokens in counts.items():
        tokens.instructions -= sum(map(len, roots[order]))  # the first time each is computed
    return counts


def _draw(units: Sequence[Unit], max_rows: int) -> list[Unit]:
    """Return all units, or as many, drawn at random, as hold `max_rows` rows."""
    if sum(unit.rows for unit in units) <= max_rows:
        return list(units)
    drawn: list[Unit] = []
    rows = 0
    for unit in random.Random(_SEED).sample(units, len(units)):
        if rows >= max_rows:
            break
        drawn.append(unit)
        rows += unit.rows
    return drawn


def _add_unit(tokens: Tokens, fates: Iterable[Asked | RowError], roots: set[tuple[int, ...]]) -> None:
    """Add the rows of one unit to `tokens`, and their instructions to `roots`."""
    distinct: set[Request] = set()
    for fate in fates:
        if isinstance(fate, RowError):
            tokens.rejects[fate.code] += 1
            continue
        for request in fate.requests:
            tokens.prompt_tokens += len(request.prompt_ids)
            if request in distinct:
                tokens.duplicates += len(request.prompt_ids)
        distinct.update(fate.requests)
    by_root: dict[tuple[int, ...], list[Request]] = {}
    for request in distinct:
        by_root.setdefault(request.prompt_ids[: request.num_prefix_tokens], []).append(request)
        tokens.scored += len(candidate_tree(request.candidates).branches.token_ids) if request.candidates else 0
        tokens.generated += request.max_tokens
    for root_ids, requests in by_root.items():
        roots.add(root_ids)
        tokens.instructions += len(requests) * len(root_ids)
        tokens.beginnings += _num_shared([request.prompt_ids for request in requests], Segment(root_ids))


def _num_shared(prompt_ids: Sequence[tuple[int, ...]], root: Segment) -> int:
    """Return how many tokens behind `root` need not be computed, since they are for another prompt."""
    parents = share(prompt_ids, root)
    segments = {segment for parent in parents if parent is not None for segment in parent.chain()} - {root}
    covered = sum(parent.end - root.end for parent in parents if parent is not None)
    return covered - sum(len(segment.token_ids) for segment in segments)
