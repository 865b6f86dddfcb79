"""Rows to train tiny models on: the label is the letter that stands most often in the ticket."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from k2model.compress.examples import Batch, Example
from k2model.engine.request import Candidate

PREFIX = tuple(range(30, 50))
CANDIDATES = (Candidate((10, 11, 12), 3), Candidate((10, 11, 13, 5), 3), Candidate((20,), 1), Candidate((10, 30), 2))
"""A root, a fork behind one token and one behind two; of the second, the first token is given."""


def example(rng: random.Random, *, labelled: bool = True, prefix: Sequence[int] = PREFIX) -> Example:
    truth = rng.randrange(len(CANDIDATES))
    body = [rng.randrange(60, 64) for _ in range(rng.randint(1, 40))] + [60 + truth] * rng.randint(3, 9)
    rng.shuffle(body)
    return Example((*prefix, *body, 7), len(prefix), CANDIDATES, (truth,) if labelled else None)


def batch(count: int, seed: int = 0, *, labelled: bool = True, prefix: Sequence[int] = PREFIX) -> Batch:
    rng = random.Random(seed)
    return Batch(tuple(example(rng, labelled=labelled, prefix=prefix) for _ in range(count)))


@dataclass(frozen=True)
class Rows:
    """Batches made when they are asked for, each from its number alone."""

    rows: int = 6
    per_epoch: int = 3
    validated: int = 1
    labelled: bool = True
    seed: int = 0

    @property
    def digest(self) -> str:
        return repr(self)

    def epoch(self, number: int) -> Iterator[Batch]:
        for index in range(self.per_epoch):
            yield batch(self.rows, hash((self.seed, number, index)), labelled=self.labelled)

    def validation(self) -> Sequence[Batch]:
        return [batch(40, -1 - index, labelled=self.labelled) for index in range(self.validated)]
