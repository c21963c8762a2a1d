"""The NextN layer against Hugging Face's MTP module and against its formula."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoints import TINY_CONFIGS, Session, load_tiny
from torch import Tensor

from dsengine.model.activations import Activation
from dsengine.model.deepseek import DeepseekModel
from dsengine.model.random_checkpoint import write_random_checkpoint

TOKENS = torch.randint(0, 320, (41,), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("v3")
    write_random_checkpoint(path, TINY_CONFIGS["v3"], seed=5)
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> DeepseekModel:
    loaded = load_tiny(folder)
    assert loaded.nextn is not None
    return loaded


def run_nextn(model: DeepseekModel, chunks: list[int], num_decodes: int = 0) -> tuple[Tensor, Tensor]:
    """(main, NextN) hidden states of TOKENS[:-1], run in chunks of these sizes."""
    assert model.nextn is not None
    session = Session(model, max_tokens=len(TOKENS), num_requests=1)
    main, drafts, start = [], [], 0
    for size in chunks:
        batch = session.batch([(0, TOKENS[start : start + size])], num_decodes)
        with torch.inference_mode():
            hidden = model.forward(batch, session.kv_caches)
            next_ids = torch.tensor(TOKENS[start + 1 : start + size + 1])
            drafts.append(model.nextn.forward(hidden, next_ids, batch, session.kv_caches[-1]))
        main.append(hidden)
        session.lengths[0] += size
        start += size
    assert start == len(TOKENS) - 1
    return torch.cat(main), torch.cat(drafts)


def test_equals_hugging_face(folder: Path, model: DeepseekModel, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers
    from transformers.cache_utils import MtpCache
    from transformers.modeling_layers import MtpModel

    model_class = transformers.DeepseekV3ForCausalLM
    monkeypatch.setattr(model_class, "_keys_to_ignore_on_load_unexpected", [r"model\.layers\.3.*"])
    main: Any = model_class.from_pretrained(folder, attn_implementation="eager", experts_implementation="eager")
    mtp: Any = MtpModel.from_pretrained(main)
    ids = torch.tensor([TOKENS])
    with torch.inference_mode():
        hidden = main(ids[:, :-1], output_hidden_states=True).hidden_states[-1]
        cache = MtpCache(config=mtp.config)
        positions = torch.arange(1, len(TOKENS))[None]
        expected = mtp.forward_layer(0, hidden, positions, cache, input_ids=ids[:, 1:])[0]
        expected_logits = main.lm_head(expected)
    ours_main, ours = run_nextn(model, [len(TOKENS) - 1])
    torch.testing.assert_close(ours_main, hidden[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(model.compute_logits(ours), expected_logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("num_decodes", [0, 1])
@pytest.mark.parametrize("chunks", [[1] * 40, [13, 20, 7], [39, 1]])
def test_chunks_and_steps_continue_its_cache(model: DeepseekModel, chunks: list[int], num_decodes: int) -> None:
    _, whole = run_nextn(model, [40])
    _, parts = run_nextn(model, chunks, num_decodes)
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=0)


def test_storing_leaves_in_the_cache_what_a_pass_leaves(model: DeepseekModel) -> None:
    nextn = model.nextn
    assert nextn is not None
    hidden = torch.randn(len(TOKENS), 128, generator=torch.Generator().manual_seed(2))
    caches = []
    for stores in (False, True):
        session = Session(model, max_tokens=len(TOKENS), num_requests=1)
        batch, cache = session.batch([(0, TOKENS)], num_decodes=0), session.kv_caches[-1]
        if stores:
            nextn.store(hidden, torch.tensor(TOKENS), batch.positions, batch.slot_mapping, cache)
        else:
            nextn.forward(hidden, torch.tensor(TOKENS), batch, cache)
        caches.append(cache.view(-1, cache.shape[2])[batch.slot_mapping])
    assert caches[0].abs().min(dim=1).values.max() > 0
    torch.testing.assert_close(*caches, atol=1e-6, rtol=0)


def test_first_token_by_hand(model: DeepseekModel) -> None:
    """One token attends to itself alone, so its attention is its own value: the layer becomes a short formula."""
    nextn = model.nextn
    assert nextn is not None
    session = Session(model, max_tokens=8, num_requests=1)
    batch = session.batch([(0, [7])], num_decodes=0)
    hidden = torch.randn(1, 128, generator=torch.Generator().manual_seed(1))
    got = nextn.forward(hidden, torch.tensor([11]), batch, session.kv_caches[-1])

    def rms(x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight

    halves = (rms(model.embed_tokens[11:12], nextn.enorm.weight), rms(hidden, nextn.hnorm.weight))
    x = torch.cat(halves, dim=-1) @ nextn.eh_proj.weight.T
    attention = nextn.layer.attention
    kv_a = (rms(x, nextn.layer.input_norm.weight) @ attention.qkv_a.weight.T)[:, -48:]
    latent = rms(kv_a[:, :32], attention.kv_norm_weight)
    values = torch.einsum("hvr,tr->thv", attention.w_uv, latent).flatten(1)
    x = x + values @ attention.o_proj.weight.T
    x = x + nextn.layer.mlp(Activation(rms(x, nextn.layer.post_attention_norm.weight)))
    torch.testing.assert_close(got, rms(x, nextn.norm.weight), atol=1e-5, rtol=0)


def test_main_model_leaves_the_cache_of_nextn_alone(model: DeepseekModel) -> None:
    session = Session(model, max_tokens=8, num_requests=1)
    session.run([(0, [1, 2, 3])])
    assert len(session.kv_caches) == 4
    assert session.kv_caches[3].isnan().all()
