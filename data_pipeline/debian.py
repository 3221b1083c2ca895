"""Text out of Debian packages: fetched by apt-get, unpacked by dpkg-deb, installed by nobody."""

import functools
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from data_pipeline.markup import Markup
from lfm.errors import UserError
from lfm.files import exists, expanded

Rule = tuple[str, Markup]

_DOC = "usr/share/doc"
_ANY: tuple[Rule, ...] = (
    (f"{_DOC}/**/*.html", "html"),
    (f"{_DOC}/**/*.txt", "none"),
    (f"{_DOC}/**/*.txt.gz", "none"),
    (f"{_DOC}/**/*.rst", "none"),
    (f"{_DOC}/**/*.rst.gz", "none"),
    ("usr/share/dictd/*.dict.dz", "dictionary"),
)
"""Files taken from packages that are not below: globs, and how their text is got.  The first that matches decides."""

_RULES: dict[str, tuple[Rule, ...]] = {
    "anarchism": ((f"{_DOC}/anarchism/html/*.html", "html"),),
    "bible-kjv-text": (),  # packed by a program of its own
    "debian-handbook": ((f"{_DOC}/debian-handbook/html/en-US/*.html", "html"),),
    "fortunes": (("usr/share/games/fortunes/[a-z]*[a-z]", "none"),),
    "linux-doc-6.1": (
        (f"{_DOC}/*/Documentation/**/*.rst.gz", "none"),
        (f"{_DOC}/*/Documentation/**/*.txt.gz", "none"),
    ),
    "perl-doc": (("usr/share/perl/**/*.pod", "pod"),),
    # The pages are made of these sources; one of the two is enough.
    "python-sklearn-doc": ((f"{_DOC}/**/_sources/**/*.txt", "none"),),
    "python3.11-doc": ((f"{_DOC}/**/_sources/**/*.txt", "none"),),
    "wordnet-base": (("usr/share/wordnet/data.*", "wordnet"),),
}
_EXCLUDE = ("*/translations/*", "*/changelog*", "*/copyright", "*.dat", "*.u8")


def find(packages: Sequence[str], cache: str) -> list[tuple[Path, Markup]]:
    """The files of the packages, which are fetched where the folder `cache` lacks them.

    Raises UserError, naming the package, if that fails.
    """
    root = expanded(cache).absolute()
    exists(root)  # or says why that cannot be found out
    found: list[tuple[Path, Markup]] = []
    for package in packages:
        folder = root / package
        if not folder.is_dir():
            _fetch(package, folder)
        taken = []
        for parent, folders, names in os.walk(folder):  # does not follow links, by which packages name files twice
            folders.sort()
            for path in (Path(parent, name) for name in sorted(names)):
                below = path.relative_to(folder).as_posix()
                markup = _markup_of(below, _RULES.get(package, _ANY))
                excluded = any(fnmatch(below, pattern) for pattern in _EXCLUDE)
                if markup is not None and not excluded and not path.is_symlink():
                    taken.append((path, markup))
        if not taken:
            raise UserError(f"the Debian package {package} holds no documentation that is known here; remove it")
        found += taken
    return found


def _markup_of(path: str, rules: Sequence[Rule]) -> Markup | None:
    return next((markup for pattern, markup in rules if _as_expression(pattern).fullmatch(path)), None)


@functools.cache
def _as_expression(pattern: str) -> re.Pattern[str]:
    """A glob in which ** stands for any number of folders and * for no slash."""
    parts = {"**/": "(?:[^/]+/)*", "*": "[^/]*", "[a-z]": "[a-z]"}
    found = re.split(r"(\*\*/|\*|\[a-z\])", pattern)
    return re.compile("".join(parts.get(part, re.escape(part)) for part in found))


def _fetch(package: str, folder: Path) -> None:
    for program in ("apt-get", "dpkg-deb"):
        if shutil.which(program) is None:
            raise UserError(
                f"kind=debian needs the program {program}, which Debian and Ubuntu have; use another source"
            )
    partial = folder.with_name(f".{package}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        _run(["apt-get", "download", "-q", package], partial, package)
        [archive] = partial.glob("*.deb")
        _run(["dpkg-deb", "-x", archive.name, "content"], partial, package)
        (partial / "content").rename(folder)
    except OSError as error:
        raise UserError(f"cache folder {folder.parent} cannot be written ({error.strerror}); set cache") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _run(arguments: list[str], folder: Path, package: str) -> None:
    done = subprocess.run(
        arguments, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", errors="replace"
    )
    if done.returncode != 0:
        words = " ".join(line for line in done.stderr.split("\n") if line.startswith(("E:", "dpkg-deb:")))
        raise UserError(
            f"the Debian package {package} cannot be fetched by {arguments[0]} ({words or done.returncode}); "
            "run apt-get update, or remove it from packages"
        )
