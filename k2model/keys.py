"""Reads keys of a config.json, so that a wrong one is named before anything is computed from it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from schemas.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Keys:
    """Keys and the checkpoint they are of. Absent and null are the same; every method raises CheckpointError."""

    raw: Mapping[str, Any]
    where: str

    def fail(self, key: str, expected: str) -> CheckpointError:
        """Return the error that says `key` is missing, or is not `expected`."""
        if self.raw.get(key) is None:
            message = f'{self.where}: config.json has no key "{key}"'
            return CheckpointError(message, remedy="use the config.json that belongs to the weights")
        return CheckpointError(f"{self.where}: config.json has {key} = {self.raw[key]!r}, expected {expected}")

    def size(self, key: str, default: int | None = None) -> int:
        """Return a whole number above 0."""
        value = self.raw.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.fail(key, "a whole number above 0")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Return a finite number, not negative."""
        value = self.raw.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
            raise self.fail(key, "a number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """Return true or false."""
        value = self.raw.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.fail(key, "true or false")
        return default if value is None else value

    def only(self, key: str, *expected: object) -> None:
        """Refuse any value but `expected`, the first of which is the default."""
        if self.raw.get(key, expected[0]) not in expected:
            raise CheckpointError(
                f"{self.where}: config.json has {key} = {self.raw[key]!r}, and this decoder computes {expected[0]!r}"
            )
