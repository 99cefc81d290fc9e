"""`bascule manifest`: a run as a KubeRay RayJob, with pods that have what its actors ask Ray for."""

from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import yaml

from actors.manifest_pods import head_group, submitter, worker_group
from actors.manifest_rules import problems
from actors.model_source import ModelSize, find_model, model_size, tensors_of
from actors.placement import bundles_of
from actors.pod_groups import PodGroup, pod_groups
from configs.errors import ConfigError
from configs.load import dump_config
from configs.manifest import ManifestConfig
from configs.schema import RunConfig

NODE_LABEL = "bascule-role"
"""The label of Ray's nodes that says whose they are, see `cluster.node_label`."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


class _Dumper(yaml.SafeDumper):
    """A text of several lines stays readable."""

    yaml_representers: ClassVar[dict[Any, Any]] = {**yaml.SafeDumper.yaml_representers, str: _text}

    def ignore_aliases(self, data: Any) -> bool:
        """Write everything out: an anchor would only be in a reader's way."""
        return True


def manifest(config: ManifestConfig) -> str:
    """YAML of a ConfigMap with the run's config and the RayJob that runs it, or of a RayCluster.

    Raises ConfigError about what is missing, and about what the operator would refuse.
    """
    kubernetes = config.kubernetes
    run = _as_in_the_cluster(config.run)
    _check_places(run)
    bundles = bundles_of(run, *_sizes(config, run))
    groups = pod_groups(
        bundles,
        gpus_per_node=kubernetes.gpus_per_node,
        together=run.trainer.tensor_model_parallel_size,
    )
    cluster = _cluster_spec(config, groups)
    documents = [_resource("ray.io/v1", "RayCluster", config, config.name) | {"spec": cluster}]
    if kubernetes.kind == "RayJob":
        documents = [
            _resource("v1", "ConfigMap", config, f"{config.name}-config")
            | {"data": {"config.yaml": dump_config(run)}},
            _resource("ray.io/v1", "RayJob", config, config.name) | {"spec": _job_spec(config, cluster)},
        ]
    wrong = [line for document in documents for line in problems(document)]
    if wrong:
        raise ConfigError("\n".join(wrong))
    lines = [f"# {line}" for line in _summary(config, run, groups)]
    texts = [yaml.dump(each, Dumper=_Dumper, sort_keys=False, width=110) for each in documents]
    return "\n".join(lines) + "\n" + "---\n".join(texts)


def _as_in_the_cluster(run: RunConfig) -> RunConfig:
    """The run on these pods: on GPUs unless it says otherwise, for the head has none to find."""
    device = "cuda" if run.model.device == "auto" else run.model.device
    return run.model_copy(
        update={
            "model": run.model.model_copy(update={"device": device}),
            "cluster": run.cluster.model_copy(update={"num_cpus": None, "node_label": NODE_LABEL}),
        }
    )


def _check_places(run: RunConfig) -> None:
    """Raises ConfigError for a model or data by a path that leads somewhere here and nowhere in a pod."""
    model = run.model
    places: list[tuple[str, str | Path | None]] = [
        *((f"model.{name}", getattr(model, name)) for name in type(model).model_fields if "model" in name),
        *(("data.dataset", place) for place in run.data.dataset),
        *(("data.eval_dataset", place) for place in run.data.eval_dataset or ()),
    ]
    for option, place in places:
        if place is not None and not Path(place).is_absolute() and Path(place).exists():
            raise ConfigError(
                f"{option}: {place} is here and not in the pods; copy it into the claim, and give its path there"
            )


def _sizes(config: ManifestConfig, run: RunConfig) -> tuple[ModelSize, str, ModelSize | None]:
    """The model's size, the device, and the teacher's size where it is in the trainer ranks."""
    told, model = config.kubernetes, run.model
    policy = _size("model.model", model.model, model.mcore_model, told.num_parameters)
    experts = int(told.num_parameters_in_experts)
    if experts:
        policy = ModelSize(num_parameters=policy.num_parameters, num_in_experts=experts, nbytes=policy.nbytes)
    teacher = None
    if model.teacher_model is not None or model.mcore_teacher_model is not None:
        given = (model.teacher_model, model.mcore_teacher_model, told.teacher_num_parameters)
        teacher = _size("model.teacher_model", *given)
    return policy, model.device, teacher


def _size(option: str, model: str | None, mcore: Path | None, told: float | None) -> ModelSize:
    """The size as told, or else of the files, if they are here. Raises ConfigError."""
    if told is not None:
        return ModelSize(num_parameters=int(told), num_in_experts=0, nbytes=2 * int(told))
    place = mcore if mcore is not None else Path(model or "")
    if not place.is_dir():
        name = "num_parameters" if option == "model.model" else "teacher_num_parameters"
        raise ConfigError(
            f"kubernetes.{name}: {place} cannot be read here, so give the number of parameters of {option}, such "
            f"as --{name} 8.2e9"
        )
    source = find_model(model, mcore, option)
    return model_size(source, tensors_of(source))


def _summary(config: ManifestConfig, run: RunConfig, groups: tuple[PodGroup, ...]) -> list[str]:
    lines = [
        f"Made by `bascule manifest`; a {config.kubernetes.kind} of KubeRay, see docs/kubernetes.md. The head has "
        "no GPU and no actors."
    ]
    for group in groups:
        actors = ", ".join(f"{count} {owner}" for owner, count in group.actors)
        lines.append(f"{group.name}: {group.pods} x ({group.gpus} GPU, {group.cpus} CPU) for {actors} each")
    if config.kubernetes.kind == "RayJob":
        lines.append(
            f"{run.algorithm}, device {run.model.device}, {config.retries} more tries after a failure"
        )
    return lines


def _resource(api: str, kind: str, config: ManifestConfig, name: str) -> dict[str, Any]:
    kubernetes = config.kubernetes
    metadata: dict[str, Any] = {"name": name}
    if kubernetes.namespace is not None:
        metadata["namespace"] = kubernetes.namespace
    metadata["labels"] = {"app.kubernetes.io/part-of": "bascule"}
    if kubernetes.queue_name is not None and kind != "ConfigMap":
        metadata["labels"]["kueue.x-k8s.io/queue-name"] = kubernetes.queue_name
    return {"apiVersion": api, "kind": kind, "metadata": metadata}


def _job_spec(config: ManifestConfig, cluster: dict[str, Any]) -> dict[str, Any]:
    kubernetes = config.kubernetes
    spec: dict[str, Any] = {
        "entrypoint": f"{kubernetes.python} -m actors.cli {config.algorithm} --config /etc/bascule/config.yaml",
        # A job that is stopped is killed after 3 s by default, in the middle of what it saves.
        "runtimeEnvYAML": f'env_vars:\n  RAY_JOB_STOP_WAIT_TIME_S: "{kubernetes.pod_grace_s - 20}"\n',
        "submissionMode": kubernetes.submission_mode,
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": kubernetes.ttl_s,
        "backoffLimit": config.retries,
    }
    if kubernetes.active_deadline_s is not None:
        spec["activeDeadlineSeconds"] = kubernetes.active_deadline_s
    if kubernetes.pre_running_deadline_s is not None:
        spec["preRunningDeadlineSeconds"] = kubernetes.pre_running_deadline_s
    if kubernetes.submission_mode == "K8sJobMode":
        spec["submitterPodTemplate"] = submitter(kubernetes)
    return spec | {"rayClusterSpec": cluster}


def _cluster_spec(config: ManifestConfig, groups: tuple[PodGroup, ...]) -> dict[str, Any]:
    kubernetes = config.kubernetes
    auth = {"mode": "token"}
    if kubernetes.auth_secret is not None:
        auth["secretName"] = kubernetes.auth_secret
    config_map = f"{config.name}-config" if kubernetes.kind == "RayJob" else None
    return {
        "rayVersion": version("ray"),
        "authOptions": auth,
        "headGroupSpec": head_group(kubernetes, config_map),
        "workerGroupSpecs": [worker_group(kubernetes, group, NODE_LABEL) for group in groups],
    }
