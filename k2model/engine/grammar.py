"""What a generated answer must match, as masks over the token that may come next. No torch.

The grammars are llguidance's (github.com/guidance-ai/llguidance): a JSON schema, a regular expression in Rust's syntax
that the whole answer matches, or a list of strings. With them, because stop strings need it too: a token's bytes.
"""

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import tokenizers
from llguidance import LLExecutor, LLMatcher, LLTokenizer, regex_to_lark

from k2model.engine.request import Grammar
from k2model.tokenizer import Tokenizer
from schemas.errors import CheckpointError, SpecError

Masks = np.ndarray[tuple[int, int], np.dtype[np.uint8]]


@dataclass(frozen=True, eq=False, slots=True)
class Vocabulary:
    """A tokenizer as the grammar library knows it: a tree of the bytes of its tokens."""

    tree: LLTokenizer
    size: int
    """Ids from here on are padding of the embedding: no token."""
    silent_ids: frozenset[int]
    """Control tokens that `Tokenizer.decode` leaves out."""

    def token_bytes(self, token_id: int) -> bytes:
        """Return what `token_id` adds to the decoded text."""
        if token_id >= self.size or token_id in self.silent_ids:
            return b""
        return self.tree.decode_bytes([token_id])

    def spell(self, text: bytes) -> list[int]:
        """Return ids, none of a control token, that decode to `text`, which may begin or end inside a character."""
        try:
            return self.tree.greedy_tokenize(text.decode())
        except UnicodeDecodeError:
            return self.tree.tokenize_bytes(text)


@dataclass(frozen=True, eq=False, slots=True)
class Matcher:
    """Where one answer stands in its grammar."""

    vocabulary: Vocabulary
    place: LLMatcher

    def accept(self, token_id: int) -> None:
        """Add a token to the answer. Raises: ValueError if the grammar has no room for it there."""
        if not self.place.consume_token(token_id):
            raise ValueError(f"token {token_id} does not match the grammar: {self.place.get_error()}")

    def count_possible(self, token_ids: Sequence[int]) -> int:
        """Return how many of `token_ids`, from the first on, the answer may go on with."""
        return self.place.validate_tokens(list(token_ids))

    def forced(self) -> list[int]:
        """Return the tokens that come next whatever is asked of a model: the masks here allow each of them alone."""
        return self.place.compute_ff_tokens()

    def is_finished(self) -> bool:
        """Return whether the answer matches and no longer one begins with it."""
        return self.place.is_stopped()


def grammar_problem(grammar: Grammar) -> str:
    """Return why `grammar` cannot be used, in a line, or nothing if it can."""
    try:
        matcher = LLMatcher(_bytes_alone(), _source(grammar), log_level=0)
    except ValueError as error:
        return str(error)
    if not matcher.is_error():
        matcher.compute_bitmask()  # tells whether any answer can begin
    if not matcher.is_error():
        return ""
    return "nothing matches it" if matcher.get_error().startswith("NoExtensionBias") else _in_a_line(matcher)


def compile_grammar(grammar: Grammar, tokenizer: Tokenizer) -> Matcher:
    """Return a matcher at the beginning of an answer; what is compiled is kept for the next one.

    Raises: SpecError if the grammar cannot be compiled; CheckpointError if the tokenizer has no stop token.
    """
    if not tokenizer.stop_ids:
        raise CheckpointError(
            "the checkpoint names no token that ends a turn, so no answer by a grammar can end",
            remedy="name it: eos_token in tokenizer_config.json, or eos_token_id in config.json",
        )
    vocabulary = vocabulary_of(tokenizer)
    return Matcher(vocabulary, _compile(grammar, vocabulary).deep_copy())


def vocabulary_of(tokenizer: Tokenizer) -> Vocabulary:
    """Return the vocabulary of `tokenizer`, built at first use: 0.4 s for 49,152 tokens."""
    return _vocabulary(tokenizer.markup, tokenizer.stop_ids)


def fill_masks(matchers: Sequence[Matcher], guesses: Sequence[Sequence[int]] | None = None) -> Masks:
    """Return [rows, 4 * ceil(size / 32)] uint8: bit i % 8 of byte i // 8 is set if token i may come next.

    Filled for all of them at once, outside Python's lock. Of control tokens only those that end a turn are ever
    allowed, and they are exactly where the answer is complete.

    Args:
        matchers: of one vocabulary; at least one.
        guesses: tokens that each one has room for. It gets a row more for each, of what may come behind it.

    Raises: ValueError if a grammar proves too complex for the library's limits.
    """
    num_words = -(-matchers[0].vocabulary.size // 32)
    alone, followed, count = [], [], 0
    for matcher, guess in zip(matchers, guesses or [()] * len(matchers), strict=True):
        if guess:
            followed.append((matcher.place, count, list(guess)))
        else:
            alone.append((matcher.place, count))
        count += 1 + len(guess)
    masks = np.zeros((count, 4 * num_words), dtype=np.uint8)
    where = (masks.ctypes.data, 4 * num_words, count)
    if alone:
        _executor().unsafe_compute_mask_ptr(alone, *where)
    if followed:
        _executor().unsafe_compute_mask_ptr_with_draft_token(followed, *where)
    for matcher in matchers:
        if matcher.place.is_error():  # the mask would then allow the answer to end
            raise ValueError(f"the grammar cannot go on: {matcher.place.get_error()}")
    return masks


def _source(grammar: Grammar) -> str:
    """Return `grammar` in the library's own notation."""
    if grammar.kind == "json_schema":
        # As json.dumps writes, which models have read most: where any white space may stand, a small one can write line
        # breaks until its tokens are spent. A schema may say otherwise in `x-guidance`.
        return LLMatcher.grammar_from_json_schema(
            grammar.text, defaults={"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
        )
    if grammar.kind == "regex":
        # \d is 0 to 9 here: by Unicode it is a digit of any script, which nobody expects. \w and \s are Unicode's.
        return LLMatcher.grammar_from_lark(f"start: /{regex_to_lark(grammar.text, use_ascii='d')}/")
    if grammar.kind == "choices":
        # One terminal, not one each: half the time for 500 choices.
        choices = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in json.loads(grammar.text))
        return LLMatcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {choices}")
    raise SpecError(f'the grammar is "{grammar.kind}", expected json_schema, regex or choices')


def _in_a_line(matcher: LLMatcher) -> str:
    """Return what the library says is wrong, without its drawing of where."""
    lines = [line.strip() for line in matcher.get_error().splitlines()]
    return next((line for line in lines if line.startswith("error:")), lines[0]).removeprefix("error: ")


@functools.lru_cache(maxsize=64)
def _compile(grammar: Grammar, vocabulary: Vocabulary) -> LLMatcher:
    """Return a matcher to copy."""
    matcher = LLMatcher(vocabulary.tree, _source(grammar), log_level=0)
    if matcher.is_error():
        what = f"{grammar.kind} {grammar.text[:80]} cannot be compiled: {_in_a_line(matcher)}"
        raise SpecError(what, remedy="simplify it")
    return matcher


@functools.lru_cache(maxsize=4)
def _vocabulary(markup: tokenizers.Tokenizer, stop_ids: tuple[int, ...]) -> Vocabulary:
    raw = json.loads(markup.to_str())
    silent_ids = frozenset(token["id"] for token in raw["added_tokens"] if token["special"])
    # The library allows an added token that is not special, such as <think>, wherever its letters are.
    raw["added_tokens"] = [{**token, "special": True} for token in raw["added_tokens"]]
    library = LLTokenizer(json.dumps(raw), eos_token=list(stop_ids) or None)
    return Vocabulary(library, library.vocab_size, silent_ids)


@functools.cache
def _bytes_alone() -> LLTokenizer:
    """Return a tokenizer of one token per byte, for checks that no checkpoint is needed for."""
    return LLTokenizer("byte")


@functools.cache
def _executor() -> LLExecutor:
    """Return the threads that fill masks: one, since the forward pass beside it needs the cores."""
    return LLExecutor(num_threads=1)
