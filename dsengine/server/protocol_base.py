"""What all request models are made of: strictness, and kinds of fields with their bounds."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

MAX_INT = 2**31 - 1


def _integral_float_to_int(value: Any) -> Any:
    # JSON has one kind of number: 1.0 is an integer there.
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _integral_items(value: Any) -> Any:
    return list(map(_integral_float_to_int, value)) if isinstance(value, list) and float in map(type, value) else value


def unsupported(name: str, hint: str = "") -> PydanticCustomError:
    """A validation error for a known field, with the name of the field for the error's `param`."""
    return PydanticCustomError("unsupported", f"{name} is not supported by this server{hint}", {"param": name})


def check_verbosity(value: str | None) -> None:
    """Refuse what no model of ours knows how to do."""
    if value not in (None, "medium"):
        raise unsupported("verbosity", f" as {value!r}, only as 'medium'")


def contradiction(message: str, param: str | None = None) -> PydanticCustomError:
    """A validation error about fields that do not go together; `param` is the one to mend, if one is."""
    # A template, whose braces would be filled in.
    assert "{" not in message
    return PydanticCustomError("value_error", message, {} if param is None else {"param": param})


# After Field in an annotation: before it, the published schema would lose the bounds.
INTEGRAL = BeforeValidator(_integral_float_to_int)
TokenId = Annotated[int, Field(ge=0, le=MAX_INT)]
# The same for lists: a validator per item would be slow where there are a hundred thousand of them.
INTEGRAL_ITEMS = BeforeValidator(_integral_items)
ModelName = Annotated[str, Field(min_length=1, max_length=256)]


class Strict(BaseModel):
    """A string is no number, `true` is no integer, an unknown field is an error that names it."""

    model_config = ConfigDict(strict=True, extra="forbid", protected_namespaces=())
