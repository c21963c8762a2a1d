"""From the flags of speculative decoding to its parts: the drafter, the controller, the runner that uses them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from dsengine.config import EngineConfig
from dsengine.engine.model_runner import ModelRunner
from dsengine.engine.phase_times import PhaseTimes
from dsengine.engine.sampler import Sampler
from dsengine.engine.speculation import Speculator
from dsengine.engine.speculation_book import SpeculationBook
from dsengine.engine.step_costs import MeasuredCosts, RooflineCosts
from dsengine.memory.kv_cache import KVCachePool
from dsengine.model.deepseek import DeepseekModel
from dsengine.plan.hardware import GPUS
from dsengine.specdec.controller import StepCosts, TreeController
from dsengine.specdec.drafter import Drafter, Meet, NextNDrafter
from dsengine.specdec.drawn_tree import MOST_DRAWS
from dsengine.specdec.ngram import NGramDrafter
from dsengine.specdec.shape import TreeShape


def largest_tree_shape(config: EngineConfig) -> TreeShape:
    """The tree that the flags ask for."""
    return TreeShape(config.speculative_num_steps, config.speculative_eagle_topk, config.tree_nodes)


def make_speculator(
    config: EngineConfig,
    model: DeepseekModel,
    pool: KVCachePool,
    sampler: Sampler,
    meet: Meet = lambda num_tokens, num_logits: None,
) -> Speculator | None:
    """What drafts (or takes the proposals of grammars) and verifies, None where the flags do not ask for it.

    Args:
        meet: as in `NextNDrafter`.

    Raises:
        ValueError: the checkpoint has nothing to draft with, or fewer tokens than the trees are wide.
    """
    if config.speculative_algorithm is None and config.disable_jump_forward:
        return None
    if config.speculative_algorithm is not None and config.speculative_eagle_topk > sampler.num_valid_tokens:
        raise ValueError(
            f"speculative_eagle_topk is {config.speculative_eagle_topk}; the vocabulary has {sampler.num_valid_tokens} "
            "tokens"
        )
    if config.speculative_acceptance == "rejection" and config.speculative_eagle_topk > MOST_DRAWS:
        raise ValueError(
            f"speculative_eagle_topk is {config.speculative_eagle_topk}; with speculative_acceptance rejection it must "
            f"be at most {MOST_DRAWS}"
        )
    drafter: Drafter | None
    if config.speculative_algorithm is None:
        drafter = None
    elif config.speculative_algorithm == "NGRAM":
        drafter = NGramDrafter(model.device)
    elif model.nextn is None:
        raise ValueError(
            "speculative_algorithm is NEXTN, but the checkpoint has no NextN layer (num_nextn_predict_layers is 0, or "
            "its tensors are missing); use NGRAM, or leave it out"
        )
    else:
        drafter = NextNDrafter(model, pool.layers[-1], config.max_running_requests, sampler.num_valid_tokens, meet)
    return Speculator(
        pool,
        sampler,
        drafter,
        PhaseTimes(model.device),
        num_layers=len(model.layers),
        num_rows=config.max_running_requests,
        acceptance=config.speculative_acceptance,
    )


def make_book(
    config: EngineConfig, runner: ModelRunner, agree: Callable[[float], float] = lambda seconds: seconds
) -> SpeculationBook | None:
    """What decides about the runner's drafts, None where it does not draft.

    Args:
        agree: makes of a measured time the one that all ranks go by.
    """
    if runner.speculator is None or config.speculative_algorithm is None:
        return None
    largest = largest_tree_shape(config)
    costs = None
    if config.speculative_adaptive is not False:
        costs = _costs(runner, agree)
        if config.speculative_algorithm == "NGRAM":
            costs = _FreeDrafts(costs)
    return SpeculationBook(TreeController(largest, costs), runner.speculator.times)


def describe(config: EngineConfig) -> str:
    """The flags in one line, as in "NEXTN 3/4/8 adaptive"; empty without speculation."""
    if config.speculative_algorithm is None:
        return ""
    adaptive = "" if config.speculative_adaptive is False else " adaptive"
    return f"{config.speculative_algorithm} {largest_tree_shape(config)}{adaptive}"


class _FreeDrafts:
    """Costs with a drafter that computes nothing."""

    def __init__(self, costs: StepCosts) -> None:
        self.main = costs.main

    def draft(self, tokens: int, requests: int, context: int) -> float:
        return 0.0

    def catch_up(self, tokens: int) -> float:
        return 0.0


def _costs(runner: ModelRunner, agree: Callable[[float], float]) -> StepCosts:
    model, cache = runner.model, runner.pool.layers[0]
    if model.device.type != "cuda":
        return MeasuredCosts(model, cache.shape[2], cache.dtype, agree)
    name = torch.cuda.get_device_name(model.device).lower()
    # Of a GPU that is not known another's rates are taken: only ratios matter, and they differ little.
    gpu = next((gpu for key, gpu in GPUS.items() if key in name), GPUS["h200"])
    return RooflineCosts(model.config, gpu, cache.shape[2] * cache.element_size())
