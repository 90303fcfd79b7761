"""What the demo checks before it starts anything."""

import pytest

from vllm_jdlora.demo import environment
from vllm_jdlora.demo.environment import check_environment, cpu_dtype
from vllm_jdlora.errors import JDLoRAError


@pytest.fixture(autouse=True)
def complete_environment(monkeypatch):
    monkeypatch.setattr(environment, "_version", lambda name: "1.0")
    monkeypatch.setattr(environment, "_available_gib", lambda: 64.0)
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [({"avx2"}, "float32"), ({"avx2", "avx512f"}, "float32"), ({"avx512f", "avx512_bf16"}, "bfloat16")],
)
def test_bf16_is_used_only_where_the_cpu_has_it(flags, dtype):
    assert cpu_dtype(flags) == dtype


def test_the_summary_names_what_runs():
    summary = check_environment().summary
    assert "Python" in summary and "vLLM 1.0" in summary


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(environment, "_version", lambda name: None if name == "peft" else "1.0")
    with pytest.raises(JDLoRAError, match=r"peft.*make setup"):
        check_environment()


def test_a_plugin_list_that_hides_this_plugin_is_refused(monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    with pytest.raises(JDLoRAError, match="VLLM_PLUGINS"):
        check_environment()
    monkeypatch.setenv("VLLM_PLUGINS", "other,jdlora")
    check_environment()


def test_too_little_memory_is_refused(monkeypatch):
    monkeypatch.setattr(environment, "_available_gib", lambda: 1.0)
    with pytest.raises(JDLoRAError, match="memory"):
        check_environment()
