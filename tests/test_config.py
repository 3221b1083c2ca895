import subprocess
from typing import Annotated, Literal

import pytest
from pydantic import Field, PositiveInt

from lfm.config import Config
from lfm.errors import UserError
from lfm.training.run import RunConfig
from tests.training.tiny_run import PYTHON, ROOT


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
        ("{kind: square, radius: 2}", "unknown key shape.radius (value 2) in {file}; did you mean shape.side?"),
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
        ("size=2024-99-99", "the value '2024-99-99' is not valid YAML"),
        ("inner.lr=.inf", "input should be a finite number"),
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
        ("base: other.yaml\n", "is not a list of file names"),
        ("base: [run.yaml]\n", "lists itself"),
        ("base: [missing.yaml]\n", "does not exist"),
        ("size: 2024-99-99\n", "is not valid YAML"),
        ("[" * 3000, "is not valid YAML"),
    ],
)
def test_a_wrong_file_is_one_sentence(tmp_path, content, sentence):
    (tmp_path / "run.yaml").write_text(content)
    with pytest.raises(UserError, match=sentence) as error:
        Outer.load(tmp_path / "run.yaml")
    assert "\n" not in str(error.value)


def test_a_misspelt_file_is_met_with_the_nearest_one(file):
    with pytest.raises(UserError, match=r"did you mean .*run\.yaml\?"):
        Outer.load(file.with_name("runn.yaml"))


def test_help_lists_every_key_with_type_default_and_text():
    text = Outer.describe()
    assert "inner.lr: float gt=0 = 0.0003\n      Peak learning rate." in text
    assert "inner.kind: a | b = a" in text and "size: int gt=0 = 4" in text


def test_help_of_pretrain_describes_all_of_a_run():
    text = subprocess.run([PYTHON, str(ROOT / "launch/pretrain.py"), "--help"], capture_output=True, text=True).stdout
    for key in ("model.liquid.leak_rate", "optimizer.weight_decay", "parallel.zero_stage", "checkpoint.resume"):
        assert key in text
    assert "--dry-run" in text
    undocumented = [field for field in RunConfig.model_fields if field not in text]
    assert not undocumented


RUNS = sorted(path for path in (ROOT / "configs").glob("*.yaml"))
DATA = sorted(path for path in (ROOT / "configs/data").glob("*.yaml"))


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_every_shipped_run_loads_and_is_named_after_its_file(path):
    assert RunConfig.load(path).name == path.stem


@pytest.mark.parametrize("path", DATA, ids=lambda path: path.stem)
def test_every_shipped_data_config_loads(path):
    from data_pipeline.labelled import LabelledConfig
    from data_pipeline.prepare import PrepareConfig

    (LabelledConfig if path.stem.startswith("medical_") else PrepareConfig).load(path)


@pytest.mark.parametrize(
    "name, total, active",
    [
        ("lfm_3b", 3_025_273_344, 1_464_205_824),
        ("lfm_3b_untied", 3_041_788_416, 1_763_836_416),
        ("lfm_tiny", 9_356_096, 9_352_000),
        ("lfm_debug", 4_631_296, 3_054_336),
        ("lfm_350m", 340_198_656, 141_427_968),
    ],
)
def test_shipped_models_have_their_exact_sizes(name, total, active):
    counts = RunConfig.load(ROOT / f"configs/{name}.yaml").model.count_parameters()
    assert (counts.total, counts.active) == (total, active)
