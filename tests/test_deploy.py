"""The files under deploy/, held to what they are for: schemas, Ray's own launcher, the commands and names they use."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import jsonschema
import promql_parser
import pytest
import typer
import yaml
from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE

from dataengine import plugins
from dataengine.driver import DRAIN_SECONDS
from dataengine.labeler import Labeler
from pipelines import __main__, commands  # noqa: F401  the two halves of the command line register themselves
from pipelines.cli import app
from pipelines.metrics import METRICS

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
LOCK = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines())
FILES = sorted(p for p in DEPLOY.iterdir() if p.is_file())


def documents(name: str) -> list[Any]:
    """The documents of a YAML file; a key given twice is an error, as it is for Kubernetes."""

    class Strict(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            keys = [k.value for k, _ in node.value if k.value != "<<"]
            assert len(keys) == len(set(keys)), f"{name}: a key is given twice: {keys}"
            return super().construct_mapping(node, deep)

    return list(yaml.load_all((DEPLOY / name).read_text(), Strict))


# -- every file -------------------------------------------------------------------------------------------------------


def labelling_commands() -> list[tuple[str, list[str]]]:
    """Every `dataengine label ...` of the files and the guide, continuation lines joined, comment marks removed."""
    found = []
    for file in [*FILES, ROOT / "docs" / "cluster.md"]:
        text = re.sub(r"\s*\\\n#?\s*", " ", file.read_text())
        for match in re.finditer(r"(?:dataengine|\.sh|dataengine:\S+) (label (?:s3://|/)[^\n'`]+)", text):
            words = shlex.split(match[1], comments=True)
            found.append((file.name, words[1 : words.index("&&")] if "&&" in words else words[1:]))
    return found


def test_each_cluster_has_a_labelling_command_and_the_guide_has_all_of_them() -> None:
    where = {name for name, _ in labelling_commands()}
    assert where >= {"ray-cluster.yaml", "kuberay.yaml", "slurm.sh", "Dockerfile", "cluster.md"}
    guide = (ROOT / "docs" / "cluster.md").read_text()
    assert [p.name for p in FILES if f"deploy/{p.name}" not in guide] == []
    assert [name for name in re.findall(r"deploy/([\w.-]+\w)", guide) if not (DEPLOY / name).exists()] == []


@pytest.mark.parametrize(("file", "words"), labelling_commands())
def test_labelling_commands_are_ones_that_the_program_takes(file: str, words: list[str]) -> None:
    command = typer.main.get_command(app).commands["label"]  # type: ignore[attr-defined]
    given = command.make_context("label", list(words)).params
    made = {m for name in plugins.names("labelers") for m in plugins.load("labelers", name, Labeler)().emits}
    assert given["modalities"]
    assert [m for m in given["modalities"] if m not in made] == []
    if file != "Dockerfile":  # `auto` would look at the machine of the driver, which may have no GPU
        assert given["device"] == "cuda"
        assert given["workers"] > 1  # what an autoscaler sees


@pytest.mark.parametrize("file", FILES, ids=lambda p: p.name)
def test_no_file_holds_a_key_an_account_or_a_registry(file: Path) -> None:
    text = file.read_text()
    secrets = r"AKIA\w|aws_secret|AWS_ACCESS_KEY|secretKeyRef|BEGIN \w* ?PRIVATE|password|index-url"
    assert re.findall(secrets, text, re.IGNORECASE) == []
    assert re.findall(r"\b\d{12}\b", text) == []  # an AWS account
    assert re.findall(r"\b(?:pypi|docker|quay|ghcr|gcr|nvcr|ecr|npmjs|debian)\.\w+", text) == []


# -- ray up -----------------------------------------------------------------------------------------------------------


def test_ray_launches_the_cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What `ray up` does until the machines run, with Ray's own code against a stand-in for EC2."""
    monkeypatch.setenv("HOME", str(tmp_path))  # Ray keeps the new key pair in ~/.ssh
    (tmp_path / ".ssh").mkdir()
    program = """
import json, sys, boto3, yaml
from moto import mock_aws
from ray.autoscaler._private.aws.config import bootstrap_aws
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.docker import docker_start_cmds
from ray.autoscaler._private.util import prepare_config, validate_config

with mock_aws():
    for name in ("dataengine-head", "dataengine-worker"):
        boto3.client("iam").create_instance_profile(InstanceProfileName=name)
    config = AWSNodeProvider.fillout_available_node_types_resources(prepare_config(yaml.safe_load(open(sys.argv[1]))))
    validate_config(config)
    types = bootstrap_aws(config)["available_node_types"]
    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    for name, kind in types.items():
        provider.create_node(kind["node_config"], {"ray-node-name": name}, 1)
    docker = config["docker"]
    run = docker_start_cmds("ubuntu", docker["image"], {}, "name", docker["run_options"], "cluster", "~", "docker")
    machines = [i for r in boto3.client("ec2").describe_instances()["Reservations"] for i in r["Instances"]]
    print(json.dumps({"config": config, "run": run, "machines": machines}, default=str))
"""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "stand-in")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-west-2")
    said = subprocess.run(
        [sys.executable, "-c", program, DEPLOY / "ray-cluster.yaml"], capture_output=True, text=True, check=False
    )
    assert said.returncode == 0, said.stderr[-2000:]
    launched = json.loads(said.stdout.splitlines()[-1])
    config, machines = launched["config"], {m["InstanceType"]: m for m in launched["machines"]}
    types = config["available_node_types"]
    assert types["l4"]["resources"]["GPU"] == 1
    assert types["a100"]["resources"]["GPU"] == 8
    assert types["head"]["resources"]["CPU"] == 0
    assert sum(t["min_workers"] for t in types.values()) == 0  # nothing waits at our cost
    for name, kind in types.items():
        machine = machines[kind["node_config"]["InstanceType"]]
        assert machine.get("InstanceLifecycle") == (None if name == "head" else "spot")
        assert machine["IamInstanceProfile"]["Arn"].endswith(
            "dataengine-head" if name == "head" else "dataengine-worker"
        )
    # Ray's defaults would install another Ray over the lock's, and start the image's own program in place of a shell.
    assert config["setup_commands"] == config["head_setup_commands"] == config["worker_setup_commands"] == []
    assert "--entrypoint=" in launched["run"]
    assert any(" /opt/dataengine/deploy/drain.py watch" in c for c in config["worker_start_ray_commands"])


# -- Kubernetes -------------------------------------------------------------------------------------------------------


def check(document: Any) -> list[str]:
    """What a Kubernetes with these resource definitions would refuse in a document."""
    crds = json.loads((ROOT / "tests" / "golden" / "crds.json").read_text())
    schema = crds["kinds"][f"{document['apiVersion']}/{document['kind']}"] | {"$defs": crds["$defs"]}
    return [f"{e.json_path}: {e.message}" for e in jsonschema.Draft202012Validator(schema).iter_errors(document)]


def pods(job: Any) -> dict[str, Any]:
    """The pod templates of a RayJob, by group."""
    cluster = job["spec"]["rayClusterSpec"]
    groups = {g["groupName"]: g for g in cluster["workerGroupSpecs"]} | {"head": cluster["headGroupSpec"]}
    return groups


def test_the_manifests_have_the_schemas_of_their_kinds() -> None:
    account, job = documents("kuberay.yaml")
    (monitor,) = documents("podmonitor.yaml")
    assert check(job) == []
    assert check(monitor) == []
    assert account["kind"] == "ServiceAccount"
    job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["graceperiod"] = 1
    assert len(check(job)) == 1  # the schema does see the pods


def test_pods_have_time_to_drain_and_room_for_the_object_store() -> None:
    account, job = documents("kuberay.yaml")
    assert job["spec"]["rayClusterSpec"]["rayVersion"] == LOCK["ray"]
    for name, group in pods(job).items():
        spec = group["template"]["spec"]
        (container,) = spec["containers"]
        env = {e["name"]: e["value"] for e in container["env"]}
        drains = float(env["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
        assert DRAIN_SECONDS + 10 <= drains <= spec["terminationGracePeriodSeconds"] - 10
        assert float(env["RAY_JOB_STOP_WAIT_TIME_S"]) >= DRAIN_SECONDS + 10
        assert spec["serviceAccountName"] == account["metadata"]["name"]
        assert spec["securityContext"]["runAsUser"] == 1000  # the user of the image
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert ("nvidia.com/gpu" in container["resources"]["limits"]) == (name == "gpu")
        (mount,) = container["volumeMounts"]
        (volume,) = spec["volumes"]
        assert (mount["mountPath"], mount["name"]) == ("/dev/shm", volume["name"])
        assert volume["emptyDir"] == {"medium": "Memory", "sizeLimit": "2Gi"}
        assert int(group["rayStartParams"]["object-store-memory"]) <= 2**30
        assert ("tolerations" in spec) == (name != "head")
        assert ("affinity" in spec) == (name == "head")


def test_the_monitor_finds_every_pod() -> None:
    (monitor,) = documents("podmonitor.yaml")
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    for group in pods(documents("kuberay.yaml")[1]).values():
        assert monitor["spec"]["selector"]["matchLabels"].items() <= group["template"]["metadata"]["labels"].items()
        assert endpoint["port"] in {p["name"] for p in group["template"]["spec"]["containers"][0]["ports"]}


# -- the image --------------------------------------------------------------------------------------------------------


def instructions() -> list[tuple[str, str]]:
    """The instructions of the Dockerfile, continuation lines joined."""
    text = re.sub(r"^#.*\n", "", (DEPLOY / "Dockerfile").read_text(), flags=re.MULTILINE)
    joined = re.sub(r"\\\n\s*", " ", text)
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1]) for line in joined.splitlines() if line]


def test_the_image_is_made_from_the_lock_as_the_checkout_is() -> None:
    said = subprocess.run(
        [Path(sys.executable).with_name("hadolint"), DEPLOY / "Dockerfile"], capture_output=True, text=True, check=False
    )
    assert (said.returncode, said.stdout) == (0, "")
    made = instructions()
    assert [v for k, v in made if k == "FROM"] == ["python:3.11-slim-bookworm"]
    makefile = re.search(r"python -m (pip install [^\n]+)", (ROOT / "Makefile").read_text())
    assert makefile is not None
    ours = makefile[1].replace('--editable ".[dev]"', "--no-cache-dir . boto3").split()
    image = next(v for k, v in made if k == "RUN" and "--constraint" in v).split("python -m ")[1].split()
    assert sorted(image) == sorted(ours)
    assert "boto3" in LOCK
    assert ("ENTRYPOINT", '["dataengine"]') in made
    assert ("USER", "1000:100") in made
    # What KubeRay's probes and `ray up` call.
    assert any({"rsync", "wget"} <= set(v.split()) for k, v in made if k == "RUN")


def test_what_the_image_copies_is_all_that_its_build_needs(tmp_path: Path) -> None:
    """Both installs of the Dockerfile, as far as they read the checkout: with empty packages, and with the real."""
    allowed = [line[1:].rstrip("/") for line in (ROOT / ".dockerignore").read_text().splitlines() if line[0] == "!"]
    sources = [word for k, v in instructions() if k == "COPY" for word in v.split()[:-1]]
    assert sorted(sources) == sorted(allowed)
    files = [s for s in sources if (ROOT / s).is_file()]
    packages = [s for s in sources if (ROOT / s).is_dir()]
    for kind in ("empty", "real"):
        context = tmp_path / kind
        context.mkdir()
        for name in files:
            (context / name).parent.mkdir(exist_ok=True)
            (context / name).write_bytes((ROOT / name).read_bytes())
        for name in packages:
            if kind == "empty":
                (context / name).mkdir()
            else:
                (context / name).symlink_to(ROOT / name)
        subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel"], cwd=context, check=True)
    (wheel,) = (tmp_path / "real" / "dist").iterdir()
    inside = zipfile.ZipFile(wheel).namelist()
    assert {"dataengine/actors.py", "labelers/sam.py", "model/fourm.py", "pipelines/page.html.j2"} <= set(inside)
    (wheel,) = (tmp_path / "empty" / "dist").iterdir()
    inside = zipfile.ZipFile(wheel).namelist()
    assert not any(name.endswith(".py") for name in inside)
    (metadata,) = (name for name in inside if name.endswith("METADATA"))
    assert "Requires-Dist: torch\n" in zipfile.ZipFile(wheel).read(metadata).decode()


# -- watching ---------------------------------------------------------------------------------------------------------

DASHBOARD = json.loads((DEPLOY / "grafana.json").read_text())


def test_the_dashboard_shows_every_metric_and_no_other() -> None:
    shown = [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", [])]
    names = set()
    for expression in shown:
        promql_parser.parse(expression)
        names |= set(re.findall(r"\bray_dataengine_\w+", expression))
        allowed = {"SessionName", "ray_io_cluster"}
        for metric in METRICS:
            allowed |= set(metric.labels) if f"ray_{metric.name}{{" in expression else set()
        by = re.findall(r"by \(([^)]*)\)", expression)
        used = {label for group in by for label in group.split(", ")} | set(re.findall(r"(\w+)=~?\"", expression))
        assert used <= allowed, expression
    assert names == {f"ray_{metric.name}" for metric in METRICS}


def test_the_dashboard_is_whole() -> None:
    variables = {v["name"] for v in DASHBOARD["templating"]["list"]}
    assert variables == {"datasource", "cluster", "session"}
    assert set(re.findall(r"\$\{?([a-z]\w+)", json.dumps(DASHBOARD))) == variables
    assert len({p["id"] for p in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert max(x for x, _ in cells) < 24
        assert not cells & taken, panel["title"]
        taken |= cells
        assert panel["title"]


def test_prometheus_reads_the_list_that_ray_writes() -> None:
    (config,) = documents("prometheus.yml")
    (scrape,) = config["scrape_configs"]
    assert scrape["file_sd_configs"][0]["files"] == [f"/tmp/ray/{PROMETHEUS_SERVICE_DISCOVERY_FILE}"]
