"""The register of vLLM names is true for the installed vLLM, and a difference is told."""

import dataclasses

import pytest

from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.serving import touchpoints


@pytest.mark.parametrize("where", ["frontend", "engine", "worker", "cuda"])
def test_the_installed_vllm_fits_the_register(where):
    touchpoints.check(where)


def test_every_name_says_why_it_is_needed():
    names = [(p.module, p.name) for p in touchpoints.REGISTER]
    assert len(set(names)) == len(names)
    assert all(p.why and p.how in ("subclass", "wrap", "override", "call", "read") for p in touchpoints.REGISTER)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"name": "EngineArgs.from_command_line"}, "EngineArgs.from_command_line is missing"),
        ({"module": "vllm.engine.arguments"}, "vllm.engine.arguments.EngineArgs.from_cli_args is missing"),
        ({"parameters": ("namespace",)}, r"takes \(args\), not \(namespace\)"),
    ],
)
def test_a_vllm_that_differs_is_refused_by_name(monkeypatch, change, told):
    point = next(p for p in touchpoints.REGISTER if p.name == "EngineArgs.from_cli_args")
    monkeypatch.setattr(touchpoints, "REGISTER", (dataclasses.replace(point, **change),))
    with pytest.raises(JDLoRAError, match=told):
        touchpoints.check("frontend")


def test_an_unverified_version_is_refused_unless_asked_for(monkeypatch):
    monkeypatch.setattr(touchpoints.metadata, "version", lambda name: "0.41.0")
    with pytest.raises(JDLoRAError, match=r"0\.41\.0 has not been verified"):
        touchpoints.check("frontend")
    monkeypatch.setenv(touchpoints.ALLOW_UNVERIFIED, "1")
    touchpoints.check("frontend")
