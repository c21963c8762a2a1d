"""The application over a scripted engine, on a real socket of this process: for clients that are programs."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator

from dsengine.server.app import App
from dsengine.server.launch import _Server, _uvicorn_config, listen


@contextlib.contextmanager
def served(app: App) -> Iterator[str]:
    """The URL of an application that is served while the context is open."""
    server = _Server(_uvicorn_config(app))
    listener = listen("127.0.0.1", 0)

    async def serve() -> None:
        try:
            await server.serve(sockets=[listener])
        finally:
            await app.service.close()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()
