"""What /metrics says: counts travel from worker to page, add up over API servers, and no series is one adapter's."""

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from prometheus_client import REGISTRY, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.loggers import AggregatedLoggingStatLogger, PrometheusStatLogger
from vllm.v1.metrics.stats import KV_FETCH_STAGES, IterationStats, SchedulerStats
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, AsyncModelRunnerOutput, ModelRunnerOutput
from vllm.v1.request import RequestStatus
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from loadtests.lone_scheduler import compressed_adapter, lone_scheduler, new_request, slot_options
from tests import tiny_llama
from vllm_jdlora.serving import adapter_metrics
from vllm_jdlora.serving.metrics import (
    COUNTERS,
    GAUGES,
    MAX_CHARACTERS,
    MAX_NAMES,
    WAITING_REASONS,
    JDPrometheusLogger,
    name_list,
)
from vllm_jdlora.serving.statistics_carrier import GAUGES as CARRIED
from vllm_jdlora.serving.statistics_carrier import (
    PER_STEP,
    TOTALS,
    WorkerReport,
    take_report,
)

ROOT = Path(__file__).parents[2]
OPTIONS = {"collection": "/c", "revision": "first", "scaling_slots": 300, "plain_slots": 4, "base_slots": 8}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """vLLM's own, of a server with LoRA and without compression."""
    from vllm.engine.arg_utils import EngineArgs

    model = tiny_llama.write_model(tmp_path_factory.mktemp("tiny") / "model")
    return EngineArgs(
        str(model),
        skip_tokenizer_init=True,
        dtype="float32",
        enable_lora=True,
        max_model_len=128,
        served_model_name="base",
    ).create_engine_config()


@pytest.fixture
def compressing(config, monkeypatch):
    monkeypatch.setattr(config, "additional_config", {"jdlora": OPTIONS})
    return config


@pytest.fixture(autouse=True)
def one_registry_for_each_test():
    yield
    for collector in list(REGISTRY._collector_to_names):
        if getattr(collector, "_name", "").startswith(("vllm:", "jdlora:")):
            REGISTRY.unregister(collector)


class Engine:
    """A worker's counts, the real scheduler with one request that goes on and on, and the wire to the API server."""

    def __init__(self, folder: Path, **slots):
        self.counts = {}
        self.worker = WorkerReport(lambda: self.counts)
        self.scheduler = lone_scheduler(folder, slot_options(**slots))
        self.ask(0)

    def ask(self, adapter: int) -> None:
        self.scheduler.add_request(new_request(compressed_adapter(adapter, cluster=0), answer=2000))

    def step(self, **names) -> SchedulerStats:
        """A step's statistics as an API server gets them; it then enters running and waiting names, as vLLM does."""
        scheduled = self.scheduler.schedule()
        ids = list(scheduled.num_scheduled_tokens)
        tokens = ModelRunnerOutput(ids, {name: n for n, name in enumerate(ids)}, [[2] for _ in ids])
        [outputs] = self.scheduler.update_from_output(scheduled, self.worker.attach(tokens)).values()
        received = MsgpackDecoder(EngineCoreOutputs).decode(MsgpackEncoder().encode(outputs)).scheduler_stats
        received.running_lora_adapters.update(names.get("running", {}))
        received.waiting_lora_adapters.update(names.get("waiting", {}))
        return received


def page() -> dict[str, dict[tuple, float]]:
    """Series of the page by sample name; labels as sorted pairs."""
    found: dict[str, dict[tuple, float]] = {}
    for family in text_string_to_metric_families(generate_latest(REGISTRY).decode()):
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    return found


def value(name: str, **labels) -> float:
    wanted = {"model_name": "base", "engine": "0", **labels}
    return page()[name][tuple(sorted((k, v) for k, v in wanted.items() if v is not None))]


def record(logger, stats, engine_idx=0):
    logger.record(stats, IterationStats(), mm_cache_stats=None, engine_idx=engine_idx)


def test_without_compression_the_page_is_vllms_own(config):
    def shown(logger_class):
        logger = logger_class(config, [0, 1])
        stats = SchedulerStats(
            num_running_reqs=3, running_lora_adapters={"a": 1}, waiting_lora_adapters={"b": 1}, kv_cache_usage=0.5
        )
        record(logger, stats, engine_idx=1)
        logger.log_engine_initialized()
        names = {n: series for n, series in page().items() if n.startswith(("vllm:", "jdlora:"))}
        # Values that are times differ.
        return {n: sorted(s) if n.endswith(("_created", "_info")) else s for n, s in names.items()}

    stock = shown(PrometheusStatLogger)
    assert ("running_lora_adapters", "a") in next(iter(stock["vllm:lora_requests_info"]))
    assert shown(JDPrometheusLogger) == stock


def test_every_count_of_a_worker_that_travels_has_a_metric():
    assert {*GAUGES, "revision"} == set(CARRIED)
    assert set(COUNTERS) == set(TOTALS)
    assert PER_STEP == ("clusters_in_step",)


def test_counts_of_worker_and_scheduler_reach_the_page(compressing, tmp_path):
    logger = JDPrometheusLogger(compressing, [0, 1])
    engine = Engine(tmp_path, scaling_slots=1)
    engine.counts = {"resident": 7, "sigma_swaps": 9, "sigma_bytes": 900, "clusters_in_step": 3, "steps": 1}
    engine.ask(1)
    engine.ask(2)
    record(logger, engine.step(), engine_idx=1)
    engine.counts |= {"sigma_swaps": 11, "sigma_bytes": 1100}
    record(logger, engine.step(), engine_idx=1)
    assert value("jdlora:adapters_resident", engine="1") == 7
    assert value("jdlora:sigma_swaps_total", engine="1") == 11
    assert value("jdlora:sigma_swap_bytes_total", engine="1") == 1100
    assert value("jdlora:sigma_swaps_total", engine="0") == 0
    waiting = {r: value("jdlora:waiting_requests", engine="1", reason=r) for r in WAITING_REASONS}
    assert waiting == {"scaling_slot": 2, "plain_slot": 0, "base_slot": 0, "other": 0}
    assert value("jdlora:scaling_slots", engine="1") == OPTIONS["scaling_slots"]
    # Both steps count, also the one whose worker had nothing new to say of them.
    assert value("jdlora:clusters_per_step_count", engine="1") == 2
    assert value("jdlora:clusters_per_step_sum", engine="1") == 6
    assert value("vllm:num_requests_running", engine="1") == 1


def test_a_count_is_sent_again_only_when_it_changed(tmp_path):
    engine = Engine(tmp_path)
    engine.counts = {"resident": 7, "sigma_swaps": 9, "clusters_in_step": 3}
    first = {"resident": 7, "sigma_swaps": 9, "clusters_in_step": 3, "waiting": {"other": 0}}
    assert take_report(engine.step()) == first
    assert take_report(engine.step()) == {"clusters_in_step": 3}
    engine.scheduler.finish_requests(list(engine.scheduler.requests), RequestStatus.FINISHED_ABORTED)
    assert take_report(engine.step()) == {}  # no request, so no step that reads a cluster
    engine.counts |= {"sigma_swaps": 10}
    assert take_report(engine.step()) == {"sigma_swaps": 1}


def test_other_loggers_never_see_the_carrier(compressing, tmp_path):
    """vLLM's own log line sums all entries of the dictionary that the counts travel in."""
    engine = Engine(tmp_path)
    engine.counts = {"resident": 7}
    stats = engine.step()
    record(JDPrometheusLogger(compressing, [0]), stats)
    assert set(stats.num_kv_fetch_reqs_by_stage) == set(KV_FETCH_STAGES)
    # And where nobody takes it out, as offline, it says nothing.
    engine.counts = {"resident": 8}
    logger = AggregatedLoggingStatLogger(compressing, [0])
    logger.record(engine.step(), IterationStats())
    logger.aggregate_scheduler_stats()
    assert not any(logger.last_scheduler_stats.num_kv_fetch_reqs_by_stage.values())


def test_outputs_that_are_shared_or_still_computed_keep_what_they_are():
    class Later(AsyncModelRunnerOutput):
        def get_output(self):
            return ModelRunnerOutput(req_ids=["r"], req_id_to_index={"r": 0})

    counts = {"resident": 1}
    report = WorkerReport(lambda: counts)
    assert report.attach(None) is None
    assert report.attach(EMPTY_MODEL_RUNNER_OUTPUT) is EMPTY_MODEL_RUNNER_OUTPUT
    assert not hasattr(EMPTY_MODEL_RUNNER_OUTPUT, "jdlora_counts")
    later = report.attach(Later())
    assert isinstance(later, AsyncModelRunnerOutput)
    assert later.get_output().jdlora_counts == {"resident": 1}
    same = Later()
    assert report.attach(same) is same  # nothing new to say


def test_no_series_is_added_by_more_adapters(compressing, tmp_path):
    """Thousands of names come and go; routers still find those that run, in the one series that there is."""
    logger = JDPrometheusLogger(compressing, [0])
    engine = Engine(tmp_path)
    sizes = set()
    for step in range(100):
        running = {f"adapter-{step * 50 + i}": 1 for i in range(50)}
        record(logger, engine.step(running=running, waiting={"late": 2, "adapter-0": 0}))
        sizes.add(sum(map(len, page().values())))
    assert len(sizes) == 1
    [(labels, updated)] = page()["vllm:lora_requests_info"].items()
    labels = dict(labels)
    assert labels["running_lora_adapters"].split(",") == list(running)
    assert labels["waiting_lora_adapters"] == "late"
    assert labels["max_lora"] == str(OPTIONS["scaling_slots"] + OPTIONS["plain_slots"])
    assert updated > 1.7e9  # seconds since 1970: routers take the latest


def test_a_list_of_names_is_bounded_and_keeps_the_busiest():
    requests = {f"adapter-{i}": 1 + (i >= 950) for i in range(1000)}
    names = name_list(requests).split(",")
    assert len(names) == MAX_NAMES
    assert {f"adapter-{i}" for i in range(950, 1000)} <= set(names) <= set(requests)
    long = {"x" * 3000: 1, "y" * 3000: 1, "z" * 3000: 1}
    assert name_list(long).split(",") == list(long)[:2]
    assert len(name_list({"x" * (MAX_CHARACTERS + 1): 1})) == 0
    assert name_list({"a": 1, "idle": 0, "b,c": 1, "d": 2}) == "a,d"


def test_the_page_follows_the_revision_and_forgets_the_old_one(compressing, caplog_of_jdlora, tmp_path):
    logger = JDPrometheusLogger(compressing, [0])
    assert list(page()["jdlora:collection_info"]) == [(("model_name", "base"), ("revision", "first"))]
    engine = Engine(tmp_path)
    engine.counts = {"revision": "second"}
    record(logger, engine.step())
    assert list(page()["jdlora:collection_info"]) == [(("model_name", "base"), ("revision", "second"))]
    assert "jdlora event=revision engine=0 old=first new=second" in caplog_of_jdlora.text


def test_a_reload_is_on_the_page_before_the_next_step_and_a_step_from_before_it_takes_nothing_back(
    compressing, caplog_of_jdlora, tmp_path
):
    logger = JDPrometheusLogger(compressing, [0])
    engine = Engine(tmp_path)
    engine.counts = {"revision": "second"}
    under_way = engine.step()
    adapter_metrics.set_revision("third")
    third = [(("model_name", "base"), ("revision", "third"))]
    assert list(page()["jdlora:collection_info"]) == third
    record(logger, under_way)
    assert list(page()["jdlora:collection_info"]) == third
    assert "jdlora event=revision engine=0 old=first new=second" in caplog_of_jdlora.text, "of the step, all the same"


def test_loads_are_counted_by_what_became_of_them(compressing, caplog_of_jdlora):
    JDPrometheusLogger(compressing, [0])
    adapter_metrics.observe_load("a", "compressed", 0.2, 0.07)
    adapter_metrics.observe_load("b two", "plain", 0.3, 0.9)
    adapter_metrics.observe_load("c", "refused", 0.01)
    adapter_metrics.set_known(compressed=12, plain=3)
    loads = {r: value("jdlora:adapter_loads_total", engine=None, result=r) for r in ("compressed", "plain", "refused")}
    assert loads == {"compressed": 1, "plain": 1, "refused": 1}
    assert value("jdlora:adapter_load_seconds_sum", engine=None, result="plain") == pytest.approx(0.3)
    assert value("jdlora:projection_error_count", engine=None) == 2
    assert value("jdlora:adapters_known", engine=None, kind="compressed") == 12
    assert 'event=adapter_load name="b two" result=plain seconds=0.3 relative_error=0.9' in caplog_of_jdlora.text
    assert "event=adapter_load name=c result=refused seconds=0.01\n" in caplog_of_jdlora.text


def test_a_second_server_in_one_process_starts_anew(compressing, tmp_path):
    for _ in range(2):
        logger = JDPrometheusLogger(compressing, [0])
        engine = Engine(tmp_path)
        engine.counts = {"sigma_swaps": 5}
        record(logger, engine.step())
        assert value("jdlora:sigma_swaps_total") == 5


API_SERVERS = """
import json, sys
from pathlib import Path
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.metrics.prometheus import get_prometheus_registry
from vllm.v1.metrics.stats import IterationStats
from prometheus_client import generate_latest
from tests.serving.test_metrics import OPTIONS, Engine, record
from vllm_jdlora.serving.metrics import JDPrometheusLogger

config = EngineArgs(sys.argv[1], skip_tokenizer_init=True, dtype="float32", enable_lora=True, max_model_len=128,
                    served_model_name="base").create_engine_config()
config.additional_config = {"jdlora": OPTIONS}
logger = JDPrometheusLogger(config, [0])
engine = Engine(Path(sys.argv[2]))
print("ready", flush=True)
for line in sys.stdin:  # totals of the worker at this step, and whether the statistics come to this server
    step, mine = json.loads(line)
    engine.counts = {"sigma_swaps": step, "resident": step, "revision": f"r{step}", "clusters_in_step": 1}
    stats = engine.step(running={f"adapter-{step}-{i}": 1 for i in range(3)})
    if mine:
        record(logger, stats)
    print("done", flush=True)
print(json.dumps(generate_latest(get_prometheus_registry()).decode()))
"""


def test_several_api_servers_show_one_truth(config, tmp_path):
    """The statistics of a step come to one of them; prometheus_client keeps old labels in the files they share."""
    folder = tmp_path / "prometheus"
    folder.mkdir()
    env = {"PROMETHEUS_MULTIPROC_DIR": str(folder), "PYTHONPATH": str(ROOT), "VLLM_LOGGING_LEVEL": "ERROR"}
    command = [sys.executable, "-c", API_SERVERS, config.model_config.model, str(tmp_path)]
    pipes = {
        "stdin": subprocess.PIPE,
        "stdout": subprocess.PIPE,
        "text": True,
        "env": {**os.environ, **env},
        "cwd": ROOT,
    }
    servers = [subprocess.Popen(command, **pipes) for _ in range(2)]
    for server in servers:
        while server.stdout.readline() != "ready\n":
            assert server.poll() is None
    for step in range(1, 8):
        for i, server in enumerate(servers):
            server.stdin.write(json.dumps([step, step % 2 == i]) + "\n")
            server.stdin.flush()
            assert server.stdout.readline() == "done\n"
    pages = [json.loads(server.communicate(timeout=60)[0].splitlines()[-1]) for server in servers]
    for text in pages:
        series = [s for f in text_string_to_metric_families(text) for s in f.samples]
        total = [s.value for s in series if s.name == "jdlora:sigma_swaps_total"]
        assert total == [7]
        assert [s.value for s in series if s.name == "jdlora:adapters_resident"] == [7]
        assert [s.labels["revision"] for s in series if s.name == "jdlora:collection_info"] == ["r7"]
        info = sorted((s.value, s.labels["running_lora_adapters"]) for s in series if "lora_requests_info" in s.name)
        assert [names for _, names in info] == [f"adapter-{i}-0,adapter-{i}-1,adapter-{i}-2" for i in (6, 7)]


@pytest.fixture
def caplog_of_jdlora(caplog):
    import logging

    logger = logging.getLogger("vllm.jdlora")
    logger.addHandler(caplog.handler)
    caplog.set_level(logging.INFO, logger.name)
    yield caplog
    logger.removeHandler(caplog.handler)


def test_vllm_finds_the_logger_by_its_entry_point():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    module, _, name = declared["vllm.stat_logger_plugins"]["jdlora"].partition(":")
    assert getattr(import_module(module), name) is JDPrometheusLogger
