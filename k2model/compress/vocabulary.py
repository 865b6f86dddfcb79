"""A vocabulary cut down to the tokens that a task needs, with the tokenizer that goes with it.

Kept are all bytes, all control tokens, what the chat template says, the tokens of the answers, and those that occur in
prompts. A kept token brings every merge that can make it, and so the tokens it can be made of. Merges keep their order,
so a text whose tokens are all kept is merged as before, step by step, to the same tokens. Any other text takes more
tokens, down to bytes, and none is unknown.

Why the same: byte pair encoding takes the first merge of its list that applies anywhere. Each merge that the old
tokenizer makes of the text goes into one of its tokens, so it is kept; and the new one has no merge that the old has
not.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers
from torch import Tensor

from k2model.compress.convert import hub_config
from k2model.compress.examples import TrainingData
from k2model.compress.recipe import copy_tokenizer
from k2model.config import ModelConfig, text_config
from k2model.formats.checkpoint import open_checkpoint
from k2model.formats.export import ShardWriter, hub_name
from k2model.formats.finished import finished_folder
from k2model.formats.weights import DTYPES, TensorInfo, Weights
from k2model.parameters import parameters
from k2model.tiktoken import tokenizer_json
from k2model.tokenizer import Tokenizer
from schemas.errors import CheckpointError, SpecError

_COMPARED = 500
"""Prompts that are tokenized before and after."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trim:
    """Which tokens stay."""

    min_count: int = 1
    """Times that a token must occur in the prompts of an epoch; instructions count once a batch."""

    def __post_init__(self) -> None:
        if self.min_count < 1:
            raise SpecError(f"min_count is {self.min_count}", remedy="1 keeps every token that occurs")


def trim_vocabulary(
    source: str, target: Path, data: TrainingData, options: Trim, progress: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Write checkpoint `source` with fewer tokens into the folder `target`; weights stay as they are stored.

    Args:
        source: a checkpoint whose tokenizer is byte pair encoding; its embedding and head are floats.
        target: empty or not there; appears when it is whole.
        data: the prompts, as a run renders them, and the answers.
        options: which tokens stay.
        progress: told how far counting is.

    Returns: `tokens` before and after, `parameters_saved`, and mean tokens of a prompt, of those that validate where
    there are any. Raises: CheckpointError.
    """
    checkpoint = open_checkpoint(source)
    config, weights = checkpoint.config(), checkpoint.weights()
    weights.check(parameters(config), tied=config.tie_word_embeddings)
    _check_dtypes(source, weights, is_gguf=checkpoint.is_gguf)
    raw = checkpoint.config_json()
    with finished_folder(target) as folder:
        copy_tokenizer(checkpoint, folder)
        before, spelled = Tokenizer.open(folder), read_tokenizer_json(folder)
        counts, answers = count_tokens(data, progress)
        needed = {token_id for token_id, count in counts.items() if count >= options.min_count}
        ids = kept_ids(spelled, needed | answers | _template_ids(before), source)
        if ids[-1] >= config.vocab_size:
            raise CheckpointError(f"{source}: token {ids[-1]} has no row in an embedding of {config.vocab_size}")
        _write_tokenizer(folder, trimmed(spelled, ids), {old: new for new, old in enumerate(ids)})
        _write_json(folder / "config.json", renumbered(_config_json(raw, len(ids), checkpoint.is_gguf), ids))
        _write_weights(folder, config, weights, torch.tensor(ids))
        after = Tokenizer.open(folder)
    tables = 1 if weights.is_tied else 2
    return {
        "tokens": {"before": config.vocab_size, "after": len(ids)},
        "parameters_saved": tables * config.hidden_size * (config.vocab_size - len(ids)),
        "tokens_per_prompt": _lengths(data, before, after),
    }


def count_tokens(data: TrainingData, progress: Callable[[dict[str, Any]], None]) -> tuple[Counter[int], set[int]]:
    """Return how often each token occurs in the prompts of epoch 0, and the tokens of the answers."""
    counts: Counter[int] = Counter()
    answers: set[int] = set()
    prompts = 0
    for batch in data.epoch(0):
        counts.update(batch.prefix_ids)
        for example in batch.examples:
            counts.update(example.prompt_ids[example.num_prefix_tokens :])
        for candidate in batch.examples[0].candidates:
            answers.update(candidate.token_ids)
        prompts += len(batch.examples)
        progress({"prompts": prompts, "tokens": len(counts)})
    return counts, answers


def read_tokenizer_json(folder: Path) -> dict[str, Any]:
    """Return tokenizer.json of a checkpoint's folder, or its equal for a tiktoken.model."""
    path = folder / "tokenizer.json"
    if path.exists():
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    return tokenizer_json(folder / "tiktoken.model", settings)


def kept_ids(spelled: Mapping[str, Any], needed: Iterable[int], where: str) -> list[int]:
    """Return the ids that stay, ascending: those `needed`, and what no tokenizer can do without.

    Args:
        spelled: the tokenizer.json.
        needed: ids.
        where: the checkpoint, for messages.

    Raises: CheckpointError for a tokenizer that does not merge pairs of bytes, or whose words have marks of their own.
    """
    model = spelled["model"]
    vocab: dict[str, int] = model.get("vocab") if isinstance(model.get("vocab"), dict) else {}
    marks = [model.get("continuing_subword_prefix"), model.get("end_of_word_suffix")]
    if model.get("byte_fallback"):
        bytewise = [f"<0x{byte:02X}>" for byte in range(256)] + ["▁"]
    elif "ByteLevel" in json.dumps(spelled.get("pre_tokenizer")):
        bytewise = pre_tokenizers.ByteLevel.alphabet()
    else:
        bytewise = []
    if model.get("type") != "BPE" or not bytewise or any(marks):
        raise CheckpointError(
            f"{where}: this tokenizer ({model.get('type')}) is not byte pair encoding down to bytes",
            remedy="leave the vocabulary as it is",
        )
    parts: defaultdict[str, set[str]] = defaultdict(set)
    for left, right in _merges(model):
        parts[left + right] |= {left, right}
    tokens = {token_id: token for token, token_id in vocab.items()}
    added = {token["id"] for token in spelled.get("added_tokens") or ()}
    of_bytes = {vocab[token] for token in bytewise if token in vocab}  # SmolLM2 has no token for 21 bytes
    of_unknown = {vocab[token] for token in (model.get("unk_token"),) if token in vocab}
    kept = added | of_bytes | of_unknown
    waiting = [token_id for token_id in {*needed, *kept} if token_id in tokens or token_id in added]
    kept.update(waiting)
    while waiting:
        for part in parts[tokens.get(waiting.pop(), "")]:
            if vocab[part] not in kept:
                kept.add(vocab[part])
                waiting.append(vocab[part])
    return sorted(kept)


def trimmed(spelled: Mapping[str, Any], ids: Sequence[int]) -> dict[str, Any]:
    """Return tokenizer.json `spelled` with the tokens `ids` alone, numbered as they stand there."""
    number = {old: new for new, old in enumerate(ids)}
    model = spelled["model"]
    vocab = {token: number[old] for token, old in model["vocab"].items() if old in number}
    merges = [
        merge
        for merge, (left, right) in zip(model["merges"], _merges(model), strict=True)
        if left in vocab and right in vocab and left + right in vocab
    ]
    added = [{**token, "id": number[token["id"]]} for token in spelled.get("added_tokens") or ()]
    processor = _renumbered_processor(spelled.get("post_processor"), number)
    smaller = {**model, "vocab": vocab, "merges": merges}
    return {**spelled, "added_tokens": added, "post_processor": processor, "model": smaller}


def renumbered(config: Mapping[str, Any], ids: Sequence[int]) -> dict[str, Any]:
    """Return a config.json or generation_config.json whose `..._token_id` are those of the tokens `ids`.

    What named a token that is no more is left out.
    """
    number = {old: new for new, old in enumerate(ids)}
    found: dict[str, Any] = {}
    for key, value in config.items():
        if not key.endswith("_token_id") or value is None:
            found[key] = value
        elif isinstance(value, list):
            found[key] = [number[old] for old in value if old in number]
        elif value in number:
            found[key] = number[value]
    return found


def _config_json(raw: Mapping[str, Any], vocab_size: int, is_gguf: bool) -> dict[str, Any]:
    """Return config.json of the trimmed checkpoint, still with the old ids; it stays quantized as it was."""
    inner = text_config(raw)
    dtype = "float32" if is_gguf else inner.get("torch_dtype") or inner.get("dtype")
    own = {"quantization_config": inner.get("quantization_config"), "torch_dtype": dtype, "vocab_size": vocab_size}
    return {**hub_config(raw), **{key: value for key, value in own.items() if value}}


def _merges(model: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the merges of a tokenizer.json's model, which are pairs, or strings with a space between."""
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        yield left, right


def _renumbered_processor(processor: Any, number: Mapping[int, int]) -> Any:
    """Return a post-processor that names the same tokens: TemplateProcessing, or a pair of token and id."""
    if isinstance(processor, dict):
        return {
            key: [number[old] for old in value] if key == "ids" else _renumbered_processor(value, number)
            for key, value in processor.items()
        }
    if isinstance(processor, list):
        if len(processor) == 2 and isinstance(processor[0], str) and isinstance(processor[1], int):
            return [processor[0], number[processor[1]]]
        return [_renumbered_processor(each, number) for each in processor]
    return processor


def _template_ids(tokenizer: Tokenizer) -> set[int]:
    """Return the tokens of the chat format itself, with its default instructions and with others."""
    user = {"role": "user", "content": "\n"}
    chats = ([user], [{"role": "system", "content": "\n"}, user])
    return {token_id for chat in chats for token_id in tokenizer.encode_markup(tokenizer.render(chat))}


def _write_tokenizer(folder: Path, spelled: Mapping[str, Any], number: Mapping[int, int]) -> None:
    (folder / "tiktoken.model").unlink(missing_ok=True)
    _write_json(folder / "tokenizer.json", spelled)
    settings, generation = folder / "tokenizer_config.json", folder / "generation_config.json"
    if settings.exists():
        found = json.loads(settings.read_text(encoding="utf-8"))
        if decoder := found.get("added_tokens_decoder"):
            known = {int(old): token for old, token in decoder.items() if int(old) in number}
            found["added_tokens_decoder"] = {str(number[old]): token for old, token in known.items()}
        _write_json(settings, found)
    if generation.exists():
        _write_json(generation, renumbered(json.loads(generation.read_text(encoding="utf-8")), list(number)))


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def _check_dtypes(source: str, weights: Weights, *, is_gguf: bool) -> None:
    """Raise CheckpointError for an embedding or head that is quantized, and for what would have to be expanded."""
    tables = {name: info.dtype for name, info in weights.infos.items() if name.startswith(("model.embed_", "lm_head."))}
    quantized = [name for name, dtype in tables.items() if not is_gguf and dtype not in ("F32", "F16", "BF16")]
    foreign = [name for name, info in weights.infos.items() if not is_gguf and info.dtype not in DTYPES]
    for name in (*quantized, *foreign):
        raise CheckpointError(
            f"{source}: tensor {name} is {weights.infos[name].dtype}, whose rows are not cut here",
            remedy="trim the vocabulary before the checkpoint is quantized, or convert it: k2batch models convert",
        )


def _write_weights(folder: Path, config: ModelConfig, weights: Weights, ids: Tensor) -> None:
    """Write every tensor as it is stored, GGUF's in float32; of embedding and head the rows `ids`."""
    tables = ("model.embed_tokens.weight", "lm_head.weight")
    infos = {
        name: TensorInfo(
            info.dtype if info.dtype in DTYPES else "F32",
            (len(ids), *info.shape[1:]) if name in tables else info.shape,
        )
        for name, info in weights.infos.items()
    }
    names = {name: hub_name(name, config.family) for name in infos}
    with ShardWriter(folder / "model.safetensors", {names[name]: info for name, info in infos.items()}) as shard:
        for name in infos:
            tensor = weights.read(name)
            shard.write(names[name], tensor[ids] if name in tables else tensor)


def _lengths(data: TrainingData, before: Tokenizer, after: Tokenizer) -> dict[str, float]:
    """Return the mean tokens of prompts behind their instructions; of those that validate, where there are any."""
    examples = (e for batch in data.validation() or data.epoch(0) for e in batch.examples)
    texts = [
        before.markup.decode(list(e.prompt_ids[e.num_prefix_tokens :]), skip_special_tokens=False)
        for e in islice(examples, _COMPARED)
    ]
    return {
        name: round(sum(len(tokenizer.encode_markup(text)) for text in texts) / max(len(texts), 1), 2)
        for name, tokenizer in (("before", before), ("after", after))
    }
