"""The product by torch's libraries: cuBLAS on a GPU, MKL on a CPU."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def linear_torch(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight)
