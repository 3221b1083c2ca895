"""Text and tokenizers from servers: real ones, of this machine, that speak as the web and the hub do."""

import json
import os
import subprocess
import sys
import threading
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from data_pipeline import remote
from data_pipeline.prepare import prepare
from data_pipeline.prepare_config import PrepareConfig, lasting
from data_pipeline.sources import TextConfig, find_files
from lfm.data.reader import ShardReader
from lfm.data.tokenizer import train_bpe
from lfm.errors import UserError
from tests.data.corpus import config, texts, write_texts


@contextmanager
def server(answers):
    """`answers` maps a path to (status, headers, body); yields the address and the requests that came."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def answer(self, *, with_body):
            asked.append(f"{self.command} {self.path}")
            status, headers, body = answers.get(self.path, (404, {"X-Error-Code": "RepoNotFound"}, b""))
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                if value is not None:
                    self.send_header(name, value)
            self.end_headers()
            if with_body:
                self.wfile.write(body)

        def do_GET(self):
            self.answer(with_body=True)

        def do_HEAD(self):
            self.answer(with_body=False)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_address[1]}", asked
        http.shutdown()


def test_text_of_the_web_is_fetched_once_and_named_when_it_cannot_be(tmp_path, monkeypatch):
    pytest.importorskip("aiohttp")
    monkeypatch.setattr(remote, "CACHE", str(tmp_path / "cache"))
    text = "\n".join(texts(50)).encode()
    with server({"/a/book.txt": (200, {"ETag": '"1"'}, text)}) as (address, asked):
        source = TextConfig(paths=(f"{address}/a/book.txt",))
        ((found,),) = find_files([source], Counter())
        assert found.path.read_bytes() == text and found.path.name == "book.txt"
        asked.clear()
        assert find_files([source], Counter()) == [[found]]
        assert not [request for request in asked if request.startswith("GET")], "it is kept"
        with pytest.raises(UserError, match=r"/none\.txt leads to no file; correct it"):
            find_files([TextConfig(paths=(f"{address}/none.txt",))], Counter())
    with pytest.raises(UserError, match=r"cannot be fetched \(.*\); check the address and the connection"):
        find_files([TextConfig(paths=(f"{address}/b.txt",))], Counter())


def test_a_file_that_changes_on_the_server_is_fetched_anew(tmp_path, monkeypatch):
    pytest.importorskip("aiohttp")
    monkeypatch.setattr(remote, "CACHE", str(tmp_path / "cache"))
    answers = {}
    untold = {"Content-Length": None}
    with server(answers) as (address, asked):

        def read(path, headers, body):
            answers[path.replace("/..", "/")] = (200, headers, body)
            ((found,),) = find_files([TextConfig(paths=(f"{address}{path}",))], Counter())
            assert found.path.read_bytes() == body and found.path.is_relative_to(tmp_path / "cache")
            return found

        for name in ("Last-Modified", "Content-MD5", "Digest"):
            old, new = ({name: f"Mon, 0{day} Jan 2024 00:00:00 GMT"} for day in (1, 2))
            read(f"/{name}.txt", old, b"one")
            read(f"/{name}.txt", new, b"two")
            asked.clear()
            read(f"/{name}.txt", new, b"two")
            assert asked == [f"HEAD /{name}.txt"], "it is kept"
        read("/untold.txt", untold, b"one")
        assert read("/untold.txt", untold, b"two") == read("/untold.txt", untold, b"two"), (
            "its time is that of its change"
        )
        assert read("/..", {}, b"text").path.name == "index"


@pytest.mark.parametrize(
    "url, words",
    [
        ("reference://x", r"reference://x cannot be fetched \(TypeError"),
        ("ftp://127.0.0.1:1/x", r"ftp://127\.0\.0\.1:1/x cannot be fetched \(ConnectionRefusedError"),
        ("zip://a::/tmp/none.zip", r"zip://a::/tmp/none\.zip leads to no file"),
        ("http://[::1/x", r"http://\[::1/x cannot be fetched"),
        ("http://me:s3cr3t@127.0.0.1:1/x", r"http://me:\*\*\*@127\.0\.0\.1:1/x cannot be fetched"),
        ("ftp://me:s3c:r3t@s3cr3t@127.0.0.1:1/x", r"ftp://me:\*\*\*@127\.0\.0\.1:1/x cannot be fetched"),
        ("s3://me:s3cr3t@bucket/x", r"s3://me:\*\*\*@bucket/x cannot be fetched"),
        ("none://me:s3cr3t@bucket/x", r"none://me:\*\*\*@bucket/x: no file system"),
    ],
)
def test_what_no_file_system_can_open_is_one_sentence_without_passwords(url, words, tmp_path, monkeypatch):
    pytest.importorskip("s3fs")
    monkeypatch.setattr(remote, "CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError, match=f"source path {words}") as raised:
        find_files([TextConfig(paths=(url,))], Counter())
    assert "s3c" not in str(raised.value)


def test_a_remote_data_set_that_cannot_be_fetched_does_not_tell_the_password(tmp_path):
    with pytest.raises(UserError, match=r"file:/.*me:\*\*\*@host/index\.json cannot be fetched") as raised:
        ShardReader(tmp_path / "cache", remote="file://me:s3cr3t@host")
    assert "s3cr3t" not in str(raised.value)


def test_folders_and_globs_of_a_file_system(tmp_path, monkeypatch):
    import fsspec

    monkeypatch.setattr(remote, "CACHE", str(tmp_path / "cache"))
    memory = fsspec.filesystem("memory")
    for name in ("x/a.txt", "x/b/c.txt", "x/d.bin"):
        memory.pipe_file(f"/own-text/{name}", name.encode())
    monkeypatch.setattr(remote, "_PACKAGES", {})

    def read(url, **keys):
        ((*found,),) = find_files([TextConfig(paths=(url,), **keys)], Counter())
        return [file.path.read_text() for file in found]

    assert read("memory://own-text/x") == ["x/a.txt", "x/b/c.txt"]
    assert read("memory://own-text/x", exclude=("b/*",)) == ["x/a.txt"]
    assert read("memory://own-text/x/*.bin") == ["x/d.bin"]
    with pytest.raises(UserError, match=r"leads to no .*file; correct it"):
        read("memory://own-text/x/*.md")


def prepared(folder, tokenizer, **environment):
    command = [sys.executable, "-m", "data_pipeline.prepare", "--config", str(folder / "run.yaml")]
    return subprocess.run(
        [*command, f"tokenizer={tokenizer}", f"output={folder}/of_{'_'.join(Path(tokenizer).parts[-2:])}"],
        env=os.environ | {"HF_HOME": str(folder / "hub"), "HF_HUB_DISABLE_TELEMETRY": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def sentences(folder, names, address):
    """What is said when tokenizers of these names are wanted."""
    code = """if True:
        import sys
        from data_pipeline.make_tokenizer import tokenizer_file
        from data_pipeline.prepare_config import TokenizerConfig
        from lfm.errors import UserError
        for name in sys.argv[1:]:
            try:
                print(tokenizer_file(TokenizerConfig(file=name)))
            except UserError as error:
                print(error)
    """
    environment = os.environ | {"HF_HOME": str(folder / "hub"), "HF_ENDPOINT": address}
    found = subprocess.run([sys.executable, "-c", code, *names], env=environment, capture_output=True, text=True)
    assert found.returncode == 0 and found.stderr == "", found.stderr
    return found.stdout.splitlines()


def test_a_tokenizer_of_the_hub_by_its_name(tmp_path):
    documents = texts(80)
    definition = train_bpe(documents, 300).definition
    headers = {"ETag": '"0123456789abcdef0123456789abcdef01234567"', "X-Repo-Commit": "a" * 40}
    answers = {
        "/gpt2/resolve/main/tokenizer.json": (200, headers, definition),
        "/of/gated/resolve/main/tokenizer.json": (403, {"X-Error-Code": "GatedRepo"}, b""),
        "/of/lacking/resolve/main/tokenizer.json": (404, {"X-Error-Code": "EntryNotFound"}, b""),
        "/of/broken/resolve/main/tokenizer.json": (418, {}, b""),
    }
    tree = config(write_texts(tmp_path / "text", documents), tmp_path / "data")
    (tmp_path / "run.yaml").write_text(tree.to_yaml())
    with server(answers) as (address, asked):
        found = prepared(tmp_path, "gpt2", HF_ENDPOINT=address)
        assert found.returncode == 0, found.stderr
        assert (tmp_path / "of_gpt2/tokenizer.json").read_bytes() == definition
        assert "GET /gpt2/resolve/main/tokenizer.json" in asked
        wanted = {
            "of/gated": "gives it to those alone who have accepted its licence",
            "of/lacking": "has no tokenizer.json of that model",
            "of/none": "has no model of that name",
            "of/broken": "cannot be reached or does not answer as it should (HfHubHTTPError: 418",
        }
        for (name, words), sentence in zip(wanted.items(), sentences(tmp_path, wanted, address), strict=True):
            assert f"tokenizer.file={name} is no file or folder here, and the Hugging Face hub {words}" in sentence
    kept, never_fetched = sentences(tmp_path, ["gpt2", "of/gated"], address)
    assert kept.endswith("/tokenizer.json")
    assert "the Hugging Face hub cannot be reached or does not answer" in never_fetched


def test_a_tokenizer_of_a_folder_and_what_is_none(tmp_path):
    documents = texts(60)
    (tmp_path / "saved").mkdir()
    train_bpe(documents, 300).save(tmp_path / "saved/tokenizer.json")
    (tmp_path / "empty").mkdir()
    source = write_texts(tmp_path / "text", documents)
    prepare(config(source, tmp_path / "data", tokenizer=str(tmp_path / "saved")))
    assert (tmp_path / "data/tokenizer.json").read_bytes() == (tmp_path / "saved/tokenizer.json").read_bytes()
    for name in ("empty", "gone/tokenizer.json"):
        with pytest.raises(UserError, match=r"tokenizer\.json does not exist"):
            prepare(config(source, tmp_path / "none", tokenizer=str(tmp_path / name)))


def test_keys_at_their_defaults_leave_a_data_set_what_it_was():
    tree = {"output": "x", "sources": [{"kind": "text", "paths": ["x"]}], "seq_length": 8}
    short = PrepareConfig.from_tree({**tree, "tokenizer": "gpt2"}, source="test")
    assert short == PrepareConfig.from_tree({**tree, "tokenizer": {"file": "gpt2"}}, source="test")
    assert json.loads(json.dumps(lasting(short)))["tokenizer"].keys() == {
        "train_vocab_size",
        "train_bytes",
        "file",
        "tiktoken_pattern",
    }
