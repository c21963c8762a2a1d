"""Plans: sizes against what is published of the checkpoints, rooflines against a table worked out independently."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hub_configs import KIMI_K2, V2_LITE, V3

from dsengine.cli import main
from dsengine.cli_flags import Parser, add_config_flags, build_config
from dsengine.config import EngineConfig
from dsengine.demo import CHECKPOINT_DIR
from dsengine.model.attention_plan import PIECE_TOKENS
from dsengine.model.config import ModelConfig
from dsengine.model.sharding import check_layout
from dsengine.plan import memory
from dsengine.plan.builtin import BUILTIN
from dsengine.plan.hardware import GPUS, find_gpu
from dsengine.plan.layout import Layout, layouts
from dsengine.plan.memory import weigh
from dsengine.plan.planner import Question, make_plan, most_requests, suggested_flags, suggestions
from dsengine.plan.report import as_data
from dsengine.plan.roofline import Load, RankWork, experts_hit, total_seconds
from dsengine.plan.source import PlannedModel, find_model

H200 = GPUS["h200"]
CONFIG = ModelConfig.from_hub(V3)
TP1, TP8 = Layout(), Layout(8, 1, "tp")
EP8, EP32, EP64, EP128 = (Layout(1, ranks, "ep") for ranks in (8, 32, 64, 128))
BATCHES = (1, 8, 32, 64, 128, 256)

# Microseconds of one V3 layer on an H200 for BATCHES requests per GPU (TP: in all), worked out by hand before this code
# existed, by the same rules: larger of bytes / 4.3 TB/s and operations / (1580 FP8, 790 bf16 TFLOP/s), bf16 cache.
LAYER_US = [
    (TP1, 4096, True, (138, 656, 1779, 2436, 2837, 3101)),
    (TP1, 32768, True, (148, 736, 2102, 3083, 4131, 5688)),
    (TP8, 4096, True, (22, 94, 257, 370, 483, 639)),
    (TP8, 32768, True, (30, 155, 503, 862, 1466, 2606)),
    (EP8, 4096, True, (130, 352, 434, 485, 588, 807)),
    (EP8, 32768, True, (140, 433, 757, 1132, 1882, 3395)),
    (EP32, 4096, True, (108, 149, 188, 240, 342, 578)),
    (EP32, 32768, True, (119, 230, 512, 887, 1636, 3166)),
    (EP64, 4096, True, (92, 108, 147, 199, 310, 578)),
    (EP128, 4096, True, (76, 88, 127, 182, 310, 578)),
    (TP1, 4096, False, (137, 148, 186, 236, 337, 577)),
]
# Milliseconds of a whole V3 step, context 4096, by requests per GPU (TP: in all), from the same source.
STEP_MS = [
    (TP8, {1: 1.40, 8: 5.57, 32: 15.1, 64: 21.8, 128: 28.5}),
    (EP8, {1: 8.4, 8: 21.3, 32: 26.2, 64: 29.3, 128: 35.6}),
    (EP32, {32: 11.9, 64: 15.0, 128: 21.3}),
]
# Milliseconds of a V2-Lite step, context 4096, for BATCHES requests.
LITE_STEP_MS = {False: (1.17, 4.40, 7.87, 9.09, 11.0, 14.9), True: (0.65, 2.37, 4.46, 5.54, 7.44, 11.3)}


# Rooflines


@pytest.mark.parametrize(
    ("layout", "context", "is_moe", "expected"), LAYER_US, ids=lambda v: v.name if isinstance(v, Layout) else None
)
def test_layers_agree_with_the_table(layout, context, is_moe, expected):
    rank = RankWork(CONFIG, layout, H200)
    loads = [Load.decode(layout, batch * layout.attn_dp, context) for batch in BATCHES]
    times = [total_seconds(rank.decode_layer(load, is_moe), H200) * 1e6 for load in loads]
    # The table is rounded to whole microseconds, which is up to 2 % of its smallest entries.
    assert times == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(("layout", "expected"), STEP_MS, ids=lambda v: v.name if isinstance(v, Layout) else None)
def test_steps_agree_with_the_table(layout, expected):
    rank = RankWork(CONFIG, layout, H200)
    for batch, milliseconds in expected.items():
        load = Load.decode(layout, batch * layout.attn_dp, 4096)
        assert rank.decode_step_seconds(load) * 1e3 == pytest.approx(milliseconds, rel=0.02)


@pytest.mark.parametrize("is_fp8", [False, True])
def test_steps_of_v2_lite_agree_with_the_table(is_fp8):
    hub = V2_LITE | {"quantization_config": V3["quantization_config"]} if is_fp8 else V2_LITE
    rank = RankWork(ModelConfig.from_hub(hub), TP1, H200)
    times = [rank.decode_step_seconds(Load.decode(TP1, batch, 4096)) * 1e3 for batch in BATCHES]
    # The table leaves out activations, which are 2 % at 256 requests of a model with 6 small experts per token.
    assert times == pytest.approx(LITE_STEP_MS[is_fp8], rel=0.03)


def test_prefill_agrees_with_the_table():
    """16k tokens per GPU under EP32: 3.9 ms projections, 3.5 ms attention, 8.2 ms experts; 17.2k and 10.3k tokens/s."""
    rank = RankWork(CONFIG, EP32, H200)
    for prompt, expected in ((4096, 17.2e3), (16384, 10.3e3)):
        works = rank.prefill_layer(Load(16384, 16384 * 32, prompt), is_moe=True)
        assert 16384 / (61 * total_seconds(works, H200)) == pytest.approx(expected, rel=0.01)


def test_operations_of_a_layer_for_one_request():
    works = RankWork(CONFIG, TP1, H200).decode_layer(Load.decode(TP1, 1, 4096), is_moe=True)
    times = {work.name: round(work.seconds(H200) * 1e6, 1) for work in works}
    expected = {"qkv_a": 3.5, "q_b": 8.8, "w_uk": 2.0, "mla": 1.4, "w_uv": 2.0, "o": 27.3, "router": 0.9}
    assert {name: times[name] for name in expected} == expected
    assert times["shared_gate_up"] + times["shared_down"] == pytest.approx(10.2, abs=0.1)
    assert times["experts"] == 82.0


def test_experts_hit_under_uniform_routing():
    assert experts_hit(256, 8, 1) == pytest.approx(8)
    assert [round(experts_hit(256, 8, tokens), 1) for tokens in (8, 32, 64, 128)] == [57.4, 163.3, 222.4, 251.6]
    assert experts_hit(256, 8, 0) == 0 and experts_hit(8, 8, 1) == 8


def test_gpus_without_fp8_count_bf16_weights_and_arithmetic():
    load = Load.decode(TP1, 1, 4096)
    fp8, bf16 = (RankWork(CONFIG, TP1, GPUS[name]).decode_layer(load, True) for name in ("h100", "a100"))
    assert sum(work.bytes for work in bf16) == pytest.approx(2 * sum(work.bytes for work in fp8), rel=0.02)
    assert not any(work.is_fp8 for work in bf16)


# Sizes


def test_parameters_are_the_published_ones():
    weights = weigh(find_model("deepseek-v3"), H200)
    assert round(weights.parameters / 1e9, 2) == 671.03 and round(weights.active_parameters / 1e9, 2) == 37.55
    assert round(sum(weights.stored_bytes.values()) / 1e9, 1) == 688.6  # the files on the hub
    lite = weigh(find_model("DeepSeek-V2-Lite"), H200)
    assert round(lite.parameters / 1e9, 3) == 15.706 and round(lite.active_parameters / 1e9, 2) == 2.66
    assert lite.stored_bytes == {"BF16": 2 * lite.parameters}


def test_builtin_shapes_are_those_of_the_hub():
    assert find_model("deepseek-v3").config == CONFIG
    assert find_model("deepseek-v2-lite").config == ModelConfig.from_hub(V2_LITE)
    assert set(BUILTIN) == {"deepseek-v3", "deepseek-v2-lite"}


def test_shares_of_a_rank():
    """TP8 ~84 GB, EP8 ~101 GB, EP32 ~40 GB without the NextN layer (and with kv_b_proj in FP8, which is bf16 here)."""
    hub = {**V3, "num_nextn_predict_layers": 0}
    weights = weigh(PlannedModel("", "", ModelConfig.from_hub(hub)), H200)
    shares = [weights.bytes_per_rank(layout) / 1e9 for layout in (TP8, EP8, EP32)]
    assert shares == pytest.approx([84, 101, 40], rel=0.035)
    with_nextn = weigh(find_model("deepseek-v3"), H200)
    assert (with_nextn.bytes_per_rank(TP1) - weights.bytes_per_rank(TP1)) / 1e9 == pytest.approx(11.73, abs=0.05)


def test_headers_are_counted_as_they_are():
    model = find_model(str(CHECKPOINT_DIR))
    weights = weigh(model, H200)
    assert model.stored is not None
    assert sum(weights.stored_bytes.values()) == sum(tensor.num_bytes for tensor in model.stored.values())
    assert weights.nextn_parameters > 0
    from_config = weigh(dataclasses.replace(model, stored=None), H200)
    assert from_config.parts == weights.parts and from_config.parameters == weights.parameters


def test_the_loader_holds_what_the_plan_says():
    """Bytes of a model that was really allocated, FP8 weights kept, against the plan's."""
    import torch

    from dsengine.kernels.registry import select_kernels
    from dsengine.model.deepseek import DeepseekModel
    from dsengine.model.tensors import FP8_DTYPE
    from dsengine.model.weights import WeightSlots

    model = find_model(str(CHECKPOINT_DIR))
    assert model.stored is not None
    fp8 = frozenset(name for name, tensor in model.stored.items() if tensor.dtype == FP8_DTYPE)
    cpu = torch.device("cpu")
    slots = WeightSlots(cpu, torch.bfloat16, fp8)
    DeepseekModel(slots, select_kernels(cpu), model.config, with_nextn=True)
    held = sum(
        tensor.nbytes for slot in slots.by_name.values() for tensor in (slot.weight, slot.scale) if tensor is not None
    )
    assert weigh(model, H200).bytes_per_rank(TP1) == pytest.approx(held, rel=0.001)


def test_the_plan_knows_the_engines_constants():
    from dsengine.engine.device_setup import RESERVE_BYTES
    from dsengine.kernels.fp8_kv import fp8_kv_bytes

    assert memory._EXPANDED_TOKENS == PIECE_TOKENS and memory.RESERVE_BYTES == RESERVE_BYTES
    assert memory.cache_row_bytes(CONFIG, True) == fp8_kv_bytes(512, 64) == 656
    assert memory.cache_row_bytes(CONFIG, False) == 1152
    odd = dataclasses.replace(CONFIG, kv_lora_rank=96)
    with pytest.raises(ValueError, match="kv_lora_rank is 96"):
        memory.cache_row_bytes(odd, True)


def test_the_cache_follows_the_engines_rule():
    """The plan's tokens against the engine's ledger, given the same estimates in place of measurements."""
    from dsengine.engine.memory_ledger import DeviceBudget

    weights, needed, token_bytes = 30 * 2**30, 3 * 2**30, memory.cache_bytes_per_token(CONFIG)
    for fraction in (0.5, 0.9, 0.98):
        total = H200.memory_bytes
        budget = DeviceBudget(
            total=total,
            free=total - memory.CONTEXT_BYTES - weights,
            activations=needed,
            graphs=memory.GRAPH_BYTES,
            reserve=memory.RESERVE_BYTES,
            static_fraction=fraction,
        )
        tokens = memory.cache_tokens(H200, weights, needed, token_bytes, fraction, 64)
        assert tokens == 64 * budget.num_blocks(64 * token_bytes, 64, None)


def test_an_fp8_cache_holds_more_and_reads_less():
    model = find_model("deepseek-v3")
    bf16, fp8 = (make_plan(model, question(num_gpus=8, is_fp8_cache=f)).layouts[0] for f in (False, True))
    assert fp8.cache_tokens / bf16.cache_tokens == pytest.approx(1152 / 656, rel=0.001)
    # 16 heads read the cache in time, 128 compute: only the first gain.
    assert fp8.steps[1].operations["mla"] < 0.6 * bf16.steps[1].operations["mla"]
    alone = [make_plan(model, question(is_fp8_cache=f)).layouts[0].steps[1].operations["mla"] for f in (False, True)]
    assert alone[0] == alone[1]


# Layouts


def test_layouts_of_eight_gpus():
    assert [layout.name for layout in layouts(CONFIG, 8)] == ["TP8", "TP8 EP8", "DP2 TP4 EP8", "DP4 TP2 EP8", "DP8 EP8"]
    assert layouts(CONFIG, 1) == [Layout()] and Layout().name == "one GPU"
    assert layouts(CONFIG, 7) == []
    assert all(layout.name == "TP32 EP32" or layout.attn_dp > 1 for layout in layouts(CONFIG, 32))
    kimi = ModelConfig.from_hub(KIMI_K2)
    assert {layout.world for layout in layouts(kimi, 16)} == {16}


def test_what_keeps_a_layout_from_working_is_said():
    lite = ModelConfig.from_hub(V2_LITE | {"quantization_config": V3["quantization_config"]})
    assert Layout(8, 1, "tp").problem(lite) == "1408 / 8 columns of an expert are no whole FP8 blocks of 128"
    assert Layout(32, 1, "ep").problem(lite) == "16 heads do not divide by 32"
    assert Layout(1, 3, "ep").problem(CONFIG) == "256 experts do not divide by 3"
    assert Layout(1, 8, "tp").problem(CONFIG) is not None


def test_requests_are_whole_blocks_in_every_group():
    assert most_requests(tokens=6400, context=65, block_size=64, layout=TP1) == 50
    assert most_requests(tokens=6400, context=65, block_size=64, layout=EP8) == 400
    assert most_requests(tokens=0, context=65, block_size=64, layout=EP8) == 0
    assert Load.decode(EP8, 9, 100) == Load(tokens=2, routed_tokens=9, context=100)


# Plans


def question(**changes: object) -> Question:
    default = Question(H200, 1, (1, 128), (4096,), None, 64, 2048)
    return dataclasses.replace(default, **changes)  # type: ignore[arg-type]


def suggested(plan, best="throughput"):
    """The flags as an EngineConfig."""
    flags = suggested_flags(plan, suggestions(plan)[best])
    values = dict(zip(flags[::2], flags[1::2], strict=True))
    if "--node-rank" in values:
        values |= {"--node-rank": "1", "--dist-init-addr": "10.0.0.1:20000"}
    parser = Parser()
    add_config_flags(parser, EngineConfig, "engine")
    return build_config(parser.parse_args([word for pair in values.items() for word in pair]), EngineConfig)


def test_suggested_flags_are_flags_that_serve_has():
    config = suggested(make_plan(find_model("deepseek-v2-lite"), question()))
    assert config.block_size == 64 and config.max_running_requests == 256 and config.context_length == 163840
    assert config.tp_size == config.attn_dp_size == config.ep_size == config.nnodes == 1
    assert (
        suggested(make_plan(find_model("deepseek-v2-lite"), question(is_fp8_cache=True))).kv_cache_dtype == "fp8_e4m3"
    )


def test_layouts_are_suggested_for_throughput_and_for_latency():
    assert suggestions(make_plan(find_model("deepseek-v3"), question())) == {}
    plan = make_plan(find_model("deepseek-v3"), question(num_gpus=8))
    wide, quick = suggested(plan), suggested(plan, "latency")
    assert (wide.tp_size, wide.attn_dp_size, wide.ep_size, wide.nnodes) == (8, 8, 8, 1)
    assert (quick.tp_size, quick.attn_dp_size, quick.nnodes) == (8, 1, 1)
    two = suggested(make_plan(find_model("deepseek-v3"), question(gpu=GPUS["h100"], num_gpus=16)))
    assert (two.tp_size, two.nnodes, two.node_rank) == (16, 2, 1)
    data = as_data(plan)
    assert data["serve"]["throughput"][:3] == ["dsengine", "serve", "deepseek-ai/DeepSeek-V3"]
    assert any("not yet on GPUs" in remark for remark in data["remarks"])
    assert data["layouts"][0]["fits"] and data["layouts"][0]["longest_context"] == 163840


def test_dense_layers_and_lm_head_that_all_gpus_share():
    model, asked = find_model("deepseek-v3"), question(num_gpus=8)
    apart = make_plan(model, asked)
    shared = make_plan(model, dataclasses.replace(asked, dense_over_world=True, lm_head_over_world=True))
    by_name = {plan.layout.name: plan for plan in apart.layouts}
    found = {plan.layout.name: plan for plan in shared.layouts}
    assert by_name["TP8"] == found["TP8"], "one group has nothing else to share with"
    one, all_gpus = by_name["DP8 EP8"], found["DP8 EP8 dense8 head8"]
    for part in ("dense layers", "lm_head"):
        assert all_gpus.part_bytes[part] == one.part_bytes[part] // 8
    assert all_gpus.part_bytes["embedding"] == one.part_bytes["embedding"]
    assert one.weight_bytes - all_gpus.weight_bytes == pytest.approx(2.66e9, rel=0.01)
    assert all_gpus.cache_tokens > one.cache_tokens
    # At one request each, reading an eighth of the weights for eight times the tokens.
    assert all_gpus.steps[0].dense_layer < one.steps[0].dense_layer
    config = suggested(shared)
    assert (config.attn_dp_size, config.dense_parallel, config.lm_head_parallel) == (8, "world", "world")


@pytest.mark.parametrize("num_gpus", [2, 4, 8, 16, 32, 64])
def test_the_engine_can_cut_the_model_as_planned(num_gpus):
    for layout in layouts(CONFIG, num_gpus):
        check_layout(
            CONFIG,
            tp_size=layout.world,
            attn_dp_size=layout.attn_dp,
            experts_whole=layout.experts == "ep",
            keeps_fp8=True,
        )


def test_a_larger_share_of_memory_holds_more_and_a_full_one_is_marked():
    small, large = (make_plan(find_model("deepseek-v2-lite"), question(mem_fraction=f)).layouts[0] for f in (0.3, 0.9))
    assert 0 < small.cache_tokens < large.cache_tokens and small.cache_tokens % 64 == 0
    assert [step.fits for step in small.steps] == [True, False]
    none = make_plan(find_model("deepseek-v2-lite"), question(mem_fraction=0.1)).layouts[0]
    assert none.cache_tokens == 0 and none.most_requests == {4096: 0}


def test_bounds_of_a_step_add_up():
    step = make_plan(find_model("deepseek-v3"), question(num_gpus=8)).layouts[0].steps[0]
    assert sum(step.operations.values()) == pytest.approx(step.moe_layer)
    assert step.tokens_per_second_per_user == pytest.approx(1 / step.step)


# The command


def plan(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    status = main(["plan", *words])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_the_command_prints_tables(capsys):
    status, out, _ = plan(
        capsys, "deepseek-v3", "--gpu", "H200", "--num-gpus", "8", "--batch", "8", "--context", "4096"
    )
    assert status == 0
    for text in ("671.03 B parameters", "TP8", "DP8 EP8", "rooflines", "not yet on GPUs", "--attn-dp-size 8"):
        assert text in out


def test_the_command_prints_json(capsys):
    status, out, _ = plan(capsys, "--gpu", "b200", "--json", "--batch-size", "1", "--context", "128")
    data = json.loads(out)
    assert status == 0 and data["serve"]["throughput"][:2] == ["dsengine", "serve"]
    assert data["gpu"]["name"].startswith("NVIDIA B200") and data["layouts"][0]["decode"][0]["requests"] == 1


def test_the_commands_fp8_cache(capsys):
    words = ("deepseek-v2-lite", "--json", "--batch", "1", "--context", "4096", "--kv-cache-dtype", "fp8_e4m3")
    status, out, _ = plan(capsys, *words)
    data = json.loads(out)
    assert status == 0 and data["cache_bytes_per_token"] == 27 * 656 and data["serve"]["throughput"][-1] == "fp8_e4m3"


def test_a_model_too_large_says_so(capsys):
    status, out, _ = plan(capsys, "deepseek-v3", "--gpu", "a100", "--num-gpus", "8")
    assert status == 0 and "do not fit" in out and "no FP8 tensor cores" in out and "dsengine serve deepseek" not in out


def test_a_folder_with_nothing_but_its_config(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(V3))
    status, out, _ = plan(capsys, str(tmp_path), "--json", "--num-gpus", "8")
    assert status == 0 and "no weights" in json.loads(out)["model"]["origin"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("nobody/nothing-of-this-name",), ("not in the hub's cache", "deepseek-v3")),
        (("/no/such/folder",), ("does not exist",)),
        (("--gpu", "h900"), ("h900", "h200")),
        (("deepseek-v3", "--num-gpus", "7"), ("num_gpus is 7", "256 experts")),
        (("--batch-size", "0"), ("--batch-size is 0",)),
        (("--mem-fraction-static", "2"), ("--mem-fraction-static is 2.0",)),
        (("--device", "cuda"), ("unknown flag --device",)),
    ],
    ids=lambda value: " ".join(value),
)
def test_mistakes_are_told(words, told, capsys):
    status, out, err = plan(capsys, *words)
    assert status == 2 and out == ""
    assert all(text in err for text in told), err


def test_planning_needs_no_torch():
    script = (
        "import sys, dsengine.cli; dsengine.cli.main(['plan', 'deepseek-v3', '--json'])\n"
        "assert 'torch' not in sys.modules"
    )
    root = Path(__file__).resolve().parents[1]
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=root, timeout=60)
    assert result.returncode == 0, result.stderr


def test_find_gpu_names_those_there_are():
    assert find_gpu("H100") is GPUS["h100"]
    with pytest.raises(ValueError, match=r"gpu is 'rtx'; it must be one of h200, h100"):
        find_gpu("rtx")
