"""A table of a TOML file, read strictly: every error says where it is, what stands there and what to write instead."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

from schemas.errors import SpecError


@dataclass(frozen=True, slots=True)
class Section:
    """A table of the job file, and where it stands, so that every error can say so."""

    file: str
    keys: Mapping[str, tuple[str, ...]]
    """Section to the keys it may have; the sections of the file itself under no name."""
    table: Mapping[str, Any]
    name: str = ""
    number: int = 0
    """Which of several, from 1; 0 for a table that occurs once."""

    def where(self, key: str = "") -> str:
        """Return `job.toml: [section] key`, for messages."""
        name = f"[[{self.name}]] number {self.number}" if self.number else f"[{self.name}]" if self.name else ""
        return " ".join(part for part in (f"{self.file}:", name, key) if part)

    def check_keys(self) -> None:
        """Raise SpecError for the first key that the section does not have."""
        known = self.keys[self.name]
        for key in self.table:
            if key not in known:
                near = get_close_matches(key, known, n=1)
                what = f'has no key "{key}"' if self.name else f"there is no section [{key}]"
                remedy = f'did you mean "{near[0]}"?' if near else f"it may have: {', '.join(known)}"
                raise SpecError(f"{self.where()} {what}", remedy=remedy)

    def section(self, key: str) -> "Section":
        """Return the table under `key`, empty if absent, its keys checked."""
        table = self.table.get(key, {})
        name = f"{self.name}.{key}" if self.name else key
        if not isinstance(table, dict):
            remedy = f"write the header [{name}] and its keys below it"
            raise SpecError(f"{self.file}: {name} is {_show(table)}, expected a table", remedy=remedy)
        section = replace(self, name=name, table=table)
        section.check_keys()
        return section

    def missing(self, key: str, example: str) -> SpecError:
        """Return the error for a key that must be there."""
        return SpecError(f"{self.where(key)} is missing", remedy=f"add: {key} = {example}")

    def wrong(self, key: str, expected: str, remedy: str = "") -> SpecError:
        """Return the error for a key whose value is not `expected`."""
        return SpecError(f"{self.where(key)} is {_show(self.table.get(key))}, expected {expected}", remedy=remedy)

    def text(self, key: str, default: str) -> str:
        """Return a string."""
        value = self.table.get(key, default)
        if not isinstance(value, str):
            raise self.wrong(key, "a string in quotes")
        return value

    def matching(self, key: str, pattern: re.Pattern[str], expected: str, default: str | None = None) -> str:
        """Return a string that `pattern` matches whole."""
        if default is None and key not in self.table:
            raise self.missing(key, '"..."')
        value = self.text(key, default or "")
        if not pattern.fullmatch(value):
            raise self.wrong(key, expected)
        return value

    def one_of(self, key: str, known: Sequence[str], default: str | None = None) -> str:
        """Return one of `known`."""
        if default is None and key not in self.table:
            raise self.missing(key, f'"{known[0]}"')
        value = self.text(key, default or "")
        if value not in known:
            near = get_close_matches(value, known, n=1)
            raise self.wrong(key, f"one of: {', '.join(known)}", remedy=f'did you mean "{near[0]}"?' if near else "")
        return value

    def integer(self, key: str, default: int, least: int = 1) -> int:
        """Return an integer of at least `least`, and of 63 bits at most."""
        value = self.table.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**63:
            raise self.wrong(key, f"a whole number from {least}")
        return value

    def real(self, key: str, default: float) -> float:
        """Return a number; what is none is NaN, which no comparison lets pass."""
        value = self.table.get(key, default)
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan

    def flag(self, key: str, *, default: bool) -> bool:
        """Return true or false."""
        value = self.table.get(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false, without quotes")
        return value

    def share(self, key: str, default: float) -> float:
        """Return a number in [0, 1]."""
        value = self.real(key, default)
        if not 0 <= value <= 1:
            raise self.wrong(key, "a number from 0 to 1")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        """Return a list of strings; a lone string counts as a list of one."""
        value = self.table.get(key, [])
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list) or not all(isinstance(item, str) and item.strip() for item in values):
            raise self.wrong(key, "a list of strings that are not blank")
        return tuple(values)


def _show(value: Any) -> str:
    text = f'"{value}"' if isinstance(value, str) else str(value)
    return text if len(text) <= 80 else text[:77] + "..."
