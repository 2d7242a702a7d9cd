"""``xdit serve``: checks, then the HTTP process and its ranks."""

import argparse
import asyncio
import importlib.util
import os
import socket
import sys
from contextlib import suppress
from dataclasses import replace
from typing import Any, NoReturn

from xfuser.config import FlexibleArgumentParser, xFuserArgs
from xfuser.pipeline_io.media import check_writable
from xfuser.serve import elastic

PACKAGES = ("fastapi", "uvicorn", "prometheus_client", "gradio", "multipart")
DEFAULT_MODEL = "shapes-256"
NUMBERS = {  # flags of the server that are to be more than 0: their defaults, and what they are
    "max_batch": (8, "Images drawn together at most."),
    "max_queue": (256, "Images that may wait."),
    "max_side": (2048, "Largest height or width of an image, in pixels."),
    "hang_timeout": (300.0, "Seconds without a step after which the ranks are started anew."),
}


def main(arguments: list[str]) -> NoReturn:
    """Serve until it is interrupted, or the ranks do not start."""
    args, options = parsed(arguments)
    check(args, options)
    with listening(options.host, options.port) as port:
        run(args, options, port)


def parsed(arguments: list[str]) -> tuple[xFuserArgs, argparse.Namespace]:
    """Flags as what the pipeline takes, and all of them."""
    options = parser().parse_args(arguments)
    args = xFuserArgs.from_cli_args(options)
    return replace(args, model=args.model or DEFAULT_MODEL), options


def check(args: xFuserArgs, options: argparse.Namespace) -> None:
    """Raise a ValueError for what would fail later."""
    missing = [name for name in PACKAGES if not importlib.util.find_spec(name)]
    if missing:
        raise ValueError(f"xdit serve requires {', '.join(missing)}: pip install 'xfuser[serve]'")
    for name in NUMBERS:
        if not getattr(options, name) > 0:
            raise ValueError(f"{name}={getattr(options, name)} must be more than 0")
    check_writable(options.output_dir)
    config, _ = args.checked()
    if options.elastic:
        elastic.check(config)


def listening(host: str, port: int) -> socket.socket:
    """A socket that this port is bound to; a ValueError where it is not free."""
    try:
        return socket.create_server((host, port))
    except (OSError, OverflowError) as error:
        raise ValueError(f"cannot listen on {host}:{port} ({error}): choose another --port") from error


def run(args: xFuserArgs, options: argparse.Namespace, port: socket.socket) -> NoReturn:
    """The HTTP process."""
    from xfuser.serve.server import Server

    server = Server(args, options)
    host, number = port.getsockname()[:2]
    print(f"xdit serve: http://{host}:{number} (model {server.model}; /health tells when it is ready)", flush=True)
    with suppress(KeyboardInterrupt):
        asyncio.run(_answer(server, port))
    if server.engine.failed:
        print(f"xdit serve: {server.engine.why}", file=sys.stderr, flush=True)
    os._exit(1 if server.engine.failed else 0)  # the interpreter's shutdown takes seconds


async def _answer(server: Any, port: socket.socket) -> None:
    """Run the engine, and answer requests as long as it runs; to be cancelled."""
    import uvicorn

    from xfuser.serve.app import create_app

    engine = asyncio.create_task(server.engine.run())
    app = await asyncio.to_thread(create_app, server)  # loads the page's library, while the ranks start
    http = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
    engine.add_done_callback(lambda _: setattr(http, "should_exit", True))
    await http.serve([port])


def parser() -> FlexibleArgumentParser:
    """The flags of ``xdit``, and those of the server."""
    flags = FlexibleArgumentParser(
        prog="xdit serve",
        description="Serve a pipeline over OpenAI's images and videos API, with a page at /. Flags of the input are the"
        " defaults of requests.",
        epilog="Example: xdit serve --model black-forest-labs/FLUX.1-dev --ulysses_degree 2 --port 8000",
    )
    flags.add_argument("--host", default="127.0.0.1", help="Address to listen on (default: this machine alone).")
    flags.add_argument("--port", type=int, default=8000, help="Port to listen on (default: 8000).")
    flags.add_argument("--output_dir", default="results", help="Folder for images that are asked for by URL.")
    flags.add_argument(
        "--elastic", action="store_true", help="Draw each call on as many of the ranks as end it soonest."
    )
    for name, (default, told) in NUMBERS.items():
        flags.add_argument(f"--{name}", type=type(default), default=default, help=f"{told[:-1]} (default: {default}).")
    return xFuserArgs.add_cli_args(flags)
