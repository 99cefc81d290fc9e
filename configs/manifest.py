"""What `bascule manifest` is told: a run, and the Kubernetes cluster that it is for."""

import re
from collections.abc import Iterator
from typing import Annotated, Literal, Self, cast

from pydantic import BeforeValidator, Field, model_validator

from configs.schema import RunConfig
from configs.section import Names, Section
from configs.web import has_password

_SECRET = re.compile(
    r"(TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY)", re.IGNORECASE
)


def _written_out(value: object) -> object:
    """A number as text: what follows `NAME:` in a file is one more often than not."""
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


Variable = Annotated[str, BeforeValidator(_written_out)]
Quantity = Annotated[str, Field(pattern=r"^[1-9][0-9]*([kMGT]|[KMGT]i)?$")]
"""An amount in Kubernetes' terms: 16Gi, 500M."""
DnsLabel = Annotated[str, Field(pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$", max_length=63)]
DnsName = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", max_length=253)]
SecretKey = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?/[-._a-zA-Z0-9]+$")]
AbsolutePath = Annotated[str, Field(pattern=r"^(/[^/]+)+$")]


class KubernetesConfig(Section):
    """The pods of a run on KubeRay, see docs/kubernetes.md. `bascule manifest` alone reads this section."""

    kind: Literal["RayJob", "RayCluster"] = "RayJob"
    """A job for this run, or a cluster with the same pods that jobs are submitted to by hand."""
    job_name: DnsLabel | None = Field(default=None, max_length=47)
    """Name of the job or cluster; by default that of the output directory."""
    namespace: DnsLabel | None = None
    """Namespace of everything; by default the one that kubectl is set to."""
    image: str = Field(min_length=1, pattern=r"^\S+$")
    """Image of all pods, made with deploy/Dockerfile; by digest or a tag that never moves."""
    image_pull_secrets: Names = ()
    """Names of secrets that the image is pulled with."""
    python: AbsolutePath = "/opt/bascule/bin/python"
    """The image's interpreter that this project is installed in."""
    claim: DnsName
    """A PersistentVolumeClaim that all nodes can write (ReadWriteMany): models, data, and output_dir."""
    mount_path: AbsolutePath = "/shared"
    """Where it is mounted in every pod."""
    num_parameters: float | None = Field(default=None, gt=0)
    """Parameters of the model, as 8.2e9, for the pods' memory, where its files cannot be read here."""
    num_parameters_in_experts: float = Field(default=0, ge=0)
    """How many of them are in experts that a router chooses from."""
    teacher_num_parameters: float | None = Field(default=None, gt=0)
    """The same of a teacher in the trainer ranks."""
    gpus_per_node: int = Field(default=8, ge=1)
    """GPUs that one pod takes at most; on CPU, ranks or engines of one pod at most."""
    gpu_resource: str = Field(default="nvidia.com/gpu", pattern=r"^[^/\s]+/[^/\s]+$")
    """What a GPU is called there."""
    head_cpus: int = Field(default=4, ge=1)
    """CPUs of the head, where the command itself runs; it has no GPU and no actors."""
    head_memory: Quantity = "16Gi"
    """Memory of the head."""
    shm_size: Quantity = "16Gi"
    """Size of /dev/shm in each worker pod, for NCCL, vLLM's workers and, with half of it, Ray's objects."""
    pod_grace_s: int = Field(default=300, ge=60)
    """Seconds that a pod which is told to end gets to save; Ray drains it 20 s less."""
    backoff_limit: int | None = Field(default=None, ge=0)
    """How often a failed job is started again, on new pods; by default 3 with checkpoint.resume_steps, else 0."""
    ttl_s: int = Field(default=600, ge=0)
    """Seconds that the pods of a finished job stay, to look at."""
    active_deadline_s: int | None = Field(default=None, gt=0)
    """Longest a job may take, in seconds."""
    pre_running_deadline_s: int | None = Field(default=None, gt=0)
    """Longest a job may wait for its pods, in seconds; a queue's time may count."""
    submission_mode: Literal["K8sJobMode", "HTTPMode", "SidecarMode"] = "K8sJobMode"
    """Who submits the job: a pod whose log is the run's (kubectl logs), the operator, or one in the head."""
    auth_secret: DnsName | None = None
    """Secret with `auth_token`, Ray's token; by default the operator makes one."""
    queue_name: DnsName | None = None
    """Kueue's LocalQueue, which starts the job when all its pods have room."""
    service_account: DnsName | None = None
    """Service account of the pods; its token is not mounted."""
    socket_ifname: str | None = Field(default=None, pattern=r"^[\w.=^,-]+$")
    """Network interface of NCCL and gloo (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME); by default they choose."""
    rdma_resource: str | None = Field(default=None, pattern=r"^[^/\s]+/[^/\s]+$")
    """Resource of RDMA devices, such as rdma/hca, for pods with GPUs; they may then lock memory (IPC_LOCK)."""
    rdma_count: int = Field(default=1, ge=1)
    """How many of it one pod takes."""
    env: dict[str, Variable] = Field(default={})
    """Environment of all pods. Nothing secret: anybody who may read the job can read it."""
    secret_env: dict[str, SecretKey] = Field(default={})
    """Environment from secrets: NAME: SECRET/KEY."""
    env_from_secrets: Names = ()
    """Names of secrets of which every key becomes a variable."""
    node_selector: dict[str, str] = Field(default={})
    """Labels of Kubernetes' nodes that the worker pods go to."""
    annotations: dict[str, str] = Field(default={})
    """Annotations of the worker pods, for instance their networks."""


class ManifestConfig(RunConfig):
    """A run, and the cluster that it is for."""

    kubernetes: KubernetesConfig

    @property
    def run(self) -> RunConfig:
        """The run alone."""
        return RunConfig.model_validate(self.model_dump(exclude={"kubernetes"}))

    @property
    def name(self) -> str:
        """Of the job or cluster."""
        return self.kubernetes.job_name or re.sub(r"[^a-z0-9]+", "-", self.output_dir.name.lower()).strip("-")

    @property
    def retries(self) -> int:
        """How often a failed job is started again."""
        given = self.kubernetes.backoff_limit
        return given if given is not None else 3 if self._has_states else 0

    @property
    def _has_states(self) -> bool:
        return self.checkpoint.keeps_states and self.checkpoint.resume != "never"

    @model_validator(mode="after")
    def _fits_kubernetes(self) -> Self:
        # Here and not in its section: of a section pydantic shows the whole input, secrets included.
        for problem in (*_in_clear(self.kubernetes), *_addresses(self.model_dump(mode="json"), "")):
            raise ValueError(problem)
        if not re.fullmatch(r"[a-z]([-a-z0-9]{0,45}[a-z0-9])?", self.name):
            raise ValueError(
                f"kubernetes.job_name: {self.name!r}, made of output_dir, is no name for a job: at most 47 "
                "lower-case letters, digits and dashes, a letter first; give it"
            )
        if self.cluster.address is not None:
            raise ValueError("cluster.address: is the pods' own Ray's in a manifest; leave it out")
        mount = self.kubernetes.mount_path
        if self.kubernetes.kind == "RayJob" and not self.output_dir.is_relative_to(mount):
            raise ValueError(
                f"output_dir: {self.output_dir} is lost with the pod; give a directory in kubernetes.mount_path, "
                f"such as {mount}/runs/{self.output_dir.name}"
            )
        if self.retries and not self._has_states:
            raise ValueError(
                f"kubernetes.backoff_limit: {self.retries} more tries would have nothing to go on from; set "
                "checkpoint.resume_steps, with checkpoint.resume auto, or backoff_limit 0"
            )
        return self


def _in_clear(kubernetes: KubernetesConfig) -> Iterator[str]:
    """What is wrong with the environment, without its values."""
    for name in kubernetes.env:
        if looks_secret(name):
            yield (
                f"kubernetes.env: {name} looks like a secret, and would stand in the job in clear; put it into a "
                f"secret and give --secret_env.{name} SECRET/KEY"
            )
    if both := sorted(kubernetes.env.keys() & kubernetes.secret_env.keys()):
        yield f"kubernetes.secret_env: {', '.join(both)} is in kubernetes.env as well; remove one"


def looks_secret(name: str) -> bool:
    """Whether a variable of this name is likely to hold a secret."""
    return _SECRET.search(name) is not None


def _addresses(value: object, place: str) -> Iterator[str]:
    """Options with a URL that has a password in it: the config is readable by whoever can read the job."""
    if isinstance(value, dict):
        for key, inner in cast("dict[str, object]", value).items():
            yield from _addresses(inner, f"{place}.{key}" if place else key)
    elif isinstance(value, list):
        for index, inner in enumerate(cast("list[object]", value)):
            yield from _addresses(inner, f"{place}.{index}")
    elif isinstance(value, str) and has_password(value):
        yield f"{place}: has a password in its address, which would stand in the ConfigMap in clear"
