"""Activations on their way into linear layers: in the model's dtype and, where weights multiply in FP8, also in FP8.

FP8 tensor cores want both sides in FP8. DeepSeek's models were trained with activations quantised in groups of 128
channels with a scale each, so that is what an FP8 layer is given (DeepSeek-V3, section 3.3). Quantisation is fused into
whatever produces the activations; one quantised copy serves every layer that reads them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor


@dataclass(frozen=True)
class ActivationFormat:
    """In what form FP8 layers receive their input.

    Attributes:
        is_fp8: quantised to e4m3 in groups of 128 channels; otherwise in the model's dtype.
        scale_fmt: "ue8m0" where the groups' scales are powers of two, as `quantization_config` says.
    """

    is_fp8: bool = False
    scale_fmt: Literal["ue8m0"] | None = None


FLOAT_ACTIVATIONS = ActivationFormat()


@dataclass(frozen=True)
class Activation:
    """Input of linear layers.

    Attributes:
        value: [T, K] of the model's dtype.
        codes: float8_e4m3fn [T, K], or None: some reader will quantise `value` itself if it needs to.
        scale: float32 [T, ⌈K/128⌉] of the codes.
    """

    value: Tensor
    codes: Tensor | None = None
    scale: Tensor | None = None

    def rows(self, part: slice) -> Activation:
        """Of some tokens."""
        if self.codes is None or self.scale is None:
            return Activation(self.value[part])
        return Activation(self.value[part], self.codes[part], self.scale[part])
