"""Chat templates: DeepSeek's layouts, the sandbox, the deadline, and errors that say what is wrong."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from dsengine.demo import CHECKPOINT_DIR
from dsengine.tokenizer.builtin_templates import R1_TEMPLATE, V2_TEMPLATE, V3_TEMPLATE, builtin_template
from dsengine.tokenizer.chat_template import ChatTemplate, TemplateTimeout, ends_in_thinking
from dsengine.tokenizer.tokenizer import Tokenizer

U, A = "<｜User｜>", "<｜Assistant｜>"
TURNS = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "u1"},
    {"role": "assistant", "content": "why</think>a1"},
    {"role": "user", "content": "u2"},
]


def template(source: str, **options: Any) -> ChatTemplate:
    return ChatTemplate(source, bos_token="<B>", eos_token="<E>", **options)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (V2_TEMPLATE, "<B>S\n\nUser: u1\n\nAssistant: why</think>a1<E>User: u2\n\nAssistant:"),
        (V3_TEMPLATE, f"<B>S{U}u1{A}a1<E>{U}u2{A}"),
        (R1_TEMPLATE, f"<B>S{U}u1{A}a1<E>{U}u2{A}<think>\n"),
    ],
)
def test_builtin_layouts(source: str, expected: str) -> None:
    assert template(source).render(TURNS) == expected


def test_builtin_layouts_without_and_with_several_system_messages() -> None:
    assert template(V2_TEMPLATE).render(TURNS[1:2]) == "<B>User: u1\n\nAssistant:"
    both = [{"role": "system", "content": "S"}, {"role": "system", "content": "T"}, TURNS[1]]
    assert template(V3_TEMPLATE).render(both) == f"<B>S\n\nT{U}u1{A}"
    assert template(V3_TEMPLATE).render(both, add_generation_prompt=False) == f"<B>S\n\nT{U}u1"


@pytest.mark.parametrize(
    ("model_type", "tokens", "expected"),
    [
        ("deepseek_v2", set(), V2_TEMPLATE),
        ("deepseek_v2", {U}, V3_TEMPLATE),
        ("deepseek_v3", {U}, V3_TEMPLATE),
        ("deepseek_v3", {U, "<think>"}, R1_TEMPLATE),
    ],
)
def test_choice_of_the_builtin_layout(model_type: str, tokens: set[str], expected: str) -> None:
    assert builtin_template(model_type, tokens.__contains__) == expected


@pytest.mark.parametrize("model_type", [None, "kimi_k2", "deepseek_v3"])
def test_no_layout_is_guessed(model_type: str | None) -> None:
    with pytest.raises(ValueError, match=r"no chat template.*chat_template\.jinja"):
        builtin_template(model_type, lambda token: False)


def test_checkpoint_without_template_uses_the_builtin_one(tmp_path: Path) -> None:
    shutil.copy(CHECKPOINT_DIR / "tokenizer.json", tmp_path)
    config = json.loads((CHECKPOINT_DIR / "tokenizer_config.json").read_text("utf-8"))
    del config["chat_template"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    (tmp_path / "config.json").write_text('{"model_type": "deepseek_v3"}')
    assert Tokenizer.from_checkpoint(tmp_path).chat_template.source == R1_TEMPLATE
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    assert Tokenizer.from_checkpoint(tmp_path).chat_template.render(TURNS) == "S!"
    config["chat_template"] = [{"name": "default", "template": "named"}, {"name": "rag", "template": "other"}]
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    assert Tokenizer.from_checkpoint(tmp_path).chat_template.render(TURNS) == "named"


def test_demo_template_agrees_with_transformers() -> None:
    from transformers import PreTrainedTokenizerFast

    oracle = PreTrainedTokenizerFast.from_pretrained(CHECKPOINT_DIR)
    ours = Tokenizer.from_checkpoint(CHECKPOINT_DIR).chat_template
    tools = [{"type": "function", "function": {"name": "f", "description": "é<>", "parameters": {"type": "object"}}}]
    for thinking in (True, False):
        for given in (None, tools):
            expected = oracle.apply_chat_template(
                TURNS, tools=given, thinking=thinking, tokenize=False, add_generation_prompt=True
            )
            assert ours.render(TURNS, tools=given, thinking=thinking) == expected


def test_thinking_switch_has_two_names_and_a_default() -> None:
    ours = Tokenizer.from_checkpoint(CHECKPOINT_DIR).chat_template
    on, off = ours.render(TURNS, thinking=True), ours.render(TURNS, enable_thinking=False)
    assert ends_in_thinking(on) and not ends_in_thinking(off)
    assert ours.render(TURNS) in (on, off)
    with pytest.raises(ValueError, match="same switch"):
        ours.render(TURNS, thinking=True, enable_thinking=False)


def test_ends_in_thinking_looks_at_the_end_only() -> None:
    assert ends_in_thinking("x<think>\n") and ends_in_thinking("<think>")
    assert not ends_in_thinking("<think></think>") and not ends_in_thinking("<think> so") and not ends_in_thinking("")


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'a': 1}) }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ raise_exception.__globals__.json }}",
        "{{ self._TemplateReference__context.name.x }}",
        "{% include '/etc/passwd' %}",
        "{{ 'x' * 100000000 }}",
        "{{ 100000000 * 'x' }}",
        "{{ 10 ** 1000000000 }}",
        "{{ range(1000000000) | list }}",
        "{{ undefined_name.attribute }}",
        "{{ 1 / 0 }}",
        "{{ messages[0].content + 1 }}",
        "{{ raise_exception('roles must alternate') }}",
    ],
)
def test_bad_templates_raise_value_errors_and_touch_nothing(source: str) -> None:
    with pytest.raises(ValueError, match="chat template"):
        template(source).render(TURNS)
    assert TURNS[0] == {"role": "system", "content": "S"}


def test_the_templates_own_refusal_is_told() -> None:
    with pytest.raises(ValueError, match="refuses these messages: roles must alternate"):
        template("{{ raise_exception('roles must alternate') }}").render(TURNS)


@pytest.mark.parametrize("source", ["{% for %}", "{{ x", "{% unknown %}", "{{ " + "(" * 5000 + " }}"])
def test_malformed_source_is_refused_at_load(source: str) -> None:
    with pytest.raises(ValueError, match="chat template is not valid"):
        template(source)


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% set x = a %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{{ a }}{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{% for b in range(99999) if b < 0 %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{{ f(n - 1) if n else '' }}{{ f(n - 1) if n else '' }}{% endmacro %}{{ f(60) }}",
    ],
)
def test_the_deadline_is_real(source: str) -> None:
    started = time.monotonic()
    with pytest.raises(TemplateTimeout):
        template(source, time_limit=0.1).render(TURNS)
    assert time.monotonic() - started < 2.0


def test_loops_keep_jinjas_semantics() -> None:
    source = (
        "{% for m in messages if m.role == 'user' %}{{ loop.index }}/{{ loop.length }}{{ m.content }}"
        "{{ ',' if not loop.last }}{% else %}none{% endfor %}"
        "{% for m in messages %}{% if loop.index0 == 2 %}{% break %}{% endif %}{% continue %}{% endfor %}"
    )
    assert template(source).render(TURNS) == "1/2u1,2/2u2"
    assert template(source).render(TURNS[:1]) == "none"
    assert template("{% for x in nothing %}x{% else %}empty{% endfor %}").render(TURNS) == "empty"


def test_tojson_writes_what_transformers_writes() -> None:
    rendered = template("{{ messages[0].content | tojson }}").render([{"role": "user", "content": "<é>'\""}])
    assert rendered == json.dumps("<é>'\"", ensure_ascii=False)
