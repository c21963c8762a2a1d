# /// script
# dependencies = ["openai>=1.60"]
# ///
"""openai-python, with its responses validated against its own types: every route that it knows of and we serve."""

from flows import ANSWER, COUNTED, COUNTING, EXTRACTION, QUESTION, WEATHER_QUESTION, model, run, url
from openai import BadRequestError, NotFoundError, OpenAI, pydantic_function_tool
from pydantic import BaseModel, Field

client = OpenAI(base_url=url, api_key="none", max_retries=0, _strict_response_validation=True)
lenient = OpenAI(base_url=url, api_key="none", max_retries=0)
ASKED = {"model": model, "temperature": 0, "messages": [{"role": "user", "content": QUESTION}]}


class City(BaseModel):
    name: str
    size: int


class get_weather(BaseModel):  # noqa: N801: the function's name
    """Returns the current weather of a city."""

    city: str = Field(description="Name of the city.")


def models() -> None:
    assert [entry.id for entry in client.models.list()] == [model]
    assert client.models.retrieve(model).id == model


def chat() -> None:
    answer = client.chat.completions.create(**ASKED, n=2, logprobs=True, top_logprobs=2, user="u", metadata={"a": "b"})
    assert [choice.message.content for choice in answer.choices] == [ANSWER, ANSWER]
    assert len(answer.choices[0].logprobs.content) == answer.usage.completion_tokens / 2


def stream() -> None:
    with client.chat.completions.stream(**ASKED, stream_options={"include_usage": True}) as events:
        for _ in events:
            pass
    final = events.get_final_completion()
    assert final.choices[0].message.content == ANSWER and final.usage.completion_tokens > 10


def tools() -> None:
    asked = ASKED | {"messages": [{"role": "user", "content": WEATHER_QUESTION}]}
    answer = client.chat.completions.parse(**asked, tools=[pydantic_function_tool(get_weather)])
    [call] = answer.choices[0].message.tool_calls
    assert call.function.parsed_arguments == get_weather(city="Paris")


def parsed_output() -> None:
    asked = ASKED | {"messages": [{"role": "user", "content": EXTRACTION}]}
    assert client.chat.completions.parse(**asked, response_format=City).choices[0].message.parsed.name == "Berlin"


def completions() -> None:
    asked = {"model": model, "max_tokens": 8, "temperature": 0}
    assert client.completions.create(**asked, prompt=COUNTING).choices[0].text == COUNTED
    several = client.completions.create(**asked, prompt=[COUNTING, COUNTING], echo=True)
    assert [choice.text for choice in several.choices] == [COUNTING + COUNTED] * 2
    scored = client.completions.create(**asked, prompt=COUNTING, logprobs=2).choices[0].logprobs
    assert "".join(scored.tokens) == COUNTED and len(scored.token_logprobs) == len(scored.tokens)
    # OpenAI's own chunks have a finish_reason of null too, which its type for them does not allow.
    chunks = list(lenient.completions.create(**asked, prompt=COUNTING, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == COUNTED


def responses() -> None:
    assert client.responses.create(model=model, input=QUESTION, temperature=0).output_text == ANSWER
    with client.responses.stream(model=model, input=QUESTION, temperature=0) as events:
        text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == ANSWER
    assert client.responses.parse(model=model, input=EXTRACTION, text_format=City).output_parsed.name


def errors() -> None:
    for fields, expected in (({"model": "gpt-unknown"}, NotFoundError), ({"temperature": 9}, BadRequestError)):
        try:
            client.chat.completions.create(**ASKED | fields)
        except expected as error:
            assert error.body["message"] and error.param in fields
        else:
            raise AssertionError(f"{fields} was answered")


if __name__ == "__main__":
    run("openai", models, chat, stream, tools, parsed_output, completions, responses, errors)
