"""Broken jobs are caught, by the operator's schemas or by its own rules, and the message names the field."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.kuberay_schemas import closed_schema, faults

FOLDER = Path(__file__).parents[2] / "deploy" / "kuberay"
Tree = dict[str, Any]


@pytest.fixture(scope="module")
def job() -> Tree:
    _, document = yaml.safe_load_all((FOLDER / "grpo-disaggregated.yaml").read_text())
    return document


def at(tree: Any, path: str) -> tuple[Any, str | int]:
    """The container and key of a dotted path."""
    parts = [int(part) if part.isdigit() else part.replace("~1", "/") for part in path.split("/")]
    for part in parts[:-1]:
        tree = tree[part]
    return tree, parts[-1]


def put(path: str, value: Any) -> Callable[[Tree], None]:
    def change(document: Tree) -> None:
        inside, key = at(document, path)
        inside[key] = value

    return change


def drop(path: str) -> Callable[[Tree], None]:
    def change(document: Tree) -> None:
        inside, key = at(document, path)
        del inside[key]

    return change


CLUSTER = "spec/rayClusterSpec"
GROUP = f"{CLUSTER}/workerGroupSpecs/0"
POD = f"{GROUP}/template/spec"
CONTAINER = f"{POD}/containers/0"
KEEP = {"policy": "DeleteNone"}
GATED = {"mode": "DenyAllIngress"}
SECRET = [{"name": "HF_TOKEN", "value": "hf_x"}]


@pytest.mark.parametrize(
    ("change", "field", "words"),
    [
        # What the schema says.
        (put("spec/entryPoint", "x"), "spec", "'entryPoint'"),
        (put("spec/ttlSecondsAfterFinished", "10"), "spec.ttlSecondsAfterFinished", "integer"),
        (put("apiVersion", "ray.io/v1alpha1"), "apiVersion", "ray.io/v1"),
        (drop(f"{CLUSTER}/headGroupSpec"), "spec.rayClusterSpec", "'headGroupSpec' is a required"),
        (put(f"{GROUP}/rayStartParams/num-things", 3), "num-things", "is not of type 'string'"),
        (put(f"{GROUP}/resource", {}), "workerGroupSpecs[0]", "'resource' was unexpected"),
        (
            put(f"{POD}/terminationGraceSeconds", 3),
            "template.spec",
            "'terminationGraceSeconds' was unexpected",
        ),
        (put(f"{CONTAINER}/ports/0/port", 1), "ports[0]", "'port' was unexpected"),
        (put(f"{CONTAINER}/resources/limits/memory", "64 GB"), "limits.memory", "does not match"),
        (
            put(f"{CONTAINER}/volumeMounts/0", {"name": "shared"}),
            "volumeMounts[0]",
            "'mountPath' is a required",
        ),
        (drop(f"{GROUP}/template"), "workerGroupSpecs[0]", "'template' is a required"),
        (put(f"{CLUSTER}/authOptions/mode", "password"), "authOptions.mode", "is not one of"),
        # What only the operator says.
        (put("metadata/name", "a" * 48), "metadata.name", "at most 47"),
        (put("metadata/name", "8b-run"), "metadata.name", "a letter first"),
        (put("spec/submissionMode", "HttpMode"), "spec.submissionMode", "is none of"),
        (put("spec/shutdownAfterJobFinishes", False), "spec.ttlSecondsAfterFinished", "needs spec.shutdown"),
        (put("spec/backoffLimit", -1), "spec.backoffLimit", "is below 0"),
        (put("spec/activeDeadlineSeconds", 0), "spec.activeDeadlineSeconds", "is no deadline"),
        (put("spec/clusterSelector", {"ray.io/cluster": "c"}), "spec.rayClusterSpec", "and not both"),
        (put("spec/runtimeEnvYAML", "a: [b"), "spec.runtimeEnvYAML", "is no YAML"),
        (put("spec/submissionMode", "SidecarMode"), "spec.submitterPodTemplate", "does not go with"),
        (put("spec/submissionMode", "InteractiveMode"), "spec.backoffLimit", "does not go with"),
        (
            put("spec/deletionStrategy", {"onSuccess": KEEP, "onFailure": KEEP}),
            "spec.deletionStrategy",
            "RayJobDeletionPolicy",
        ),
        (put(f"{CLUSTER}/rayVersion", "2.51.0"), "spec.rayClusterSpec.rayVersion", "2.52"),
        (put(f"{CLUSTER}/networkPolicy", GATED), "spec.rayClusterSpec.networkPolicy", "feature gate"),
        (put(f"{GROUP}/groupName", "rollout"), "spec.rayClusterSpec.workerGroupSpecs", "2 times"),
        (put(f"{GROUP}/maxReplicas", 1), "workerGroupSpecs[0].replicas", "maxReplicas 1"),
        (put(f"{GROUP}/rayStartParams/num-gpus", "8"), "rayStartParams.num-gpus", "as well"),
        (put(f"{GROUP}/rayStartParams/labels", "a=b"), "rayStartParams.labels", "workerGroupSpecs[0].labels"),
        (put(f"{GROUP}/labels/bascule role", "x"), "workerGroupSpecs[0].labels", "is no label"),
        (put(f"{GROUP}/resources/memory", "64 GB"), "resources.memory", "without a word"),
        (put(f"{POD}/containers", []), "template.spec.containers", "is empty"),
        (put(f"{POD}/volumes/0/name", "other"), "containers[0].volumeMounts", "shared is no volume"),
        (
            put(f"{CONTAINER}/resources/requests/nvidia.com~1gpu", "4"),
            "limits.nvidia.com/gpu",
            "requested, 4",
        ),
        (put(f"{CONTAINER}/resources/requests/memory", "999Gi"), "requests.memory", "more than the limit"),
        # What this project adds.
        (put(f"{CLUSTER}/authOptions", {"mode": "disabled"}), "authOptions.mode", "has to be token"),
        (put(f"{CONTAINER}/env", SECRET), "containers[0].env", "HF_TOKEN is a secret in clear"),
        (put("spec/runtimeEnvYAML", "env_vars: {HF_TOKEN: x}"), "runtimeEnvYAML.env_vars", "list jobs"),
        (
            put(f"{POD}/terminationGracePeriodSeconds", 30),
            "terminationGracePeriodSeconds",
            "30 is not longer",
        ),
        (put(f"{GROUP}/resources/GPU", "4"), "resources.GPU", "4 is told to Ray"),
        (put(f"{POD}/volumes/1/emptyDir", {"medium": "Memory"}), "template.spec.volumes", "/dev/shm"),
        (
            put(f"{GROUP}/rayStartParams/object-store-memory", "99999999999"),
            "object-store-memory",
            "/dev/shm",
        ),
        (put(f"{CONTAINER}/resources/limits/memory", "150Gi"), "resources.memory", "the container's memory"),
    ],
)
def test_a_broken_job_is_caught_by_a_message_that_names_the_field(
    job: Tree, change: Callable[[Tree], None], field: str, words: str
) -> None:
    broken = copy.deepcopy(job)
    change(broken)
    found = [line for line in faults(broken) if field in line.split(": ")[0] and words in line]
    assert found, "\n".join(faults(broken))


def test_fields_that_a_schema_leaves_open_stay_open() -> None:
    schema = {
        "type": "object",
        "required": ["a", "b"],
        "properties": {
            "a": {"type": "string", "default": "x"},
            "b": {"type": "object", "x-kubernetes-preserve-unknown-fields": True, "properties": {}},
            "c": {"anyOf": [{"type": "integer"}, {"type": "string"}], "x-kubernetes-int-or-string": True},
        },
    }
    closed = closed_schema(schema)
    assert closed["required"] == ["b"]
    assert closed["additionalProperties"] is False
    assert "additionalProperties" not in closed["properties"]["b"]
    assert closed["properties"]["c"]["type"] == ["integer", "string"]
