"""The register of vLLM names is true for the installed vLLM and for given sources, and a difference is told."""

import dataclasses
import importlib.util
import os
from pathlib import Path

import pytest

from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.serving import touchpoint_sources, touchpoints
from vllm_jdlora.serving.touchpoint_sources import check_sources
from vllm_jdlora.serving.touchpoints import Touchpoint, startup_check

INSTALLED = Path(importlib.util.find_spec("vllm").origin).parents[1]
OTHERS = [Path(folder) for folder in os.environ.get("JDLORA_VLLM_SOURCES", "").split(os.pathsep) if folder]
"""Unpacked wheels or sdists of other versions of vLLM, whose sources are checked as well."""


@pytest.mark.parametrize("where", ["frontend", "engine", "worker", "cuda", "metrics", "api_server"])
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
    monkeypatch.setattr(startup_check, "REGISTER", (dataclasses.replace(point, **change),))
    with pytest.raises(JDLoRAError, match=told):
        touchpoints.check("frontend")


def test_an_unverified_version_is_refused_unless_asked_for(monkeypatch):
    monkeypatch.setattr(startup_check.metadata, "version", lambda name: "0.41.0")
    with pytest.raises(JDLoRAError, match=r"0\.41\.0 has not been verified"):
        touchpoints.check("frontend")
    monkeypatch.setenv(touchpoints.ALLOW_UNVERIFIED, "1")
    touchpoints.check("frontend")


@pytest.mark.parametrize("sources", [INSTALLED, *OTHERS], ids=str)
def test_the_sources_fit_the_register_without_being_imported(sources):
    assert check_sources(sources) == []


@pytest.fixture
def tree(tmp_path) -> Path:
    """A package that shows each way in which Python gets a name into a module or class."""
    files = {
        "__init__.py": "",
        "base.py": """
import typing
if typing.TYPE_CHECKING:
    SWITCH: bool = False
class Base(typing.Generic[int]):
    table: dict
    def step(self, batch, limit=None, *, fast=False):
        def inner():
            return self.rows.count
        return helper(batch)
""",
        "parts/__init__.py": "from .part import Part as Renamed",
        "parts/part.py": """
from ..base import Base
class Part(Base):
    kind = "part"
    def __init__(self, name: str):
        self.name = name
    @classmethod
    def made(cls, config): ...
try:
    import fast
except ImportError:
    def fast(rows): ...
""",
        "record.py": "class Record(Struct):\n    name: str\n    path: str = ''\n    def size(self): ...",
    }
    for name, text in files.items():
        file = tmp_path / "vllm" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    return tmp_path


FITTING = [
    ("vllm.parts.part", "Part.step", ("self", "batch", "fast"), ("rows", "count", "helper")),  # inherited
    ("vllm.parts", "Renamed.step", ("batch", "limit"), ()),  # taken from elsewhere under another name
    ("vllm.parts", "Renamed", ("name",), ()),
    ("vllm.parts.part", "Part.made", ("config",), ()),
    ("vllm.parts.part", "Part.kind", (), ()),
    ("vllm.parts.part", "Part.table", (), ()),
    ("vllm.parts.part", "fast", ("rows",), ()),
    ("vllm.base", "SWITCH", (), ()),
    ("vllm.record", "Record", ("name", "path"), ()),
]


@pytest.mark.parametrize(("module", "name", "parameters", "uses"), FITTING)
def test_names_are_found_where_python_would_find_them(tree, module, name, parameters, uses):
    assert check_sources(tree, [Touchpoint(module, name, "read", "why", parameters, uses=uses)]) == []


@pytest.mark.parametrize(
    ("module", "name", "parameters", "uses", "told"),
    [
        ("vllm.gone", "Part", (), (), "vllm.gone.Part is missing"),
        ("vllm.parts.part", "Part.run", (), (), "vllm.parts.part.Part.run is missing"),
        ("vllm.parts.part", "Whole", (), (), "vllm.parts.part.Whole is missing"),
        ("vllm.parts.part", "Part.kind.deeper", (), (), "is missing"),
        ("vllm.base", "Base.step", ("batch", "depth"), (), "takes (self, batch, limit, fast), not (batch, depth)"),
        ("vllm.base", "Base.step", ("limit", "batch"), (), "not (limit, batch)"),
        ("vllm.base", "Base.step", (), ("rows", "columns"), "no longer uses columns"),
        ("vllm.record", "Record", ("path", "name"), (), "takes (name, path), not (path, name)"),
    ],
)
def test_sources_that_differ_are_told_by_name(tree, module, name, parameters, uses, told):
    (difference,) = check_sources(tree, [Touchpoint(module, name, "read", "why", parameters, uses=uses)])
    assert told in difference


def test_the_command_says_what_differs_and_how_to_call_it(tree, capsys):
    assert touchpoint_sources.main([str(INSTALLED)]) == 0
    assert f"all {len(touchpoints.REGISTER)} names" in capsys.readouterr().out
    assert touchpoint_sources.main([str(tree), str(INSTALLED)]) == 1
    assert "vllm.engine.arg_utils.EngineArgs.from_cli_args is missing" in capsys.readouterr().out
    assert touchpoint_sources.main([str(tree / "vllm")]) == 2
    assert "no package vllm" in capsys.readouterr().err
    assert touchpoint_sources.main([]) == 2
