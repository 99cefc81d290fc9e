"""Jobs for KubeRay: what the command makes of a run, that the operator takes it, and that all actors fit."""

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from actors.cli import main
from actors.manifest_rules import quantity
from actors.model_source import ModelSize
from actors.placement import Bundle, bundles_of
from configs.load import load_config
from configs.schema import RunConfig
from tests.deploy.kuberay_schemas import faults

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "kuberay"
RUNS = sorted((FOLDER / "runs").glob("*.yaml"))
BIG = str(FOLDER / "runs" / "grpo-disaggregated.yaml")
Tree = dict[str, Any]


def made(capsys: pytest.CaptureFixture[str], *words: str) -> list[Tree]:
    """The documents that `bascule manifest` prints."""
    assert main(["manifest", *words]) == 0
    return list(yaml.safe_load_all(capsys.readouterr().out))


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line of a command whose input is wrong."""
    assert main(["manifest", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1, captured.err
    return captured.err


def test_there_is_a_job_for_every_kind_of_run_and_a_cluster_for_development() -> None:
    names = {"grpo-colocated", "grpo-disaggregated", "gkd", "sft", "dev"}
    assert {path.stem for path in RUNS} == names
    kinds = {
        name: [each["kind"] for each in yaml.safe_load_all((FOLDER / f"{name}.yaml").read_text())]
        for name in names
    }
    assert kinds.pop("dev") == ["RayCluster"]
    assert set(map(tuple, kinds.values())) == {("ConfigMap", "RayJob")}


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_the_shipped_jobs_are_what_the_command_makes_and_the_operator_takes_them(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["manifest", "--config", str(path)]) == 0
    text = capsys.readouterr().out
    assert text == (FOLDER / path.name).read_text(), "run `make manifests`"
    for document in yaml.safe_load_all(text):
        if document["kind"] != "ConfigMap":
            assert list(faults(document)) == []


@pytest.mark.parametrize("path", [path for path in RUNS if path.stem != "dev"], ids=lambda path: path.stem)
def test_the_job_runs_that_very_run(path: Path, tmp_path: Path) -> None:
    config_map, job = yaml.safe_load_all((FOLDER / path.name).read_text())
    given = yaml.safe_load(path.read_text())
    del given["kubernetes"]
    (tmp_path / "given.yaml").write_text(yaml.safe_dump(given))
    (tmp_path / "config.yaml").write_text(config_map["data"]["config.yaml"])
    algorithm = given["algorithm"]
    mounted = load_config(tmp_path / "config.yaml", [], algorithm)
    told = ["--device", "cuda", "--node_label", "bascule-role"]
    assert mounted == load_config(tmp_path / "given.yaml", told, algorithm)
    entry = job["spec"]["entrypoint"].split()
    assert entry[1:] == ["-m", "actors.cli", algorithm, "--config", "/etc/bascule/config.yaml"]
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    (volume,) = [each for each in head["volumes"] if each["name"] == "config"]
    assert volume["configMap"]["name"] == config_map["metadata"]["name"]
    (mount,) = [each for each in head["containers"][0]["volumeMounts"] if each["name"] == "config"]
    assert (mount["mountPath"], list(config_map["data"])) == ("/etc/bascule", ["config.yaml"])


def place(bundles: tuple[Bundle, ...], groups: list[Tree]) -> list[str]:
    """Owners of bundles that no node has room for, when the largest are placed first, each where it fits first."""
    nodes = [
        (group["labels"], {name: quantity(amount) for name, amount in group["resources"].items()})
        for group in groups
        for _ in range(group["replicas"])
    ]
    lost: list[str] = []
    for bundle in sorted(bundles, key=lambda each: (each.gpus, each.memory), reverse=True):
        asked = bundle.resources
        for labels, free in nodes:
            fits = all(free.get(name, 0) + 1e-6 >= amount for name, amount in asked.items())
            if labels["bascule-role"] == bundle.nodes and fits:
                for name, amount in asked.items():
                    free[name] -= amount
                break
        else:
            lost.append(bundle.owner)
    return lost


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("--gpus_per_node", "4"),
        ("--trainer.data_parallel_size", "3"),
        ("--num_engines", "3", "--rollout.tensor_parallel_size", "4", "--num_workers", "7"),
        ("--bridge.placement", "trainer", "--num_engines", "5", "--cpus_per_engine", "0.3"),
        ("--tensor_model_parallel_size", "2", "--rollout.tensor_parallel_size", "1", "--gpus_per_node", "3"),
        ("--model.device", "cpu", "--bridge.offload_bridge", "false"),
    ],
)
def test_the_pods_have_room_for_all_that_the_actors_ask_for(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    resolved = [word.replace("tensor_model", "trainer.tensor_model") for word in words]
    config_map, job = made(capsys, "--config", BIG, *resolved)
    assert list(faults(job)) == []
    run = RunConfig.model_validate(yaml.safe_load(config_map["data"]["config.yaml"]))
    size = ModelSize(num_parameters=8_200_000_000, num_in_experts=0, nbytes=0)
    bundles = bundles_of(run, size, run.model.device)
    groups = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert place(bundles, groups) == []
    # And hardly more: what is too much costs GPUs.
    asked = sum(bundle.gpus for bundle in bundles)
    assert asked == sum(group["replicas"] * int(group["resources"].get("GPU", 0)) for group in groups)
    # One pod less of any group, and something has no place.
    for group in groups:
        fewer = [each | {"replicas": each["replicas"] - (each is group)} for each in groups]
        assert place(bundles, fewer) != [], group["groupName"]


def test_groups_are_those_that_the_run_has_and_tensor_parallel_ranks_stay_on_one_node(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def groups(*words: str) -> dict[str, tuple[int, str | None]]:
        job = made(capsys, *words)[1]
        return {
            each["groupName"]: (each["replicas"], each["resources"].get("GPU"))
            for each in job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
        }

    assert groups("--config", BIG) == {"trainer": (2, "8"), "rollout": (1, "8"), "bridge": (1, None)}
    assert groups("--config", str(FOLDER / "runs/sft.yaml")) == {"trainer": (1, "8")}
    # 12 ranks in groups of 4 on nodes of 8: 6 and 6 would cut a group in two.
    assert groups("--config", BIG, "--trainer.data_parallel_size", "3")["trainer"] == (3, "4")
    # Without completions of its own, gkd has no engines.
    gkd = ("--config", str(FOLDER / "runs/gkd.yaml"), "--lmbda", "0")
    assert groups(*gkd) == {"trainer": (1, "8")}


ASKED = shlex.split("""--job_name job-1 --namespace rl --image r/i@sha256:0 --claim big --mount_path /shared/x
--output_dir /shared/x/run --secret_env.WANDB_API_KEY wandb/key --env.NCCL_DEBUG WARN --env.NCCL_IB_TIMEOUT 22
--image_pull_secrets pull --service_account runs --kubernetes.annotations.k8s.v1.cni.cncf.io/networks net
--node_selector.pool h100 --active_deadline_s 3600 --pre_running_deadline_s 60 --pod_grace_s 120
--auth_secret token --gpu_resource amd.com/gpu --backoff_limit 5""")


def test_everything_that_can_be_asked_for_is_in_the_pods(capsys: pytest.CaptureFixture[str]) -> None:
    config_map, job = made(capsys, "--config", BIG, *ASKED)
    assert list(faults(job)) == []
    assert {each["metadata"]["namespace"] for each in (config_map, job)} == {"rl"}
    spec = job["spec"]
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "rl"
    assert (spec["backoffLimit"], spec["activeDeadlineSeconds"], spec["preRunningDeadlineSeconds"]) == (
        5,
        3600,
        60,
    )
    assert yaml.safe_load(spec["runtimeEnvYAML"]) == {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "100"}}
    cluster = spec["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token", "secretName": "token"}
    trainer = cluster["workerGroupSpecs"][0]["template"]
    assert trainer["metadata"]["annotations"] == {"k8s.v1.cni.cncf.io/networks": "net"}
    pod, container = trainer["spec"], trainer["spec"]["containers"][0]
    assert (pod["terminationGracePeriodSeconds"], pod["serviceAccountName"]) == (120, "runs")
    assert (pod["nodeSelector"], pod["imagePullSecrets"]) == ({"pool": "h100"}, [{"name": "pull"}])
    env = {each["name"]: each.get("value", each.get("valueFrom")) for each in container["env"]}
    assert env == {
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "100",
        "NCCL_SOCKET_IFNAME": "eth0",
        "GLOO_SOCKET_IFNAME": "eth0",
        "NCCL_DEBUG": "WARN",
        "NCCL_IB_TIMEOUT": "22",
        "WANDB_API_KEY": {"secretKeyRef": {"name": "wandb", "key": "key"}},
    }
    assert container["envFrom"] == [{"secretRef": {"name": "bascule-env"}}]
    assert container["resources"]["limits"] | {"memory": ""} == {
        "memory": "",
        "amd.com/gpu": "8",
        "rdma/hca": "8",
    }
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["IPC_LOCK"]}
    bridge = cluster["workerGroupSpecs"][2]["template"]["spec"]["containers"][0]
    assert "add" not in bridge["securityContext"]["capabilities"]
    submitter = spec["submitterPodTemplate"]["spec"]
    assert (container["image"], submitter["containers"][0]["image"]) == ("r/i@sha256:0", "r/i@sha256:0")
    assert submitter["imagePullSecrets"] == [{"name": "pull"}]


def test_other_ways_to_submit_have_no_pod_for_it_and_a_cluster_has_no_job(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for mode in ("HTTPMode", "SidecarMode"):
        other = made(capsys, "--config", BIG, "--submission_mode", mode)[1]
        assert "submitterPodTemplate" not in other["spec"]
        assert list(faults(other)) == []
    cluster = made(capsys, "--config", BIG, "--kind", "RayCluster")
    assert [each["kind"] for each in cluster] == ["RayCluster"]
    assert list(faults(cluster[0])) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--image", ""], "command line: --kubernetes.image is ''"),
        (["--claim", "Big Claim"], "command line: --kubernetes.claim is 'Big Claim'"),
        (["--namespace", "Rl"], "command line: --kubernetes.namespace is 'Rl'"),
        (["--job_name", "a" * 48], "command line: --kubernetes.job_name is 'aaaa"),
        (["--output_dir", "/shared/8"], "kubernetes.job_name: '8', made of output_dir, is no name for a job"),
        (["--output_dir", "runs/x"], "output_dir: runs/x is lost with the pod"),
        (
            ["--resume_steps", "0", "--backoff_limit", "2"],
            "kubernetes.backoff_limit: 2 more tries would have",
        ),
        (["--checkpoint.resume", "never", "--backoff_limit", "1"], "kubernetes.backoff_limit: 1 more tries"),
        (["--env.HF_TOKEN", "hf_canary"], "kubernetes.env: HF_TOKEN looks like a secret"),
        (["--env.A", "1", "--secret_env.A", "s/k"], "kubernetes.secret_env: A is in kubernetes.env as well"),
        (
            ["--rewards.0.kwargs.database", "https://u:canary@h/r"],
            "rewards.0.kwargs.database: has a password in its address",
        ),
        (["--cluster.address", "auto"], "cluster.address: is the pods' own Ray's"),
        (["--gpus_per_node", "1"], "kubernetes.gpus_per_node: an engine has 2 GPUs"),
        (["--shm_size", "64 GB"], "command line: --kubernetes.shm_size is '64 GB'"),
        (
            ["--num_parameters", "null"],
            "kubernetes.num_parameters: /shared/models/Qwen3-8B cannot be read here",
        ),
        (["--model.model", "docs"], "model.model: docs is here and not in the pods"),
        (["--data.dataset", "pyproject.toml"], "data.dataset: pyproject.toml is here and not in the pods"),
        (["--queue_nam", "q"], "did you mean --kubernetes.queue_name?"),
        (["--pod_grace_s", "5"], "command line: --kubernetes.pod_grace_s is 5;"),
    ],
)
def test_wrong_input_is_one_line_that_names_the_option(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    shown = refused(capsys, "--config", BIG, *words)
    assert message in shown
    assert "canary" not in shown


def walk(tree: Any) -> Iterator[Mapping[str, Any]]:
    if isinstance(tree, dict):
        yield tree
    for inner in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        yield from walk(inner)


def test_what_runs_share_fits_their_pods() -> None:
    """Selectors, ports and names of the static files against the generated ones."""
    folder = {path.name: path.read_text() for path in FOLDER.glob("*.yaml")}
    shared = yaml.safe_load(folder["kustomization.yaml"])["resources"]
    runs = {path.name for path in RUNS}
    assert set(folder) == {*shared, *runs, "kustomization.yaml"}
    jobs = [each for name in runs for each in yaml.safe_load_all(folder[name])]
    pods = [node["template"] for each in jobs for node in walk(each) if "template" in node]
    named = {
        port["name"] for pod in pods for each in pod["spec"]["containers"] for port in each.get("ports", [])
    }
    policy, monitor = (yaml.safe_load(folder[f"{name}.yaml"]) for name in ("networkpolicy", "podmonitor"))
    for selector in (policy["spec"]["podSelector"], monitor["spec"]["selector"]):
        assert selector["matchLabels"].items() == {("app.kubernetes.io/part-of", "bascule")}
        assert all(selector["matchLabels"].items() <= pod["metadata"]["labels"].items() for pod in pods)
    assert {port["port"] for rule in policy["spec"]["ingress"] for port in rule.get("ports", [])} <= named
    assert {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]} == {
        name for name in named if name.endswith("metrics")
    }
    claims = {node["claimName"] for each in jobs for node in walk(each) if "claimName" in node}
    assert claims == {yaml.safe_load(folder["claim.yaml"])["metadata"]["name"]}
