"""What the KubeRay operator refuses, or quietly does otherwise, although the schemas of its resources allow it.

Read from the operator's validation (master of August 2026) and, where marked, rules of this project's own.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from fractions import Fraction
from math import ceil
from typing import Any, cast

import yaml

from configs.manifest import looks_secret

Tree = Mapping[str, Any]

DRAIN = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
"""How long Ray lets what runs on a node go on after the node was told to end, in seconds."""
_MODES = ("K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode")
_GATED = ("networkPolicy", "tlsOptions", "historyServerOptions")
_QUANTITY = re.compile(r"(\d+(?:\.\d+)?)(m|[KMGT]i|[kMGT])?")
_UNITS = {"": Fraction(1), "m": Fraction(1, 1000)} | {
    letter + binary: Fraction(base**power)
    for power, letters in enumerate(("kK", "M", "G", "T"), start=1)
    for letter in letters
    for binary, base in (("", 1000), ("i", 1024))
}


def quantity(text: str | int) -> int:
    """A Kubernetes quantity (16Gi, 500M, 8, 200m) as a number, rounded up. Raises ValueError."""
    match = _QUANTITY.fullmatch(str(text))
    if match is None:
        raise ValueError(f"{text!r} is no quantity")
    return ceil(Fraction(match[1]) * _UNITS[match[2] or ""])


def problems(document: Tree) -> Iterator[str]:
    """What is wrong with a RayJob or RayCluster, one line each that begins with the field; others pass.

    It has to be valid by the schema.
    """
    kind, spec = document.get("kind"), document.get("spec", {})
    if kind not in ("RayJob", "RayCluster"):
        return
    name = document.get("metadata", {}).get("name", "")
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name) or len(name) > 47:
        yield (
            f"metadata.name: {name!r} is not at most 47 lower-case letters, digits and dashes, a letter first "
            "and no dash last"
        )
    if kind == "RayCluster":
        yield from _cluster(spec, "spec")
        return
    yield from _job(spec)
    if "rayClusterSpec" in spec:
        yield from _cluster(spec["rayClusterSpec"], "spec.rayClusterSpec")


def _job(spec: Tree) -> Iterator[str]:
    mode = spec.get("submissionMode", "K8sJobMode")
    selects, retries = bool(spec.get("clusterSelector")), spec.get("backoffLimit", 0)
    if mode not in _MODES:
        yield f"spec.submissionMode: {mode} is none of {', '.join(_MODES)}"
    if selects == ("rayClusterSpec" in spec):
        yield "spec.rayClusterSpec: give it or spec.clusterSelector, and not both"
    for name in ("activeDeadlineSeconds", "preRunningDeadlineSeconds"):
        if spec.get(name, 1) <= 0:
            yield f"spec.{name}: {spec[name]} is no deadline; it is above 0"
    for name in ("ttlSecondsAfterFinished", "backoffLimit"):
        if spec.get(name, 0) < 0:
            yield f"spec.{name}: {spec[name]} is below 0"
    yield from _endings(spec)
    if selects:
        for name, given in (("suspend", spec.get("suspend")), ("backoffLimit", retries > 0)):
            if given:
                yield f"spec.{name}: does not go with spec.clusterSelector"
    if retries > 0 and mode == "InteractiveMode":
        yield "spec.backoffLimit: does not go with spec.submissionMode InteractiveMode"
    if mode == "SidecarMode":
        yield from _sidecar(spec, selects)
    yield from _runtime_env(spec.get("runtimeEnvYAML", "{}"))


def _endings(spec: Tree) -> Iterator[str]:
    """What happens when the job is over."""
    if not spec.get("shutdownAfterJobFinishes", False):
        for name in ("suspend", "ttlSecondsAfterFinished"):
            if spec.get(name):
                yield f"spec.{name}: needs spec.shutdownAfterJobFinishes"
    if "deletionStrategy" in spec:
        yield "spec.deletionStrategy: needs the operator's feature gate RayJobDeletionPolicy, which may be off"
        if spec.get("shutdownAfterJobFinishes") and spec["deletionStrategy"].get("deletionRules"):
            yield "spec.deletionStrategy.deletionRules: excludes spec.shutdownAfterJobFinishes"


def _sidecar(spec: Tree, selects: bool) -> Iterator[str]:
    if selects:
        yield "spec.clusterSelector: does not go with spec.submissionMode SidecarMode"
    for name in ("submitterPodTemplate", "submitterConfig"):
        if name in spec:
            yield f"spec.{name}: does not go with spec.submissionMode SidecarMode"
    head = spec.get("rayClusterSpec", {}).get("headGroupSpec", {})
    if head.get("template", {}).get("spec", {}).get("restartPolicy", "Never") != "Never":
        yield "spec.rayClusterSpec.headGroupSpec.template.spec.restartPolicy: has to be Never with SidecarMode"


def _runtime_env(text: str) -> Iterator[str]:
    place = "spec.runtimeEnvYAML"
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError:
        yield f"{place}: is no YAML"
        return
    if not isinstance(values, dict):
        yield f"{place}: is no mapping"
        return
    variables = cast("dict[str, Any]", values).get("env_vars", {})
    for name in filter(looks_secret, variables):
        # Ray's jobs API shows them (this project's rule).
        yield f"{place}.env_vars: {name} looks like a secret, and anybody who may list jobs can read it"


def _cluster(spec: Tree, place: str) -> Iterator[str]:
    auth, ray_version = spec.get("authOptions", {}).get("mode"), spec.get("rayVersion", "")
    if auth != "token":
        # This project's rule: without it whoever reaches the dashboard runs code.
        yield f"{place}.authOptions.mode: has to be token; without, whoever reaches the dashboard runs code"
    else:
        numbers = re.match(r"(\d+)\.(\d+)", ray_version)
        if numbers is None or (int(numbers[1]), int(numbers[2])) < (2, 52):
            yield f"{place}.rayVersion: {ray_version!r} has no token authentication; 2.52 and later have"
    for name in _GATED:
        if name in spec:
            yield f"{place}.{name}: needs a feature gate of the operator, which may be off"
    groups = spec.get("workerGroupSpecs", [])
    counts = Counter(group.get("groupName") for group in groups)
    for name in (name for name, count in counts.items() if count > 1):
        yield f"{place}.workerGroupSpecs: groupName {name} is there {counts[name]} times"
    yield from _group(spec.get("headGroupSpec", {}), f"{place}.headGroupSpec")
    for index, group in enumerate(groups):
        where = f"{place}.workerGroupSpecs[{index}]"
        least, number, most = (group.get(name, 0) for name in ("minReplicas", "replicas", "maxReplicas"))
        if not 0 <= least <= number <= most:
            yield f"{where}.replicas: {number} is not between minReplicas {least} and maxReplicas {most}"
        if group.get("suspend"):
            yield f"{where}.suspend: needs the operator's feature gate RayJobDeletionPolicy, which may be off"
        yield from _group(group, where)


def _group(group: Tree, place: str) -> Iterator[str]:
    parameters, resources = group.get("rayStartParams", {}), group.get("resources", {})
    for name in ("num-cpus", "num-gpus", "memory", "resources"):
        if name in parameters and resources:
            yield f"{place}.rayStartParams.{name}: is in {place}.resources as well; give it there alone"
    if "labels" in parameters:
        yield f"{place}.rayStartParams.labels: give it as {place}.labels"
    unread = [name for name, amount in resources.items() if not _QUANTITY.fullmatch(amount)]
    for name in unread:
        amount = resources[name]
        yield f"{place}.resources.{name}: {amount!r} is no quantity; the operator leaves it out without a word"
    for key, value in group.get("labels", {}).items():
        good = r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"
        if not re.fullmatch(rf"([a-z0-9][-a-z0-9.]*/)?{good}", key) or not re.fullmatch(f"({good})?", value):
            yield f"{place}.labels: {key}: {value} is no label"
    pod = group.get("template", {}).get("spec", {})
    if not pod.get("containers"):
        yield f"{place}.template.spec.containers: is empty"
        return
    yield from _pod(pod, f"{place}.template.spec")
    if not unread:
        yield from _agrees(parameters, resources, pod, place)


def _pod(pod: Tree, place: str) -> Iterator[str]:
    volumes = {volume["name"] for volume in pod.get("volumes", []) if "name" in volume}
    for kind in ("containers", "initContainers"):
        for index, container in enumerate(pod.get(kind, [])):
            where = f"{place}.{kind}[{index}]"
            mounts = container.get("volumeMounts", [])
            for mount in mounts:
                if mount.get("name") not in volumes:
                    yield f"{where}.volumeMounts: {mount.get('name')} is no volume of {place}.volumes"
            for path, count in Counter(mount.get("mountPath") for mount in mounts).items():
                if count > 1:
                    yield f"{where}.volumeMounts: {path} is there {count} times"
            yield from _environment(container.get("env", []), where)
            yield from _amounts(container.get("resources", {}), f"{where}.resources")
    grace = pod.get("terminationGracePeriodSeconds", 30)
    for variable in pod["containers"][0].get("env", []):
        # This project's rule: Kubernetes kills what Ray still lets run.
        if variable.get("name") == DRAIN and float(variable.get("value", 0)) >= grace:
            yield f"{place}.terminationGracePeriodSeconds: {grace} is not longer than {DRAIN}"


def _environment(env: list[Tree], place: str) -> Iterator[str]:
    for name, count in Counter(variable.get("name") for variable in env).items():
        if count > 1:
            yield f"{place}.env: {name} is there {count} times"
    for variable in env:
        name = variable.get("name", "")
        if looks_secret(name) and variable.get("value"):
            yield f"{place}.env: {name} is a secret in clear (this project's rule); use valueFrom.secretKeyRef"
        if name in ("RAY_REDIS_ADDRESS", "REDIS_PASSWORD", "REDIS_USERNAME"):
            yield f"{place}.env: {name} belongs into gcsFaultToleranceOptions"
        if name == "RAY_enable_autoscaler_v2" and variable.get("value") in ("1", "true"):
            yield f"{place}.env: {name} is for clusters with enableInTreeAutoscaling"


def _amounts(resources: Tree, place: str) -> Iterator[str]:
    requests, limits = resources.get("requests", {}), resources.get("limits", {})
    for name in sorted(requests.keys() | limits.keys()):
        asked, most = (None if name not in each else quantity(each[name]) for each in (requests, limits))
        if "/" in name and asked is not None and asked != most:
            yield f"{place}.limits.{name}: {most} is not what is requested, {asked}; devices are not shared"
        elif asked is not None and most is not None and asked > most:
            yield f"{place}.requests.{name}: {asked} is more than the limit {most}"


def _agrees(parameters: Tree, resources: Tree, pod: Tree, place: str) -> Iterator[str]:
    """What Ray is told against what the container has (this project's rules: Kubernetes would kill it late)."""
    container = pod["containers"][0]
    limits = container.get("resources", {}).get("limits", {})
    gpus = sum(quantity(amount) for name, amount in limits.items() if name.endswith("/gpu"))
    if "GPU" in resources and quantity(resources["GPU"]) != gpus:
        yield f"{place}.resources.GPU: {resources['GPU']} is told to Ray, and the container has {gpus}"
    memory = quantity(limits.get("memory", "0"))
    shared = {
        volume["name"]: quantity(volume["emptyDir"]["sizeLimit"])
        for volume in pod.get("volumes", [])
        if volume.get("emptyDir", {}).get("medium") == "Memory" and "sizeLimit" in volume["emptyDir"]
    }
    mounted = [
        mount["name"] for mount in container.get("volumeMounts", []) if mount["mountPath"] == "/dev/shm"
    ]
    shm = sum(shared.get(name, 0) for name in mounted)
    if not shm:
        yield f"{place}.template.spec.volumes: /dev/shm has no emptyDir in Memory with a sizeLimit"
    elif int(parameters.get("object-store-memory", 0)) > shm:
        yield f"{place}.rayStartParams.object-store-memory: is more than /dev/shm has, {shm}"
    if shm + quantity(resources.get("memory", "0")) > memory:
        yield f"{place}.resources.memory: with /dev/shm it is more than the container's memory, {memory}"
