"""The page at ``/``: a client of the server in its own process."""

import io
from collections.abc import AsyncIterator
from typing import Any

import gradio
from fastapi import FastAPI
from PIL import Image
from pydantic import ValidationError

from xfuser.config.config import DEGREES, in_words
from xfuser.serve.jobs import Failure, Job
from xfuser.serve.requests import ImageRequest
from xfuser.serve.server import Server

EXAMPLES = ("a red circle above a blue square", "a green square", "a yellow circle above a red square")
SIZES = ("auto", "128x128", "256x256", "512x512", "1024x1024")
FONTS = ["system-ui", "sans-serif"]  # none that a browser would fetch


def mount(app: FastAPI, server: Server) -> FastAPI:
    """Add the page, behind all other routes."""
    return gradio.mount_gradio_app(app, page(server), path="/", theme=gradio.themes.Default(font=FONTS))


def page(server: Server) -> gradio.Blocks:
    """What the page shows, and what its buttons do."""
    running: dict[str, Job] = {}  # of each browser session

    async def draw(
        prompt: str, negative: str, size: str, steps: float, seed: str, history: list, call: gradio.Request
    ) -> AsyncIterator[tuple[Any, ...]]:
        try:
            values = {"prompt": prompt, "negative_prompt": negative, "size": size, "num_inference_steps": int(steps)}
            request = ImageRequest(**values, seed=seed or None, partial_images=4)
            (job,) = await server.submit(request)
        except (Failure, ValidationError) as error:
            raise gradio.Error(str(error)) from error
        running[call.session_hash] = job
        try:
            async for _ in job.progress():
                yield bar(job), picture(job.preview), history
            history = [(picture(job.result()), f"{prompt} (seed {job.seed})"), *history]
            yield f"done, seed {job.seed}", history[0][0], history[:20]
        except Failure as failure:
            yield f"{failure}", None, history
        finally:
            server.engine.cancel([job])

    async def cancel(call: gradio.Request) -> None:
        if call.session_hash in running:
            server.engine.cancel([running.pop(call.session_hash)])

    with gradio.Blocks(title="xdit serve", analytics_enabled=False) as blocks:
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
        past = gradio.Gallery(
            label="History", format="png", columns=5, height=240, object_fit="contain", elem_id="history"
        )
        history = gradio.State([])
        inputs = [prompt, negative, size, steps, seed, history]
        options = {"concurrency_limit": None, "show_progress": "hidden"}
        gradio.on([start.click, prompt.submit], draw, inputs, [status, shown, history], **options)
        history.change(lambda items: items, history, past)
        stop.click(cancel, concurrency_limit=None)
    return blocks


def methods(server: Server) -> str:
    """The methods by which the ranks draw, in words."""
    config = server.config.parallel_config
    degrees = {name: getattr(config, names.field) for name, names in DEGREES.items()}
    elastic = ", or fewer where that ends sooner" * server.options.elastic
    return f"{config.world_size} rank{'s' * (config.world_size > 1)}: {in_words(degrees)}{elastic}"


def bar(job: Job) -> str:
    """How far a job is, as HTML."""
    steps = job.settings["num_inference_steps"]
    told = f"step {job.step} of {steps}" if job.step else "waiting"
    return f'<progress max="{steps}" value="{job.step}" style="width: 100%"></progress> {told}'


def picture(data: bytes | None) -> Image.Image | None:
    """An encoded picture."""
    return Image.open(io.BytesIO(data)) if data else None
