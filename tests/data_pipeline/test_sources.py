"""Every kind of source gives the same documents; compressed, damaged and missing inputs."""

import gzip
import io
import json
import shutil
import subprocess
import sys
from collections import Counter

import pytest
from pydantic import TypeAdapter

from data_pipeline.batches import documents
from data_pipeline.sources import SourceConfig, find_files, read_batches
from lfm.errors import UserError

TEXTS = [f"text {i} \u4f60\u597d\n" * (i + 1) for i in range(300)]
LINES = b"".join(json.dumps({"text": text, "id": i}).encode() + b"\n" for i, text in enumerate(TEXTS))


def read(tree, counts=None):
    sources = [TypeAdapter(SourceConfig).validate_python(tree)]
    counts = Counter() if counts is None else counts
    return [
        document.text
        for batch in read_batches(sources, find_files(sources, counts))
        for document in documents(batch, counts)
    ]


def write_zst(path, content):
    pyarrow = pytest.importorskip("pyarrow")
    with pyarrow.CompressedOutputStream(str(path), "zstd") as file:
        file.write(content)


@pytest.fixture(scope="module")
def columns():
    pyarrow = pytest.importorskip("pyarrow")
    return pyarrow.table({"id": list(range(len(TEXTS))), "text": TEXTS})


def test_json_lines_are_the_same_plain_and_compressed(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINES)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(LINES[:1000]) + gzip.compress(LINES[1000:]))
    write_zst(tmp_path / "c.jsonl.zst", LINES)
    counts = Counter()
    assert read({"kind": "jsonl", "paths": [str(tmp_path)]}, counts) == TEXTS * 3
    assert (counts["files_found"], counts["files_read"]) == (3, 3)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_a_damaged_archive_is_named(name, tmp_path):
    if name.endswith(".gz"):
        (tmp_path / name).write_bytes(gzip.compress(LINES)[:-20])
    else:
        write_zst(tmp_path / name, LINES)
        (tmp_path / name).write_bytes(b"\x00" * 30 + (tmp_path / name).read_bytes()[30:])
    with pytest.raises(UserError, match=r"a\.jsonl\.\w+ is damaged .* fetch it again, or exclude it"):
        read({"kind": "jsonl", "paths": [str(tmp_path)]})


def test_parquet_rows_are_documents_and_a_wrong_column_is_named(columns, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(columns, tmp_path / "a.parquet", row_group_size=70)
    assert read({"kind": "parquet", "paths": [str(tmp_path)]}) == TEXTS
    with pytest.raises(UserError, match=r"no column text_key='body' \(its columns: id, text\)"):
        read({"kind": "parquet", "paths": [str(tmp_path)], "text_key": "body"})
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(UserError, match=r"a\.parquet is damaged"):
        read({"kind": "parquet", "paths": [str(tmp_path)]})


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("builder", ["json", "parquet", "arrow", "text"])
def test_hugging_face_builders_read_local_files(builder, streaming, columns, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    path, wanted = tmp_path / f"a.{builder}", TEXTS
    if builder == "json":
        path.write_bytes(LINES)
    elif builder == "text":
        wanted = [line for text in TEXTS[:20] for line in text.split("\n") if line]
        path.write_text("".join(TEXTS[:20]))
    elif builder == "parquet":
        pytest.importorskip("pyarrow.parquet").write_table(columns, path)
    else:
        datasets.Dataset(columns).save_to_disk(tmp_path / "saved")
        path = next((tmp_path / "saved").glob("*.arrow"))
    tree = {"kind": "huggingface", "path": builder, "data_files": [str(path)], "streaming": streaming}
    assert read(tree) == wanted
    with pytest.raises(UserError, match=r"has no column text_key='body'"):
        read({**tree, "text_key": "body"})


def test_a_hugging_face_data_set_that_cannot_be_read_is_one_sentence(tmp_path):
    pytest.importorskip("datasets")
    with pytest.raises(UserError, match=r"path=json split=train cannot be read .*; check its name") as caught:
        read({"kind": "huggingface", "path": "json", "data_files": [str(tmp_path / "gone.json")]})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("separator", [None, "\n<|endoftext|>\n"])
def test_standard_input_gives_documents(separator, monkeypatch):
    content = LINES if separator is None else separator.join(TEXTS).encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))
    assert read({"kind": "stdin", "separator": separator}) == TEXTS


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="dpkg-deb is not installed")
def test_a_debian_package_is_unpacked_by_its_rules_and_fetched_once(tmp_path, monkeypatch):
    root = tmp_path / "build"
    doc = root / "usr/share/doc/example"
    doc.mkdir(parents=True)
    (root / "DEBIAN").mkdir()
    (root / "DEBIAN/control").write_text(
        "Package: example\nVersion: 1\nArchitecture: all\nMaintainer: x <x@example.org>\nDescription: x\n"
    )
    (doc / "a.html").write_text("<head><title>no</title></head><p>one &amp; two</p>")
    (doc / "b.txt.gz").write_bytes(gzip.compress("caf\xe9".encode("latin-1")))
    (doc / "changelog.txt").write_text("left out")
    subprocess.run(["dpkg-deb", "-b", root, tmp_path / "example_1_all.deb"], check=True, capture_output=True)
    # A stand-in for apt-get, whose mirror a test cannot count on; dpkg-deb is the real one.
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/apt-get").write_text(
        f'#!/bin/sh\n[ "$3" = example ] && cp {tmp_path}/example_1_all.deb . && exit\n'
        'echo "E: no package $3" >&2; exit 100\n'
    )
    (tmp_path / "bin/apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin", prepend=":")
    tree = {"kind": "debian", "packages": ["example"], "cache": str(tmp_path / "cache")}
    assert read(tree) == ["one & two", "caf\xe9"]
    (tmp_path / "example_1_all.deb").unlink()
    assert read(tree) == ["one & two", "caf\xe9"]
    with pytest.raises(
        UserError, match=r"package gone cannot be fetched by apt-get \(E: no package gone\); run apt-get"
    ):
        read({**tree, "packages": ["gone"]})
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="kind=debian needs the program apt-get"):
        read({**tree, "packages": ["gone"]})
