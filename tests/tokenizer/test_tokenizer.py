"""Tokenizer: encoding, decoding on bytes, what it reads from a checkpoint and what it refuses."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from dsengine.demo import CHECKPOINT_DIR
from dsengine.tokenizer.tokenizer import Tokenizer, sampling_defaults

BOS, EOS, USER = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>"


@functools.cache
def demo() -> Tokenizer:
    return Tokenizer.from_checkpoint(CHECKPOINT_DIR)


@functools.cache
def demo_oracle() -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(CHECKPOINT_DIR / "tokenizer.json"))


@pytest.fixture()
def tokenizer() -> Tokenizer:
    return demo()


@pytest.fixture()
def checkpoint(tmp_path: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(CHECKPOINT_DIR / name, tmp_path / name)
    return tmp_path


def edit(file: Path, **changes: object) -> None:
    config = json.loads(file.read_text("utf-8")) if file.exists() else {}
    file.write_text(json.dumps(config | changes), "utf-8")


def test_raw_prompts_get_exactly_one_bos(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("hi", add_special_tokens=True) == [tokenizer.bos_token_id, *tokenizer.encode("hi")]
    assert tokenizer.encode(BOS + "hi", add_special_tokens=True) == tokenizer.encode(BOS + "hi")
    assert tokenizer.encode("", add_special_tokens=True) == [tokenizer.bos_token_id]


def test_no_bos_where_the_checkpoint_asks_for_none(checkpoint: Path) -> None:
    edit(checkpoint / "tokenizer_config.json", add_bos_token=False)
    assert Tokenizer.from_checkpoint(checkpoint).encode("", add_special_tokens=True) == []


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_text_survives_the_round_trip(text: str) -> None:
    assert demo().decode(demo().encode(text), skip_special_tokens=False) == text


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 1023), max_size=40), st.booleans())
def test_decoding_agrees_with_the_library(ids: list[int], skip: bool) -> None:
    assert demo().decode(ids, skip) == demo_oracle().decode(ids, skip_special_tokens=skip)


def test_role_and_think_tokens_are_text_and_bos_is_not(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(f"{BOS}{USER}hi<think></think>{EOS}")
    assert tokenizer.decode(ids) == f"{USER}hi<think></think>"
    assert tokenizer.decode(ids, skip_special_tokens=False) == f"{BOS}{USER}hi<think></think>{EOS}"


def test_unknown_ids_decode_to_nothing(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([tokenizer.vocab_size, 10**9, -1, *tokenizer.encode("hi")]) == "hi"
    assert tokenizer.token_bytes(10**9) == b"" and tokenizer.token_text(10**9) == ""


def test_tokens_that_are_part_of_a_character_are_shown_as_bytes(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("😀")
    assert len(ids) > 1
    assert b"".join(map(tokenizer.token_bytes, ids)) == "😀".encode()
    first = tokenizer.token_bytes(ids[0])
    assert tokenizer.token_text(ids[0]) == "bytes:" + "".join(f"\\x{b:02x}" for b in first)


def test_no_token_is_longer_than_max_token_bytes(tokenizer: Tokenizer) -> None:
    lengths = [len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)]
    assert max(lengths) == tokenizer.max_token_bytes


def test_lone_surrogates_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="surrogate"):
        tokenizer.encode("a\ud800b")


def test_eos_ids_come_from_all_files(checkpoint: Path) -> None:
    assert Tokenizer.from_checkpoint(checkpoint).eos_token_ids == {1}
    edit(checkpoint / "config.json", eos_token_id=1, model_type="deepseek_v3")
    edit(checkpoint / "generation_config.json", eos_token_id=[1, 7], temperature=0.6, top_p=0.95, do_sample=True)
    tokenizer = Tokenizer.from_checkpoint(checkpoint)
    assert tokenizer.eos_token_ids == {1, 7}
    assert tokenizer.sampling_defaults == {"temperature": 0.6, "top_p": 0.95}
    edit(checkpoint / "generation_config.json", eos_token_id="x")
    with pytest.raises(ValueError, match="eos_token_id 'x'"):
        Tokenizer.from_checkpoint(checkpoint)


def test_sampling_defaults_ignore_what_is_no_number() -> None:
    assert sampling_defaults({"temperature": None, "top_k": 5, "top_p": True}) == {"top_k": 5}
    assert sampling_defaults({"do_sample": False, "temperature": 0.6}) == {"temperature": 0.0}
    assert sampling_defaults({}) == {}


def test_special_tokens_may_be_objects(checkpoint: Path) -> None:
    edit(checkpoint / "tokenizer_config.json", bos_token={"content": BOS, "__type": "AddedToken"}, pad_token=None)
    tokenizer = Tokenizer.from_checkpoint(checkpoint)
    assert tokenizer.bos_token == BOS and tokenizer.bos_token_id == 0 and tokenizer.pad_token is None
    edit(checkpoint / "tokenizer_config.json", bos_token="<nowhere>")
    with pytest.raises(ValueError, match="'<nowhere>'"):
        Tokenizer.from_checkpoint(checkpoint)


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no tokenizer\.json"):
        Tokenizer.from_checkpoint(tmp_path)
    (tmp_path / "tiktoken.model").write_text("x")
    with pytest.raises(ValueError, match="tiktoken"):
        Tokenizer.from_checkpoint(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{not json")
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot be read"):
        Tokenizer.from_checkpoint(tmp_path)
    shutil.copy(CHECKPOINT_DIR / "tokenizer.json", tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json holds a list"):
        Tokenizer.from_checkpoint(tmp_path)


def test_other_kinds_of_tokenizers_are_refused() -> None:
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    with pytest.raises(ValueError, match="ByteLevel"):
        Tokenizer(backend)


def test_added_tokens_are_taken_literally() -> None:
    """`é` is a printable stand-in for the byte 0xE9 in ordinary tokens, but itself in an added one."""
    alphabet = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = tokenizers.Tokenizer(models.BPE(alphabet, []))
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken("<é>", normalized=False)])
    tokenizer = Tokenizer(backend)
    assert tokenizer.token_bytes(alphabet["é"]) == b"\xe9"
    assert tokenizer.decode([256]) == "<é>"
