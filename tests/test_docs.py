"""The README and the help texts say what is so: their commands run, their tables are the code's."""

import glob
import re
import shlex
from pathlib import Path

import pytest

from jobs.arguments import EXAMPLES, EXIT_CODES
from jobs.cli import main
from jobs.spec import _KEYS, load_spec
from k2model.compress import calibrate
from schemas.annotations import JSON_FIELD, ROW_FIELDS, SAMPLES_FIELD, TASK_FIELDS
from schemas.errors import FILE_ERROR_CODES, ROW_ERROR_CODES
from tests.checkpoints import write_checkpoint
from tests.fake_jobs import open_planned_engine

ROOT = Path(__file__).parents[1]
TEXTS = calibrate.calibration_texts()[::100]
"""What the recipe's models are calibrated over: a hundredth, in a hundredth of the time."""
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONSOLE = re.findall(r"^\$ (.*?)(?:\s+#.*)?$", README, re.MULTILINE)
JOB = re.findall(r"```toml\n(.*?)```", README, re.DOTALL)[0]


def section(title: str) -> str:
    return README.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder where the README's commands can run: the samples, and its job beside some tickets."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "jobs" / "recipes").mkdir(parents=True)
    for path in (ROOT / "jobs").iterdir():
        if path.name != "recipes":
            (tmp_path / "jobs" / path.name).symlink_to(path)
    recipe = (ROOT / "jobs" / "recipes" / "tiny.toml").read_text().replace("smollm2-135m-instruct", "teacher")
    (tmp_path / "jobs" / "recipes" / "tiny.toml").write_text(recipe)
    write_checkpoint(tmp_path / "teacher", max_position_embeddings=2048)
    monkeypatch.setattr(calibrate, "calibration_texts", lambda: TEXTS)
    job = JOB.replace("s3://my-bucket/tickets/*.parquet", "jobs/samples/labeling-*.parquet")
    job = job.replace("s3://my-bucket/annotated/", "annotated/") + "\n[limits]\nmax_reject_rate = 0.5\n"
    (tmp_path / "my-sweep.toml").write_text(job)
    write_checkpoint(tmp_path / "moe", family="qwen3_moe", max_position_embeddings=8192)
    (tmp_path / "my-moe.toml").write_text(job + 'max_prompt_tokens = 8192\n[model]\ncheckpoint = "moe"\n')
    return tmp_path


def shell(command: str) -> int:
    """Run a `k2batch` command of one line as a shell would, with the fake model."""
    program, *words = shlex.split(command)
    assert program == "k2batch"
    return main([name for word in words for name in glob.glob(word) or [word]], open_engine=open_planned_engine)


@pytest.mark.usefixtures("folder")
def test_the_examples_in_the_help_run_in_order() -> None:
    assert {verb: shell(command) for verb, command in EXAMPLES.items()} == dict.fromkeys(EXAMPLES, 0)


@pytest.mark.usefixtures("folder")
def test_the_commands_of_the_readme_run() -> None:
    commands = [command for command in CONSOLE if command.startswith("k2batch")]
    assert {shlex.split(command)[1] for command in commands} == set(EXAMPLES)
    assert shell(EXAMPLES["run"]) == 0  # what `make demo` does before them
    assert {command: shell(command) for command in commands} == dict.fromkeys(commands, 0)


def test_make_has_the_targets_that_the_docs_name() -> None:
    makefile = (ROOT / "Makefile").read_text()
    docs = README + (ROOT / "CONTRIBUTING.md").read_text()
    targets = set(re.findall(r"\bmake ([a-z]+)", docs)) - {"sure"}
    assert {"demo", "test"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    assert "k2batch run $(SPEC)" in makefile
    assert EXAMPLES["run"].rpartition(" ")[2] in makefile


def test_the_job_of_the_readme_is_ten_lines_and_loads(folder: Path) -> None:
    assert len([line for line in JOB.splitlines() if line.strip()]) <= 12
    spec = load_spec(str(folder / "my-sweep.toml"))
    assert (spec.name, spec.tasks[0].kind) == ("my-sweep", "choose")


def test_the_readme_names_every_key_code_and_column() -> None:
    keys = {key for section_keys in _KEYS.values() for key in section_keys}
    assert [key for key in keys if f"`{key}`" not in README and f"{key}" not in JOB and f"[{key}]" not in README] == []
    for code in (*ROW_ERROR_CODES, *FILE_ERROR_CODES):
        assert f"`{code}`" in section("The data contract"), code
    task_fields = (field for fields in TASK_FIELDS.values() for field in fields)
    for field in (*ROW_FIELDS, *task_fields, JSON_FIELD, SAMPLES_FIELD):
        assert f"`{field.name}`" in section("The result"), field.name
    for number, meaning in EXIT_CODES.items():
        assert re.search(rf"^\| {number} \| {re.escape(meaning.split(':')[0].split('[')[0])}", README, re.MULTILINE), (
            number
        )


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_links_lead_somewhere(name: str) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", (ROOT / name).read_text()):
        assert (ROOT / target).exists(), target


def test_the_folder_map_is_the_folders() -> None:
    mapped = re.findall(r"^\| \[`(\w+)/`\]", README, re.MULTILINE)
    assert mapped == ["jobs", "pipelines", "k2model", "kernels", "schemas", "tests"]
