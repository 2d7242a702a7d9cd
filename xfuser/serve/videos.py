"""OpenAI's videos API: a video is a job that is asked for, looked after, fetched and removed."""

from collections import OrderedDict
from typing import Any

from fastapi import FastAPI, Request as Call
from fastapi.responses import Response

from xfuser.pipeline_io.media import FRAMES_PER_SECOND
from xfuser.serve.app import fields_of
from xfuser.serve.jobs import Failure, Job
from xfuser.serve.requests import VideoRequest
from xfuser.serve.server import Server

KEPT = 100  # jobs, with their videos


def add_routes(app: FastAPI, server: Server) -> None:
    """Add ``/v1/videos``; the newest jobs are kept until they are removed or the server ends."""
    kept: OrderedDict[str, Job] = OrderedDict()

    def video(name: str) -> Job:
        if name not in kept:
            raise Failure(404, f"there is no video {name!r}", "not_found", "video_id")
        return kept[name]

    @app.post("/v1/videos")
    async def create(call: Call) -> dict[str, Any]:
        fields, image = await fields_of(call, "input_reference")
        (job,) = await server.submit(VideoRequest.model_validate(fields), image)
        kept[job.id] = job
        if len(kept) > KEPT:
            server.cancel([kept.popitem(last=False)[1]])
        return described(job, server.model)

    @app.get("/v1/videos/{name}")
    def state(name: str) -> dict[str, Any]:
        return described(video(name), server.model)

    @app.get("/v1/videos/{name}/content")
    def content(name: str) -> Response:
        job = video(name)
        if not job.future.done():
            raise Failure(409, f"the video {name!r} is not drawn yet: ask for its status", "not_ready")
        if failure := job.future.exception():
            raise failure
        data = job.future.result()
        return Response(data, media_type="image/gif" if data.startswith(b"GIF") else "video/mp4")

    @app.delete("/v1/videos/{name}")
    def delete(name: str) -> dict[str, Any]:
        server.cancel([video(name)])
        del kept[name]
        return {"id": name, "object": "video.deleted", "deleted": True}


def described(job: Job, model: str) -> dict[str, Any]:
    """A job as OpenAI's API describes it."""
    ended = job.future.done()
    failure = job.future.exception() if ended else None
    status = ("failed" if failure else "completed") if ended else "in_progress" if job.step else "queued"
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
