"""Stand-ins: a byte tokenizer, an engine whose answers are digests of the question, and small tables of tickets."""

import hashlib
import os
import signal
import time
from array import array
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from k2model.engine.request import Candidate, Completion, Request, Work
from k2model.tokenizer import Tokenizer
from pipelines.annotate import Block, annotate
from pipelines.commit import commit, read_receipts
from pipelines.prompts import Prompts
from pipelines.read import read_unit
from pipelines.units import make_plan
from schemas.runs import Plan, Task, Unit
from schemas.tickets import TicketColumns

FINGERPRINT = "f" * 16
COLUMNS = TicketColumns(id="ticket_id", text=("subject", "body"))
POLICY = Task(name="policy", kind="choose", labels={"safe": "ordinary talk", "hate": "attacks", "spam": "adverts"})
TOPICS = Task(name="topics", kind="choose_many", labels={"billing": "money", "login": "access"}, threshold=0.5)
REPLY = Task(name="reply", kind="generate", instruction="Answer briefly.", max_tokens=8)
TASKS = (POLICY, TOPICS, REPLY)


def fake_tokenizer() -> Tokenizer:
    """Return a tokenizer with one token per byte, and three control tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    control = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    vocab = {char: index for index, char in enumerate(alphabet)}
    plain = _byte_level(vocab)
    markup = _byte_level(vocab)
    markup.add_special_tokens(control)
    control_ids = [markup.encode(token).ids[0] for token in control]
    return Tokenizer(
        markup=markup,
        plain=plain,
        control_ids=frozenset(control_ids),
        stop_ids=(control_ids[1],),
        chat_template=(
            "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
            "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        ),
        special_tokens={},
        turn_end_id=control_ids[1],
    )


def _byte_level(vocab: Mapping[str, int]) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=dict(vocab), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


class FakeEngine:
    """Answers at once, or after a pause, with numbers that depend on the token ids alone.

    Every submission adds a line to the file named by K2_FAKE_LOG, if set: process id and number of requests.
    """

    def __init__(self, *, fingerprint: str = FINGERPRINT, pause_s: float = 0.0) -> None:
        self.tokenizer = fake_tokenizer()
        self.fingerprint = fingerprint
        self.max_position_embeddings = 8192
        self.pause_s = pause_s
        self.busy_seconds = 0.0
        self._tokens = 0

    def take_work(self) -> Work:
        """Return the tokens of what was asked since this was last called."""
        work, self._tokens = Work(self._tokens), 0
        return work

    def submit(self, requests: Sequence[Request]) -> Future[list[Completion]]:
        """Return a future that is done."""
        if log := os.environ.get("K2_FAKE_LOG"):
            with open(log, "a") as file:
                file.write(f"{os.getpid()} {len(requests)}\n")
        time.sleep(self.pause_s)
        self.busy_seconds += self.pause_s
        future: Future[list[Completion]] = Future()
        future.set_result([_complete(request) for request in requests])
        self._tokens += sum(completion.computed_tokens for completion in future.result())
        return future


def _complete(request: Request) -> Completion:
    computed = len(request.prompt_ids) - request.num_prefix_tokens
    if request.max_tokens:
        ids = tuple(40 + int(_chance(request, (index,)) * 20) for index in range(request.max_tokens))
        return Completion(
            token_ids=ids, finish_reason="length", computed_tokens=computed, shared_tokens=request.num_prefix_tokens
        )
    logprobs = tuple(_logprob(request, candidate) for candidate in request.candidates)
    return Completion(logprobs=logprobs, computed_tokens=computed, shared_tokens=request.num_prefix_tokens)


def _logprob(request: Request, candidate: Candidate) -> float:
    return -candidate.num_scored * (0.1 + _chance(request, candidate.token_ids))


def _chance(request: Request, more: Sequence[int]) -> float:
    """Return a number in [0, 1) that these ids decide."""
    numbers = array("q", [*request.prompt_ids, -1, *more])
    return int.from_bytes(hashlib.sha256(numbers).digest()[:4], "little") / 2**32


def open_fake_engine(plan: Plan) -> FakeEngine:
    """Open the fake model."""
    return FakeEngine()


def open_slow_fake_engine(plan: Plan) -> FakeEngine:
    """Open a fake model that takes a while over each unit."""
    return FakeEngine(pause_s=0.4)


def open_dying_fake_engine(plan: Plan) -> FakeEngine:
    """Open a fake model that takes the first process to open it down, as the kernel does when memory runs out."""
    marker = Path(os.environ["K2_FAKE_LOG"] + ".died")
    try:
        marker.touch(exist_ok=False)
    except FileExistsError:
        return FakeEngine()
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable")


def open_other_fake_engine(plan: Plan) -> FakeEngine:
    """Open a fake model that is not the planned one."""
    return FakeEngine(fingerprint="0" * 16)


def tickets(num_rows: int, *, start: int = 0) -> pa.Table:
    """Return clean tickets with distinct texts, a map column and a float column with NaN."""
    numbers = range(start, start + num_rows)
    return pa.table(
        {
            "ticket_id": pa.array([f"T{number:06d}" for number in numbers]),
            "subject": pa.array([f"subject {number}" for number in numbers]),
            "body": pa.array([f"body of ticket {number}" for number in numbers]),
            "metadata": pa.array(
                [[("queue", str(number % 3))] for number in numbers], pa.map_(pa.string(), pa.string())
            ),
            "weight": pa.array([float("nan") if number % 5 == 0 else number / 7 for number in numbers]),
        }
    )


def text_array(values: Sequence[bytes | None], type_: pa.DataType | None = None) -> pa.Array:
    """Return a string array of these bytes, UTF-8 or not."""
    type_ = type_ or pa.string()
    binary = {pa.large_string(): pa.large_binary(), pa.string_view(): pa.binary_view()}.get(type_, pa.binary())
    array_ = pa.array(values, pa.binary()).cast(binary)
    return pa.Array.from_buffers(type_, len(array_), array_.buffers())


def write_tickets(folder: Path, name: str, table: pa.Table, *, row_group_size: int | None = None) -> Path:
    """Write `table` as a Parquet file in `folder`, which is made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    pq.write_table(table, path, row_group_size=row_group_size)
    return path


def fake_plan(
    urls: Sequence[str | Path],
    output: str | Path,
    *,
    unit_rows: int = 64,
    columns: TicketColumns = COLUMNS,
    tasks: Sequence[Task] = TASKS,
    prefix: str = "",
    max_prompt_tokens: int = 4096,
    on_bad_file: str = "reject",
) -> Plan:
    """Return a plan for the fake model."""
    return make_plan(
        job="test",
        urls=[str(url) for url in urls],
        output=str(output),
        columns=columns,
        tasks=tasks,
        checkpoint="fake",
        model_fingerprint=FINGERPRINT,
        mode="cpu",
        prefix=prefix,
        max_prompt_tokens=max_prompt_tokens,
        unit_rows=unit_rows,
        on_bad_file=on_bad_file,
    )


def annotate_directly(plan: Plan, units: Iterable[Unit]) -> None:
    """Annotate and commit `units` without Beam: the same steps, called in turn."""
    engine = FakeEngine()
    prompts = Prompts(plan.tasks, engine.tokenizer, plan.max_prompt_tokens)
    prompts.calibrate(engine)
    for unit in units:
        commit(annotate(Block(unit, read_unit(unit), time.perf_counter()), plan, prompts, engine), plan)


def read_output(plan: Plan) -> dict[str, pa.Table]:
    """Return each done unit's data file, in plan order."""
    folder = Path(plan.output) / "data"
    return {unit_id: pq.read_table(folder / receipt.data) for unit_id, receipt in read_receipts(plan).items()}
