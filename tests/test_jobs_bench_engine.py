"""The works of `bench engine` are what they say, on a tiny checkpoint; the clock and the meter are not fooled."""

import json
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from jobs import bench_engine
from jobs.arguments import make_parser
from jobs.cli import main
from k2model.engine.engine import Engine
from k2model.engine.request import Completion, Request
from schemas.errors import K2Error, SpecError
from tests.checkpoints import write_checkpoint
from tests.fake_jobs import peers_files

PEERS_FIELDS = ["engine", "work", "tickets", "seconds", "tickets_per_s", "tickets_per_s_best", "tokens_per_s",
                "tokens_per_s_best", "foreign_cores", "peak_rss_mib"]  # fmt: skip


@pytest.fixture(autouse=True)
def submitted(monkeypatch: pytest.MonkeyPatch) -> list[list[Request]]:
    """Return what the engine is given, call by call; nobody waits for a quiet machine."""
    calls: list[list[Request]] = []
    submit = Engine.submit

    def record(self: Engine, requests: Sequence[Request]) -> Future[list[Completion]]:
        calls.append(list(requests))
        return submit(self, requests)

    monkeypatch.setattr(Engine, "submit", record)
    monkeypatch.setattr(bench_engine, "_QUIET_S", 0.0)
    return calls


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Return a tiny checkpoint with room for long tickets; what is converted is kept in a cache of its own."""
    folder = tmp_path_factory.mktemp("long")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("K2BATCH_CACHE", str(folder / "cache"))
        yield str(write_checkpoint(folder / "source", max_position_embeddings=4096))


@pytest.fixture
def prompts(tmp_path: Path) -> dict[str, Any]:
    """Return the two files of the peers' work, small."""
    return peers_files(tmp_path)


@pytest.mark.parametrize("work", ["1", "2"])
def test_the_engine_does_the_peers_work_and_prints_their_line(
    checkpoint: str,
    prompts: dict[str, Any],
    work: str,
    submitted: list[list[Request]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    files = ["--tickets", prompts["tickets"], "--labels", prompts["labels"]]
    words = ["bench", "engine", "--work", work, "--repeats", "2", "--limit", "25", "--checkpoint", checkpoint, *files]
    assert main(words) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("JSON ")
    facts = json.loads(line.removeprefix("JSON "))
    assert list(facts) == [*PEERS_FIELDS, "checkpoint"]
    assert (facts["work"], facts["tickets"], len(facts["seconds"])) == (int(work), 25, 2)
    assert facts["tokens_per_s"] == pytest.approx(facts["tickets_per_s"] * (9 if work == "1" else 32), rel=0.01)
    assert facts["tickets_per_s_best"] >= facts["tickets_per_s"]
    assert [len(requests) for requests in submitted] == [2, 25, 25]
    first, options = submitted[1][3], ((97, 98, 99), 0) if work == "1" else ((), 32)
    assert first.prompt_ids == (*range(40, 64), *range(3, 12))
    assert (tuple(c.token_ids[0] for c in first.candidates), first.max_tokens) == options
    assert first.stop_ids == ()


def test_every_pass_computes_the_instructions_again(checkpoint: str, prompts: dict[str, Any]) -> None:
    opened = Engine.open(checkpoint)
    tickets, label_ids = bench_engine._read_tickets(prompts["tickets"], prompts["labels"])
    (timed,) = bench_engine._passes(opened, "1", tickets, label_ids)
    computed = []
    for _ in range(2):
        bench_engine._pass(opened, timed)
        computed.append(sum(completion.computed_tokens for completion in timed.completions))
    opened.close()
    assert computed[0] == computed[1]
    assert 24 + 30 * 9 <= computed[0] < 30 * (24 + 9), "once, and not once for each"


def test_without_files_prompts_are_made_of_the_samples(checkpoint: str, submitted: list[list[Request]]) -> None:
    assert bench_engine.engine(checkpoint, limit=20, rounds=1)["tickets"] == 20
    bench_engine.engine(checkpoint, limit=20, rounds=1)
    assert submitted[1] == submitted[3], "the same prompts each time"
    prompts = [request.prompt_ids for request in submitted[1]]
    assert len(set(prompts)) == 20
    assert len({prompt[:100] for prompt in prompts}) == 1
    assert {len(request.candidates) for request in submitted[1]} == {8}, "no two labels begin with the same token"


def test_77_labels_of_1_to_4_tokens_are_compared_with_2(
    checkpoint: str, prompts: dict[str, Any], submitted: list[list[Request]]
) -> None:
    facts = bench_engine.engine(checkpoint, work="labels77", rounds=2, **prompts)
    assert [len(requests[0].candidates) for requests in submitted] == [77, 2] * 3, "in turn"
    many, few = submitted[-2][0], submitted[-1][0]
    assert {len(candidate.token_ids) for candidate in many.candidates} == {1, 2, 3, 4}
    assert many.candidates[:2] == few.candidates
    assert {request.prompt_ids for request in submitted[-2]} == {request.prompt_ids for request in submitted[-1]}
    assert list(facts["against"]) == [field for field in PEERS_FIELDS[3:] if field != "peak_rss_mib"]


def test_the_ratio_is_of_throughput_round_by_round(
    checkpoint: str, prompts: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([10.0, 5.0, 4.0, 3.0, 8.0, 4.0])

    def take_a_while(_: Engine, timed: bench_engine._Timed) -> None:
        timed.seconds.append(next(clock))

    monkeypatch.setattr(bench_engine, "_pass", take_a_while)
    facts = bench_engine.engine(checkpoint, work="labels77", rounds=3, **prompts)
    assert facts["ratio"] == 0.5
    assert (facts["seconds"], facts["tickets_per_s"], facts["tickets_per_s_best"]) == ([10.0, 4.0, 8.0], 3.75, 7.5)
    assert facts["against"]["tickets_per_s"] == 7.5


def test_no_label_of_the_77_is_the_beginning_of_another() -> None:
    labels = [candidate.token_ids for candidate in bench_engine.labels77(49152)]
    assert not any(a != b and b[: len(a)] == a for a in labels for b in labels)
    assert len({label[0] for label in labels if len(label) > 1}) == 12, "they share first words"
    assert all(0 <= token_id < 49152 for label in labels for token_id in label)


def test_long_tickets_are_of_1500_tokens_and_all_different(
    checkpoint: str, prompts: dict[str, Any], submitted: list[list[Request]]
) -> None:
    assert bench_engine.engine(checkpoint, work="long", limit=3, rounds=1, **prompts)["tickets"] == 3
    bodies = [request.prompt_ids[24:] for request in submitted[-1]]
    assert all(1500 <= len(body) < 1509 for body in bodies)
    assert len({body[:9] for body in bodies}) == 3


def test_mixed_tickets_bring_eight_instructions_one_after_the_other(
    checkpoint: str, prompts: dict[str, Any], submitted: list[list[Request]]
) -> None:
    bench_engine.engine(checkpoint, work="mixed", rounds=1, **prompts)
    prefixes = [request.prompt_ids[:24] for request in submitted[-1]]
    assert len({prefix[0] for prefix in prefixes}) == len(set(prefixes)) == 8
    assert prefixes[:8] == prefixes[8:16]
    assert {tuple(sorted(prefix)) for prefix in prefixes} == {tuple(range(40, 64))}


def test_json_is_compared_with_as_many_free_tokens(
    checkpoint: str, prompts: dict[str, Any], submitted: list[list[Request]], monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = bench_engine.engine(checkpoint, work="json", limit=2, rounds=1, **prompts)
    assert facts["tickets"] == 2
    assert {request.grammar and request.grammar.kind for request in submitted[0]} == {"json_schema"}
    monkeypatch.setattr(bench_engine, "_SCHEMA", '{"enum": ["a", "bcd", "ghij"]}')  # which ends before 64 tokens
    facts = bench_engine.engine(checkpoint, work="json", limit=20, rounds=1, **prompts)
    bound, free = submitted[-2:]
    assert {request.max_tokens for request in bound} == {64}
    assert {request.grammar for request in free} == {None}
    assert {request.max_tokens for request in free} <= {3, 5, 6}
    assert [r.prompt_ids for r in bound] == [r.prompt_ids for r in free]
    tokens = sum(request.max_tokens for request in free)
    for figures in (facts, facts["against"]):
        assert figures["tokens_per_s"] == pytest.approx(figures["tickets_per_s"] * tokens / 20, rel=0.01)


def test_a_failed_request_is_an_error_and_no_speed(checkpoint: str, prompts: dict[str, Any]) -> None:
    path = Path(prompts["tickets"])
    path.write_text(path.read_text() + '\n{"prefix_ids": [], "body_ids": [99999]}')
    with pytest.raises(K2Error, match="a request failed"):
        bench_engine.engine(checkpoint, rounds=1, **prompts)


@pytest.mark.usefixtures("checkpoint")
def test_prompts_beyond_the_context_are_an_error_by_name(tmp_path: Path, prompts: dict[str, Any]) -> None:
    short = str(write_checkpoint(tmp_path / "short", max_position_embeddings=512))
    with pytest.raises(SpecError, match=r"max_position_embeddings=512"):
        bench_engine.engine(short, work="long", limit=2, rounds=1, **prompts)


@pytest.mark.parametrize(
    ("tickets", "labels", "where"),
    [
        ('{"prefix_ids": [1], "body_ids": [2]}\n{"prefix_ids": [1]}', '{"a": 1}', "tickets.jsonl line 2: KeyError"),
        ("no json", '{"a": 1}', "tickets.jsonl line 1: JSONDecodeError"),
        ('{"prefix_ids": [1], "body_ids": [2]}', '["a"]', "labels.json: AttributeError"),
        ('{"prefix_ids": [1], "body_ids": []}', '{"a": 1}', "an empty body"),
        ("", '{"a": 1}', "no ticket"),
    ],
)
def test_files_that_hold_something_else_are_named(tmp_path: Path, tickets: str, labels: str, where: str) -> None:
    (tmp_path / "tickets.jsonl").write_text(tickets)
    (tmp_path / "labels.json").write_text(labels)
    with pytest.raises(SpecError, match=where):
        bench_engine._read_tickets(str(tmp_path / "tickets.jsonl"), str(tmp_path / "labels.json"))


def test_one_file_without_the_other_is_refused() -> None:
    with pytest.raises(SpecError, match="give both") as caught:
        bench_engine.engine(tickets="tickets.jsonl")
    assert "labels=''" in caught.value.message


def test_the_command_line_names_every_work_and_counts_from_one(capsys: pytest.CaptureFixture[str]) -> None:
    for work in bench_engine.WORKS:
        assert make_parser().parse_args(["bench", "engine", "--work", work]).work == work
    for words in (["--limit", "0"], ["--rounds", "-1"], ["--work", "3"]):
        with pytest.raises(SystemExit):
            make_parser().parse_args(["bench", "engine", *words])
    capsys.readouterr()


def test_the_meter_counts_other_processes_and_not_this_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stat = tmp_path / "stat"
    monkeypatch.setattr(bench_engine, "_PROC_STAT", stat)
    monkeypatch.setattr(time, "process_time", lambda: 20.0)
    assert bench_engine._foreign_s() is None
    ticks = os.sysconf("SC_CLK_TCK")
    # user, nice, system, idle, iowait, irq, softirq, steal; then guest, which user counts already.
    stat.write_text("cpu  " + " ".join(str(s * ticks) for s in (30, 1, 5, 1000, 500, 2, 1, 4, 30, 0)) + "\ncpu0 1\n")
    assert bench_engine._foreign_s() == 30 + 1 + 5 + 2 + 1 + 4 - 20


def test_waiting_for_quiet_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(bench_engine, "_QUIET_S", 5.0)
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(time, "sleep", lambda s: clock.__setitem__(0, clock[0] + s))
    monkeypatch.setattr(bench_engine, "_foreign_s", lambda: clock[0] if clock[0] < 3 else 3.0)
    bench_engine._wait_for_quiet()
    assert clock[0] == 4, "busy for three seconds, and a quiet one"
    clock[0] = 0.0
    monkeypatch.setattr(bench_engine, "_foreign_s", lambda: 2 * clock[0])
    bench_engine._wait_for_quiet()
    assert clock[0] == 5
