"""The one file that knows YAML and command lines: everyone else receives a validated, frozen `Config`."""

import argparse
import difflib
import json
import os
import re
import reprlib
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from typing_extensions import Self

from lfm.errors import UserError
from lfm.files import exists, expanded, listed, read_file, shown

Width = Annotated[int, Field(gt=0, le=1 << 20)]
"""Units, heads or experts: a dimension of a tensor."""
Depth = Annotated[int, Field(gt=0, le=4096)]
"""Layers, steps of a solver, ranks: what is gone through one by one."""
DepthOrZero = Annotated[int, Field(ge=0, le=4096)]
Vocabulary = Annotated[int, Field(gt=0, le=1 << 20)]
"""Ids of a tokenizer; the largest in use have about 262,000."""
Tokens = Annotated[int, Field(gt=0, le=1 << 24)]
"""Length of a sequence, or a part of one."""
Rows = Annotated[int, Field(gt=0, le=1 << 20)]
"""Of a batch."""
Count = Annotated[int, Field(gt=0, lt=1 << 31)]
"""Steps, documents, or anything else that is only counted."""
CountOrZero = Annotated[int, Field(ge=0, lt=1 << 31)]
Bytes = Annotated[int, Field(gt=0, le=1 << 60)]


def _usable_path(text: str) -> str:
    if "://" not in text:
        expanded(text)
    return text


PathText = Annotated[str, AfterValidator(_usable_path)]
"""A path, or a URL, as the user wrote it; `lfm.files.expanded` makes a path of it.  What cannot be one is refused."""


def default_kind(kind: str) -> BeforeValidator:
    """Of a union of configs that `kind` tells apart: what a mapping without the key is."""
    return BeforeValidator(lambda tree: {"kind": kind, **tree} if isinstance(tree, dict) else tree)


def path_flag(text: str) -> Path:
    """`type=path_flag` of a flag that takes a path."""
    try:
        return expanded(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


class Config(BaseModel):
    """Base of every config: frozen, unknown keys are errors, a string under a field is its help text.

    A run file lists only what differs from the files under its `base:` key.  The order of precedence is defaults,
    `base:` files in order, the file itself, then `key.path=value` overrides in order.

    A value is of its field's type or refused: true is not 1, "yes" is not true and 1.5 is no integer, though 1e3 is.
    """

    moved: typing.ClassVar[dict[str, str]] = {}
    """Keys that earlier versions had here -> where they are now, dotted; the error that refuses them says so."""
    alternatives: typing.ClassVar[tuple[tuple[str, str], ...]] = ()
    """Pairs of keys that say one thing in two ways: a file or override that has one of them ends the other."""
    is_of_command_lines: typing.ClassVar[bool] = True
    """Whether errors may speak of a command line; else they are of JSON."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @model_validator(mode="before")
    @classmethod
    def _as_written_in_yaml(cls, tree: Any) -> Any:
        return {key: _plain(value) for key, value in tree.items()} if isinstance(tree, dict) else tree

    @classmethod
    def load(cls, path: Path | str, overrides: Sequence[str] = ()) -> Self:
        """Read `path` over its `base:` files, apply `a.b=value` overrides in order, validate once.

        Raises UserError, in one sentence, for a missing or malformed file, an unknown key (with its full path and the
        nearest legal name), a wrong type and a value out of range.
        """
        path = _found(expanded(path))
        return cls.with_overrides(_read(path, cls, seen=()), overrides, source=shown(path))

    @classmethod
    def with_overrides(cls, tree: dict[str, Any], overrides: Sequence[str], *, source: str) -> Self:
        """Apply `a.b=value` overrides to a nested dict in order, validate once.  Raises UserError as `load` does."""
        # Merged with each other first: which kind a section is counts, in whatever order its keys are given.
        on_top: dict[str, Any] = {}
        for override in overrides:
            new = _parse_override(override)
            for keys in _set_anew(on_top, new):
                _remove(tree, keys)
            on_top = _merge(on_top, new, [cls])
        tree = _merge(tree, on_top, [cls])
        return cls.from_tree(tree, source=f"{source} with the command line" if overrides else source)

    @classmethod
    def from_tree(cls, tree: dict[str, Any], *, source: str) -> Self:
        """Validate a nested dict; `source` names where it came from in errors."""
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            raise UserError(_one_sentence(cls, error, source)) from None

    @classmethod
    def commented_yaml(cls, path: Path | str, overrides: Sequence[str] = ()) -> Iterator[str]:
        """Lines of YAML: each key that the file at `path`, its bases and `overrides` set, below its help text.

        `load` reads from them what it reads from the file.
        """
        tree = _read(_found(expanded(path)), cls, seen=())
        for override in overrides:
            tree = _merge(tree, _parse_override(override), [cls])
        help_texts = {key: text for key, _, _, text in _keys(cls, "", _kinds(tree))}
        in_order = {name: tree[name] for name in cls.model_fields if name in tree}
        yield from _commented({**in_order, **tree}, "", help_texts)

    def to_yaml(self) -> str:
        """The resolved config as YAML that `load` reads back to an equal config."""
        return yaml.dump(self.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False)

    @classmethod
    def describe(cls) -> str:
        """Every key with its type, default and help text, one line each, for `--help`."""
        lines = []
        for path, kind, default, text in _keys(cls, ""):
            lines.append(f"  {path}: {kind} = {default}" + (f"\n      {text}" if text else ""))
        return "\n".join(lines)


AnyConfig = TypeVar("AnyConfig", bound=Config)


def parse_command_line(
    config: type[AnyConfig],
    description: str,
    argv: Sequence[str] | None = None,
    *,
    without_config: Callable[[argparse.Namespace], AnyConfig] | None = None,
    **flags: dict[str, Any],
) -> tuple[AnyConfig, argparse.Namespace]:
    """Parse `--config FILE [key.path=value ...]` plus `flags` (name -> argparse keywords).

    A key may be set as `--key.path value` and `--key.path=value` too.  Returns `(config.load(...), namespace)`; where
    no `--config` is given, what `without_config` makes of the namespace, whose `overrides` are all other words.
    `--help` lists every key of `config`.  The `--local_rank` that the deepspeed launcher adds is accepted.
    """
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="keys (set them in the YAML file or as key.path=value on the command line):\n" + config.describe(),
    )
    parser.add_argument(
        "--config", required=without_config is None, metavar="FILE", help="a YAML file, or the name of a shipped one"
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    for name, keywords in flags.items():
        parser.add_argument(f"--{name.replace('_', '-')}", **keywords)
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="overrides, applied in order")
    given = _with_overrides(config, sys.argv[1:] if argv is None else argv, flags={"config", "local_rank", *flags})
    namespace = parser.parse_intermixed_args(given)
    if without_config is not None and namespace.config is None:
        return without_config(namespace), namespace
    assert namespace.config is not None
    return config.load(namespace.config, namespace.overrides), namespace


def _with_overrides(config: type[Config], arguments: Sequence[str], *, flags: set[str]) -> list[str]:
    """The arguments with `--key.path value` as `key.path=value`, where that is no flag."""
    found, rest = [], list(arguments)
    while rest:
        argument = rest.pop(0)
        dotted, equals, value = argument.removeprefix("--").partition("=")
        is_key = argument.startswith("--") and dotted.replace("-", "_").partition(".")[0] in config.model_fields
        if not is_key or dotted.replace("-", "_") in flags:
            found.append(argument)
            continue
        if not equals:
            if not rest:
                raise UserError(f"{argument} has no value; write {argument} VALUE or {dotted}=VALUE")
            value = rest.pop(0)
        found.append(f"{dotted.replace('-', '_')}={value}")
    return found


def add_flags(parser: argparse.ArgumentParser, config: type[Config]) -> None:
    """A flag for every key of a flat config, such as --max-new-tokens for max_new_tokens; `from_flags` reads them."""
    for name, field in config.model_fields.items():
        flag, help_text = "--" + name.replace("_", "-"), " ".join((field.description or "").split())
        if field.annotation is bool:
            parser.add_argument(flag, action="store_true", help=help_text)
        elif field.annotation == tuple[str, ...]:
            parser.add_argument(flag, action="append", metavar="TEXT", help=help_text)
        else:
            parser.add_argument(flag, default=field.default, help=f"{help_text} (default {field.default})".strip())


def from_flags(config: type[AnyConfig], flags: argparse.Namespace) -> AnyConfig:
    """What the flags of `add_flags` say; texts are taken as they are.  Raises UserError naming the key."""
    tree = {}
    for name in config.model_fields:
        value = getattr(flags, name)
        if value is None:  # a list of texts, none of which was given
            continue
        tree |= _parse_override(f"{name}={value}") if isinstance(value, str) else {name: value}
    return config.from_tree(tree, source="the command line")


_SCALARS = {
    "null": re.compile(r"~|null|Null|NULL|"),
    "bool": re.compile(r"true|True|TRUE|false|False|FALSE"),
    "int": re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+"),
    "float": re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"),
}
"""Core schema of YAML 1.2.2, section 10.3.2: type -> what is one when unquoted.  The first that fits, else a string."""


class _Loader(yaml.SafeLoader):
    """YAML 1.2's scalars: yes, off, 1:30, 1_000 and 2024-01-01 are strings, 010 is ten, 3e-4 is a number.

    Plain PyYAML reads YAML 1.1.  A key given twice, a tag beyond str, int, float, bool, null, map and seq, an alias
    (a few of which can stand for gigabytes) and an integer beyond 64 bits are errors; nor are there merge keys.
    """

    yaml_implicit_resolvers: typing.ClassVar[dict] = {}  # pyright: ignore[reportIncompatibleVariableOverride]
    yaml_constructors: typing.ClassVar[dict] = {  # pyright: ignore[reportIncompatibleVariableOverride]
        tag: yaml.SafeLoader.yaml_constructors[tag]
        for tag in (None, *(f"tag:yaml.org,2002:{kind}" for kind in ("str", "map", "seq")))
    }

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            alias = self.peek_event()
            problem = f"alias *{_short(alias.anchor)[1:-1]} is not accepted, write the value out"
            raise yaml.MarkedYAMLError(None, None, problem, alias.start_mark)
        return super().compose_node(parent, index)

    def flatten_mapping(self, node):
        """`<<` is a key like any other."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable):
                if key in seen:
                    raise yaml.MarkedYAMLError(None, None, f"key {_short(key)} is given twice", node.start_mark)
                seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_core_scalar(self, node):
        kind, text = node.tag.rpartition(":")[2], self.construct_scalar(node)
        if not _SCALARS[kind].fullmatch(text):
            raise yaml.MarkedYAMLError(None, None, f"{_short(text)} is no {kind}", node.start_mark)
        if kind == "null":
            return None
        if kind == "bool":
            return text.lower() == "true"
        if kind == "float":
            return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        value = int(text, 0) if text[:2] in ("0o", "0x") else int(text)
        if not -(1 << 63) <= value < 1 << 64:
            raise yaml.MarkedYAMLError(None, None, f"{_short(text)} has over 64 bits", node.start_mark)
        return value


class _Dumper(yaml.SafeDumper):
    """Quotes what would be no string in either version of YAML."""


for _kind_of_scalar, _pattern in _SCALARS.items():
    _tag = f"tag:yaml.org,2002:{_kind_of_scalar}"
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern.pattern})\Z"), None)
    _Loader.add_constructor(_tag, _Loader.construct_core_scalar)


def parse_yaml(text: str) -> Any:
    """The value of a YAML document.  Raises UserError with the reason, in one line, for what is none."""
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        line = f" in line {error.problem_mark.line + 1}" if error.problem_mark is not None else ""
        raise UserError(" ".join(filter(None, (error.context, error.problem))) + line) from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: an integer of too many digits
        raise UserError(" ".join(str(error).split())) from None
    except RecursionError:
        raise UserError("it is nested too deep") from None


def _plain(value: Any) -> Any:
    """What strict types take: lists become tuples, and whole floats (as 1e3) integers, which are legal floats too."""
    if isinstance(value, list):
        return tuple(map(_plain, value))
    if isinstance(value, float) and value.is_integer() and abs(value) < 1 << 53:
        return int(value)
    return value


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 200


def _short(value: Any) -> str:
    """`repr`, of no more than a few hundred characters."""
    return _SHORT.repr(value)


def _short_json(value: Any) -> str:
    try:
        text = json.dumps(value, default=list)
    except (RecursionError, TypeError, ValueError):
        return _short(value)
    return text if len(text) <= 200 else f"{text[:100]}...{text[-90:]}"


def dotted(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of every leaf; lists and empty mappings are leaves."""
    if isinstance(tree, Mapping) and tree:
        for key, value in tree.items():
            yield from dotted(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, tree


def shipped_configs() -> Path:
    """The folder of the configs that come with the code: of the installed package, or of its checkout."""
    package = Path(__file__).parent
    return package / "configs" if exists(package / "configs") else package.parent / "configs"


def shipped_data_config(output: str) -> str | None:
    """Name of the shipped data config that prepares the folder `output`, as configs/data/NAME.yaml; None: none does."""
    for path in listed(shipped_configs() / "data"):
        if path.suffix == ".yaml" and _read(path, Config, seen=()).get("output") == output:
            return f"configs/data/{path.name}"
    return None


def _found(path: Path) -> Path:
    """The file, else the shipped one of that name: lfm_debug, lfm_debug.yaml and configs/lfm_debug.yaml are one."""
    parts = path.parts[1:] if path.parts[:1] == ("configs",) else path.parts
    if exists(path) or path.is_absolute() or not parts:
        return path
    shipped = shipped_configs().joinpath(*parts)
    return next((each for each in (shipped, shipped.with_name(shipped.name + ".yaml")) if exists(each)), path)


def _shipped_hint(path: Path) -> str:
    names = [other.stem for other in listed(shipped_configs()) if other.suffix == ".yaml"]
    near = difflib.get_close_matches(path.stem, names, n=1)
    return (
        f"did you mean {near[0]}, which is shipped?" if near else f"{shown(shipped_configs())} holds the shipped ones"
    )


def _read(path: Path, root: type[Config], *, seen: tuple[Path, ...]) -> dict[str, Any]:
    real = Path(os.path.realpath(path))
    if real in seen:
        raise UserError(
            f"config {shown(path)} lists itself under `base:` (through {shown(seen[-1])}); remove one of the two"
        )
    try:
        text = read_file(path).decode() if exists(path) else None
    except UnicodeDecodeError as error:
        raise UserError(f"config file {shown(path)} cannot be read: it is not UTF-8 ({error.reason})") from None
    if text is None:
        names = [other.stem for other in listed(path.parent) if other.suffix == ".yaml"]
        near = difflib.get_close_matches(path.stem, names, n=1)
        hint = f"did you mean {shown(path.parent / near[0])}.yaml?" if near else _shipped_hint(path)
        raise UserError(f"config file {shown(path)} does not exist; {hint}")
    try:
        own = parse_yaml(text)
    except UserError as error:
        raise UserError(f"config file {shown(path)} is not valid YAML: {error}") from None
    own = {} if own is None else own
    if not isinstance(own, dict):
        raise UserError(f"config file {shown(path)} holds a {type(own).__name__} where key: value pairs are needed")
    bases = own.pop("base", [])
    if not (isinstance(bases, list) and all(isinstance(base, str) for base in bases)):
        raise UserError(f"`base: {_short(bases)}` in {shown(path)} is not a list of file names, such as [base.yaml]")
    tree: dict[str, Any] = {}
    for base in bases:
        tree = _merge(tree, _read(path.parent / expanded(base), root, seen=(*seen, real)), [root])
    return _merge(tree, own, [root])


def _parse_override(override: str) -> dict[str, Any]:
    dotted, equals, text = override.partition("=")
    keys = [key.strip() for key in dotted.split(".")]
    if not equals or not all(keys):
        raise UserError(f"override {_short(override)} is not of the form key.path=value")
    try:
        value = parse_yaml(text)
        if _has_comment(text):
            raise UserError("what follows # is a comment")
    except UserError as error:
        sentence = f"override {_short(override)}: the value {_short(text)} is not valid YAML ({error}); quote it"
        raise UserError(sentence) from None
    for key in reversed(keys):
        value = {key: value}
    return typing.cast(dict[str, Any], value)


def _has_comment(text: str) -> bool:
    """Whether a part of a YAML document would be left out as a comment."""
    end = 0
    for token in yaml.scan(text, _Loader):
        if "#" in text[end : token.start_mark.index]:
            return True
        end = token.end_mark.index
    return "#" in text[end:]


def _merge(old: dict[str, Any], new: dict[str, Any], configs: Sequence[type[Config]]) -> dict[str, Any]:
    """Mappings merge key by key; anything else, lists included, is replaced.

    So is a mapping of another kind, where the fields of `configs`, whose keys these are, have a choice: what the old
    kind had is none of the new one's.  Of `alternatives` the other one is dropped.
    """
    merged = dict(old)
    for key, value in new.items():
        before = old.get(key)
        fields = [config.model_fields[key] for config in configs if key in config.model_fields]
        choices = [inner for field in fields for inner in _configs_in(field.annotation)]
        if isinstance(value, dict) and isinstance(before, dict) and not _is_another_kind(before, value, choices):
            merged[key] = _merge(before, value, choices)
        else:
            merged[key] = value
    for config in configs:
        for pair in config.alternatives:
            if sum(new.get(key) is not None for key in pair) == 1:
                for key in {*pair} - {*new}:
                    merged.pop(key, None)
    return merged


def _set_anew(old: dict[str, Any], new: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Paths of mappings of `new` in whose place `old` has a null, or another value."""
    for key, value in new.items():
        if isinstance(value, dict) and key in old:
            if isinstance(old[key], dict):
                yield from ((key, *path) for path in _set_anew(old[key], value))
            else:
                yield (key,)


def _remove(tree: dict[str, Any], path: tuple[str, ...]) -> None:
    for key in path[:-1]:
        tree = tree.get(key, {})
    if isinstance(tree, dict):
        tree.pop(path[-1], None)


def _is_another_kind(old: dict[str, Any], new: dict[str, Any], choices: Sequence[type[Config]]) -> bool:
    """A kind that was left out is not another: whether its keys fit is found out when they are checked."""
    return len(choices) > 1 and "kind" in old and "kind" in new and old["kind"] != new["kind"]


def _configs_in(annotation: Any) -> list[type[Config]]:
    """The Config classes a field's annotation mentions (through Optional, unions and Annotated)."""
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return [annotation]
    return [config for argument in typing.get_args(annotation) for config in _configs_in(argument)]


def _keys(config: type[Config], prefix: str, kinds: Sequence[int | str] = ()) -> Iterator[tuple[str, str, str, str]]:
    """`(dotted path, type, default, help text)` of every leaf under `config`; of unions those in `kinds`, if any is."""
    for name, field in config.model_fields.items():
        path = prefix + name
        text = " ".join((field.description or "").split())
        nested = _configs_in(field.annotation)
        for inner in [config for config in nested if _kind(config) in kinds] or nested:
            of_kind = f"[kind: {_kind(inner)}] " if len(nested) > 1 and _kind(inner) else ""
            for key, kind, default, help_text in _keys(inner, path + ".", kinds):
                yield key, kind, default, of_kind + help_text
        if nested and type(None) in typing.get_args(field.annotation):
            yield path, "null", "null" if field.default is None else "(the keys above)", "null: without it."
        if nested:
            continue
        if field.is_required():
            default = "(required)"
        elif field.default_factory is not None:
            default = "(derived)"
        else:
            default = yaml.safe_dump(field.default, default_flow_style=True).split("\n")[0]
        yield path, _type_name(field.annotation) + _bounds(field.metadata), default, text


def _kinds(tree: dict[str, Any]) -> list[str]:
    """The values of `kind` in a tree."""
    inner = [kind for value in tree.values() if isinstance(value, dict) for kind in _kinds(value)]
    return [*inner, *([tree["kind"]] if isinstance(tree.get("kind"), str) else [])]


def _commented(tree: dict[str, Any], path: str, help_texts: dict[str, str]) -> Iterator[str]:
    indent = "  " * path.count(".")
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield f"{indent}{key}:"
            yield from _commented(value, f"{path}{key}.", help_texts)
        else:
            text = re.sub(r"^(\[kind: \w+\] )+", "", help_texts.get(path + key, ""))
            yield from (f"{indent}# {line}" for line in textwrap.wrap(text, 112 - len(indent)))
            inline = yaml.dump({key: value}, Dumper=_Dumper, default_flow_style=True, width=1 << 20, sort_keys=False)
            yield indent + inline.strip()[1:-1]


def _is_bound(rule: Any) -> bool:
    """Whether a rule of a field is worth printing, such as ge=0."""
    return "=" in str(rule) and not isinstance(rule, AfterValidator)


def _kind(config: type[Config]) -> str | None:
    """The value of `kind` that picks this config out of a union."""
    field = config.model_fields.get("kind")
    return field.default if field is not None else None


def _user_path(root: type[Config], location: Sequence[int | str]) -> str:
    """The dotted path as in the user's file: pydantic puts the kind between a union's key and its fields.

    Of a union of plain types it puts the type there, and [key] behind a key that is itself wrong.
    """
    here, path, in_union = [root], [], False
    for part in location:
        if in_union or part == "[key]":
            in_union = False
            continue
        fields = [config.model_fields[part] for config in here if part in config.model_fields]
        chosen = [config for config in here if _kind(config) == part]
        if not fields and chosen and len(here) > 1:
            here = chosen
            continue
        path.append(str(part))
        in_union = any(_is_plain_union(field.annotation) for field in fields)
        if fields:
            here = [config for field in fields for config in _configs_in(field.annotation)]
    return ".".join(path)


def _is_plain_union(annotation: Any) -> bool:
    of = [argument for argument in typing.get_args(annotation) if argument is not type(None)]
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return is_union and len(of) > 1 and not _configs_in(annotation)


def _type_name(annotation: Any) -> str:
    if annotation is type(None):
        return "null"
    arguments = typing.get_args(annotation)
    if not arguments:
        return getattr(annotation, "__name__", str(annotation))
    if typing.get_origin(annotation) is typing.Annotated:
        return _type_name(arguments[0]) + "".join(_bounds(getattr(rule, "metadata", [])) for rule in arguments[1:])
    if typing.get_origin(annotation) is typing.Literal:
        return " | ".join(str(value) for value in arguments)
    if typing.get_origin(annotation) in (list, tuple):
        return "list of " + _type_name(arguments[0])
    return " | ".join(_type_name(argument) for argument in arguments)


def _bounds(rules: Sequence[Any]) -> str:
    """Such as ` gt=0 le=4096`."""
    return "".join(" " + str(rule).partition("(")[2].rstrip(")") for rule in rules if _is_bound(rule))


def _one_sentence(root: type[Config], error: ValidationError, source: str) -> str:
    """The first problem of a ValidationError, in words of the user's file; how many more there are."""
    problems = error.errors()
    # An unknown key explains a missing one, and a typo is the commonest mistake: name it first.
    problem = min(problems, key=lambda item: item["type"] != "extra_forbidden")
    # Of a union each type has its own problem: that which got furthest is of the type that was meant.
    here = _user_path(root, problem["loc"])
    same_key = [item for item in problems if f"{_user_path(root, item['loc'])}.".startswith(f"{here}.")]
    problem = max(same_key, key=lambda item: len(item["loc"]))
    path = _short(_user_path(root, problem["loc"]))[1:-1]
    if not root.is_of_command_lines:
        path = re.sub(r"\.(\d+)(?![^.])", r"[\1]", path)  # as JSON's readers write it
    value = problem["input"]
    if root.is_of_command_lines or problem["type"] == "invalid_key":
        value = _short(list(value) if isinstance(value, tuple) else value)
    else:
        value = _short_json(value)
    if problem["type"] == "extra_forbidden":
        key = str(problem["loc"][-1])
        nested = "".join(f"{part}: {{" for part in key.split("."))[:-1] + value + "}" * key.count(".")
        if not root.is_of_command_lines:
            way_out = _nearest_of_json(root, problem["loc"])
        else:
            way_out = f"write {nested}" if "." in key else _nearest(root, path, problem["loc"])
        sentence = f"unknown key {path} (value {value}) in {source}; {way_out}"
    elif problem["type"] == "union_tag_invalid":
        context = problem.get("ctx", {})
        tag = "null" if context["tag"] == "None" else _short(context["tag"])
        sentence = f"{path}.kind = {tag} in {source} is not one of {context['expected_tags']}"
    elif problem["type"] in ("union_tag_not_found", "missing"):
        key = f"{path}.kind" if problem["type"] == "union_tag_not_found" else path
        help_says = " (--help describes every key)" if root.is_of_command_lines else ""
        sentence = f"key {key} is missing in {source}; add it{help_says}"
    elif problem["type"] == "invalid_key":
        sentence = f"key {value} in {source} is no text; --help lists every key"
    elif problem["type"] in ("model_type", "model_attributes_type", "dict_type"):
        sentence = f"{path} = {value} in {source} is not legal: it takes key: value pairs; give some, or leave it out"
    elif problem["type"] == "value_error":
        where = f"{path}: " if path else ""
        sentence = f"{where}{problem.get('ctx', {}).get('error')} (in {source})"
    else:
        reason = (problem["msg"][0].lower() + problem["msg"][1:]).replace("tuple", "list")
        is_number = isinstance(problem["input"], bool | int | float)
        if problem["type"] == "string_type" and is_number and root.is_of_command_lines:
            reason += f"; quote the text, as {path}='\"...\"' on a command line"
        kinds = {"int_type": ["int"], "float_type": ["int", "float"], "bool_type": ["bool"]}.get(problem["type"], [])
        if any(_SCALARS[kind].fullmatch(str(problem["input"])) for kind in kinds):
            reason += "; write it without quotes"
        if problem["type"] in ("tuple_type", "list_type"):
            reason += ", such as [a, b]" if root.is_of_command_lines else ', such as ["a", "b"]'
        sentence = f"{path} = {value} in {source} is not legal: {reason}"
    return sentence + (f" (and {len(problems) - 1} more)" if len(problems) > 1 else "")


def _at(root: type[Config], path: str) -> list[type[Config]]:
    """The configs that may stand at a dotted path."""
    here = [root]
    for part in filter(None, path.split(".")):
        fields = [config.model_fields[part] for config in here if part in config.model_fields]
        here = [inner for field in fields for inner in _configs_in(field.annotation)]
    return here


def _nearest(root: type[Config], path: str, location: Sequence[int | str]) -> str:
    """Words that point from an unknown dotted key to the legal one it resembles most."""
    legal = [key for key, *_ in _keys(root, "", location)]
    sections = sorted({".".join(key.split(".")[: i + 1]) for key in legal for i in range(key.count("."))})
    parent, _, name = path.rpartition(".")
    of_kinds = [re.findall(r"\[kind: (\w+)\]", text) for key, _, _, text in _keys(root, "") if key == path]
    if of_kinds and of_kinds[0]:
        return f"it is a key of {parent}.kind={of_kinds[0][-1]}"
    moved = [config.moved[name] for config in _at(root, parent) if name in config.moved]
    if moved:
        return f"it is {parent + '.' if parent else ''}{moved[0]} now"
    candidates = legal + sections
    # The same name elsewhere, or words of one key that are now a section and a key.
    same_name = [key for key in candidates if key.rpartition(".")[2] == name]
    same_name += [key for key in candidates if key.replace(".", "_") == path.replace(".", "_")]
    siblings = [key for key in candidates if key.rpartition(".")[0] == parent]
    by_name = difflib.get_close_matches(name, [key.rpartition(".")[2] for key in siblings], n=1)
    close = difflib.get_close_matches(path, candidates, n=1, cutoff=0.5)
    if same_name:
        return f"did you mean {same_name[0]}?"
    if by_name:
        return f"did you mean {parent + '.' if parent else ''}{by_name[0]}?"
    if close:
        return f"did you mean {close[0]}?"
    return "--help lists every key"


def _nearest_of_json(root: type[Config], location: Sequence[int | str]) -> str:
    """Words that point from an unknown key to the one beside it that it resembles most."""
    *parents, name = location
    beside = [
        key
        for config in _at(root, ".".join(str(p) for p in parents if isinstance(p, str)))
        for key in config.model_fields
    ]
    close = difflib.get_close_matches(str(name), beside, n=1)
    return f"did you mean {close[0]}?" if close else "leave it out"
