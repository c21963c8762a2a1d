"""The application: its routes, and what it does with errors."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import platform
from collections.abc import Callable, Coroutine
from importlib import metadata
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from dsengine import __version__
from dsengine.async_engine import AsyncEngine
from dsengine.config import ServerConfig
from dsengine.engine.sampling_params import SamplingParams
from dsengine.server import errors, openapi
from dsengine.server.admin import add_admin_routes
from dsengine.server.anthropic import count_tokens, messages
from dsengine.server.chat import chat_completions
from dsengine.server.completions import completions
from dsengine.server.encoding import InvalidJson, decode_json
from dsengine.server.front_door import KEY_DIGEST, FrontDoor
from dsengine.server.generation import Job
from dsengine.server.openai_responses import responses
from dsengine.server.protocol import ChatCompletionRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from dsengine.server.protocol_anthropic import CountTokensRequest, MessagesRequest
from dsengine.server.protocol_responses import ResponsesRequest
from dsengine.server.request_record import RECORD
from dsengine.server.request_watch import RequestWatch
from dsengine.server.responses import ClientDisconnected, client_left, json_response, until_disconnect
from dsengine.server.service import Service, new_id
from dsengine.server.tracing import Tracer
from dsengine.server.web.page import PAGE_PATHS, add_page_routes

_HEALTH_SECONDS = 30.0


class _StrictRequest(Request):
    async def json(self) -> Any:
        try:
            return decode_json(await self.body())
        except InvalidJson as error:
            raise errors.invalid(str(error), code="invalid_json") from error


class _StrictRoute(APIRoute):
    """A route whose JSON body is read by our own parser."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def strict(request: Request) -> Response:
            return await handler(_StrictRequest(request.scope, request.receive))

        return strict


def create_app(engine: AsyncEngine, config: ServerConfig, tracer: Tracer | None = None) -> App:
    """The application for an engine that has started."""
    return App(Service(engine, config), tracer)


class App:
    """ASGI application.

    Attributes:
        service: the state behind the routes.
        routes: FastAPI's application, inside of key checks and limits.
    """

    def __init__(self, service: Service, tracer: Tracer | None = None) -> None:
        self.service = service
        self.routes = openapi.DocumentedApp(
            title="dsengine",
            version=__version__,
            docs_url=None,
            redoc_url=None,
            redirect_slashes=False,
            responses=openapi.ERRORS,
        )
        self.routes.router.route_class = _StrictRoute
        _add_generation_routes(self.routes, service)
        _add_text_routes(self.routes, service)
        _add_state_routes(self.routes, service)
        if service.config.enable_admin:
            add_admin_routes(self.routes, service)
        has_page = not service.config.disable_web_page
        if has_page:
            add_page_routes(self.routes)
        self.routes.add_exception_handler(HTTPException, errors.handle_http_exception)
        self.routes.add_exception_handler(RequestValidationError, errors.handle_validation_error)
        self.routes.add_exception_handler(ClientDisconnected, client_left)
        self.routes.add_exception_handler(Exception, errors.handle_unexpected)
        self.asgi = FrontDoor(
            self.routes,
            service.lifecycle,
            service.metrics,
            api_keys=service.config.api_key,
            admin_api_key=service.config.admin_api_key,
            max_body_bytes=service.config.max_body_bytes,
            open_paths=PAGE_PATHS if has_page else (),
            watch=RequestWatch(service.config, service.tokenizer, None if tracer is None else tracer.trace),
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.asgi(scope, receive, send)


def _add_generation_routes(app: FastAPI, service: Service) -> None:
    def tenant(request: Request) -> Service:
        return service.for_request(request.scope[KEY_DIGEST], request.scope.get(RECORD))

    @app.post("/v1/chat/completions", response_model=None, responses=openapi.STREAM)
    async def chat(body: ChatCompletionRequest, request: Request) -> Response:
        return await until_disconnect(request, chat_completions(tenant(request), body))

    @app.post("/v1/completions", response_model=None, responses=openapi.STREAM)
    async def complete(body: CompletionRequest, request: Request) -> Response:
        return await until_disconnect(request, completions(tenant(request), body))

    @app.post("/v1/responses", response_model=None, responses=openapi.STREAM)
    async def respond(body: ResponsesRequest, request: Request) -> Response:
        return await until_disconnect(request, responses(tenant(request), body))

    @app.post("/v1/messages", response_model=None, responses=openapi.STREAM | openapi.ANTHROPIC_ERRORS)
    async def anthropic_messages(body: MessagesRequest, request: Request) -> Response:
        return await until_disconnect(request, messages(tenant(request), body))

    @app.post("/v1/messages/count_tokens", response_model=None, responses=openapi.ANTHROPIC_ERRORS)
    async def anthropic_count(body: CountTokensRequest) -> Response:
        return await count_tokens(service, body)

    @app.get("/v1/models", response_model=None)
    async def models() -> Response:
        return json_response({"object": "list", "data": [_model_card(service)]})

    @app.get("/v1/models/{model:path}", response_model=None)
    async def model(model: str) -> Response:
        service.check_model(model)
        return json_response(_model_card(service))


def _add_text_routes(app: FastAPI, service: Service) -> None:
    @app.post("/tokenize", response_model=None)
    async def tokenize(body: TokenizeRequest) -> Response:
        service.check_model(body.model)
        if body.messages is not None:
            text = await service.render_chat(body, body.messages)
            tokens = await service.tokenize(text, "messages", add_special_tokens=False)
        else:
            text = body.prompt or ""
            tokens = await service.tokenize(text, "prompt", add_special_tokens=body.add_special_tokens)
        limit = service.engine.info.context_length
        return json_response({"tokens": tokens, "count": len(tokens), "max_model_len": limit})

    @app.post("/detokenize", response_model=None)
    async def detokenize(body: DetokenizeRequest) -> Response:
        service.check_model(body.model)
        return json_response({"prompt": service.tokenizer.decode(body.tokens, body.skip_special_tokens)})


def _add_state_routes(app: FastAPI, service: Service) -> None:
    @app.get("/health", response_model=None)
    async def health() -> Response:
        if not service.engine.is_alive:
            raise errors.engine_unavailable()
        if service.lifecycle.draining:
            raise errors.shutting_down()
        return json_response({"status": "ok"})

    @app.get("/health_generate", response_model=None)
    async def health_generate(request: Request) -> Response:
        await until_disconnect(request, _generate_one_token(service))
        return json_response({"status": "ok"})

    @app.get("/metrics", response_class=Response, responses=openapi.METRICS)
    async def metrics() -> Response:
        return Response(service.metrics.render(), media_type=service.metrics.content_type)

    @app.get("/server_info", response_model=None)
    async def server_info() -> Response:
        return json_response(await _server_info(service))

    @app.post("/flush_cache", response_model=None)
    async def flush_cache() -> Response:
        return json_response(await service.call_engine("flush_cache"))


def _model_card(service: Service) -> dict[str, Any]:
    return {
        "id": service.model,
        "object": "model",
        "created": service.created,
        "owned_by": "dsengine",
        "max_model_len": service.engine.info.context_length,
    }


async def _generate_one_token(service: Service) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
    start = service.tokenizer.bos_token_id or 0
    deltas = service.run([Job(new_id("health"), [start], params, priority=1000)])
    try:
        async with asyncio.timeout(_HEALTH_SECONDS), contextlib.aclosing(deltas):
            async for _ in deltas:
                pass
    except TimeoutError as error:
        raise errors.engine_unavailable() from error


async def _server_info(service: Service) -> dict[str, Any]:
    keys = {name: "set" if getattr(service.config, name) else None for name in ("api_key", "admin_api_key")}
    server_config = dataclasses.asdict(service.config) | keys
    return {
        "version": __version__,
        "python": platform.python_version(),
        "torch": metadata.version("torch"),
        "model": service.model,
        # The name, in place of where the checkpoint lies on this machine.
        "engine": msgspec.to_builtins(service.engine.info) | {"model": service.model},
        "engine_config": dataclasses.asdict(service.engine.config) | {"model": service.model},
        "server_config": server_config,
        "stats": await service.call_engine("stats"),
    }
