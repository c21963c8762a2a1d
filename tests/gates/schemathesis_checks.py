"""Loaded by schemathesis: what may be refused of the requests that the published schema allows.

Fields that contradict each other, a prompt without room in the context, or a grammar that cannot be compiled are
refused in words of our own. What the words of the validator refuse, the schema should have refused.
"""

from __future__ import annotations

import re
from typing import Any

import schemathesis

VALIDATOR = re.compile(
    r"Input should|Field required|unrecognized field|should have at (most|least)|should match pattern|Extra inputs"
)


@schemathesis.check  # type: ignore[untyped-decorator]
def schema_says_so(ctx: Any, response: Any, case: Any) -> None:
    """A body that the schema allows is not refused for its form."""
    if case.meta is None or not case.meta.generation.mode.is_positive or response.status_code != 400:
        return
    message = response.json()["error"]["message"]
    if "not supported" not in message:
        assert not VALIDATOR.search(message), f"allowed by the schema, and refused: {message[:300]}"
