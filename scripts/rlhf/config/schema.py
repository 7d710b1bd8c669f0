"""The JSON schema of `config.yaml`, with which editors complete fields and mark mistakes.

Every field is optional in it: a scenario says only what differs from its base.
"""

from __future__ import annotations

import json
from typing import Any

from rlhf.config.scenario import Config

Schema = dict[str, Any]


def config_schema() -> Schema:
    """Return the schema of the whole file: `defaults`, and scenarios as overrides."""
    schema = Config.model_json_schema()
    definitions = {name: _overrides(definition) for name, definition in schema["$defs"].items()}
    # Lists replace a base's list as a whole, so that their items are complete. A name alone is a dataset too.
    definitions["Columns"]["required"] = ["prompt"]
    definitions["Dataset"]["required"] = ["name"]
    definitions["Dataset"] = {"anyOf": [{"type": "string"}, definitions["Dataset"]]}
    definitions["Defaults"] = definitions.pop("Scenario")
    base = {"type": "string", "description": "the scenario that this one overrides; without it, defaults"}
    scenario = {**definitions["Defaults"], "type": ["object", "null"]}  # `tiny: {}` or `tiny:`
    scenario["properties"] = {"base": base, **scenario["properties"]}
    properties = {
        "pvc": _untitled(schema["properties"]["pvc"]),
        "offline": _untitled(schema["properties"]["offline"]),
        "defaults": {"$ref": "#/$defs/Defaults"},
        "scenarios": {
            "type": "object",
            "propertyNames": {"pattern": "^[a-z0-9][a-z0-9-]*$"},
            "additionalProperties": {"$ref": "#/$defs/Override"},
        },
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "config.yaml",
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
        "$defs": dict(sorted({**definitions, "Override": scenario}.items())),
    }


def text() -> str:
    """Return the schema as `make schema` writes it."""
    return json.dumps(config_schema(), indent=1) + "\n"


def _overrides(definition: Schema) -> Schema:
    """Return a section in which nothing is required."""
    kept = {name: value for name, value in definition.items() if name not in ("required", "title")}
    fields = definition.get("properties", {})
    return {**kept, "properties": {name: _untitled(field) for name, field in fields.items()}}


def _untitled(field: Schema) -> Schema:
    return {name: value for name, value in field.items() if name != "title"}
