"""Files of text at http(s)://, s3://, gs:// and what else fsspec reads: fetched once, then read as any other."""

import filecmp
import hashlib
import json
import os
import re
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

from data_pipeline.unpack import has_suffix
from lfm.data.remote import options
from lfm.errors import PASSWORD, UserError
from lfm.files import exists, expanded, refusing, shown

CACHE = "~/.cache/lfm/fetched"
"""What has been fetched; an entry is of a file by its address, size and, where the server tells, version."""
_VERSIONS = "ETag etag Last-Modified LastModified last_modified Content-MD5 Digest mtime updated".split()
"""What the web, the stores and other file systems call that which changes with a file."""
_PACKAGES = {"http": "aiohttp", "https": "aiohttp", "s3": "s3fs"}
"""Of the extra `remote`."""
_CONNECTION_SECONDS = 30.0


def fetched(url: str, suffixes: tuple[str, ...], exclude: Sequence[str]) -> list[Path]:
    """Local copies of the files that a URL, a glob in one, or a folder leads to; of a folder, those with `suffixes`.

    Raises UserError where a package is missing, the server cannot be reached or has no such file, or the disk is full.
    """
    import fsspec

    scheme = url.partition("://")[0]
    if scheme not in fsspec.available_protocols():
        raise UserError(
            f"source path {shown(url)}: no file system is called {shown(scheme)}; use https://, s3:// or gs://"
        )
    try:
        system, path = fsspec.url_to_fs(url, **_options(scheme))
        names = _names(system, path, suffixes, exclude)
        with refusing("make room, or fetch the file yourself"):
            folder = expanded(CACHE)
            folder.mkdir(parents=True, exist_ok=True)
        return [_local(system, name, folder) for name in names]
    except ImportError:
        if scheme in ("gs", "gcs"):
            package, install = "gcsfs", "pip install gcsfs"
        else:
            package, install = _PACKAGES.get(scheme, f"of {scheme}://"), "pip install 'lfm-training[remote]'"
        raise UserError(f"source path {shown(url)} needs the package {package}; install it with `{install}`") from None
    except UserError:
        raise
    except Exception as error:  # of many classes: a server that cannot be reached, refuses or closes the connection
        cause = error.__cause__ or error  # a web server that does not answer is a FileNotFoundError too
        if isinstance(cause, FileNotFoundError) or getattr(cause, "status", None) == 404:
            raise UserError(f"source path {shown(url)} leads to no file; correct it or remove it") from None
        words = " ".join(f"{type(cause).__name__}: {cause}".split())[:300]
        for password in re.findall(PASSWORD, url):  # stores say it without the scheme
            words = words.replace(f":{password}@", ":***@")
        raise UserError(
            f"source path {shown(url)} cannot be fetched ({words}); check the address and the connection, or fetch it "
            "yourself and give the local file"
        ) from None


def _options(scheme: str) -> dict[str, Any]:
    if scheme not in ("http", "https"):
        return options(scheme)
    import aiohttp

    # The whole may take long, but not to begin or to go on.
    timeout = aiohttp.ClientTimeout(total=None, connect=_CONNECTION_SECONDS, sock_read=_CONNECTION_SECONDS)
    return {"client_kwargs": {"timeout": timeout, "trust_env": True}}


def _names(system: Any, path: str, suffixes: tuple[str, ...], exclude: Sequence[str]) -> list[str]:
    if any(sign in path for sign in "*?["):
        return sorted(system.glob(path))
    is_web = "http" in system.protocol
    if is_web or not system.isdir(path):  # a page may list links, which makes no folder of it
        return [path]
    below = ((name, str(PurePosixPath(name).relative_to(path.rstrip("/")))) for name in system.find(path))
    wanted = (name for name, inner in below if not any(fnmatch(inner, pattern) for pattern in exclude))
    return sorted(name for name in wanted if has_suffix(name, suffixes))


def _local(system: Any, name: str, folder: Path) -> Path:
    about = system.info(name)
    version = [str(about[key]) for key in _VERSIONS if about.get(key) is not None]
    content = json.dumps([system.unstrip_protocol(name), str(about.get("size")), version])
    base = PurePosixPath(name).name
    local = folder / hashlib.sha256(content.encode()).hexdigest()[:16] / (base if base not in ("", "..") else "index")
    is_known = bool(version) or about.get("size") is not None
    if is_known and exists(local):
        return local
    temporary = local.with_name(f".{local.name}.{os.getpid()}.tmp")
    with refusing("make room, or fetch the file yourself"):
        local.parent.mkdir(exist_ok=True)
    try:
        system.get_file(name, str(temporary))
        if about.get("size") not in (None, temporary.stat().st_size):
            raise OSError(f"{temporary.stat().st_size} of {about['size']} bytes came")
        # What is fetched anew and has not changed keeps its time, by which a data set knows its inputs.
        if not (exists(local) and filecmp.cmp(local, temporary, shallow=False)):
            os.replace(temporary, local)
    finally:
        temporary.unlink(missing_ok=True)
    return local
