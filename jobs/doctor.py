"""What this machine and installation can do, line by line, each with what to do about it."""

import importlib.metadata
import importlib.util
import os
import platform
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from schemas.errors import K2Error

REQUIRED = ("apache-beam", "fsspec", "gguf", "jinja2", "numpy", "pyarrow", "safetensors", "tenacity", "tokenizers")
OPTIONAL = {
    "distributed": 'runner = "dask": pip install "k2batch[dask]"',
    "s3fs": 's3:// URLs: pip install "k2batch[s3]"',
    "huggingface_hub": 'hf:// checkpoints: pip install "k2batch[hf]"',
    "triton": 'mode = "gpu": pip install "k2batch[gpu]"',
}
INT8_FLAGS = ("amx_int8", "avx512_vnni", "avx_vnni", "asimddp", "i8mm")
MIN_MEMORY_GB = 3.0
"""The default model, its INT8 conversion and three units under way, with room to spare."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One line of the doctor's report."""

    name: str
    state: str
    """`ok`, `warn` (works, but worse than it could) or `fail` (does not work)."""
    message: str
    remedy: str = ""


def examine() -> list[Check]:
    """Return every check, in the order a person would mend them."""
    checks = [_run("python", python), *(_run(name, partial(package, name)) for name in REQUIRED)]
    parts: tuple[tuple[str, Callable[[], Check]], ...] = (
        ("torch", torch_build),
        ("kernels", kernels_owner),
        ("processor", processor),
        ("int8", int8),
        ("cores", cores),
        ("memory", memory),
        ("card", card),
        ("model", default_model),
        ("cache", cache),
    )
    checks += [_run(name, check) for name, check in parts]
    return checks + [_run(name, partial(optional, name)) for name in OPTIONAL]


def as_text(checks: list[Check]) -> str:
    """Return the checks as lines for a terminal."""
    lines = []
    for check in checks:
        lines.append(f"{check.state:<4}  {check.name:<16} {check.message}")
        if check.remedy:
            lines.append(f"      {'':<16} {check.remedy}")
    return "\n".join(lines)


def _run(name: str, check: Callable[[], Check]) -> Check:
    """Return the check's answer; a check that breaks is an answer too."""
    try:
        return check()
    except K2Error as error:
        return Check(name=name, state="fail", message=error.message, remedy=error.remedy)
    except Exception as error:
        return Check(name=name, state="fail", message=f"{type(error).__name__}: {error}", remedy="install k2batch anew")


def python() -> Check:
    """Return which Python this is; pip has made sure that it is new enough."""
    return Check(name="python", state="ok", message=f"{platform.python_version()} at {sys.prefix}")


def package(name: str) -> Check:
    """Return whether a package that every run needs is installed."""
    try:
        return Check(name=name, state="ok", message=importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Check(name=name, state="fail", message="not installed", remedy=f"pip install {name}, or k2batch anew")


def optional(name: str) -> Check:
    """Return whether a package that some jobs need is installed; nothing is wrong if not."""
    try:
        return Check(name=name, state="ok", message=importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Check(name=name, state="ok", message=f"not installed; only needed for {OPTIONAL[name]}")


def torch_build() -> Check:
    """Return which torch this is, and whether oneDNN is in it."""
    import torch

    message = f"{torch.__version__}, {torch.get_num_threads()} threads"
    if not torch.backends.mkldnn.is_available():
        remedy = "install a build with it: INT8 on the processor goes through oneDNN"
        return Check(name="torch", state="warn", message=f"{message}, without oneDNN", remedy=remedy)
    return Check(name="torch", state="ok", message=f"{message}, with oneDNN")


def kernels_owner() -> Check:
    """Return whether `import kernels` finds our folder, and no package of that name waits to break it."""
    try:
        version = importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        version = ""
    remedy = "pip uninstall kernels, then install k2batch anew with -c constraints.txt"
    if version:
        message = f'the PyPI package "kernels" {version} is installed and shares the import name of ours'
        return Check(name="kernels", state="fail", message=message, remedy=remedy)
    spec = importlib.util.find_spec("kernels")
    ours = Path(__file__).parents[1] / "kernels"
    if spec is None or spec.origin is None or Path(spec.origin).parent.resolve() != ours.resolve():
        where = "is not found" if spec is None else f"is {spec.origin}"
        return Check(name="kernels", state="fail", message=f'"import kernels" {where}, not {ours}', remedy=remedy)
    return Check(name="kernels", state="ok", message=f"ours, {ours}")


def cpu_flags(cpuinfo: str) -> frozenset[str]:
    """Return the instruction sets that a /proc/cpuinfo text names."""
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def processor() -> Check:
    """Return whether the processor multiplies INT8 in one instruction."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return Check(name="processor", state="ok", message=f"{platform.machine()}; its instruction sets are not listed")
    flags = cpu_flags(path.read_text(encoding="utf-8", errors="replace"))
    found = [flag for flag in INT8_FLAGS if flag in flags]
    if found:
        return Check(name="processor", state="ok", message=f"{platform.machine()} with {', '.join(found)}")
    message = f"{platform.machine()} without any of {', '.join(INT8_FLAGS)}"
    return Check(name="processor", state="warn", message=message, remedy="works, but INT8 is slower than it could be")


def int8() -> Check:
    """Return whether the processor's INT8 product is exact and fast."""
    from kernels.cpu import has_int8_product
    from kernels.dot_tiles import HAS_INT16_PAIRS

    if has_int8_product():
        return Check(name="int8", state="ok", message="exact in int32 through oneDNN")
    way = "pairs of int16" if HAS_INT16_PAIRS else "float32"
    message = f"oneDNN has no exact or no fast product here, so {way} are multiplied: the same bits, but slower"
    return Check(name="int8", state="warn", message=message, remedy="use a processor with VNNI or AMX")


def cores() -> Check:
    """Return how many cores this process may use."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Check(name="cores", state="ok", message=f"{count} usable")


def memory() -> Check:
    """Return whether there is memory for the default model."""
    gigabytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and (text := limit.read_text().strip()).isdigit():
        gigabytes = min(gigabytes, int(text) / 1e9)
    message = f"{gigabytes:.1f} GB"
    if gigabytes < MIN_MEMORY_GB:
        remedy = f"the default model wants {MIN_MEMORY_GB:.0f} GB; lower [input] unit_rows or use a larger machine"
        return Check(name="memory", state="warn", message=message, remedy=remedy)
    return Check(name="memory", state="ok", message=message)


def card() -> Check:
    """Return whether there is a card for `mode = "gpu"`, which was never run on one; nothing is wrong if not."""
    import torch

    if not torch.cuda.is_available():
        return Check(name="card", state="ok", message='none that torch finds; only needed for mode = "gpu"')
    message = f'{torch.cuda.get_device_name()}; mode = "gpu" was only ever run in an interpreter, never on a card'
    return Check(name="card", state="warn", message=message, remedy="bash tests/on_card.sh proves it, or not, on yours")


def default_model() -> Check:
    """Return whether the embedded models are installed. Raises: CheckpointError if not."""
    from k2model.formats.checkpoint import DEFAULT_CHECKPOINT, K2_MINI, open_checkpoint

    found = [open_checkpoint(name) for name in (K2_MINI, DEFAULT_CHECKPOINT)]
    sizes = (sum(file.stat().st_size for file in each.files()) / 1e6 for each in found)
    models = (f"{each.name}, {size:.0f} MB, {each.path}" for each, size in zip(found, sizes, strict=True))
    return Check(name="model", state="ok", message="; ".join(models))


def cache() -> Check:
    """Return whether conversions and downloads can be kept."""
    from k2model.formats.checkpoint import cache_folder

    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        remedy = "set K2BATCH_CACHE to a folder you may write"
        return Check(name="cache", state="fail", message=f"{folder}: {error}", remedy=remedy)
    return Check(name="cache", state="ok", message=str(folder))
