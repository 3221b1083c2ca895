"""Generate: `python launch/generate.py --checkpoint runs/NAME --prompt "def " [--prompt ...]`, streaming text."""

import argparse

from lfm.config import add_flags, from_flags, path_flag
from lfm.exits import command
from lfm.inference.sampling import SamplingConfig, generate
from lfm.models.liquidnn import turn_plasticity_off


@command
def main() -> None:
    parser = argparse.ArgumentParser(description="Continue prompts with a trained model; text appears as it is made.")
    parser.add_argument(
        "--checkpoint", required=True, type=path_flag, metavar="RUN_OR_STEP", help="run or step_* folder"
    )
    parser.add_argument("--prompt", action="append", required=True, help="may be given several times")
    parser.add_argument("--no-plasticity", action="store_true", help="kind liquidnn: traces neither act nor change")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add_flags(parser, SamplingConfig)
    flags = parser.parse_args()
    sampling = from_flags(SamplingConfig, flags)
    from lfm.inference.load import open_model

    model, tokenizer, _ = open_model(flags.checkpoint, device=flags.device)
    if flags.no_plasticity:
        turn_plasticity_off(model)
    prompts = [tokenizer.encode_prompt(prompt) for prompt in flags.prompt]
    decoders = [tokenizer.stream_decoder(prompt) for prompt in prompts]
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
