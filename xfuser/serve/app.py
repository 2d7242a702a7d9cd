"""The HTTP API, as OpenAI's clients know it."""

import asyncio
import base64
import json
import os
import re
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import prometheus_client
from fastapi import FastAPI, Request as Call
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from pydantic import ValidationError
from starlette.datastructures import UploadFile

from xfuser.pipeline_io.media import FRAMES_PER_SECOND
from xfuser.serve.jobs import Failure, Job
from xfuser.serve.requests import ImageRequest, VideoRequest
from xfuser.serve.server import Server

RETRY_AFTER = "2"  # seconds
FILE = re.compile(r"[0-9a-f]{32}\.png")  # names that a server gives
KEPT_VIDEOS = 100
POLL = 0.1  # seconds


def create_app(server: Server, videos: bool = True, ended: Callable[[asyncio.Task], Any] | None = None) -> FastAPI:
    """The application; the engine runs as long as it does.

    Args:
        videos: whether jobs of videos are kept here.
        ended: is called when the engine has ended; without it, the application starts when the engine is ready.
    """
    from xfuser.serve.page import mount

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(server.engine.run())
        if ended:
            task.add_done_callback(ended)
        try:
            while not ended and server.engine.why:
                if task.done():
                    raise RuntimeError(server.engine.why)
                await asyncio.sleep(POLL)
            yield
        finally:
            task.cancel()
            await asyncio.wait([task])

    app = FastAPI(title="xdit serve", lifespan=lifespan)
    app.add_exception_handler(Failure, lambda call, failure: refusal(failure))
    app.add_exception_handler(ValidationError, lambda call, error: refusal(invalid(error.errors())))
    app.add_exception_handler(RequestValidationError, lambda call, error: refusal(invalid(error.errors())))
    _add_state(app, server)
    _add_images(app, server)
    if videos:
        _add_videos(app, server)
    return mount(app, server)


def refusal(failure: Failure) -> JSONResponse:
    """An error in OpenAI's shape."""
    headers = {"Retry-After": RETRY_AFTER} if failure.status in (429, 503) else {}
    return JSONResponse(failure.body(), failure.status, headers)


def invalid(errors: Any) -> Failure:
    """What pydantic found, in one line; the first field is the error's ``param``."""
    named = [(".".join(map(str, one["loc"])).removeprefix("body."), one["msg"]) for one in errors]
    allowed = f"; allowed are {', '.join(ImageRequest.model_fields)}" if errors[0]["type"] == "extra_forbidden" else ""
    told = "; ".join(f"{name}: {message}" for name, message in named) + allowed
    return Failure(400, told, "invalid_value", named[0][0])


def _add_state(app: FastAPI, server: Server) -> None:
    @app.get("/health")
    async def health() -> JSONResponse:
        why = server.engine.why
        told = {"live": not server.engine.failed, "ready": not why, "why": why, "queue": len(server.queue.jobs)}
        return JSONResponse(told, 503 if why else 200)

    @app.get("/metrics")
    async def metrics() -> Response:
        text = prometheus_client.generate_latest(server.metrics.registry)
        return Response(text, media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        one = {"id": server.model, "object": "model", "created": 0, "owned_by": "xfuser"}
        return {"object": "list", "data": [one]}

    @app.get("/files/{name}")
    async def file(name: str) -> FileResponse:
        if not FILE.fullmatch(name) or not os.path.isfile(server.path(name)):
            raise Failure(404, f"there is no file {name!r}: it is removed, or was never made", "not_found")
        return FileResponse(server.path(name))


def _add_images(app: FastAPI, server: Server) -> None:
    running: dict[str, Job] = {}

    async def answer(call: Call, request: ImageRequest, image: bytes | None = None) -> Response:
        if request.stream and request.n > 1:
            raise Failure(400, f"n={request.n} with stream=true is not supported: use n=1", "invalid_value", "n")
        jobs = await server.submit(request, image)
        running.update((job.id, job) for job in jobs)

        def entry(job: Job) -> dict[str, Any]:
            return server.entry(job, request.response_format, str(call.base_url))

        def leave() -> None:
            server.engine.cancel(jobs)
            for job in jobs:
                running.pop(job.id, None)

        if request.stream:
            return StreamingResponse(_events(jobs[0], entry, leave), media_type="text/event-stream")
        leaving = asyncio.ensure_future(_left(call))
        leaving.add_done_callback(lambda _: leave())
        try:
            for job in jobs:
                async for _ in job.progress():
                    pass
            return JSONResponse({"created": jobs[0].created, "data": [entry(job) for job in jobs], "id": jobs[0].id})
        finally:
            leaving.cancel()

    @app.post("/v1/images/generations")
    async def generations(call: Call, request: ImageRequest) -> Response:
        return await answer(call, request)

    @app.post("/v1/images/edits")
    async def edits(call: Call) -> Response:
        fields, image = await _fields_of(call, "image")
        if image is None:
            raise Failure(400, "there is no picture to start from: send a file as image", "missing", "image")
        return await answer(call, ImageRequest.model_validate(fields), image)

    @app.delete("/v1/images/generations/{name}")
    async def cancel(name: str) -> dict[str, Any]:
        if name not in running:
            raise Failure(404, f"there is no running request {name!r}", "not_found")
        server.engine.cancel([running[name]])
        return {"id": name, "object": "image.deleted", "deleted": True}


async def _left(call: Call) -> None:
    """Wait until the client has left."""
    while (await call.receive())["type"] != "http.disconnect":
        pass


async def _events(job: Job, entry: Callable[[Job], dict[str, Any]], leave: Callable[[], None]) -> AsyncIterator[str]:
    """Server-sent events: each step, previews as partial images, and the picture or the error."""
    size = f"{job.settings['width']}x{job.settings['height']}"
    told = {"created_at": job.created, "size": size, "quality": "auto", "background": "opaque", "output_format": "png"}
    told |= {"id": job.id}
    previews = 0
    try:
        async for _ in job.progress():
            steps = {"id": job.id, "step": job.step, "steps": job.settings["num_inference_steps"]}
            yield _event("image_generation.progress", steps)
            if job.previews > previews:
                picture = {"b64_json": base64.b64encode(job.preview or b"").decode(), "partial_image_index": previews}
                yield _event("image_generation.partial_image", told | picture)
                previews = job.previews
        yield _event("image_generation.completed", told | {"b64_json": None} | entry(job))
    except Failure as failure:
        yield _event("error", failure.body())
    finally:
        leave()


def _event(name: str, data: dict[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps({'type': name} | data)}\n\n"


async def _fields_of(call: Call, picture: str) -> tuple[dict[str, Any], bytes | None]:
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


def _add_videos(app: FastAPI, server: Server) -> None:
    """A video is a job that is asked for, looked after, fetched and removed; the newest ones are kept."""
    kept: OrderedDict[str, Job] = OrderedDict()

    def video(name: str) -> Job:
        if name not in kept:
            raise Failure(404, f"there is no video {name!r}", "not_found", "video_id")
        return kept[name]

    @app.post("/v1/videos")
    async def create(call: Call) -> dict[str, Any]:
        fields, image = await _fields_of(call, "input_reference")
        (job,) = await server.submit(VideoRequest.model_validate(fields), image)
        kept[job.id] = job
        if len(kept) > KEPT_VIDEOS:
            server.engine.cancel([kept.popitem(last=False)[1]])
        return _described(job, server.model)

    @app.get("/v1/videos/{name}")
    async def state(name: str) -> dict[str, Any]:
        return _described(video(name), server.model)

    @app.get("/v1/videos/{name}/content")
    async def content(name: str) -> Response:
        if video(name).outcome is None:
            raise Failure(409, f"the video {name!r} is not drawn yet: ask for its status", "not_ready")
        data = video(name).result()
        return Response(data, media_type="image/gif" if data.startswith(b"GIF") else "video/mp4")

    @app.delete("/v1/videos/{name}")
    async def delete(name: str) -> dict[str, Any]:
        server.engine.cancel([video(name)])
        del kept[name]
        return {"id": name, "object": "video.deleted", "deleted": True}


def _described(job: Job, model: str) -> dict[str, Any]:
    """A video as OpenAI's API describes it."""
    failure = job.outcome if isinstance(job.outcome, Failure) else None
    status = "failed" if failure else "completed" if job.outcome else "in_progress" if job.step else "queued"
    steps, frames = job.settings["num_inference_steps"], job.settings["num_frames"] or 0
    return {
        "id": job.id,
        "object": "video",
        "model": model,
        "status": status,
        "progress": 100 if status == "completed" else 100 * job.step // steps,
        "created_at": job.created,
        "size": f"{job.settings['width']}x{job.settings['height']}",
        "seconds": f"{max(frames - 1, 0) / FRAMES_PER_SECOND:g}",
        "prompt": job.prompt,
        "seed": job.seed,
        "error": {"code": failure.code, "message": str(failure)} if failure else None,
    }
