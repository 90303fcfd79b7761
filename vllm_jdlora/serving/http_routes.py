"""The routes that an API server gets beside vLLM's: the list of models, and the reload of the collection.

vLLM's flag ``--middleware`` brings :class:`AdapterRoutes` into its FastAPI application. It answers nothing itself: when
the server starts it puts routes before vLLM's, so all that guards those (``--api-key``) guards these as well.
"""

from __future__ import annotations

import logging
from http import HTTPStatus
from typing import Any

import vllm.envs as envs
from fastapi import APIRouter, Depends, FastAPI, Query, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict
from vllm.entrypoints.serve import create_error_response
from vllm.entrypoints.serve.utils.api_utils import validate_json_request

from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.serving import adapter_metrics, starting_collection
from vllm_jdlora.serving.adapter_names import AdapterNames
from vllm_jdlora.serving.collection_swap import CollectionSwap
from vllm_jdlora.serving.model_list import ModelList
from vllm_jdlora.serving.options import ServingOptions
from vllm_jdlora.serving.running_requests import RunningRequests
from vllm_jdlora.serving.runtime_adapters import RuntimeAdapters

logger = logging.getLogger("vllm.jdlora")


class AdapterRoutes:
    """An ASGI middleware that passes everything on, and sets up the application before the first request."""

    def __init__(self, app: Any):
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            try:
                await set_up(scope["app"])
            except Exception as error:
                # Without this uvicorn would serve all the same, with vLLM's own routes.
                logger.exception("The routes of compressed adapters could not be set up")
                await receive()
                await send({"type": "lifespan.startup.failed", "message": str(error)})
                return
        await self._app(scope, receive, send)


class ReloadRequest(BaseModel):
    """Body of ``POST /v1/reload_lora_collection``."""

    model_config = ConfigDict(extra="forbid")

    lora_collection: str | None = None


async def set_up(app: FastAPI) -> None:
    """Put our routes before vLLM's, and our load, unload and resolve in the place of its own."""
    models = app.state.openai_serving_models
    assert isinstance(models.lora_requests, AdapterNames), "the collection was not entered when the server started"
    router = APIRouter()
    models_list = ModelList(models)
    await models_list.whole()  # now, not in the first call
    _add_model_routes(router, models_list)
    if envs.VLLM_ALLOW_RUNTIME_LORA_UPDATING:
        options = ServingOptions.from_additional_config(models.engine_client.vllm_config.additional_config)
        assert options is not None
        running = RunningRequests(models.engine_client, models.lora_requests)
        running.watch()
        runtime = RuntimeAdapters(models, options, running, app.state.args.jd_adapter_dir or "")
        runtime.take_over()
        _add_reload_route(router, CollectionSwap(runtime))
    starting_collection.forget()
    app.router.routes[:0] = router.routes
    app.openapi_schema = None


def _add_model_routes(router: APIRouter, listed: ModelList) -> None:
    @router.get("/v1/models")
    async def list_models(limit: int | None = Query(None, ge=1), after: str | None = None) -> Response:
        if limit is None and after is None:
            length, pieces = await listed.whole()
            headers = {"content-length": str(length)}
            return StreamingResponse(pieces, media_type="application/json", headers=headers)
        part = await listed.part(limit, after)
        return _unknown(after or "") if part is None else Response(part, media_type="application/json")

    @router.get("/v1/models/{model:path}")
    async def show_model(model: str) -> Response:
        card = await listed.one(model)
        return _unknown(model) if card is None else Response(card, media_type="application/json")


def _add_reload_route(router: APIRouter, swap: CollectionSwap) -> None:
    @router.post("/v1/reload_lora_collection", dependencies=[Depends(validate_json_request)])
    async def reload_lora_collection(request: ReloadRequest, raw_request: Request) -> Response:
        """Serve another revision of the collection: that of `lora_collection`, or of the same folder as it is now."""
        try:
            done = await swap.load(request.lora_collection)
        except JDLoRAError as error:
            logger.warning("The collection was not reloaded: %s", error)
            return _error(create_error_response(str(error), err_type="InvalidUserInput"))
        adapter_metrics.set_revision(done.revision)
        return JSONResponse(done.as_json())


def _unknown(model: str) -> Response:
    return _error(
        create_error_response(
            f"The model `{model}` does not exist.", "NotFoundError", HTTPStatus.NOT_FOUND, param="model"
        )
    )


def _error(response: Any) -> Response:
    return JSONResponse(response.model_dump(), status_code=response.error.code)
