"""Where a data set goes: behind links, into mount points, beside copies; and what is there is replaced or stays."""

import shutil
import subprocess
import sys

import pytest

from data_pipeline.labelled import LABELS_NAME
from data_pipeline.labelled import main as labelled
from data_pipeline.prepare import prepare
from data_pipeline.verify import Verification
from lfm.errors import UserError
from lfm.files import partial_folder, replace_folder
from tests.data.corpus import config, texts, write_texts
from tests.data_pipeline.test_labelled import codes as codes


@pytest.fixture
def source(tmp_path):
    return write_texts(tmp_path / "text", texts(40))


def is_whole(folder):
    return not Verification(str(folder), full=True).run().problems


@pytest.mark.parametrize("is_there", [True, False])
def test_a_data_set_goes_behind_the_link_that_is_its_output(is_there, source, tmp_path):
    (tmp_path / "big").mkdir()
    (tmp_path / "link").symlink_to("big/data")
    if is_there:
        (tmp_path / "big/data").mkdir()
    for seed in range(3):
        prepare(config(source, tmp_path / "link", seed=seed, overwrite=True))
        assert (tmp_path / "link").is_symlink() and is_whole(tmp_path / "big/data")
    assert sorted(path.name for path in (tmp_path / "big").iterdir()) == [".data.lock", "data"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["big", "link", "text"]


def test_labelled_texts_go_behind_links_too(codes, tmp_path):
    (tmp_path / "big").mkdir()
    (tmp_path / "link").symlink_to("big/data")
    for _ in range(2):
        flags = [f"source.path={codes}", f"output={tmp_path}/link", "overwrite=true"]
        labelled(["--config", "configs/data/medical_icd10.yaml", *flags])
        assert (tmp_path / "link").is_symlink() and (tmp_path / "big/data" / LABELS_NAME).exists()


def test_a_copy_with_its_links_followed_is_a_data_set_of_its_own(source, tmp_path):
    prepare(config(source, tmp_path / "big/data"))
    (tmp_path / "link").symlink_to("big/data")
    subprocess.run(["cp", "-rL", tmp_path / "link", tmp_path / "copy"], check=True)
    before = (tmp_path / "big/data/report.json").read_bytes()
    prepare(config(source, tmp_path / "copy"))  # there already
    prepare(config(source, tmp_path / "copy", seed=1, overwrite=True))
    assert is_whole(tmp_path / "copy") and (tmp_path / "big/data/report.json").read_bytes() == before


@pytest.fixture(params=["tmpfs", "bind"])
def mounted(request, tmp_path):
    folder = tmp_path / "a mount"
    folder.mkdir()
    (tmp_path / "disk").mkdir()
    of = ["-t", "tmpfs", "none"] if request.param == "tmpfs" else ["--bind", str(tmp_path / "disk")]
    if subprocess.run(["mount", *of, folder], capture_output=True).returncode != 0:
        pytest.skip("mounting is not permitted here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_mount_point_is_filled_and_refilled(mounted, source, tmp_path):
    (mounted / "lost+found").mkdir()
    for seed in range(2):
        prepare(config(source, mounted, seed=seed, overwrite=True))
        assert is_whole(mounted) and not [path.name for path in mounted.iterdir() if path.name.startswith(".")]
    assert (mounted / "lost+found").exists()
    report = (mounted / "report.json").read_bytes()
    with pytest.raises(UserError, match="leaves the validation split empty"):
        prepare(config(source, mounted, validation_fraction=1e-9, overwrite=True))
    assert is_whole(mounted) and (mounted / "report.json").read_bytes() == report
    (tmp_path / "note").write_text("mine")
    shutil.rmtree(mounted / "train")
    (mounted / "report.json").unlink()
    with pytest.raises(UserError, match="is no data set of this program"):
        prepare(config(source, mounted))


def test_a_mount_point_never_shows_a_part_of_each(mounted):
    """Killed at every rename: what can be read by its usual names is the old, the new, or too little to be either."""
    code = """
import os, sys
from pathlib import Path
from lfm.files import partial_folder, replace_folder
folder, left = Path(sys.argv[1]), int(sys.argv[2])
def stop(event, args):
    global left
    if event == "os.rename":
        left -= 1
        if left < 0:
            os._exit(9)
sys.addaudithook(stop)
replace_folder(folder, by=partial_folder(folder))
"""
    names = ("a", "b", "c")
    for killed_at in range(len(names) * 2 + 1):
        for path in mounted.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        new = partial_folder(mounted)
        assert new.parent == mounted
        new.mkdir()
        for name in names:
            (mounted / name).write_text("old")
            (new / name).write_text("new")
        done = subprocess.run([sys.executable, "-c", code, str(mounted), str(killed_at)])
        found = {(mounted / name).read_text() for name in names if (mounted / name).exists()}
        assert len(found) < 2 and done.returncode == (9 if killed_at < len(names) * 2 else 0)
    assert found == {"new"} and sorted(path.name for path in mounted.iterdir()) == list(names)


def test_a_folder_is_replaced_whole(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/old").write_text("old")
    new = partial_folder(tmp_path / "a")
    new.mkdir()
    (new / "new").write_text("new")
    replace_folder(tmp_path / "a", by=new)
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "new"]
