"""``xdit serve``: checks, then the HTTP process and its ranks."""

import argparse
import importlib.util
import os
import socket
import sys
from contextlib import suppress
from dataclasses import fields, replace
from typing import NoReturn

from xfuser.config import FlexibleArgumentParser, xFuserArgs
from xfuser.pipeline_io.media import check_writable
from xfuser.serve.options import Options

PACKAGES = ("fastapi", "uvicorn", "prometheus_client", "gradio", "multipart", "psutil")
DEFAULT_MODEL = "shapes-256"


def main(arguments: list[str]) -> int:
    """Serve until it is interrupted; on a rank, draw until the engine ends. Returns the exit code."""
    args, own, options = parsed(arguments)
    if options.engine:
        from xfuser.serve.worker import serve

        serve(args, options.engine)
        return 0
    check(args, own)
    with listening(options.host, options.port) as port:
        run(args, arguments, own, port)


def parsed(arguments: list[str]) -> tuple[xFuserArgs, Options, argparse.Namespace]:
    """Flags as what the pipeline takes, what the server takes, and all of them."""
    options = parser().parse_args(arguments)
    args = xFuserArgs.from_cli_args(options)
    own = Options(**{spec.name: getattr(options, spec.name) for spec in fields(Options)})
    return replace(args, model=args.model or DEFAULT_MODEL), own, options


def check(args: xFuserArgs, own: Options) -> None:
    """Raise a ValueError for what would fail later."""
    missing = [name for name in PACKAGES if not importlib.util.find_spec(name)]
    if missing:
        raise ValueError(f"xdit serve requires {', '.join(missing)}: pip install 'xfuser[serve]'")
    own.check()
    check_writable(own.output_dir)
    args.checked()


def listening(host: str, port: int) -> socket.socket:
    """A socket that this port is bound to; a ValueError where it is not free."""
    try:
        return socket.create_server((host, port))
    except (OSError, OverflowError) as error:
        raise ValueError(f"cannot listen on {host}:{port} ({error}): choose another --port") from error


def run(args: xFuserArgs, arguments: list[str], own: Options, port: socket.socket) -> NoReturn:
    """The HTTP process, until it is interrupted or the ranks do not start."""
    import uvicorn

    from xfuser.serve.app import create_app
    from xfuser.serve.server import Server

    server = Server(args, arguments, own)
    http = uvicorn.Server(uvicorn.Config(create_app(server), log_level="warning", timeout_graceful_shutdown=1))
    server.engine.when_dead = lambda: setattr(http, "should_exit", True)
    host, number = port.getsockname()[:2]
    print(f"xdit serve: http://{host}:{number} (model {server.model}; /health tells when it is ready)", flush=True)
    with suppress(KeyboardInterrupt):  # which uvicorn raises once more when it has ended
        http.run(sockets=[port])
    sys.stdout.flush()
    os._exit(1 if server.engine.dead else 0)  # interpreter shutdown takes 10 s behind torchrun's launcher


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
    flags.add_argument("--engine", help=argparse.SUPPRESS)
    for spec in fields(Options):
        flags.add_argument(f"--{spec.name}", type=type(spec.default), default=spec.default, help=spec.metadata["help"])
    return xFuserArgs.add_cli_args(flags)
