"""Runs inside of a network namespace: `servers [--quick]` or `suite [PYTEST ARGUMENTS]`.

Servers in several settings get friendly requests, under a watch over all sockets; the suite is what pytest runs.

Connections out of the namespace fail at once and leave no socket to be seen, so that an audit hook in every Python
process also notes which hosts it tries to reach.
"""

from __future__ import annotations

import fcntl
import ipaddress
import json
import os
import socket
import struct
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "server"))

import httpx
from server_process import DEMO_MODEL, ServerProcess, running_server

LISTEN = "0A"
LOOK_SECONDS = 0.02
SETTINGS: dict[str, list[str]] = {
    "on all interfaces": ["--host", "0.0.0.0", "--api-key", "k"],
    "two ranks": ["--tp-size", "2", "--api-key", "k"],
}
HOOK = """
import os, sys
def _note(event, args):
    if event == "socket.connect" and isinstance(args[1], tuple):
        host = str(args[1][0])
    elif event == "socket.getaddrinfo":
        host = str(args[0])
    else:
        return
    with open(os.environ["CALLED_HOSTS"], "a") as file:
        file.write(host + "\\n")
sys.addaudithook(_note)
"""


class Watch(threading.Thread):
    """Looks at the sockets of the namespace until it is told to stop."""

    def __init__(self, api_port: int) -> None:
        super().__init__(daemon=True)
        self.api_port = api_port
        self.num_looks = 0
        self.stray_listeners: set[str] = set()
        self.outbound: set[str] = set()
        self.stopped = threading.Event()

    def run(self) -> None:
        while not self.stopped.wait(LOOK_SECONDS):
            self.num_looks += 1
            for name in ("tcp", "tcp6", "udp", "udp6"):
                for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
                    local, remote, state = line.split()[1:4]
                    self._see(name, _address(local), _address(remote), state)

    def _see(self, name: str, local: tuple[Any, int], remote: tuple[Any, int], state: str) -> None:
        listens = state == LISTEN or name.startswith("udp")
        if listens and not local[0].is_loopback and local[1] != self.api_port:
            self.stray_listeners.add(f"{name} {local[0]}:{local[1]}")
        if state != LISTEN and not (remote[0].is_loopback or remote[0].is_unspecified):
            self.outbound.add(f"{name} {remote[0]}:{remote[1]}")


def _address(text: str) -> tuple[ipaddress.IPv4Address | ipaddress.IPv6Address, int]:
    host, port = text.split(":")
    words = [int(host[i : i + 8], 16) for i in range(0, len(host), 8)]
    raw = b"".join(struct.pack("=I", word) for word in words)
    address = ipaddress.ip_address(raw)
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
        address = address.ipv4_mapped
    return address, int(port, 16)


def bring_up_loopback() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        request = struct.pack("16sh14x", b"lo", 0x1 | 0x40)  # IFF_UP | IFF_RUNNING
        fcntl.ioctl(probe, 0x8914, request)  # SIOCSIFFLAGS


def use(server: ServerProcess, problems: list[str]) -> int:
    """Friendly requests of every kind; returns how many."""
    chat: dict[str, Any] = {"model": DEMO_MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 16}
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    image = [{"type": "image_url", "image_url": {"url": "http://192.0.2.1/a.png"}}]
    requests: list[tuple[str, str, Any, int]] = [
        ("GET", "/v1/models", None, 200),
        ("GET", "/metrics", None, 200),
        ("GET", "/server_info", None, 200),
        ("POST", "/v1/chat/completions", chat, 200),
        ("POST", "/v1/chat/completions", chat | {"stream": True, "n": 2}, 200),
        ("POST", "/v1/chat/completions", chat | {"response_format": {"type": "json_object"}}, 200),
        ("POST", "/v1/chat/completions", chat | {"tools": [tool], "tool_choice": "required", "max_tokens": 64}, 200),
        ("POST", "/v1/chat/completions", chat | {"messages": [{"role": "user", "content": image}]}, 400),
        ("POST", "/v1/completions", {"model": DEMO_MODEL, "prompt": "![a](http://192.0.2.1/b)", "max_tokens": 8}, 200),
        ("POST", "/v1/responses", {"model": DEMO_MODEL, "input": "hi", "max_output_tokens": 8}, 200),
        ("POST", "/v1/messages", chat, 200),
        ("POST", "/tokenize", {"prompt": "http://192.0.2.1/"}, 200),
    ]
    with httpx.Client(base_url=server.url, headers={"Authorization": "Bearer k"}, timeout=120) as client:
        for method, path, body, wanted in requests:
            answer = client.request(method, path, json=body)
            if answer.status_code != wanted:
                problems.append(f"{method} {path}: {answer.status_code} {answer.text[:200]}")
    return len(requests)


def main() -> int:
    bring_up_loopback()
    if sys.argv[1] == "suite":
        os.execv(sys.executable, [sys.executable, "-m", "pytest", "-q", *sys.argv[2:]])
    return serve()


def serve() -> int:
    settings = list(SETTINGS.values())[: 1 if "--quick" in sys.argv else None]
    problems: list[str] = []
    report: dict[str, Any] = {"num_answers": 0, "num_servers": len(settings), "num_looks": 0}
    found: dict[str, set[str]] = {"stray_listeners": set(), "outbound": set()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "sitecustomize.py").write_text(HOOK)
        called = folder / "called"
        called.touch()
        os.environ |= {
            "PYTHONPATH": f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
            "CALLED_HOSTS": str(called),
        }
        for flags in settings:
            with running_server(folder, *flags) as server:
                watch = Watch(server.port)
                watch.start()
                report["num_answers"] += use(server, problems)
                time.sleep(0.2)
                watch.stopped.set()
                watch.join()
            report["num_looks"] += watch.num_looks
            found["stray_listeners"] |= watch.stray_listeners
            found["outbound"] |= watch.outbound
        report["looked_up"] = sorted(host for host in set(called.read_text().split()) if not _is_near(host))
    print(json.dumps(report | {"problems": problems} | {name: sorted(values) for name, values in found.items()}))
    return 0


def _is_near(host: str) -> bool:
    """Whether a host is this one, or no host at all but what a listener binds to."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host in ("localhost", "None")
    return address.is_loopback or address.is_unspecified


if __name__ == "__main__":
    sys.exit(main())
