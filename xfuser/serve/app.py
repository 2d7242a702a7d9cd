"""The HTTP API, as OpenAI's clients know it."""

import asyncio
import base64
import json
import os
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request as Call
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from pydantic import ValidationError
from starlette.datastructures import UploadFile

from xfuser.serve.jobs import Failure, Job
from xfuser.serve.requests import ImageRequest
from xfuser.serve.server import Server, error_body

RETRY_AFTER = "2"  # seconds
FILE = re.compile(r"[0-9a-f]{32}\.png")  # names that a server gives


def create_app(server: Server, videos: bool = True) -> FastAPI:
    """The application; the engine runs as long as it does. ``videos``: whether jobs of videos are kept here."""
    from xfuser.serve.page import mount
    from xfuser.serve.videos import add_routes

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        if not server.engine.ident:  # else it is started already
            server.engine.start()
        yield
        await asyncio.to_thread(server.engine.stop)

    app = FastAPI(title="xdit serve", lifespan=lifespan)
    app.add_exception_handler(Failure, lambda call, failure: refusal(failure))
    app.add_exception_handler(ValidationError, lambda call, error: refusal(invalid(error.errors())))
    app.add_exception_handler(RequestValidationError, lambda call, error: refusal(invalid(error.errors())))
    _add_state(app, server)
    _add_images(app, server)
    if videos:
        add_routes(app, server)
    return mount(app, server)


def refusal(failure: Failure) -> JSONResponse:
    """An error in OpenAI's shape."""
    headers = {"Retry-After": RETRY_AFTER} if failure.status in (429, 503) else {}
    return JSONResponse(error_body(failure), failure.status, headers)


def invalid(errors: Any) -> Failure:
    """What pydantic found, in one line; the first field is the error's ``param``."""
    named = [(".".join(map(str, one["loc"])).removeprefix("body."), one["msg"]) for one in errors]
    allowed = f"; allowed are {', '.join(ImageRequest.model_fields)}" if errors[0]["type"] == "extra_forbidden" else ""
    told = "; ".join(f"{name}: {message}" for name, message in named) + allowed
    return Failure(400, told, "invalid_value", named[0][0])


def _add_state(app: FastAPI, server: Server) -> None:
    @app.get("/health")
    def health() -> JSONResponse:
        why = server.why_not_ready()
        told = {"live": not server.engine.dead, "ready": not why, "why": why, "queue": len(server.queue)}
        return JSONResponse(told, 503 if why else 200)

    @app.get("/metrics")
    def metrics() -> Response:
        return Response(server.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        one = {"id": server.model, "object": "model", "created": 0, "owned_by": "xfuser"}
        return {"object": "list", "data": [one]}

    @app.get("/files/{name}")
    def file(name: str) -> FileResponse:
        if not FILE.fullmatch(name) or not os.path.isfile(server.path(name)):
            raise Failure(404, f"there is no file {name!r}: it is removed, or was never made", "not_found")
        return FileResponse(server.path(name))


def _add_images(app: FastAPI, server: Server) -> None:
    open_jobs: dict[str, Job] = {}

    async def answer(call: Call, request: ImageRequest, image: bytes | None = None) -> Response:
        if request.stream and request.n > 1:
            raise Failure(400, f"n={request.n} with stream=true is not supported: use n=1", "invalid_value", "n")
        jobs = await server.submit(request, image)
        open_jobs.update((job.id, job) for job in jobs)
        for job in jobs:
            job.future.add_done_callback(lambda _, name=job.id: open_jobs.pop(name, None))
        base = str(call.base_url)
        if request.stream:
            events = _events(server, jobs[0], request.response_format, base)
            return StreamingResponse(events, media_type="text/event-stream")
        await _finished(server, call, jobs)
        data = [server.entry(job, request.response_format, base) for job in jobs]
        return JSONResponse({"created": jobs[0].created, "data": data, "id": jobs[0].id})

    @app.post("/v1/images/generations")
    async def generations(call: Call, request: ImageRequest) -> Response:
        return await answer(call, request)

    @app.post("/v1/images/edits")
    async def edits(call: Call) -> Response:
        fields, image = await fields_of(call, "image")
        if image is None:
            raise Failure(400, "there is no picture to start from: send a file as image", "missing", "image")
        return await answer(call, ImageRequest.model_validate(fields), image)

    @app.delete("/v1/images/generations/{name}")
    def cancel(name: str) -> dict[str, Any]:
        if name not in open_jobs:
            raise Failure(404, f"there is no running request {name!r}", "not_found")
        server.cancel([open_jobs[name]])
        return {"id": name, "object": "image.deleted", "deleted": True}


async def fields_of(call: Call, picture: str) -> tuple[dict[str, Any], bytes | None]:
    """The fields of a JSON or form body, and the file of this name in it."""
    if "json" in call.headers.get("content-type", ""):
        try:
            return await call.json(), None
        except ValueError as error:
            raise Failure(400, f"the body is not JSON: {error}", "invalid_value") from error
    fields, image = {}, None
    for name, value in (await call.form()).multi_items():
        if not isinstance(value, UploadFile):
            fields[name] = value
        elif image is not None or name.removesuffix("[]") != picture:
            told = f"the file {name!r} is not supported: send one, as {picture}"
            raise Failure(400, told, "invalid_value", name)
        else:
            image = await value.read()
    return fields, image


async def _finished(server: Server, call: Call, jobs: list[Job]) -> None:
    """Wait for the results; a client that leaves ends its jobs.

    Raises:
        Failure: of the first job that has none.
    """
    gone = asyncio.ensure_future(_disconnected(call))
    results = asyncio.gather(*(asyncio.wrap_future(job.future) for job in jobs))
    try:
        await asyncio.wait([gone, results], return_when=asyncio.FIRST_COMPLETED)
        if gone.done() and not results.done():
            server.cancel(jobs)
        await results
    finally:
        gone.cancel()
        server.cancel(jobs)


async def _disconnected(call: Call) -> None:
    while (await call.receive())["type"] != "http.disconnect":
        pass


async def _events(server: Server, job: Job, response_format: str, base: str) -> AsyncIterator[str]:
    """Server-sent events: each step, previews as partial images, and the picture or the error."""
    previews = 0
    try:
        async for _ in server.progress(job):
            steps = {"id": job.id, "step": job.step, "steps": job.settings["num_inference_steps"]}
            yield _event("image_generation.progress", steps)
            if job.previews > previews:
                picture = base64.b64encode(job.preview or b"").decode()
                yield _event(
                    "image_generation.partial_image", _described(job, picture) | {"partial_image_index": previews}
                )
                previews = job.previews
        if failure := job.future.exception():
            yield _event("error", error_body(failure))
            return
        entry = server.entry(job, response_format, base)
        yield _event("image_generation.completed", _described(job, entry.pop("b64_json", None)) | entry)
    finally:
        server.cancel([job])


def _described(job: Job, picture: str | None) -> dict[str, Any]:
    size = f"{job.settings['width']}x{job.settings['height']}"
    told = {"created_at": job.created, "size": size, "quality": "auto", "background": "opaque", "output_format": "png"}
    return told | {"b64_json": picture, "id": job.id}


def _event(name: str, data: dict[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps({'type': name} | data)}\n\n"
