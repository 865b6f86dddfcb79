"""Units that kill or stop their process: which they are, and which row of theirs does it.

`attempts/<unit>.json` in the run's folder is written before a unit is begun and deleted once its receipt is there. What
it says was under way when a process ended is a death of that unit. `MAX_DEATHS` of them, or one for which the unit
itself is to blame, make it a suspect, which the rounds over the other units leave out. Suspects come last, one at a
time in a process: their texts are tried in ranges, each noted before it is begun; a range that dies is halved, and a
text that dies alone twice is condemned. So an innocent unit, or rows that are bad only together, pass, and no more than
3 + log2(rows) + 2 processes end for a row.
"""

import json
from collections.abc import Iterable, Iterator, Sequence, Set
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field

import pyarrow as pa

from k2model.engine.request import Completion, Request, SupportsSubmit, Work
from pipelines import storage
from pipelines.annotate import Block, SupportsPrompts, row_texts
from pipelines.commit import has_receipt, write_failure
from pipelines.watch import watched
from schemas.errors import K2Error, PoisonRow, RowError, SchemaMismatch, StorageError
from schemas.runs import Plan, Unit

MAX_DEATHS = 3
"""Deaths that make a unit a suspect: one by one they are most often the machine's own, or a neighbor's."""

MAX_ALONE = 2
"""Deaths of a text alone, every range around it having died before, that condemn it."""

UNKNOWN = "its process ended without a word, as when the machine stops"

_UNIT, _READING, _WRITING = "unit", "reading", "writing"


@dataclass(kw_only=True, slots=True)
class TextRange:
    """Distinct texts of a suspect, by number, in the order of their first rows."""

    first: int
    last: int
    """One past the last."""
    deaths: int = 0
    """Of this range and those that it was cut from."""
    alone: int = 0
    """Of this range, if it is one text."""
    passed: bool = False

    @property
    def is_condemned(self) -> bool:
        """Whether this is the text at fault."""
        return self.alone >= MAX_ALONE


@dataclass(kw_only=True, slots=True)
class Attempts:
    """What is known of the attempts at a unit that has no receipt yet."""

    unit_id: str
    begun: int = 0
    doing: str = ""
    """`unit`; of a suspect `reading`, `writing` or the number of the range's first text; empty for nothing."""
    deaths: int = 0
    """Before it was a suspect."""
    suspect: bool = False
    whole_deaths: int = 0
    """Of a suspect, while it was read or written."""
    cause: str = ""
    """Of the last death."""
    ranges: list[TextRange] = field(default_factory=list)

    def bury(self, cause: str, *, is_guilty: bool = False) -> None:
        """Count what was under way as a death; `is_guilty` if no other unit can be to blame."""
        doing, self.doing, self.cause = self.doing, "", cause
        if doing in (_UNIT, ""):  # nothing, if another driver of the run gave up meanwhile and let all go
            self.deaths += 1
            self.suspect = self.suspect or is_guilty or self.deaths >= MAX_DEATHS
        elif doing in (_READING, _WRITING):
            self.whole_deaths += 1
        else:
            index = next(i for i, texts in enumerate(self.ranges) if texts.first == int(doing))
            self.ranges[index : index + 1] = _cut(self.ranges[index])


def _cut(texts: TextRange) -> list[TextRange]:
    """Return what becomes of a range that died: its halves, or a text that died once more."""
    deaths = texts.deaths + 1
    if texts.last - texts.first == 1:
        return [TextRange(first=texts.first, last=texts.last, deaths=deaths, alone=texts.alone + 1)]
    middle = (texts.first + texts.last) // 2
    return [TextRange(first=a, last=b, deaths=deaths) for a, b in ((texts.first, middle), (middle, texts.last))]


def look(plan: Plan, unit_id: str) -> Attempts:
    """Return what is known of the attempts at a unit; one that is under way died, for here is the next."""
    attempts = read(plan, unit_id)
    if attempts.doing:
        attempts.bury(UNKNOWN)
    return attempts


def begin(plan: Plan, unit: Unit, attempts: Attempts, *, is_careful: bool) -> bool:
    """Note that the unit is begun, and return whether it is: it may not be its turn, or it has had enough of them.

    Args:
        plan: the run.
        unit: the unit.
        attempts: at the unit, so far.
        is_careful: whether this is a round of suspects, the only one in which they are begun.

    Raises: StorageError.
    """
    if attempts.suspect != is_careful:
        write(plan, attempts)
        return False
    if attempts.whole_deaths >= MAX_DEATHS:
        what = f"{unit.url} rows {unit.first_row} to {unit.first_row + unit.rows - 1}: reading or writing them ended"
        what = f"{what} {attempts.whole_deaths} processes: {attempts.cause}"
        write_failure(plan, unit, SchemaMismatch(what, remedy=f"to try again, delete {_url(plan, unit.unit_id)}"))
        return False
    attempts.begun += 1
    attempts.doing = _READING if is_careful else _UNIT
    write(plan, attempts)
    return True


@contextmanager
def writing(plan: Plan, unit_id: str, *, is_careful: bool) -> Iterator[None]:
    """Delete the unit's attempts once the body, which writes its receipt, is done."""
    if is_careful:
        attempts = read(plan, unit_id)
        attempts.doing = _WRITING
        write(plan, attempts)
    yield
    forget(plan, unit_id)


def let_go(plan: Plan, unit_id: str) -> None:
    """Note that nothing is under way: the attempt ended, and its process lives."""
    with suppress(StorageError):  # a death too many only has the unit done with more care
        attempts = read(plan, unit_id)
        if attempts.doing:
            attempts.doing = ""
            write(plan, attempts)


def tally(plan: Plan, done: Set[str]) -> tuple[int, int]:
    """Return how many units are under way, or were when their process ended unnoticed, and how many are suspects.

    Args:
        plan: the run.
        done: ids of the units that have a receipt.

    Raises: StorageError.
    """
    names = storage.names(storage.join(plan.output, "attempts"))
    begun = {name.removesuffix(".json") for name in names if name.endswith(".json")} - done
    found = storage.in_threads(lambda unit_id: read(plan, unit_id), sorted(begun))
    return sum(bool(attempts.doing) for attempts in found), sum(attempts.suspect for attempts in found)


def let_all_go(plan: Plan, units: Iterable[Unit]) -> None:
    """Note that nothing of `units` is under way: the driver ended their processes, as its time was over."""
    with suppress(StorageError):
        stored = set(storage.names(storage.join(plan.output, "attempts")))
        under_way = [unit.unit_id for unit in units if f"{unit.unit_id}.json" in stored]
        storage.in_threads(lambda unit_id: let_go(plan, unit_id), under_way)


def suspect(plan: Plan, unit_id: str, cause: str) -> None:
    """Note that the attempt under way failed and that the unit itself is to blame."""
    attempts = read(plan, unit_id)
    attempts.bury(cause, is_guilty=True)
    write(plan, attempts)


def settle(plan: Plan, units: Iterable[Unit], cause: str) -> dict[str, Attempts]:
    """Return the attempts at those of `units` that have no receipt; what was under way died of `cause`.

    Not to be called while a process of this driver annotates.
    """
    stored = {name.removesuffix(".json") for name in storage.names(storage.join(plan.output, "attempts"))}
    found = {}
    for unit in units:
        if unit.unit_id not in stored:
            continue
        if has_receipt(plan, unit):
            forget(plan, unit.unit_id)
            continue
        attempts = read(plan, unit.unit_id)
        if attempts.doing:
            attempts.bury(cause)
            write(plan, attempts)
        found[unit.unit_id] = attempts
    return found


def read(plan: Plan, unit_id: str) -> Attempts:
    """Return what is known of the attempts at a unit; what cannot be read is as good as nothing."""
    try:
        raw = json.loads(storage.read_text(_url(plan, unit_id)))
        return Attempts(**{**raw, "ranges": [TextRange(**texts) for texts in raw["ranges"]]})
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return Attempts(unit_id=unit_id)


def write(plan: Plan, attempts: Attempts) -> None:
    """Write what is known of the attempts at a unit: for whoever comes after a process, not after a power cut."""
    storage.write_bytes_atomic(_url(plan, attempts.unit_id), json.dumps(asdict(attempts)).encode(), is_durable=False)


def forget(plan: Plan, unit_id: str) -> None:
    """Delete what is known of the attempts at a unit."""
    storage.delete(_url(plan, unit_id))


def _url(plan: Plan, unit_id: str) -> str:
    return storage.join(plan.output, "attempts", f"{unit_id}.json")


class Known:
    """Prompts and an engine in one, for which all that a suspect asks is answered already."""

    def __init__(self, prompts: SupportsPrompts, engine: SupportsSubmit) -> None:
        self._prompts = prompts
        self._engine = engine
        self._fates: dict[str, tuple[Request, ...] | RowError] = {}
        self._completions: dict[Request, Completion] = {}
        self.busy_seconds = 0.0

    def ask(self, texts: Sequence[str]) -> None:
        """Find out what is answered to `texts`. Raises: whatever that raises."""
        wanted: dict[Request, None] = {}
        fates: dict[str, tuple[Request, ...] | RowError] = {}
        for text, requests in zip(texts, self._prompts.requests_of(texts), strict=True):
            fates[text] = requests
            if not isinstance(requests, RowError):
                wanted.update(dict.fromkeys(requests))
        completions = self._engine.submit(list(wanted)).result() if wanted else []
        self._completions.update(zip(wanted, completions, strict=True))
        self._fates.update(fates)

    def condemn(self, text: str, error: RowError) -> None:
        """Let `error` be the fate of `text`."""
        self._fates[text] = error

    def requests_of(self, texts: Sequence[str]) -> list[tuple[Request, ...] | RowError]:
        """Return all requests of each row, or why there are none."""
        return [self._fates[text] for text in texts]

    def columns_of(self, answers: Sequence[Sequence[Completion]]) -> dict[str, pa.Array]:
        """Return the task columns."""
        return self._prompts.columns_of(answers)

    def take_work(self) -> Work:
        """Return what the engine computed since it was last asked."""
        return self._engine.take_work()

    def submit(self, requests: Sequence[Request]) -> Future[list[Completion]]:
        """Return a future that is done."""
        future: Future[list[Completion]] = Future()
        future.set_result([self._completions[request] for request in requests])
        return future


def search(plan: Plan, block: Block, prompts: SupportsPrompts, engine: SupportsSubmit, stall_seconds: float) -> Known:
    """Return the answers to all texts of a suspect, but those that are condemned; this process may end on the way.

    Nothing else may be computed, read or written in this process meanwhile.

    Raises: what every text of several raised, for then none of them is to blame; K2Error.
    """
    attempts = read(plan, block.unit.unit_id)
    texts = list(dict.fromkeys(text for text in row_texts(block.table, plan.columns) if isinstance(text, str)))
    if not attempts.ranges or attempts.ranges[-1].last != len(texts):
        attempts.ranges = [TextRange(first=0, last=len(texts))] if texts else []
    known = Known(prompts, engine)
    tried: set[tuple[int, int]] = set()
    failure: BaseException | None = None
    while todo := [r for r in attempts.ranges if not r.is_condemned and (r.first, r.last) not in tried]:
        # The smallest of what has not passed yet: whatever this life finds out should be found out soon.
        texts_now = min(todo, key=lambda r: (r.passed, r.last - r.first))
        attempts.doing = str(texts_now.first)
        write(plan, attempts)
        try:
            with watched(engine, stall_seconds, lambda cause: suspect(plan, attempts.unit_id, cause)):
                known.ask(texts[texts_now.first : texts_now.last])
        except (K2Error, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of Rust code, such as the tokenizer's, is no Exception
            failure = error
            attempts.bury(f"{type(error).__name__}: {error}")
        else:
            attempts.doing = ""
            texts_now.passed = True
            tried.add((texts_now.first, texts_now.last))
    write(plan, attempts)
    condemned = [texts_now for texts_now in attempts.ranges if texts_now.is_condemned]
    if failure is not None and len(condemned) == len(texts) > 1:
        raise failure
    for texts_now in condemned:
        known.condemn(texts[texts_now.first], _verdict(texts_now, attempts.cause))
    return known


def _verdict(texts: TextRange, cause: str) -> PoisonRow:
    return PoisonRow(
        f"computing this row failed {texts.deaths} times, the last {texts.alone} of them alone: {cause}",
        remedy="try the row in a run of its own; if it fails there, too, please report it",
    )
