"""The columns k2batch adds. One input row gives one output row, in input order, with every input column kept.

Per task (a column name is `<prefix><task>_<suffix>`):

| kind          | suffix   | type               | meaning                                                             |
|---------------|----------|--------------------|---------------------------------------------------------------------|
| `choose`      | `label`  | string             | the label with the highest score                                    |
|               | `score`  | float              | its probability among the task's labels, in [0, 1]                  |
|               | `margin` | float              | score minus the second best score                                   |
|               | `scores` | map<string, float> | the probability of every label, in the job file's order; sums to 1 |
| `choose_many` | `labels` | list<string>       | every label whose score is at least the task's threshold            |
|               | `scores` | map<string, float> | the probability of each label on its own; each in [0, 1]            |
| `generate`    | `text`   | string             | the model's answer                                                  |
|               | `finish_reason` | string      | `stop` (it is whole) or `length` (cut at `max_tokens`)              |
|               | `json`   | string             | `json_schema`: `text` with sorted keys, no spaces; null if no JSON  |
|               | `samples` | list<string>      | with `samples` above 1: all answers; the others are of the first   |

Per row (`<prefix><name>`): `status` (`annotated` or `rejected`), `error_code` and `error_message` (null when annotated;
the codes are `schemas.errors.ROW_ERROR_CODES`), `model_fingerprint`, `prompt_hash`, `usage` and `route`.
Task columns are null in a rejected row.
"""

import pyarrow as pa

from schemas.runs import Plan, Task

_SCORES = pa.map_(pa.string(), pa.float32())

TASK_FIELDS: dict[str, tuple[pa.Field, ...]] = {
    "choose": (
        pa.field("label", pa.string()),
        pa.field("score", pa.float32()),
        pa.field("margin", pa.float32()),
        pa.field("scores", _SCORES),
    ),
    "choose_many": (pa.field("labels", pa.list_(pa.string())), pa.field("scores", _SCORES)),
    "generate": (pa.field("text", pa.string()), pa.field("finish_reason", pa.string())),
}

REQUEST = "request"
"""The kind of a batch file's one task, which no job file has: each row is a request of its own."""

REQUEST_FIELD = pa.field("text", pa.string())
"""JSON of what was written or scored."""

JSON_FIELD = pa.field("json", pa.string())
SAMPLES_FIELD = pa.field("samples", pa.list_(pa.string()))

USAGE = pa.struct([("prompt_tokens", pa.int32()), ("cached_tokens", pa.int32()), ("output_tokens", pa.int32())])

ROW_FIELDS: tuple[pa.Field, ...] = (
    pa.field("status", pa.string(), nullable=False),
    pa.field("error_code", pa.string()),
    pa.field("error_message", pa.string()),
    pa.field("model_fingerprint", pa.string(), nullable=False),
    pa.field("prompt_hash", pa.string()),
    pa.field("usage", USAGE),
    pa.field("route", pa.string()),
)
"""`prompt_hash` names the exact token ids asked; `route` is `large` (computed), `cache` (the answer of an earlier
run) or `duplicate` (the same prompt, asked once in this unit); `usage.cached_tokens` counts the instructions, and the
whole prompt where nothing was computed. These two tell how an answer came about; the others are the same however."""


def task_columns(task: Task, prefix: str) -> list[pa.Field]:
    """Return the fields that `task` adds."""
    fields = [REQUEST_FIELD] if task.kind == REQUEST else [*TASK_FIELDS[task.kind]]
    if task.json_schema:
        fields.append(JSON_FIELD)
    if task.samples > 1:
        fields.append(SAMPLES_FIELD)
    return [field.with_name(f"{prefix}{task.name}_{field.name}") for field in fields]


def added_fields(plan: Plan) -> list[pa.Field]:
    """Return every field the run adds, in output order: the tasks', then the row's."""
    fields = [field for task in plan.tasks for field in task_columns(task, plan.prefix)]
    return fields + [field.with_name(plan.prefix + field.name) for field in ROW_FIELDS]


def output_schema(input_schema: pa.Schema, plan: Plan) -> pa.Schema:
    """Return `input_schema` followed by the added fields, without pandas metadata."""
    return pa.schema([*input_schema, *added_fields(plan)])
