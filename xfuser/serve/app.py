"""The HTTP API, compatible with OpenAI's clients."""

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Annotated, Any

import prometheus_client
from fastapi import FastAPI, Path, Request as Call
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from xfuser.pipeline_io.media import FRAMES_PER_SECOND
from xfuser.serve.jobs import Failure, Job
from xfuser.serve.server import EditRequest, ImageRequest, Server, VideoRequest

RETRY_AFTER = "2"  # seconds
FileName = Annotated[str, Path(pattern=r"^[0-9a-f]{32}\.png$")]  # as the server names them


def create_app(server: Server, alone: bool = True) -> FastAPI:
    """Create the application; ``alone``: with videos and the page, which keep their state in one process."""
    app = FastAPI(title="xdit serve")
    app.add_exception_handler(Failure, lambda call, failure: refusal(failure))

    def refuse_route(call: Call, error: HTTPException) -> JSONResponse:
        return refusal(Failure(error.status_code, error.detail, "invalid_value"))

    app.add_exception_handler(HTTPException, refuse_route)

    def refuse(call: Call, error: Any) -> JSONResponse:
        failure = invalid(error.errors())
        server.engine.metrics.failures.labels(failure.code).inc()
        return refusal(failure)

    for kind in (ValidationError, RequestValidationError):
        app.add_exception_handler(kind, refuse)
    _add_state(app, server)
    _add_images(app, server)
    if alone:
        from xfuser.serve.page import mount

        _add_videos(app, server)
        mount(app, server).add_exception_handler(404, refuse_route)
    return app


def refusal(failure: Failure) -> JSONResponse:
    """An error in OpenAI's shape."""
    headers = {"Retry-After": RETRY_AFTER} if failure.status in (429, 503) else {}
    return JSONResponse(failure.body(), failure.status, headers)


def invalid(errors: Any) -> Failure:
    """Pydantic's errors in one line; the first field becomes the error's ``param``."""
    named = [(".".join(map(str, one["loc"])).removeprefix("body."), one["msg"]) for one in errors]
    allowed = f"; allowed are {', '.join(ImageRequest.model_fields)}" if errors[0]["type"] == "extra_forbidden" else ""
    told = "; ".join(f"{name}: {message}" for name, message in named) + allowed
    return Failure(400, told, "invalid_value", named[0][0])


def _add_state(app: FastAPI, server: Server) -> None:
    engine = server.engine

    @app.get("/health")
    async def health() -> JSONResponse:
        told = {"live": not engine.failed, "ready": not engine.why, "why": engine.why, "queue": len(engine.waiting)}
        return JSONResponse(told, 503 if engine.why else 200)

    @app.get("/metrics")
    async def metrics() -> Response:
        text = prometheus_client.generate_latest(engine.metrics.registry)
        return Response(text, media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        one = {"id": server.model, "object": "model", "created": 0, "owned_by": "xfuser"}
        return {"object": "list", "data": [one]}

    @app.get("/files/{name}")
    async def file(name: FileName) -> FileResponse:
        if not (server.folder / name).is_file():
            raise Failure(404, f"there is no file {name!r}: it was removed, or never existed", "not_found")
        return FileResponse(server.folder / name)


def _add_images(app: FastAPI, server: Server) -> None:
    @app.post("/v1/images/generations")
    async def generations(call: Call, request: ImageRequest) -> Response:
        return await _answer(server, call, request)

    @app.post("/v1/images/edits")
    async def edits(call: Call) -> Response:
        return await _answer(server, call, EditRequest.model_validate(await _fields_of(call)))

    @app.delete("/v1/images/generations/{name}")
    async def delete(name: str) -> dict[str, Any]:
        server.stop(server.jobs(name))
        return {"id": name, "object": "image.deleted", "deleted": True}


async def _answer(server: Server, call: Call, request: ImageRequest) -> Response:
    """Respond with the images, or with events of their progress; cancel the jobs when the client disconnects."""
    jobs = await server.submit(request)
    entry = partial(server.entry, response_format=request.response_format, base=str(call.base_url))
    if request.stream:
        return StreamingResponse(_events(server, jobs, entry), media_type="text/event-stream")
    leaving = asyncio.ensure_future(_left(call))
    leaving.add_done_callback(lambda _: server.stop(jobs))  # also if it is cancelled
    try:
        data = [entry(await job.ended()) for job in jobs]
        return JSONResponse({"created": int(jobs[0].arrived), "data": data, "id": jobs[0].id})
    finally:
        leaving.cancel()


async def _left(call: Call) -> None:
    """Wait until the client has disconnected."""
    while (await call.receive())["type"] != "http.disconnect":
        pass


async def _events(server: Server, jobs: list[Job], entry: Callable[[Job], dict[str, Any]]) -> AsyncIterator[str]:
    """Server-sent events for each job: steps, previews as partial images, and the image or the error."""
    name = jobs[0].id
    try:
        for job in jobs:
            told = {"created_at": int(job.arrived), "size": _size(job), "quality": "auto", "background": "opaque"}
            told |= {"output_format": "png", "id": name}
            previews = 0
            async for _ in job.progress():
                steps = {"id": name, "step": job.step, "steps": job.settings["num_inference_steps"]}
                yield _event("image_generation.progress", steps)
                if job.previews > previews:
                    data = {"b64_json": base64.b64encode(job.preview).decode(), "partial_image_index": previews}
                    yield _event("image_generation.partial_image", told | data)
                    previews = job.previews
            yield _event("image_generation.completed", told | {"b64_json": None} | entry(job))
    except Failure as failure:
        yield _event("error", failure.body())
    finally:
        server.stop(jobs)


def _event(name: str, data: dict[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps({'type': name} | data)}\n\n"


async def _fields_of(call: Call) -> dict[str, Any]:
    """The fields of a JSON or form body; a field with files is a list of them."""
    if "json" in call.headers.get("content-type", ""):
        try:
            return await call.json()
        except (ValueError, RecursionError) as error:
            raise Failure(400, f"the body is not JSON: {error}", "invalid_value") from error
    form = await call.form()
    fields = {name: form.getlist(name) if isinstance(value, UploadFile) else value for name, value in form.items()}
    return {name.removesuffix("[]"): value for name, value in fields.items()}


def _add_videos(app: FastAPI, server: Server) -> None:
    """A video is a job with requests to create it, poll its status, fetch the result, and remove it."""

    @app.post("/v1/videos")
    async def create(call: Call) -> dict[str, Any]:
        (job,) = await server.submit(VideoRequest.model_validate(await _fields_of(call)))
        return _described(job, server.model)

    @app.get("/v1/videos/{name}")
    async def state(name: str) -> dict[str, Any]:
        return _described(server.jobs(name)[0], server.model)

    @app.get("/v1/videos/{name}/content")
    async def content(name: str) -> Response:
        job = server.jobs(name)[0]
        if job.outcome is None:
            raise Failure(409, f"the video {name!r} is not ready yet: poll its status", "not_ready")
        data = job.result()
        return Response(data, media_type="image/gif" if data.startswith(b"GIF") else "video/mp4")

    @app.delete("/v1/videos/{name}")
    async def delete(name: str) -> dict[str, Any]:
        server.stop(server.jobs(name))
        return {"id": name, "object": "video.deleted", "deleted": True}


def _described(job: Job, model: str) -> dict[str, Any]:
    """Describe a video as OpenAI's API does."""
    failure, frames = job.failure, job.settings["num_frames"] or 0
    status = "failed" if failure else "completed" if job.outcome else "in_progress" if job.step else "queued"
    progress = 100 if status == "completed" else 100 * job.step // job.settings["num_inference_steps"]
    seconds, error = f"{max(frames - 1, 0) / FRAMES_PER_SECOND:g}", failure and failure.body()["error"]
    told = {"id": job.id, "object": "video", "model": model, "created_at": int(job.arrived), "error": error}
    told |= {"status": status, "progress": progress, "seconds": seconds, "size": _size(job)}
    return told | {"prompt": job.prompt, "seed": job.seed}


def _size(job: Job) -> str:
    return f"{job.settings['width']}x{job.settings['height']}"
