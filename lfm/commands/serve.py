"""Serve: `lfm serve --checkpoint RUN`; a page and OpenAI's API for trained models."""

import argparse
import os
import secrets
from pathlib import Path

from lfm.commands.medical_flags import add_medical_flags, check_as_calibrated, medical_of
from lfm.config import add_flags, from_flags, path_flag
from lfm.errors import UserError
from lfm.exits import command
from lfm.export.packages import require
from lfm.files import read_file, shown
from lfm.talk import say, talking, waiting

TOKEN_VARIABLE = "LFM_SERVE_TOKEN"
_SHORTEST_TOKEN = 16


@command
def main() -> None:
    from lfm.serving.config import LOOPBACK, ServeConfig

    parser = argparse.ArgumentParser(
        description="Serve trained models: a page for a browser, and OpenAI's API.",
        epilog=f"The token that requests must show is in the file of --token-file or in ${TOKEN_VARIABLE}; any "
        "--host but this machine's own needs one.",
    )
    parser.add_argument(
        "--checkpoint",
        action="append",
        required=True,
        type=path_flag,
        metavar="RUN_OR_STEP",
        help="run or step_* folder, or hf://USER/NAME; may be given several times",
    )
    parser.add_argument("--token-file", type=path_flag, metavar="FILE", help="its first line is the token")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--int8", action="store_true", help="products of 8-bit integers, on a CPU (docs/export.md)")
    add_medical_flags(parser)
    add_flags(parser, ServeConfig)
    flags = parser.parse_args()
    config = from_flags(ServeConfig, flags)
    token = read_token(flags.token_file)
    if token is None and config.host not in LOOPBACK:
        raise UserError(
            f"host={shown(config.host)} is open to other machines and there is no token; give --token-file FILE or set "
            f"{TOKEN_VARIABLE}, for example to {secrets.token_urlsafe(24)}"
        )
    for package in ("starlette", "uvicorn", "prometheus_client"):
        require(package, purpose="lfm serve", extra="serve")
    from lfm.medical.answering import FREE_TEXT
    from lfm.serving.served import open_served
    from lfm.serving.server import bind, serve

    with bind(config.host, config.port) as listening:
        with waiting("opening checkpoints"):
            served = open_served(
                flags.checkpoint,
                device=flags.device,
                int8=flags.int8,
                medical_of=lambda checkpoint: medical_of(flags, checkpoint),
            )
        if any(each.medical is not None for each in served.values()):
            check_as_calibrated(int8=flags.int8)
            if config.max_new_tokens < FREE_TEXT.max_new_tokens:
                raise UserError(
                    f"max_new_tokens={config.max_new_tokens} is less than the {FREE_TEXT.max_new_tokens} that answers "
                    "in medical mode may have; raise it"
                )

        def announce() -> None:
            port = listening.getsockname()[1]
            host = f"[{config.host}]" if ":" in config.host else config.host
            address = f"http://{host}:{port}"
            say(f"serving at {address}")
            for name, each in served.items():
                say(f"model {name}: {each.description}")
                for line in each.medical.words() if each.medical is not None else ():
                    say(f"  {line}")
            shows = ""
            if token is not None:
                place = f"$(head -n1 {flags.token_file})" if flags.token_file is not None else f"${TOKEN_VARIABLE}"
                shows = f' -H "Authorization: Bearer {place}"'
            name, first = next(iter(served.items()))
            more = ', "max_tokens": 20' if first.medical is None else ""
            body = f'{{"model": "{name}", "prompt": "The"{more}}}'
            say(f"curl {address}/v1/completions{shows} -H 'Content-Type: application/json' -d '{body}'")

        with talking():
            cut_off = serve(served, config, listening, token=token, announce=announce)
            if cut_off is None:
                say("served; all answers that were begun have ended")
            else:
                say(f"served; answers that had not ended were cut off {cut_off}")


def read_token(file: Path | None) -> str | None:
    """Of the file, else of the environment; None where there is none.

    Raises UserError for one that is short or cannot be sent.
    """
    if file is not None:
        token, place = read_file(file).decode(errors="replace").partition("\n")[0].strip(), f"of {shown(file)}"
    else:
        token, place = os.environ.get(TOKEN_VARIABLE), f"of {TOKEN_VARIABLE}"
    if token is None:
        return None
    if len(token) < _SHORTEST_TOKEN or not token.isascii() or not token.isprintable() or " " in token:
        raise UserError(
            f"the token {place} is not {_SHORTEST_TOKEN} or more letters, digits and signs; "
            f"take {secrets.token_urlsafe(24)}"
        )
    return token
