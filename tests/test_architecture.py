"""The house keeps its shape: directions, inert packages, file sizes, and who owns the name `kernels`."""

import ast
import importlib.metadata
import importlib.util
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import kernels

ROOT = Path(__file__).parents[1]
FLOORS = ("jobs", "pipelines", "k2model", "kernels", "schemas")
FILES = sorted(path for folder in (*FLOORS, "tests") for path in (ROOT / folder).rglob("*.py"))
MAX_LINES = 430
MAX_FUNCTION_LINES = 60
KERNELS_MAY_USE = {"kernels", "numpy", "torch", "triton", "numba", "llvmlite"}
SCHEMAS_MAY_USE = {"schemas", "pyarrow"}


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports(tree: ast.AST) -> Iterator[str]:
    """Yield every module named by an import statement below `tree`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module or ""


def imports_of(folder: str) -> set[str]:
    return {module for path in (ROOT / folder).rglob("*.py") for module in imports(ast.parse(path.read_text()))}


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_import_directions() -> None:
    lint_imports = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([lint_imports, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_kernels_are_arithmetic_and_schemas_are_names() -> None:
    tops = {folder: {module.partition(".")[0] for module in imports_of(folder)} for folder in ("kernels", "schemas")}
    assert tops["kernels"] - sys.stdlib_module_names <= KERNELS_MAY_USE
    assert tops["schemas"] - sys.stdlib_module_names <= SCHEMAS_MAY_USE
    errors = set(imports(ast.parse((ROOT / "schemas" / "errors.py").read_text())))
    assert errors <= sys.stdlib_module_names, "errors are raised where pyarrow is not"


def test_the_model_uses_no_schema_but_the_errors() -> None:
    # And what keeps credentials out of them.
    used = {module for module in imports_of("k2model") if module.startswith("schemas")}
    assert used == {"schemas.errors", "schemas.urls"}


@pytest.mark.parametrize("path", [p for p in FILES if p.name == "__init__.py"], ids=name)
def test_packages_are_inert(path: Path) -> None:
    # An import here would run whenever another library looks whether a package named `kernels` exists.
    body = ast.parse(path.read_text()).body
    assert len(body) == 1
    assert isinstance(body[0], ast.Expr)
    assert isinstance(body[0].value, ast.Constant)


def test_the_command_line_imports_nothing_heavy_at_its_head() -> None:
    light = {"schemas.errors", "jobs.arguments"}
    for file in ("cli.py", "arguments.py"):
        body = ast.parse((ROOT / "jobs" / file).read_text()).body
        head = {module for node in body if not isinstance(node, ast.If | ast.FunctionDef) for module in imports(node)}
        assert {module for module in head if module.partition(".")[0] not in sys.stdlib_module_names} <= light


@pytest.mark.parametrize("path", FILES, ids=name)
def test_files_and_functions_stay_readable(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[1] if ast.get_docstring(node) and len(node.body) > 1 else node.body[0]
            lines = (node.end_lineno or node.lineno) - first.lineno + 1
            assert lines <= MAX_FUNCTION_LINES, node.name


def test_tests_are_flat_and_named_after_what_they_test() -> None:
    assert [path for path in (ROOT / "tests").iterdir() if path.is_dir() and path.name != "__pycache__"] == []
    known = (*FLOORS, "architecture", "docs")
    for path in (ROOT / "tests").glob("test_*.py"):
        assert path.stem.removeprefix("test_").startswith(known), path.name


def test_every_package_is_listed_in_the_wheel() -> None:
    here = {str(p.parent.relative_to(ROOT)).replace("/", ".") for p in FILES if p.name == "__init__.py"}
    folders_of_data = {"jobs.recipes", "jobs.samples", "jobs.specs"}
    assert here | folders_of_data == set(project()["tool"]["setuptools"]["packages"])


def test_no_foreign_package_owns_the_name_kernels() -> None:
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.distribution("kernels")
    assert Path(kernels.__file__ or "").parent == ROOT / "kernels"
    assert not hasattr(kernels, "__version__")


def test_our_version_cannot_be_taken_for_theirs_and_pip_refuses_theirs() -> None:
    version = project()["project"]["version"]
    assert int(version.partition(".")[0]) >= 2026
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert "kernels<0" in lines
    assert importlib.metadata.version("k2batch") == version


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
def test_transformers_is_not_misled_by_our_folder() -> None:
    code = (
        "import transformers.modeling_utils\n"
        "from transformers.utils.import_utils import is_kernels_available\n"
        "assert not is_kernels_available()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_a_driver_does_without_torch() -> None:
    """Which takes seconds and 200 MB to import, and whose threads a driver has ended with an abort beside."""
    names = "pipelines.runners, pipelines.finalize, pipelines.prompts, pipelines.units"
    code = f"import sys, {names}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
