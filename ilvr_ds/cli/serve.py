"""`serve`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from ilvr_ds.cli.generate import add_generation, generation_settings, load_chosen
from ilvr_ds.cli.options import Commands, add_command
from ilvr_ds.errors import UserError

if TYPE_CHECKING:
    from ilvr_ds.serving.limits import Limits


def add_serve(commands: Commands) -> None:
    """The options of `serve`; the limits' defaults are those of Limits."""
    command = add_command(
        commands, "serve", "answer OpenAI's clients: chat completions with images, on loopback", "serving.md"
    )
    add_generation(command)
    command.add_argument("--tracking-uri", default=os.environ.get("MLFLOW_TRACKING_URI"), help="MLflow of models:/")
    command.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    command.add_argument("--port", type=int, default=8000, help="0: any that is free (default 8000)")
    command.add_argument("--name", help="of the model, for clients (default: the last part of --model)")
    command.add_argument(
        "--token-file", type=Path, metavar="FILE", help="what clients must give as api_key (default: ILVR_SERVE_TOKEN)"
    )
    command.add_argument(
        "--allow-url-images",
        action="append",
        default=[],
        metavar="HOST",
        help="fetch images from there (default: none)",
    )
    command.add_argument(
        "--allow-origin", action="append", default=[], metavar="URL", help="web page that may ask (default: none)"
    )
    command.add_argument("--batch-size", type=int, default=8, help="requests answered together (default 8)")
    limits = command.add_argument_group("limits; what is above is refused, as is more than --max-new-tokens")
    limits.add_argument("--limit-images", type=int, default=8, metavar="N", help="in a request (default 8)")
    limits.add_argument("--limit-image-bytes", type=int, default=10 * 2**20, metavar="N", help="default 10485760")
    limits.add_argument("--limit-image-pixels", type=int, default=25_000_000, metavar="N", help="default 25000000")
    limits.add_argument("--limit-waiting", type=int, default=64, metavar="N", help="requests in the queue (default 64)")
    command.set_defaults(run=_serve)


def _serve(options: argparse.Namespace) -> int:
    from ilvr_ds.serving.server import check_installed, check_reach, listen, own_names, read_token, serve

    check_installed()
    limits = _limits(options)
    token = read_token(options.token_file)
    check_reach(options.host, token)
    with listen(options.host, options.port) as listening:
        from ilvr_ds.serving.endpoint import Access, Endpoint

        access = Access(token, own_names(options.host), tuple(options.allow_origin))
        endpoint = Endpoint(load_chosen(options), options.name or name_of(options.model), limits, access)
        return serve(endpoint, listening, lambda line: print(line, flush=True))


def name_of(model: str) -> str:
    """The last part of a path or of a hub's name; of models:/NAME/VERSION the name."""
    reference = model.removeprefix("models:/")
    return reference.partition("/")[0] if reference != model else Path(model).resolve().name


def _limits(options: argparse.Namespace) -> Limits:
    """Raises UserError."""
    from ilvr_ds.serving.limits import Limits

    for name in ("batch_size", "limit_image_bytes", "limit_image_pixels", "limit_waiting"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be 1 or more, not {getattr(options, name)}")
    if options.limit_images < 0:
        raise UserError(f"--limit-images must be 0 or more, not {options.limit_images}")
    if wrong := next((host for host in options.allow_url_images if "/" in host or ":" in host), None):
        raise UserError(f"--allow-url-images {wrong}: expected the name of a host, without scheme, port and path")
    return Limits(
        images=options.limit_images,
        image_bytes=options.limit_image_bytes,
        image_pixels=options.limit_image_pixels,
        waiting=options.limit_waiting,
        batch_size=options.batch_size,
        url_hosts=frozenset(host.lower() for host in options.allow_url_images),
        generation=generation_settings(options),
    )
