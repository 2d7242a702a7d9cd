"""``xdit serve``: check the flags, then run the HTTP process and its ranks."""

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
NUMBERS = {  # server flags that must be more than 0: defaults and help
    "max_batch": (8, "Maximum number of images in one call."),
    "max_queue": (256, "Maximum number of waiting images."),
    "max_side": (2048, "Largest height or width of an image, in pixels."),
    "hang_timeout": (300.0, "Seconds without a step after which the ranks are restarted."),
}


def main(arguments: list[str]) -> NoReturn:
    """Serve until interrupted, or until the ranks fail to start."""
    args, options = parsed(arguments)
    check(args, options)
    with listening(options.host, options.port) as port:
        run(args, options, port)


def parsed(arguments: list[str]) -> tuple[xFuserArgs, argparse.Namespace]:
    """Parse the flags: the pipeline's arguments, and all options."""
    options = parser().parse_args(arguments)
    args = xFuserArgs.from_cli_args(options)
    return replace(args, model=args.model or DEFAULT_MODEL), options


def check(args: xFuserArgs, options: argparse.Namespace) -> None:
    """Raise a ValueError for options that would fail later."""
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
    """Bind a socket to this port; raises a ValueError if it is not free."""
    try:
        return socket.create_server((host, port))
    except (OSError, OverflowError) as error:
        raise ValueError(f"cannot listen on {host}:{port} ({error}): choose another --port") from error


def run(args: xFuserArgs, options: argparse.Namespace, port: socket.socket) -> NoReturn:
    """Run the HTTP process."""
    from xfuser.serve.server import Server

    server = Server(args, options)
    host, number = port.getsockname()[:2]
    print(f"xdit serve: http://{host}:{number} (model {server.model}; /health reports when it is ready)", flush=True)
    with suppress(KeyboardInterrupt):
        asyncio.run(_answer(server, port))
    if server.engine.failed:
        print(f"xdit serve: {server.engine.why}", file=sys.stderr, flush=True)
    os._exit(1 if server.engine.failed else 0)  # the interpreter's shutdown takes seconds


async def _answer(server: Any, port: socket.socket) -> None:
    """Run the engine, and answer requests until it ends or this task is cancelled."""
    import uvicorn

    from xfuser.serve.app import create_app

    engine = asyncio.create_task(server.engine.run())
    app = await asyncio.to_thread(create_app, server)  # imports the page's library while the ranks start
    http = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
    engine.add_done_callback(lambda _: setattr(http, "should_exit", True))
    await http.serve([port])


def parser() -> FlexibleArgumentParser:
    """The flags of ``xdit`` and of the server."""
    flags = FlexibleArgumentParser(
        prog="xdit serve",
        description="Serve a pipeline over OpenAI's images and videos API, with a page at /. Input flags set the"
        " defaults of requests.",
        epilog="Example: xdit serve --model black-forest-labs/FLUX.1-dev --ulysses_degree 2 --port 8000",
    )
    flags.add_argument("--host", default="127.0.0.1", help="Address to listen on (default: this machine only).")
    flags.add_argument("--port", type=int, default=8000, help="Port to listen on (default: 8000).")
    flags.add_argument("--output_dir", default="results", help="Folder for images that are requested by URL.")
    flags.add_argument(
        "--elastic", action="store_true", help="Run each call on the number of ranks that finishes it soonest."
    )
    for name, (default, told) in NUMBERS.items():
        flags.add_argument(f"--{name}", type=type(default), default=default, help=f"{told[:-1]} (default: {default}).")
    return xFuserArgs.add_cli_args(flags)
