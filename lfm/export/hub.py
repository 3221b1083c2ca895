"""The Hugging Face hub: `hf://user/name[@revision]` as a checkpoint, and exported folders on their way there.

What is downloaded is imported, as a run folder, into a cache, by the commit that it is of; code of the repository is
not run.  HF_ENDPOINT, HF_TOKEN and the like are huggingface_hub's own.
"""

import os
import re
import tempfile
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lfm.checkpoint.folder import whole_checkpoints
from lfm.errors import UserError
from lfm.export import huggingface
from lfm.export.incoming import write_run
from lfm.export.packages import require
from lfm.files import exists, expanded, remove_tree, shown

CONFIG_NAME = "config.json"
CACHE = "~/.cache/lfm/hub"
"""Runs made of what was downloaded: `user--name/COMMIT`."""

_NAME = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"
_NOT_FOR_YOU = ("RepositoryNotFoundError", "RevisionNotFoundError", "GatedRepoError")
# One slash where a path was made of the text.
_ADDRESS = re.compile(rf"hf:/{{1,2}}({_NAME})(?:@([\w./-]+))?")


def located(path: Path | str) -> Path:
    """`path` itself, or, of `hf://user/name`, the run folder that was made of it.

    Raises UserError where the hub cannot be reached, or has no such model, or none of ours.
    """
    address = parsed(str(path))
    if address is None:
        return expanded(path)
    repository, snapshot = address[0], downloaded(*address)
    run = expanded(CACHE) / repository.replace("/", "--") / snapshot.name
    if not whole_checkpoints(run / "checkpoints"):
        _import(snapshot, run, name=repository.partition("/")[2])
    return run


def parsed(text: str) -> tuple[str, str | None] | None:
    """Repository and revision of `hf://user/name[@revision]`; None: it is no such address.  Raises UserError."""
    if not text.startswith("hf:/"):
        return None
    found = _ADDRESS.fullmatch(text)
    if found is None:
        raise UserError(f"{shown(text)} is no address of the hub; write hf://USER/NAME or hf://USER/NAME@REVISION")
    return found[1], found[2]


def downloaded(repository: str, revision: str | None = None) -> Path:
    """The folder of the hub's cache with a model's files; its name is the commit.

    Its configuration comes first: of what is no model of this project nothing more is fetched.
    """
    hub = require("huggingface_hub", purpose=f"hf://{repository}")

    def fetched(commit: str | None, wanted: list[str]) -> Path:
        with _explained(f"hf://{repository}", "cannot be read"):
            return Path(
                hub.snapshot_download(repository, revision=commit, allow_patterns=wanted, ignore_patterns=["*/*"])
            )

    snapshot = fetched(revision, [CONFIG_NAME])
    if not exists(snapshot / CONFIG_NAME):
        raise UserError(f"hf://{repository} has no {CONFIG_NAME}; name a model that `lfm export` made")
    huggingface.read_config(snapshot / CONFIG_NAME)
    return fetched(snapshot.name, ["*.json", "*.safetensors"])


def _import(snapshot: Path, run: Path, *, name: str) -> None:
    incoming = huggingface.read(snapshot)
    run.parent.mkdir(parents=True, exist_ok=True)
    # Several processes may come here at once: each writes its own, and the first gives it the name.
    made = Path(tempfile.mkdtemp(prefix=f".{run.name}.", dir=run.parent))
    try:
        write_run(incoming, made, name=name)
        made.rename(run)
    except OSError:
        if not whole_checkpoints(run / "checkpoints"):
            raise
    finally:
        remove_tree(made)


def check_repository(name: str) -> str:
    """`name`, if it can be a repository's.  Raises UserError."""
    if re.fullmatch(_NAME, name) is None:
        raise UserError(f"--push-to-hub {shown(name)} is no name of a repository; write USER/NAME")
    return name


def push(folder: Path, repository: str, *, private: bool) -> str:
    """Upload an exported folder as a commit of `repository`, which is made if it is new; returns its address."""
    hub = require("huggingface_hub", purpose="--push-to-hub")
    api = hub.HfApi()
    with _explained(f"--push-to-hub {repository}", "cannot be written"):
        api.create_repo(repository, private=private, exist_ok=True, repo_type="model")
        return str(api.upload_folder(repo_id=repository, folder_path=str(folder), commit_message="lfm export"))


@contextmanager
def _explained(what: str, cannot: str) -> Iterator[None]:
    """Errors of huggingface_hub, which are of many classes, as one sentence."""
    try:
        yield
    except Exception as error:
        name, status = type(error).__name__, _status(error)
        if name in _NOT_FOR_YOU or status in (401, 403, 404):
            why = "the hub has none of that name, or not for you; correct it, or set HF_TOKEN"
        else:
            cause = textwrap.shorten(f"{name}: {error}", 200, placeholder=" ...")
            why = (
                f"{cause}; check the connection (HF_ENDPOINT={os.environ.get('HF_ENDPOINT', 'https://huggingface.co')})"
            )
        raise UserError(f"{what} {cannot}: {why}") from None


def _status(error: Any) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)
