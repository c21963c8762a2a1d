# /// script
# dependencies = ["instructor==1.17.0"]
# ///
"""instructor: typed answers by function calls, by strict ones and by JSON schema; lists; a streamed partial answer."""

import instructor
from flows import EXTRACTION, model, run, url
from openai import OpenAI
from pydantic import BaseModel

ASKED = {
    "model": model,
    "temperature": 0,
    "max_tokens": 200,
    "max_retries": 0,
    "messages": [{"role": "user", "content": EXTRACTION}],
}


class City(BaseModel):
    name: str
    size: int


def _client(mode: instructor.Mode) -> instructor.Instructor:
    return instructor.from_openai(OpenAI(base_url=url, api_key="none", max_retries=0), mode=mode)


def function_call() -> None:
    assert _client(instructor.Mode.TOOLS).create(response_model=City, **ASKED).name == "Berlin"


def strict_function_call() -> None:
    assert _client(instructor.Mode.TOOLS_STRICT).create(response_model=City, **ASKED).name == "Berlin"


def json_schema() -> None:
    assert _client(instructor.Mode.JSON_SCHEMA).create(response_model=City, **ASKED).name == "Berlin"


def partial() -> None:
    steps = list(_client(instructor.Mode.TOOLS).create_partial(response_model=City, **ASKED))
    assert steps[-1].name == "Berlin" and len(steps) > 1


if __name__ == "__main__":
    run("instructor", function_call, strict_function_call, json_schema, partial)
