"""What a client is told of a wrong body: of fields with several kinds, what is wrong with the kind that was meant."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from dsengine.server.errors import validation_failed
from dsengine.server.protocol import ChatCompletionRequest, CompletionRequest
from dsengine.server.protocol_responses import ResponsesRequest


def said(model: type[BaseModel], **fields: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        model.model_validate({"model": "m"} | fields)
    return validation_failed(caught.value.errors()).message


def test_the_kind_that_fits_best_is_reported() -> None:
    image = [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]
    text = said(ResponsesRequest, input=image)
    assert text.startswith("input.0.content.0.type: Input should be 'input_text'") and "more" not in text
    assert said(CompletionRequest, prompt=["a", 1]).startswith("prompt.1: Input should be a valid string; ")
    message = [{"role": "user", "content": [{"type": "text", "text": 1}]}]
    assert said(ChatCompletionRequest, messages=message) == "messages.0.content.0.text: Input should be a valid string"


def test_other_fields_are_reported_too_and_each_once() -> None:
    text = said(CompletionRequest, prompt={}, temperature="hot", nonsense=1)
    assert text.count("prompt: Input should be a valid list") == 1
    assert "temperature" in text and "unrecognized field: nonsense" in text
