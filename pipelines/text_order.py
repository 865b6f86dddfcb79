"""The order of a ticket's text columns in its prompt: what stands first is computed once for all rows that begin alike.

One order for all rows of a job, chosen when it is planned. GGR (arXiv 2403.05821), whose finding this is, chooses anew
for each row by its neighbours; then the same row would be asked otherwise beside others.
"""

from collections.abc import Mapping, Sequence
from itertools import permutations

from pipelines.tokens import Tokens

Order = tuple[str, ...]

MAX_PERMUTED = 4
"""Columns of which every order is tried: 24."""


def orders_of(given: Sequence[str]) -> list[Order]:
    """Return the orders that are tried, the given one first: all; of many columns, those that move one to the front."""
    if len(given) <= MAX_PERMUTED:
        return list(permutations(given))
    return [(name, *given[:place], *given[place + 1 :]) for place, name in enumerate(given)]


def fewest_tokens(counts: Mapping[Order, Tokens]) -> Order:
    """Return the order that fewest tokens are computed for, of equal ones the first.

    One that more rows are rejected in, since tokens merge otherwise and the prompt is over the limit, never is.
    """
    return min(counts, key=lambda order: (counts[order].rejects.total(), counts[order].computed_tokens))
