"""The root of a checkpoint's hashes has one too: no flipped bit of a manifest is used."""

import json
import os
import random

import pytest

from lfm.checkpoint.manifest import Manifest, manifest_bytes, read_manifest
from lfm.checkpoint.older_formats import migrated
from lfm.errors import UserError
from lfm.files import json_checksum
from tests.training.tiny_run import manifest_fields

HASHES = {"frozen": {"frozen.mask": "0123456789abcdef"}}
FILES = {name: {"bytes": 5, "xxh3_64": "0" * 16} for name in (".metadata", "tokenizer.json", "__0_0.distcp")}
COUNTERS = {"optimizer_step": 3, "reservoir_warmup": {"1": 32}, "reservoir_calm_steps": {"1": 7}}
FIELDS = {"step": 3, **manifest_fields(3, counters=COUNTERS), **HASHES, "files": FILES}


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "step_00000003"
    made.mkdir()
    return made


def write(folder, tree):
    (folder / "manifest.json").write_bytes(tree if isinstance(tree, bytes) else json.dumps(tree).encode())


def test_a_flipped_bit_is_one_sentence_or_changes_nothing(folder):
    good = manifest_bytes(FIELDS)
    write(folder, good)
    assert read_manifest(folder) == json.loads(good)
    choose, harmless = random.Random(0), 0
    for _ in range(1500):
        content = bytearray(good)
        content[choose.randrange(len(good))] ^= 1 << choose.randrange(8)
        write(folder, bytes(content))
        try:
            assert read_manifest(folder) == json.loads(good)  # one kind of white space for another
            harmless += 1
        except UserError as error:
            text = str(error)
            assert f"{folder / 'manifest.json'} is damaged" in text or "has format" in text, text
            assert len(text.splitlines()) == 1
    assert harmless < 50


def with_value(dotted, value):
    tree = json.loads(json.dumps(FIELDS))
    *path, last = dotted.split(".")
    inner = tree
    for key in path:
        inner = inner[key]
    inner[last] = value
    return tree


WRONG = {
    "step": [4, -1, "3", True, 3.0, None],
    "progress.step": [2],
    "progress.tokens": [-5, 2**64],
    "progress.best_validation": [float("nan"), float("inf"), "1"],
    "progress.validations_without_gain": [-1],
    "progress.chain": ["0" * 31, "G" * 32, 0],
    "progress.skips": [None, [4], [{"step": 2}], [{"step": -1, "rows": 4}], [{"step": 2, "rows": 0}]],
    "progress": [None, [], {}],
    "counters.optimizer_step": [-1, None],
    "counters.reservoir_warmup": [{"1": -1}, {"x": 1}, {"-1": 1}, {"2": 32}, [], {"1": 2**40}],
    "data.position": [-80, 1.5, "80"],
    "data.data_checksum": [7],
    "frozen": [{"master.a": "0" * 16}, {"frozen.mask": "0"}],
    "files": [{}, {**FILES, "../x": FILES[".metadata"]}, {**FILES, "/etc/passwd": FILES[".metadata"]}],
    "config": [{}, {"name": "x", "model": []}, {"name": 3, "model": {"kind": "lfm"}}, {"name": "x", "model": {}}],
    "config.name": ["\x1b[2J", "../x", ""],  # which is printed, by chat
    "extra": [1],
}


@pytest.mark.parametrize("key, value", [(key, value) for key, values in WRONG.items() for value in values])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_every_field_has_a_type_and_a_range_in_every_format(number, key, value, folder):
    tree = {"format": number, **with_value(key, value)}
    write(folder, {**tree, **({"checksum": json_checksum(tree)} if number > 1 else {})})
    with pytest.raises(UserError, match=r"manifest\.json is damaged: .*; restore it, or use another checkpoint"):
        read_manifest(folder)


def test_format_1_is_read_with_one_warning(folder, capsys):
    write(folder, {"format": 1, "rng": {"cpu": "AAAA"}, **FIELDS})
    found = read_manifest(folder)
    assert Manifest.model_validate({**found, "checksum": "made when it is written"}).progress.step == 3
    assert found["format"] == 4 and "rng" not in found
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1 and "manifest.json is of format 1, which has no checksum" in warning
    read_manifest(folder, warn=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("number", [0, 5, 10**30, 4.0])
def test_another_format_is_named(number, folder):
    write(folder, {"format": number, **FIELDS})
    with pytest.raises(UserError, match=f"step_00000003 has format {number}; this version reads 1 to 4"):
        read_manifest(folder)


def test_a_checkpoint_under_the_name_of_another_step_is_refused(folder):
    write(folder, manifest_bytes(FIELDS))
    other = folder.with_name("step_00000009")
    os.rename(folder, other)
    with pytest.raises(UserError, match="its step is 3 and its folder's 00000009"):
        read_manifest(other)
    os.rename(other, folder.with_name("step_backup"))
    (folder.with_name("best")).symlink_to("step_backup")
    assert read_manifest(folder.with_name("best"))["step"] == 3


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"[" * 100_000, b"\xff", b'{"format": true}', b"null"])
def test_what_is_no_manifest_is_one_sentence(content, folder):
    write(folder, content)
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        read_manifest(folder)


def test_what_older_formats_kept_and_nobody_goes_on_from_is_left_out(folder):
    counters = {**COUNTERS, "late_parameters": {"final_norm.weight": 1}}
    old = {"format": 2, "rng": {"cpu": "AAAA"}, **FIELDS, "counters": counters}
    write(folder, {**old, "checksum": json_checksum(old)})
    found = read_manifest(folder)
    assert found["counters"] == COUNTERS and "rng" not in found
    assert found == {**found, "step": 3, "files": FIELDS["files"], "frozen": FIELDS["frozen"]}


def test_a_key_of_an_older_format_in_a_new_manifest_is_damage(folder):
    new = {"format": 4, "rng": {"cpu": "AAAA"}, **FIELDS}
    write(folder, {**new, "checksum": json_checksum(new)})
    with pytest.raises(UserError, match=r"rng or .* is that of another format"):
        read_manifest(folder)


@pytest.mark.parametrize("factors, initialization", [((1.0, 1.0), "published"), ((3.0, 0.5), "unit")])
def test_what_format_3_left_to_defaults_is_written_out(factors, initialization):
    model = {"kind": "lfm", "attention": {"num_attention_heads": 2}, "liquid": None, "init_method_std": 0.03}
    model |= {"num_layers": 2, "ffn": {"kind": "moe", "num_moe_experts": 3}}
    model |= dict(zip(("embedding_multiplier", "logit_multiplier"), factors, strict=True))
    tree = migrated({"format": 3, "config": {"name": "old", "model": model}})
    assert tree["format"] == 4
    found = tree["config"]["model"]
    assert found["initialization"] == initialization and found["attention"]["qk_norm"] is False
    assert found["untie_embeddings_and_output_weights"] is False and found["logit_multiplier"] == factors[1]
    assert found["init_method_std"] == (0.03 if initialization == "published" else 0.02) and found["depth_rate"] == 1.0
    assert tree["counters"]["router_idle_steps"] == {"0": [0] * 3, "1": [0] * 3}
    assert migrated({"format": 3, "config": {"name": "old", "model": {"kind": "lstm"}}})["config"]["model"] == {
        "kind": "lstm"
    }
