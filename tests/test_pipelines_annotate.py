"""Rows in, rows out: the fate of every kind of dirt, duplicates, and the numbers."""

import time
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path

import pyarrow as pa
import pytest

from k2model.engine.request import Candidate, Completion, Request
from pipelines.annotate import AnnotatedBlock, Block, annotate, hash_requests, is_visible, row_texts
from pipelines.prompts import Prompts
from pipelines.read import read_unit
from schemas.annotations import added_fields
from schemas.errors import RowError
from schemas.rejects import REJECTS
from schemas.runs import Plan
from tests.fakes import COLUMNS, TASKS, FakeEngine, fake_plan, text_array, tickets, write_tickets


class CountingEngine(FakeEngine):
    """A fake engine that keeps what it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[Request] = []

    def submit(self, requests: Sequence[Request]) -> Future[list[Completion]]:
        self.asked.extend(requests)
        return super().submit(requests)


def run(
    table: pa.Table, folder: Path, *, limit: int = 4096, prefix: str = ""
) -> tuple[AnnotatedBlock, list[Request], Plan]:
    """Annotate `table` as one unit, with the real prompts and the fake model."""
    write_tickets(folder, "a.parquet", table)
    plan = fake_plan([folder], folder / "out", unit_rows=10_000, prefix=prefix, max_prompt_tokens=limit)
    (unit,) = plan.units
    engine = CountingEngine()
    prompts = Prompts(plan.tasks, engine.tokenizer, limit)
    return annotate(Block(unit, read_unit(unit), time.perf_counter()), plan, prompts, engine), engine.asked, plan


def text_table(rows: Sequence[tuple[bytes | None, bytes | None]]) -> pa.Table:
    """Return tickets with these subjects and bodies."""
    return pa.table(
        {
            "ticket_id": pa.array(range(len(rows))),
            "subject": text_array([subject for subject, _ in rows]),
            "body": text_array([body for _, body in rows]),
        }
    )


@pytest.mark.parametrize(
    ("subject", "body", "expected"),
    [
        (b"a", b"b", "a\n\nb"),
        (None, b"b", "b"),
        (b"a", None, "a"),
        (b" \t", b"b", "b"),
        (b"a", "\u200b\u2028".encode(), "a"),
        (b" a ", b"b\n", " a \n\nb\n"),
        (b"\x00\x1ba", b"<|im_end|>\nsystem", "\x00\x1ba\n\n<|im_end|>\nsystem"),
        (None, None, "null_text"),
        (b"", None, "blank_text"),
        (b"", b"  \n", "blank_text"),
        (None, "\u200b\ufeff\u00a0".encode(), "blank_text"),
        (b"a", b"ok \xff", "invalid_utf8"),
        (b"\xc3", None, "invalid_utf8"),
        (b"", b"\xed\xa0\x80", "invalid_utf8"),
    ],
)
def test_text_of_a_row(subject: bytes | None, body: bytes | None, expected: str) -> None:
    (found,) = row_texts(text_table([(subject, body)]), COLUMNS)
    assert (found.code if isinstance(found, RowError) else found) == expected


def test_bad_bytes_are_located() -> None:
    (error,) = row_texts(text_table([(b"good", b"0123\xfe\xff")]), COLUMNS)
    assert isinstance(error, RowError)
    assert error.message == 'column "body" is not UTF-8 at byte 4: fe ff'


@pytest.mark.parametrize(
    "type_", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
)
def test_text_types_read_alike(type_: pa.DataType) -> None:
    values = [b"a", None, b"\xff", b"\xc3\xa9", b"a"]
    if pa.types.is_dictionary(type_):
        body = pa.DictionaryArray.from_arrays(
            pa.array([0, None, 1, 2, 0], pa.int32()), text_array([b"a", b"\xff", b"\xc3\xa9"])
        )
    else:
        body = text_array(values, type_)
    table = pa.table({"body": pa.chunked_array([body.slice(0, 2), body.slice(2)])})
    texts = row_texts(table, COLUMNS)
    assert [text.code if isinstance(text, RowError) else text for text in texts] == [
        "a",
        "null_text",
        "invalid_utf8",
        "é",
        "a",
    ]


def test_visible_characters() -> None:
    assert is_visible(" \u200b.")
    assert is_visible("한")
    assert not is_visible("")
    assert not is_visible(" \t\r\n\x00\u200b\u2029\u3000\ue000")


def test_every_row_comes_back_in_order_with_its_columns(tmp_path: Path) -> None:
    table = tickets(20)
    block, _, plan = run(table, tmp_path, prefix="k2_")
    assert block.table.schema.names == [*table.schema.names, *[field.name for field in added_fields(plan)]]
    assert block.table.column("ticket_id").equals(table.column("ticket_id"))
    assert block.table.column("metadata").equals(table.column("metadata"))
    assert set(block.table.column("k2_status").to_pylist()) == {"annotated"}
    assert set(block.table.column("k2_policy_label").to_pylist()) <= {"safe", "hate", "spam"}
    scores = block.table.column("k2_policy_scores")[3].as_py()
    assert [name for name, _ in scores] == ["safe", "hate", "spam"]
    assert sum(score for _, score in scores) == pytest.approx(1, abs=1e-6)
    assert block.rejects.num_rows == 0
    assert block.rejects.schema == REJECTS


def test_rejected_rows_stand_in_both_tables(tmp_path: Path) -> None:
    long = b"x" * 5000
    rows = [(b"fine", b"a"), (None, None), (b"", b"\x0b"), (b"bad", b"\xff"), (b"long", long), (b"fine", b"b")]
    block, asked, _ = run(text_table(rows), tmp_path)
    codes = [None, "null_text", "blank_text", "invalid_utf8", "prompt_too_long", None]
    assert block.table.column("error_code").to_pylist() == codes
    assert block.table.column("status").to_pylist() == ["rejected" if code else "annotated" for code in codes]
    assert block.table.column("body").cast(pa.binary()).to_pylist() == [body for _, body in rows]
    for name in ("policy_label", "policy_scores", "topics_labels", "reply_text", "usage", "route", "prompt_hash"):
        assert [value is None for value in block.table.column(name).to_pylist()] == [code is not None for code in codes]
    rejects = block.rejects.to_pydict()
    assert rejects["row"] == [1, 2, 3, 4]
    assert rejects["id"] == ["1", "2", "3", "4"]
    assert rejects["error_code"] == codes[1:5]
    assert all(rejects["error_message"])
    assert block.error_codes == dict.fromkeys(sorted(filter(None, codes)), 1)
    assert len(asked) == 2 * 2  # two good rows; one request for the scored tasks, one for the generated


def test_row_numbers_of_rejects_count_from_the_file(tmp_path: Path) -> None:
    path = write_tickets(tmp_path, "a.parquet", text_table([(b"a", b"b")] * 5 + [(None, None)]))
    plan = fake_plan([path], tmp_path / "out", unit_rows=4)
    engine = FakeEngine()
    prompts = Prompts(plan.tasks, engine.tokenizer, 4096)
    block = annotate(Block(plan.units[1], read_unit(plan.units[1]), 0.0), plan, prompts, engine)
    assert block.rejects.column("row").to_pylist() == [5]


def test_repeated_and_null_ids_are_kept(tmp_path: Path) -> None:
    table = text_table([(b"a", b"1"), (b"b", b"2"), (None, None), (None, None)])
    table = table.set_column(0, "ticket_id", text_array([b"same", b"same", None, b"\xff"]))
    block, _, _ = run(table, tmp_path)
    assert block.table.column("ticket_id").cast(pa.binary()).to_pylist() == [b"same", b"same", None, b"\xff"]
    assert block.table.column("status").to_pylist() == ["annotated", "annotated", "rejected", "rejected"]
    assert block.rejects.column("id").to_pylist() == [None, "\ufffd"]


def test_duplicates_are_asked_once(tmp_path: Path) -> None:
    rows = [(b"a", b"b"), (b"c", b"d"), (None, b"a\n\nb"), (b"a", b"b"), (b"c", None)]
    block, asked, _ = run(text_table(rows), tmp_path)
    table = block.table
    assert table.column("route").to_pylist() == ["large", "large", "duplicate", "duplicate", "large"]
    assert len(asked) == 3 * 2
    assert len(set(asked)) == len(asked)
    first, copy = table.slice(0, 1).to_pylist()[0], table.slice(2, 1).to_pylist()[0]
    for name in ("policy_label", "policy_scores", "topics_scores", "reply_text", "prompt_hash"):
        assert first[name] == copy[name]
    assert len(set(table.column("prompt_hash").to_pylist())) == 3
    assert copy["usage"]["cached_tokens"] == copy["usage"]["prompt_tokens"] == first["usage"]["prompt_tokens"]
    assert 0 < first["usage"]["cached_tokens"] < first["usage"]["prompt_tokens"]


class FailingEngine(FakeEngine):
    """Cannot compute prompts that say POISON."""

    def submit(self, requests: Sequence[Request]) -> Future[list[Completion]]:
        good = super().submit(requests).result()
        texts = [self.tokenizer.decode(request.prompt_ids) for request in requests]
        future: Future[list[Completion]] = Future()
        bad = Completion(error="ValueError: POISON")
        future.set_result([bad if "POISON" in text else c for text, c in zip(texts, good, strict=True)])
        return future


def test_a_row_the_model_cannot_compute_is_rejected_and_its_neighbours_are_not(tmp_path: Path) -> None:
    rows = [(b"a", b"b"), (b"a", b"POISON"), (b"c", b"d"), (b"a", b"POISON"), (None, None)]
    path = write_tickets(tmp_path, "a.parquet", text_table(rows))
    plan = fake_plan([path], tmp_path / "out")
    engine = FailingEngine()
    prompts = Prompts(plan.tasks, engine.tokenizer, 4096)
    block = annotate(Block(plan.units[0], read_unit(plan.units[0]), 0.0), plan, prompts, engine)
    assert block.table.column("error_code").to_pylist() == [None, "engine_failure", None, "engine_failure", "null_text"]
    assert block.error_codes == {"engine_failure": 2, "null_text": 1}
    bad = block.table.slice(1, 1).to_pylist()[0]
    assert bad["status"] == "rejected"
    assert "ValueError: POISON" in bad["error_message"]
    assert bad["policy_label"] is bad["reply_text"] is bad["usage"] is None


def test_numbers_add_up(tmp_path: Path) -> None:
    block, asked, _ = run(text_table([(b"a", b"b"), (b"a", b"b"), (b"c", b"ddd"), (None, None)]), tmp_path)
    usage = [value for value in block.table.column("usage").to_pylist() if value]
    lengths = [sum(len(request.prompt_ids) for request in asked[i : i + 2]) for i in (0, 2)]
    assert [value["prompt_tokens"] for value in usage] == [lengths[0], lengths[0], lengths[1]]
    assert block.prompt_tokens == 2 * lengths[0] + lengths[1]
    assert block.computed_tokens == sum(len(r.prompt_ids) - r.num_prefix_tokens for r in asked)
    assert block.output_tokens == sum(value["output_tokens"] for value in usage) == 3 * 8
    labels = block.table.column("policy_label").to_pylist()
    assert block.labels["policy"] == {label: labels.count(label) for label in ("safe", "hate", "spam")}
    assert list(block.labels) == ["policy", "topics"]


def test_unit_of_rejected_rows_asks_nothing(tmp_path: Path) -> None:
    block, asked, plan = run(text_table([(None, None), (b"", b"")]), tmp_path)
    assert asked == []
    assert block.table.schema.types[3:] == [field.type for field in added_fields(plan)]
    assert block.prompt_tokens == block.computed_tokens == 0


def test_hash_tells_requests_apart() -> None:
    a, b = Candidate((1, 2), 2), Candidate((1,), 1)
    different = [
        (Request(prompt_ids=(1, 2, 3)),),
        (Request(prompt_ids=(1, 2)), Request(prompt_ids=(3,))),
        (Request(prompt_ids=(1, 2, 3), num_prefix_tokens=1),),
        (Request(prompt_ids=(1, 2, 3), max_tokens=5),),
        (Request(prompt_ids=(1, 2, 3), candidates=(a, b)),),
        (Request(prompt_ids=(1, 2, 3), candidates=(b, a)),),
        (Request(prompt_ids=(1, 2, 3), candidates=(Candidate((1, 2), 1), b)),),
    ]
    assert len(set(hash_requests(different))) == len(different)
    assert hash_requests(different[4:5]) == hash_requests([(Request(prompt_ids=(1, 2, 3), candidates=(a, b)),)])


def test_all_kinds_of_task_are_covered() -> None:
    assert {task.kind for task in TASKS} == {"choose", "choose_many", "generate"}
