"""Updates to text: what counts as output when a stop string ends inside an update of several tokens."""

from __future__ import annotations

from dsengine import SamplingParams
from dsengine.demo import CHECKPOINT_DIR
from dsengine.engine.messages import RequestUpdate, TokenLogprob
from dsengine.outputs import SequenceAssembler
from dsengine.tokenizer.tokenizer import Tokenizer


def test_tokens_behind_a_stop_string_are_dropped() -> None:
    tokenizer = Tokenizer.from_checkpoint(CHECKPOINT_DIR)
    ids = tokenizer.encode("1 2 3 4 5 6")
    assembler = SequenceAssembler(0, tokenizer, [0], SamplingParams(stop=("3",), logprobs=0))
    end = ids.index(tokenizer.encode("3")[-1]) + 1
    logprobs = tuple(TokenLogprob(token, -1.0, 1) for token in ids)
    must_abort = assembler.push(RequestUpdate("r", tuple(ids), logprobs=logprobs))
    assert must_abort
    output = assembler.output
    assert output.token_ids == ids[:end]
    assert output.logprobs == list(logprobs[:end])
    assert output.num_new_tokens == end
    assert output.text == "1 2 "
    assert (output.finish_reason, output.stop_reason) == ("stop", "3")
    assert not assembler.push(RequestUpdate("r", (5,)))
    assert output.text == "1 2 "


def test_text_is_the_sum_of_its_deltas() -> None:
    tokenizer = Tokenizer.from_checkpoint(CHECKPOINT_DIR)
    ids = tokenizer.encode("Grüße 🙂 und mehr")
    assembler = SequenceAssembler(0, tokenizer, [0], SamplingParams())
    deltas = []
    for i, token in enumerate(ids):
        assembler.push(RequestUpdate("r", (token,), finish_reason="length" if i == len(ids) - 1 else None))
        deltas.append(assembler.output.delta)
    assert "".join(deltas) == assembler.output.text == "Grüße 🙂 und mehr"
    assert assembler.output.finish_reason == "length"
