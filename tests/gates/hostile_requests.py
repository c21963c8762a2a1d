"""Requests that no friendly client sends, byte by byte, and what may come back."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

KEY, ADMIN_KEY = "sk-of-the-gate", "sk-of-its-admin"
METHODS = ("GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE", "FOO")
OPEN = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
BEARER = f"Authorization: Bearer {KEY}\r\n".encode()
SECRET = b"/server_info"


@dataclass(frozen=True)
class Hostile:
    """One connection's bytes.

    Attributes:
        allowed: statuses of answers; an answer is not owed.
        max_answers: more than that means that a request was smuggled inside of another.
    """

    name: str
    data: bytes
    allowed: frozenset[int]
    max_answers: int = 1


UNAUTHORIZED = frozenset({401})
# What the parser refuses, what the front door refuses, and what routing refuses behind a valid key.
REFUSED = frozenset({400, 401, 404, 405, 408, 411, 413, 414, 415, 431})


def request(method: str, path: str, *headers: bytes, body: bytes = b"") -> bytes:
    lines = [f"{method} {path} HTTP/1.1".encode("latin-1"), *headers]
    if not any(header.lower().startswith(b"host:") for header in headers):
        lines.insert(1, b"Host: test")
    if body:
        lines += [b"Content-Type: application/json", b"Content-Length: %d" % len(body)]
    return b"\r\n".join([*lines, b"Connection: close", b"", body])


def auth_matrix(routes: Iterable[str], admin_routes: Collection[str]) -> Iterator[Hostile]:
    """Every route with every method and some of the ways not to have its key; and what is no route."""
    credentials = {
        "no key": [],
        "a wrong key": [b"Authorization: Bearer nope"],
        "no scheme": [b"Authorization: " + KEY.encode()],
        "Basic": [b"Authorization: Basic " + KEY.encode()],
        "bytes": [b"Authorization: Bearer \xe9\xff"],
        "two headers": [BEARER.strip(), b"Authorization: Bearer nope"],
        "two kinds": [BEARER.strip(), b"X-Api-Key: " + KEY.encode()],
        "a prefix": [b"Authorization: Bearer " + KEY[:-1].encode()],
        "the admin key": [b"Authorization: Bearer " + ADMIN_KEY.encode()],
        "a cookie": [b"Cookie: api_key=" + KEY.encode()],
    }
    names = list(credentials)
    for number, route in enumerate([*routes, "/nowhere", "/docs", "/openapi.yaml", "/v1"]):
        for step, method in enumerate(METHODS):
            # Each route with each method without a key, and each pair with one of the other ways.
            for name in ("no key", names[1 + (number + step) % (len(names) - 1)]):
                if name == "the admin key" and route in admin_routes:
                    continue
                data = request(method, route, *credentials[name])
                yield Hostile(f"{method} {route} with {name}", data, UNAUTHORIZED)
    for route in admin_routes:
        for method in METHODS:
            data = request(method, route, BEARER.strip())
            yield Hostile(f"{method} {route} with the key of clients", data, UNAUTHORIZED)


def host_tricks() -> Iterator[Hostile]:
    """A Host, a path or a forwarding header that might make a protected route look like an open one."""
    hosts = [
        b"localhost/health?x=", b"localhost/health#", b"x/health/..", b"/health", b"health", b"", b"a b", b"x:99999",
        b"x@/health", b"[::1]/health", b"x\\health", b"\xff", b"x" * 9000, b"127.0.0.1:80/health%00",
    ]  # fmt: skip
    for host in hosts:
        yield Hostile(f"Host {host[:40]!r}", request("GET", SECRET.decode(), b"Host: " + host), REFUSED)
    yield Hostile("no Host", b"GET %s HTTP/1.1\r\nConnection: close\r\n\r\n" % SECRET, REFUSED)
    two = request("GET", SECRET.decode(), b"Host: a", b"Host: b/health?")
    yield Hostile("two Hosts", two, REFUSED)
    paths = [
        "//server_info", "/server_info/", "/health/../server_info", "/health%2f..%2fserver_info",
        "/health;/server_info", "/health%00/server_info", "/./server_info",
        "/server_info?/health", "/server_info#/health", "/SERVER_INFO",
        "/%73erver_info", "http://x/server_info", "http://x/health/../server_info", "http://server_info/health?",
        "/health%3f/../server_info", "/web/../server_info", "/health\\..\\server_info", "server_info", "*",
        "/%2e%2e/server_info", "/server_info%20", "/v1/models/..%2f..%2fserver_info", "/\xe9", "/health%0d%0aX:%20y/a",
    ]  # fmt: skip
    for path in paths:
        yield Hostile(f"path {path!r}", request("GET", path), REFUSED)
    for name in ("X-Original-URL", "X-Rewrite-URL", "X-Forwarded-Path", "X-HTTP-Method-Override", "X-Forwarded-Prefix"):
        yield Hostile(name, request("GET", SECRET.decode(), f"{name}: /health".encode()), UNAUTHORIZED)
    for name in ("X-Forwarded-For", "X-Real-IP", "Forwarded", "X-Forwarded-Host", "X-Forwarded-User"):
        yield Hostile(name, request("GET", SECRET.decode(), f"{name}: 127.0.0.1".encode()), UNAUTHORIZED)


def smuggling() -> Iterator[Hostile]:
    """Bodies whose length two readers could see differently; inside lies a request that must never be answered."""
    inner = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
    head = b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n" + BEARER
    length = b"Content-Length: %d\r\n" % len(b"0\r\n\r\n" + inner)
    chunked = b"Transfer-Encoding: chunked\r\n"
    fields = {
        "CL and TE": length + chunked,
        "TE and CL": chunked + length,
        "two lengths": length + b"Content-Length: 0\r\n",
        "a list of lengths": b"Content-Length: 0, 5\r\n",
        "a signed length": b"Content-Length: +5\r\n",
        "a negative length": b"Content-Length: -1\r\n",
        "a hexadecimal length": b"Content-Length: 0x5\r\n",
        "a fraction": b"Content-Length: 5.0\r\n",
        "an enormous length": b"Content-Length: 99999999999999999999\r\n",
        "a length of blanks": b"Content-Length:  \r\n",
        "an underscore": b"Content-Length: 1_0\r\n",
        "digits of another script": "Content-Length: ５\r\n".encode(),
        "TE twice": chunked + chunked,
        "TE identity": b"Transfer-Encoding: identity\r\n" + length,
        "TE gzip, chunked": b"Transfer-Encoding: gzip, chunked\r\n",
        "TE chunked, identity": b"Transfer-Encoding: chunked, identity\r\n",
        "TE with a tab": b"Transfer-Encoding:\tchunked\r\n" + length,
        "TE with a vertical tab": b"Transfer-Encoding: \x0bchunked\r\n" + length,
        "TE with a space before the colon": b"Transfer-Encoding : chunked\r\n" + length,
        "TE folded": b"Transfer-Encoding:\r\n chunked\r\n" + length,
        "TE xchunked": b"Transfer-Encoding: xchunked\r\n" + length,
        "TE behind a bare LF": b"X: y\nTransfer-Encoding: chunked\r\n" + length,
        "TE behind a bare CR": b"X: y\rTransfer-Encoding: chunked\r\n" + length,
        "NUL in a field": b"X: a\x00b\r\n" + length,
        "no colon": b"Transfer-Encoding chunked\r\n" + length,
        "an empty name": b": chunked\r\n" + length,
        "a space in a name": b"Transfer Encoding: chunked\r\n" + length,
    }
    for name, lines in fields.items():
        yield Hostile(name, head + lines + b"\r\n0\r\n\r\n" + inner, REFUSED)


def chunk_lies() -> Iterator[Hostile]:
    head = (
        b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
        b"Transfer-Encoding: chunked\r\n" + BEARER + b"\r\n"
    )
    bodies = [
        b"5\r\nab\r\n0\r\n\r\n", b"-1\r\n\r\n0\r\n\r\n", b"0x2\r\n{}\r\n0\r\n\r\n", b"+2\r\n{}\r\n0\r\n\r\n",
        b"2 \r\n{}\r\n0\r\n\r\n", b"2\n{}\n0\n\n", b"FFFFFFFFFFFFFFFF\r\n{}", b"1" * 300 + b"\r\n", b"zz\r\n",
        b"\r\n\r\n", b"2;" + b"a" * 70_000 + b"\r\n{}\r\n0\r\n\r\n", b"2\r\n{}X\r\n0\r\n\r\n",
        b"2\r\n{}\r\n0\r\nX: " + b"y" * 70_000,
        b"2\r\n{}\r\n" + b"1\r\n \r\n" * 5000 + b"0\r\n\r\n", b"\xff\r\n{}", b"2\r\n{}\r\n0\r\nHost: a\r\nX\r\n\r\n",
    ]  # fmt: skip
    for body in bodies:
        yield Hostile(f"chunks {body[:20]!r}", head + body, REFUSED)


def header_floods() -> Iterator[Hostile]:
    for count in (101, 1_000, 100_000):
        lines = [f"X-{i}: y".encode() for i in range(count)]
        yield Hostile(f"{count:,} header fields", request("GET", SECRET.decode(), BEARER.strip(), *lines), REFUSED)
    for size in (66_000, 1_000_000, 8_000_000):
        value, path = b"X: " + b"y" * size, "/" + "a" * size
        yield Hostile(f"a header of {size:,} bytes", request("GET", SECRET.decode(), BEARER.strip(), value), REFUSED)
        yield Hostile(f"a path of {size:,} bytes", request("GET", path, BEARER.strip()), REFUSED)
        yield Hostile(f"a header name of {size:,} bytes", request("GET", "/", b"y" * size + b": 1"), REFUSED)
    key = b"Authorization: Bearer " + b"k" * 60_000
    yield Hostile("a key of 60,000 bytes", request("GET", SECRET.decode(), key), UNAUTHORIZED)


def no_http(rng: random.Random, count: int) -> Iterator[Hostile]:
    """Request lines that are none, other protocols, and noise."""
    lines = [
        b"GET\r\n\r\n", b"GET /server_info\r\n\r\n", b"GET /server_info HTTP/9.9\r\nHost: x\r\n\r\n", b"\r\n" * 1000,
        b"PRI * HTTP/2.0\r\n\r\nSM", b"CONNECT x:443 HTTP/1.1\r\nHost: x:443\r\n\r\n", b"\x16\x03\x01\x02",
        b"GET  /server_info  HTTP/1.1\r\nHost: x\r\n\r\n", b"GET\t/server_info\tHTTP/1.1\r\nHost: x\r\n\r\n",
        b" GET /server_info HTTP/1.1\r\nHost: x\r\n\r\n", b"get /server_info HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /server_info HTTP/1.0\r\n\r\n", b"GET /server_info HTTP/1.1\nHost: x\n\n", b"\x00" * 5000,
        b"GET /server_info HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
        b"GET /server_info HTTP/1.1\r\nHost: x\r\nUpgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\n\r\n",
        b"GET /server_info HTTP/1.1\r\nHost: x\r\nExpect: 200-ok\r\n\r\n", b"SSH-2.0-x\r\n", b"*1\r\n$4\r\nPING\r\n",
    ]  # fmt: skip
    for line in lines:
        yield Hostile(f"line {line[:40]!r}", line, REFUSED)
    sample = request("POST", "/tokenize", b"Authorization: Bearer nope", body=b'{"prompt": "a"}')
    for number in range(count):
        data = bytearray(sample)
        for _ in range(rng.randrange(1, 6)):
            at = rng.randrange(len(data))
            data[at : at + rng.randrange(3)] = rng.randbytes(rng.randrange(4))
        yield Hostile(f"noise {number}", bytes(data), REFUSED)
