"""The flow is measured without a model, and says where its time goes."""

import pytest

from jobs import bench_flow
from pipelines.commit import read_receipts
from pipelines.finalize import finalize
from schemas.runs import Manifest, Plan
from tests.fakes import fake_tokenizer


@pytest.fixture(autouse=True)
def _no_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_flow, "open_checkpoint", lambda url: url)
    monkeypatch.setattr(bench_flow, "open_tokenizer", lambda source: fake_tokenizer())


def test_no_tokenizer_tells_texts_apart() -> None:
    tokenizer = bench_flow._NoTokenizer(fake_tokenizer())
    texts = ["", "a", "abcd", "abcde", "é" * 9, "\N{GRINNING FACE} 1"]
    ids = tokenizer.encode_all(texts)
    assert [len(row) for row in ids] == [-(-len(text.encode()) // 4) for text in texts]
    assert len(set(map(tuple, ids))) == len(texts)
    assert tokenizer.decode(fake_tokenizer().encode("as the real one")) == "as the real one"


def test_steps_are_all_of_the_time_of_a_row() -> None:
    steps = bench_flow._steps("none", units=2, rows=16)
    assert [step["step"] for step in steps][:2] == ["read", "tokenize"]
    assert sum(step["share"] for step in steps) == pytest.approx(1, abs=0.01)
    assert all(step["us_per_row"] > 0 for step in steps)


def test_flow_tells_what_a_row_and_a_unit_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {(1, 1): 2.0, (11, 1): 2.5, (11, 101): 3.6}
    monkeypatch.setattr(bench_flow, "_seconds", lambda checkpoint, units, rows, **_: seconds[units, rows])
    facts = bench_flow.flow("none", units=11, rows=101)
    assert [row["tokens"] for row in facts["rows"]] == ["tokenized", "given"]
    assert facts["rows"][0] | {"tokens": ""} == {
        "tokens": "", "rows/s": 1000, "unit_ms": 50.0, "start_s": 2.0, "all_s": 3.6,
    }  # fmt: skip
    assert "1,000 rows/s" in bench_flow.as_text(facts)
    seconds[11, 1] = 1.0  # as when others have slowed the first run
    row = bench_flow.flow("none", units=11, rows=101)["rows"][0]
    assert row["unit_ms"] is None
    seconds[11, 101] = 1.0
    assert "? rows/s" in bench_flow.as_text(bench_flow.flow("none", units=11, rows=101))


def test_a_run_of_the_flow_annotates_what_it_made(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def kept(plan: Plan, *, max_reject_rate: float) -> Manifest:
        receipts = read_receipts(plan).values()
        seen.append((len(receipts), sum(receipt.rows_annotated for receipt in receipts)))
        return finalize(plan, max_reject_rate=max_reject_rate)

    monkeypatch.setattr(bench_flow, "finalize", kept)
    run = {"runner": "local", "workers": 1, "open_engine": open_fake_no_engine}
    assert bench_flow._seconds("none", 3, 8, **run) > 0  # type: ignore[arg-type]
    assert seen == [(3, 24)]


def open_fake_no_engine(plan: object) -> bench_flow._NoEngine:
    """Open the no-op engine in another process, which knows nothing of this test's stand-ins."""
    return bench_flow._NoEngine(fake_tokenizer())
