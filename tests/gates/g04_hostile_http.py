"""G4: hostile HTTP on a real socket: no key is bypassed, no request smuggled, nothing grows."""

from __future__ import annotations

import contextlib
import random
import re
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
from asgi_calls import LEAKS
from gate_frame import Findings, Outcome, Scale, saved_cases
from hostile_requests import (
    ADMIN_KEY,
    BEARER,
    KEY,
    REFUSED,
    Hostile,
    auth_matrix,
    chunk_lies,
    header_floods,
    host_tricks,
    no_http,
    smuggling,
)
from server_process import DEMO_MODEL, ServerProcess, running_server

from dsengine.server.front_door import ADMIN_PATHS

TITLE = "hostile HTTP on a real socket"
TARGET = "600 cases: 0 bypass, 0 x 5xx, RSS growth < 20 MiB, slow clients are cut"
MAX_GROWTH_MIB = 20
STATUS = re.compile(rb"HTTP/1\.[01] (\d{3}) ")
OPEN_PATHS = {"/health", "/"}
QUIET_SECONDS = 0.25
HEADER_SECONDS, BODY_SECONDS, GRACE_SECONDS = 10, 30, 5
NUM_SLOW = 40


def run(scale: Scale, seed: int) -> Outcome:
    rng, found = random.Random(seed), Findings("G4")
    flags = ("--api-key", KEY, "--admin-api-key", ADMIN_KEY, "--enable-admin")
    with tempfile.TemporaryDirectory() as folder, running_server(Path(folder), *flags) as server:
        cases = list(_cases(server, rng, scale))
        if scale.quick:
            cases = rng.sample(cases, 60)
        for case in cases[::10]:
            _answers(server.port, case.data)
        before = _rss_mib(server)
        slow = [] if scale.quick else list(_slow_clients(server.port))
        for case in cases:
            _check(found, server.port, case)
        cut = _wait_until_cut(found, server, slow)
        growth = _rss_mib(server) - before
        if growth >= MAX_GROWTH_MIB:
            found.fail(f"the server grew by {growth:.0f} MiB")
        _check_serves(found, server)
    return found.outcome(
        f"{found.num_cases} cases: {len(found.failures)} complaints, RSS growth {growth:.1f} MiB, "
        f"{cut} of {len(slow)} slow clients cut"
    )


def _cases(server: ServerProcess, rng: random.Random, scale: Scale) -> Iterator[Hostile]:
    document = httpx.get(server.url + "/openapi.json", headers={"Authorization": f"Bearer {KEY}"}).json()
    routes = [path.replace("{model}", "x") for path in document["paths"]]
    for path, case in saved_cases("G4"):
        yield Hostile(path.name, case, REFUSED)
    yield from auth_matrix((path for path in routes if path not in OPEN_PATHS), ADMIN_PATHS)
    yield from host_tricks()
    yield from smuggling()
    yield from chunk_lies()
    yield from header_floods()
    yield from no_http(rng, scale.of(120, 20))


def _check(found: Findings, port: int, case: Hostile) -> None:
    found.num_cases += 1
    answer = _answers(port, case.data)
    statuses = [int(status) for status in STATUS.findall(answer)]
    wrong = [status for status in statuses if status not in case.allowed]
    if wrong or len(statuses) > case.max_answers:
        found.fail(f"{case.name}: answered with {statuses}", case.data[:100_000], "http")
    elif leak := LEAKS.search(answer.decode("latin-1")):
        found.fail(f"{case.name}: the answer shows {leak[0]!r}", case.data[:100_000], "http")


def _answers(port: int, data: bytes) -> bytes:
    """All that comes back until the server closes the connection or says nothing for a while."""
    answer = b""
    with socket.create_connection(("127.0.0.1", port), 10) as client, contextlib.suppress(OSError):
        client.settimeout(10)
        with contextlib.suppress(OSError):  # it may refuse before all has been sent
            client.sendall(data)
        client.settimeout(QUIET_SECONDS)
        while chunk := client.recv(65536):
            answer += chunk
    return answer


def _slow_clients(port: int) -> Iterator[tuple[socket.socket, float]]:
    """Clients that begin and never finish, and how many seconds they may stay."""
    body = b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n" + BEARER
    beginnings = [(b"GET /", HEADER_SECONDS), (b"GET / HTTP/1.1\r\nX: ", HEADER_SECONDS), (b"", HEADER_SECONDS),
                  (body + b"\r\n{", BODY_SECONDS)]  # fmt: skip
    for number in range(NUM_SLOW):
        beginning, seconds = beginnings[number % len(beginnings)]
        client = socket.create_connection(("127.0.0.1", port), 10)
        client.sendall(beginning)
        client.setblocking(False)
        yield client, time.monotonic() + seconds + GRACE_SECONDS


def _wait_until_cut(found: Findings, server: ServerProcess, slow: list[tuple[socket.socket, float]]) -> int:
    """Each sends a byte now and then, as slowloris does; returns how many the server cut in time."""
    left, cut = dict(slow), 0
    while left:
        if httpx.get(server.url + "/health").status_code != 200:
            found.fail("no health while slow clients wait")
        for client, deadline in list(left.items()):
            if _is_cut(client):
                cut += 1
            elif time.monotonic() > deadline:
                found.fail("a slow client was not cut in time")
            else:
                continue
            client.close()
            del left[client]
        time.sleep(0.5)
    found.num_cases += len(slow)
    return cut


def _is_cut(client: socket.socket) -> bool:
    try:
        client.send(b"a")
        while client.recv(65536):
            pass
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def _check_serves(found: Findings, server: ServerProcess) -> None:
    with httpx.Client(base_url=server.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=60) as client:
        answer = client.post("/v1/completions", json={"model": DEMO_MODEL, "prompt": "1, 2,", "max_tokens": 4})
        stats = client.get("/server_info").json()["stats"]
    if answer.status_code != 200 or stats["num_running"] or stats["num_blocks_in_use"]:
        found.fail(f"afterwards, a friendly request gets {answer.status_code} and the engine has {stats}")


def _rss_mib(server: ServerProcess) -> float:
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    match = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert match is not None
    return int(match[1]) / 1024
