"""Guesses how a greedy answer goes on: as the same three tokens went on before, in its own prompt or answer.

Guessed tokens are computed beside each other in one step and kept as far as the model agrees, so a wrong guess costs
its computing and changes no answer. Source: prompt lookup decoding, github.com/apoorvumang/prompt-lookup-decoding.
"""

from collections.abc import Sequence

_MATCH = 3
"""Tokens that must be the same. Replayed over SmolLM2's answers to tickets, 8 at once, at the cost below: where a
sentence is copied 1.38 times the tokens/s, summaries 1.08, free text 0.98; by two tokens 1.32, 1.03 and 0.95."""

_FIXED_COST = 4
"""What a step is taken to cost besides its tokens, in tokens. SmolLM2 measures 17 (133 and 7.6 ms, two AVX2 cores), but
at 16 free text of 8 answers, 22 of 35 guesses right, ran 9 % slower. At 4 one among 8 stops at its first mistake."""


class Guesser:
    """Of one answer: what followed what, and how often guesses were right."""

    def __init__(self, prompt_ids: Sequence[int]) -> None:
        self._ids = list(prompt_ids)
        self._num_prompt_tokens = len(prompt_ids)
        self._followers: dict[tuple[int, ...], int] = {}
        """Tokens to the place behind where they last stood."""
        self._num_known = _MATCH
        self._right, self._tried = 3, 4  # as if three of four had been right before the first one

    def guess(self, output_ids: Sequence[int], limit: int, num_tokens: int) -> list[int]:
        """Return tokens that may follow `output_ids`; none where computing them is not worth it.

        A step of n tokens costs as much as n + `_FIXED_COST`, so another one pays if it is right more often than
        n / (n + `_FIXED_COST`).

        Args:
            output_ids: the answer so far.
            limit: tokens at most.
            num_tokens: of the step, without these.
        """
        chance = share = self._right / self._tried
        if share * (num_tokens + _FIXED_COST) <= num_tokens:
            return []
        ids = self._ids
        ids += output_ids[len(ids) - self._num_prompt_tokens :]
        for place in range(self._num_known, len(ids)):
            self._followers[tuple(ids[place - _MATCH : place])] = place
        self._num_known = max(self._num_known, len(ids))
        start = self._followers.get(tuple(ids[-_MATCH:]))
        if start is None:
            return []
        count = 0
        while count < min(limit, len(ids) - start) and chance * (num_tokens + _FIXED_COST) > num_tokens:
            count, num_tokens, chance = count + 1, num_tokens + 1, chance * share
        return ids[start : start + count]

    def learn(self, num_guessed: int, num_right: int) -> None:
        """Note how many of the tokens guessed together were right; those behind a wrong one were not tried."""
        self._right += num_right
        self._tried += num_right + (num_right < num_guessed)


def agreed(guess: Sequence[int], token_ids: Sequence[int]) -> list[int]:
    """Return the tokens that are right: those guessed right, from the first on, and the one drawn behind them.

    Args:
        guess: the tokens that were fed.
        token_ids: what was drawn in place of the first of them, and behind each.
    """
    count = 0
    while count < len(guess) and guess[count] == token_ids[count]:
        count += 1
    return list(token_ids[: count + 1])
