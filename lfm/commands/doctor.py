"""Doctor: `lfm doctor`: what this machine and environment have, a sentence each, and the way out where one lacks."""

import argparse
import importlib.util
import platform
import shutil
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from lfm.exits import command

EXTRAS = {
    "triton": ("triton", "the fast kernels on a GPU"),
    "megatron-core": ("parallel", "several processes with one model"),
    "deepspeed": ("parallel", "ZeRO"),
    "tiktoken": ("fast-tokenizer", "faster tokenization"),
    "datasets": ("datasets", "data of the Hugging Face hub"),
    "rensa": ("dedup", "dropping nearly equal documents"),
    "wandb": ("wandb", "Weights & Biases"),
    "s3fs": ("remote", "shards in S3"),
    "mosaicml-streaming": ("streaming", "comparing shards with its own"),
}
"""Optional package -> extra that has it, what it is for."""


@command
def main() -> None:
    argparse.ArgumentParser(description="Say what this machine and environment have.").parse_args()
    for sentence in findings():
        print(sentence, flush=True)


def findings() -> Iterator[str]:
    import torch

    from lfm import __version__

    folder, python = Path(__file__).parents[1], platform.python_version()
    yield f"lfm {__version__} in {folder}, Python {python}, {platform.platform()}."
    yield f"torch {torch.__version__} with {torch.get_num_threads()} threads; it trains on the CPU in float32."
    yield from _gpus()
    for package, (extra, purpose) in EXTRAS.items():
        yield _package(package, extra, purpose)
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    yield f"{free:,.0f} GiB are free in {Path.cwd()}, where runs/ and data/ are made unless output= says otherwise."
    if not Path("/dev/shm").is_dir():
        yield "There is no /dev/shm: processes of one machine exchange more slowly."


def _gpus() -> Iterator[str]:
    import torch

    from lfm.kernels.nvcc import Unavailable, find_nvcc
    from lfm.layers.flash_attention import PACKAGES

    if torch.backends.mps.is_available():
        yield "There is an Apple GPU: training.device=mps takes it, in float32, and has not been tested."
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        yield "No GPU is visible" + (
            f", though torch is built for {built}: see what nvidia-smi says." if built else ": torch is a CPU build."
        )
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"{properties.major}.{properties.minor}"
        narrow = "in bfloat16" if properties.major >= 8 else "in float16: bfloat16 needs compute capability 8.0"
        memory = properties.total_memory / 2**30
        what = f"{properties.name}, {memory:.0f} GiB, compute capability {capability}"
        yield f"GPU {index} is {what}; it trains {narrow}."
    for package in PACKAGES:
        if package.installed:
            yield f"{package.name} {metadata.version(package.name)} is installed, for attention."
            break
    else:
        how = "`pip install 'lfm-training[flash-attn]'` brings it"
        yield f"No flash-attn is installed, and attention takes cuDNN or flex_attention; {how}."
    try:
        yield f"nvcc is {find_nvcc()}: the reservoir's kernel is compiled with it."
    except Unavailable as lack:
        yield f"The reservoir's kernel cannot be compiled: {lack}."


def _package(package: str, extra: str, purpose: str) -> str:
    try:
        return f"{package} {metadata.version(package)} is installed, for {purpose}."
    except metadata.PackageNotFoundError:
        if importlib.util.find_spec(package.replace("-", "_")) is not None:
            return f"{package} is there, for {purpose}; its version is not recorded."
        return f"{package}, for {purpose}, is not installed; `pip install 'lfm-training[{extra}]'` brings it."
