"""Generate: `python launch/generate.py --checkpoint runs/NAME --prompt "def " [--prompt ...]`, streaming text."""

import argparse
from pathlib import Path

from lfm.errors import UserError, command
from lfm.models.generation import SamplingConfig, generate


def _parse() -> tuple[argparse.Namespace, SamplingConfig]:
    parser = argparse.ArgumentParser(description="Continue prompts with a trained model; text appears as it is made.")
    parser.add_argument("--checkpoint", required=True, type=Path, metavar="RUN_OR_STEP", help="run or step_* folder")
    parser.add_argument("--prompt", action="append", required=True, help="may be given several times")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    for name, field in SamplingConfig.model_fields.items():
        flag, help_text = "--" + name.replace("_", "-"), " ".join((field.description or "").split())
        if field.annotation is bool:
            parser.add_argument(flag, action="store_true", help=help_text)
        else:
            parser.add_argument(flag, default=field.default, help=f"{help_text} (default {field.default})".strip())
    flags = parser.parse_args()
    chosen = {name: getattr(flags, name) for name in SamplingConfig.model_fields}
    return flags, SamplingConfig.from_tree(chosen, source="the command line")


@command
def main() -> None:
    flags, sampling = _parse()
    import torch

    from lfm.data.tokenizer import Tokenizer
    from lfm.training.checkpoint import load_model

    for prompt in flags.prompt:
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise UserError(f"prompt {prompt!r} is not valid UTF-8; give it in UTF-8") from None
    cuda = torch.cuda.is_available() if flags.device == "auto" else flags.device == "cuda"
    if cuda and not torch.cuda.is_available():
        raise UserError("--device cuda was asked for and no GPU is visible; use --device cpu")
    model, _, checkpoint = load_model(
        flags.checkpoint,
        device=torch.device("cuda" if cuda else "cpu"),
        dtype=torch.bfloat16 if cuda else torch.float32,
    )
    tokenizer = Tokenizer.from_file(checkpoint / "tokenizer.json")
    prompts = [tokenizer.encode(prompt) for prompt in flags.prompt]
    decoders = [tokenizer.stream_decoder() for _ in prompts]
    # One prompt streams as it comes; several are collected, so that their texts do not mix.
    texts = list(flags.prompt)
    if len(prompts) == 1:
        print(texts[0], end="", flush=True)
    for tokens in generate(model, prompts, sampling, end_of_document=tokenizer.eod_id):
        for i, token in enumerate(tokens):
            if token is None or token == tokenizer.eod_id:
                continue
            text = decoders[i].push(token)
            texts[i] += text
            if len(prompts) == 1:
                print(text, end="", flush=True)
    rest = [decoder.flush() for decoder in decoders]
    if len(prompts) == 1:
        print(rest[0])
    else:
        print("\n--------\n".join(text + tail for text, tail in zip(texts, rest, strict=True)))


if __name__ == "__main__":
    main()
