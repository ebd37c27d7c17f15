"""From a YAML file and overrides to a validated configuration."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from moalign.config.sections import BUILT_IN_MODEL, Config, PluginChoice, Shared, named
from moalign.errors import ConfigError
from moalign.validation import explain

ADAPTER = "adapter_config.json"  # a folder with this file is an adapter

Kind = TypeVar("Kind", bound=Shared)


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML (or JSON) file, apply ``key.path=value`` overrides, validate, make file paths absolute.

    Raises ConfigError naming file and line for bad YAML, and every bad key for bad content.
    """
    return from_mapping(read(path), overrides, where=str(Path(path)))


def read(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML (or JSON) file. Raises ConfigError naming file and line."""
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such file; `moalign init {file}` writes a starter configuration") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read: {error}") from None
    try:
        content = yaml.load(text, Loader=_UniqueKeyLoader)  # a SafeLoader: plain data, no objects
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{file}:{mark.line + 1}" if mark else str(file)
        raise ConfigError(f"{place}: {getattr(error, 'problem', None) or error}") from None
    except ValueError as error:  # of a date that is none
        raise ConfigError(f"{file}: {error}; text stands in quotes") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: a configuration is a mapping of keys, this is {type(content).__name__}")
    return content


def from_mapping(content: Mapping[str, Any], overrides: Sequence[str] = (), where: str = "configuration") -> Config:
    """Validate a mapping as ``load`` does for a file."""
    return validated(Config, content, overrides, where)


def validated(kind: type[Kind], content: Mapping[str, Any], overrides: Sequence[str], where: str) -> Kind:
    """A mapping as a configuration of this kind, overridden, with absolute paths. Raises ConfigError."""
    try:
        merged: dict[str, Any] = json.loads(json.dumps(content, default=str))
    except (ValueError, RecursionError):
        raise ConfigError(f"{where}: an alias contains itself") from None
    except TypeError as error:  # a date
        raise ConfigError(f"{where}: {error}; a key is a name, and anything else stands in quotes") from None
    for override in overrides:
        _override(merged, override, kind)
    try:
        config = kind.model_validate(merged)
    except ValidationError as error:
        raise ConfigError(f"{where}:\n{explain(error, kind)}") from None
    for name in config.objectives:
        if not name.replace("-", "_").isidentifier():
            raise ConfigError(
                f"{where}: objectives.{name}: a name has letters, digits, '-' and '_' and starts with a letter"
            )
    return _absolute(config)


CHOICES = (
    *("loss", "combine", "condition", "reference", "search"),
    *("reader", "reward", "transform", "sampler", "filter", "reward_model"),
)


def _override(content: dict[str, Any], override: str, kind: type[Shared]) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {override}: write it as key.path=value, for example train.lr=1e-4")
    *parents, last = key.strip().split(".")
    target = content
    for depth, part in enumerate(parents):
        if isinstance(target.get(part), str) and part in CHOICES:
            target[part] = named(target[part])
        default = kind.model_fields[part].default if depth == 0 and part in kind.model_fields else None
        inner = target.setdefault(part, {"name": default.name} if isinstance(default, PluginChoice) else {})
        if inner is None:
            inner = target[part] = {}
        if not isinstance(inner, dict):
            raise ConfigError(f"--set {override}: {'.'.join(parents[: depth + 1])} is not a section")
        target = inner
    try:
        target[last] = yaml.load(text, Loader=_UniqueKeyLoader)  # a SafeLoader, as above
    except (yaml.YAMLError, ValueError) as error:
        problem = getattr(error, "problem", None) or error
        raise ConfigError(f"--set {override}: the value is not valid YAML: {problem}") from None


def _absolute(config: Kind) -> Kind:
    """File paths are relative to the current directory when read; a run must find them from anywhere later."""
    data, model = config.data, config.model
    paths = {
        key: os.path.abspath(Path(value).expanduser())
        for key, value in (("path", data.path), ("held_out_path", data.held_out_path))
        if value not in (None, BUILT_IN_MODEL)
    }
    data = data.model_copy(update=paths)
    local = Path(model.path).expanduser()
    if model.path != BUILT_IN_MODEL and (local.exists() or model.path.startswith((".", "/", "~"))):
        model = model.model_copy(update={"path": os.path.abspath(local)})
    located: dict[str, Any] = {"data": data, "model": model}
    for key in ("loss", "reference"):  # whose options may name folders of adapters
        choice = getattr(config, key, None)
        if isinstance(choice, PluginChoice):
            options = {name: _located(value) for name, value in choice.options.items()}
            located[key] = PluginChoice(name=choice.name, **options)
    return config.model_copy(update=located)


def _located(value: Any) -> Any:
    """An option's value with all folders of adapters in it, values and keys, as absolute paths."""
    if isinstance(value, Mapping):
        return {_located(key): _located(inner) for key, inner in value.items()}
    if isinstance(value, str) and (Path(value).expanduser() / ADAPTER).is_file():
        return os.path.abspath(Path(value).expanduser())
    return value


class _UniqueKeyLoader(yaml.SafeLoader):
    """A SafeLoader that refuses a key written twice, where YAML would silently keep the last, and a clock time, which
    it would take for a number in base 60."""


def _mapping(loader: _UniqueKeyLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, Hashable):
            problem = "a mapping or list is no key; a value that begins with a brace stands in quotes"
            raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
        if isinstance(key, str) and key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"the key '{key}' stands twice", key_node.start_mark)
        seen.add(key if isinstance(key, str) else repr(key))
    loader.flatten_mapping(node)
    return dict(loader.construct_pairs(node))


def _number(construct: Callable[[Any, Any], Any]) -> Callable[[Any, yaml.ScalarNode], Any]:
    def constructed(loader: _UniqueKeyLoader, node: yaml.ScalarNode) -> Any:
        if ":" in node.value:
            problem = f"{node.value} is read as a number in base 60; write the number itself, or text in quotes"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return construct(loader, node)

    return constructed


_UniqueKeyLoader.add_constructor("tag:yaml.org,2002:int", _number(yaml.SafeLoader.construct_yaml_int))
_UniqueKeyLoader.add_constructor("tag:yaml.org,2002:float", _number(yaml.SafeLoader.construct_yaml_float))
_UniqueKeyLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
