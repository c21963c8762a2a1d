"""Typed reading of an untyped config dictionary, so that every complaint names field, value and what would be right."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

_MISSING: Any = object()


class ConfigReader:
    """One JSON object; `prefix` is the path under which messages name its fields. A null counts as left out."""

    def __init__(self, fields: Mapping[str, Any], prefix: str = "") -> None:
        self._fields = fields
        self.prefix = prefix

    def has(self, name: str) -> bool:
        return self._fields.get(name) is not None

    def get(self, name: str) -> Any:
        return self._fields.get(name)

    def _value(self, name: str, default: Any) -> Any:
        value = self._fields.get(name)
        if value is not None:
            return value
        if default is _MISSING:
            raise ValueError(f"{self.prefix}{name} is missing from the checkpoint's config")
        return default

    def integer(self, name: str, default: int = _MISSING, minimum: int = 1) -> int:
        """An integer of at least `minimum`; a whole number written as a float is accepted."""
        value = self._value(name, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"{self.prefix}{name} is {value!r}; it must be an integer")
        if not minimum <= value < 2**31:
            raise ValueError(f"{self.prefix}{name} is {value}; it must lie in [{minimum}, 2^31)")
        return value

    def optional_integer(self, name: str, minimum: int = 1) -> int | None:
        return self.integer(name, minimum=minimum) if self.has(name) else None

    def integer_list(self, name: str) -> tuple[int, ...]:
        """One integer or a list of them, as a tuple; () where it is left out."""
        value = self._fields.get(name)
        if value is None:
            return ()
        items = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
        return tuple(ConfigReader({name: item}, self.prefix).integer(name, minimum=0) for item in items)

    def number(self, name: str, default: float = _MISSING, minimum: float = -math.inf) -> float:
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{self.prefix}{name} is {value!r}; it must be a finite number")
        if value < minimum:
            raise ValueError(f"{self.prefix}{name} is {value}; it must be at least {minimum}")
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        value = self._value(name, default)
        if not isinstance(value, bool):
            raise ValueError(f"{self.prefix}{name} is {value!r}; it must be true or false")
        return value

    def string(self, name: str, default: str = _MISSING) -> str:
        value = self._value(name, default)
        if not isinstance(value, str):
            raise ValueError(f"{self.prefix}{name} is {value!r}; it must be a string")
        return value

    def choice(self, name: str, allowed: tuple[str, ...], default: str) -> str:
        value = self.string(name, default)
        if value not in allowed:
            raise ValueError(f"{self.prefix}{name} is {value!r}; it must be one of {', '.join(allowed)}")
        return value

    def section(self, name: str) -> ConfigReader | None:
        """The object under `name`; None where it is left out or empty."""
        value = self._fields.get(name)
        if not value and not isinstance(value, bool | int | float | str):
            return None
        if not isinstance(value, Mapping):
            raise ValueError(f"{self.prefix}{name} is {value!r}; it must be an object")
        return ConfigReader(value, f"{self.prefix}{name}.")

    def rope_scaling(self) -> ConfigReader | None:
        """Scaling block of the rotary embedding: `rope_scaling`, or `rope_parameters` as transformers 5 spells it."""
        return self.section("rope_scaling") or self.section("rope_parameters")

    def rope_theta(self) -> float:
        """Base of the rotary frequencies; transformers 5 keeps it inside `rope_parameters`."""
        inside = self.section("rope_parameters")
        if inside is not None and inside.has("rope_theta"):
            return inside.number("rope_theta")
        return self.number("rope_theta", default=10000.0)
