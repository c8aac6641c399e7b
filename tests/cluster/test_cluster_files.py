"""configs/cluster: what cannot be run here is held against the schema or the parser of what would run it."""

import fnmatch
import json
import re
import shlex
import tomllib
from importlib import import_module
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

import generate_large
from engine.core.cli import parse_with_flags
from engine.sampling.config import RunConfig
from tests.support.kuberay_schema import KINDS

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "configs" / "cluster"
LAUNCHERS = ("local.yaml", "aws.yaml", "gcp.yaml")
CLOUDS = LAUNCHERS[1:]
RAY = re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.M)
assert RAY
RAY_VERSION = RAY[1]


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((FOLDER / name).read_text())


def parsed(argv: list[str]) -> RunConfig:
    """Parse a command line of generate_large.py as it does; SystemExit for a key it does not know."""
    return parse_with_flags(argv, RunConfig, "generate_large.py", "", generate_large.FLAGS)[0]


# --- Ray's cluster launcher ---


def check_launcher(config: dict[str, Any]) -> dict[str, Any]:
    """Fill in Ray's defaults and hold the result against Ray's schema, as `ray up` does first; return it filled in."""
    import_module("actors")  # before Ray, whose settings it chooses
    ray = import_module("ray.autoscaler._private.util")
    filled = ray.prepare_config(config)
    ray.validate_config(filled)
    return filled


@pytest.mark.parametrize("name", LAUNCHERS)
def test_launcher_files_fit_rays_schema(name: str) -> None:
    filled = check_launcher(read(name))
    start = " ".join(filled["head_start_ray_commands"] + filled["worker_start_ray_commands"])
    assert start.count("--disable-usage-stats") == 2
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in start
    assert "--address=$RAY_HEAD_IP:6379" in start


@pytest.mark.parametrize(
    ("key", "value"), [("max_worker", 3), ("max_workers", "3"), ("head_node_type", "none"), ("setup_commands", "pip")]
)
def test_the_schema_refuses_mistakes(key: str, value: object) -> None:
    with pytest.raises((jsonschema.ValidationError, ValueError, TypeError)):
        check_launcher(read("aws.yaml") | {key: value})


@pytest.mark.parametrize("name", LAUNCHERS)
def test_launcher_files_bring_and_install_the_project(name: str) -> None:
    config = read(name)
    mounts = config["file_mounts"]
    needed = ["engine", "actors", "configs", "pyproject.toml", "constraints.txt", "README.md", "LICENSE"]
    assert mounts == {f"~/zoomldm-engine/{source}": source for source in needed}
    assert all((ROOT / source).exists() for source in needed)
    assert (FOLDER / name).read_text().count("EDIT") > 2
    installs = [command for command in config["setup_commands"] if "pip install" in command]
    assert installs
    for command in installs + [c for c in config.get("head_setup_commands", []) if "pip install" in c]:
        assert "--constraint constraints.txt" in command
    assert any("'.[cluster,cloud]'" in command for command in installs)
    assert any("RAY_ADDRESS=auto" in command for command in config["setup_commands"])


@pytest.mark.parametrize("name", CLOUDS)
def test_cloud_workers_come_on_demand_and_may_be_taken_away(name: str) -> None:
    config = read(name)
    types = config["available_node_types"]
    head, workers = types[config["head_node_type"]], types["gpu"]
    assert head["resources"] == {"CPU": 0}  # no replica on the head
    assert workers["min_workers"] == 0
    assert 0 < workers["max_workers"] == config["max_workers"]
    assert workers["resources"]["GPU"] >= 1
    for kind, spot in ((head, False), (workers, True)):
        said = json.dumps(kind["node_config"])
        assert ('"MarketType": "spot"' in said or '"preemptible": true' in said) == spot


# --- KubeRay ---


def documents() -> dict[str, dict[str, Any]]:
    return {document["kind"]: document for document in yaml.safe_load_all((FOLDER / "kuberay.yaml").read_text())}


def pods() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the pod of the head and those of the workers."""
    cluster = documents()["RayJob"]["spec"]["rayClusterSpec"]
    workers = [group["template"]["spec"] for group in cluster["workerGroupSpecs"]]
    return cluster["headGroupSpec"]["template"]["spec"], workers


@pytest.mark.parametrize("kind", KINDS)
def test_manifest_fits_the_published_reference(kind: str) -> None:
    assert list(jsonschema.Draft202012Validator(KINDS[kind]).iter_errors(documents()[kind])) == []


@pytest.mark.parametrize(
    "path", ["spec.ttl", "spec.rayClusterSpec.headGroupSpec.rayStartParams.num-cpus", "metadata.name"]
)
def test_the_reference_refuses_mistakes(path: str) -> None:
    document = documents()["RayJob"]
    *folder, last = path.split(".")
    place = document
    for key in folder:
        place = place[key]
    place[last] = 0
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(KINDS["RayJob"]).validate(document)


def test_pods_fit_together() -> None:
    head, workers = pods()
    assert {c["image"] for pod in (head, *workers) for c in pod["containers"]} == {head["containers"][0]["image"]}
    for pod in (head, *workers):
        named = {volume["name"] for volume in pod["volumes"]}
        assert {mount["name"] for c in pod["containers"] for mount in c["volumeMounts"]} == named
        for c in pod["containers"]:
            assert c["resources"]["requests"] == c["resources"]["limits"]  # Ray reads limits, Kubernetes requests
    assert all("nvidia.com/gpu" in pod["containers"][0]["resources"]["limits"] for pod in workers)
    assert "nvidia.com/gpu" not in head["containers"][0]["resources"]["limits"]
    claims = [v["persistentVolumeClaim"]["claimName"] for v in head["volumes"] if "persistentVolumeClaim" in v]
    assert claims == [documents()["PersistentVolumeClaim"]["metadata"]["name"]]


def test_the_jobs_command_is_one_of_ours_and_writes_to_the_volume() -> None:
    job = documents()["RayJob"]["spec"]
    python, script, *argv = shlex.split(job["entrypoint"])
    copied = workdir(instructions())
    assert (python, script) == ("python", f"{copied}/generate_large.py")
    config = parsed([word.replace(copied, str(ROOT)) for word in argv])
    mounts = {m["mountPath"] for m in pods()[0]["containers"][0]["volumeMounts"]}
    assert any(config.output.folder.startswith(f"{mount}/") for mount in mounts)
    group = job["rayClusterSpec"]["workerGroupSpecs"][0]
    assert group["minReplicas"] == 0 < (config.ray.replicas or 0) <= group["maxReplicas"]
    assert job["rayClusterSpec"]["enableInTreeAutoscaling"]
    assert job["shutdownAfterJobFinishes"]


# --- the image ---


def instructions() -> list[tuple[str, list[str]]]:
    """Return the Dockerfile's instructions and their words; comments and continuations resolved."""
    text = re.sub(r"^\s*#.*\n", "", (FOLDER / "Dockerfile").read_text(), flags=re.M)
    lines = re.sub(r"\\\n", " ", text).splitlines()
    return [(line.split()[0].upper(), line.split()[1:]) for line in lines if line.strip()]


def workdir(found: list[tuple[str, list[str]]]) -> str:
    return [words[0] for name, words in found if name == "WORKDIR"][-1]


def test_image_copies_what_exists_and_is_sent() -> None:
    ignored = [
        line for line in (FOLDER / "Dockerfile.dockerignore").read_text().splitlines() if line[:1] not in ("", "#")
    ]
    for name, words in instructions():
        if name not in ("COPY", "ADD"):
            continue
        *sources, _ = [word for word in words if not word.startswith("--")]
        for source in sources:
            assert (ROOT / source).exists(), f"COPY {source}"
            sent = True
            for line in ignored:  # the last line that matches decides
                if fnmatch.fnmatch(source, line.removeprefix("!")):
                    sent = line.startswith("!")
            assert sent, f"{source} is not sent to the builder"


def test_image_has_every_package_that_is_installed() -> None:
    """An editable install succeeds without them, and the commands fail."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    wanted = {pattern.rstrip("*") for pattern in project["packages"]["find"]["include"]}
    wanted |= {f"{module}.py" for module in project["py-modules"]}
    copied = {word for name, words in instructions() if name == "COPY" for word in words}
    assert wanted <= copied


def test_image_installs_the_pins_and_runs_as_nobody_special() -> None:
    found = instructions()
    assert {name for name, _ in found} <= {"FROM", "ARG", "RUN", "USER", "WORKDIR", "ENV", "COPY", "CMD"}
    assert found[0][0] == "FROM"
    assert found[0][1][0].startswith("nvidia/cuda:")
    assert [words for name, words in found if name == "USER"][-1][0] not in ("root", "0")
    installs = [" ".join(words) for name, words in found if name == "RUN" and "pip install" in " ".join(words)]
    assert len(installs) == 1
    assert "--constraint constraints.txt" in installs[0]
    assert "'.[cluster,cloud]'" in installs[0]
    order = [" ".join(words) for name, words in found if name in ("COPY", "RUN")]
    assert order.index(installs[0]) > next(
        i for i, words in enumerate(order) if "constraints.txt ./" in words or "./" in words
    )


# --- one version of Ray, and documents that keep up ---


def test_ray_is_the_one_of_constraints_everywhere() -> None:
    """Where Ray is installed it comes from constraints.txt (tested above); where it is named, it is the same."""
    assert documents()["RayJob"]["spec"]["rayClusterSpec"]["rayVersion"] == RAY_VERSION
    for path in FOLDER.iterdir():
        named = re.findall(r"\bray(?:\[\w+\])?[:=]+(\d+\.\d+\.\d+)", path.read_text())
        assert set(named) <= {RAY_VERSION}, path.name


def commands(text: str) -> list[str]:
    """Return the indented lines of a Markdown page, continuations joined."""
    return [line.strip() for line in re.sub(r"\\\n\s*", "", text).splitlines() if line.startswith("    ")]


def test_every_file_has_its_commands_in_the_documents() -> None:
    said = commands((ROOT / "docs/how-to/run_on_a_cluster.md").read_text())
    for path in FOLDER.iterdir():
        if path.name != "Dockerfile.dockerignore":
            assert any(f"configs/cluster/{path.name}" in line for line in said), path.name


def test_the_documents_commands_parse() -> None:
    lines = [
        c
        for c in commands((ROOT / "docs/how-to/run_on_a_cluster.md").read_text())
        if re.search(r"generate_large.py|slurm.sh --", c)
    ]
    assert len(lines) >= 4
    for line in lines:
        argv = shlex.split(re.split(r"generate_large\.py(?: --(?= ))?|slurm\.sh", line)[-1])
        assert parsed(argv).output.folder


# --- the dashboard ---


def test_dashboard_asks_for_metrics_that_exist() -> None:
    from actors.metrics import exposed_names

    board = json.loads((FOLDER / "grafana.json").read_text())
    assert board["title"]
    assert board["schemaVersion"] >= 36
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    asked = set()
    for panel in board["panels"]:
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        for target in panel["targets"]:
            asked |= set(re.findall(r"\bray_\w+", target["expr"]))
    for variable in board["templating"]["list"]:
        asked |= set(re.findall(r"\bray_\w+", json.dumps(variable)))
    assert asked <= exposed_names()
    shown = {re.sub(r"^ray_|_(total|bucket|count|sum)$", "", name) for name in asked}
    assert shown == {re.sub(r"^ray_|_(total|bucket|count|sum)$", "", name) for name in exposed_names()}
