"""From any checkpoint to the INT8 one the CPU runs: made once, kept by content, then opened like any other."""

import fcntl
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from k2model.compress.convert import Embedding, Int4, convert
from k2model.formats.checkpoint import Checkpoint, cache_folder, fingerprint, open_checkpoint
from k2model.parameters import parameters
from k2model.tokenizer import Tokenizer
from schemas.errors import CheckpointError

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tiktoken.model",
    "chat_template.jinja",
    "generation_config.json",
)


def prepare_int8(name: str) -> Checkpoint:
    """Return the quantized checkpoint of `name`: itself if it is one, else its conversion, made on first use.

    The conversion is a compressed-tensors folder under the cache, named by the fingerprint of its source. Of processes
    that want the same one, one makes it and the others wait; one that is killed is gone on with.

    Raises: CheckpointError.
    """
    source = open_checkpoint(name)
    if is_quantized(source):
        return source
    target = cache_folder() / "int8" / fingerprint(name, "int8")
    target.parent.mkdir(parents=True, exist_ok=True)
    with _alone(target.with_suffix(".lock")):
        if not target.exists():
            part = target.with_suffix(".part")
            part.mkdir(exist_ok=True)
            copy_tokenizer(source, part)
            convert(source, part, Tokenizer.open(part))
            part.rename(target)
    return Checkpoint(name, target)


def convert_into(
    name: str,
    folder: Path,
    *,
    int4: Int4 = "keep",
    embedding: Embedding = "bf16",
    balanced: bool = True,
    say: Callable[[str], None],
) -> None:
    """Write the quantized conversion of `name` into `folder`, going on with what an earlier attempt left there.

    Args:
        name: the checkpoint.
        folder: empty, not there yet, or left by an attempt with the same arguments.
        int4: what becomes of INT4 weights.
        embedding: how the input embedding is stored.
        balanced: whether outliers are balanced, over the calibration texts.
        say: told of each shard.

    Raises: CheckpointError; also if `folder` holds anything else.
    """
    source = open_checkpoint(name)
    made_of = {"fingerprint": fingerprint(name, "int8"), "int4": int4, "embedding": embedding, "balanced": balanced}
    folder.mkdir(parents=True, exist_ok=True)
    note = folder / _NOTE
    if any(folder.iterdir()) and (not note.exists() or json.loads(note.read_text(encoding="utf-8")) != made_of):
        raise CheckpointError(
            f"{folder} holds something else than the beginning of this conversion", remedy="give an empty folder"
        )
    note.write_text(json.dumps(made_of), encoding="utf-8")
    with _alone(note):
        copy_tokenizer(source, folder)
        tokenizer = Tokenizer.open(folder) if balanced else None
        convert(source, folder, tokenizer, int4=int4, embedding=embedding, say=say)


_NOTE = "k2batch.json"
"""Beside a conversion: what it is made of."""


def is_quantized(source: Checkpoint) -> bool:
    """Return whether every decoder linear is stored as INT8 or INT4 already. Raises: CheckpointError."""
    weights = source.weights()
    linears = (p.name.removesuffix(".weight") for p in parameters(source.config()) if p.is_linear)
    return all(weights.storage(linear) in ("int8", "int4") for linear in linears)


def copy_tokenizer(source: Checkpoint, folder: Path) -> None:
    """Write the tokenizer files of `source` into `folder`."""
    if source.is_gguf:
        from k2model.formats import gguf

        tokenizer, settings = gguf.read_tokenizer(source.path)
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
        (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
        (folder / "config.json").write_text(json.dumps(source.config_json()), encoding="utf-8")
        return
    for name in (*_TOKENIZER_FILES, "config.json"):
        if (source.path / name).exists():
            shutil.copyfile(source.path / name, folder / name)


def open_tokenizer(source: Checkpoint) -> Tokenizer:
    """Return the tokenizer of `source`. Raises: CheckpointError."""
    if not source.is_gguf:
        return Tokenizer.open(source.path)
    with tempfile.TemporaryDirectory() as folder:
        copy_tokenizer(source, Path(folder))
        return Tokenizer.open(Path(folder))


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Hold the lock file; the system lets go of it when this process dies."""
    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
