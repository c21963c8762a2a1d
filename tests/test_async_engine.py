"""The engine process from outside: streams, aborts, deaths, restarts. Real processes on the demo checkpoint."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from dsengine import LLM, SamplingParams, async_engine
from dsengine.async_engine import AsyncEngine, EngineDeadError, QueueFullError
from dsengine.config import EngineConfig
from dsengine.engine.messages import RequestUpdate

CONFIG = EngineConfig(max_total_tokens=16384, num_threads=1)
LONG = SamplingParams(temperature=0.0, max_tokens=400, ignore_eos=True)
SHORT = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)


@contextlib.asynccontextmanager
async def running(config: EngineConfig = CONFIG, **options: str) -> AsyncIterator[AsyncEngine]:
    """An engine, which must have let go of everything in the end; a stand-in has nothing to let go of."""
    engine = AsyncEngine(config, **options)  # type: ignore[arg-type]
    await engine.start()
    try:
        yield engine
        if engine.is_alive and "module" not in options:
            await eventually(lambda: engine.stats.num_running == engine.stats.num_waiting == 0)
            assert await engine.call("check_integrity") == {"ok": True}
            assert (await engine.call("stats"))["num_blocks_in_use"] == 0
    finally:
        await engine.shutdown()


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(scenario(), 120)

    asyncio.run(bounded())


async def collect(engine: AsyncEngine, request_id: str, params: SamplingParams, prompt: str = "Hello") -> list[int]:
    ids = engine.tokenizer.encode(prompt, add_special_tokens=True)
    return [t async for u in engine.generate(ids, params, request_id=request_id) for t in u.new_token_ids]


async def eventually(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = asyncio.get_running_loop().time() + seconds
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, "the condition did not come true in time"
        await asyncio.sleep(0.02)


def process_exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_the_process_and_the_offline_engine_agree() -> None:
    prompts = ["Hello", "What is 2 + 2?", "JSON"]
    with LLM(max_total_tokens=4096, num_threads=1) as llm:
        expected = [o.outputs[0].token_ids for o in llm.generate(prompts, SHORT)]

    async def scenario() -> None:
        async with running() as engine:
            assert engine.is_alive
            assert engine.info.num_blocks == 16384 // engine.info.block_size
            got = await asyncio.gather(*(collect(engine, str(i), SHORT, p) for i, p in enumerate(prompts)))
            assert got == expected
            pid = engine.pid
        assert pid is not None
        assert not process_exists(pid)

    run(scenario)


def test_streams_closed_at_random_leave_nothing_behind() -> None:
    rng = random.Random(0)

    async def scenario() -> None:
        async with running() as engine:

            async def reader(index: int, leave_after: int | None) -> int:
                ids = engine.tokenizer.encode(f"Hello {index}", add_special_tokens=True)
                stream = engine.generate(ids, SamplingParams(max_tokens=20, ignore_eos=True), request_id=f"r{index}")
                seen = 0
                async with contextlib.aclosing(stream):
                    async for update in stream:
                        seen += len(update.new_token_ids)
                        if leave_after is not None and seen >= leave_after:
                            break
                return seen

            leave = [rng.randrange(1, 15) if rng.random() < 0.4 else None for _ in range(48)]
            seen = await asyncio.gather(*(reader(i, after) for i, after in enumerate(leave)))
            assert all(s == (20 if after is None else after) for s, after in zip(seen, leave, strict=True))
            assert await engine.call("check_integrity") == {"ok": True}
            stats = await engine.call("stats")
            assert (stats["num_running"], stats["num_waiting"], stats["num_blocks_in_use"]) == (0, 0, 0)

    run(scenario)


def test_abort_by_id_tells_the_reader() -> None:
    async def scenario() -> None:
        async with running() as engine:
            updates: list[RequestUpdate] = []
            async for update in engine.generate([5, 6, 7], LONG, request_id="x"):
                updates.append(update)
                if len(updates) == 3:
                    engine.abort("x")
            assert updates[-1].finish_reason == "abort"
            engine.abort("x")
            engine.abort("never seen")
            await eventually(lambda: engine.stats.num_running == 0)

    run(scenario)


def test_refusals_reach_their_caller_only() -> None:
    async def scenario() -> None:
        config = EngineConfig(max_total_tokens=16384, num_threads=1, max_running_requests=1, max_queued_requests=1)
        async with running(config) as engine:
            with pytest.raises(ValueError, match="token id"):
                async for _ in engine.generate([10**6], SHORT, request_id="bad"):
                    pass
            first = asyncio.create_task(collect(engine, "a", SHORT))
            second = asyncio.create_task(collect(engine, "b", SHORT))
            await asyncio.sleep(0)
            with pytest.raises(QueueFullError, match="limit"):
                await collect(engine, "c", SHORT)
            with pytest.raises(ValueError, match="in use"):
                await collect(engine, "a", SHORT)
            assert len(await first) == len(await second) == 8

    run(scenario)


def test_death_of_the_engine_is_told_and_mended() -> None:
    async def scenario() -> None:
        async with running(on_failure="restart") as engine:
            tasks = [asyncio.create_task(collect(engine, str(i), LONG)) for i in range(4)]
            await eventually(lambda: engine.stats.num_running == 4)
            before = engine.pid
            assert before is not None
            os.kill(before, signal.SIGKILL)
            for result in await asyncio.gather(*tasks, return_exceptions=True):
                assert isinstance(result, EngineDeadError)
                assert "SIGKILL" in str(result)
            assert not engine.is_alive
            with pytest.raises(EngineDeadError):
                await collect(engine, "too early", SHORT)
            await eventually(lambda: engine.is_alive)
            assert engine.pid != before
            assert len(await collect(engine, "again", SHORT)) == 8

    run(scenario)


def test_death_under_the_exit_policy_is_final() -> None:
    async def scenario() -> None:
        async with running(on_failure="exit") as engine:
            assert engine.pid is not None
            os.kill(engine.pid, signal.SIGKILL)
            await asyncio.wait_for(engine.failed.wait(), 10)
            assert not engine.is_alive

    run(scenario)


def test_an_engine_that_cannot_start_says_why() -> None:
    async def scenario() -> None:
        engine = AsyncEngine(EngineConfig(context_length=10**7))
        with pytest.raises(ValueError, match="10000000"):
            await engine.start()

    run(scenario)


def test_the_engine_ends_with_its_parent() -> None:
    """However the parent dies: the pipe to the child closes, and the child goes."""
    script = (
        "import asyncio, os, signal\n"
        "from dsengine.async_engine import AsyncEngine\n"
        "from dsengine.config import EngineConfig\n"
        "async def main():\n"
        "    engine = AsyncEngine(EngineConfig(max_total_tokens=1024))\n"
        "    await engine.start()\n"
        "    print(engine.pid, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "asyncio.run(main())\n"
    )

    async def scenario() -> None:
        parent = await asyncio.create_subprocess_exec(sys.executable, "-c", script, stdout=asyncio.subprocess.PIPE)
        assert parent.stdout is not None
        child = int(await parent.stdout.readline())
        await parent.wait()
        await eventually(lambda: not process_exists(child), seconds=10)

    run(scenario)


def test_maintenance_may_last_and_outlives_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setattr(async_engine, "_RANK_0_SECONDS", 0.0)

    async def scenario() -> None:
        config = EngineConfig(tp_size=2, dist_timeout=1.0)
        async with running(config, module="slow_engine") as engine:
            pid = engine.pid
            assert engine.info.model == str(engine.checkpoint)
            assert await engine.call("update_weights", "refused") == {"error": "no"}
            waiter = asyncio.create_task(engine.call("update_weights", "new weights"))
            await asyncio.sleep(0.1)
            waiter.cancel()  # whoever asked has left
            assert await engine.call("wake_up") == {} and engine.pid == pid, "it was silent for twice the limit"
            assert engine.is_alive
            with pytest.raises(EngineDeadError):
                await engine.call("stats")  # is not answered
            await eventually(lambda: engine.is_alive)
            assert engine.pid != pid and engine.info.model == "new weights"

    run(scenario)
