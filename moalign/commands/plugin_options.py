"""The options of a plugin, one line each, read from its JSON schema."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

BOUNDS = {
    "minimum": ">= {}",
    "exclusiveMinimum": "> {}",
    "maximum": "<= {}",
    "exclusiveMaximum": "< {}",
    "minLength": "at least {} characters",
    "maxLength": "at most {} characters",
    "minItems": "at least {} of them",
    "maxItems": "at most {} of them",
    "pattern": "matching {}",
}


@dataclass(frozen=True)
class Option:
    """A key of the configuration, in words."""

    key: str
    type: str
    default: str
    description: str


def options(schema: Mapping[str, Any]) -> list[Option]:
    """The keys of a JSON schema of an object, in the order of the class; nested objects as ``key.inner``."""
    return _options(schema, schema.get("$defs", {}), "")


def _options(schema: Mapping[str, Any], definitions: Mapping[str, Any], prefix: str) -> list[Option]:
    found: list[Option] = []
    for name, content in schema.get("properties", {}).items():
        required = name in schema.get("required", ())
        default = "(required)" if required else json.dumps(content["default"]) if "default" in content else ""
        description = " ".join(str(content.get("description", "")).split())
        found.append(Option(prefix + name, type_in_words(content, definitions), default, description))
        inner = _resolve(content, definitions)
        if "properties" in inner and len(prefix) < 200:  # a schema may contain itself
            found += _options(inner, definitions, f"{prefix}{name}.")
    return found


def type_in_words(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    """``number > 0``, ``"a" or "b"``, ``list of integer``, ``mapping to string``, ``string or null``."""
    if "$ref" in schema and "properties" not in _resolve(schema, definitions):
        return type_in_words(_resolve(schema, definitions), definitions)
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(type_in_words(part, definitions) for part in schema["anyOf"]))
    if "enum" in schema or "const" in schema:
        return " or ".join(json.dumps(value) for value in schema.get("enum", [schema.get("const")]))
    kind = str(schema.get("type", "mapping" if "$ref" in schema else "any"))
    if kind == "array":
        kind = f"list of {type_in_words(schema.get('items', {}), definitions)}"
    elif kind == "object":
        values = schema.get("additionalProperties")
        kind = f"mapping to {type_in_words(values, definitions)}" if isinstance(values, dict) else "mapping"
    bounds = [text.format(schema[key]) for key, text in BOUNDS.items() if key in schema]
    space = " " if bounds and bounds[0][0] in "<>" else ", "
    return space.join([kind, ", ".join(bounds)]) if bounds else kind


def _resolve(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> Mapping[str, Any]:
    return definitions.get(str(schema.get("$ref", "")).rpartition("/")[2], schema)
