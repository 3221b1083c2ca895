"""The one file that knows YAML and command lines: everyone else receives a validated, frozen `Config`."""

import argparse
import difflib
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from typing_extensions import Self

from lfm.errors import UserError


class Config(BaseModel):
    """Base of every config: frozen, unknown keys are errors, a string under a field is its help text.

    A run file lists only what differs from the files under its `base:` key.  The order of precedence is defaults,
    `base:` files in order, the file itself, then `key.path=value` overrides in order.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    @classmethod
    def load(cls, path: Path | str, overrides: Sequence[str] = ()) -> Self:
        """Read `path` over its `base:` files, apply `a.b=value` overrides in order, validate once.

        Raises UserError, in one sentence, for a missing or malformed file, an unknown key (with its full path and the
        nearest legal name), a wrong type and a value out of range.
        """
        tree = _read(Path(path), seen=())
        for override in overrides:
            tree = _merge(tree, _parse_override(override))
        return cls.from_tree(tree, source=f"{path} with the command line" if overrides else str(path))

    @classmethod
    def from_tree(cls, tree: dict[str, Any], *, source: str) -> Self:
        """Validate a nested dict; `source` names where it came from in errors."""
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            raise UserError(_one_sentence(cls, error, source)) from None

    def to_yaml(self) -> str:
        """The resolved config as YAML that `load` reads back to an equal config."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    @classmethod
    def describe(cls) -> str:
        """Every key with its type, default and help text, one line each, for `--help`."""
        lines = []
        for path, kind, default, text in _keys(cls, ""):
            lines.append(f"  {path}: {kind} = {default}" + (f"\n      {text}" if text else ""))
        return "\n".join(lines)


AnyConfig = TypeVar("AnyConfig", bound=Config)


def parse_command_line(
    config: type[AnyConfig], description: str, argv: Sequence[str] | None = None, **flags: dict[str, Any]
) -> tuple[AnyConfig, argparse.Namespace]:
    """Parse `--config FILE [key.path=value ...]` plus `flags` (name -> argparse keywords).

    Returns `(config.load(...), namespace)`.  `--help` lists every key of `config`.  The `--local_rank` that the
    deepspeed launcher adds is accepted.
    """
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="keys (set them in the YAML file or as key.path=value on the command line):\n" + config.describe(),
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="a YAML file, see configs/")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    for name, keywords in flags.items():
        parser.add_argument(f"--{name.replace('_', '-')}", **keywords)
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="overrides, applied in order")
    namespace = parser.parse_intermixed_args(argv)
    return config.load(namespace.config, namespace.overrides), namespace


def add_flags(parser: argparse.ArgumentParser, config: type[Config]) -> None:
    """A flag for every key of a flat config, such as --max-new-tokens for max_new_tokens; `from_flags` reads them."""
    for name, field in config.model_fields.items():
        flag, help_text = "--" + name.replace("_", "-"), " ".join((field.description or "").split())
        if field.annotation is bool:
            parser.add_argument(flag, action="store_true", help=help_text)
        else:
            parser.add_argument(flag, default=field.default, help=f"{help_text} (default {field.default})".strip())


def from_flags(config: type[AnyConfig], flags: argparse.Namespace) -> AnyConfig:
    """What the flags of `add_flags` say.  Raises UserError naming the key."""
    return config.from_tree({name: getattr(flags, name) for name in config.model_fields}, source="the command line")


class _Loader(yaml.SafeLoader):
    """YAML that refuses a key given twice (plain PyYAML keeps the last one in silence)."""

    def construct_mapping(self, node, deep=False):
        self.flatten_mapping(node)  # `<<: *anchor`
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _read(path: Path, *, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in seen:
        raise UserError(f"config {path} lists itself under `base:` (through {seen[-1]}); remove one of the two")
    try:
        own = yaml.load(path.read_text(encoding="utf-8"), _Loader) or {}
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1)
        hint = f"did you mean {path.parent / near[0]}?" if near else "configs/ holds the shipped ones"
        raise UserError(f"config file {path} does not exist; {hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config file {path} cannot be read: {error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: an impossible date, say
        raise UserError(f"config file {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(own, dict):
        raise UserError(f"config file {path} holds a {type(own).__name__} where key: value pairs are needed")
    bases = own.pop("base", [])
    if not (isinstance(bases, list) and all(isinstance(base, str) for base in bases)):
        raise UserError(f"`base: {bases}` in {path} is not a list of file names")
    tree: dict[str, Any] = {}
    for base in bases:
        tree = _merge(tree, _read(path.parent / base, seen=(*seen, path.resolve())))
    return _merge(tree, own)


def _parse_override(override: str) -> dict[str, Any]:
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise UserError(f"override {override!r} is not of the form key.path=value")
    try:
        value = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise UserError(f"override {override!r}: the value {text!r} is not valid YAML; quote it") from None
    for key in reversed(dotted.split(".")):
        value = {key: value}
    return typing.cast(dict[str, Any], value)


def _merge(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Mappings merge key by key; anything else, lists included, is replaced."""
    merged = dict(old)
    for key, value in new.items():
        deeper = isinstance(value, dict) and isinstance(old.get(key), dict)
        merged[key] = _merge(old[key], value) if deeper else value
    return merged


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
        if nested and field.default is not None:
            continue
        if field.is_required():
            default = "(required)"
        elif field.default_factory is not None:
            default = "(derived)"
        else:
            default = yaml.safe_dump(field.default, default_flow_style=True).split("\n")[0]
        bounds = [str(rule).partition("(")[2].rstrip(")") for rule in field.metadata if "=" in str(rule)]
        yield path, " ".join([_type_name(field.annotation), *bounds]), default, text


def _kind(config: type[Config]) -> str | None:
    """The value of `kind` that picks this config out of a union."""
    field = config.model_fields.get("kind")
    return field.default if field is not None else None


def _user_path(root: type[Config], location: Sequence[int | str]) -> str:
    """The dotted path as in the user's file: pydantic puts the kind between a union's key and its fields."""
    here, path = [root], []
    for part in location:
        fields = [config.model_fields[part] for config in here if part in config.model_fields]
        chosen = [config for config in here if _kind(config) == part]
        if not fields and chosen and len(here) > 1:
            here = chosen
            continue
        path.append(str(part))
        if fields:
            here = [config for field in fields for config in _configs_in(field.annotation)]
    return ".".join(path)


def _type_name(annotation: Any) -> str:
    if annotation is type(None):
        return "null"
    arguments = typing.get_args(annotation)
    if not arguments:
        return getattr(annotation, "__name__", str(annotation))
    if typing.get_origin(annotation) is typing.Annotated:
        return _type_name(arguments[0])
    if typing.get_origin(annotation) is typing.Literal:
        return " | ".join(str(value) for value in arguments)
    if typing.get_origin(annotation) in (list, tuple):
        return "list of " + _type_name(arguments[0])
    return " | ".join(_type_name(argument) for argument in arguments)


def _one_sentence(root: type[Config], error: ValidationError, source: str) -> str:
    """The first problem of a ValidationError, in words of the user's file; how many more there are."""
    problems = error.errors()
    # An unknown key explains a missing one, and a typo is the commonest mistake: name it first.
    problem = min(problems, key=lambda item: item["type"] != "extra_forbidden")
    path = _user_path(root, problem["loc"])
    value = problem["input"]
    if problem["type"] == "extra_forbidden":
        sentence = f"unknown key {path} (value {value!r}) in {source}; {_nearest(root, path, problem['loc'])}"
    elif problem["type"] == "union_tag_invalid":
        context = problem.get("ctx", {})
        sentence = f"{path}.kind = {context['tag']!r} in {source} is not one of {context['expected_tags']}"
    elif problem["type"] == "union_tag_not_found":
        sentence = f"key {path}.kind is missing in {source}; add it (--help describes every key)"
    elif problem["type"] == "missing":
        sentence = f"key {path} is missing in {source}; add it (--help describes every key)"
    elif problem["type"] == "value_error":
        where = f"{path}: " if path else ""
        sentence = f"{where}{problem.get('ctx', {}).get('error')} (in {source})"
    else:
        reason = problem["msg"][0].lower() + problem["msg"][1:]
        sentence = f"{path} = {value!r} in {source} is not legal: {reason}"
    return sentence + (f" (and {len(problems) - 1} more)" if len(problems) > 1 else "")


def _nearest(root: type[Config], path: str, location: Sequence[int | str]) -> str:
    """Words that point from an unknown dotted key to the legal one it resembles most."""
    legal = [key for key, *_ in _keys(root, "", location)]
    sections = sorted({".".join(key.split(".")[: i + 1]) for key in legal for i in range(key.count("."))})
    parent, _, name = path.rpartition(".")
    candidates = legal + sections
    same_name = [key for key in candidates if key.rpartition(".")[2] == name]
    siblings = [key for key in candidates if key.rpartition(".")[0] == parent]
    by_name = difflib.get_close_matches(name, [key.rpartition(".")[2] for key in siblings], n=1)
    close = difflib.get_close_matches(path, candidates, n=1, cutoff=0.5)
    if by_name:
        return f"did you mean {parent + '.' if parent else ''}{by_name[0]}?"
    if same_name or close:
        return f"did you mean {(same_name + close)[0]}?"
    return "--help lists every key"
