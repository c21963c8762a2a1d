# /// script
# dependencies = ["llama-index-llms-openai-like==0.8.1"]
# ///
"""llama-index: chat, streaming, completions, tools, structured answers."""

from flows import ANSWER, COUNTED, COUNTING, EXTRACTION, QUESTION, WEATHER_QUESTION, model, run, url
from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel

SERVER = {"api_base": url, "api_key": "none", "model": model, "temperature": 0, "max_retries": 0}
llm = OpenAILike(
    is_chat_model=True,
    is_function_calling_model=True,
    should_use_structured_outputs=True,
    max_tokens=200,
    context_window=4096,
    **SERVER,
)
ASKED = [ChatMessage(role="user", content=QUESTION)]


class City(BaseModel):
    name: str
    size: int


def get_weather(city: str) -> str:
    """Returns the current weather of a city."""
    return f"sunny in {city}"


def chat() -> None:
    assert llm.chat(ASKED).message.content == ANSWER


def stream() -> None:
    assert "".join(chunk.delta or "" for chunk in llm.stream_chat(ASKED)) == ANSWER


def completion() -> None:
    base = OpenAILike(is_chat_model=False, max_tokens=8, **SERVER)
    assert base.complete(COUNTING).text == COUNTED


def tools() -> None:
    answer = llm.chat_with_tools([FunctionTool.from_defaults(fn=get_weather)], user_msg=WEATHER_QUESTION)
    [call] = llm.get_tool_calls_from_response(answer)
    assert (call.tool_name, call.tool_kwargs) == ("get_weather", {"city": "Paris"})


def structured_output() -> None:
    assert llm.as_structured_llm(City).complete(EXTRACTION).raw.name == "Berlin"


if __name__ == "__main__":
    run("llama-index-llms-openai-like", chat, stream, completion, tools, structured_output)
