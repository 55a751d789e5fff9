"""cluster.yaml and the KubeRay manifests: Ray's own schema, and lints for what it lets through. No cloud is asked."""

import json
import re
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.runtime_env import RuntimeEnv

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

PROVIDER = {"type", "region", "availability_zone", "cache_stopped_nodes", "use_internal_ips", "key_pair"}
"""What of AWS's provider section may stand here: no inbound rules, no credentials."""
NODE_CONFIG = {
    "BlockDeviceMappings", "IamInstanceProfile", "ImageId", "InstanceMarketOptions", "InstanceType", "KeyName",
    "NetworkInterfaces", "Placement", "SecurityGroupIds", "SubnetIds", "TagSpecifications",
}  # fmt: skip
"""The arguments of EC2's create_instances that make sense in a node type, and Ray's own SubnetIds."""


def versions() -> tuple[str, str]:
    """Ray's and Python's version as pyproject.toml has them."""
    (ray,) = [re.fullmatch(r"ray\[.*\]==([\d.]+)", line) for line in PROJECT["dependencies"] if line.startswith("ray[")]
    python = re.fullmatch(r">=3\.(\d+)", PROJECT["requires-python"])
    assert ray and python
    return ray[1], f"py3{python[1]}"


def strings(value: Any) -> Iterator[str]:
    """Every string of a tree, and every `key: string`."""
    if isinstance(value, dict):
        if {"name", "value"} <= set(value):  # Kubernetes' way to say so
            yield f"{value['name']}: {value['value']}"
        for key, below in value.items():
            yield f"{key}: {below}" if isinstance(below, str) else str(key)
            yield from strings(below)
    elif isinstance(value, list):
        for below in value:
            yield from strings(below)
    elif isinstance(value, str):
        yield value


def lint_image(image: str, gpu: bool) -> Iterator[str]:
    if image.partition(":")[2] != "-".join([*versions(), *(["gpu"] if gpu else [])]):
        yield f"image {image}: not Ray and Python of pyproject.toml{', for GPUs' if gpu else ''}"


def lint_secrets(tree: Any) -> Iterator[str]:
    named, in_a_url, of_aws = (
        r"(TOKEN|PASSWORD|SECRET\w*|ACCESS_KEY\w*)\s*[=:]\s*[^~\s]",
        r"://[^/\s]*:[^/\s]*@",
        r"AKIA\w{12}",
    )
    for text in strings(tree):
        if re.search(f"{named}|{in_a_url}|{of_aws}", text, re.IGNORECASE):
            yield f"secret: {text}"


def lint_cluster(config: dict[str, Any]) -> list[str]:
    """What Ray's schema lets through."""
    found = [f"provider.{key}: unknown" for key in set(config["provider"]) - PROVIDER]
    head = config["head_node_type"]
    for name, node in config["available_node_types"].items():
        found += [f"{name}.node_config.{key}: unknown" for key in set(node["node_config"]) - NODE_CONFIG]
        found += [f"{name}.resources.{key}: unknown" for key in set(node["resources"]) - {"CPU", "GPU", "memory"}]
        if any(bool(node["resources"][kind]) == (name == head) for kind in ("CPU", "GPU")):
            found.append(f"{name}: a GPU or CPU for stages on the head, or none on a worker")
        if not node["node_config"].get("SecurityGroupIds"):  # Ray would make one that opens SSH to the world
            found.append(f"{name}: no security group")
        spot = node["node_config"].get("InstanceMarketOptions", {}).get("MarketType") == "spot"
        if name == head and spot:
            found.append(f"{name}: drivers on a spot node")
        if name != head and node.get("labels", {}).get("ray.io/market-type") != ("spot" if spot else "on-demand"):
            found.append(f"{name}: its market-type label is wrong")
        if name != head and node["min_workers"] != 0:
            found.append(f"{name}: costs while idle")
    docker = config["docker"]
    found += [*lint_image(docker["head_image"], gpu=False), *lint_image(docker["worker_image"], gpu=True)]
    if "-e RAY_AUTH_MODE=token" not in docker.get("run_options", []):
        found.append("token authentication is off")
    if config["file_mounts"].get("/home/ray/.ray/auth_token") != "~/.ray/auth_token":
        found.append("the token does not get to the nodes")
    for text in strings(config):
        if re.search(r"0\.0\.0\.0|::/0|IpPermissions|CidrIp|RAY_AUTH_MODE=disabled", text):
            found.append(f"open to the world: {text}")
    if not any("uv export --quiet --frozen" in command for command in config["setup_commands"]):
        found.append("nodes do not get the versions of uv.lock")
    return [*found, *lint_secrets(config)]


@pytest.fixture
def cluster() -> dict[str, Any]:
    return load("cluster.yaml")


def load(name: str) -> dict[str, Any]:
    """A file; what stands behind one anchor in it is not shared here."""
    tree: dict[str, Any] = json.loads(json.dumps(yaml.safe_load((ROOT / name).read_text())))
    return tree


def test_ray_accepts_the_cluster(cluster: dict[str, Any]) -> None:
    prepared = prepare_config(cluster)
    validate_config(prepared)
    assert prepared["max_workers"] > 0 and prepared["idle_timeout_minutes"] > 0 and prepared["upscaling_speed"] > 0


def test_the_cluster_is_as_it_should_be(cluster: dict[str, Any]) -> None:
    assert lint_cluster(cluster) == []
    workers = [node for name, node in cluster["available_node_types"].items() if name != cluster["head_node_type"]]
    assert {node["labels"]["ray.io/market-type"] for node in workers} == {"spot", "on-demand"}
    assert all((ROOT / file).is_file() for file in cluster["rsync_filter"])
    for command in (*cluster["head_start_ray_commands"], *cluster["worker_start_ray_commands"]):
        assert "--dashboard-host=127.0.0.1" in command or "--head" not in command


def put(path: str, value: Any) -> Callable[[Any], None]:
    """A change of a tree at keys joined by `|`; None removes."""

    def change(tree: Any) -> None:
        *above, last = [int(part) if part.isdigit() else part for part in path.split("|")]
        for part in above:
            tree = tree[part]
        if value is None:
            del tree[last]
        else:
            tree[last] = value

    return change


SCHEMA: dict[str, tuple[Any, str]] = {
    "idle_timeout_min": (5, "'idle_timeout_min' was unexpected"),
    "available_node_types|gpu_spot|min_worker": (0, "'min_worker' was unexpected"),
    "available_node_types|head|node_config": (None, "'node_config' is a required property"),
    "docker|head_img": ("x", "'head_img' was unexpected"),
    "max_workers": ("4", "'4' is not of type 'integer'"),
    "head_node_type": ("hed", "`head_node_type` must be one of"),
}


@pytest.mark.parametrize("path", SCHEMA)
def test_rays_schema_refuses(path: str, cluster: dict[str, Any]) -> None:
    value, message = SCHEMA[path]
    put(path, value)(cluster)
    with pytest.raises(Exception, match=message):
        validate_config(prepare_config(cluster))


NODE = "available_node_types|gpu_spot|"
RULE = {"IpPermissions": [{"FromPort": 8265, "ToPort": 8265, "IpRanges": [{"CidrIp": "0.0.0.0/0"}]}]}
BROKEN: list[tuple[str, Any, str]] = [
    ("provider|regoin", "us-east-1", "provider.regoin: unknown"),
    ("provider|security_group", RULE, "provider.security_group: unknown"),
    ("provider|security_group", RULE, "open to the world: CidrIp"),
    ("provider|aws_credentials", {"aws_access_key_id": "x"}, "provider.aws_credentials: unknown"),
    (NODE + "node_config|InstancType", "g5.xlarge", "gpu_spot.node_config.InstancType: unknown"),
    (NODE + "resources|GPUS", 1, "gpu_spot.resources.GPUS: unknown"),
    (NODE + "resources|GPU", 0, "gpu_spot: a GPU or CPU for stages on the head, or none on a worker"),
    ("available_node_types|head|resources|GPU", 1, "head: a GPU or CPU for stages on the head"),
    ("available_node_types|head|resources|CPU", 4, "head: a GPU or CPU for stages on the head"),
    ("available_node_types|head|node_config|InstanceMarketOptions", {"MarketType": "spot"}, "head: drivers on a spot"),
    (NODE + "node_config|SecurityGroupIds", None, "gpu_spot: no security group"),
    ("available_node_types|head|node_config|SecurityGroupIds", [], "head: no security group"),
    (NODE + "labels", None, "gpu_spot: its market-type label is wrong"),
    (NODE + "node_config|InstanceMarketOptions", None, "gpu_spot: its market-type label is wrong"),
    (NODE + "min_workers", 1, "gpu_spot: costs while idle"),
    ("docker|head_image", "rayproject/ray:2.59.0-py311", "image rayproject/ray:2.59.0-py311: not Ray and Python"),
    ("docker|worker_image", "rayproject/ray:2.60.0-py312-gpu", "-py312-gpu: not Ray and Python"),
    ("docker|worker_image", "rayproject/ray:2.60.0-py311", "not Ray and Python of pyproject.toml, for GPUs"),
    ("docker|head_image", "rayproject/ray:latest", "latest: not Ray and Python"),
    ("docker|run_options", None, "token authentication is off"),
    ("docker|run_options", ["-e RAY_AUTH_MODE=disabled"], "open to the world: -e RAY_AUTH_MODE=disabled"),
    ("file_mounts", {}, "the token does not get to the nodes"),
    ("head_start_ray_commands|1", "ray start --head --dashboard-host=0.0.0.0", "open to the world: ray start --head"),
    ("setup_commands", ["pip install torch"], "nodes do not get the versions of uv.lock"),
    ("docker|run_options|0", "-e RAY_AUTH_TOKEN=abc", "secret: -e RAY_AUTH_TOKEN=abc"),
    ("provider|aws_secret_access_key", "abc", "secret: aws_secret_access_key: abc"),
    ("setup_commands|0", "export AWS_SECRET_ACCESS_KEY=abc", "secret: export AWS_SECRET"),
    ("setup_commands|0", "export MLFLOW_TRACKING_URI=http://me:abc@mlflow", "secret: export MLFLOW_TRACKING_URI"),
]


@pytest.mark.parametrize(("path", "value", "message"), BROKEN, ids=[f"{row[0]}: {row[2]}" for row in BROKEN])
def test_the_lint_finds(path: str, value: Any, message: str, cluster: dict[str, Any]) -> None:
    put(path, value)(cluster)
    assert [line for line in lint_cluster(cluster) if message in line]


# fields of ray.io/v1 in KubeRay 1.6 (docs/reference/api.md), and RayCronJob's timeZone of 1.7
METADATA = {"name", "generateName", "namespace", "labels", "annotations"}
CRON_JOB = {"schedule", "jobTemplate", "suspend", "timeZone"}
JOB = {
    "activeDeadlineSeconds", "backoffLimit", "clusterSelector", "deletionStrategy", "entrypoint", "entrypointNumCpus",
    "entrypointNumGpus", "entrypointResources", "jobId", "managedBy", "metadata", "preRunningDeadlineSeconds",
    "rayClusterSpec", "runtimeEnvYAML", "shutdownAfterJobFinishes", "submissionMode", "submitterConfig",
    "submitterPodTemplate", "suspend", "ttlSecondsAfterFinished",
}  # fmt: skip
CLUSTER = {
    "authOptions", "autoscalerOptions", "enableInTreeAutoscaling", "gcsFaultToleranceOptions", "headGroupSpec",
    "headServiceAnnotations", "managedBy", "rayVersion", "suspend", "upgradeStrategy", "workerGroupSpecs",
}  # fmt: skip
HEAD = {"enableIngress", "headService", "labels", "rayStartParams", "resources", "serviceType", "template"}
WORKERS = {
    "groupName", "idleTimeoutSeconds", "labels", "maxReplicas", "minReplicas", "numOfHosts", "rayStartParams",
    "replicas", "resources", "scaleStrategy", "suspend", "template",
}  # fmt: skip
CONTAINER = {
    "args", "command", "env", "envFrom", "image", "imagePullPolicy", "lifecycle", "name", "ports", "resources",
    "securityContext", "volumeMounts",
}  # fmt: skip


def lint_manifest(manifest: dict[str, Any]) -> list[str]:
    kind, spec = manifest["kind"], manifest["spec"]
    found: list[str] = []

    def check(where: str, tree: dict[str, Any], known: set[str], needed: set[str]) -> None:
        found.extend(f"{where}.{key}: unknown" for key in set(tree) - known)
        found.extend(f"{where}.{key}: missing" for key in needed - set(tree))

    if manifest["apiVersion"] != "ray.io/v1" or kind not in ("RayJob", "RayCronJob"):
        found.append(f"{manifest['apiVersion']} {kind}: no such kind")
    check("manifest", manifest, {"apiVersion", "kind", "metadata", "spec"}, {"metadata", "spec"})
    check("metadata", manifest["metadata"], METADATA, set())
    if kind == "RayCronJob":
        check("spec", spec, CRON_JOB, {"schedule", "jobTemplate"})
        if len(spec["schedule"].split()) != 5:
            found.append(f"schedule {spec['schedule']}: not five fields")
        spec = spec["jobTemplate"]
    check("job", spec, JOB, {"entrypoint", "rayClusterSpec", "shutdownAfterJobFinishes"})
    if "ttlSecondsAfterFinished" in spec and not spec["shutdownAfterJobFinishes"]:
        found.append("ttlSecondsAfterFinished: without effect")
    command = re.fullmatch(r"python -m (jobs\.\w+) (\S+)", spec["entrypoint"])
    if not command or not all((ROOT / f).is_file() for f in (command[1].replace(".", "/") + ".py", command[2])):
        found.append(f"entrypoint {spec['entrypoint']}: not a command of this project")
    ray = spec["rayClusterSpec"]
    check("cluster", ray, CLUSTER, {"headGroupSpec", "workerGroupSpecs"})
    if ray["rayVersion"] != versions()[0]:
        found.append(f"rayVersion {ray['rayVersion']}: not pyproject.toml's")
    if ray.get("authOptions", {}).get("mode") != "token":
        found.append("token authentication is off")
    head = ray["headGroupSpec"]
    check("head", head, HEAD, {"rayStartParams", "template"})
    if head.get("serviceType", "ClusterIP") != "ClusterIP" or head.get("enableIngress"):
        found.append("the head is open to the world")
    for group in ray["workerGroupSpecs"]:
        check("workers", group, WORKERS, {"groupName", "minReplicas", "maxReplicas", "rayStartParams", "template"})
    for group in (head, *ray["workerGroupSpecs"]):
        (container,) = group["template"]["spec"]["containers"]
        check("container", container, CONTAINER, {"image", "name", "resources", "env"})
        if any(not isinstance(value, str) for value in group["rayStartParams"].values()):
            found.append("rayStartParams: not strings")
        gpu = "nvidia.com/gpu" in container["resources"]["limits"]
        if gpu == (group is head):
            found.append("a GPU on the head, or none on a worker")
        found += lint_image(container["image"], gpu)
        if "MLFLOW_TRACKING_URI" not in [item["name"] for item in container["env"] if "secretKeyRef" in str(item)]:
            found.append("MLFLOW_TRACKING_URI: not from a Secret")
    return [*found, *lint_secrets(manifest)]


MANIFESTS = {"RayJob": "jobs/kuberay/rayjob.yaml", "RayCronJob": "jobs/kuberay/raycronjob.yaml"}


@pytest.mark.parametrize("kind", MANIFESTS)
def test_the_manifests_are_as_they_should_be(kind: str) -> None:
    manifest = load(MANIFESTS[kind])
    assert manifest["kind"] == kind and lint_manifest(manifest) == []


def test_the_schedule_runs_the_same_job() -> None:
    assert load(MANIFESTS["RayCronJob"])["spec"]["jobTemplate"] == load(MANIFESTS["RayJob"])["spec"]


def test_ray_accepts_the_runtime_environment() -> None:
    values = yaml.safe_load(load(MANIFESTS["RayJob"])["spec"]["runtimeEnvYAML"])
    assert set(RuntimeEnv(**values)["env_vars"]) == {"GIT_COMMIT", "RAY_JOB_STOP_WAIT_TIME_S"}


SPEC = "spec|rayClusterSpec|"
FIRST = "template|spec|containers|0|"
WRONG: list[tuple[str, str, Any, str]] = [
    ("RayJob", "apiVersion", "ray.io/v1alpha1", "ray.io/v1alpha1 RayJob: no such kind"),
    ("RayJob", "kind", "RayJobs", "no such kind"),
    ("RayJob", "metadata|nmae", "x", "metadata.nmae: unknown"),
    ("RayJob", "spec|ttlSecondAfterFinished", 1, "job.ttlSecondAfterFinished: unknown"),
    ("RayJob", "spec|schedule", "* * * * *", "job.schedule: unknown"),
    ("RayJob", "spec|shutdownAfterJobFinishes", False, "ttlSecondsAfterFinished: without effect"),
    ("RayJob", "spec|entrypoint", "python -m jobs.trian jobs/recipes/mnist.yaml", "not a command of this project"),
    ("RayJob", "spec|entrypoint", "python -m jobs.train jobs/recipes/gone.yaml", "not a command of this project"),
    ("RayJob", SPEC + "rayVersion", "2.59.0", "rayVersion 2.59.0: not pyproject.toml's"),
    ("RayJob", SPEC + "authOptions", None, "token authentication is off"),
    ("RayJob", SPEC + "authOptions", {"mode": "disabled"}, "token authentication is off"),
    ("RayJob", SPEC + "headGroupSpec|rayStartParam", {}, "head.rayStartParam: unknown"),
    ("RayJob", SPEC + "headGroupSpec|rayStartParams", {"num-gpus": 0}, "rayStartParams: not strings"),
    ("RayJob", SPEC + "headGroupSpec|serviceType", "LoadBalancer", "the head is open to the world"),
    ("RayJob", SPEC + "headGroupSpec|" + FIRST + "image", "rayproject/ray:2.60.0", "not Ray and Python"),
    ("RayJob", SPEC + "headGroupSpec|" + FIRST + "resources|limits|nvidia.com/gpu", "1", "a GPU on the head"),
    ("RayJob", SPEC + "workerGroupSpecs|0|numHosts", 1, "workers.numHosts: unknown"),
    ("RayJob", SPEC + "workerGroupSpecs|0|groupName", None, "workers.groupName: missing"),
    ("RayJob", SPEC + "workerGroupSpecs|0|" + FIRST + "image", "rayproject/ray:2.60.0-py311", "not Ray and Python"),
    ("RayJob", SPEC + "workerGroupSpecs|0|" + FIRST + "env", [], "MLFLOW_TRACKING_URI: not from a Secret"),
    ("RayJob", "spec|runtimeEnvYAML", "env_vars: {MLFLOW_TRACKING_PASSWORD: abc}", "secret: env_vars"),
    ("RayJob", SPEC + "headGroupSpec|" + FIRST + "env|0", {"name": "API_TOKEN", "value": "x"}, "secret: API_TOKEN: x"),
    ("RayCronJob", "spec|shedule", "0 3 * * *", "spec.shedule: unknown"),
    ("RayCronJob", "spec|schedule", "hourly", "schedule hourly: not five fields"),
    ("RayCronJob", "spec|timezone", "Etc/UTC", "spec.timezone: unknown"),
    ("RayCronJob", "spec|concurrencyPolicy", "Forbid", "spec.concurrencyPolicy: unknown"),
    ("RayCronJob", "spec|jobTemplate|backofLimit", 1, "job.backofLimit: unknown"),
]


@pytest.mark.parametrize(("kind", "path", "value", "message"), WRONG, ids=[f"{row[1]}: {row[3]}" for row in WRONG])
def test_the_lint_of_manifests_finds(kind: str, path: str, value: Any, message: str) -> None:
    manifest = load(MANIFESTS[kind])
    put(path, value)(manifest)
    assert [line for line in lint_manifest(manifest) if message in line]


def test_the_versions_are_the_projects() -> None:
    import ray

    assert versions() == (ray.__version__, "py311")
