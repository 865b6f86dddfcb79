"""How byte-level BPE vocabularies split text before they merge, where a checkpoint names its way but does not hold it.

Every pattern takes time linear in the text: no alternative scans far and then gives up what it scanned.
"""

import json
from typing import Any

import tokenizers

from schemas.errors import CheckpointError

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD_END = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"

KIMI = "|".join(
    [
        r"[\p{Han}]+",
        rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}&&[^\p{{Han}}]]*[{_LOWER}&&[^\p{{Han}}]]+{_CONTRACTION}?",
        rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}&&[^\p{{Han}}]]+[{_LOWER}&&[^\p{{Han}}]]*{_CONTRACTION}?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        _WORD_END,
    ]
)
"""Source: moonshotai/Kimi-K2-Instruct, `pat_str` of tokenization_kimi.py."""

_O200K = "|".join(
    [
        rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+{_CONTRACTION}?",
        rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*{_CONTRACTION}?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        _WORD_END,
    ]
)
"""Source: openai/tiktoken, `o200k_base`."""


def _cl100k(digits: str) -> str:
    """Source: meta-llama/llama3 `pat_str` (three digits), Qwen/Qwen2 tokenizer.json (one)."""
    return rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_WORD_END}"


_SPLITS = {"llama-bpe": _cl100k(r"\p{N}{1,3}"), "qwen2": _cl100k(r"\p{N}"), "gpt-4o": _O200K, "kimi-k2": KIMI}
_WHOLE_PIECES_FIRST = ("llama-bpe", "gpt-4o", "kimi-k2")
_SPLIT_DIGITS = ("smollm", "starcoder", "refact", "command-r")
_DIGITS = tuple({"type": "Digits", "individual_digits": each} for each in (True, False))
_GPT2 = ("gpt-2", "default")

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
"""GPT-2's own pattern, and its alphabet of a letter a byte."""


def split_by(pattern: str) -> dict[str, Any]:
    """Return the pre-tokenizer, as tokenizer.json spells it, that splits by `pattern` and then into bytes."""
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, {**BYTE_LEVEL, "use_regex": False}]}


def pre_tokenizer(name: str, where: str) -> tuple[dict[str, Any], bool]:
    """Return the pre-tokenizer that llama.cpp calls `name`, and whether a piece in the vocabulary is left whole.

    Source: llama.cpp, llama-vocab.cpp. Raises: CheckpointError for a name that is not known here.
    """
    if name in _SPLITS:
        return split_by(_SPLITS[name]), name in _WHOLE_PIECES_FIRST
    if name in _GPT2:
        return BYTE_LEVEL, False
    if name in _SPLIT_DIGITS:
        return {"type": "Sequence", "pretokenizers": [_DIGITS[0], BYTE_LEVEL]}, False
    raise CheckpointError(
        f'{where}: the pre-tokenizer "{name}" is not known here',
        remedy="use the safetensors checkpoint, which has a tokenizer.json",
    )


def parts_at_spaces(tokenizer: tokenizers.Tokenizer) -> bool:
    """Return whether the ids of a text are those of its parts, cut before every space behind a visible character.

    They are where no piece that is merged by itself, by any alternative of a pattern, has a visible character and
    then a space. Of normalizers, NFC changes no space and joins nothing to one.
    """
    normalizer = _spelled(tokenizer.normalizer)
    if normalizer not in (None, {"type": "NFC"}, {"type": "Sequence", "normalizers": []}):
        return False
    spelled = _spelled(tokenizer.pre_tokenizer)
    steps = spelled["pretokenizers"] if spelled and spelled["type"] == "Sequence" else [spelled]
    known = [split_by(pattern)["pretokenizers"][0] for pattern in (*_SPLITS.values(), KIMI)]
    splits = [step for step in steps if step in known or step == BYTE_LEVEL]
    others = [step for step in steps if step not in splits]
    return bool(splits) and all(step in ({**BYTE_LEVEL, "use_regex": False}, *_DIGITS) for step in others)


def _spelled(part: Any) -> Any:
    """Return a part of a tokenizer as tokenizer.json spells it."""
    return None if part is None else json.loads(part.__getstate__())
