"""What the Hugging Face hub has: rows of data sets, and tokenizers."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_pipeline import extras
from data_pipeline.batches import Batch
from data_pipeline.files import text_batches
from data_pipeline.unpack import Limits
from lfm.data.format import TOKENIZER_NAME
from lfm.errors import UserError
from lfm.files import expanded

_CONNECTION_SECONDS = 10.0


def batches(source: int, config: dict[str, Any], limits: Limits) -> Iterator[Batch]:
    """The rows of one split.  Raises UserError if it cannot be had or has no such column."""
    datasets = extras.require("datasets", extra="datasets", purpose="kind=huggingface")
    name, text_key = config["path"], config["text_key"]
    data_files = [path if "://" in path else str(expanded(path)) for path in config["data_files"] or ()] or None
    try:
        rows = datasets.load_dataset(
            name,
            config["config"],
            split=config["split"],
            data_files=data_files,
            revision=config["revision"],
            streaming=config["streaming"],
        )
        columns = rows.column_names or list(next(iter(rows.take(1)), {}))  # a stream may not know before it is read
        if text_key not in columns:
            raise UserError(
                f"{name} has no column text_key={text_key!r} (its columns: {', '.join(columns)}); "
                "set text_key to one of them"
            )
        groups = rows.select_columns([text_key]).iter(batch_size=256)
        values = (value for group in groups for value in group[text_key])
        yield from text_batches(source, values, name, column=text_key, limits=limits, bytes_a_text=0)
    except UserError:
        raise
    except Exception as error:  # anything from a missing file to a closed connection, of many classes
        words = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(
            f"the Hugging Face data set path={name} split={config['split']} cannot be read ({words}); check its name, "
            "config and split, and the connection, or give local files in data_files"
        ) from None


def is_name(text: str) -> bool:
    """Whether it may be a model's name on the hub, such as gpt2 or organization/model."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", text) is not None and not text.endswith(
        (".json", ".tiktoken")
    )


def tokenizer_file(name: str, revision: str | None) -> Path:
    """The tokenizer.json of a model on the hub, kept in its cache.

    Raises UserError where the hub cannot be reached, or has no such model, or none that may be read.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    here = f"tokenizer.file={name} is no file or folder here, and the Hugging Face hub"
    is_away = not _can_be_reached()
    try:
        return Path(hf_hub_download(name, TOKENIZER_NAME, revision=revision, local_files_only=is_away))
    except GatedRepoError:
        raise UserError(
            f"{here} gives it to those alone who have accepted its licence; do so there and set HF_TOKEN, or give a "
            "tokenizer.json"
        ) from None
    except RepositoryNotFoundError:
        raise UserError(f"{here} has no model of that name, or none that is public; correct it") from None
    except RevisionNotFoundError:
        raise UserError(f"{here} has no tokenizer.revision={revision} of it; correct that, or set it to null") from None
    except EntryNotFoundError as error:
        if is_away or isinstance(error, LocalEntryNotFoundError):
            raise UserError(
                f"{here} cannot be reached or does not answer as it should{_because(error)}; check the connection "
                "(HF_ENDPOINT names a mirror), or give a tokenizer.json"
            ) from None
        raise UserError(f"{here} has no {TOKENIZER_NAME} of that model; give another name, or a file") from None
    except Exception as error:  # of many classes: a full disk, a certificate
        raise UserError(
            f"{here} did not give its {TOKENIZER_NAME}{_because(error)}; try again, or give a file"
        ) from None


def _because(error: BaseException) -> str:
    cause = error.__cause__ or error
    return f" ({' '.join(f'{type(cause).__name__}: {cause}'.split())[:200]})"


def _can_be_reached() -> bool:
    """Whether the hub answers at all; its library would try for half a minute."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session  # pyright: ignore[reportPrivateImportUsage]

    try:
        get_session().head(constants.ENDPOINT, timeout=_CONNECTION_SECONDS)
    except Exception:  # of the library's HTTP client, whichever it is
        return False
    return True
