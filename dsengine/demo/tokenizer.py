"""Builds the demo tokenizer: a byte-level BPE of 1024 ids trained on the demo corpus, with DeepSeek's markers.

Every digit is its own token, as arithmetic needs; the base alphabet holds all 256 bytes, so any UTF-8 round-trips.
"""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from dsengine.demo.corpus import conversations
from dsengine.demo.template import BOS, CHAT_TEMPLATE, EOS, MARKER_TOKENS, PAD, SPECIAL_TOKENS, segments

VOCAB_SIZE = 1024
TRAINING_CONVERSATIONS = 12_000


def corpus_texts(seed: int) -> list[str]:
    """Training texts with the markers cut out, so that no merge is learnt across or inside them."""
    texts = []
    for conversation in islice(conversations(seed), TRAINING_CONVERSATIONS):
        text = "".join(piece for piece, _ in segments(conversation))
        for marker in (*SPECIAL_TOKENS, *MARKER_TOKENS):
            text = text.replace(marker, "\0")
        texts += [part for part in text.split("\0") if part]
    return texts


def build_tokenizer(seed: int = 0) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"\p{N}"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    markers = [AddedToken(token, special=False, normalized=False) for token in MARKER_TOKENS]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[*special, *markers],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus_texts(seed), trainer)
    return clear_special_flags(tokenizer)


def clear_special_flags(tokenizer: Tokenizer) -> Tokenizer:
    """The trainer marks all it was given as special; DeepSeek's role, think and tool tokens are not."""
    description = json.loads(tokenizer.to_str())
    for token in description["added_tokens"]:
        token["special"] = token["content"] in SPECIAL_TOKENS
    return Tokenizer.from_str(json.dumps(description, ensure_ascii=False))


def tokenizer_config() -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 8192,
        "chat_template": CHAT_TEMPLATE,
    }


def save_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    text = json.dumps(tokenizer_config(), indent=2, ensure_ascii=False)
    (directory / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
