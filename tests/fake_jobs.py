"""A job that needs no model: its file, its checkpoint and the engine that stands in."""

import json
import time
from pathlib import Path

import pyarrow as pa

from jobs.spec import JobSpec
from pipelines.annotate import OpenEngine
from schemas.runs import Manifest, Plan
from tests.checkpoints import write_checkpoint
from tests.fakes import FakeEngine, text_array, write_tickets


def open_planned_engine(plan: Plan) -> FakeEngine:
    """Return a fake engine that claims to be the planned checkpoint."""
    return FakeEngine(fingerprint=plan.model_fingerprint)


def peers_files(folder: Path) -> dict[str, str]:
    """Write the two files of the peers' work, small, and return them as options of `bench`."""
    rows = [{"prefix_ids": list(range(40, 64)), "body_ids": list(range(n, n + 9))} for n in range(30)]
    (folder / "tickets.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "labels.json").write_text(json.dumps({"a": 97, "b": 98, "c": 99}))
    return {"tickets": str(folder / "tickets.jsonl"), "labels": str(folder / "labels.json")}


def run_here(spec: JobSpec, open_engine: OpenEngine = open_planned_engine) -> Manifest:
    """Run the job without Beam and its process, which take a second: the same steps, called in turn."""
    # Here, since the processes that annotate import this file, too.
    from jobs.report import publish_report
    from jobs.run import plan_job
    from pipelines import graph
    from pipelines.annotate import Block, annotate
    from pipelines.cache import open_cache
    from pipelines.cache_files import tidy
    from pipelines.commit import commit, pending_units, write_plan
    from pipelines.finalize import finalize
    from pipelines.read import read_unit

    plan = plan_job(spec)
    write_plan(plan)
    engine, prompts = graph.engine_and_prompts(plan, open_engine)
    for unit in pending_units(plan):
        block = Block(unit, read_unit(unit), time.perf_counter())
        commit(annotate(block, plan, prompts, engine, open_cache(plan)), plan)
    graph.close_engines()
    manifest = finalize(plan, max_reject_rate=spec.max_reject_rate)
    if plan.uses_cache:
        tidy(plan, spec.cache_gb)
    publish_report(plan, manifest)
    return manifest


def checkpoint(folder: Path) -> Path:
    """Make and return a tiny checkpoint with the fake model's tokenizer and context."""
    return write_checkpoint(folder, max_position_embeddings=8192)


def dirty_tickets() -> pa.Table:
    """Return 40 tickets: 33 to annotate, three of them alike, and 7 to reject."""
    bodies: list[bytes | None] = [f"ticket {number}".encode() for number in range(30)]
    bodies += [b"the same words"] * 3
    bodies += [None, None, b"", b" \n", "\u200b".encode(), b"caf\xe9", b"x" * 20_000]
    return pa.table(
        {
            "ticket_id": pa.array([f"T{number:03d}" for number in range(39)] + [None]),
            "body": text_array(bodies),
        }
    )


def job_file(folder: Path, *, max_reject_rate: float = 0.5, more: str = "") -> Path:
    """Write a job with its input below `folder`; return its path."""
    write_tickets(folder / "in", "a.parquet", dirty_tickets(), row_group_size=10)
    path = folder / "job.toml"
    path.write_text(
        f"""
[job]
name = "sweep"
[input]
urls = ["{folder}/in/"]
columns = {{ id = "ticket_id", text = ["subject?", "body"] }}
unit_rows = 10
[output]
url = "{folder}/out/"
[model]
checkpoint = "{checkpoint(folder / "checkpoint")}"
[[task]]
name = "policy"
kind = "choose"
labels = {{ "safe" = "ordinary talk", "spam" = "adverts" }}
[[task]]
name = "gist"
kind = "generate"
instruction = "Say it in one word."
max_tokens = 4
[limits]
max_reject_rate = {max_reject_rate}
max_prompt_tokens = 4096
{more}
""",
        encoding="utf-8",
    )
    return path
