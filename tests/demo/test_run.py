"""The demonstration as a whole."""

import io
import json
import shlex

import pytest
from rich.console import Console

from vllm_jdlora.adapter import read_adapters
from vllm_jdlora.demo import run as run_module
from vllm_jdlora.demo.base_model import MODEL_NAME
from vllm_jdlora.demo.progress import Step
from vllm_jdlora.demo.report import print_curl
from vllm_jdlora.demo.requests import read_requests
from vllm_jdlora.demo.run import CLUSTERS, DATA, RANK, run_demo
from vllm_jdlora.demo.server import ServerFailed


class _CountedCompress:
    """Counts calls of the real `compress`."""

    def __init__(self, original):
        self.original = original
        self.calls = 0

    def __call__(self, *args, **options):
        self.calls += 1
        return self.original(*args, **options)


def test_the_collection_is_made_again_only_when_its_content_differs(tmp_path, monkeypatch):
    counted = _CountedCompress(run_module.compress)
    monkeypatch.setattr(run_module, "compress", counted)
    monkeypatch.setattr(run_module, "RANK", 4)
    monkeypatch.setattr(run_module, "CLUSTERS", 1)
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    adapters = tmp_path / "adapters"
    adapters.mkdir()
    for name in ("fv_antonym", "ii_active_to_passive"):
        (adapters / name).symlink_to(DATA / "adapters" / name)

    def collection():
        step = Step("", lambda text: None)
        return run_module._up_to_date_collection(adapters, base, tmp_path / "cache", step)

    first = collection()
    assert collection().manifest.revision == first.manifest.revision and counted.calls == 1
    (adapters / "fv_antonym").unlink()
    assert [a.name for a in collection().manifest.adapters] == ["ii_active_to_passive"] and counted.calls == 2
    (tmp_path / "cache" / "collection" / "collection.json").write_text("{}")
    collection()
    assert counted.calls == 3
    monkeypatch.setattr(run_module, "RANK", 8)
    assert collection().manifest.rank == 8 and counted.calls == 4
    (base / "config.json").write_text('{"hidden_size": 1}')
    collection()
    assert counted.calls == 5


class _ServerThat:
    """As much of a server as staying up needs: ``exit_code`` does what it is told, then what is next."""

    log_path = "server.log"

    def __init__(self, *behaviours):
        self.behaviours = list(behaviours)

    def exit_code(self):
        behaviour = self.behaviours.pop(0)
        if isinstance(behaviour, BaseException):
            raise behaviour
        return behaviour

    def log_tail(self):
        return "the end"


def test_staying_up_ends_at_ctrl_c(monkeypatch):
    monkeypatch.setattr(run_module.time, "sleep", lambda seconds: None)
    server = _ServerThat(None, None, KeyboardInterrupt())
    run_module._wait_for_interrupt(server)
    assert server.behaviours == []


def test_staying_up_fails_when_the_server_ends_by_itself(monkeypatch):
    monkeypatch.setattr(run_module.time, "sleep", lambda seconds: None)
    with pytest.raises(ServerFailed, match="exit code 7") as failure:
        run_module._wait_for_interrupt(_ServerThat(None, 7))
    assert failure.value.log_tail == "the end"


def test_the_command_to_copy_is_one_line_that_a_shell_reads_back():
    output = io.StringIO()
    request = read_requests(DATA / "requests.json", ["task379_agnews_topic_classification"])[0]
    print_curl(Console(file=output, width=40), "http://127.0.0.1:1", request)
    words = shlex.split(output.getvalue().splitlines()[-1])
    assert words[0] == "curl" and json.loads(words[-1]) == request.body(MODEL_NAME)


@pytest.mark.server
def test_the_served_answers_are_those_without_compression(tmp_path):
    output = io.StringIO()
    answers = run_demo(Console(file=output, width=120), port=None)
    names = [a.name for a in read_adapters([DATA / "adapters"])[0]]
    assert all(f"{name}" in output.getvalue() for name in names)
    # Exact: at these errors (0.20 to 0.25) greedy answers to such clear questions do not change.
    assert [a.served for a in answers] == [a.uncompressed for a in answers]
    # And the adapters were used: the base model answers the same question in another way.
    passive, base = answers[1], answers[3]
    assert passive.request.messages == base.request.messages and passive.served != base.served
    assert all(0 < a.relative_error < 0.3 for a in answers[:3]) and base.relative_error is None
    assert f"rank {RANK}, {CLUSTERS} cluster" in output.getvalue() or "up to date" in output.getvalue()
