"""dsengine serves DeepSeek's MLA + MoE models.

The names below are imported on first use, so that `import dsengine` (and the command line's help) stays instant.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsengine.engine.sampling_params import SamplingParams
    from dsengine.llm import LLM
    from dsengine.outputs import CompletionOutput, RequestOutput

__all__ = ["LLM", "CompletionOutput", "RequestOutput", "SamplingParams"]
__version__ = "0.1.0"

_HOMES = {
    "LLM": "dsengine.llm",
    "CompletionOutput": "dsengine.outputs",
    "RequestOutput": "dsengine.outputs",
    "SamplingParams": "dsengine.engine.sampling_params",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dsengine' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
