"""Continuations of one prompt, computed beside each other. No torch."""

from typing import NamedTuple


class Branches(NamedTuple):
    """Tokens that continue a prompt in several ways at once, a tree."""

    token_ids: tuple[int, ...] = ()
    depths: tuple[int, ...] = ()
    """Tokens between the end of the prompt and each branch: its position is the prompt's length plus this."""
    ancestors: tuple[frozenset[int], ...] = ()
    """The branches each one sees, itself included."""
