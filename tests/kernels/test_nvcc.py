from concurrent.futures import ThreadPoolExecutor

import pytest

from lfm.kernels import nvcc
from lfm.kernels.reservoir.cluster import SOURCE


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """Makes `script` the nvcc of this process; its `$out` is the file to write.  Returns the folder of libraries."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))

    def install(script):
        file = tmp_path / "bin" / "nvcc"
        find_out = 'while [ "$1" != -o ]; do shift; done; out=$2'
        file.write_text(f"#!/bin/sh\n{find_out}\n{script}\n")
        file.chmod(0o755)
        return tmp_path / "cache" / "lfm"

    return install


def libraries(folder):
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def test_processes_that_start_together_compile_once(compiler, tmp_path):
    folder = compiler(f'echo compiled >> {tmp_path}/log; sleep 0.3; echo whole > "$out"')
    with ThreadPoolExecutor(4) as pool:  # the lock belongs to the open file, so threads stand for processes
        found = set(pool.map(lambda _: nvcc.compile_library(SOURCE, ("-O3",)), range(4)))
    assert [path.read_text() for path in found] == ["whole\n"]
    assert (tmp_path / "log").read_text() == "compiled\n"
    assert libraries(folder) == [path.name for path in found]


def test_a_compiler_that_is_killed_leaves_neither_a_library_nor_a_lock(compiler):
    folder = compiler('echo half > "$out"; kill -9 $$')
    with pytest.raises(nvcc.Unavailable, match=r"nvcc failed on cluster\.cu"):
        nvcc.compile_library(SOURCE, ())
    assert libraries(folder) == []
    compiler('echo whole > "$out"')
    assert nvcc.compile_library(SOURCE, ()).read_text() == "whole\n"


def test_a_library_is_compiled_anew_for_another_source_or_other_flags(compiler, tmp_path):
    compiler('echo whole > "$out"')
    other = tmp_path / "cluster.cu"
    other.write_text("another")
    found = {nvcc.compile_library(SOURCE, flags) for flags in ((), ("-O2",), ())}
    assert len(found | {nvcc.compile_library(other, ())}) == 3


def test_a_library_is_compiled_anew_for_another_header(compiler, tmp_path):
    compiler('echo whole > "$out"')
    source, header = tmp_path / "kernel.cu", tmp_path / "kernel.cuh"
    source.write_text("source")
    found = set()
    for text in ("one", "another", "one"):
        header.write_text(text)
        found.add(nvcc.compile_library(source, ()))
    assert len(found) == 2


def test_what_the_compiler_says_is_passed_on(compiler):
    compiler('echo "error: no such architecture" >&2; exit 1')
    with pytest.raises(nvcc.Unavailable, match="no such architecture"):
        nvcc.compile_library(SOURCE, ())


def test_a_missing_compiler_is_named_with_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(nvcc.Unavailable, match=f"no nvcc under CUDA_HOME={tmp_path}; install"):
        nvcc.find_nvcc()
