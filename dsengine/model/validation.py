"""Comparing what a checkpoint stores with what its config calls for, from headers alone; every mismatch is reported."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Mapping

from dsengine.model.checkpoint import StoredTensor
from dsengine.model.config import Fp8Quantization
from dsengine.model.tensors import FLOAT_DTYPES, FP8_DTYPE, SCALE_SUFFIX, ExpectedTensor, scale_shape

_MAX_SUGGESTIONS = 10  # a search for the closest name costs milliseconds; a wrong checkpoint may have 90 000 of them


def find_mismatches(
    stored: Mapping[str, StoredTensor],
    expected: Mapping[str, ExpectedTensor],
    unused: Collection[str],
    quantization: Fp8Quantization | None,
) -> list[str]:
    """One line per tensor that is missing, unknown, or of the wrong shape or dtype.

    Args:
        stored: what the files hold.
        expected: what the model needs, weights only; scales are called for by the weights that are stored as FP8.
        unused: names that may be stored and are not loaded.
        quantization: of the config; without it no weight may be FP8.
    """
    scales = _expected_scales(stored, expected, quantization)
    problems = []
    for name, tensor in expected.items():
        if name not in stored:
            problems.append(
                f"tensor {name!r} is missing; expected it with shape {list(tensor.shape)}, found it in no file"
            )
        else:
            dtypes = (*FLOAT_DTYPES, FP8_DTYPE) if tensor.may_be_fp8 and quantization else FLOAT_DTYPES
            problems.extend(_compare(stored[name], tensor.shape, dtypes))
    for name, shape in scales.items():
        if name not in stored:
            file = stored[name.removesuffix(SCALE_SUFFIX)].file.name
            problems.append(
                f"tensor {name!r} is missing; expected it with shape {list(shape)} for the FP8 weight in {file}, "
                f"found it in no file"
            )
        else:
            problems.extend(_compare(stored[name], shape, ("F32",)))
    known = expected.keys() | scales.keys()
    unknown = [tensor for name, tensor in stored.items() if name not in known and name not in unused]
    problems.extend(_describe_unknown(tensor, expected, i < _MAX_SUGGESTIONS) for i, tensor in enumerate(unknown))
    return problems


def _expected_scales(
    stored: Mapping[str, StoredTensor], expected: Mapping[str, ExpectedTensor], quantization: Fp8Quantization | None
) -> dict[str, tuple[int, int]]:
    if quantization is None:
        return {}
    return {
        name + SCALE_SUFFIX: scale_shape(tensor.shape, quantization.weight_block_size)
        for name, tensor in expected.items()
        if tensor.may_be_fp8 and name in stored and stored[name].dtype == FP8_DTYPE
    }


def _compare(stored: StoredTensor, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> Iterator[str]:
    where = f"{stored.file.name}: tensor {stored.name!r}"
    if stored.shape != shape:
        yield f"{where} expected shape {list(shape)}, found {list(stored.shape)}"
    if stored.dtype not in dtypes:
        yield f"{where} expected dtype {' or '.join(dtypes)}, found {stored.dtype}"


def _describe_unknown(stored: StoredTensor, expected: Mapping[str, ExpectedTensor], suggest: bool) -> str:
    line = f"{stored.file.name}: tensor {stored.name!r} is unknown"
    if stored.name.removesuffix(SCALE_SUFFIX) in expected and stored.name.endswith(SCALE_SUFFIX):
        return f"{line}: expected no scales, because the weight itself is not FP8, found shape {list(stored.shape)}"
    if suggest:
        neighbours = _same_layer(stored.name, expected) or list(expected)
        closest = difflib.get_close_matches(stored.name, neighbours, n=1, cutoff=0.0)
        line += f"; the closest expected name is {closest[0]!r}"
    return line


def _same_layer(name: str, expected: Mapping[str, ExpectedTensor]) -> list[str]:
    head, _, rest = name.partition(".layers.")
    prefix = f"{head}.layers.{rest.split('.')[0]}." if rest else ""
    if prefix:
        return [other for other in expected if other.startswith(prefix)]
    return [other for other in expected if ".layers." not in other]
