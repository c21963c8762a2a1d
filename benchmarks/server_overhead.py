"""What does the HTTP server cost, apart from the engine behind it?

The engine of these runs computes nothing and gives every stream one token at each tick of a clock that all processes
share (benchmarks/fixed_speed_engine.py). So what a token is late by, and the processor time that the server's process
takes, are the server's own.

    python benchmarks/server_overhead.py                 # 1 to 1,000 streams of 20 tokens/s, requests, parsers
    python benchmarks/server_overhead.py --streams 1000 --seconds 5

Server and load run on different cores where there are two. The last line of standard output is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.server_parsers import parser_times
from benchmarks.serving_report import percentile

_SERVE = (
    "import sys; from dsengine.config import EngineConfig, ServerConfig; from dsengine.server.launch import serve; "
    "sys.exit(serve(EngineConfig(max_running_requests=4096), ServerConfig(port=int(sys.argv[1]), log_level='warning'), "
    "engine_module='benchmarks.fixed_speed_engine'))"
)
_STREAM_PERIOD = 0.05
_WARM_UP_TICKS = 20


@dataclass(frozen=True)
class StreamFigures:
    """One number of streams.

    Attributes:
        cpu_share: processor time of the server's process, as a share of one core.
        chunks_per_token: below 1 where the server fell behind, and so put several tokens into one chunk.
        late_ms: median and 99th percentile of (arrival - tick of the engine).
        us_per_token: processor time per token.
    """

    streams: int
    cpu_share: float
    chunks_per_token: float
    late_ms: tuple[float, float]
    us_per_token: float


class Server:
    """A server with an engine of fixed speed, on one core."""

    def __init__(self, period: float, core: int | None) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        root = Path(__file__).resolve().parents[1]
        env = os.environ | {"DSENGINE_BENCH_PERIOD_MS": str(1000 * period), "PYTHONPATH": str(root)}
        self._process = subprocess.Popen(
            [sys.executable, "-c", _SERVE, str(self.port)],
            env=env,
            stdout=subprocess.PIPE,
            preexec_fn=None if core is None else lambda: os.sched_setaffinity(0, {core}),
        )
        assert self._process.stdout is not None
        if not self._process.stdout.readline():
            raise SystemExit(f"the server ended with exit code {self._process.wait()}")

    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(") ")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(20)


class _Stream(asyncio.Protocol):
    """One streamed chat completion: counts events, and notes how late they are while `log` is a list."""

    log: list[float] | None = None
    num_events = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        log = _Stream.log
        if log is not None:
            count = data.count(b"data: ")
            _Stream.num_events += count
            log.extend([time.monotonic() % _STREAM_PERIOD] * count)


def _request(path: str, body: dict[str, object]) -> bytes:
    data = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    return head.encode() + data


def _chat(max_tokens: int, *, stream: bool) -> bytes:
    messages = [{"role": "user", "content": "What is 347 + 285?"}]
    fields = {"model": "dsengine-demo", "messages": messages, "max_tokens": max_tokens, "stream": stream}
    return _request("/v1/chat/completions", fields)


async def measure_streams(server: Server, streams: int, seconds: float) -> StreamFigures:
    """`streams` answers at once, none of which ends while they are measured."""
    loop = asyncio.get_running_loop()
    transports = []
    for _ in range(streams):
        _, protocol = await loop.create_connection(_Stream, "127.0.0.1", server.port)
        protocol.transport.write(_chat(4000, stream=True))
        transports.append(protocol.transport)
        await asyncio.sleep(0.001)
    await asyncio.sleep(_WARM_UP_TICKS * _STREAM_PERIOD)
    _Stream.num_events, _Stream.log = 0, []
    began, cpu = time.monotonic(), server.cpu_seconds()
    await asyncio.sleep(seconds)
    elapsed, cpu = time.monotonic() - began, server.cpu_seconds() - cpu
    late, _Stream.log = _Stream.log, None
    for transport in transports:
        transport.abort()
    await asyncio.sleep(1.0)
    given = streams * elapsed / _STREAM_PERIOD
    return StreamFigures(
        streams=streams,
        cpu_share=cpu / elapsed,
        chunks_per_token=len(late) / given,
        late_ms=(1e3 * percentile(late, 50), 1e3 * percentile(late, 99)),
        us_per_token=1e6 * cpu / given,
    )


async def _exchange(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> tuple[int, float]:
    """(status, seconds to the first byte) of one request on a connection that is kept."""
    began = time.perf_counter()
    writer.write(request)
    status = await reader.readline()
    took = time.perf_counter() - began
    length = 0
    while (line := await reader.readline()) not in (b"\r\n", b""):
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            length = int(value)
    await reader.readexactly(length)
    return int(status.split()[1]), took


async def measure_exchanges(
    server: Server, request: bytes, *, status: int, concurrency: int, seconds: float
) -> tuple[float, float, float]:
    """Requests/s, and median and 99th percentile of the milliseconds to the first byte."""
    deadline = time.monotonic() + seconds
    times: list[float] = []

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        while time.monotonic() < deadline:
            got, took = await _exchange(reader, writer, request)
            assert got == status, f"status {got} instead of {status}"
            times.append(took)
        writer.close()

    began = time.monotonic()
    await asyncio.gather(*(client() for _ in range(concurrency)))
    return len(times) / (time.monotonic() - began), 1e3 * percentile(times, 50), 1e3 * percentile(times, 99)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 10, 100, 300, 1000], metavar="N")
    parser.add_argument("--seconds", type=float, default=5.0, help="measured time of each run [5]")
    args = parser.parse_args(argv)
    cores = sorted(os.sched_getaffinity(0))
    server_core, load_core = (cores[0], cores[-1]) if len(cores) > 1 else (None, None)
    if load_core is not None:
        os.sched_setaffinity(0, {load_core})
    streams = _run_streams(args.streams, args.seconds, server_core)
    exchanges = _run_exchanges(args.seconds, server_core)
    parsers = parser_times()
    for name, microseconds in parsers.items():
        print(f"{name:<40} {microseconds:8.2f} us per token")
    report = {
        "benchmark": "server_overhead",
        "python": platform.python_version(),
        "cores": 2 if server_core is not None else 1,
        "tokens_per_second_and_stream": 1 / _STREAM_PERIOD,
        "streams": [vars(figures) for figures in streams],
        "exchanges": exchanges,
        "parsers_us_per_token": parsers,
    }
    print(json.dumps(report))
    return 0


def _run_streams(counts: Sequence[int], seconds: float, core: int | None) -> list[StreamFigures]:
    print(f"{'streams':>8} {'core':>7} {'us/token':>9} {'late p50':>9} {'p99 ms':>7} {'chunks/token':>13}")
    results = []
    for count in counts:
        server = Server(_STREAM_PERIOD, core)
        try:
            figures = asyncio.run(measure_streams(server, count, seconds))
        finally:
            server.close()
        results.append(figures)
        late = f"{figures.late_ms[0]:9.2f} {figures.late_ms[1]:7.2f}"
        print(
            f"{count:8} {figures.cpu_share:7.1%} {figures.us_per_token:9.1f} {late} {figures.chunks_per_token:13.2f}",
            flush=True,
        )
    return results


def _run_exchanges(seconds: float, core: int | None) -> dict[str, dict[str, float]]:
    cases = {
        "chat, 1 token, 1 client": (_chat(1, stream=False), 200, 1),
        "chat, 1 token, 32 clients": (_chat(1, stream=False), 200, 32),
        "refused body, 1 client": (_request("/v1/chat/completions", {"model": "dsengine-demo", "n": -1}), 400, 1),
        "unknown route, 1 client": (_request("/v1/nothing", {}), 404, 1),
    }
    print(f"\n{'':<28} {'requests/s':>10} {'first byte p50':>15} {'p99 ms':>7}")
    server = Server(0.001, core)
    results = {}
    try:
        for name, (request, status, clients) in cases.items():
            rate, p50, p99 = asyncio.run(
                measure_exchanges(server, request, status=status, concurrency=clients, seconds=seconds)
            )
            results[name] = {"requests_per_s": rate, "first_byte_ms_p50": p50, "first_byte_ms_p99": p99}
            print(f"{name:<28} {rate:10.0f} {p50:15.2f} {p99:7.2f}", flush=True)
    finally:
        server.close()
    print()
    return results


if __name__ == "__main__":
    sys.exit(main())
