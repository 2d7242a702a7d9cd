"""The page at ``/``: a client of the server, in the server's process."""

import io
from collections.abc import AsyncIterator
from typing import Any

import gradio
from fastapi import FastAPI
from PIL import Image
from pydantic import ValidationError

from xfuser.config.config import DEGREES, in_words
from xfuser.serve.jobs import Failure, Job
from xfuser.serve.server import ImageRequest, Server

EXAMPLES = ("a red circle above a blue square", "a green square", "a yellow circle above a red square")
SIZES = ("auto", "128x128", "256x256", "512x512", "1024x1024")
FONTS = ["system-ui", "sans-serif"]  # without fonts that a browser would download
HISTORY = 20  # images
KEPT = 86400  # seconds to keep files of shown images; an open page sends its history back


def mount(app: FastAPI, server: Server) -> FastAPI:
    """Add the page after all other routes; returns its application, which gets all paths that have no route."""
    gradio.mount_gradio_app(app, page(server), path="/", theme=gradio.themes.Default(font=FONTS))
    return app.routes[-1].app


def page(server: Server) -> gradio.Blocks:
    """Build the page: its layout and the actions of its buttons."""
    running: dict[str, Job] = {}  # by browser session

    async def draw(
        prompt: str, negative: str, size: str, steps: float, seed: str, past: list | None, call: gradio.Request
    ) -> AsyncIterator[tuple[Any, ...]]:
        try:
            values = {"prompt": prompt, "negative_prompt": negative, "size": size, "num_inference_steps": int(steps)}
            (job,) = await server.submit(ImageRequest(**values, seed=seed or None, partial_images=4))
        except (Failure, ValidationError) as error:
            raise gradio.Error(str(error)) from error
        running[call.session_hash] = job
        try:
            async for _ in job.progress():
                yield bar(job), picture(job.preview), gradio.skip()
            done = picture(job.result())
            past = [(done, f"{prompt} (seed {job.seed})"), *(past or [])]
            yield f"done, seed {job.seed}", done, past[:HISTORY]
        except Failure as failure:
            yield f"{failure}", None, gradio.skip()
        finally:
            server.stop([job])
            running.pop(call.session_hash, None)

    async def cancel(call: gradio.Request) -> None:
        if call.session_hash in running:
            server.stop([running[call.session_hash]])

    with gradio.Blocks(title="xdit serve", analytics_enabled=False, delete_cache=(KEPT, KEPT)) as blocks:
        gradio.Markdown(f"## {server.model}\n{methods(server)}")
        with gradio.Row():
            with gradio.Column():
                prompt = gradio.Textbox(EXAMPLES[0], label="Prompt", elem_id="prompt")
                negative = gradio.Textbox("", label="Negative prompt")
                size = gradio.Dropdown(SIZES, value=SIZES[0], label="Size", allow_custom_value=True)
                steps = gradio.Slider(1, 100, server.inputs.num_inference_steps, step=1, label="Steps", elem_id="steps")
                seed = gradio.Textbox("", label="Seed (random if empty)", elem_id="seed")
                with gradio.Row():
                    start = gradio.Button("Draw", variant="primary", elem_id="draw")
                    stop = gradio.Button("Cancel", elem_id="cancel")
                gradio.Examples([[text] for text in EXAMPLES], prompt)
            with gradio.Column():
                status = gradio.HTML("", elem_id="status")
                shown = gradio.Image(label="Picture", format="png", elem_id="picture")
        look = {"format": "png", "columns": 5, "height": 240, "object_fit": "contain", "interactive": False}
        past = gradio.Gallery(label="History", type="pil", elem_id="history", **look)
        inputs, outputs = [prompt, negative, size, steps, seed, past], [status, shown, past]
        options = {"concurrency_limit": None, "show_progress": "hidden"}
        gradio.on([start.click, prompt.submit], draw, inputs, outputs, **options)
        stop.click(cancel, concurrency_limit=None)
    return blocks


def methods(server: Server) -> str:
    """The methods that the ranks use, in words."""
    config = server.config.parallel_config
    degrees = {name: getattr(config, names.field) for name, names in DEGREES.items()}
    elastic = ", or fewer if that is faster" * server.options.elastic
    return f"{config.world_size} rank{'s' * (config.world_size > 1)}: {in_words(degrees)}{elastic}"


def bar(job: Job) -> str:
    """The progress of a job, as HTML."""
    steps = job.settings["num_inference_steps"]
    told = f"step {job.step} of {steps}" if job.step else "waiting"
    return f'<progress max="{steps}" value="{job.step}" style="width: 100%"></progress> {told}'


def picture(data: bytes | None) -> Image.Image | None:
    """Decode an image."""
    return Image.open(io.BytesIO(data)) if data else None
