# SPDX-License-Identifier: Apache-2.0
"""The manifests of examples/kubernetes: Kubernetes' schemas, and what no schema knows."""

from __future__ import annotations

import copy
import json
import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tests.serve_arguments import parse_as_vllm_serve
from vllm_elastic.config import ElasticConfig

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples" / "kubernetes"
VERSIONS = ["1.30", kubernetes_validate.latest_version().rpartition(".")[0]]
GPU = "nvidia.com/gpu"
WORKLOADS = ("Deployment", "StatefulSet")

MANIFESTS = {
    path.stem: list(yaml.safe_load_all(path.read_text())) for path in sorted(FOLDER.glob("*.yaml"))
}
DOCUMENTS = [
    pytest.param(document, id=f"{file}-{document['kind']}-{document['metadata']['name']}")
    for file, documents in MANIFESTS.items()
    for document in documents
]
FILES = pytest.mark.parametrize("file", list(MANIFESTS))


def of_kind(file: str, *kinds: str) -> list[dict[str, Any]]:
    return [document for document in MANIFESTS[file] if document["kind"] in kinds]


def pod_of(workload: dict[str, Any]) -> dict[str, Any]:
    return workload["spec"]["template"]["spec"]


def labels_of(workload: dict[str, Any]) -> dict[str, str]:
    return workload["spec"]["template"]["metadata"]["labels"]


def pods(file: str) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Each workload and its one container."""
    for workload in of_kind(file, *WORKLOADS):
        (container,) = pod_of(workload)["containers"]
        yield workload, container


def server(file: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The workload, and its container, that `vllm serve` runs in."""
    (found,) = [pair for pair in pods(file) if "vllm serve" in " ".join(pair[1]["command"])]
    return found


def served(file: str) -> Any:
    """The arguments of `vllm serve` as vLLM's own parser reads them; unknown ones are an error."""
    return parse_as_vllm_serve(server(file)[1]["args"])


def script_of(container: dict[str, Any]) -> str | None:
    """What a shell runs, if the container starts with one."""
    command = container["command"]
    return command[2] if command[0] == "bash" else None


def selects(selector: dict[str, str], labels: dict[str, str]) -> bool:
    return bool(selector) and selector.items() <= labels.items()


def test_there_is_one_of_either() -> None:
    assert {file: len(of_kind(file, *WORKLOADS)) for file in MANIFESTS} == {
        "one-node": 1,
        "several-nodes": 2,
    }


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("document", DOCUMENTS)
def test_schema(document: dict[str, Any], version: str) -> None:
    """Strictly: a field that Kubernetes does not know is an error."""
    assert kubernetes_validate.validate(document, version, strict=True) == version


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["spec", "replicas"], "one"),
        (["spec", "template", "spec", "enableServiceLink"], False),
        (["spec", "template", "spec", "containers", 0, "startupProbe", "path"], "/health"),
        (["spec", "template", "spec", "containers", 0, "env", 0, "value"], 1),
        (["spec", "selector"], "llada"),
    ],
)
def test_schema_refuses(path: list[Any], value: Any, version: str) -> None:
    """The validator is one: each of these mistakes is found."""
    document = copy.deepcopy(of_kind("one-node", "Deployment")[0])
    place: Any = document
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(document, version, strict=True)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_namespace_is_left_to_kubectl(document: dict[str, Any]) -> None:
    assert "namespace" not in document["metadata"]


@FILES
def test_workloads_select_their_own_pods_only(file: str) -> None:
    workloads = of_kind(file, *WORKLOADS)
    for one in workloads:
        selector = one["spec"]["selector"]["matchLabels"]
        chosen = [other for other in workloads if selects(selector, labels_of(other))]
        assert chosen == [one]


@FILES
def test_services_reach_ports_that_pods_have(file: str) -> None:
    services = of_kind(file, "Service")
    for service in services:
        spec = service["spec"]
        chosen = [c for w, c in pods(file) if selects(spec["selector"], labels_of(w))]
        assert chosen, service["metadata"]["name"]
        for port in spec["ports"]:
            targets = [
                have["containerPort"]
                for container in chosen
                for have in container.get("ports", [])
                if port["targetPort"] in (have["name"], have["containerPort"])
            ]
            assert targets == [port["port"]]
    (api,) = [s for s in services for p in s["spec"]["ports"] if p["name"] == "http"]
    workload, _ = server(file)
    chosen = [w for w, _ in pods(file) if selects(api["spec"]["selector"], labels_of(w))]
    assert chosen == [workload], "requests go to the server and nowhere else"
    assert api["metadata"]["name"] != "vllm", "it would set VLLM_PORT in every pod"


@FILES
def test_server_is_probed_for_its_health(file: str) -> None:
    from vllm.entrypoints.serve.instrumentator.health import router

    _, container = server(file)
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    paths = {route.path for route in router.routes}
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        probe = container[name]["httpGet"]
        assert probe["path"] == "/health"
        assert probe["path"] in paths
        assert ports[probe["port"]] == served(file).port
    start = container["startupProbe"]
    patience = start["periodSeconds"] * start["failureThreshold"]
    env = {each["name"]: each.get("value") for each in container["env"]}
    assert patience >= int(env["VLLM_ENGINE_READY_TIMEOUT_S"])


@FILES
def test_flags_are_vllms_and_the_plugins(file: str) -> None:
    args = served(file)
    words = server(file)[1]["args"]
    assert words[words.index("--plugin") + 1] == "elastic"
    assert args.plugin == "elastic"
    knobs = ElasticConfig.from_dict(args.elastic_config)
    assert knobs.policy == "elastic-block"
    assert args.elastic_config == json.loads(words[words.index("--elastic-config") + 1])
    assert words[0] == args.model_tag == "GSAI-ML/LLaDA-8B-Instruct"


@FILES
def test_a_deleted_pod_answers_what_is_in_flight(file: str) -> None:
    """Without it vLLM leaves every client waiting until Kubernetes kills the pod."""
    workload, _ = server(file)
    killed_after = workload["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    # A worker that does not end by itself has up to 10 s: docs/deploy.md.
    assert 30 <= served(file).shutdown_timeout <= killed_after - 15


@FILES
def test_as_many_gpus_as_ranks(file: str) -> None:
    gpus = [
        workload["spec"]["replicas"] * int(container["resources"]["limits"][GPU])
        for workload, container in pods(file)
    ]
    args = served(file)
    assert sum(gpus) == args.tensor_parallel_size
    assert args.distributed_executor_backend == (None if len(gpus) == 1 else "ray")


@FILES
def test_what_is_served_fits(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The README's command of `bench plan`, with the flags of the manifests."""
    from vllm_elastic.bench.__main__ import make_parser

    (line,) = re.findall(
        r"python -m vllm_elastic.bench (plan .*)", (FOLDER / "README.md").read_text()
    )
    planned = make_parser().parse_args(shlex.split(line))
    args = served(file)
    assert args.tensor_parallel_size in planned.tp
    assert planned.max_num_seqs == args.max_num_seqs
    assert planned.row_budget == args.max_num_batched_tokens
    assert planned.gpu_memory_utilization == args.gpu_memory_utilization
    assert planned.dtype == args.dtype
    planned.canvas = args.max_model_len
    planned.tp = [args.tensor_parallel_size]
    planned.function(planned)  # exit status 1 if no canvas fits
    last = capsys.readouterr().out.splitlines()[-1]
    assert int(last.strip("| ").split("|")[-1]) > 0


@FILES
def test_volumes_are_what_is_mounted(file: str) -> None:
    claims = {claim["metadata"]["name"] for claim in of_kind(file, "PersistentVolumeClaim")}
    for workload, container in pods(file):
        volumes = {volume["name"]: volume for volume in pod_of(workload)["volumes"]}
        for claim in workload["spec"].get("volumeClaimTemplates", []):
            volumes[claim["metadata"]["name"]] = claim
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        assert set(mounts.values()) == set(volumes)
        assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
        used = {
            volume["persistentVolumeClaim"]["claimName"]
            for volume in volumes.values()
            if "persistentVolumeClaim" in volume
        }
        assert used <= claims
        env = {each["name"]: each.get("value") for each in container["env"]}
        assert env["HF_HOME"] in mounts


@FILES
def test_environment_is_known_to_vllm(file: str) -> None:
    from vllm import envs

    for workload, container in pods(file):
        names = [each["name"] for each in container["env"]]
        assert len(names) == len(set(names))
        ours = {name for name in names if name.startswith("VLLM_")}
        assert ours and ours <= set(envs.environment_variables)
        assert pod_of(workload)["enableServiceLinks"] is False, "see get_vllm_port in vllm/envs.py"


@FILES
def test_image_is_the_recipes(file: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    image = f"{project['name']}:{project['version']}"
    assert {container["image"] for _, container in pods(file)} == {image}
    recipe = (ROOT / "examples" / "container" / "Dockerfile").read_text()
    assert f"-t {image} ." in recipe


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # importing Ray's command has dozens
def test_scripts_are_shell_and_rays_flags_exist() -> None:
    from ray.scripts.scripts import start

    known = {name for option in start.params for name in option.opts}
    scripts = [s for _, c in pods("several-nodes") if (s := script_of(c)) is not None]
    assert len(scripts) == 2
    for script in scripts:
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
        (command,) = re.findall("ray start (.*)", script.replace("\\\n", " "))
        flags = {word.split("=")[0] for word in shlex.split(command)}
        assert flags and flags <= known, flags - known


def test_workers_find_the_head() -> None:
    head, container = server("several-nodes")
    (worker,) = [c for w, c in pods("several-nodes") if w is not head]
    env = {each["name"]: each.get("value") for each in worker["env"]}
    name = f"{head['metadata']['name']}-0.{head['spec']['serviceName']}"
    assert env["RAY_HEAD"] == name
    (headless,) = [s for s in of_kind("several-nodes", "Service") if "clusterIP" in s["spec"]]
    assert headless["spec"]["clusterIP"] == "None"
    assert headless["spec"]["publishNotReadyAddresses"] is True
    for workload, _ in pods("several-nodes"):
        assert workload["spec"]["serviceName"] == headless["metadata"]["name"]
        assert selects(headless["spec"]["selector"], labels_of(workload))
    port = next(p["containerPort"] for p in container["ports"] if p["name"] == "gcs")
    assert f"--port={port}" in (script_of(container) or "")
    assert (script_of(worker) or "").count(str(port)) == 2


def test_every_rank_has_the_same_surroundings() -> None:
    """vLLM's head hands its environment to the ranks, but for what Ray and NCCL read earlier."""
    head, of_head = server("several-nodes")
    (of_worker,) = [c for w, c in pods("several-nodes") if w is not head]
    for name in ("VLLM_HOST_IP", "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "HF_HOME"):
        (one,) = [each for each in of_head["env"] if each["name"] == name]
        assert one in of_worker["env"]
    for key in ("resources", "securityContext", "volumeMounts", "image"):
        assert of_head[key] == of_worker[key]


def test_rays_ports_are_for_its_pods_only() -> None:
    (policy,) = of_kind("several-nodes", "NetworkPolicy")
    pods_of_policy = policy["spec"]["podSelector"]["matchLabels"]
    assert all(selects(pods_of_policy, labels_of(w)) for w, _ in pods("several-nodes"))
    among, anyone = policy["spec"]["ingress"]
    assert among == {"from": [{"podSelector": {"matchLabels": pods_of_policy}}]}
    assert anyone == {"ports": [{"port": "http"}]}


@pytest.mark.parametrize("path", [*FOLDER.glob("*"), FOLDER], ids=lambda path: path.name)
def test_says_that_it_was_not_run(path: Path) -> None:
    text = (path / "README.md" if path.is_dir() else path).read_text()
    assert re.search(r"[Vv]alidated against the Kubernetes schemas(\*\*)?, not run here", text)
