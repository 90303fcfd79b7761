"""Data flows one way (design: adapter → jd → collection → serving): no module imports what is above it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BELOW = {
    "vllm_jdlora.errors": set(),
    "vllm_jdlora.atomic_file": set(),
    "vllm_jdlora.peft_config": {"vllm_jdlora.errors", "vllm_jdlora.json_file"},
    "vllm_jdlora.json_file": set(),
    "vllm_jdlora.known_mean": set(),
    "vllm_jdlora.tensor_file": {"vllm_jdlora.errors", "vllm_jdlora.json_file"},
    "vllm_jdlora.adapter": {"vllm_jdlora.errors", "vllm_jdlora.peft_config", "vllm_jdlora.tensor_file"},
    "vllm_jdlora.jd": {"vllm_jdlora.errors"},
    "vllm_jdlora.kernels": {"vllm_jdlora.errors", "vllm_jdlora.atomic_file"},
    "vllm_jdlora.collection": {
        "vllm_jdlora.atomic_file",
        "vllm_jdlora.adapter",
        "vllm_jdlora.peft_config",
        "vllm_jdlora.tensor_file",
        "vllm_jdlora.json_file",
        "vllm_jdlora.known_mean",
        "vllm_jdlora.jd",
        "vllm_jdlora.errors",
    },
}
"""Part → what else of this package it may import. Parts that are not listed may import everything."""
MEASURED_AGAINST_VLLM = {ROOT / "kernels" / "gpu_bench.py"}
"""Runs vLLM's kernels beside ours where vLLM is installed; nothing that serves imports it."""


def source_files() -> list[tuple[str, Path]]:
    files = [("vllm_jdlora.kernels", p) for p in (ROOT / "kernels").glob("*.py")]
    for path in (ROOT / "vllm_jdlora").rglob("*.py"):
        files.append((".".join(path.relative_to(ROOT).with_suffix("").parts[:2]), path))
    return files


def imported_by(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


@pytest.mark.parametrize(("part", "path"), source_files(), ids=lambda x: str(x).removeprefix(str(ROOT)))
def test_modules_import_only_what_is_below_them(part, path):
    own = {".".join(n.split(".")[:2]) for n in imported_by(path) if n.startswith("vllm_jdlora.")} - {part}
    if part in BELOW:
        assert own <= BELOW[part]
    vllm = {n for n in imported_by(path) if n == "vllm" or n.startswith("vllm.")}
    allowed = part == "vllm_jdlora.serving" or path in MEASURED_AGAINST_VLLM
    assert not vllm or allowed, f"only serving touches vLLM, not {path}"


def test_every_module_says_why_it_exists():
    for _, path in source_files():
        if path.read_text().strip():
            assert ast.get_docstring(ast.parse(path.read_text())), f"{path} has no docstring"
