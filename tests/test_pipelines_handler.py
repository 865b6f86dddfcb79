"""The Beam ModelHandler in other people's pipelines: bad elements fail alone, one engine serves all."""

import pickle
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from apache_beam.ml.inference.base import KeyedModelHandler, ModelHandler, RunInference
from apache_beam.runners.portability.fn_api_runner.fn_runner import FnApiRunner

from k2model.engine.request import Completion, Request
from pipelines import handler
from pipelines.handler import K2ModelHandler
from pipelines.quiet_beam import beam
from tests.fakes import POLICY, REPLY, TOPICS, FakeEngine

LABELS = {"safe": "ordinary talk", "spam": "adverts"}
OPENED: list[str] = []
SEEN: list[Any] = []
DEAD: list[Any] = []
TICKETS = [f"ticket {number}" for number in range(20)]


def open_fake(checkpoint: str, precision: str) -> FakeEngine:
    OPENED.append(checkpoint)
    return FakeEngine()


def see(result: Any) -> None:
    SEEN.append(result)


def bury(element: Any) -> None:
    DEAD.append(element)


class FailingEngine(FakeEngine):
    """Cannot compute the one ticket that says so."""

    def submit(self, requests: Sequence[Request]) -> Future[list[Completion]]:
        completions = super().submit(requests).result()
        is_bad = ["no way" in self.tokenizer.decode(request.prompt_ids) for request in requests]
        future: Future[list[Completion]] = Future()
        bad = Completion(error="MemoryError: no way")
        future.set_result([bad if failed else one for failed, one in zip(is_bad, completions, strict=True)])
        return future


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    OPENED.clear()
    SEEN.clear()
    yield
    handler.close_engines()


def k2(labels: dict[str, str] | None = None, **options: Any) -> K2ModelHandler:
    asked: dict[str, Any] = {} if "tasks" in options else {"labels": labels or LABELS}
    return K2ModelHandler(**{"open_engine": open_fake, **asked, **options})


def infer_directly(model_handler: K2ModelHandler, elements: Sequence[Any]) -> list[dict[str, Any]]:
    results: list[Any] = model_handler.run_inference(elements, model_handler.load_model())
    return [dict(result.inference) for result in results]


def infer(model_handler: ModelHandler[Any, Any, Any], elements: Sequence[Any], *, workers: int = 1) -> list[Any]:
    """Return what `RunInference` makes of `elements`, in threads of this process."""
    flags = ["--direct_running_mode=multi_threading", f"--direct_num_workers={workers}"]
    options = beam.options.pipeline_options.PipelineOptions(flags)
    with beam.Pipeline(runner=FnApiRunner(), options=options) as pipeline:
        results = pipeline | beam.Create(list(elements)) | RunInference(model_handler)
        results | beam.Map(see)
    return list(SEEN)


def test_every_text_gets_one_of_the_labels_and_its_scores() -> None:
    results = infer(k2(), TICKETS)
    assert sorted(result.example for result in results) == sorted(TICKETS)
    for result in results:
        inference = result.inference
        assert (inference["status"], inference["error_code"]) == ("annotated", None)
        assert inference["label"] == max(inference["scores"], key=inference["scores"].get)
        assert sum(inference["scores"].values()) == pytest.approx(1)
        assert result.model_id == FakeEngine().fingerprint


def test_bad_elements_fail_alone_and_touch_no_neighbour() -> None:
    bad: list[Any] = [None, "", "\u200b", b"caf\xe9", "x" * 9000, 5]
    results = infer(k2(), [*TICKETS[:5], *bad, *TICKETS[5:]])
    codes = [result.inference["error_code"] for result in results]
    failed = [code for code in codes if code]
    assert sorted(failed) == sorted(
        ["null_text", "blank_text", "blank_text", "invalid_utf8", "prompt_too_long", "invalid_utf8"]
    )
    assert all(result.inference["error_message"] for result in results if result.inference["error_code"])
    clean_results = {result.example: result.inference for result in results if result.inference["error_code"] is None}
    SEEN.clear()
    assert {result.example: result.inference for result in infer(k2(), TICKETS)} == clean_results


def test_one_that_the_model_cannot_compute_is_a_dead_letter_of_one() -> None:
    model = k2(open_engine=lambda checkpoint, precision: FailingEngine())
    results = infer_directly(model, ["fine", "no way", "fine, too", "\ud800"])
    assert [result["error_code"] for result in results] == [None, "engine_failure", None, "invalid_utf8"]


def test_exception_handling_has_nothing_to_catch() -> None:
    with beam.Pipeline(runner=FnApiRunner()) as pipeline:
        elements = pipeline | beam.Create(["fine", None, "also fine"])
        good, bad = elements | RunInference(k2()).with_exception_handling()
        good | "good" >> beam.Map(see)
        bad.failed_inferences | "bad" >> beam.Map(bury)
    assert (len(SEEN), DEAD) == (3, [])


def test_keys_are_kept() -> None:
    results = infer(KeyedModelHandler(k2()), [(f"id-{number}", text) for number, text in enumerate(TICKETS)])
    assert sorted((key, result.example) for key, result in results) == sorted(
        (f"id-{number}", text) for number, text in enumerate(TICKETS)
    )


def test_one_engine_serves_threads_and_transforms() -> None:
    flags = ["--direct_running_mode=multi_threading", "--direct_num_workers=3"]
    options = beam.options.pipeline_options.PipelineOptions(flags)
    with beam.Pipeline(runner=FnApiRunner(), options=options) as pipeline:
        elements = pipeline | beam.Create(TICKETS) | beam.Reshuffle()
        elements | "one" >> RunInference(k2()) | "a" >> beam.Map(see)
        elements | "two" >> RunInference(k2({"hot": "", "cold": ""})) | "b" >> beam.Map(see)
    assert len(SEEN) == 2 * len(TICKETS)
    assert OPENED == ["smollm2-135m-instruct"]
    assert {tuple(result.inference["scores"]) for result in SEEN} == {("safe", "spam"), ("hot", "cold")}


def test_other_tasks_have_the_columns_of_a_run() -> None:
    [result] = infer_directly(k2(tasks=[TOPICS]), ["hi"])
    assert set(result) == {"status", "error_code", "error_message", "labels", "scores"}
    [result] = infer_directly(k2(tasks=[POLICY, REPLY]), ["hi"])
    assert {"policy_label", "policy_scores", "reply_text", "reply_finish_reason"} <= set(result)
    assert isinstance(result["policy_scores"], dict)


def test_the_pipeline_of_the_readme_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    [code] = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[1] / "README.md").read_text(), re.DOTALL)
    monkeypatch.setattr(handler, "open_engine_of", open_fake)
    exec(code, {})
    printed = capsys.readouterr().out.split()
    assert printed[-1] == "blank_text"
    assert set(printed[:2]) <= {"safe", "spam"}


def test_the_handler_travels_and_says_what_it_needs() -> None:
    model = pickle.loads(pickle.dumps(k2()))
    assert model.run_inference(["hi"], model.load_model()) == k2().run_inference(["hi"], k2().load_model())
    assert isinstance(model.run_inference([], model.load_model()), list)
    assert model.get_num_bytes(["ab", "c"]) == 3
    assert model.batch_elements_kwargs() == {"min_batch_size": 256, "max_batch_size": 2048}
    with pytest.raises(ValueError, match="say what to ask"):
        K2ModelHandler()
    with pytest.raises(ValueError, match="say what to ask"):
        K2ModelHandler(LABELS, tasks=[POLICY])
    with pytest.raises(ValueError, match="temperature"):
        model.validate_inference_args({"temperature": 0.5})
