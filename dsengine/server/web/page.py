"""The page at /: a chat and a live panel, in static files that are served as they lie in `static/`.

The files hold no data, so they need no key; what the page shows it asks of the API with the key that its user types in.
The policy sent along lets the page run nothing and reach nothing but this server, whatever a model may write.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

_FOLDER = Path(__file__).parent / "static"
_MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_FILES = {"/": _FOLDER / "index.html"} | {
    f"/web/{path.name}": path for path in sorted(_FOLDER.iterdir()) if path.suffix in (".css", ".js", ".svg")
}
# Every path of the page, so that whoever checks keys need not reason about prefixes.
PAGE_PATHS = frozenset(_FILES)

_HEADERS = {
    "Content-Security-Policy": "; ".join(
        (
            "default-src 'none'",
            "script-src 'self'",
            "style-src 'self'",
            "connect-src 'self'",
            "img-src 'self' data:",
            "base-uri 'none'",
            "frame-ancestors 'none'",
            "form-action 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        )
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


def add_page_routes(app: FastAPI) -> None:
    """Serve the page and its files, each under a path of its own."""
    for path, file in _FILES.items():
        app.add_route(path, _endpoint(file), methods=["GET"], include_in_schema=False)


def _endpoint(file: Path) -> Callable[[Request], Awaitable[Response]]:
    content, media_type = file.read_bytes(), _MEDIA_TYPES[file.suffix]

    async def send_file(_: Request) -> Response:
        return Response(content, headers=_HEADERS, media_type=media_type)

    return send_file
