"""Lines of prompts and completions to rows whose mask says which ids are labels."""

import io
import itertools
import json
import sys

import pytest
import torch

from data_pipeline import inspect, verify
from data_pipeline.completions import spans_of
from data_pipeline.prepare import main, prepare
from data_pipeline.prepare_config import PrepareConfig
from lfm.data.format import SPLITS, read_index
from lfm.data.reader import ShardReader
from lfm.data.tokenizer import Tokenizer
from lfm.errors import UserError
from tests.data.corpus import texts

T = 64


def pairs(count: int) -> list[dict]:
    found = texts(2 * count, words=20)
    return [{"prompt": f"Q: {a}\nA:", "completion": f" {b}"} for a, b in zip(found[::2], found[1::2], strict=True)]


def conversations(count: int) -> list[dict]:
    roles = ["system", "user", "assistant", "user", "assistant"]
    contents = texts(5 * count, words=8)
    return [
        {"messages": [{"role": role, "content": contents[5 * i + k]} for k, role in enumerate(roles)]}
        for i in range(count)
    ]


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def tree_of(source, output, **changes):
    return {
        "output": str(output),
        "sources": [{"kind": "jsonl", "paths": [str(source)]}],
        "tokenizer": {"train_vocab_size": 320},
        "seq_length": T,
        "validation_fraction": 0.2,
        "shard_bytes": 4096,
        "labels": "completion",
        **changes,
    }


def prepared(source, output, **changes):
    prepare(PrepareConfig.from_tree(tree_of(source, output, **changes), source="test"))
    return output


def stored(data_set, split) -> tuple[list[list[int]], list[list[bool]]]:
    """What a split holds up to each end of a document, as ids and as their mask, whatever rows it is in."""
    tokenizer = Tokenizer.from_file(data_set / "tokenizer.json")
    reader = ShardReader(data_set / split)
    batch = reader.read(range(len(reader)))
    padding = [reader.num_padding(row, lengths) for row, lengths in enumerate(batch.lengths)]
    is_text = torch.tensor([[i < reader.index.seq_length - n for i in range(reader.index.seq_length)] for n in padding])
    assert not batch.label_mask[~is_text].any()
    ids, mask = batch.ids[is_text].tolist(), batch.label_mask[is_text].tolist()
    cuts = [0, *[i + 1 for i, token in enumerate(ids) if token == tokenizer.eod_id]]
    parts = [slice(a, b) for a, b in itertools.pairwise(cuts)]
    return [ids[part] for part in parts], [mask[part] for part in parts]


@pytest.mark.parametrize("bos", [False, True])
def test_completions_and_the_end_behind_them_are_the_labels(bos, tmp_path):
    records = pairs(60)
    # A tokenizer with a beginning-of-text id is one that has its name.
    data = prepared(write_lines(tmp_path / "a.jsonl", records), tmp_path / "data")
    if bos:
        tree = json.loads((data / "tokenizer.json").read_bytes())
        size = Tokenizer.from_file(data / "tokenizer.json").vocab_size
        tree["added_tokens"].append({**tree["added_tokens"][0], "id": size, "content": "<|begin_of_text|>"})
        (tmp_path / "bos.json").write_text(json.dumps(tree))
        changes = {"tokenizer": {"file": str(tmp_path / "bos.json")}, "bos": True}
        data = prepared(tmp_path / "a.jsonl", tmp_path / "with bos", **changes)
    tokenizer = Tokenizer.from_file(data / "tokenizer.json")
    assert (tokenizer.bos_id is not None) == bos
    wanted = {}
    for record in records:
        prompt, completion = (tokenizer.encode(record[key]) for key in ("prompt", "completion"))
        before = [tokenizer.bos_id] if bos else []
        ids = (*before, *prompt, *completion, tokenizer.eod_id)
        wanted[ids] = [False] * (len(before) + len(prompt)) + [True] * (len(completion) + 1)
    found = {}
    for split in SPLITS:
        for ids, mask in zip(*stored(data, split), strict=True):
            found[tuple(ids)] = mask
        index, _ = read_index(data / split)
        reader = ShardReader(data / split)
        documents = reader.read(range(len(reader))).to("cpu").documents
        assert index.num_labels == documents.num_labels > 0 and index.format_version == 2
    assert found == wanted
    held_out = [tokenizer.decode(ids[bos:-1]) for ids in stored(data, "validation")[0]]
    assert (data / "validation.txt").read_bytes() == "".join(held_out).encode()


@pytest.mark.parametrize("packing", ["greedy", "best_fit", "one_document"])
def test_each_reply_of_a_conversation_ends_and_is_a_label_however_rows_are_packed(packing, tmp_path):
    records = conversations(30)
    data = prepared(write_lines(tmp_path / "a.jsonl", records), tmp_path / "data", packing=packing, seq_length=256)
    tokenizer = Tokenizer.from_file(data / "tokenizer.json")
    turns = {}
    for record in records:
        contents = [message["content"] for message in record["messages"]]
        turns[f"{contents[0]}\n{contents[1]}\n"], turns[f"{contents[3]}\n"] = contents[2], contents[4]
    found = 0
    for split in SPLITS:
        for ids, mask in zip(*stored(data, split), strict=True):
            assert mask == sorted(mask)
            prompt, reply = ids[: mask.index(True)], ids[mask.index(True) :]
            assert turns[tokenizer.decode(prompt)] == tokenizer.decode(reply[:-1]) and reply[-1] == tokenizer.eod_id
            found += 1
    assert found == len(turns) == 60


def test_the_number_of_processes_and_the_encoder_change_nothing(tmp_path):
    source = write_lines(tmp_path / "a.jsonl", pairs(80))
    for name, changes in (("a", {"num_workers": 0}), ("b", {"num_workers": 2, "tokenizer_backend": "tokenizers"})):
        prepared(source, tmp_path / name, **changes)
    for split in SPLITS:
        assert read_index(tmp_path / "a" / split)[0] == read_index(tmp_path / "b" / split)[0]


def test_copies_are_dropped_and_a_document_cut_before_its_completion_has_no_label(tmp_path):
    records = pairs(40)
    source = write_lines(tmp_path / "a.jsonl", [*records, *records[:10]])
    report = prepare(PrepareConfig.from_tree(tree_of(source, tmp_path / "data"), source="test"))
    assert report["stages"]["dedup"]["duplicates"] == 10
    cut = write_lines(tmp_path / "b.jsonl", [{"prompt": f"{i} {'long ' * T}", "completion": "x"} for i in range(40)])
    with pytest.raises(UserError, match="no id of the train split is a label: packing=one_document cuts every"):
        tokenizer = {"file": str(tmp_path / "data/tokenizer.json")}
        prepared(cut, tmp_path / "cut", packing="one_document", seq_length=16, tokenizer=tokenizer)


def test_lines_of_the_standard_input_are_read_alike(tmp_path, monkeypatch):
    source = write_lines(tmp_path / "a.jsonl", pairs(40))
    data = prepared(source, tmp_path / "data")
    changes = {"tokenizer": {"file": str(data / "tokenizer.json")}}
    again = prepared(source, tmp_path / "again", **changes)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(source.read_bytes()), encoding="utf-8"))
    piped = prepared(source, tmp_path / "piped", sources=[{"kind": "stdin"}], **changes)
    for split in SPLITS:
        assert read_index(again / split)[0] == read_index(piped / split)[0]


@pytest.mark.parametrize(
    "record, words",
    [
        ({"text": "a"}, "has neither messages nor prompt (its keys: text)"),
        ({"prompt": "a", "answer": "b"}, "has neither messages nor completion (its keys: prompt, answer)"),
        ({"prompt": "a", "completion": 3}, "has a number under completion, which takes text"),
        ({"messages": "a"}, "has text under messages, which takes a list"),
        ({"messages": [{"role": "user", "content": ["a"]}]}, "has no text under role or content of message 1"),
        ({"messages": [{"role": "assistant", "content": "a"}, "b"]}, "has no text under role or content of message 2"),
        ({"messages": [{"role": "user", "content": "a"}]}, "has no message of the role assistant"),
        ([1], "holds a list"),
        ({"prompt": None, "completion": "a"}, "has null under prompt, which takes text"),
        ({"prompt": "a", "completion": "b", "messages": []}, "has messages and a prompt or completion"),
    ],
    ids=str,
)
def test_a_record_of_another_kind_is_one_sentence_with_file_and_line(record, words, tmp_path, capsys):
    source = write_lines(tmp_path / "a.jsonl", [*pairs(2), record])
    (tmp_path / "config.yaml").write_text(json.dumps(tree_of(source, tmp_path / "data")))
    with pytest.raises(SystemExit) as ended:
        main(["--config", str(tmp_path / "config.yaml")])
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert f"{source}:3 {words}" in error and "with labels=completion each line has" in error
    assert not (tmp_path / "data").exists()


def test_malformed_lines_are_counted_and_left_out(tmp_path):
    source = tmp_path / "a.jsonl"
    bad = '{"prompt": "\\ud800", "completion": "a"}\nno JSON\n\n'
    source.write_text(bad + "".join(json.dumps(record) + "\n" for record in pairs(40)))
    report = prepare(PrepareConfig.from_tree(tree_of(source, tmp_path / "data"), source="test"))
    assert report["stages"]["sources"]["lines_malformed"] == 2
    assert report["stages"]["sources"]["documents"] == 40


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"format": "bins", "seq_length": None}, "labels=completion: .bin files hold ids alone; set format=mds"),
        ({"sources": [{"kind": "text", "paths": ["x"]}]}, r"sources\[0\].kind=text: prompts and completions are read"),
        (
            {"sources": [{"kind": "stdin", "separator": "|"}], "tokenizer": {"file": "x"}},
            r"sources\[0\].separator='|'",
        ),
        (
            {"sources": [{"kind": "jsonl", "paths": ["x"], "clean": {"nfc": True}}]},
            r"sources\[0\].clean: nfc, min_line_words",
        ),
    ],
)
def test_what_cannot_tell_a_prompt_from_its_completion_is_refused(changes, words):
    with pytest.raises(UserError, match=words):
        PrepareConfig.from_tree(tree_of("x", "y", **changes), source="test")


def test_rules_that_drop_whole_documents_apply(tmp_path):
    records = [{"prompt": "short", "completion": "!"}, *pairs(40)]
    source = write_lines(tmp_path / "a.jsonl", records)
    sources = [{"kind": "jsonl", "paths": [str(source)], "clean": {"min_chars": 10}}]
    config = PrepareConfig.from_tree(tree_of(source, tmp_path / "data", sources=sources), source="test")
    assert prepare(config)["stages"]["clean"]["dropped_by_min_chars"] == 1


def test_spans_are_the_text_as_it_is_but_for_the_newline_of_what_is_typed():
    assert spans_of({"prompt": "a ", "completion": "b\n"}, "x") == (("a ", False), ("b\n", True))
    messages = [{"role": "user", "content": "a", "more": 1}, {"role": "assistant", "content": "b"}]
    assert spans_of({"messages": messages}, "x") == (("a\n", False), ("b", True))


def test_inspect_and_verify_say_how_much_is_a_label(tmp_path, capsys, monkeypatch):
    data = prepared(write_lines(tmp_path / "a.jsonl", pairs(40)), tmp_path / "data")
    index, _ = read_index(data / "train")
    share = index.num_labels / index.num_tokens
    assert f"{index.num_labels:,} labels ({share:.1%} of the tokens)" in capsys.readouterr().out
    inspect.main([str(data), "--html", str(tmp_path / "page.html")])
    shown = capsys.readouterr().out
    assert "Labels, which a mask says" in shown and "Labels, % of the tokens" in shown
    assert f"{index.num_labels:,}" in shown and f"<td>{round(100 * share)}</td>" in (tmp_path / "page.html").read_text()
    monkeypatch.setattr(sys, "argv", ["verify", str(data), "--full"])
    verify.main()
    assert f"train: {index.num_labels:,} labels ({share:.1%} of the tokens)" in capsys.readouterr().out
