"""The load generator against a server whose timing is known: its figures must be the truth."""

from __future__ import annotations

import json
import math
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.serving_client import Record  # noqa: E402
from benchmarks.serving_prompts import PromptMaker, arrivals  # noqa: E402
from benchmarks.serving_report import percentile, summarize  # noqa: E402

FIRST_TOKEN_SECONDS = 0.10
GAP_SECONDS = 0.02


class SlowServer(BaseHTTPRequestHandler):
    """Streams `max_tokens` tokens, the first after 100 ms, the others 20 ms apart; every fifth request fails."""

    protocol_version = "HTTP/1.1"
    seen: ClassVar[list[dict[str, Any]]] = []
    lock = threading.Lock()

    def do_GET(self):
        if self.path == "/v1/models":
            self._json(200, {"data": [{"id": "slow"}]})
        elif self.path == "/server_info":
            self._json(200, {"engine": {"vocab_size": 1000}})
        else:
            self._json(404, {"error": {"message": "no such route"}})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.lock:
            self.seen.append(body)
            number = len(self.seen)
        if number % 5 == 0:
            self._json(429, {"error": {"message": "too many"}})
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        num_tokens = body["max_tokens"]
        time.sleep(FIRST_TOKEN_SECONDS)
        for index in range(num_tokens):
            if index:
                time.sleep(GAP_SECONDS)
            last = index == num_tokens - 1
            self._event({"choices": [{"text": "x", "finish_reason": "length" if last else None}]})
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": num_tokens}
        self._event({"choices": [], "usage": usage | {"prompt_tokens_details": {"cached_tokens": 7}}})
        self.wfile.write(b"data: [DONE]\n\n")
        self.close_connection = True

    def _event(self, event):
        self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
        self.wfile.flush()

    def _json(self, status, value):
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def slow_server() -> Iterator[str]:
    SlowServer.seen = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), SlowServer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def run_program(*words: str) -> subprocess.CompletedProcess[str]:
    program = ROOT / "benchmarks" / "serving.py"
    return subprocess.run([sys.executable, program, *words], capture_output=True, text=True, timeout=120)


def test_a_whole_run_reports_what_the_server_did(slow_server, tmp_path):
    flags = ("--num-prompts", "9", "--num-warmups", "0", "--max-concurrency", "3", "--input-len", "40")
    plot = ("--plot", str(tmp_path / "run.png")) if _has_matplotlib() else ()
    result = run_program(
        "--base-url", slow_server, *flags, "--output-len", "6", "--slo-ttft-ms", "5000", "--slo-itl-ms", "1", *plot
    )  # fmt: skip
    assert result.returncode == 1, "one request failed, and the status must say so"
    figures = json.loads(result.stdout.splitlines()[-1])
    assert figures["completed"] == 8 and figures["failed"] == 1
    assert figures["errors"] == ['HTTP 429: {"error": {"message": "too many"}}']
    assert figures["prompt_tokens"] == 8 * 40 and figures["cached_tokens"] == 8 * 7
    assert figures["output_tokens"] == 8 * 6 and figures["model"] == "slow"
    assert figures["ttft_ms"]["p50"] >= FIRST_TOKEN_SECONDS * 1000
    assert GAP_SECONDS * 1000 <= figures["tpot_ms"]["p50"] < 5 * GAP_SECONDS * 1000
    assert figures["e2e_ms"]["p50"] >= (FIRST_TOKEN_SECONDS + 5 * GAP_SECONDS) * 1000
    assert figures["goodput_requests_per_s"] == 0, "no request can meet 1 ms between tokens"
    assert all(body["ignore_eos"] and body["stream_options"] for body in SlowServer.seen)
    assert all(max(body["prompt"]) < 900 for body in SlowServer.seen)
    assert not plot or (tmp_path / "run.png").stat().st_size > 10_000


def test_an_unreachable_server_is_one_line():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    result = run_program("--base-url", f"http://127.0.0.1:{port}")
    assert result.returncode == 1 and "Traceback" not in result.stderr


def _has_matplotlib() -> bool:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def test_percentiles_agree_with_the_definition():
    values = [random.Random(1).random() for _ in range(101)]
    ordered = sorted(values)
    assert percentile(values, 50) == ordered[50] and percentile(values, 90) == ordered[90]
    assert percentile([1.0, 2.0], 50) == 1.5
    assert math.isnan(percentile([], 50))


def test_figures_of_known_records():
    fast = Record(0.0, end=1.0, chunk_times=[0.1, 0.2, 0.3], prompt_tokens=10, output_tokens=3, finish_reason="stop")
    slow = Record(1.0, end=4.0, chunk_times=[3.0, 4.0], prompt_tokens=10, output_tokens=2, finish_reason="stop")
    failed = Record(0.0, end=0.5, error="HTTP 500")
    figures = summarize([fast, slow, failed], slo_ttft_ms=500.0)
    assert figures["duration_s"] == 4.0 and figures["output_tokens_per_s"] == 1.25
    assert figures["ttft_ms"]["mean"] == pytest.approx((100 + 2000) / 2)
    assert figures["tpot_ms"]["max"] == pytest.approx(1000)
    assert figures["itl_ms"]["mean"] == pytest.approx(400)
    assert figures["goodput_requests_per_s"] == 0.25 and figures["slo_attainment"] == pytest.approx(1 / 3, abs=1e-4)


def test_speculated_tokens_count_in_tpot():
    record = Record(0.0, end=1.0, chunk_times=[0.0, 0.5, 1.0], output_tokens=11)
    assert record.tpot == pytest.approx(0.1) and record.gaps == [0.5, 0.5]


def test_arrivals_are_poisson():
    times = arrivals(4000, 10.0, seed=3)
    gaps = [b - a for a, b in zip([0.0, *times], times, strict=False)]
    mean = sum(gaps) / len(gaps)
    variance = sum((gap - mean) ** 2 for gap in gaps) / len(gaps)
    assert mean == pytest.approx(0.1, rel=0.05)
    assert variance == pytest.approx(0.01, rel=0.1), "an exponential's deviation is its mean"
    assert times == arrivals(4000, 10.0, seed=3) and times != arrivals(4000, 10.0, seed=4)
    assert arrivals(3, None, seed=0) == [0.0, 0.0, 0.0]


def test_prompts_share_prefixes_as_asked():
    maker = PromptMaker(50, 30, 2, vocab_size=500, tokens_per_word=1.0, seed=0)
    a, b, c = maker.make(), maker.make(), maker.make()
    assert len(a) == len(b) == 50
    assert a[:30] == c[:30] and a[:30] != b[:30] and a[30:] != c[30:]
    words = PromptMaker(50, 0, 1, vocab_size=None, tokens_per_word=2.0, seed=0).make()
    assert isinstance(words, str) and len(words.split()) == 25
    with pytest.raises(ValueError, match="shared-prefix-len is 50"):
        PromptMaker(50, 50, 1, None, 1.0, 0)
