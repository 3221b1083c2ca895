"""Rows of Hugging Face data sets."""

from collections.abc import Iterator
from typing import Any

from data_pipeline import extras
from data_pipeline.batches import Batch
from data_pipeline.files import text_batches
from data_pipeline.unpack import Limits
from lfm.errors import UserError
from lfm.files import expanded


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
