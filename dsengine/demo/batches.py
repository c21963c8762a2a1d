"""Turns conversations into flat training batches: groups of similar length, right-padded, with loss weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor

from dsengine.demo.template import Conversation, segments

PAD_ID = 2
MAX_LENGTH = 640
ROWS_PER_GROUP = 6
# The CPU's matrix library generates code for every new shape; a few sizes that recur cost far less than exact ones.
LENGTH_MULTIPLE = 16
TOKENS_MULTIPLE = 256


@dataclass(frozen=True)
class Batch:
    """Flat tensors [T]; `weights[i]` weighs the loss of `targets[i]` (token i+1), `later*` NextN's (token i+2).

    For attention the tokens are laid out in padded groups of `shapes` (rows, length): `source` [S] is the token of each
    place (padding repeats token 0), `places` [T] the place of each token.
    """

    shapes: list[tuple[int, int]]
    source: Tensor
    places: Tensor
    ids: Tensor
    positions: Tensor
    targets: Tensor
    weights: Tensor
    later_targets: Tensor
    later_weights: Tensor


def encode(tokenizer: Tokenizer, conversation: Conversation) -> tuple[list[int], list[bool]]:
    """Token ids and, for each, whether the assistant wrote it."""
    pieces = segments(conversation)
    encoded = tokenizer.encode_batch([text for text, _ in pieces], add_special_tokens=False)
    ids = [token for item in encoded for token in item.ids]
    written = [flag for item, (_, flag) in zip(encoded, pieces, strict=True) for _ in item.ids]
    return ids, written


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def layout(lengths: list[int]) -> tuple[list[tuple[int, int]], Tensor, Tensor]:
    """`Batch.shapes`, `source` and `places` for sequences of these lengths, which lie one after the other."""
    shapes: list[tuple[int, int]] = []
    source: list[int] = []
    places: list[int] = []
    token = 0
    for start in range(0, len(lengths), ROWS_PER_GROUP):
        group = lengths[start : start + ROWS_PER_GROUP]
        width = round_up(max(group), LENGTH_MULTIPLE)
        shapes.append((len(group), width))
        for length in group:
            places += range(len(source), len(source) + length)
            source += [*range(token, token + length), *[0] * (width - length)]
            token += length
    return shapes, torch.tensor(source), torch.tensor(places)


def collate(samples: list[tuple[list[int], list[bool]]], prompt_weight: float) -> Batch:
    samples = sorted(samples, key=lambda sample: len(sample[0]))
    ids = [token for tokens, _ in samples for token in tokens]
    weights = [1.0 if flag else prompt_weight for _, written in samples for flag in written]
    lengths = [len(tokens) for tokens, _ in samples]
    if missing := -len(ids) % TOKENS_MULTIPLE:
        ids += [PAD_ID] * missing
        weights += [0.0] * missing
        lengths.append(missing)
    position = torch.tensor([index for length in lengths for index in range(length)])
    flat, weight = torch.tensor(ids), torch.tensor(weights)

    def shifted(by: int) -> tuple[Tensor, Tensor]:
        inside = position.roll(-by) > position
        return flat.roll(-by), weight.roll(-by) * inside

    targets, later = shifted(1), shifted(2)
    return Batch(*layout(lengths), flat, position, *targets, *later)


def batches(
    stream: Iterator[Conversation], tokenizer: Tokenizer, tokens: int, prompt_weight: float = 0.07
) -> Iterator[Batch]:
    while True:
        samples: list[tuple[list[int], list[bool]]] = []
        total = 0
        while total < tokens:
            sample = encode(tokenizer, next(stream))
            if len(sample[0]) <= MAX_LENGTH:
                samples.append(sample)
                total += len(sample[0])
        yield collate(samples, prompt_weight)
