"""The notebooks are true: each runs from its first cell to its last, and is stored without outputs."""

import json
import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


def code_cells(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_there_are_notebooks_in_reading_order():
    assert [path.name[:3] for path in NOTEBOOKS] == [f"{i:02d}_" for i in range(1, len(NOTEBOOKS) + 1)]
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_without_traces_of_a_run(path):
    text = path.read_text(encoding="ascii")
    notebook = json.loads(text)
    assert code_cells(notebook)
    for index, cell in enumerate(code_cells(notebook)):
        assert cell["outputs"] == [] and cell["execution_count"] is None, f"code cell {index} holds a result"
    # A kernel's own name, Python version and cell metadata tell of the machine that saved it.
    assert notebook["metadata"] == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    assert all(cell["metadata"] == {} for cell in notebook["cells"])
    ids = [cell["id"] for cell in notebook["cells"]]
    assert ids == sorted(set(ids)), "cells are numbered in their order"
    # Paths of the project are relative; an absolute one begins where nothing of a longer path stands before it.
    assert re.findall(r"(?<![\w.:/}])/\w+/", text) == [], f"{path.name} names a path of one machine"
    assert text == json.dumps(notebook, indent=1) + "\n"


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_leaves_nothing_behind(path, tmp_path, monkeypatch):
    reason = "needs the extra `notebooks`: pip install -e '.[notebooks]'"
    nbformat = pytest.importorskip("nbformat", reason=reason)
    nbclient = pytest.importorskip("nbclient", reason=reason)
    pytest.importorskip("ipykernel", reason=reason)
    here, temporary, settings = (tmp_path / name for name in ("here", "temporary", "settings"))
    for folder in (here, temporary, settings):
        folder.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("TMPDIR", str(temporary))
    # Kernels and settings of this environment alone, whatever the user has.
    monkeypatch.delenv("JUPYTER_PATH", raising=False)
    for variable in ("JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(variable, str(settings))

    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    # A cell that fails raises CellExecutionError, with the cell and its traceback.
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(here)}}).execute()

    for cell in code_cells(notebook):
        shown = ["image/png" in output.get("data", {}) for output in cell["outputs"]]
        assert sum(shown) == cell["source"].count("Image("), f"a figure is missing:\n{cell['source']}"
    assert os.listdir(here) == []
    assert [name for name in os.listdir(temporary) if name.startswith("tmp")] == []
