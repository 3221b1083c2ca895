"""Generate: `python launch/generate.py --checkpoint runs/NAME --prompt "def " [--prompt ...]`, or `--prompts FILE`."""

import argparse
import codecs
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lfm.commands.medical_flags import add_medical_flags, check_as_calibrated, medical_of
from lfm.config import add_flags, from_flags, path_flag
from lfm.data.tokenizer import Tokenizer
from lfm.errors import UserError
from lfm.exits import command
from lfm.files import exists, expanded, read_file, shown
from lfm.inference.sampling import SamplingConfig, check_prompts
from lfm.inference.text import continuations
from lfm.medical.config import MedicalConfig
from lfm.models.language_model import LanguageModel
from lfm.models.liquidnn import turn_plasticity_off

BATCH_PROMPTS = 16
"""That are continued together."""


@dataclass(frozen=True)
class Request:
    """A prompt and how it is continued; `place` names it in errors."""

    prompt: str
    sampling: SamplingConfig
    place: str
    options: tuple[str, ...] = ()
    """In medical mode: answers to choose from; none: the answer is free."""


@command
def main() -> None:
    parser = argparse.ArgumentParser(
        description="Continue prompts with a trained model; the text of a single one appears as it is made.",
        epilog="The second prompt is continued with the seed after --seed, the third with the one after that, and so "
        "on: --prompt with the seed that --json gives repeats a continuation.",
    )
    parser.add_argument(
        "--checkpoint",
        required=True,
        type=path_flag,
        metavar="RUN_OR_STEP",
        help="run or step_* folder, or hf://USER/NAME",
    )
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", action="append", metavar="TEXT", help="may be given several times")
    prompts.add_argument(
        "--prompts",
        metavar="FILE",
        help="a prompt a line; or, where the first line begins with {, JSON lines with `prompt` and any of the keys of "
        "sampling below, such as max_new_tokens; -: standard input",
    )
    parser.add_argument(
        "--json", action="store_true", help="JSON lines: prompt, text, tokens, finish_reason, seed; in order"
    )
    parser.add_argument("--no-plasticity", action="store_true", help="kind liquidnn: traces neither act nor change")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--int8", action="store_true", help="products of 8-bit integers, on a CPU (docs/export.md)")
    add_medical_flags(parser)
    parser.add_argument(
        "--option",
        action="append",
        metavar="TEXT",
        help="in medical mode, an answer to choose from by likelihood, given several times; JSON lines have `options`",
    )
    add_flags(parser, SamplingConfig)
    flags = parser.parse_args()
    sampling = from_flags(SamplingConfig, flags)
    if flags.prompts is None:
        options = tuple(flags.option or ())
        requests = [Request(text, sampling.of_prompt(i), "--prompt", options) for i, text in enumerate(flags.prompt)]
    else:
        requests = read_requests(flags.prompts, sampling, tuple(flags.option or ()))
    from lfm.inference.load import open_model

    model, tokenizer, checkpoint = open_model(flags.checkpoint, device=flags.device, int8=flags.int8)
    medical = medical_of(flags, checkpoint)
    if medical.mode:
        check_as_calibrated(int8=flags.int8, no_plasticity=flags.no_plasticity)
        answer_selectively(requests, medical, model, tokenizer, checkpoint, as_json=flags.json)
        return
    if any(request.options for request in requests):
        raise UserError("options are for medical mode, which chooses from them; add --medical, or leave them out")
    if flags.no_plasticity:
        turn_plasticity_off(model)
    ids = encoded(requests, tokenizer, model)
    if len(requests) == 1 and not flags.json:
        stream(requests[0], ids[0], tokenizer, model)
        return
    for first in range(0, len(requests), BATCH_PROMPTS):
        batch = slice(first, first + BATCH_PROMPTS)
        *_, found = continuations(model, tokenizer, ids[batch], [request.sampling for request in requests[batch]])
        for number, (request, made) in enumerate(zip(requests[batch], found, strict=True), start=first):
            if flags.json:
                line = {"prompt": request.prompt, **asdict(made), "seed": request.sampling.seed}
                print(json.dumps(line, ensure_ascii=False), flush=True)
            else:
                print(("\n--------\n" if number else "") + request.prompt + made.text, end="", flush=True)
    if not flags.json:
        print()


def answer_selectively(
    requests: Sequence[Request],
    medical: MedicalConfig,
    model: LanguageModel,
    tokenizer: Tokenizer,
    checkpoint: Path,
    *,
    as_json: bool,
) -> None:
    """Print an answer with its probability, or the referral, for each; what is withheld is printed nowhere."""
    from lfm.medical.asking import MedicalMode, check_options, check_sampling

    for number, request in enumerate(requests):
        try:
            check_sampling(request.sampling, number)
            check_options(request.options)
        except UserError as error:
            raise UserError(f"{request.place}: {error}") from None
    mode = MedicalMode(
        model, tokenizer, checkpoint, medical, {"choice" if request.options else "text" for request in requests}
    )
    if not as_json:
        print("\n".join(mode.words()))
    encoded(requests, tokenizer, model)  # names the place of a prompt that cannot be asked
    for first in range(0, len(requests), BATCH_PROMPTS):
        batch = requests[first : first + BATCH_PROMPTS]
        for reply in mode.ask([request.prompt for request in batch], [request.options for request in batch]):
            print(
                json.dumps(reply.record(), ensure_ascii=False) if as_json else f"{reply.prompt} {reply.text}",
                flush=True,
            )


def stream(request: Request, ids: Sequence[int], tokenizer: Tokenizer, model: LanguageModel) -> None:
    """Print prompt and continuation as it comes."""
    print(request.prompt, end="", flush=True)
    length = 0
    for (made,) in continuations(model, tokenizer, [ids], [request.sampling]):
        print(made.text[length:], end="", flush=True)
        length = len(made.text)
    print()


def read_requests(file: str, sampling: SamplingConfig, options: tuple[str, ...] = ()) -> list[Request]:
    """The prompts of a file (-: of the standard input), with the settings of their lines over `sampling`.

    Raises UserError, naming the line, for one that is no prompt, and for a file without any.
    """
    if file != "-" and not exists(expanded(file)):
        raise UserError(
            f"--prompts {shown(file)} is no file; name one with a prompt a line, or - for the standard input"
        )
    data = sys.stdin.buffer.read() if file == "-" else read_file(expanded(file))
    data = data.removeprefix(codecs.BOM_UTF8)  # which editors write, and nobody reads
    name = "the standard input" if file == "-" else shown(Path(file))
    lines = [line.removesuffix(b"\r") for line in data.removesuffix(b"\n").split(b"\n")] if data else []
    if not lines:
        raise UserError(f"{name} has no prompts; write one a line")
    is_json = lines[0].lstrip().startswith(b"{")
    requests = []
    for number, line in enumerate(lines):
        place = f"line {number + 1} of {name}"
        try:
            text = line.decode()
        except UnicodeDecodeError:
            raise UserError(f"{place} is not valid UTF-8; give it in UTF-8") from None
        own = sampling.of_prompt(number)
        requests.append(json_request(text, own, place, options) if is_json else Request(text, own, place, options))
    return requests


def json_request(text: str, sampling: SamplingConfig, place: str, options: tuple[str, ...] = ()) -> Request:
    """Of one JSON line.  Raises UserError naming the `place`."""
    way_out = 'write {"prompt": "text"}, and keys of sampling beside it'
    try:
        tree: dict[str, Any] = json.loads(text)
        prompt = tree.pop("prompt")
        prompt.encode()
    except (ValueError, RecursionError, TypeError, AttributeError, KeyError):  # no JSON, no object, no text in it
        raise UserError(f"{place} is no JSON object with a text `prompt`; {way_out}") from None
    given = tree.pop("options", list(options))
    if not isinstance(given, list) or not all(isinstance(option, str) for option in given):
        raise UserError(f'{place} has no list of texts under options; write "options": ["one", "another"]')
    return Request(prompt, SamplingConfig.from_tree(sampling.model_dump() | tree, source=place), place, tuple(given))


def encoded(requests: Sequence[Request], tokenizer: Tokenizer, model: LanguageModel) -> list[list[int]]:
    """The ids of all prompts.  Raises UserError, naming the place, for one that the model cannot continue."""
    found = []
    for request in requests:
        try:
            found.append(tokenizer.encode_prompt(request.prompt))
            check_prompts(found[-1:], model.config.context_limit)
        except UserError as error:
            raise UserError(f"{request.place}: {error}") from None
    return found
