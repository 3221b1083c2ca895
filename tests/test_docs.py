"""The pages name what is there: every link, anchor, path in backticks and path in a command leads to something."""

import re
from functools import cache
from pathlib import Path

import pytest

from lfm.training.loop import train
from tests.training.tiny_run import tiny_run

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "lfm").rglob("README.md")],
    key=lambda path: path.relative_to(ROOT).as_posix(),
)
PYTHON_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.M | re.S)
WITH_SNIPPETS = [page for page in PAGES if PYTHON_BLOCK.search(page.read_text(encoding="utf-8"))]
FENCED = re.compile(r"^```.*?^```$", re.M | re.S)
LINK = re.compile(r"\]\(([^)\s]+)\)")
SPAN = re.compile(r"`([^`\n]+)`")
TOP = ("lfm", "launch", "data_pipeline", "configs", "docs", "tests", "benchmarks", "slurm", "constraints")
PATH = re.compile(rf"(?<![\w/.])(?:{'|'.join(TOP)})/[\w./*{{}},-]*")
IN_TEXT = re.compile(PATH.pattern.removesuffix("*") + r"*?\.(?:py|cuh?|md|yaml|sh|ipynb)(?!\w)")
FOLDER = re.compile(PATH.pattern + r"(?<=/)(?!\S)")
FILE = re.compile(r"[\w-]+\.(?:py|cuh?|md|sh|ipynb)")
OWN = {"slurm/site.sh"}
"""What a reader writes."""
MODULE = re.compile(r"-m (data_pipeline(?:\.\w+)*)")
PLACEHOLDER = re.compile(r"(?<![A-Za-z0-9])(?:[A-Z]|[A-Z][A-Z_]+)(?![A-Za-z0-9])")
"""`lfm/models/X.py`, `docs/families/KIND.md`: any will do."""


@cache
def names() -> frozenset[str]:
    """Of all files of code and pages, without their folders."""
    return frozenset(path.name for folder in TOP for path in (ROOT / folder).rglob("*.*"))


def expanded(path: str) -> list[str]:
    """`a/{b,c}.py` is a/b.py and a/c.py."""
    found = re.search(r"\{([^{}]*)\}", path)
    if found is None:
        return [path]
    parts = [part.strip() for part in found[1].split(",")]
    return [whole for part in parts for whole in expanded(path[: found.start()] + part + path[found.end() :])]


def is_there(path: str) -> bool:
    pattern = PLACEHOLDER.sub("*", path.rstrip("/.,"))
    return any(ROOT.glob(pattern)) if "*" in pattern else (ROOT / pattern).exists()


def anchors(page: Path) -> set[str]:
    """As GitHub names headings."""
    headings = re.findall(r"^#+ +(.*)$", FENCED.sub("", page.read_text(encoding="utf-8")), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def gone(page: Path, text: str) -> list[str]:
    """What `text`, at the place of `page`, names and is not there."""
    prose = FENCED.sub("", text)
    found = []
    for target in LINK.findall(prose):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        linked = page.parent / name if name else page
        if not linked.exists() or (anchor and anchor not in anchors(linked)):
            found.append(target)
    spans = [word for span in SPAN.findall(prose) for word in span.split()]
    paths = {*IN_TEXT.findall(text), *FOLDER.findall(text), *(span for span in spans if PATH.fullmatch(span))} - OWN
    found += [whole for path in paths for whole in expanded(path) if not is_there(whole)]
    found += [span for span in spans if FILE.fullmatch(span) and span not in names() and not PLACEHOLDER.search(span)]
    modules = [module.replace(".", "/") for module in MODULE.findall(text)]
    found += [module for module in modules if not (is_there(module + ".py") or is_there(module + "/__init__.py"))]
    return sorted(set(found))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_what_a_page_names_is_there(page):
    assert gone(page, page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "text",
    [
        "[x](docs/none.md)",
        "[x](docs/data.md#no-such-heading)",
        "[x](#no-such-heading)",
        "`lfm/none.py`",
        "`lfm/none/`",
        "`lfm/job/{watch,none}.py`",
        "`configs/none_*.yaml`",
        "`none_of_this_name.py`",
        "```\npython launch/none.py\n```",
        "```\nlfm/none/   what is in it\n```",
        "    python -m data_pipeline.none",
    ],
)
def test_what_is_not_there_is_found(text):
    assert len(gone(ROOT / "README.md", text)) == 1


def test_what_is_there_is_not():
    text = (
        "# A heading\n[x](docs/data.md) [y](#the-tree) `lfm/job/{watch,exchange}.py` `configs/lfm_*.yaml` `watch.py` "
    )
    text += "`lfm/models/X.py` `docs/families/KIND.md` `runs/NAME/` `data/lfm_3b` -m data_pipeline.prepare"
    assert gone(ROOT / "README.md", text) == []


@pytest.fixture(scope="module")
def place(tmp_path_factory, text_data):
    """A folder where somebody trained the debug run, of two layers here."""
    folder = tmp_path_factory.mktemp("place")
    train(tiny_run(folder / "runs", text_data, "training.steps=1", "validation.max_rows=1"))
    return folder


@pytest.mark.parametrize("page", WITH_SNIPPETS, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_snippets_of_a_page_run_one_after_the_other(page, place, monkeypatch):
    monkeypatch.chdir(place)
    text, names = page.read_text(encoding="utf-8"), {"__name__": "__main__"}
    for block in PYTHON_BLOCK.finditer(text):
        lines_before = text[: block.start()].count("\n") + 1  # so that an error names the page's own line
        exec(compile("\n" * lines_before + block[1], str(page), "exec"), names)


def test_the_help_that_is_shown_is_the_help():
    from lfm.cli import usage

    page = (ROOT / "docs/seeing.md").read_text(encoding="utf-8")
    assert page.split("<!-- help -->\n```\n")[1].split("\n```\n<!-- /help -->")[0] == usage()


def test_there_are_snippets_to_run():
    assert {page.name for page in WITH_SNIPPETS} >= {"README.md", "library.md"}


def test_the_tree_of_the_readme_has_every_package_kernel_and_command():
    tree = (ROOT / "README.md").read_text(encoding="utf-8").partition("## The tree")[2].partition("```\n")[2]
    tree = tree.partition("```")[0]
    packages = [path.parent for path in (ROOT / "lfm").glob("*/__init__.py")]
    kernels = [path.parent for path in (ROOT / "lfm/kernels").glob("*/__init__.py")]
    commands = [path for path in (ROOT / "launch").glob("*.py") if path.name != "__init__.py"]
    assert [path.name for path in packages if path.name != "kernels" and f"lfm/{path.name}/" not in tree] == []
    assert [path.name for path in kernels if f"{path.name}/" not in tree] == []
    assert [path.name for path in commands if path.name not in tree] == []
