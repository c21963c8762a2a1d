# /// script
# dependencies = ["litellm==1.106.2", "mcp"]
# ///
"""litellm: chat, streaming, tools, completions, responses, and its own exception for an unknown model."""

import os

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it asks the internet for prices

import litellm
from flows import ANSWER, COUNTED, COUNTING, QUESTION, WEATHER_QUESTION, model, run, url

SERVER = {"api_base": url, "api_key": "none", "temperature": 0, "num_retries": 0}
ASKED = [{"role": "user", "content": QUESTION}]
WEATHER_TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Returns the current weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def chat() -> None:
    answer = litellm.completion(f"openai/{model}", ASKED, **SERVER)
    assert answer.choices[0].message.content == ANSWER and answer.choices[0].message.reasoning_content
    assert answer.usage.completion_tokens > 10


def stream() -> None:
    chunks = list(litellm.completion(f"openai/{model}", ASKED, stream=True, **SERVER))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ANSWER


def tools() -> None:
    asked = [{"role": "user", "content": WEATHER_QUESTION}]
    answer = litellm.completion(f"openai/{model}", asked, tools=[WEATHER_TOOL], **SERVER)
    [call] = answer.choices[0].message.tool_calls
    assert call.function.name == "get_weather" and "Paris" in call.function.arguments


def completion() -> None:
    answer = litellm.text_completion(COUNTING, f"text-completion-openai/{model}", max_tokens=8, **SERVER)
    assert answer.choices[0].text == COUNTED


def responses() -> None:
    answer = litellm.responses(QUESTION, f"openai/{model}", api_base=url, api_key="none", temperature=0)
    assert answer.output[-1].content[0].text == ANSWER


def unknown_model() -> None:
    try:
        litellm.completion("openai/gpt-unknown", ASKED, **SERVER)
    except litellm.NotFoundError as error:
        assert "gpt-unknown" in str(error)
    else:
        raise AssertionError("a model that is not served was answered for")


if __name__ == "__main__":
    run("litellm", chat, stream, tools, completion, responses, unknown_model)
