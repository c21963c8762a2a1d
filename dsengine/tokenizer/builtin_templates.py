"""DeepSeek's chat layouts for checkpoints that carry no template of their own.

Layouts: the templates DeepSeek published with V2, V2.5/V3 and R1.
"""

from __future__ import annotations

from collections.abc import Callable

USER_TOKEN = "<｜User｜>"
THINK_TOKEN = "<think>"

_SYSTEM = (
    "{%- set ns = namespace(system='') -%}"
    "{%- for m in messages if m['role'] == 'system' -%}"
    "{%- set ns.system = ns.system + ('\\n\\n' if ns.system else '') + m['content'] -%}"
    "{%- endfor -%}"
    "{{- bos_token + ns.system -}}"
)

V2_TEMPLATE = (
    _SYSTEM + "{{- '\\n\\n' if ns.system else '' -}}"
    "{%- for m in messages -%}"
    "{%- if m['role'] == 'user' -%}{{- 'User: ' + m['content'] + '\\n\\n' -}}"
    "{%- elif m['role'] == 'assistant' -%}{{- 'Assistant: ' + m['content'] + eos_token -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{{- 'Assistant:' if add_generation_prompt else '' -}}"
)

_V3_TURNS = (
    _SYSTEM + "{%- for m in messages -%}"
    "{%- if m['role'] == 'user' -%}{{- '<｜User｜>' + m['content'] -}}"
    "{%- elif m['role'] == 'assistant' -%}"
    "{{- '<｜Assistant｜>' + (m['content'].split('</think>') | last) + eos_token -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
)

V3_TEMPLATE = _V3_TURNS + "{{- '<｜Assistant｜>' if add_generation_prompt else '' -}}"

R1_TEMPLATE = _V3_TURNS + "{{- '<｜Assistant｜><think>\\n' if add_generation_prompt else '' -}}"


def builtin_template(model_type: str | None, has_token: Callable[[str], bool]) -> str:
    """Jinja source of the layout that a checkpoint without a template was trained on.

    Raises:
        ValueError: none is known for this model type.
    """
    if model_type == "deepseek_v2":
        return V3_TEMPLATE if has_token(USER_TOKEN) else V2_TEMPLATE
    if model_type == "deepseek_v3" and has_token(USER_TOKEN):
        return R1_TEMPLATE if has_token(THINK_TOKEN) else V3_TEMPLATE
    raise ValueError(
        f"the checkpoint has no chat template, and none is known for model type {model_type!r}: "
        "put a chat_template.jinja beside the weights, or send raw prompts to /v1/completions"
    )
