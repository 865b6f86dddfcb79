"""Router thresholds for a job: how many experts its own tickets can do without, at a stated agreement."""

import json
import math
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jobs.run import plan_job
from jobs.spec import JobSpec
from k2model.compress.sparsity import SHARES_TRIED, Routing, Search, flops_per_token, watched, with_thresholds
from k2model.decoder.model import Decoder
from k2model.engine.engine import Engine, load
from k2model.engine.request import Completion, Request
from k2model.formats.checkpoint import check_router_thresholds, open_checkpoint
from k2model.tokenizer import Tokenizer
from pipelines.annotate import ask, row_texts
from pipelines.prompts import Prompts
from pipelines.read import read_unit
from schemas.errors import K2Error, RowError, SpecError
from schemas.runs import Plan

_UNITS_READ = 8
"""Units that tickets are drawn from, if they have enough."""

_STEPS_BACK = 4
"""Shares that held-back tickets judge, each half of the one before, until nothing is dropped."""

_RESAMPLES = 2000

Asked = tuple[Request, ...]
"""The requests of one ticket."""


@dataclass(frozen=True, slots=True)
class _Answer:
    """What the model said to one ticket."""

    given: tuple[object, ...]
    """The labels of every task, and the first token of every generated text."""
    completions: tuple[Completion, ...]


@dataclass(slots=True)
class _Model:
    """Asks tickets of a decoder, with any thresholds."""

    decoder: Decoder
    tokenizer: Tokenizer
    prompts: Prompts
    plan: Plan

    def ask(self, tickets: Sequence[Asked], decoder: Decoder) -> list[_Answer]:
        """Return the answer to each ticket. Raises: K2Error if one cannot be computed."""
        engine = Engine(decoder, self.tokenizer, "sparsifying")
        try:
            self.prompts.calibrate(engine)
            completions = iter(engine.submit([request for asked in tickets for request in asked]).result())
        finally:
            engine.close()
        return [self._answer(asked, tuple(next(completions) for _ in asked)) for asked in tickets]

    def _answer(self, asked: Asked, completions: tuple[Completion, ...]) -> _Answer:
        if error := next((completion.error for completion in completions if completion.error), ""):
            raise K2Error(f"the model could not compute a ticket: {error}", remedy="run k2batch doctor")
        columns = self.prompts.columns_of([completions])
        suffixes = {"choose": "label", "choose_many": "labels"}
        labels = [columns[f"{t.name}_{suffixes[t.kind]}"][0].as_py() for t in self.plan.tasks if t.kind in suffixes]
        firsts = [c.token_ids[:1] for r, c in zip(asked, completions, strict=True) if r.max_tokens]
        return _Answer((*labels, *firsts), completions)


def sparsify(
    spec: JobSpec, *, agreement: float, rows: int, say: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Return the thresholds of every layer, and what they save and change on tickets they were not chosen on.

    Half of the tickets choose: at most as many passes over them as layers with experts, and 9. The other half is held
    back and judges, again with less dropped if it agrees less than asked: 2 to 6 passes. After such a step back it has
    had a part in the choice, and its figure flatters a little.

    Args:
        spec: the job, whose model has experts.
        agreement: share of the held-back tickets that get the labels, or the first generated token, of all experts.
        rows: tickets drawn, at random, from the job's input.
        say: takes each line of progress.

    Raises: SpecError if the model has no experts or there are too few tickets; as `plan_job` and `Engine.open`.
    """
    config = open_checkpoint(spec.checkpoint).config()
    check_router_thresholds(config, spec.checkpoint, config.num_hidden_layers)
    plan = plan_job(replace(spec, router_thresholds=()))
    decoder, tokenizer = load(spec.checkpoint, spec.precision)
    prompts = Prompts(plan.tasks, tokenizer, min(plan.max_prompt_tokens, config.max_position_embeddings))
    tickets = _draw(plan, prompts, rows)
    model, tuning, held = _Model(decoder, tokenizer, prompts, plan), tickets[::2], tickets[1::2]
    say(f"{len(tuning)} tickets to choose with, {len(held)} held back, {sum(config.is_moe)} layers with experts")
    search = _search(model, tuning)
    sensitivities = search.sensitivities()
    share = search.best_share(agreement, sensitivities)
    say(f"{share:.0%} of the slots that can be dropped, by the first half")
    before_decoder, before = watched(decoder)
    expected = model.ask(held, before_decoder)
    for share in (*(share / 2**step for step in range(_STEPS_BACK)), 0.0):
        thresholds = search.at_share(share, sensitivities)
        after_decoder, after = watched(with_thresholds(decoder, thresholds))
        same = _same(expected, model.ask(held, after_decoder))
        if sum(same) >= agreement * len(held):
            break
        say(f"{share:.1%} dropped, held-back tickets agree to {sum(same) / len(held):.1%}: that is too few")
    facts = _savings(decoder, before, after)
    return {
        "checkpoint": spec.checkpoint,
        "precision": spec.precision,
        "thresholds": list(thresholds),
        "agreement_wanted": agreement,
        "agreement": round(sum(same) / len(held), 4),
        "agreement_interval": bootstrap(same),
        "held_back_tickets": len(held),
        "tuning_tickets": len(tuning),
        "tuning_passes_at_most": len(before) + SHARES_TRIED + 2,
        "share_of_droppable_slots": round(share, 4),
        **facts,
    }


def write(facts: dict[str, Any], path: str) -> None:
    """Write what `[model] router_thresholds` reads."""
    Path(path).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def as_text(facts: dict[str, Any]) -> str:
    """Return the result for people."""
    low, high = facts["agreement_interval"]
    before, after = facts["experts_per_token"]
    return "\n".join(
        [
            f"experts per token and layer  {before:.2f} -> {after:.2f}",
            *(
                f"{name:<28} {old:,.0f} -> {new:,.0f} ({1 - new / old:.1%} saved)"
                for name, (old, new) in (
                    ("FLOPs per token, experts", facts["experts_flops_per_token"]),
                    ("FLOPs per token, all linears", facts["model_flops_per_token"]),
                )
            ),
            f"same answer on held-back tickets  {facts['agreement']:.1%} of {facts['held_back_tickets']}"
            f" (95 % interval {low:.1%} to {high:.1%}; asked for {facts['agreement_wanted']:.1%})",
        ]
    )


def bootstrap(same: Sequence[bool]) -> list[float]:
    """Return the 95 % interval of the share of `same`, by resampling; where none differs, of what may still be so.

    Resampling rows that all agree gives nothing but agreement; then the low end is the share at which seeing no
    difference has a chance of 5 %.
    """
    count, draw = len(same), random.Random(0)
    if all(same):
        return [round(0.05 ** (1 / count), 4), 1.0]
    shares = sorted(sum(draw.choices(same, k=count)) / count for _ in range(_RESAMPLES))
    return [round(shares[int(_RESAMPLES * end)], 4) for end in (0.025, 0.975)]


def _search(model: _Model, tuning: Sequence[Asked]) -> Search:
    whole, routings = watched(model.decoder)
    expected = model.ask(tuning, whole)

    def ask(thresholds: tuple[float, ...]) -> list[_Answer]:
        return model.ask(tuning, with_thresholds(model.decoder, thresholds))

    return Search(
        num_layers=len(model.decoder.layers),
        routings=routings,
        loss=lambda thresholds: _loss(expected, ask(thresholds)),
        agreement=lambda thresholds: sum(_same(expected, ask(thresholds))) / len(tuning),
    )


def _draw(plan: Plan, prompts: Prompts, rows: int) -> list[Asked]:
    """Return the requests of `rows` different tickets that can be asked, or of as many as there are."""
    draw, pool = random.Random(0), dict[Asked, None]()
    for number, unit in enumerate(draw.sample(plan.units, len(plan.units))):
        if number >= _UNITS_READ and len(pool) >= rows:
            break
        for fate in ask(row_texts(read_unit(unit), plan.columns), prompts):
            if not isinstance(fate, RowError):
                # The first token is all that is compared.
                pool[tuple(replace(r, max_tokens=1) if r.max_tokens else r for r in fate.requests)] = None
    if len(pool) < 2:
        raise SpecError(f"{plan.job}: fewer than two tickets can be annotated", remedy="give more [input] urls")
    return draw.sample(list(pool), min(rows, len(pool)))


def _same(expected: Sequence[_Answer], answers: Sequence[_Answer]) -> list[bool]:
    return [a.given == b.given for a, b in zip(expected, answers, strict=True)]


def _loss(expected: Sequence[_Answer], answers: Sequence[_Answer]) -> float:
    """Return the mean divergence of the candidates' probabilities in nats; a text that begins otherwise counts 1."""
    pairs = [
        pair for a, b in zip(expected, answers, strict=True) for pair in zip(a.completions, b.completions, strict=True)
    ]
    return sum(_distance(a, b) for a, b in pairs) / len(pairs)


def _distance(expected: Completion, other: Completion) -> float:
    if not expected.logprobs:
        return float(expected.token_ids[:1] != other.token_ids[:1])
    p, q = _normalized(expected.logprobs), _normalized(other.logprobs)
    return sum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True))


def _normalized(logprobs: Sequence[float]) -> list[float]:
    most = max(logprobs)
    total = most + math.log(sum(math.exp(value - most) for value in logprobs))
    return [value - total for value in logprobs]


def _savings(decoder: Decoder, before: dict[int, Routing], after: dict[int, Routing]) -> dict[str, Any]:
    # Of each layer by itself: the last one has fewer tokens, those that are read.
    used = [statistics.fmean(r.slots / r.tokens for r in side.values()) for side in (before, after)]
    flops = [flops_per_token(decoder.config, side) for side in (before, after)]
    return {
        "experts_per_token": [round(value, 3) for value in used],
        **{f"{part}_flops_per_token": [round(side[part]) for side in flops] for part in ("experts", "model")},
    }
