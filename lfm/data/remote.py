"""One file from wherever fsspec reads: s3://, gs://, https://, hf://, ..., or a local path."""

import os
import shutil
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs


def download(remote: str, local: Path) -> None:
    """Copy the file at `remote`, a URL or path, to `local`.  Raises what the protocol raises; some know no time limit.

    fsspec's own settings hold (FSSPEC_S3_ANON and the like); S3_ENDPOINT_URL is another store that speaks S3.
    """
    protocol, found, _ = remote.removeprefix("file://").partition("://")
    if not found:
        shutil.copyfile(protocol, local)
        return
    try:
        files, path = url_to_fs(remote, **options(protocol))
    except ImportError as error:
        brings = "; `pip install 'lfm-training[remote]'` brings it" if protocol in ("s3", "http", "https") else ""
        raise ImportError(f"{protocol}:// needs a package: {error}{brings}") from None
    files.get_file(path, str(local))


def options(protocol: str) -> dict[str, Any]:
    """What fsspec is told of a protocol."""
    if protocol in ("s3", "s3a") and (endpoint := os.environ.get("S3_ENDPOINT_URL")):
        return {"endpoint_url": endpoint}
    return {}
