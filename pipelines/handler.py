"""A Beam `ModelHandler`: ticket text in, annotation out, for other people's `RunInference` pipelines.

    tickets | RunInference(K2ModelHandler({"safe": "ordinary talk", "spam": "adverts"}))

A text that cannot be annotated fails alone: its own result says why, and no exception takes its batch along. Not for
Beam's Dask runner, which drops what a step emits at the end of a bundle, and so rows of any `RunInference`
(`k2batch run` does without).
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from apache_beam.ml.inference.base import ModelHandler, PredictionResult

from k2model.formats.checkpoint import DEFAULT_CHECKPOINT
from pipelines.annotate import SupportsAnnotate, answer_all, ask, is_visible, outcome
from pipelines.prompts import Prompts
from schemas.errors import BlankText, InvalidText, NullText, RowError
from schemas.runs import Task

_MIN_BATCH_ROWS = 256
_MAX_BATCH_ROWS = 2048
"""Rows handed to the engine at once, unless a bundle ends: it plans over all of them and cuts steps itself."""

_ENGINES: dict[tuple[object, ...], SupportsAnnotate] = {}
_LOCK = threading.Lock()
"""One engine of each checkpoint in a process, however many transforms use it. Module-level, not Beam's own sharing:
that one holds a weak reference, and a copy for each transform."""


@dataclass(eq=False, slots=True, weakref_slot=True)
class LoadedModel:
    """An engine, and the prompts of one handler."""

    engine: SupportsAnnotate
    prompts: Prompts


class K2ModelHandler(ModelHandler[str, PredictionResult, LoadedModel]):
    """Annotates texts; each result's `inference` is a dict.

    Of a text that was annotated it holds the columns of `k2batch run`, without the task's name if there is one task:
    `label`, `score`, `margin` and `scores` of labels. `status` is `annotated` or `rejected`; `error_code` and
    `error_message` say why, and are None where nothing is wrong.
    """

    def __init__(
        self,
        labels: Mapping[str, str] | None = None,
        *,
        guidelines: str = "",
        tasks: Sequence[Task] = (),
        checkpoint: str = DEFAULT_CHECKPOINT,
        precision: str = "int8",
        max_prompt_tokens: int = 2048,
        open_engine: Callable[[str, str], SupportsAnnotate] | None = None,
    ) -> None:
        """Say what to ask; the model is opened where it runs.

        Args:
            labels: label to description, of which each text gets the one that fits.
            guidelines: how to choose among them.
            tasks: other questions, in place of labels.
            checkpoint: as `[model] checkpoint` of a job.
            precision: as `[model] precision` of a job.
            max_prompt_tokens: a text whose prompt and answer are longer is rejected.
            open_engine: takes checkpoint and precision and stands in for the model, in tests; an importable function.

        Raises: ValueError if there are both labels and tasks, or neither.
        """
        super().__init__(min_batch_size=_MIN_BATCH_ROWS, max_batch_size=_MAX_BATCH_ROWS)
        if bool(labels) == bool(tasks):
            raise ValueError('say what to ask: labels, such as {"safe": "ordinary talk", "spam": ""}, or else tasks')
        self._tasks = tuple(tasks) or (
            Task(name="label", kind="choose", labels=dict(labels or {}), guidelines=guidelines),
        )
        self._checkpoint = checkpoint
        self._precision = precision
        self._max_prompt_tokens = max_prompt_tokens
        self._open_engine = open_engine or open_engine_of

    def load_model(self) -> LoadedModel:
        """Return the process's engine, opened at first use, with the prompts of these tasks. Raises: K2Error."""
        key = (self._checkpoint, self._precision, self._open_engine)
        with _LOCK:
            if key not in _ENGINES:
                _ENGINES[key] = self._open_engine(self._checkpoint, self._precision)
            engine = _ENGINES[key]
        limit = min(self._max_prompt_tokens, engine.max_position_embeddings)
        prompts = Prompts(self._tasks, engine.tokenizer, limit)
        prompts.calibrate(engine)
        return LoadedModel(engine, prompts)

    def run_inference(
        self, batch: Sequence[str], model: LoadedModel, inference_args: dict[str, Any] | None = None
    ) -> list[PredictionResult]:
        """Return a result for each text, in order.

        A list: of a generator Beam neither counts nor catches what goes wrong in it.
        """
        fates = ask([_checked(text) for text in batch], model.prompts)
        answers = answer_all(fates, model.prompts, model.engine)
        values = {name: column.to_pylist() for name, column in answers.columns.items()}
        results = []
        for text, fate in zip(batch, fates, strict=True):
            told = outcome(fate, answers)
            if isinstance(told, RowError):
                inference = {"status": "rejected", "error_code": told.code, "error_message": told.message}
            else:
                place = answers.places[told]
                inference = self._annotated({name: column[place] for name, column in values.items()})
            results.append(PredictionResult(text, inference, model.engine.fingerprint))
        return results

    def get_num_bytes(self, batch: Sequence[str]) -> int:
        """Return the size of the texts; Beam would pickle them to know."""
        return sum(len(text) for text in batch if isinstance(text, str | bytes))

    def get_metrics_namespace(self) -> str:
        """Return the name that Beam's counters of this handler bear."""
        return "K2Batch"

    def validate_inference_args(self, inference_args: dict[str, Any] | None) -> None:
        """Refuse arguments: what is asked is fixed by the handler. Raises: ValueError."""
        if inference_args:
            raise ValueError(f"K2ModelHandler takes no inference_args, but got: {', '.join(inference_args)}")

    def _annotated(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return what is told of a text that has these values of the task columns."""
        alone = f"{self._tasks[0].name}_" if len(self._tasks) == 1 else ""
        named = {
            name.removeprefix(alone): dict(value) if name.endswith("_scores") else value
            for name, value in values.items()
        }
        return {"status": "annotated", "error_code": None, "error_message": None, **named}


def open_engine_of(checkpoint: str, precision: str) -> SupportsAnnotate:
    """Return an opened engine. Raises: CheckpointError."""
    # Here, so that torch is loaded where texts are annotated and not where graphs are built.
    from k2model.engine.engine import Engine

    return Engine.open(checkpoint, precision=precision)


def close_engines() -> None:
    """Close every engine that handlers of this process opened."""
    with _LOCK:
        for engine in _ENGINES.values():
            close = getattr(engine, "close", None)
            if close is not None:
                close()
        _ENGINES.clear()


def _checked(text: object) -> str | RowError:
    """Return the text of an element, or why it is none."""
    if text is None:
        return NullText("the element is None")
    if isinstance(text, bytes):
        try:
            text = text.decode()
        except UnicodeDecodeError as error:
            return InvalidText(f"the element is not UTF-8 at byte {error.start}")
    if not isinstance(text, str):
        return InvalidText(f"the element is {type(text).__name__}, expected str")
    if any("\ud800" <= char <= "\udfff" for char in text):
        return InvalidText("the element holds half a character, which UTF-8 has not")
    return text if is_visible(text) else BlankText(f"no visible character among {len(text)}")
