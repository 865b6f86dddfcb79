"""Kimi's tokenizer, `tiktoken.model`, as a tokenizer.json: its own Python code is never run.

The file has a line a token: its bytes in base64, and its rank. BPE of the tokenizers library merges by rank in
n log n steps, where the tiktoken library takes n squared of a long piece.
"""

import base64
import binascii
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from k2model.pretokenizers import BYTE_LEVEL, KIMI, split_by
from schemas.errors import CheckpointError

_NUM_RESERVED = 256
"""Ids after the ranks that belong to control tokens, whether or not tokenizer_config.json gives them a name."""


def tokenizer_json(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tokenizer.json of the vocabulary at `path` and the tokenizer_config.json `settings`.

    Source: moonshotai/Kimi-K2-Instruct, tokenization_kimi.py. Raises: CheckpointError if the file is malformed.
    """
    ranks = _read_ranks(path)
    named = settings.get("added_tokens_decoder") or {}
    added = []
    for token_id in sorted({*range(len(ranks), len(ranks) + _NUM_RESERVED), *(int(key) for key in named)}):
        entry = named.get(str(token_id), {})
        added.append(
            {
                "id": token_id,
                "content": entry.get("content", f"<|reserved_token_{token_id}|>"),
                "special": entry.get("special", True),
                "normalized": False,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
            }
        )
    letters = _alphabet()

    def spelled(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merges = [
        (spelled(token[:cut]), spelled(token[cut:]))
        for token in sorted(ranks, key=ranks.__getitem__)
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]
    return {
        "version": "1.0",
        "added_tokens": added,
        "pre_tokenizer": split_by(KIMI),
        "decoder": BYTE_LEVEL,
        "model": {
            "type": "BPE",
            "vocab": {spelled(token): rank for token, rank in ranks.items()},
            "merges": merges,
            "ignore_merges": True,
        },
    }


def _read_ranks(path: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise CheckpointError(
                f"{path}: line {number} is not a token and its rank: {line[:60]!r}", remedy="fetch the file again"
            ) from error
    if sorted(ranks.values()) != list(range(len(ranks))) or len([t for t in ranks if len(t) == 1]) != 256:
        raise CheckpointError(
            f"{path}: {len(ranks)} tokens do not have the ranks 0 to {len(ranks) - 1}, or are not all 256 bytes",
            remedy="fetch the file again",
        )
    return ranks


def _alphabet() -> list[str]:
    """Return the letter of each byte in byte-level BPE. Source: openai/gpt-2, encoder.py `bytes_to_unicode`."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in visible]
    letters = {byte: chr(byte) for byte in visible} | {byte: chr(256 + n) for n, byte in enumerate(others)}
    return [letters[byte] for byte in range(256)]
