"""Several processes: the same bytes as one, and clear ends."""

import json
import random
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from data_pipeline import extras
from data_pipeline.fast_tokenizer import HARD_TEXTS, FastEncoder, first_difference
from data_pipeline.prepare import prepare
from lfm.data.tokenizer import Tokenizer, train_bpe
from lfm.errors import UserError
from tests.data.corpus import config, texts, write_texts
from tests.data_pipeline.test_prepare import contents

LARGE = {"seq_length": 256, "shard_bytes": 1 << 18, "tokenizer": {"train_vocab_size": 320}}


def jsonl(path, documents):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return {"kind": "jsonl", "paths": [str(path)]}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """More than one batch, with copies in other batches than their originals."""
    documents = texts(900, words=300)
    return jsonl(tmp_path_factory.mktemp("many") / "a.jsonl", documents + documents[::3] + ["x " * 60_000])


@pytest.mark.parametrize(
    "changes",
    [
        {"packing": "best_fit", "near_duplicates": 0.8},
        {"packing": "one_document", "max_documents": 600},
        {"format": "bins", "seq_length": None},
    ],
    ids=["best_fit", "one_document", "bins"],
)
def test_any_number_of_processes_gives_the_same_bytes(changes, source, tmp_path):
    if "near_duplicates" in changes and not extras.has("rensa"):
        changes = {"packing": "best_fit"}
    sources = [{**source, "clean": {"min_chars": 20}}]
    for workers in (0, 3):
        prepare(config(tmp_path, tmp_path / str(workers), sources=sources, num_workers=workers, **{**LARGE, **changes}))
    one = contents(tmp_path / "0")
    assert contents(tmp_path / "3") == one
    report = json.loads(one["report.json"])
    assert "max_documents" in changes or report["stages"]["dedup"]["duplicates"] > 200


@pytest.mark.slow
def test_a_run_killed_at_any_moment_and_started_again_gives_the_same_bytes(source, tmp_path):
    run = config(tmp_path, tmp_path / "data", sources=[source], num_workers=2, packing="best_fit", **LARGE)
    (tmp_path / "run.yaml").write_text(run.to_yaml())
    command = [sys.executable, "-m", "data_pipeline.prepare", "--config", str(tmp_path / "run.yaml")]
    started = time.monotonic()
    prepare(config(tmp_path, tmp_path / "whole", sources=[source], num_workers=2, packing="best_fit", **LARGE))
    seconds = time.monotonic() - started
    chance = random.Random(0)
    killed = 0
    for _ in range(20):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(chance.uniform(0.3, 0.5 + seconds))
        process.kill()
        killed += process.wait() == -signal.SIGKILL
        if (tmp_path / "data").exists():
            assert contents(tmp_path / "data") == contents(tmp_path / "whole")
    assert killed > 0
    prepare(run)
    assert contents(tmp_path / "data") == contents(tmp_path / "whole")


def test_a_full_disk_is_one_sentence_and_leaves_nothing(source, tmp_path):
    run = config(tmp_path, tmp_path / "data", sources=[source], num_workers=0, **{**LARGE, "shard_bytes": 1 << 26})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))  # Python ignores the signal: writing fails
    try:
        with pytest.raises(UserError, match=r"output=.* cannot be written \(File too large\); make room, or choose"):
            prepare(run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == [".data.lock"]


TOKENIZER = train_bpe(texts(300), 600)


def test_tiktoken_gives_the_same_ids_and_names_of_special_tokens_stay_text():
    pytest.importorskip("tiktoken")
    fast = FastEncoder.make(TOKENIZER)
    assert isinstance(fast, FastEncoder)
    assert first_difference(fast, TOKENIZER, texts(100)) is None
    for text in (*HARD_TEXTS, *texts(100)):
        assert TOKENIZER.decode(fast.encode(text).tolist()) == text
        assert TOKENIZER.eod_id not in fast.encode(text)


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda tree: tree.update(normalizer={"type": "NFC"}), "no plain byte-level BPE"),
        (lambda tree: tree["pre_tokenizer"].update(add_prefix_space=True), "no plain byte-level BPE"),
        (lambda tree: tree["added_tokens"][0].update(special=False), "no plain byte-level BPE"),
        (lambda tree: tree["model"]["merges"].reverse(), "not in the order of its merges"),
        (lambda tree: tree["model"]["merges"].pop(), "not in the order of its merges"),
    ],
    ids=["normalizer", "prefix space", "added token", "order", "unreachable"],
)
def test_what_tiktoken_cannot_stand_for_is_refused_with_a_reason(change, reason):
    pytest.importorskip("tiktoken")
    tree = json.loads(TOKENIZER.definition)
    change(tree)
    assert reason in FastEncoder.make(Tokenizer(json.dumps(tree).encode(), source="test"))


def test_a_difference_on_the_corpus_turns_tiktoken_off_and_is_said(tmp_path, capsys):
    pytest.importorskip("tiktoken")
    tree = json.loads(TOKENIZER.definition)
    # To one of the two engines ^ is the beginning of each line, to the other that of the text.
    tree["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": r"^..|[\s\S]"}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        ],
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    pairs = "\n".join(a + b for a in "aeinorstl" for b in "aeinorstl")
    source = write_texts(tmp_path / "text", [pairs, *texts(50)])
    wanted = {"tokenizer": {"file": str(tmp_path / "tokenizer.json")}}
    prepare(config(source, tmp_path / "auto", **wanted))
    assert "encoding with Hugging Face tokenizers rather than tiktoken: tiktoken" in capsys.readouterr().out
    prepare(config(source, tmp_path / "plain", tokenizer_backend="tokenizers", **wanted))
    assert contents(tmp_path / "auto") == contents(tmp_path / "plain")


def test_documents_and_prompts_begin_with_the_beginning_of_text_or_neither_does(tmp_path):
    tree = json.loads(TOKENIZER.definition)
    tree["added_tokens"].append({**tree["added_tokens"][0], "id": 600, "content": "<s>"})
    plain = Tokenizer(json.dumps(tree).encode(), source="test")
    source = write_texts(tmp_path / "text", texts(50))
    for given in (plain, plain.beginning_with("<s>")):  # Llama's definition says it, though data may be without
        given.save(tmp_path / "tokenizer.json")
        wanted = {"tokenizer": {"file": str(tmp_path / "tokenizer.json")}, "format": "bins", "seq_length": None}
        counts, tokenizers = {}, {}
        for bos in (False, True):
            output = tmp_path / f"{given.bos_id} {bos}"
            counts[bos] = prepare(config(source, output, bos=bos, **wanted))["stages"]["encode"]["tokens"]
            tokenizers[bos] = Tokenizer.from_file(output / "tokenizer.json")
            ids = np.fromfile(output / "train.bin", np.uint16)
            first = np.concatenate([ids[:1], ids[1:][ids[:-1] == TOKENIZER.eod_id]])
            assert ((first == 600) == bos).all()
            assert (tokenizers[bos].encode_prompt("a b")[0] == 600) == bos
            assert tokenizers[bos].encode_prompt("a b", begin=False) == plain.encode("a b")
        assert counts[True] == counts[False] + 50
        assert tokenizers[given.bos_id is not None].definition == given.definition
        assert tokenizers[False].sha256 != tokenizers[True].sha256  # no run mixes the two
