"""Every Python and platform has wheels of all that an install needs; only the metadata of packages is fetched."""

import os
import re
import subprocess
from pathlib import Path

import pytest

uv = pytest.importorskip("uv", reason="needs the extra `dev`")

ROOT = Path(__file__).parents[1]
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
PLATFORMS = ("x86_64-manylinux_2_28", "aarch64-apple-darwin", "windows")
FEW = [("3.14", "aarch64-apple-darwin"), ("3.10", "windows"), ("3.13", "x86_64-manylinux_2_28")]


def packages(python: str, platform: str, *extras: str) -> set[str]:
    """What `pip install lfm-training[extras]` brings there, itself left out."""
    environment = {**os.environ, "UV_PYTHON_DOWNLOADS": "never", "MACOSX_DEPLOYMENT_TARGET": "14.0"}  # as torch needs
    if "PIP_INDEX_URL" in os.environ:
        environment["UV_DEFAULT_INDEX"] = os.environ["PIP_INDEX_URL"]
    wheels = ["--only-binary", ":all:"]
    for source in ("deepspeed", "rouge-score", "sqlitedict", "word2number"):  # of which there is the source alone
        wheels += ["--no-binary", source]
    done = subprocess.run(
        [uv.find_uv_bin(), "pip", "compile", "--no-header", "--no-annotate", "pyproject.toml", *wheels]
        + ["--python-version", python, "--python-platform", platform]
        + [word for extra in extras for word in ("--extra", extra)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    if done.returncode and "error sending request" in done.stderr:
        pytest.skip("the package index cannot be reached")
    assert done.returncode == 0, f"Python {python} on {platform}: {done.stderr}"
    return set(re.findall(r"^(\S+)==", done.stdout, re.MULTILINE))


def of_setup() -> list[str]:
    """The extras that .ci/setup takes everywhere."""
    [extras] = re.findall(r'-e "\.\[([a-z,-]+)\$of_kind\]"', (ROOT / ".ci/setup").read_text(encoding="utf-8"))
    return extras.split(",")


def check_base(python: str, platform: str) -> None:
    found = packages(python, platform)
    assert {"torch", "numpy", "tokenizers", "fsspec"} <= found
    assert not found & {"mosaicml-streaming", "transformers", "torchvision", "boto3", "megatron-core", "deepspeed"}
    cuda = {name for name in found if name.startswith(("nvidia-", "cuda-"))} | {"triton"}  # torch's, on Linux
    assert len(found - cuda) <= 52, sorted(found - cuda)


@pytest.mark.parametrize("python, platform", FEW)
def test_the_base_install_resolves_in_half_of_a_hundred_packages(python, platform):
    check_base(python, platform)


@pytest.mark.slow
@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("python", PYTHONS)
def test_base_and_the_extras_of_setup_resolve_everywhere(python, platform):
    check_base(python, platform)
    found = packages(python, platform, *of_setup())
    assert {"s3fs", "pytest"} <= found
    on_linux = platform == "x86_64-manylinux_2_28"
    assert ("deepspeed" in found) == on_linux
    assert ({"megatron-core", "mosaicml-streaming"} <= found) == (on_linux and python != "3.14")
