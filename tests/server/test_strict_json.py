"""The JSON door: what Python's parser lets through and we do not."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsengine.server.encoding import MAX_DEPTH, InvalidJson, decode_json, encode_json

documents = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=20,
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(documents)
def test_documents_are_read_as_they_are(value: Any) -> None:
    assert decode_json(json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")) == value


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"{} {}", "not valid JSON"),
        (b'{"a": 1,}', "not valid JSON"),
        (b'{"a": "\x01"}', "not valid JSON"),
        (b'{"a": 1, "a": 2}', "duplicate key"),
        (b'{"a": {"b": 1, "\\u0062": 2}}', "duplicate key"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": -Infinity}', "Infinity"),
        (b'{"a": 1e999}', "too large"),
        (b'{"a": ' + b"9" * 5000 + b"}", "too many digits"),
        (b'{"a": "\xff"}', "not valid UTF-8"),
        (b'{"a": "\xed\xa0\x80"}', "not valid UTF-8"),
        (b'"\\ud800"', "lone surrogate"),
        (b'{"\\udfff": 1}', "lone surrogate"),
        (b"[" * (MAX_DEPTH + 2) + b"]" * (MAX_DEPTH + 2), "nested deeper"),
        (b"[" * 100_000, "nested deeper"),
        (b'{"a":' * 100_000, "nested deeper"),
        ('{"a": 1}'.encode("utf-16"), "not valid UTF-8"),
        (b'\xef\xbb\xbf{"a": 1}', "not valid JSON"),
    ],
)
def test_refused(body: bytes, reason: str) -> None:
    with pytest.raises(InvalidJson, match=reason) as error:
        decode_json(body)
    assert len(str(error.value)) < 200


def test_the_deepest_document_is_accepted() -> None:
    decode_json(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH)


def test_large_documents_are_read_in_linear_time() -> None:
    body = encode_json({"prompt": list(range(1_000_000))})
    started = time.perf_counter()
    assert len(decode_json(body)["prompt"]) == 1_000_000
    assert time.perf_counter() - started < 10
