"""The verb `models`: look into a checkpoint, compare it with its makers' answers, convert it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from schemas.errors import CheckpointError, K2Error

_REFERENCES = ("reference.safetensors", "tokenizer_reference.json", "units.safetensors", "reference.json")


def inspect(checkpoint: str) -> tuple[dict[str, Any], str]:
    """Return what `checkpoint` is, costs and fits on, and the same as text; no byte of a weight is read."""
    from k2model.formats import inspect as inspecting

    found = inspecting.inspect(checkpoint)
    return asdict(found), inspecting.as_text(found)


def check(folders: Sequence[str], say: Callable[[str], None]) -> tuple[dict[str, Any], bool]:
    """Return what each fixture's comparisons gave, and whether all were within tolerance; one line each to `say`.

    A folder of fixture folders stands for all of them. One that cannot be opened is a miss, and the next is tried.
    """
    from k2model.check import check as compare

    results: dict[str, Any] = {}
    for folder in _fixtures(folders):
        try:
            found = compare(folder)
        except K2Error as error:
            results[str(folder)] = {"equal": False, "error": error.message}
            say(f"{folder.name:<24} ERROR  {error.message}")
            continue
        missed = [comparison for comparison in found if not comparison.is_equal]
        worst = max(missed or found, key=lambda c: c.difference / c.tolerance if c.tolerance else c.difference)
        results[str(folder)] = {"equal": not missed, "comparisons": [asdict(comparison) for comparison in found]}
        state = f"MISS {len(missed)} of" if missed else "ok   "
        say(
            f"{folder.name:<24} {state} {len(found):>3} comparisons, largest {worst.difference:.1e}"
            f" of {worst.tolerance:.1e}  {worst.what}"
        )
    return results, all(result["equal"] for result in results.values())


def _fixtures(folders: Sequence[str]) -> Iterator[Path]:
    for name in folders:
        folder = Path(name)
        if not folder.is_dir():
            raise CheckpointError(f'"{name}" is not a folder', remedy="give folders of reference fixtures")
        inside = [path for path in sorted(folder.iterdir()) if any((path / file).exists() for file in _REFERENCES)]
        if inside and not any((folder / file).exists() for file in _REFERENCES):
            yield from inside
        else:
            yield folder


def convert(checkpoint: str, target: str, *, int4: str, balanced: bool, say: Callable[[str], None]) -> dict[str, Any]:
    """Write the INT8 conversion of `checkpoint` into the folder `target`, going on with what is there; return its size.

    Args:
        checkpoint: a folder, a `.gguf` file, or an fsspec URL of either.
        target: a folder of this machine; made if it is not there.
        int4: `keep` or `int8`: what becomes of INT4 weights.
        balanced: whether outliers are balanced over the calibration texts first, which needs a tokenizer.
        say: told of each shard written.
    """
    from k2model.compress.recipe import convert_into

    folder = Path(target)
    convert_into(checkpoint, folder, int4="int8" if int4 == "int8" else "keep", balanced=balanced, say=say)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return {"checkpoint": checkpoint, "folder": str(folder), "bytes": size}
