# /// script
# dependencies = ["anthropic>=0.40"]
# ///
"""Anthropic's client on /v1/messages: whole and streamed answers, thinking, tools and their results, token counts."""

from anthropic import Anthropic, NotFoundError
from flows import ANSWER, QUESTION, WEATHER_QUESTION, model, run, url

client = Anthropic(base_url=url.removesuffix("/v1"), api_key="none", max_retries=0)
ASKED = {
    "model": model,
    "max_tokens": 256,
    "extra_body": {"temperature": 0},
    "messages": [{"role": "user", "content": QUESTION}],
}
THINKING = {"type": "enabled", "budget_tokens": 1024}
WEATHER_TOOL = {
    "name": "get_weather",
    "description": "Returns the current weather of a city.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}


def message() -> None:
    answer = client.messages.create(**ASKED | {"max_tokens": 2048}, thinking=THINKING)
    assert [block.type for block in answer.content] == ["thinking", "text"]
    assert answer.content[-1].text == ANSWER and answer.stop_reason == "end_turn" and answer.usage.output_tokens > 10


def stream() -> None:
    with client.messages.stream(**ASKED | {"max_tokens": 2048}, thinking=THINKING) as events:
        assert "".join(events.text_stream) == ANSWER
        assert events.get_final_message().stop_reason == "end_turn"


def tools() -> None:
    asked = [{"role": "user", "content": WEATHER_QUESTION}]
    answer = client.messages.create(**ASKED | {"messages": asked}, tools=[WEATHER_TOOL])
    call = answer.content[-1]
    assert (call.type, call.name, call.input) == ("tool_use", "get_weather", {"city": "Paris"})
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "sunny"}
    told = [
        *asked,
        {"role": "assistant", "content": [block.model_dump() for block in answer.content]},
        {"role": "user", "content": [result]},
    ]
    assert client.messages.create(**ASKED | {"messages": told}, tools=[WEATHER_TOOL]).content


def count_tokens() -> None:
    counted = client.messages.count_tokens(model=model, messages=ASKED["messages"])
    assert counted.input_tokens == client.messages.create(**ASKED).usage.input_tokens


def unknown_model() -> None:
    try:
        client.messages.create(**ASKED | {"model": "claude-unknown"})
    except NotFoundError as error:
        assert error.body["type"] == "error" and error.body["error"]["type"] == "not_found_error"
    else:
        raise AssertionError("a model that is not served was answered for")


if __name__ == "__main__":
    run("anthropic", message, stream, tools, count_tokens, unknown_model)
