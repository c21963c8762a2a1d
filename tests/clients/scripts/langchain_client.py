# /// script
# dependencies = ["langchain-openai==1.7.3"]
# ///
"""langchain-openai: chat, streaming, batches, tools and their results, structured output, completions."""

from flows import ANSWER, COUNTED, COUNTING, EXTRACTION, QUESTION, WEATHER_QUESTION, model, run, url
from langchain_core.messages import HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel

llm = ChatOpenAI(base_url=url, api_key="none", model=model, temperature=0, max_retries=0, max_tokens=256)


class City(BaseModel):
    name: str
    size: int


@tool
def get_weather(city: str) -> str:
    """Returns the current weather of a city."""
    return f"sunny in {city}"


def chat() -> None:
    answer = llm.invoke([SystemMessage("You are a calculator."), HumanMessage(QUESTION)])
    assert answer.content == ANSWER, answer
    assert answer.usage_metadata["output_token_details"]["reasoning"] > 0


def stream() -> None:
    chunks = list(llm.stream(QUESTION, stream_usage=True))
    assert "".join(chunk.content for chunk in chunks) == ANSWER and len(chunks) > 10
    assert any(chunk.usage_metadata for chunk in chunks)


def batch() -> None:
    answers = llm.batch(["What is 1 + 2?", "What is 3 + 4?"])
    assert [answer.content for answer in answers] == ["1 + 2 = 3", "3 + 4 = 7"]


def tools() -> None:
    asked = HumanMessage(WEATHER_QUESTION)
    bound = llm.bind_tools([get_weather])
    answer = bound.invoke([asked])
    [call] = answer.tool_calls
    assert (call["name"], call["args"]) == ("get_weather", {"city": "Paris"})
    result = ToolMessage(get_weather.invoke(call["args"]), tool_call_id=call["id"])
    assert bound.invoke([asked, answer, result]).content


def structured_output() -> None:
    for method in ("json_schema", "function_calling"):
        city = llm.with_structured_output(City, method=method).invoke(EXTRACTION)
        assert city.name == "Berlin", (method, city)


def completion() -> None:
    base = OpenAI(base_url=url, api_key="none", model=model, temperature=0, max_retries=0, max_tokens=8)
    assert base.invoke(COUNTING) == COUNTED


if __name__ == "__main__":
    run("langchain-openai", chat, stream, batch, tools, structured_output, completion)
