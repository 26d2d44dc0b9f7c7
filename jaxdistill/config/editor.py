"""JSON Schemas of the files that people write, for editors: runs, workflows, `teacher generate`."""

import json
import pathlib
from typing import Any, Literal

from jaxdistill.config import inherit, keys, workflow
from jaxdistill.config.generation import Generation
from jaxdistill.config.keys import JsonSchema

SchemaKind = Literal["run", "workflow", "generate"]
MODELINE = "# yaml-language-server: $schema="


def json_schema(kind: SchemaKind = "run") -> JsonSchema:
    """The JSON Schema of a file; it checks names, types and ranges, no rule between fields.

    It requires no key below the top, and none of a run that extends another: the base has it. Steps
    of a workflow hold the configurations of their kinds.
    """
    run = _relaxed(keys.tree())
    generation = _relaxed(Generation.model_json_schema())
    if kind == "run":
        needs = {"required": keys.tree()["required"]}
        return run | {"anyOf": [{"required": ["extends"]}, needs]}
    if kind == "generate":
        return generation
    whole = _relaxed(workflow.Workflow.model_json_schema())
    definitions = whole["$defs"] | _apart("run", run) | _apart("generate", generation)
    for name, section in (("TrainStep", "run"), ("GenerateStep", "generate")):
        definitions[name]["properties"]["config"] = {"$ref": f"#/$defs/{section}"}
    whole["properties"]["base"] = {"$ref": "#/$defs/run"}
    return whole | {"$defs": definitions, "required": ["steps"]}


def text(kind: SchemaKind) -> str:
    """The schema as it is kept beside the recipes: one line for each definition."""
    schema = json_schema(kind)
    outer = [_line(name, part) for name, part in schema.items() if name != "$defs"]
    inner = ",\n".join(_line(name, part) for name, part in schema["$defs"].items())
    return "{\n" + ",\n".join([*outer, f'"$defs": {{\n{inner}\n}}']) + "\n}\n"


def kind_of(text: str) -> SchemaKind:
    """Which kind of file a YAML text is."""
    return "workflow" if workflow.is_workflow(text) else "run"


def file(kind: SchemaKind) -> pathlib.Path:
    """Where the schema lies beside the recipes."""
    return next(iter(inherit.recipes().values())).parent / f"{kind}.schema.json"


def with_modeline(recipe: str) -> str:
    """A recipe's text whose first line leads editors to this installation's schema, by its URI."""
    head, _, rest = recipe.partition("\n")
    body = rest if head.startswith(MODELINE) else recipe
    return f"{MODELINE}{file(kind_of(recipe)).as_uri()}\n{body}"


def _line(name: str, value: Any) -> str:
    return f"{json.dumps(name)}: {json.dumps(value, ensure_ascii=False, allow_nan=False)}"


def _relaxed(node: Any) -> Any:
    """A schema without the keys that a section needs, and without titles, which say nothing new."""
    if isinstance(node, list):
        return [_relaxed(item) for item in node]
    if not isinstance(node, dict):
        return node
    section = "properties" in node
    return {
        "anyOf" if key == "oneOf" else key: (
            {name: _relaxed(part) for name, part in value.items()}
            if key in ("properties", "$defs")
            else _relaxed(value)
        )
        for key, value in node.items()
        if not (section and key == "required") and key not in ("title", "discriminator")
    }


def _apart(prefix: str, schema: JsonSchema) -> JsonSchema:
    """A schema and its definitions as definitions of another one: all names get the prefix."""

    def moved(node: Any) -> Any:
        if isinstance(node, list):
            return [moved(item) for item in node]
        if not isinstance(node, dict):
            return node
        out = {key: moved(value) for key, value in node.items()}
        if isinstance(node.get("$ref"), str):
            out["$ref"] = node["$ref"].replace("#/$defs/", f"#/$defs/{prefix}.")
        return out

    inner = {f"{prefix}.{name}": moved(part) for name, part in schema["$defs"].items()}
    return inner | {prefix: moved({k: v for k, v in schema.items() if k != "$defs"})}
