"""The operator's schemas as JSON schemas that know no other fields, and a document's faults by them."""

import os
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from actors.manifest_rules import problems

FILES = {"RayJob": "ray.io_rayjobs.yaml", "RayCluster": "ray.io_rayclusters.yaml"}
# A server puts it in; the schemas say nothing of what is in it.
_METADATA = {
    "type": "object",
    "required": ["name"],
    "additionalProperties": False,
    "properties": {
        "name": {"type": "string"},
        "namespace": {"type": "string"},
        "labels": {"type": "object", "additionalProperties": {"type": "string"}},
        "annotations": {"type": "object", "additionalProperties": {"type": "string"}},
    },
}


def crd_directory() -> Path:
    """Where the schemas are. Skips the test without them; in CI it fails."""
    given = os.environ.get("KUBERAY_CRD_DIR")
    if given is not None and Path(given).is_dir():
        return Path(given)
    message = f"KUBERAY_CRD_DIR is {given}: no directory with the operator's schemas"
    if os.environ.get("CI") == "true":
        pytest.fail(message)
    pytest.skip(message)


@lru_cache
def validator(kind: str) -> jsonschema.Draft202012Validator:
    """Of v1 of a resource."""
    text = (crd_directory() / FILES[kind]).read_text()
    definition = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    (version,) = [each for each in definition["spec"]["versions"] if each["name"] == "v1"]
    schema = version["schema"]["openAPIV3Schema"]
    schema["properties"]["metadata"] = _METADATA
    closed = closed_schema(schema)
    closed["required"] = ["apiVersion", "kind", "metadata", "spec"]
    closed["properties"] |= {"apiVersion": {"const": "ray.io/v1"}, "kind": {"const": kind}}
    return jsonschema.Draft202012Validator(closed)


def closed_schema(node: Mapping[str, Any]) -> dict[str, Any]:
    """The structural schema as JSON schema in which an object has the fields that it lists and no others."""
    kept = {
        key: value
        for key, value in node.items()
        if not key.startswith("x-kubernetes-") and key not in ("description", "default", "nullable", "format")
    }
    if node.get("x-kubernetes-int-or-string"):
        kept["type"] = ["integer", "string"]
    if "properties" in node:
        kept["properties"] = {name: closed_schema(inner) for name, inner in node["properties"].items()}
        # What has a default may be left out.
        needed = [
            name for name in node.get("required", []) if "default" not in node["properties"].get(name, {})
        ]
        kept["required"] = needed
        if not node.get("x-kubernetes-preserve-unknown-fields") and "additionalProperties" not in node:
            kept["additionalProperties"] = False
    for name in ("items", "additionalProperties"):
        if isinstance(node.get(name), dict):
            kept[name] = closed_schema(node[name])
    if node.get("nullable"):
        return {"anyOf": [kept, {"type": "null"}]}
    return kept


def faults(document: Mapping[str, Any]) -> Iterator[str]:
    """Faults by the schema, or else by the operator's own rules; each line begins with the field."""
    errors = list(validator(document["kind"]).iter_errors(document))
    for error in errors:
        yield f"{error.json_path.removeprefix('$.')}: {error.message}"
    if not errors:
        yield from problems(document)
