"""A job beside the labels people gave: the measures, by hand, and the whole verb."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from jobs.cli import main
from jobs.evaluate import Answers, as_text, evaluate, facts, measures, truth_columns
from schemas.errors import SchemaMismatch, SpecError
from tests.fake_jobs import job_file, open_planned_engine
from tests.fakes import POLICY, REPLY, TOPICS, annotate_directly, fake_plan, read_output, tickets, write_tickets


def answers(truth: list[list[int]], given: list[list[int] | None], score: list[float] | None = None) -> Answers:
    def hot(rows: list[list[int]]) -> Any:
        out = np.zeros((len(rows), 3), dtype=bool)
        for row, places in enumerate(rows):
            out[row, places] = True
        return out

    return Answers(
        truth=hot(truth),
        given=hot([row or [] for row in given]),
        answered=np.array([row is not None for row in given]),
        score=None if score is None else np.array(score),
    )


def test_measures_by_hand() -> None:
    # Label 0: 2 right of 3 given, of 3 true; label 1: 1 of 2, of 2; label 2: never given, never true.
    some = answers([[0], [0], [1], [0], [1]], [[0], [0], [0], [1], [1]], [0.9, 0.8, 0.9, 0.6, 0.6])
    found = {name: measure(np.ones(5)) for name, measure in measures(some).items()}
    assert found["accuracy"] == pytest.approx(3 / 5)
    assert found["macro_f1"] == pytest.approx((2 * 2 / 6 + 2 * 1 / 4) / 2)
    # Bins of 1/15: {0.9, 0.9} one right, {0.8} right, {0.6, 0.6} one right.
    assert found["calibration_error"] == pytest.approx((abs(1 - 1.8) + abs(1 - 0.8) + abs(1 - 1.2)) / 5)


def test_a_rejected_row_is_wrong_and_says_nothing_of_calibration() -> None:
    some = answers([[0], [1]], [[0], None], [1.0, 0.0])
    found = {name: measure(np.ones(2)) for name, measure in measures(some).items()}
    assert (found["accuracy"], found["calibration_error"]) == (0.5, 0.0)
    nothing = answers([[], []], [[], None])
    assert measures(nothing)["accuracy"](np.ones(2)) == 0.5


def test_a_weight_is_as_many_rows() -> None:
    some = answers([[0], [1], [2]], [[0], [2], [2]], [0.5, 0.7, 0.9])
    many = answers([[0], [0], [2]], [[0], [0], [2]], [0.5, 0.5, 0.9])
    for name, measure in measures(some).items():
        assert measure(np.array([2.0, 0, 1])) == pytest.approx(measures(many)[name](np.ones(3)))


def test_columns_of_the_truth() -> None:
    tasks = (POLICY, TOPICS, REPLY)
    assert truth_columns(tasks, ["id", "policy", "topics"], []) == {"policy": "policy", "topics": "topics"}
    assert truth_columns(tasks, ["id", "policy"], []) == {"policy": "policy"}
    assert truth_columns(tasks, ["id", "gold"], ["policy=gold"]) == {"policy": "gold"}
    alone = (POLICY, REPLY)
    assert truth_columns(alone, ["label", "body"], []) == {"policy": "label"}
    assert truth_columns(alone, ["gold"], ["gold"]) == {"policy": "gold"}
    for some, names, given, message in (
        ((POLICY, TOPICS), ["gold"], ["gold"], "TASK=COLUMN"),
        ((POLICY, TOPICS), ["label"], [], "no column named policy or topics"),
        ((POLICY,), ["a"], ["policy=b"], 'no column "b"'),
        ((REPLY,), ["label"], [], "no task with labels"),
    ):
        with pytest.raises(SpecError, match=message):
            truth_columns(some, names, given)


class Labelled:
    """A finished run over labelled tickets."""

    def __init__(self, folder: Path, **columns: Any) -> None:
        table = tickets(30)
        for name, values in columns.items():
            table = table.append_column(name, values)
        write_tickets(folder / "in", "a.parquet", table)
        self.plan = fake_plan([folder / "in"], folder / "out", unit_rows=8, prefix="ai_")
        annotate_directly(self.plan, self.plan.units)
        from pipelines.finalize import finalize

        self.manifest = finalize(self.plan, max_reject_rate=1.0)
        self.output = pa.concat_tables(read_output(self.plan).values())


def test_a_run_is_compared_row_by_row(tmp_path: Path) -> None:
    truth = ["safe", "hate", None] * 10
    topics = [[], ["billing"], ["billing", "login"]] * 10
    run_ = Labelled(tmp_path, gold=pa.array(truth).dictionary_encode(), topics=pa.array(topics))
    policy, topic = evaluate(
        run_.plan, run_.manifest, columns={"policy": "gold", "topics": "topics"}, repeats=5, sample=7
    )
    said = run_.output["ai_policy_label"].to_pylist()
    right = [a == b for a, b in zip(truth, said, strict=True) if a is not None]
    assert (policy.rows, policy.rejected) == (20, 0)
    assert policy.accuracy.value == pytest.approx(sum(right) / 20)
    assert policy.accuracy.low <= policy.accuracy.value <= policy.accuracy.high
    safe = policy.labels[0]
    both = sum(a == b == "safe" for a, b in zip(truth, said, strict=True))
    given = sum(b == "safe" for a, b in zip(truth, said, strict=True) if a is not None)
    assert (safe.label, safe.support, safe.given) == ("safe", 10, given)
    assert safe.precision == (both / given if given else None)
    assert policy.labels[2].recall is None
    assert set(policy.spread) == {"accuracy", "macro_f1", "calibration_error"}
    assert policy.spread["accuracy"]["deviation"] > 0
    exact = [sorted(a) == sorted(b) for a, b in zip(topics, run_.output["ai_topics_labels"].to_pylist(), strict=True)]
    assert topic.rows == 30
    assert topic.accuracy.value == pytest.approx(sum(exact) / 30)
    assert topic.calibration_error is None
    text = as_text([policy, topic])
    assert 'policy: 20 rows with a label in "gold"' in text
    assert "samples: median" in text
    assert facts([policy])[0]["labels"][0]["support"] == 10
    again = evaluate(run_.plan, run_.manifest, columns={"policy": "gold"}, repeats=5, sample=7)
    assert again == [policy]


def test_more_rows_make_the_interval_narrower() -> None:
    from jobs.evaluate import _quality

    def width(rows: int) -> float:
        quality = _quality(POLICY, "gold", answers([[0]] * rows, [[0], [1]] * (rows // 2), [0.5] * rows), 0, 0)
        assert quality.spread == {}
        return quality.accuracy.high - quality.accuracy.low

    # 2 * 1.96 * sqrt(p (1 - p) / rows)
    assert width(100) == pytest.approx(0.196, abs=0.03)
    assert width(1600) == pytest.approx(0.049, abs=0.008)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (pa.array(["safe", "odd", "hate"] * 10), "row 1: column .gold. has .'odd'"),
        (pa.array([0, 1, 2] * 10), "int64, expected text"),
        (pa.array([None] * 30, pa.string()), "no label in any row"),
        (pa.array([["safe", "hate"]] * 30), "does not know"),
    ],
)
def test_odd_truths_are_named(values: pa.Array, message: str, tmp_path: Path) -> None:
    run_ = Labelled(tmp_path, gold=values)
    with pytest.raises(SchemaMismatch, match=message):
        evaluate(run_.plan, run_.manifest, columns={"policy": "gold"})
    with pytest.raises(SpecError, match="tasks with labels: policy, topics"):
        evaluate(run_.plan, run_.manifest, columns={"polcy": "gold"})


def test_the_files_of_the_truth_are_the_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tickets(12).append_column("policy", pa.array(["safe", "spam"] * 6))
    write_tickets(tmp_path / "truth", "t.parquet", table)
    path = job_file(tmp_path)
    words = ["eval", str(path), "--truth", f"{tmp_path}/truth/", "--json"]
    assert main(words, open_engine=open_planned_engine) == 0
    (quality,) = json.loads(capsys.readouterr().out.splitlines()[-1])["tasks"]
    assert (quality["task"], quality["column"], quality["rows"]) == ("policy", "policy", 12)
    wrong = main(["eval", str(path), "--truth", str(tmp_path / "truth"), "--column", "polcy=policy"])
    assert wrong == 2
