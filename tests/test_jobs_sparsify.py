"""Calibration on a tiny model with experts: what it writes is what a job reads, and that job is another run."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from jobs import sparsify
from jobs.cli import main
from jobs.run import plan_job
from jobs.spec import load_spec
from k2model.compress.sparsity import Search
from k2model.decoder.model import Decoder
from k2model.engine.engine import Engine
from pipelines.graph import open_model
from schemas.errors import SpecError
from schemas.runs import Plan
from tests.checkpoints import write_checkpoint
from tests.fakes import tickets, write_tickets


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a job whose model has experts, and what was found for it."""
    folder = tmp_path_factory.mktemp("sparsify")
    write_tickets(folder, "tickets.parquet", tickets(60), row_group_size=10)
    options: dict[str, Any] = {"num_experts": 8, "num_experts_per_tok": 4, "max_position_embeddings": 4096}
    for family in ("qwen3_moe", "llama"):
        write_checkpoint(folder / family, family=family, **(options if family != "llama" else {}))
        (folder / f"{family}.toml").write_text(
            f"""
[job]
name = "moe"
[input]
urls = ["{folder}/tickets.parquet"]
columns = {{ id = "ticket_id", text = ["body"] }}
unit_rows = 10
[output]
url = "{folder}/out"
[model]
checkpoint = "{folder / family}"
precision = "fp32"
router_thresholds = "{folder}/thresholds.json"
[[task]]
name = "policy"
kind = "choose"
labels = {{ "safe" = "ordinary talk", "spam" = "adverts" }}
[[task]]
name = "reply"
kind = "generate"
instruction = "Answer."
max_tokens = 6
"""
        )
    words = [str(folder / "qwen3_moe.toml"), "--agreement", "0.9", "--rows", "24", "-o"]
    assert main(["sparsify", *words, str(folder / "thresholds.json")]) == 0
    return folder


def test_the_report_is_whole_and_holds_the_agreement(folder: Path) -> None:
    facts = json.loads((folder / "thresholds.json").read_text())
    assert len(facts["thresholds"]) == 2
    assert (facts["tuning_tickets"], facts["held_back_tickets"], facts["precision"]) == (12, 12, "fp32")
    assert facts["agreement"] >= facts["agreement_wanted"] == 0.9
    low, high = facts["agreement_interval"]
    assert low <= facts["agreement"] <= high
    before, after = facts["experts_per_token"]
    assert before == 4 >= after > 1
    experts, model = facts["experts_flops_per_token"], facts["model_flops_per_token"]
    assert experts[1] / experts[0] == pytest.approx(after / before, rel=1e-3)
    assert model[0] - model[1] == experts[0] - experts[1]
    assert "experts per token and layer  4.00 -> " in sparsify.as_text(facts)


def test_the_job_that_reads_it_is_another_run_of_another_model(folder: Path) -> None:
    spec = load_spec(str(folder / "qwen3_moe.toml"))
    assert list(spec.router_thresholds) == json.loads((folder / "thresholds.json").read_text())["thresholds"]
    plan = plan_job(spec)
    whole = plan_job(load_spec(str(folder / "qwen3_moe.toml"), {"model": {"router_thresholds": ""}}))
    assert plan.model_fingerprint != whole.model_fingerprint
    assert plan.run_id != whole.run_id
    assert Plan.from_json(plan.to_json(), plan.units) == plan
    assert (plan.precision, plan.router_thresholds) == ("fp32", spec.router_thresholds)
    engine = open_model(plan)
    assert isinstance(engine, Engine)
    assert engine.fingerprint == plan.model_fingerprint
    routers = [layer.feed_forward.first for layer in engine.decoder.layers]
    assert tuple(getattr(router, "threshold", None) for router in routers) == spec.router_thresholds
    engine.close()


def test_all_must_agree_and_then_nothing_that_matters_is_dropped(folder: Path) -> None:
    spec = load_spec(str(folder / "qwen3_moe.toml"))
    strict = sparsify.sparsify(spec, agreement=1.0, rows=24)
    loose = sparsify.sparsify(spec, agreement=0.0, rows=24)
    assert strict["agreement"] == 1.0
    assert strict["experts_per_token"][1] > loose["experts_per_token"][1] == 1.0
    assert loose == sparsify.sparsify(spec, agreement=0.0, rows=24)


def test_no_ticket_that_chooses_judges(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[sparsify.Asked]] = []
    ask = sparsify._Model.ask

    def record(model: sparsify._Model, tickets: Sequence[sparsify.Asked], decoder: Decoder) -> list[sparsify._Answer]:
        asked.append(list(tickets))
        return ask(model, tickets, decoder)

    monkeypatch.setattr(sparsify._Model, "ask", record)
    facts = sparsify.sparsify(load_spec(str(folder / "qwen3_moe.toml")), agreement=0.9, rows=24)
    tuning = asked.count(asked[0])
    assert not set(asked[0]) & set(asked[-1])
    assert asked[tuning:] == [asked[-1]] * (len(asked) - tuning)
    assert tuning <= facts["tuning_passes_at_most"] == 2 + 9
    assert 2 <= len(asked) - tuning <= 6


def test_held_back_tickets_that_disagree_step_back_to_all_experts(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Search, "best_share", lambda *_: 1.0)
    said: list[str] = []
    facts = sparsify.sparsify(load_spec(str(folder / "qwen3_moe.toml")), agreement=1.0, rows=24, say=said.append)
    assert facts["agreement"] == 1.0
    assert facts["share_of_droppable_slots"] < 1
    assert sum("too few" in line for line in said) >= 1


def test_a_model_without_experts_is_refused_by_name(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sparsify", str(folder / "llama.toml"), "-o", str(folder / "none.json")]) == 2
    said = capsys.readouterr().err
    assert f"{folder}/llama: the llama model has no experts to drop" in said
    assert not (folder / "none.json").exists()
    with pytest.raises(SpecError, match="no experts to drop"):
        plan_job(load_spec(str(folder / "llama.toml")))


def test_intervals() -> None:
    low, high = sparsify.bootstrap([True] * 90 + [False] * 10)
    assert 0.8 < low < 0.87
    assert 0.93 < high < 0.98
    assert sparsify.bootstrap([True] * 59) == [pytest.approx(0.95, abs=0.001), 1.0]
