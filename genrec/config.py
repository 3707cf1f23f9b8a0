"""Strict typed configuration: YAML in, checked models out, errors with dotted paths.

Generic machinery only: which sections a run has is decided in `genrec.pipeline.config`, and what a
tokenizer or backbone can be told is decided in that component's nested `Config`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from genrec.errors import ConfigError, nearest

ConfigT = TypeVar("ConfigT", bound="StrictConfig")
# What a bare string for a section means: `tokenizer: rqvae` is a name, `data: DIR` a folder.
SHORTHANDS = {"data": "dataset"}


class StrictConfig(BaseModel):
    """Base of every `Config`: frozen, unknown keys forbidden, no guessing of types."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types (what manifests, trackers and fingerprints store)."""
        return self.model_dump(mode="json")


class _YamlLoader(yaml.SafeLoader):
    """YAML 1.1 reads `1e-3` as a string; users mean a number."""


_YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"""^[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|\.[0-9_]+(?:[eE][-+]?[0-9]+)?
        |[0-9][0-9_]*[eE][-+]?[0-9]+|\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$""".replace("\n", ""),
        re.VERBOSE,
    ),
    list("-+0123456789."),
)


def read_text(path: Path, *, what: str) -> str:
    """Read a UTF-8 text file, or raise `ConfigError` naming `what`."""
    try:
        return path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise ConfigError(
            f"{what}: no file at {str(path)!r}. Expected a YAML file; check the path."
        ) from None
    except IsADirectoryError:
        raise ConfigError(f"{what}: {str(path)!r} is a folder, expected a YAML file.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{what}: {str(path)!r} is not UTF-8 text (byte {error.start}). Save it as UTF-8."
        ) from None


def load_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping; raise `ConfigError` with the line for syntax errors."""
    path = Path(path)
    text = read_text(path, what="config")
    try:
        data = yaml.load(text, Loader=_YamlLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"config: {str(path)!r} is not valid YAML: {error}") from None
    if data is None:
        raise ConfigError(f"config: {str(path)!r} is empty. Expected a mapping of sections.")
    if not isinstance(data, dict):
        raise ConfigError(
            f"config: {str(path)!r} holds a {type(data).__name__}, expected a mapping of sections."
        )
    return data


def apply_overrides(data: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Return a copy of `data` with dotted `key.path=value` overrides set (values are YAML)."""
    result = json.loads(json.dumps(data))
    for item in overrides:
        key, separator, raw = item.partition("=")
        if not separator or not key:
            raise ConfigError(
                f"override {item!r}: expected key.path=value, e.g. tokenizer.num_levels=4."
            )
        try:
            value = yaml.load(raw, Loader=_YamlLoader) if raw else ""
        except yaml.YAMLError:
            value = raw
        _set(result, key, value, item)
    return result


def apply_settings(data: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of `data` with dotted keys set to values (plain YAML/JSON types)."""
    result = json.loads(json.dumps(data))
    for key, value in settings.items():
        _set(result, key, value, key)
    return result


def _set(result: dict[str, Any], key: str, value: Any, item: str) -> None:
    node = result
    parts = key.split(".")
    for part in parts[:-1]:
        child = node.get(part)
        if isinstance(child, str):
            child = node[part] = {SHORTHANDS.get(part, "name"): child}
        if child is None:
            child = node[part] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"override {item!r}: {part!r} is a value, not a section.")
        node = child
    node[parts[-1]] = value


def parse(model: type[ConfigT], data: Mapping[str, Any], *, path: str = "") -> ConfigT:
    """Check `data` against `model`.

    Args:
        model: a `StrictConfig` subclass.
        data: plain YAML/JSON types.
        path: dotted prefix for messages ("tokenizer").

    Raises:
        ConfigError: unknown key (with the nearest valid one) or wrong type or range, each with
            its dotted path, what was got and what was expected.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(
            f"{path or 'config'}: got {data!r}, expected a section with the keys "
            f"{', '.join(model.model_fields)}."
        )
    try:  # JSON mode: strict types, yet lists become tuples and 1 is a valid float
        return model.model_validate_json(json.dumps(data, default=str), strict=True)
    except ValidationError as error:
        lines = [_explain(model, item, path) for item in error.errors(include_url=False)]
        raise ConfigError("\n".join(lines)) from None


def parse_component(
    registry: Mapping[str, str], data: Any, *, path: str
) -> tuple[type[Any], StrictConfig]:
    """Resolve a section whose `name` picks a class from a registry.

    Args:
        registry: name -> "module:Class".
        data: the section, or a bare name.
        path: dotted prefix for messages; "" in a validator of a section, whose path is put before.

    Returns:
        the class and its checked `Config`.
    """
    from genrec.runtime import load_object

    if isinstance(data, str):
        data = {"name": data}
    key = f"{path}.name" if path else "name"
    if not isinstance(data, Mapping) or "name" not in data:
        raise ConfigError(f"{key}: missing. Expected one of {', '.join(sorted(registry))}.")
    name = data["name"]
    if name not in registry:
        raise ConfigError(
            f"{key}: got {name!r}, expected one of {', '.join(sorted(registry))}."
            f"{nearest(name, registry)}"
        )
    cls = load_object(registry[name])
    return cls, parse(cls.Config, data, path=path)


def to_yaml(config: StrictConfig) -> str:
    """Return the resolved configuration as YAML text."""
    return yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True)


def _explain(model: type[BaseModel], item: Any, prefix: str) -> str:
    location = [str(part) for part in item["loc"]]
    dotted = ".".join([prefix, *location] if prefix else location) or "config"
    if item["type"] == "extra_forbidden":
        owner: type[BaseModel] | None = _model_at(model, location[:-1])
        keys = list(owner.model_fields) if owner else []
        return (
            f"{dotted}: unknown key.{nearest(location[-1], keys)} "
            f"Valid keys here: {', '.join(keys)}."
        )
    cause = item.get("ctx", {}).get("error")
    if isinstance(cause, ConfigError):  # a section checked by a validator: its paths start here
        return "\n".join(f"{dotted}.{line}" for line in str(cause).splitlines())
    if item["type"] == "missing":
        return f"{dotted}: missing. Set it in the file or as {dotted}=value."
    got = item["input"]
    return f"{dotted}: got {got!r} ({type(got).__name__}); {item['msg']}."


def _model_at(model: type[BaseModel], location: list[str]) -> type[BaseModel] | None:
    for part in location:
        if part.isdigit():  # a place in a list of sections
            continue
        field = model.model_fields.get(part)
        annotation = field.annotation if field else None
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        nested = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
        if not nested:
            return None
        model = nested[0]
    return model
