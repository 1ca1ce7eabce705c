"""The files in deploy/: what they name exists in the server, and the tools that read them accept them.

The tools are found as tests/support/foreign_clients.py says; a test is skipped, with that reason, where its tool is absent.
"""

import configparser
import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from typer.testing import CliRunner

from llm2slm_export.cli.app import app
from llm2slm_export.serving.server import _LAST_SECONDS
from tests.support.foreign_clients import run_client, tool
from tests.support.http_server import RunningServer, http_server
from tests.support.paths import REPOSITORY
from tests.support.toy_pair import make_pair

DEPLOY = REPOSITORY / "deploy"
METRIC = re.compile(r"\bllm2slm_[a-z0-9_]+")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    pair = make_pair(tmp_path_factory.mktemp("toy"), {"a": "abc"})
    with http_server({"toy": pair}) as running:
        for model in ("toy", "none"):
            httpx.post(running.url + "/v1/completions", json={"model": model, "prompt": "a", "max_tokens": 3})
        yield running


@pytest.fixture(scope="module")
def exposed(server: RunningServer) -> set[str]:
    """The names of the metrics' series."""
    return set(re.findall(r"^(llm2slm_\w+)", httpx.get(server.url + "/metrics").text, re.MULTILINE))


def expressions() -> list[str]:
    """What the dashboard and the alerts ask Prometheus."""
    dashboard = json.loads((DEPLOY / "grafana-dashboard.json").read_text(encoding="utf-8"))
    rules = yaml.safe_load((DEPLOY / "prometheus-rules.yaml").read_text(encoding="utf-8"))
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked += [variable["query"]["query"] for variable in dashboard["templating"]["list"][1:]]
    return asked + [rule["expr"] for group in rules["groups"] for rule in group["rules"]]


def kubernetes() -> dict[str, Any]:
    """The objects by their kind."""
    text = (DEPLOY / "kubernetes.yaml").read_text(encoding="utf-8")
    return {item["kind"]: item for item in yaml.safe_load_all(text)}


def service() -> dict[str, list[str]]:
    """The settings of systemd's unit, each with its values."""
    found: dict[str, list[str]] = {}
    for line in (DEPLOY / "llm2slm-export.service").read_text(encoding="utf-8").splitlines():
        if "=" in line and not line.startswith("#"):
            name, _, value = line.partition("=")
            found.setdefault(name, []).append(value)
    return found


def arguments() -> dict[str, list[str]]:
    """The arguments of `serve` by the file that gives them."""
    docker = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    entry, command = (json.loads(re.findall(rf"^{name} (\[.*\])$", docker, re.M)[-1]) for name in ("ENTRYPOINT", "CMD"))
    (start,) = service()["ExecStart"]
    (container,) = kubernetes()["Deployment"]["spec"]["template"]["spec"]["containers"]
    return {
        "Dockerfile": entry[1:] + command,
        "llm2slm-export.service": shlex.split(start)[1:],
        "kubernetes.yaml": ["serve", *container["args"]],
    }


def seconds(given: list[str]) -> float:
    """The value of --drain."""
    joined = [part for argument in given for part in argument.split("=", 1)]
    return float(joined[joined.index("--drain") + 1])


def test_every_metric_that_is_asked_for_is_exposed(exposed: set[str]) -> None:
    named = {name for expression in expressions() for name in METRIC.findall(expression)}
    assert len(named) > 15
    assert named - exposed == set()


def test_the_documentation_has_every_metric_and_no_other(server: RunningServer) -> None:
    families = set(re.findall(r"^# TYPE (llm2slm_\w+)", httpx.get(server.url + "/metrics").text, re.MULTILINE))
    text = (REPOSITORY / "docs" / "serving.md").read_text(encoding="utf-8")
    described = set()
    for name, inside, rest in re.findall(r"(llm2slm_[a-z0-9_]+)(?:\{([a-z,]+)\}(\w*))?", text):
        if name == "llm2slm_export":  # the package
            continue
        # name_{one,other}_rest are two metrics; braces at a name's end have its labels.
        described |= {name + one + rest for one in inside.split(",")} if name.endswith("_") else {name}
    assert described == families


def test_every_option_that_is_given_exists() -> None:
    help_text = CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "200"}).output
    options = set(re.findall(r"--[a-z-]+", help_text))
    for file, given in arguments().items():
        assert given[0] == "serve", file
        assert {part.partition("=")[0] for part in given if part.startswith("--")} - options == set(), file


def test_every_probe_is_a_route(server: RunningServer) -> None:
    deployment = kubernetes()["Deployment"]["spec"]["template"]
    (container,) = deployment["spec"]["containers"]
    paths = {container[f"{name}Probe"]["httpGet"]["path"] for name in ("liveness", "readiness", "startup")}
    assert container["readinessProbe"]["httpGet"]["path"] == "/health"
    assert container["livenessProbe"]["httpGet"]["path"] == "/live"
    paths.add(deployment["metadata"]["annotations"]["prometheus.io/path"])
    paths |= set(re.findall(r"http://127\.0\.0\.1:8000(/\w+)", (DEPLOY / "Dockerfile").read_text(encoding="utf-8")))
    for path in paths:
        assert httpx.get(server.url + path).status_code == 200


def test_a_server_has_the_time_to_drain() -> None:
    spec = kubernetes()["Deployment"]["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    pause = re.search(r"sleep\((\d+)\)", container["lifecycle"]["preStop"]["exec"]["command"][-1])
    assert pause is not None
    drain = seconds(container["args"])
    assert spec["terminationGracePeriodSeconds"] > int(pause[1]) + drain + _LAST_SECONDS
    # The pod has left the Service before it is told to stop.
    probe = container["readinessProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] <= drain
    (stop,) = service()["TimeoutStopSec"]
    assert float(stop) > seconds(arguments()["llm2slm-export.service"]) + _LAST_SECONDS


def test_what_kubernetes_selects_and_mounts_is_there() -> None:
    found = kubernetes()
    labels = found["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert found["Deployment"]["spec"]["selector"]["matchLabels"] == labels == found["Service"]["spec"]["selector"]
    assert found["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    spec = found["Deployment"]["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in spec["volumes"]}
    mounted = [mount["mountPath"] for mount in container["volumeMounts"]]
    (keys,) = (argument.partition("=")[2] for argument in container["args"] if argument.startswith("--api-key-file"))
    assert any(keys.startswith(path + "/") for path in mounted)


def test_the_image_has_what_it_is_built_from() -> None:
    docker = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    copied = [part for line in re.findall(r"^COPY (?!--from)(.*)$", docker, re.M) for part in line.split()[:-1]]
    kept = re.findall(r"^!(.*)$", (REPOSITORY / ".dockerignore").read_text(encoding="utf-8"), re.M)
    assert set(copied) == set(kept)
    assert all((REPOSITORY / name).exists() for name in copied)
    version = re.search(r'^version = "(.*)"$', (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"), re.M)
    (container,) = kubernetes()["Deployment"]["spec"]["template"]["spec"]["containers"]
    assert version is not None
    assert container["image"] == f"llm2slm-export:{version[1]}"


def test_the_unit_is_a_unit() -> None:
    parser = configparser.ConfigParser(strict=False, interpolation=None, delimiters=("=",), comment_prefixes=("#",))
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read(DEPLOY / "llm2slm-export.service", encoding="utf-8")
    assert parser.sections() == ["Unit", "Service", "Install"]


@pytest.mark.nightly
def test_promtool_accepts_the_alerts(tmp_path: Path) -> None:
    run_client([tool("promtool"), "check", "rules", str(DEPLOY / "prometheus-rules.yaml")])
    run_client([tool("promtool"), "test", "rules", str(DEPLOY / "prometheus-rules.test.yaml")])
    # Every expression of the dashboard is PromQL.
    rules = [
        {"record": f"r{number}", "expr": re.sub(r"\$__rate_interval", "5m", one)}
        for number, one in enumerate(expressions())
        if "label_values" not in one
    ]
    dashboard = tmp_path / "rules.json"
    dashboard.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}), encoding="utf-8")
    run_client([tool("promtool"), "check", "rules", str(dashboard)])


@pytest.mark.nightly
def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    analyze = tool("systemd-analyze")
    text = (DEPLOY / "llm2slm-export.service").read_text(encoding="utf-8")
    # It looks for the program.
    unit = tmp_path / "llm2slm-export.service"
    unit.write_text(re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", text, flags=re.M), encoding="utf-8")
    done = subprocess.run([analyze, "verify", str(unit)], text=True, capture_output=True)
    assert (done.returncode, done.stderr) == (0, "")
    run_client([analyze, "security", "--offline=true", "--threshold=15", str(unit)])


@pytest.mark.nightly
def test_kubernetes_and_docker_accept_their_files() -> None:
    run_client([tool("kubernetes-validate"), "--strict", str(DEPLOY / "kubernetes.yaml")])
    run_client([tool("hadolint"), str(DEPLOY / "Dockerfile")])
