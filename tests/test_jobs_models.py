"""The verb `models`, from the command line."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from jobs import bench_models
from jobs.cli import main
from k2model.decoder.model import Decoder
from k2model.decoder.precision import PRECISIONS
from k2model.decoder.step import Span
from k2model.formats.checkpoint import open_checkpoint
from tests.checkpoints import write_checkpoint


def write_fixture(folder: Path) -> Path:
    """Write a checkpoint and, as its reference, what we compute ourselves."""
    checkpoint = open_checkpoint(str(write_checkpoint(folder, family="deepseek_v3")))
    decoder = Decoder.from_weights(checkpoint.config(), checkpoint.weights(), PRECISIONS["fp32"])
    ids = torch.arange(40, 52)
    step = decoder.step([Span(tuple(range(40, 48))), Span(tuple(range(48, 52)))])
    with torch.inference_mode():
        hidden = decoder.forward(step)
        states = {f"seq0.hidden.{len(decoder.layers)}": hidden[:8].clone(), "ragged.logits": decoder.logits(hidden)}
    reference = {"ragged.input_ids": ids, "ragged.cu_seqlens": torch.tensor([0, 8, 12]), **states}
    save_file(reference, folder / "reference.safetensors")
    return folder


def test_check_prints_a_line_a_fixture_and_fails_on_a_miss(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_fixture(tmp_path / "good")
    bad = write_fixture(tmp_path / "bad")
    reference = load_file(bad / "reference.safetensors")
    reference["ragged.logits"][7, 3] += 1e-3
    save_file(reference, bad / "reference.safetensors")
    assert main(["models", "check", str(tmp_path / "good")]) == 0
    assert main(["models", "check", str(tmp_path)]) == 4
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["good", "ok"], ["bad", "MISS"], ["good", "ok"]]
    assert "1.0e-03 of 2.0e-04  ragged" in lines[1]


def test_check_goes_on_after_a_fixture_that_does_not_open(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_fixture(tmp_path / "b")
    broken = write_fixture(tmp_path / "a")
    (broken / "model.safetensors").write_bytes((broken / "model.safetensors").read_bytes()[:-9])
    assert main(["models", "check", str(tmp_path), "--json"]) == 4
    answer = json.loads(capsys.readouterr().out)
    assert [(Path(name).name, found["equal"]) for name, found in answer["fixtures"].items()] == [
        ("a", False),
        ("b", True),
    ]
    assert main(["models", "check", str(tmp_path / "nowhere")]) == 4


def test_convert_writes_what_inspect_finds_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_checkpoint(tmp_path / "source", family="qwen3_moe")
    assert main(["models", "convert", str(source), str(tmp_path / "int8"), "--plain"]) == 0
    assert main(["models", "inspect", str(tmp_path / "int8"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["family"], found["problems"]) == ("qwen3_moe", [])
    assert found["formats"]["INT8"] > 20


def test_a_layer_is_measured_at_any_size() -> None:
    small = {
        **bench_models.KIMI_K2_LAYER, "hidden_size": 64, "moe_intermediate_size": 32, "intermediate_size": 64,
        "n_routed_experts": 8, "num_attention_heads": 2, "q_lora_rank": 32, "kv_lora_rank": 32,
        "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16,
    }  # fmt: skip
    measured = bench_models.layer(small, rounds=1)
    assert [row["tokens"] for row in measured["rows"]] == [1, 8, 64, 256]
    assert measured["rows"][-1]["experts_used"] == 8
    assert measured["precision"]["int4_kept"]["bytes_per_weight"] < measured["precision"]["int8"]["bytes_per_weight"]
    assert bench_models.as_text(measured).count("tokens") >= 4
