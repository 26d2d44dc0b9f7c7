"""The command: a port, a model behind it, and an answer for whoever asks."""

import contextlib
import importlib
import sys

from jaxdistill.commands import Serve
from jaxdistill.errors import ConfigError, ModelError
from jaxdistill.references import load_any
from jaxdistill.sharding import make_mesh


def serve(source: str, options: Serve | None = None, *, key: str | None = None) -> None:
    """Serves a model until it is interrupted.

    Args:
      source: any name `references.load_any` understands.
      options: where to listen, and how much is answered at a time.
      key: what clients must send as their key; None: nothing.

    Raises:
      UserError: if the model cannot be used or the port not be had.
      ConfigError: if the extra `serve` is not installed.
    """
    options = options or Serve()
    _check_installed()
    from jaxdistill.serve import app, listening, origin, service

    # Before the model is loaded, which may take minutes.
    with contextlib.closing(listening.bind(options.host, options.port)) as taken:
        model = load_any(source, dtype=options.dtype, mesh=make_mesh()).consume_per_layer()
        longest = model.config.max_positions
        if options.length is not None and options.length > longest:
            raise ModelError(
                f"length: {options.length} tokens are more than the {longest} that {source} was "
                f"made for: use at most {longest}"
            )
        length = options.length or min(2048, longest)
        behind = service.Service(
            model, slots=options.slots, length=length, special_tokens=options.special_tokens
        )
        everywhere = not origin.is_loopback(options.host)
        if key is None and everywhere:
            print("anybody who reaches this machine can ask: --key-env sets a key", file=sys.stderr)
        host = f"[{options.host}]" if ":" in options.host else options.host
        print(f"serving {source} on http://{host}:{taken.getsockname()[1]}/v1", flush=True)
        with contextlib.closing(behind):
            server = listening.make_server(app.make_app(behind, key=key, everywhere=everywhere))
            server.run([taken])


def _check_installed() -> None:
    try:
        for name in ("starlette", "uvicorn", "h11"):
            importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            "serve: needs starlette and uvicorn, which are not installed: pip install "
            "'jaxdistill[serve]'"
        ) from error
