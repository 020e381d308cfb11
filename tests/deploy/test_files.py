"""The files an operator deploys: valid by kept tools, and of one mind with each other.

Oracles: hadolint, Kubernetes' own schemas (kubernetes-validate), promtool. The ServiceMonitor has
no such oracle: its schema is written by hand in this file, from the fields that the Prometheus
operator documents; it finds a misspelt field, not a misreading of those documents.
"""

import re
import subprocess
import sys
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

import flux_vllm

REPOSITORY = Path(__file__).resolve().parents[2]
DEPLOY = REPOSITORY / "deploy"
MANIFESTS = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
DOCKERFILE = (REPOSITORY / "Dockerfile").read_text()

ENDPOINT = {
    "type": "object",
    "required": ["port"],
    "additionalProperties": False,
    "properties": {
        "port": {"type": "string"},
        "path": {"type": "string", "pattern": "^/"},
        "interval": {"type": "string", "pattern": "^[0-9]+(ms|s|m|h)$"},
        "relabelings": {
            "type": "array",
            "items": {
                "type": "object",
                "additionalProperties": False,
                "properties": {
                    "sourceLabels": {"type": "array", "items": {"type": "string"}},
                    "targetLabel": {"type": "string"},
                    "replacement": {"type": "string"},
                    "regex": {"type": "string"},
                    "action": {"type": "string"},
                },
            },
        },
    },
}
SERVICE_MONITOR = {
    "type": "object",
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "properties": {
        "apiVersion": {"const": "monitoring.coreos.com/v1"},
        "kind": {"const": "ServiceMonitor"},
        "spec": {
            "type": "object",
            "required": ["selector", "endpoints"],
            "additionalProperties": False,
            "properties": {
                "selector": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {"matchLabels": {"type": "object"}},
                },
                "endpoints": {"type": "array", "minItems": 1, "items": ENDPOINT},
            },
        },
    },
}


def load(name: str) -> dict:
    return yaml.safe_load((DEPLOY / name).read_text())


def container() -> dict:
    (found,) = load("kubernetes/deployment.yaml")["spec"]["template"]["spec"]["containers"]
    return found


@pytest.mark.parametrize("file", ["Dockerfile", "deploy/Dockerfile.cpu"])
def test_dockerfile_passes_hadolint(file):
    hadolint = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([hadolint, file], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("file", MANIFESTS, ids=lambda file: file.stem)
def test_manifest_fits_its_schema(file):
    for document in yaml.safe_load_all(file.read_text()):
        if document["kind"] == "ServiceMonitor":
            jsonschema.validate(document, SERVICE_MONITOR)
        else:
            kubernetes_validate.validate(document, "1.31", strict=True)


@pytest.mark.parametrize("field", ["replicas", "terminationGracePeriod"])
def test_schemas_can_fail(field):
    deployment = load("kubernetes/deployment.yaml")
    deployment["spec"][field] = "one"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, "1.31", strict=True)


def test_manifests_fit_each_other():
    deployment, service = (load(f"kubernetes/{name}.yaml") for name in ("deployment", "service"))
    monitor, cache = (load(f"kubernetes/{name}.yaml") for name in ("servicemonitor", "model-cache"))
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"] == labels
    assert service["spec"]["selector"] == labels
    assert monitor["spec"]["selector"]["matchLabels"] == service["metadata"]["labels"]
    (port,) = service["spec"]["ports"]
    (container_port,) = container()["ports"]
    assert port["targetPort"] == container_port["name"]
    (endpoint,) = monitor["spec"]["endpoints"]
    assert endpoint["port"] == port["name"]
    volumes = deployment["spec"]["template"]["spec"]["volumes"]
    claims = [v["persistentVolumeClaim"]["claimName"] for v in volumes if "emptyDir" not in v]
    assert claims == [cache["metadata"]["name"]]
    assert {v["name"] for v in volumes} == {m["name"] for m in container()["volumeMounts"]}


def test_container_of_the_deployment():
    probes = [container()[f"{kind}Probe"] for kind in ("startup", "liveness", "readiness")]
    assert {probe["httpGet"]["path"] for probe in probes} == {"/health"}
    for kind in ("requests", "limits"):
        assert container()["resources"][kind]["nvidia.com/gpu"] == "1"
    mounts = {mount["name"]: mount["mountPath"] for mount in container()["volumeMounts"]}
    assert mounts["shm"] == "/dev/shm"
    assert f"HF_HOME={mounts['model-cache']} " in DOCKERFILE
    pod = load("kubernetes/deployment.yaml")["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"]
    assert re.findall(r"^USER (\d+)$", DOCKERFILE, re.M) == [
        str(pod["securityContext"]["runAsUser"])
    ]


def test_image_is_named_by_the_versions_in_it():
    (vllm,) = re.findall(r"^FROM vllm/vllm-openai:v(\S+)$", DOCKERFILE, re.M)
    name = f"flux-vllm:{flux_vllm.__version__}-vllm{vllm}"
    assert load("compose.yaml")["services"]["flux"]["image"] == name
    assert container()["image"] == name
    assert name in DOCKERFILE


def test_compose_mounts_what_is_there():
    services = load("compose.yaml")["services"]
    assert services.keys() == {"flux", "prometheus", "grafana"}
    named = load("compose.yaml")["volumes"].keys()
    for service in services.values():
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert (DEPLOY / source).is_dir() if source.startswith(".") else source in named
    (job,) = load("prometheus/prometheus.yaml")["scrape_configs"]
    assert job["static_configs"] == [{"targets": ["flux:8000"]}]
    (source,) = load("grafana/provisioning/datasources/prometheus.yaml")["datasources"]
    assert source["url"] == "http://prometheus:9090"
    (provider,) = load("grafana/provisioning/dashboards/flux.yaml")["providers"]
    mounts = [volume.split(":")[:2] for volume in services["grafana"]["volumes"]]
    assert ["./grafana/dashboards", provider["options"]["path"]] in mounts


def test_compose_publishes_on_this_machine_alone():
    for service in load("compose.yaml")["services"].values():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])


@pytest.mark.parametrize(
    "command",
    ["check config prometheus.yaml", "check rules rules.yaml", "test rules rules_test.yaml"],
)
def test_promtool(command):
    try:
        done = subprocess.run(
            ["promtool", *command.split()],
            cwd=DEPLOY / "prometheus",
            capture_output=True,
            text=True,
        )
    except FileNotFoundError:
        pytest.skip("needs promtool: run tools/install_test_services.sh")
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_a_test():
    groups = load("prometheus/rules.yaml")["groups"]
    alerts = {rule["alert"] for group in groups for rule in group["rules"] if "alert" in rule}
    fired = {
        test["alertname"]
        for case in load("prometheus/rules_test.yaml")["tests"]
        for test in case.get("alert_rule_test", ())
        if test["exp_alerts"]
    }
    assert fired == alerts
