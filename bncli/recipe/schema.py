"""The JSON Schema of a recipe, for editors: `python -m bncli.recipe.schema > recipes/recipe.schema.json`."""

from __future__ import annotations

import json
from typing import Any

from bncli.recipe.sections import ARM_NAME, Recipe, RecipeFile, shorthand_key


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a recipe file (draft 2020-12), with the shorthands and with arms as partial recipes.

    A section's definition requires no field, so that an arm can refer to it; the base's sections add what is required.
    """

    def without_title(section: dict[str, Any]) -> dict[str, Any]:  # which pydantic makes of the name
        return {key: item for key, item in section.items() if key != "title" or not isinstance(item, str)}

    schema: dict[str, Any] = json.loads(json.dumps(RecipeFile.model_json_schema()), object_hook=without_title)
    definitions = schema["$defs"]
    for model in definitions.values():
        if "init" in model["properties"]:
            model["properties"]["init"] = _section("init", model["properties"]["init"], definitions)
    arm = {name: _section(name, schema["properties"][name], definitions) for name in Recipe.model_fields}
    base = {name: _section(name, schema["properties"][name], definitions, complete=True) for name in arm}
    for name in {ref["$ref"] for section in arm.values() for ref in section["anyOf"] if "$ref" in ref}:
        definitions[_last(name)].pop("required", None)
    schema["properties"] |= base
    schema["properties"]["arms"] |= {
        "patternProperties": {ARM_NAME: {"type": ["object", "null"], "additionalProperties": False, "properties": arm}},
        "additionalProperties": False,
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$comment": "Made by `python -m bncli.recipe.schema`; a test keeps it current.",
        **schema,
    }


def _section(name: str, field: dict[str, Any], definitions: dict[str, Any], complete: bool = False) -> dict[str, Any]:
    """What a section may be: the bare name of a kind, or the fields of one; `complete`: with those that it needs."""
    members = field.get("oneOf", field.get("anyOf", [field]))
    references = [member["$ref"] for member in members if "$ref" in member]
    choices = [member for member in members if member == {"type": "null"}]
    if key := shorthand_key(name):
        properties = [definitions[_last(reference)]["properties"][key] for reference in references]
        names = [kind for each in properties for kind in each.get("enum", [each["const"]] if "const" in each else [])]
        choices += [{"enum": names}] if names else properties[0]["anyOf"]
    for reference in references:
        required = definitions[_last(reference)].get("required") if complete else None
        choices.append({"$ref": reference, "required": required} if required else {"$ref": reference})
    return {"anyOf": choices}


def _last(reference: str) -> str:
    return reference.rsplit("/", 1)[1]


if __name__ == "__main__":
    print(json.dumps(json_schema(), indent=1, ensure_ascii=False))
