"""Routes for whoever runs the server: they act on other people's requests and are there only if asked for.

Sleeping, waking and taking other weights need an engine without requests: new ones are refused for the time being, and
running ones get `drain_timeout` seconds to finish, or are ended if that is asked for. No path that a client sends is
followed out of the folders that the server was started with.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Self

from fastapi import FastAPI
from pydantic import Field, model_validator
from starlette.responses import Response

from dsengine.engine.messages import CallName
from dsengine.server.errors import invalid
from dsengine.server.protocol_base import Strict, contradiction
from dsengine.server.responses import json_response
from dsengine.server.service import Service


class AbortRequest(Strict):
    """One request by the id of its response, or all."""

    request_id: str | None = Field(default=None, min_length=1, max_length=256)
    abort_all: bool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.request_id is None) != self.abort_all:
            raise contradiction("give either request_id or abort_all: true")
        return self


class SleepRequest(Strict):
    """Level 1 gives the cache's memory back, and on a GPU that of the weights; level 2 the weights' everywhere."""

    level: Annotated[int, Field(ge=1, le=2)] = 1
    abort_all_requests: bool = False


class UpdateWeightsRequest(Strict):
    """A checkpoint folder under one of `--weight-update-root`, named in full or from there on."""

    model_path: Annotated[str, Field(min_length=1, max_length=4096)]
    abort_all_requests: bool = False


def add_admin_routes(app: FastAPI, service: Service) -> None:
    """The routes that the front door opens to the admin key alone."""

    @app.post("/abort_request", response_model=None)
    async def abort_request(body: AbortRequest) -> Response:
        return json_response({"aborted": service.engine.abort_response(body.request_id)})

    @app.post("/pause", response_model=None)
    async def pause() -> Response:
        return json_response(await service.call_engine("pause"))

    @app.post("/continue", response_model=None)
    async def resume() -> Response:
        return json_response(await service.call_engine("continue"))

    @app.get("/is_sleeping", response_model=None)
    async def is_sleeping() -> Response:
        level = service.engine.stats.sleep_level
        return json_response({"is_sleeping": level > 0, "level": level})

    @app.post("/sleep", response_model=None)
    async def sleep(body: SleepRequest | None = None) -> Response:
        body = body or SleepRequest()
        await _maintain(service, "sleep", str(body.level), abort=body.abort_all_requests)
        return json_response({"is_sleeping": True, "level": body.level})

    @app.post("/wake_up", response_model=None)
    async def wake_up() -> Response:
        await _maintain(service, "wake_up", abort=False)
        return json_response({"is_sleeping": False, "level": 0})

    @app.post("/update_weights_from_disk", response_model=None)
    async def update_weights(body: UpdateWeightsRequest) -> Response:
        folder = await asyncio.to_thread(_checkpoint_under, service.config.weight_update_root, body.model_path)
        if not await asyncio.to_thread(_same_tokenizer, folder, service.engine.checkpoint):
            raise invalid("the tokenizer of these weights is another one", "model_path")
        await _maintain(service, "update_weights", str(folder), abort=body.abort_all_requests)
        return json_response({"success": True, "model_path": body.model_path})


async def _maintain(service: Service, name: CallName, argument: str = "", *, abort: bool) -> None:
    """Have the engine do something that it can only do at rest.

    Raises:
        ApiError: it is not at rest in time, refuses, or is gone.
    """
    async with service.lifecycle.at_rest(abort=abort, seconds=service.config.drain_timeout):
        answer = await service.call_engine(name, argument, seconds=None)
    if "error" in answer:
        raise invalid(str(answer["error"]), code="maintenance_refused")


def _checkpoint_under(roots: Sequence[str], name: str) -> Path:
    """The folder that is meant, which lies under one of the roots.

    Raises:
        ApiError: there is no such folder there. Whether there is one elsewhere is not told.
    """
    for root in roots:
        with contextlib.suppress(OSError, ValueError, RuntimeError):
            base = Path(root).resolve(strict=True)
            folder = (base / name).resolve(strict=True)
            if folder.is_relative_to(base) and folder.is_dir():
                return folder
    raise invalid("model_path is no checkpoint folder under --weight-update-root", "model_path")


def _same_tokenizer(folder: Path, loaded: Path) -> bool:
    files = [path / "tokenizer.json" for path in (folder, loaded)]
    return all(file.is_file() for file in files) and files[0].read_bytes() == files[1].read_bytes()
