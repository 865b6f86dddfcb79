"""The doctor: every line has a state, and what fails has a remedy."""

import importlib.metadata
from pathlib import Path

import pytest
import torch

from jobs import doctor
from schemas.errors import CheckpointError

AMD = "processor\t: 0\nflags\t\t: fpu sse avx2 avx512f avx512_vnni\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd asimddp i8mm\n"


def test_this_installation_is_well() -> None:
    checks = doctor.examine()
    assert [check for check in checks if check.state == "fail"] == []
    assert {"python", "torch", "kernels", "processor", "memory", "model", "cache", "triton"} <= {c.name for c in checks}
    assert all(check.message for check in checks)


def test_a_card_is_named_and_what_was_never_tried_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert doctor.card().state == "ok"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    check = doctor.card()
    assert check.state == "warn"
    assert "NVIDIA H100" in check.message
    assert "never on a card" in check.message


def test_cpu_flags_of_both_kinds_of_machine() -> None:
    assert "avx512_vnni" in doctor.cpu_flags(AMD)
    assert "i8mm" in doctor.cpu_flags(ARM)
    assert doctor.cpu_flags("") == frozenset()


@pytest.mark.parametrize(("has_pairs", "way"), [(True, "pairs of int16"), (False, "float32")])
def test_a_processor_without_an_int8_product_is_told_what_is_done(
    monkeypatch: pytest.MonkeyPatch, has_pairs: bool, way: str
) -> None:
    monkeypatch.setattr("kernels.cpu.has_int8_product", lambda: False)
    monkeypatch.setattr("kernels.dot_tiles.HAS_INT16_PAIRS", has_pairs)
    check = doctor.int8()
    assert (check.state, way in check.message) == ("warn", True)


def test_a_foreign_kernels_package_fails_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.18.2")
    check = doctor.kernels_owner()
    assert check.state == "fail"
    assert "pip uninstall kernels" in check.remedy


def test_a_missing_package_fails_and_a_missing_extra_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert doctor.package("pyarrow").state == "fail"
    assert doctor.optional("s3fs").state == "ok"


def test_a_cache_that_cannot_be_written_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("K2BATCH_CACHE", str(tmp_path / "file" / "below"))
    check = doctor.cache()
    assert check.state == "fail"
    assert "K2BATCH_CACHE" in check.remedy


def test_a_missing_model_is_a_line_not_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> doctor.Check:
        raise CheckpointError("not installed", remedy="pip install it")

    monkeypatch.setattr(doctor, "default_model", missing)
    check = next(check for check in doctor.examine() if check.name == "model")
    assert (check.state, check.remedy) == ("fail", "pip install it")
    assert "pip install it" in doctor.as_text([check])
