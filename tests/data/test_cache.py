"""Remote data sets: over S3's own protocol, within a limit of room, by several processes, and after kill -9."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from data_pipeline.verify import Verification
from lfm.data.cache import Cache, fetch, remove_abandoned, temporary_name
from lfm.data.format import read_index
from lfm.data.reader import ShardReader
from lfm.data.stream import BatchStream, DataConfig, open_training
from lfm.errors import UserError
from tests.data.corpus import SEQ_LENGTH, VOCAB_SIZE, make_data_set
from tests.ranks import run_on_ranks


class Store:
    """What S3 answers to those who read: HEAD and GET of /bucket/key, from a folder, over HTTP."""

    def __init__(self, folder: Path) -> None:
        self.fetched: list[str] = []
        self.failures: dict[str, int] = {}
        """How often the next requests for a file's name are answered by `503 Slow Down`."""
        store = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self, *, with_content: bool) -> None:
                path = folder / self.path.partition("?")[0].removeprefix("/bucket/")
                status, content = (200, path.read_bytes()) if path.is_file() else (404, b"")
                if with_content and store.failures.get(path.name, 0) > 0:
                    store.failures[path.name] -= 1
                    status, content = 503, b"<Error><Code>SlowDown</Code></Error>"
                elif with_content:
                    store.fetched.append(path.name)
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.send_header("ETag", '"0"')
                self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
                self.end_headers()
                if with_content:
                    self.wfile.write(content)

            def do_HEAD(self) -> None:
                self.answer(with_content=False)

            def do_GET(self) -> None:
                self.answer(with_content=True)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.environment = {
            "S3_ENDPOINT_URL": f"http://127.0.0.1:{self.server.server_port}",
            "AWS_ACCESS_KEY_ID": "made-up",
            "AWS_SECRET_ACCESS_KEY": "made-up",
            "AWS_MAX_ATTEMPTS": "1",  # so that the attempts are ours
            "NO_PROXY": "127.0.0.1",
        }
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture(scope="module")
def few_shards(tmp_path_factory):
    """Not many files, as each takes S3's client a while."""
    return make_data_set(tmp_path_factory.mktemp("few"), compression="zstd", shard_bytes=30_000)


@pytest.fixture
def s3(store):
    pytest.importorskip("s3fs", reason="needs the extra `remote`")
    return store


@pytest.fixture
def store(few_shards, monkeypatch):
    store = Store(few_shards)
    for name, value in store.environment.items():
        monkeypatch.setenv(name, value)
    yield store
    store.server.shutdown()
    store.server.server_close()


def test_verify_hashes_a_data_set_in_s3(s3, few_shards):
    found = Verification("s3://bucket", full=True).run()
    assert found.problems == [] and found.num_files == len(list(few_shards.glob("*/*.zstd")))
    (problem,) = Verification("s3://bucket/elsewhere", full=False).run().problems[:1]
    assert "s3://bucket/elsewhere/tokenizer.json cannot be fetched" in problem


def test_what_s3_has_not_at_the_moment_is_asked_for_again_and_what_it_has_not_at_all_is_not(s3, tmp_path):
    s3.failures["index.json"] = 2
    fetch("s3://bucket/train/index.json", tmp_path / "index.json", timeout_seconds=60)
    assert s3.failures["index.json"] == 0
    start = time.monotonic()
    with pytest.raises(UserError, match=r"s3://bucket/train/nowhere\.json cannot be fetched"):
        fetch("s3://bucket/train/nowhere.json", tmp_path / "nowhere.json", timeout_seconds=60)
    assert time.monotonic() - start < 5


def test_a_store_that_is_busy_for_a_while_is_asked_again(store, tmp_path):
    pytest.importorskip("aiohttp", reason="needs the extra `remote`")
    url = f"{store.environment['S3_ENDPOINT_URL']}/bucket/train"
    store.failures["index.json"] = 2
    start = time.monotonic()
    fetch(f"{url}/index.json", tmp_path / "index.json", timeout_seconds=60)
    assert store.failures["index.json"] == 0 and time.monotonic() - start > 1  # half a second, and then one
    store.failures["index.json"] = 99
    with pytest.raises(UserError, match=rf"{url}/index\.json cannot be fetched"):
        fetch(f"{url}/index.json", tmp_path / "again.json", timeout_seconds=60)
    assert store.failures["index.json"] == 95
    start = time.monotonic()
    with pytest.raises(UserError, match=rf"{url}/nowhere\.json cannot be fetched"):
        fetch(f"{url}/nowhere.json", tmp_path / "nowhere.json", timeout_seconds=60)
    assert time.monotonic() - start < 5  # what is not there is not asked for again
    assert [path.name for path in tmp_path.iterdir()] == ["index.json"]


def test_a_protocol_whose_package_is_missing_is_said_at_once(tmp_path):
    start = time.monotonic()
    with pytest.raises(UserError, match=r"oci://.* cannot be fetched \(oci:// needs a package: .*ocifs"):
        fetch("oci://bucket/train/index.json", tmp_path / "index.json", timeout_seconds=60)
    assert time.monotonic() - start < 2 and not list(tmp_path.iterdir())


def epoch_on_a_rank(rank, config, turns, environment):
    """All rows of an epoch, through the ranks' common cache; with `turns`, in another order on each."""
    os.environ.update(environment)  # ranks are forked from a server that an earlier test may have started
    reader = open_training(config, seq_length=SEQ_LENGTH, vocab_size=VOCAB_SIZE, rows_per_step=4)
    stream = BatchStream(reader, seed=rank if turns else 0, rows_per_step=4, prefetch_threads=2)
    batches = [stream.next().ids for _ in range(len(reader) // 4)]
    stream.close()
    return torch.cat(batches).tolist()


def test_ranks_of_a_node_read_from_s3_and_fetch_each_shard_once(s3, few_shards, tmp_path):
    config = DataConfig(path=str(tmp_path / "cache"), remote="s3://bucket")
    first, second = run_on_ranks(epoch_on_a_rank, 2, config, False, s3.environment)
    alone = open_training(
        DataConfig(path=str(few_shards)), seq_length=SEQ_LENGTH, vocab_size=VOCAB_SIZE, rows_per_step=4
    )
    assert first == second == alone.read(alone.order(0, 0, len(first))).ids.tolist()
    shards = [name for name in s3.fetched if name.startswith("shard")]
    assert len(shards) == len(set(shards)) == len(read_index(few_shards / "train")[1]) > 1


def size_of_shards(folder):
    return sum(path.stat().st_size for path in folder.glob("shard.*"))


@pytest.mark.parametrize("kind", ["raw", "zstd"])
def test_a_cache_keeps_its_limit_and_the_rows_stay_right(kind, request, raw_data_set, tmp_path):
    data = request.getfixturevalue(f"{kind}_data_set") / "train"
    shards = read_index(data)[1]
    largest = max(shard["raw_data"]["bytes"] + (shard["zip_data"] or {"bytes": 0})["bytes"] for shard in shards)
    limit = 3 * largest
    assert size_of_shards(data) > limit or kind == "zstd"
    reader = ShardReader(tmp_path / "cache", remote=str(data), cache_limit_bytes=limit)
    want = ShardReader(raw_data_set / "train")
    for row in reader.order(0, 0, len(reader)):
        assert torch.equal(reader.read([row]).ids, want.read([row]).ids)
        assert size_of_shards(tmp_path / "cache") <= limit
    with pytest.raises(UserError, match=f"cache_limit_bytes={largest} does not hold two shards"):
        ShardReader(tmp_path / "cache", remote=str(data), cache_limit_bytes=largest)


def test_processes_that_remove_each_others_shards_read_on(raw_data_set, tmp_path):
    data = raw_data_set / "train"
    largest = max(shard["raw_data"]["bytes"] for shard in read_index(data)[1])
    changes = {"remote": str(raw_data_set), "cache_limit_bytes": 3 * largest}
    run_on_ranks(epoch_on_a_rank, 2, DataConfig(path=str(tmp_path / "cache"), **changes), True, {})
    assert size_of_shards(tmp_path / "cache/train") <= 5 * largest  # each may bring one more at the same moment


HOLD = """
import sys, time
from pathlib import Path
from lfm.data.cache import Cache, temporary_name
cache = Cache(Path(sys.argv[1]), timeout_seconds=1, limit_bytes=None)
with cache.alone(0):
    temporary_name(cache.folder / "shard.00000.mds").write_bytes(b"half")
    (cache.folder / f"{temporary_name(cache.folder / 'shard.00000.mds').name}.tmp").write_bytes(b"half")
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that is fetching shard 0 into the cache, and never ends by itself."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "cache")], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_process_that_hangs_while_it_fetches_is_told_of_in_time(holder, raw_data_set, tmp_path):
    remote = str(raw_data_set / "train")
    reader = ShardReader(tmp_path / "cache", remote=remote, fetch_timeout_seconds=1)
    with pytest.raises(UserError, match=r"fetching shard 0 into .* longer than fetch_timeout_seconds=1;"):
        reader.read([0])


def test_nothing_of_a_killed_process_stays_and_nobody_waits_for_it(holder, raw_data_set, tmp_path):
    shared_memory = set(os.listdir("/dev/shm"))
    remote = str(raw_data_set / "train")
    assert len(list((tmp_path / "cache").glob(".*.tmp*"))) == 2
    ShardReader(tmp_path / "cache", remote=remote)
    assert len(list((tmp_path / "cache").glob(".*.tmp*"))) == 2  # of one that lives
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    start = time.monotonic()
    reader = ShardReader(tmp_path / "cache", remote=remote)
    reader.read(range(len(reader)))
    assert time.monotonic() - start < 10
    assert sorted(path.name for path in (tmp_path / "cache").iterdir() if not path.name.startswith("shard.")) == [
        ".lock",
        "index.json",
    ]
    ours = [name for name in set(os.listdir("/dev/shm")) - shared_memory if re.search("shard|lfm|mds", name)]
    assert ours == []


def test_temporary_files_of_other_hosts_stay_for_a_day(tmp_path):
    own = temporary_name(tmp_path / "shard.00000.mds")
    host = socket.gethostname().replace(".", "-")
    young, old = (tmp_path / own.name.replace(host, name) for name in ("elsewhere", "far-away"))
    for path in (own, young, old, tmp_path / ".notes.tmp"):
        path.touch()
    os.utime(old, (time.time() - 90_000,) * 2)
    remove_abandoned(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {own.name, young.name, ".notes.tmp"}


def test_a_cache_that_cannot_be_written_is_an_error(raw_data_set, tmp_path):
    (tmp_path / "cache").touch()
    with pytest.raises(UserError, match="cache"):
        ShardReader(tmp_path / "cache", remote=str(raw_data_set / "train"))
    with pytest.raises(FileExistsError):
        Cache(tmp_path / "cache", timeout_seconds=1, limit_bytes=None)
