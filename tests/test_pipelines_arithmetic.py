"""FLOPs told by receipts are those of the tokens and experts that the model really computed, each told once."""

import json
import threading
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from torch import Tensor

from jobs.report import flops_lines, report
from jobs.run import plan_job, plan_tokens
from jobs.spec import JobSpec, load_spec
from k2model.compress.sparsity import dropped_experts, with_thresholds
from k2model.decoder.feed_forward import Router
from k2model.engine.engine import Engine, load
from k2model.engine.request import Work
from k2model.flops import token_flops
from k2model.formats.checkpoint import open_checkpoint
from k2model.parameters import active_share, parameters
from pipelines.annotate import Block, annotate
from pipelines.arithmetic import flops_of
from pipelines.commit import pending_units, read_plan, read_receipts, write_plan
from pipelines.graph import engine_and_prompts, open_model
from pipelines.read import read_unit
from schemas.errors import RowError
from schemas.runs import Manifest, ModelFlops, Plan
from tests.checkpoints import write_checkpoint
from tests.fake_jobs import run_here
from tests.fakes import write_tickets

THREAD = "As I wrote on Monday, nothing works. "
MOE: dict[str, Any] = {"num_experts": 8, "num_experts_per_tok": 4}


def job(folder: Path, family: str = "llama", thresholds: tuple[float, ...] = ()) -> JobSpec:
    """Return a job over 24 tickets in 3 units: quoted threads, 6 duplicates, one task scored and one written."""
    bodies = [f"{THREAD * (row % 3)}{row % 6} is it" for row in range(24)]
    table = pa.table({"ticket_id": [str(row) for row in range(24)], "body": bodies})
    write_tickets(folder / "in", "a.parquet", table, row_group_size=8)
    options = MOE if family == "qwen3_moe" else {}
    checkpoint = write_checkpoint(folder / family, family=family, max_position_embeddings=4096, **options)
    (folder / "thresholds.json").write_text(json.dumps({"thresholds": list(thresholds)}))
    path = folder / "job.toml"
    path.write_text(
        f"""
[job]
name = "counted"
[input]
urls = ["{folder}/in/"]
columns = {{ id = "ticket_id", text = ["body"] }}
unit_rows = 8
[output]
url = "{folder}/out/"
[model]
checkpoint = "{checkpoint}"
precision = "fp32"
{f'router_thresholds = "{folder}/thresholds.json"' if thresholds else ""}
[[task]]
name = "policy"
kind = "choose"
labels = {{ "safe" = "ordinary talk", "spam" = "adverts" }}
[[task]]
name = "reply"
kind = "generate"
instruction = "Answer."
max_tokens = 3
""",
        encoding="utf-8",
    )
    return load_spec(str(path))


class Slots:
    """Counts what routers choose, by what they return."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kept = self.dropped = 0
        choose = Router.choose

        def counting(router: Router, logits: Tensor) -> tuple[Tensor, Tensor]:
            expert_ids, weights = choose(router, logits)
            dropped = int((expert_ids == logits.shape[1]).sum())
            self.dropped += dropped
            self.kept += expert_ids.numel() - dropped
            return expert_ids, weights

        monkeypatch.setattr(Router, "choose", counting)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_a_tokens_flops_are_two_for_each_weight_it_meets(tmp_path: Path, family: str) -> None:
    config = open_checkpoint(str(write_checkpoint(tmp_path / "model", family=family))).config()
    flops = token_flops(config)
    met = [p for p in parameters(config) if p.is_linear or p.role == "router"]
    assert flops["token"] == round(sum(2 * p.size * active_share(config, p.role) for p in met))
    assert flops["all_experts"] == sum(2 * p.size for p in met)
    last = [p for p in met if p.name.startswith(f"model.layers.{config.num_hidden_layers - 1}.")]
    behind = [p for p in last if "self_attn" not in p.name or "o_proj" in p.name]
    assert flops["unread"] == round(sum(2 * p.size * active_share(config, p.role) for p in behind)) > 0
    if config.moe is None:
        assert flops["expert"] == 0
    else:
        assert flops["expert"] == 6 * config.hidden_size * config.moe.moe_intermediate_size


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Manifest, Slots]:
    """A finished run of a model with router thresholds, and what its routers chose."""
    spec = job(tmp_path_factory.mktemp("sparse"), "qwen3_moe", (0.6, 0.9))
    with pytest.MonkeyPatch.context() as patch:
        slots = Slots(patch)
        return plan_job(spec), run_here(spec, open_model), slots


def test_dropped_experts_are_counted(sparse: tuple[Plan, Manifest, Slots]) -> None:
    plan, manifest, slots = sparse
    model, flops = plan.flops, manifest.flops
    assert slots.dropped > 0
    assert flops["dropped_experts"] == slots.dropped * model.expert
    # All that goes through the model but experts, and the experts it really met.
    unread = flops["unread"] // model.unread
    tokens = (slots.kept + slots.dropped + unread * 4) // (2 * 4)  # layers, experts of a token
    assert 0 < unread < tokens
    others = tokens * (model.token - 2 * 4 * model.expert) - unread * (model.unread - 4 * model.expert)
    assert flops["computed"] == others + slots.kept * model.expert
    assert flops["inactive_experts"] == tokens * 2 * (8 - 4) * model.expert
    assert model.all_experts - model.token == 2 * (8 - 4) * model.expert


def test_without_thresholds_none_is_dropped(tmp_path: Path) -> None:
    plain, _ = load(str(write_checkpoint(tmp_path, family="qwen3_moe")), "fp32")
    plain.forward_one([3, 4, 5])
    assert dropped_experts(plain) == 0
    counting = with_thresholds(plain, [0.3, 0.3])
    counting.forward_one([3, 4, 5])
    counting.forward_one([3, 4, 5])
    assert dropped_experts(counting) == 2 * 3 * 2 * (2 - 1)


def test_what_is_shared_is_what_the_plan_foretold_and_no_sparsity(tmp_path: Path) -> None:
    spec = job(tmp_path)
    plan = plan_job(spec)
    foretold = plan_tokens(spec, plan)
    manifest = run_here(spec, open_model)
    token, flops = plan.flops.token, manifest.flops
    assert flops["duplicates"] == foretold.duplicates * token > 0
    # Instructions are computed once, for no row: every row finds them.
    _, prompts = engine_and_prompts(plan, open_model)
    (requests,) = prompts.requests_of(["x"])
    assert not isinstance(requests, RowError)
    first = sum({request.num_prefix_tokens for request in requests})
    assert flops["shared"] == (foretold.instructions + first + foretold.beginnings) * token > 0
    through = flops["computed"] + flops["unread"]
    written = through // token - foretold.computed_tokens
    assert 0 <= written <= foretold.generated  # a token is fed for each but the last
    assert (through % token, flops["unread"] % plan.flops.unread) == (0, 0)
    assert 0 < flops["unread"] < through
    assert (flops["earlier_runs"], flops["inactive_experts"], flops["dropped_experts"]) == (0, 0, 0)
    again = replace(spec, tasks=(replace(spec.tasks[0], guidelines=""), *spec.tasks[1:]), unit_rows=7)
    kept = run_here(again, open_model).flops
    assert kept["earlier_runs"] + kept["duplicates"] == manifest.prompt_tokens * token
    assert (kept["computed"], kept["shared"]) == (0, 0)


def test_units_side_by_side_tell_everything_once(tmp_path: Path) -> None:
    plan = plan_job(job(tmp_path))
    engine, prompts = engine_and_prompts(plan, open_model)
    assert isinstance(engine, Engine)
    engine.take_work()
    told: list[dict[str, int]] = []

    def one(place: int) -> None:
        for unit in plan.units[place:] + plan.units[:place]:
            told.append(annotate(Block(unit, read_unit(unit), 0.0), plan, prompts, engine).flops)

    threads = [threading.Thread(target=one, args=(place,)) for place in range(3)]
    before = engine._runner.num_tokens
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(told) == 9
    through = sum(flops["computed"] + flops["unread"] for flops in told)
    assert through == (engine._runner.num_tokens - before) * plan.flops.token > 0
    assert engine.take_work() == Work()


def test_receipts_add_up_and_the_report_names_each_cause(sparse: tuple[Plan, Manifest, Slots]) -> None:
    plan, manifest, _ = sparse
    receipts = read_receipts(plan).values()
    assert {name: sum(receipt.flops[name] for receipt in receipts) for name in manifest.flops} == manifest.flops
    text, facts = report(plan.output)
    assert facts["flops"] == manifest.flops
    assert facts["flops_per_token"] == asdict(plan.flops)
    for cause in ("exact duplicates", "shared beginnings", "router thresholds", "not routed to, against all experts"):
        assert cause in text
        assert cause in Path(plan.output, "report.html").read_text()
    assert "sparsity" not in text
    assert "earlier runs" not in text


def test_what_is_not_known_is_not_told(tmp_path: Path) -> None:
    """A plan of an earlier version has no FLOPs: its run is resumed, and its receipts stay as they are."""
    spec = job(tmp_path)
    plan = plan_job(spec)
    write_plan(plan)
    path = Path(plan.output, "plan.json")
    raw = json.loads(path.read_text())
    assert raw.pop("flops") == asdict(plan.flops)
    path.write_text(json.dumps(raw))
    write_plan(plan)
    old = read_plan(plan.output)
    assert (old.flops, pending_units(old)) == (ModelFlops(), plan.units)
    assert flops_of(old.flops, Work(10, 2), {"duplicates": 5}) == {}
    none = Manifest(
        run_id="r", status="complete", outcome="complete", rows_in=0, rows_annotated=0, rows_rejected=0, units=0,
        units_done=0, prompt_tokens=0, computed_tokens=0, output_tokens=0, error_codes={}, labels={}, data=(),
        rejects=(), rejected_files=(),
    )  # fmt: skip
    assert flops_lines(old, none) == []
