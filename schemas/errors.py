"""Every error a person can act on. Standard library only.

    K2Error                     has .code, .remedy and .exit_code
    ├─ SpecError                the job file is wrong                      exit 2
    ├─ SchemaMismatch           the data breaks the contract               exit 3
    ├─ EnvironmentMismatch      a package, a processor, a runner           exit 4
    ├─ CheckpointError          a tensor or file missing, unexpected, odd  exit 4
    ├─ StorageError             an object store refused, after retries     exit 4
    │  └─ GivenUp               it did not answer until the run had to end exit 5
    └─ RowError                 one row; never stops a unit; becomes a row of rejects

A message says what, where and the value; `remedy` says what to do about it.
"""


class K2Error(Exception):
    """An error the user can act on."""

    code = "error"
    exit_code = 4

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message}\n  remedy: {self.remedy}" if self.remedy else self.message


class SpecError(K2Error):
    """The job file is wrong."""

    code = "bad_spec"
    exit_code = 2


class SchemaMismatch(K2Error):
    """The input data breaks the data contract; the message lists every difference."""

    code = "schema_mismatch"
    exit_code = 3


class EnvironmentMismatch(K2Error):
    """This machine or installation cannot do what was asked."""

    code = "environment"
    exit_code = 4


class CheckpointError(K2Error):
    """A checkpoint cannot be opened, with the file or tensor that is at fault."""

    code = "checkpoint"
    exit_code = 4


class StorageError(K2Error):
    """An object store refused a read or a write, after retries."""

    code = "storage"
    exit_code = 4


class GivenUp(StorageError):
    """An object store failed until the run had to end: its deadline, its budget or a stop was past by the grace."""

    code = "given_up"
    exit_code = 5


class RowError(K2Error):
    """One row cannot be annotated. It becomes a row of rejects, and never stops its unit."""

    code = "row_error"


class NullText(RowError):
    """Every text column of the row is null."""

    code = "null_text"


class BlankText(RowError):
    """The text holds no visible character."""

    code = "blank_text"


class InvalidText(RowError):
    """A text column of the row is not valid UTF-8."""

    code = "invalid_utf8"


class PromptTooLong(RowError):
    """The prompt has more tokens than `[limits] max_prompt_tokens` or the model's context allow."""

    code = "prompt_too_long"


class BadRequest(RowError):
    """A request of a batch file asks what cannot be done."""

    code = "bad_request"

    def __init__(self, message: str, *, param: str | None = None, reason: str = "invalid_value") -> None:
        super().__init__(message)
        self.param = param
        """What in the request is at fault, such as `messages[0].role`."""
        self.reason = reason
        """OpenAI's word for it, such as `missing_required_parameter`."""


class EngineFailure(RowError):
    """Computing the row failed, alone too: out of memory, or a defect of k2batch."""

    code = "engine_failure"


class PoisonRow(RowError):
    """Computing the row ended its process, or hung, again and again, alone too."""

    code = "poison_row"


ROW_ERROR_CODES = tuple(
    error.code for error in (NullText, BlankText, InvalidText, PromptTooLong, BadRequest, EngineFailure, PoisonRow)
)
"""The closed set of values of the `error_code` column."""

FILE_ERROR_CODES = ("unreadable_file", "missing_column", "wrong_type", "name_collision")
"""The closed set of codes of a rejected file."""
