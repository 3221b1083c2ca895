"""Compressed files and endless records: time in proportion to the input, memory to the largest record."""

import bz2
import gzip
import io
import json
import lzma
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.unpack import Damaged, Limits, opened, records
from lfm.errors import UserError
from tests.data_pipeline.test_sources import read, write_zst

LIMITS = Limits(record_bytes=1 << 22, expansion=250)
PACK = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}


@given(st.lists(st.sampled_from([b"a", b"ab", b"\n", b"--", b"-", b"\n\n"])), st.sampled_from([b"\n", b"--", b"-a-"]))
def test_records_are_what_split_gives_but_for_long_ones(parts, separator):
    content = b"".join(parts)
    wanted = content.split(separator)
    wanted = wanted[:-1] if wanted[-1] == b"" else wanted

    class Drops(io.BytesIO):
        """A stream that comes in single bytes."""

        def read(self, size=-1):
            return super().read(1)

    for stream in (io.BytesIO, Drops):
        assert list(records(stream(content), separator, 100)) == wanted
        assert list(records(stream(content), separator, 3)) == [r if len(r) <= 3 else None for r in wanted]


@pytest.mark.parametrize("kind", PACK)
def test_several_streams_in_a_file_are_read_and_a_cut_one_is_named(kind, tmp_path):
    path = tmp_path / f"a.{kind}"
    path.write_bytes(PACK[kind](b"one ") + PACK[kind](b"two" * 500_000))
    with opened(path, LIMITS) as (stream, _):
        assert b"".join(iter(lambda: stream.read(1000), b"")) == b"one " + b"two" * 500_000
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(Damaged, match=rf"a\.{kind} is damaged"), opened(path, LIMITS) as (stream, _):
        while stream.read(1000):
            pass


@pytest.mark.parametrize("kind", [*PACK, "zst"])
def test_json_lines_and_texts_are_unpacked_and_what_expands_beyond_measure_is_refused(kind, tmp_path):
    line, bomb = json.dumps({"text": "x"}).encode() + b"\n", bytes(4_000_000)
    for name, content in (("a.jsonl", line * 3), ("b.txt", b"plain"), ("bomb.jsonl", bomb), ("bomb.txt", bomb)):
        path = tmp_path / f"{name}.{kind}"
        if kind == "zst":
            write_zst(path, content)
        else:
            path.write_bytes(PACK[kind](content))
    source = {"max_record_bytes": 1000, "max_expansion": 50}
    assert read({"kind": "jsonl", "paths": [f"{tmp_path}/a.*"], **source}) == ["x"] * 3
    counts = Counter()
    assert read({"kind": "text", "paths": [f"{tmp_path}/b*.txt.{kind}"], **source}, counts) == ["plain"]
    assert counts["files_too_large"] == 1 and counts["files_read"] == 1
    source["max_record_bytes"] = 1 << 27
    assert read({"kind": "text", "paths": [f"{tmp_path}/bomb.txt.{kind}"], **source}, counts) == []
    assert counts["files_too_large"] == 2
    source["max_record_bytes"] = 1000
    with pytest.raises(UserError, match=r"bomb\.jsonl\.\w+ has .* unpacks to more than 50 times .* max_expansion"):
        read({"kind": "jsonl", "paths": [f"{tmp_path}/bomb.jsonl.{kind}"], **source})


def test_memory_is_that_of_the_largest_record(tmp_path):
    """Preparing 300 MB in a line, in a file and unpacked takes little more than preparing nothing."""
    long = b'{"text": "' + b"x" * 300_000_000 + b'"}\n'
    (tmp_path / "long.jsonl").write_bytes(long + b'{"text": "short"}\n')
    with gzip.open(tmp_path / "long.jsonl.gz", "wb", compresslevel=1) as file:
        file.write(long)
    with gzip.open(tmp_path / "long.txt.gz", "wb", compresslevel=1) as file:
        file.write(long)
    code = """
import resource, sys
from collections import Counter
from pydantic import TypeAdapter
from data_pipeline.batches import documents
from data_pipeline.sources import SourceConfig, find_files, read_batches
folder, counts = sys.argv[1], Counter()
make = TypeAdapter(SourceConfig).validate_python
limit = {"max_record_bytes": 1 << 20, "max_expansion": 2000}
lines, text = ({"kind": kind, "paths": [folder], **limit} for kind in ("jsonl", "text"))
sources = [make(lines), make({**text, "suffixes": [".txt.gz"]})]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = [d.text for b in read_batches(sources, find_files(sources, counts)) for d in documents(b, counts)]
assert found == ["short"], found
print(counts["documents_too_long"], counts["files_too_large"])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    too_long, too_large, kib = map(int, done.stdout.split())
    assert (too_long, too_large) == (2, 1) and kib < 50_000
