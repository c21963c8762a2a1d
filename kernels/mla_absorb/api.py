"""The two products that absorbed MLA has in place of keys and values: into the latent space, and out of it again."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from dsengine.kernels.backend import Backend, Operation
from dsengine.kernels.checks import FLOATS, check_device, check_dtype, check_shape
from dsengine.kernels.mla_absorb.ref import absorb_queries_ref, release_values_ref
from dsengine.kernels.native_support import needs_compiler


class AbsorbQueries(Protocol):
    def __call__(self, q_nope: Tensor, w_uk: Tensor) -> Tensor: ...


class ReleaseValues(Protocol):
    def __call__(self, attended: Tensor, w_uv: Tensor) -> Tensor: ...


def absorb_queries(q_nope: Tensor, w_uk: Tensor, *, backend: AbsorbQueries = absorb_queries_ref) -> Tensor:
    """Each head's queries times its W_UK (DeepSeek-V2, section 2.1.2: absorbed into the query).

    Args:
        q_nope: float [T, H, nope]; tokens and heads may be strided.
        w_uk: [H, nope, R] of q_nope's dtype; a view of kv_b_proj, whose heads are strided.

    Returns:
        [T, H, R] of q_nope's dtype, possibly strided.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    _check("q_nope", q_nope, "w_uk", w_uk)
    check_shape("w_uk", w_uk, *q_nope.shape[1:], None)
    if q_nope.shape[0] == 0:
        return q_nope.new_empty((0, w_uk.shape[0], w_uk.shape[2]))
    return backend(q_nope, w_uk)


def release_values(attended: Tensor, w_uv: Tensor, *, backend: ReleaseValues = release_values_ref) -> Tensor:
    """Each head's attended latents times its W_UVᵀ: the values that attention would have added up.

    Args:
        attended: float [T, H, R].
        w_uv: [H, v, R] of its dtype; a view of kv_b_proj, whose heads are strided.

    Returns:
        [T, H, v] of its dtype, possibly strided.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    _check("attended", attended, "w_uv", w_uv)
    check_shape("w_uv", w_uv, attended.shape[1], None, attended.shape[2])
    if attended.shape[0] == 0:
        return attended.new_empty((0, *w_uv.shape[:2]))
    return backend(attended, w_uv)


def _check(name: str, rows: Tensor, weight_name: str, weight: Tensor) -> None:
    check_shape(name, rows, None, None, None)
    check_dtype(name, rows, *FLOATS)
    check_dtype(weight_name, weight, rows.dtype)
    check_device(rows.device, **{weight_name: weight})


ABSORB_QUERIES = Operation(
    "absorb_queries",
    absorb_queries,
    (
        Backend("native", "dsengine.kernels.mla_absorb.native:absorb_queries_native", ("cpu",), probe=needs_compiler),
        Backend("torch", "dsengine.kernels.mla_absorb.vendor:absorb_queries_torch"),
        Backend("ref", "dsengine.kernels.mla_absorb.ref:absorb_queries_ref"),
    ),
)
RELEASE_VALUES = Operation(
    "release_values",
    release_values,
    (
        Backend("native", "dsengine.kernels.mla_absorb.native:release_values_native", ("cpu",), probe=needs_compiler),
        Backend("torch", "dsengine.kernels.mla_absorb.vendor:release_values_torch"),
        Backend("ref", "dsengine.kernels.mla_absorb.ref:release_values_ref"),
    ),
)
