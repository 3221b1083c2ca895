import argparse
import contextlib
import os
import re
from typing import Annotated, Literal

import pytest
import yaml
from pydantic import Field, PositiveInt

from lfm.config import Config, Count, Tokens, _parse_override, add_flags, from_flags, parse_yaml
from lfm.errors import UserError
from lfm.inference.sampling import SamplingConfig
from lfm.layers.liquid import ReservoirConfig
from lfm.layers.mlp import SwiGLUConfig
from lfm.training.run import RunConfig
from tests.training.tiny_run import ROOT

RUNS = sorted(path for path in (ROOT / "configs").glob("*.yaml"))
DATA = sorted(path for path in (ROOT / "configs/data").glob("*.yaml"))
BASES = sorted(path for path in (ROOT / "configs/base").glob("*.yaml"))


class Inner(Config):
    lr: float = Field(default=3e-4, gt=0)
    """Peak learning rate."""
    kind: Literal["a", "b"] = "a"


class Outer(Config):
    inner: Inner = Inner()
    maybe: Inner | None = None
    size: PositiveInt = 4
    names: tuple[str, ...] = ()


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("base: [base.yaml]\nsize: 5\n")
    (tmp_path / "base.yaml").write_text("size: 7\ninner: {lr: 1e-2, kind: b}\nnames: [x, y]\n")
    return path


def test_defaults_base_file_and_overrides_in_that_order(file):
    config = Outer.load(file, ["inner.lr=2e-3", "names=[z]", "inner.lr=3e-3"])
    assert config == Outer(inner=Inner(lr=3e-3, kind="b"), size=5, names=("z",))


def test_blanks_around_a_typed_key_do_not_count(file):
    assert Outer.load(file, [" inner.lr = 2e-3", "names=['a #b', c#d]"]) == Outer.load(
        file, ["inner.lr=2e-3", 'names=["a #b", "c#d"]']
    )


def test_a_config_and_its_bases_may_lie_in_the_home_folder(file, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "other.yaml").write_text("base: [~/base.yaml]\nsize: 5\n")
    assert Outer.load("~/other.yaml") == Outer.load(file)


@pytest.mark.parametrize(
    "path, sentence", [("", "'' is no path"), ("bse", "mean .*/base.yaml"), ("x", "configs holds the shipped")]
)
def test_a_config_that_is_not_there_is_one_sentence(file, path, sentence):
    with pytest.raises(UserError, match=sentence):
        Outer.load(str(file.parent / path) if path else path)


def test_a_config_survives_yaml(file, tmp_path):
    config = Outer.load(file, ["maybe.lr=1"])
    (tmp_path / "again.yaml").write_text(config.to_yaml())
    assert Outer.load(tmp_path / "again.yaml") == config


class Circle(Config):
    kind: Literal["circle"] = "circle"
    radius: float = 1.0


class Square(Config):
    kind: Literal["square"] = "square"
    side: float = 1.0
    """In metres."""


class Drawing(Config):
    shape: Annotated[Circle | Square, Field(discriminator="kind")]


@pytest.mark.parametrize(
    "shape, sentence",
    [
        ("{kind: circle, radus: 2}", "unknown key shape.radus (value 2) in {file}; did you mean shape.radius?"),
        ("{kind: square, radius: 2}", "unknown key shape.radius (value 2) in {file}; it is a key of shape.kind=circle"),
        ("{kind: square, side: x}", "shape.side = 'x' in {file} is not legal"),
        ("{kind: ring}", "shape.kind = 'ring' in {file} is not one of 'circle', 'square'"),
        ("{side: 2}", "key shape.kind is missing in {file}"),
    ],
)
def test_a_choice_by_kind_is_explained_by_the_keys_of_the_file(tmp_path, shape, sentence):
    file = tmp_path / "drawing.yaml"
    file.write_text(f"shape: {shape}\n")
    with pytest.raises(UserError) as error:
        Drawing.load(file)
    assert sentence.format(file=file) in str(error.value)


def test_help_says_which_kind_a_key_is_of():
    assert "[kind: square] In metres." in Drawing.describe()


@pytest.mark.parametrize(
    "override, sentence",
    [
        ("inner.rl=1", "unknown key inner.rl (value 1) in {file} with the command line; did you mean inner.lr?"),
        ("lr=1", "unknown key lr (value 1) in {file} with the command line; did you mean inner.lr?"),
        ("maybe.lrr=1", "unknown key maybe.lrr (value 1) in {file} with the command line; did you mean maybe.lr?"),
        ("size=abc", "size = 'abc' in {file} with the command line is not legal: input should be a valid integer"),
        ("size=0", "size = 0 in {file} with the command line is not legal: input should be greater than 0"),
        ("inner.kind=c", "inner.kind = 'c' in {file} with the command line is not legal"),
        ("size", "override 'size' is not of the form key.path=value"),
        ("size=[", "the value '[' is not valid YAML"),
        ("size=2024-99-99", "size = '2024-99-99' in {file} with the command line is not legal"),
        ("inner.lr=.inf", "input should be a finite number"),
        ("names=[x] # one", "what follows # is a comment"),
        ("inner.kind=#a", "what follows # is a comment"),
        (".size=1", "override '.size=1' is not of the form key.path=value"),
        ("inner..lr=1", "override 'inner..lr=1' is not of the form key.path=value"),
        ("inner=", "inner = None in {file} with the command line is not legal: it takes key: value pairs"),
        ("inner=1", "inner = 1 in {file} with the command line is not legal: it takes key: value pairs"),
        ("names=x", "is not legal: input should be a valid list, such as [a, b]"),
        ("inner.lr='1e-3'", "is not legal: input should be a valid number; write it without quotes"),
        ("size='5'", "is not legal: input should be a valid integer; write it without quotes"),
    ],
)
def test_a_wrong_override_is_one_sentence(file, override, sentence):
    with pytest.raises(UserError) as error:
        Outer.load(file, [override])
    assert sentence.format(file=file) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content, sentence",
    [
        ("size: 1\nsize: 2\n", "key 'size' is given twice"),
        ("size: [", "is not valid YAML"),
        ("- 1\n", "holds a list"),
        ("base: other.yaml\n", "is not a list of file names, such as"),
        ("inner.lr: 1\n", "unknown key inner.lr .*; write inner: {lr: 1}$"),
        ("1: 2\n", "key 1 in .* is no text"),
        ("inner:\n", "inner = None .* takes key: value pairs"),
        ("base: [run.yaml]\n", "lists itself"),
        ("base: [missing.yaml]\n", "does not exist"),
        ("size: 2024-99-99\n", "size = '2024-99-99' in .* is not legal"),
        ("[" * 3000, "is not valid YAML"),
    ],
)
def test_a_wrong_file_is_one_sentence(tmp_path, content, sentence):
    (tmp_path / "run.yaml").write_text(content)
    with pytest.raises(UserError, match=sentence) as error:
        Outer.load(tmp_path / "run.yaml")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content, value",
    [
        *[(text, text) for text in ("yes", "no", "on", "off", "y", "1:30", "1_000", "0b1", "2024-01-01", "=", "<<")],
        *[(text, True) for text in ("true", "True", "TRUE")],
        *[(text, None) for text in ("", "~", "null", "NULL")],
        *[(text, 10) for text in ("10", "+10", "010", "0o12", "0xA")],
        *[(text, 3e-4) for text in ("3e-4", "3.0e-4", "3E-04", ".0003", "+0.0003")],
        *[("-.inf", float("-inf")), ("1.", 1.0), ("'010'", "010"), ("!!str 010", "010"), ("!!float 1", 1.0)],
        ("[1, off, {a: 010}]", [1, "off", {"a": 10}]),
    ],
)
def test_scalars_are_those_of_yaml_1_2(content, value):
    read = _parse_override(f"key={content}")["key"]
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize("path", [*RUNS, *DATA, *BASES], ids=lambda path: path.stem)
def test_shipped_files_mean_what_any_reader_of_yaml_sees(path):
    def numbers(value):
        """YAML 1.1 takes 3e-4 for a string."""
        if isinstance(value, dict):
            return {key: numbers(item) for key, item in value.items()}
        if isinstance(value, list):
            return [numbers(item) for item in value]
        with contextlib.suppress(ValueError):
            return float(value) if isinstance(value, str) else value
        return value

    text = path.read_text()
    assert numbers(parse_yaml(text)) == numbers(yaml.safe_load(text))


class Typed(Config):
    count: Count = 1
    ratio: float = 1.0
    flag: bool = False
    name: str = "x"
    wandb: Literal["off", "online"] = "off"
    either: Tokens | Literal["fill"] = 1
    seeds: tuple[int, ...] = ()


@pytest.mark.parametrize(
    "override",
    [
        *["count=true", "count=1.5", "count='1'", "count=yes", "count=1:30", "count=1_000", "count=null", "count=[1]"],
        *["ratio=on", "ratio=true", "ratio='1'", "ratio=1:30", "flag=1", "flag=yes", "flag='true'", "flag=1.0"],
        *["name=1", "name=010", "name=true", "wandb=false", "either=true", "either=1.5", "seeds=[true]", "seeds=[1.5]"],
        *["seeds=1", "count=1e30", "count=-1", "count=2147483648", "count=9223372036854775808", "either=16777217"],
    ],
)
def test_a_value_of_another_type_is_refused(tmp_path, override):
    (tmp_path / "run.yaml").write_text("")
    with pytest.raises(UserError, match=rf"^{override.partition('=')[0]}.* is not legal") as error:
        Typed.load(tmp_path / "run.yaml", [override])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["1e3", "010", "0o17", "yes", "1_000", "null", "~", "", ".5", "2024-01-01", "a: b"])
def test_text_that_looks_like_something_else_survives_yaml(tmp_path, name):
    config = Typed(name=name, ratio=1e-8)
    (tmp_path / "again.yaml").write_text(config.to_yaml())
    assert Typed.load(tmp_path / "again.yaml") == config


def test_values_of_their_own_type_are_taken(tmp_path):
    (tmp_path / "run.yaml").write_text("name: '010'\nseeds: [010, 1e3]\n")
    config = Typed.load(tmp_path / "run.yaml", ["count=1e3", "ratio=1", "flag=true", "wandb=off", "either=fill"])
    assert config == Typed(count=1000, ratio=1.0, flag=True, name="010", either="fill", seeds=(10, 1000))
    assert type(config.count) is int and type(config.ratio) is float


@pytest.mark.parametrize(
    "content, sentence",
    [
        *[(f"count: !!{tag} x", f"tag 'tag:yaml.org,2002:{tag}' in line 1") for tag in ("timestamp", "binary", "set")],
        ("count: !!python/name:os.system x", "could not determine a constructor for the tag"),
        ("count: !!int x", "'x' is no int in line 1"),
        ("count: !!bool yes", "'yes' is no bool in line 1"),
        ("count: 18446744073709551616", "has over 64 bits in line 1"),
        ("count: " + "9" * 5000, "has over 64 bits|digits"),
        ("a: &a [1]\nb: *a", "alias [*]a is not accepted, write the value out in line 2"),
        ("count: &a 1\n<<: {ratio: 2}", "unknown key <<"),
        ("? [1]\n: 2", "unhashable key"),
        ("count: 1\n---\ncount: 2", "another document"),
        ("true: 1", "key True in .* is no text"),
        ("a\nb: 1", "is not valid YAML"),
        ('"a\\nb": 1', r"unknown key a\\nb "),
        ("count: 'x\0'", "is not valid YAML"),
    ],
)
def test_yaml_beyond_the_core_schema_is_one_sentence(tmp_path, content, sentence):
    (tmp_path / "run.yaml").write_text(content)
    with pytest.raises(UserError, match=sentence) as error:
        Typed.load(tmp_path / "run.yaml")
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000


def test_a_config_file_that_is_no_file_is_one_sentence(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "latin").write_bytes(b"name: caf\xe9\n")
    names = ["fifo", "loop", ".", "latin", "a\0b", "x" * 5000, "absent/run.yaml"]
    for name in names:
        with pytest.raises(UserError, match=r"cannot be|regular file|does not exist|no path that can be used") as error:
            Typed.load(tmp_path / name)
        assert len(str(error.value)) < 1000


def test_no_config_has_a_number_without_bounds_of_sense():
    """Of the integers that can be set: each has an upper bound."""
    from data_pipeline.labelled import LabelledConfig
    from data_pipeline.prepare_config import PrepareConfig

    for config in (RunConfig, PrepareConfig, LabelledConfig, SamplingConfig):
        keys = [line.split(" = ")[0] for line in config.describe().splitlines() if re.match(r"  \w", line)]
        assert len(keys) > 5
        assert not [key for key in keys if re.search(r"\bint\b", key) and not re.search(r"\bl[te]=", key)]


@pytest.mark.parametrize(
    "override",
    ["num_layers=65537", "num_layers=9223372036854775807", "num_layers=1e30", "hidden_size=1e9", "vocab_size=1e12"],
)
def test_a_model_of_absurd_size_is_refused_at_once(override):
    with pytest.raises(UserError, match=rf"^model[.]{override.partition('=')[0]} = .* is not legal"):
        RunConfig.load(ROOT / "configs/lfm_debug.yaml", [f"model.{override}"])


def test_flags_are_read_as_overrides_are():
    parser = argparse.ArgumentParser()
    add_flags(parser, SamplingConfig)
    assert from_flags(SamplingConfig, parser.parse_args(["--top-p", "1", "--top-k", "010"])).top_k == 10
    for flag in (["--top-k", "1_000"], ["--top-k", "yes"], ["--temperature", "on"], ["--max-new-tokens", "1e30"]):
        with pytest.raises(UserError, match=rf"^{flag[0][2:].replace('-', '_')} = .* in the command line is not legal"):
            from_flags(SamplingConfig, parser.parse_args(flag))


def test_a_misspelt_file_is_met_with_the_nearest_one(file):
    with pytest.raises(UserError, match=r"did you mean .*run\.yaml\?"):
        Outer.load(file.with_name("runn.yaml"))


def test_help_lists_every_key_with_type_default_and_text():
    text = Outer.describe()
    assert "inner.lr: float gt=0 = 0.0003\n      Peak learning rate." in text
    assert "inner.kind: a | b = a" in text and "size: int gt=0 = 4" in text


def test_help_of_pretrain_describes_all_of_a_run(lfm):
    text = lfm("train", "--help").stdout
    for key in ("model.liquid.leak_rate", "optimizer.weight_decay", "parallel.zero_stage", "checkpoint.resume"):
        assert key in text
    assert "--dry-run" in text
    undocumented = [field for field in RunConfig.model_fields if field not in text]
    assert not undocumented


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_every_shipped_run_loads_and_is_named_after_its_file(path):
    assert RunConfig.load(path).name == path.stem


@pytest.mark.parametrize("path", DATA, ids=lambda path: path.stem)
def test_every_shipped_data_config_loads(path):
    from data_pipeline.labelled import LabelledConfig
    from data_pipeline.prepare_config import PrepareConfig

    (LabelledConfig if path.stem.startswith("medical_") else PrepareConfig).load(path)


@pytest.mark.parametrize(
    "name, total, active",
    [
        ("lfm_3b", 3_041_788_416, 1_763_836_416),
        ("lfm_3b_tied", 3_025_273_344, 1_464_205_824),
        ("lfm_tiny", 9_356_096, 9_352_000),
        ("lfm_debug", 4_631_296, 3_054_336),
        ("lfm_350m", 372_966_656, 174_195_968),
    ],
)
def test_shipped_models_have_their_exact_sizes(name, total, active):
    counts = RunConfig.load(ROOT / f"configs/{name}.yaml").model.count_parameters()
    assert (counts.total, counts.active) == (total, active)


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["model.moe_aux_loss_coeff=0.1"], "it is model.ffn.balance.coeff now"),
        (["model.ffn.moe_aux_loss_scope=batch"], "it is model.ffn.balance.scope now"),
        (["model.num_query_groups=1"], "did you mean model.attention.num_query_groups?"),
        (["model.ffn.ffn_hidden_size=64"], "it is a key of model.ffn.kind=swiglu"),
        (["model.liquid.kind=diagonal", "model.liquid.reservoir_size=2"], "it is a key of model.liquid.kind=reservoir"),
        (["optimizer.kind=lion", "optimizer.eps=1e-8"], "it is a key of optimizer.kind=adamw"),
        (
            ["model.attention=null", "model.attention.backend=sdpa"],
            "key model.attention.num_attention_heads is missing",
        ),
        (["model.attention=null", "model.liquid=null"], "attention and liquid are both null"),
        (["model.liquid.kind=null"], "model.liquid.kind = null"),
        (
            ["model.ffn.balance.kind=loss", "model.ffn.balance.update_rate=0.1"],
            "it is a key of model.ffn.balance.kind=bias",
        ),
    ],
)
def test_keys_of_a_models_parts_are_found_where_they_are(overrides, words):
    with pytest.raises(UserError, match=re.escape(words)):
        RunConfig.load(ROOT / "configs/lfm_debug.yaml", overrides)


@pytest.mark.parametrize("rate", ["0", "1", "-0.1", "2"])
def test_a_rate_by_which_no_router_is_balanced_is_one_sentence(rate):
    overrides = ["model.ffn.balance.kind=bias", f"model.ffn.balance.update_rate={rate}"]
    with pytest.raises(UserError) as error:
        RunConfig.load(ROOT / "configs/lfm_debug.yaml", overrides)
    sentence = f"model.ffn.balance.update_rate: update_rate={float(rate)} is not between 0 and 1: "
    assert str(error.value).startswith(sentence) and "try 0.02" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("order", [1, -1])
def test_another_kind_replaces_a_section_whole_in_whatever_order_its_keys_come(order):
    overrides = ["model.ffn.kind=swiglu", "model.ffn.ffn_hidden_size=64"][::order]
    assert RunConfig.load(ROOT / "configs/lfm_debug.yaml", overrides).model.ffn == SwiGLUConfig(ffn_hidden_size=64)


def test_the_same_kind_keeps_the_keys_of_the_file():
    run = RunConfig.load(ROOT / "configs/lfm_debug.yaml", ["model.liquid.kind=reservoir", "schedule.kind=cosine"])
    assert run.model.liquid.reservoir_size == 32 and run.schedule.warmup_steps == 40


def test_a_section_that_was_set_to_null_starts_anew():
    run = RunConfig.load(ROOT / "configs/lfm_debug.yaml", ["model.liquid=null", "model.liquid.interval=2"])
    assert run.model.liquid == ReservoirConfig(interval=2)


@pytest.mark.parametrize(
    "overrides, warmup",
    [
        ([], (2000, 0.05)),
        (["schedule.warmup_steps=7"], (7, None)),
        (["schedule.warmup_steps=7", "schedule.warmup_fraction=0.1"], (2000, 0.1)),
        (["schedule.warmup_fraction=0.1", "schedule.warmup_steps=7"], (7, None)),
        (["schedule={warmup_steps: 7, warmup_fraction: 0.1}"], (7, 0.1)),
        (["schedule.warmup_fraction=null"], (2000, None)),
        (["schedule.hold_steps=3"], (2000, 0.05)),
    ],
)
def test_of_two_keys_that_say_the_same_the_later_one_counts(overrides, warmup):
    found = RunConfig.load(ROOT / "configs/liquidlm_debug.yaml", overrides).schedule
    assert (found.warmup_steps, found.warmup_fraction) == warmup
