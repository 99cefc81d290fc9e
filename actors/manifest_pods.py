"""The pods of a manifest: the head, the groups of workers, and the pod that submits the job."""

from typing import Any

from actors.manifest_rules import DRAIN, quantity
from actors.pod_groups import PodGroup
from configs.manifest import KubernetesConfig

_GIB = 1 << 30
_USER = 1000
"""The user of deploy/Dockerfile."""
# For the raylet, its agents and Ray's idle workers: a guess on the safe side, not measured on such a pod.
_RAY_MEMORY = 4 * _GIB
_HEAD_SHM = 2 * _GIB


def head_group(kubernetes: KubernetesConfig, config_map: str | None) -> dict[str, Any]:
    """The head: the run's own process, and nothing that Ray places. `config_map` is mounted in /etc/bascule."""
    container = _container("ray-head", kubernetes)
    container["ports"] = [
        {"name": name, "containerPort": port}
        for name, port in (
            ("gcs-server", 6379),
            ("dashboard", 8265),
            ("metrics", 8080),
            ("as-metrics", 44217),
            ("dash-metrics", 44227),
        )
    ]
    container["resources"] = {
        "requests": {"cpu": str(kubernetes.head_cpus), "memory": kubernetes.head_memory},
        "limits": {"memory": kubernetes.head_memory},
    }
    pod = _pod(kubernetes, container, shm=_gib(_HEAD_SHM))
    if config_map is not None:
        container["volumeMounts"].append({"name": "config", "mountPath": "/etc/bascule", "readOnly": True})
        pod["volumes"].append({"name": "config", "configMap": {"name": config_map}})
    return {
        "rayStartParams": {"object-store-memory": str(_HEAD_SHM // 2)},
        "resources": {"CPU": "0"},
        "template": {"metadata": {"labels": _labels("head")}, "spec": pod},
    }


def worker_group(kubernetes: KubernetesConfig, group: PodGroup, node_label: str) -> dict[str, Any]:
    """A group of pods that does not grow or shrink, since a run asks for all of it at once.

    Ray is told what the actors ask for; the containers have Ray's own processes and /dev/shm on top.
    """
    # The bridge alone receives by sockets, and starts no other process.
    shm = _HEAD_SHM if group.name == "bridge" else quantity(kubernetes.shm_size)
    container = _container("ray-worker", kubernetes)
    container["ports"] = [{"name": "metrics", "containerPort": 8080}]
    whole = {kubernetes.gpu_resource: str(group.gpus)} if group.gpus else {}
    if group.gpus and kubernetes.rdma_resource is not None:
        whole[kubernetes.rdma_resource] = str(kubernetes.rdma_count)
        # Registering memory with a network card locks it.
        container["securityContext"]["capabilities"]["add"] = ["IPC_LOCK"]
    memory = _gib(group.memory + shm + _RAY_MEMORY)
    container["resources"] = {
        # No limit of CPUs: where there is one, a rank that waits in a collective is throttled for it.
        "requests": {"cpu": str(group.cpus + 1), "memory": memory, **whole},
        "limits": {"memory": memory, **whole},
    }
    pod = _pod(kubernetes, container, shm=_gib(shm))
    if kubernetes.node_selector:
        pod["nodeSelector"] = dict(kubernetes.node_selector)
    if group.gpus:
        pod["tolerations"] = [{"key": kubernetes.gpu_resource, "operator": "Exists", "effect": "NoSchedule"}]
    metadata: dict[str, Any] = {"labels": _labels(group.name)}
    if kubernetes.annotations:
        metadata["annotations"] = dict(kubernetes.annotations)
    gpus = {"GPU": str(group.gpus)} if group.gpus else {}
    return {
        "groupName": group.name,
        "replicas": group.pods,
        "minReplicas": group.pods,
        "maxReplicas": group.pods,
        "rayStartParams": {"object-store-memory": str(shm // 2)},
        "resources": {"CPU": str(group.cpus), **gpus, "memory": _gib(group.memory)},
        "labels": {node_label: group.name},
        "template": {"metadata": metadata, "spec": pod},
    }


def submitter(kubernetes: KubernetesConfig) -> dict[str, Any]:
    """The pod that submits the job and follows its log; the operator puts in the command and the token."""
    container = {
        "name": "ray-job-submitter",
        "image": kubernetes.image,
        "resources": {"requests": {"cpu": "500m", "memory": "512Mi"}, "limits": {"memory": "1Gi"}},
        "securityContext": _container_security(),
    }
    return {
        "metadata": {"labels": _labels("submitter")},
        "spec": {"restartPolicy": "Never", **_common(kubernetes), "containers": [container]},
    }


def _labels(part: str) -> dict[str, str]:
    return {"app.kubernetes.io/part-of": "bascule", "app.kubernetes.io/component": part}


def _container(name: str, kubernetes: KubernetesConfig) -> dict[str, Any]:
    env: dict[str, str] = {DRAIN: str(kubernetes.pod_grace_s - 20)}
    if kubernetes.socket_ifname is not None:
        env |= dict.fromkeys(("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"), kubernetes.socket_ifname)
    container: dict[str, Any] = {
        "name": name,
        "image": kubernetes.image,
        "env": [
            *({"name": key, "value": value} for key, value in (env | kubernetes.env).items()),
            *(_from_secret(key, place) for key, place in kubernetes.secret_env.items()),
        ],
        "securityContext": _container_security(),
        "volumeMounts": [
            {"name": "shared", "mountPath": kubernetes.mount_path},
            {"name": "shm", "mountPath": "/dev/shm"},
        ],
    }
    if kubernetes.env_from_secrets:
        container["envFrom"] = [{"secretRef": {"name": secret}} for secret in kubernetes.env_from_secrets]
    return container


def _from_secret(name: str, place: str) -> dict[str, Any]:
    secret, _, key = place.partition("/")
    return {"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}}


def _container_security() -> dict[str, Any]:
    return {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def _common(kubernetes: KubernetesConfig) -> dict[str, Any]:
    """What every pod has, the submitter's too."""
    pod: dict[str, Any] = {
        "automountServiceAccountToken": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": _USER,
            "runAsGroup": _USER,
            "fsGroup": _USER,
            # Without this every start walks through all files of the claim.
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
    }
    if kubernetes.service_account is not None:
        pod["serviceAccountName"] = kubernetes.service_account
    if kubernetes.image_pull_secrets:
        pod["imagePullSecrets"] = [{"name": name} for name in kubernetes.image_pull_secrets]
    return pod


def _pod(kubernetes: KubernetesConfig, container: dict[str, Any], *, shm: str) -> dict[str, Any]:
    return {
        "terminationGracePeriodSeconds": kubernetes.pod_grace_s,
        **_common(kubernetes),
        "containers": [container],
        "volumes": [
            {"name": "shared", "persistentVolumeClaim": {"claimName": kubernetes.claim}},
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": shm}},
        ],
    }


def _gib(count: int) -> str:
    """Whole GiB that are at least so many bytes, in Kubernetes' terms."""
    return f"{-(-count // _GIB)}Gi"
