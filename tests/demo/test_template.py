"""The shipped chat template, its Python twin and transformers' rendering say the same."""

import json
from itertools import islice

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dsengine.demo import CHECKPOINT_DIR
from dsengine.demo.corpus import conversations
from dsengine.demo.template import BOS, CHAT_TEMPLATE, EOS, Message, prompt_text, segments

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather, <now> & here",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = {"id": "1", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "Zürich"}}}
HISTORY: list[Message] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Weather in Zürich?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "sunny", "tool_call_id": "1"},
    {"role": "assistant", "content": "It is sunny."},
    {"role": "user", "content": "1 + 1?"},
]


def render(messages, **kwargs):
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment.from_string(CHAT_TEMPLATE).render(messages=messages, **kwargs)


def test_thinking_is_the_default_without_tools():
    assert render([{"role": "user", "content": "Hi"}], add_generation_prompt=True) == (
        f"{BOS}<｜User｜>Hi<｜Assistant｜><think>"
    )


@pytest.mark.parametrize("switch", ["thinking", "enable_thinking"])
def test_thinking_can_be_switched_either_way(switch):
    messages = [{"role": "user", "content": "Hi"}]
    assert render(messages, add_generation_prompt=True, **{switch: False}).endswith("<｜Assistant｜></think>")
    assert render(messages, add_generation_prompt=True, tools=[WEATHER], **{switch: True}).endswith("<think>")


def test_tools_switch_thinking_off_and_are_listed():
    text = render(HISTORY[:2], tools=[WEATHER], add_generation_prompt=True)
    assert text.endswith("<｜User｜>Weather in Zürich?<｜Assistant｜></think>")
    assert "### get_weather\nDescription: Get the weather, <now> & here\nParameters: {" in text


def test_wire_format_of_calls_and_results():
    text = render(HISTORY[:4], tools=[WEATHER], add_generation_prompt=True)
    assert text.endswith(
        '<｜Assistant｜></think><｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{"city": "Zürich"}'
        f"<｜tool▁call▁end｜><｜tool▁calls▁end｜>{EOS}<｜tool▁output▁begin｜>sunny<｜tool▁output▁end｜>"
    )


def test_arguments_as_a_string_are_kept_verbatim():
    call = {"function": {"name": "get_weather", "arguments": '{"city":"Rome"}'}}
    text = render([*HISTORY[:2], {"role": "assistant", "content": "", "tool_calls": [call]}], tools=[WEATHER])
    assert '<｜tool▁sep｜>{"city":"Rome"}<｜tool▁call▁end｜>' in text


def test_reasoning_of_earlier_turns_is_dropped():
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "<think>why</think>b"}]
    assert render(messages) == f"{BOS}<｜User｜>a<｜Assistant｜></think>b{EOS}"


@pytest.mark.parametrize("length", range(2, len(HISTORY) + 1))
def test_python_twin_renders_the_same(length):
    messages = HISTORY[:length]
    assert render(messages, tools=[WEATHER], add_generation_prompt=True) == prompt_text(messages, [WEATHER])


def test_training_text_is_what_the_template_renders():
    for conversation in islice(conversations(3), 300):
        text = "".join(piece for piece, _ in segments(conversation))
        if not conversation.thinking:
            assert text == render(conversation.messages, tools=conversation.tools)
            continue
        *earlier, last = conversation.messages
        prompt = render(earlier, add_generation_prompt=True, thinking=True)
        assert text == f"{prompt}{last['reasoning_content']}</think>{last['content']}{EOS}"


def test_transformers_renders_the_same():
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(CHECKPOINT_DIR)
    for length in (2, 4, 6):
        text = tokenizer.apply_chat_template(
            HISTORY[:length], tools=[WEATHER], add_generation_prompt=True, tokenize=False
        )
        assert text == prompt_text(HISTORY[:length], [WEATHER])
