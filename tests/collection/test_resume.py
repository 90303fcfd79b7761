"""Killed at any point and started again, a compression goes on where it was and writes the same bytes."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import tiny_llama
from vllm_jdlora import cli
from vllm_jdlora.adapter import Adapter, read_adapter
from vllm_jdlora.collection import tensors as collection_tensors
from vllm_jdlora.collection import work
from vllm_jdlora.collection.build import compress
from vllm_jdlora.collection.work import WorkFolder
from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.jd import clustering, passes

ROOT = Path(__file__).parents[2]
# Two families; the search on the probes is made to put an adapter into the wrong one, so that there is a second pass.
FAMILY = [1, 1, 1, 2, 2, 2]
WRONG = [0, 0, 1, 1, 1, 1]
SLICES = 4

# Dies by SIGKILL at the n-th event of a kind; one process for all points, each compression in a fork of it.
DYING = """
import os, signal, sys
from pathlib import Path
import torch
from tests.collection import test_resume
from vllm_jdlora.collection import tensors

torch.set_num_threads(1)
folder = Path(sys.argv[1])
for point in sys.argv[2:]:
    child = os.fork()
    if child:
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL, point
        continue
    try:
        kind, last = point.split("-")
        seen = 0
        def event(at):
            global seen
            seen += at == kind
            if at == kind and seen == int(last):
                os.kill(os.getpid(), signal.SIGKILL)
        replace, stream = os.replace, tensors.write_streamed
        def replaced(*args):
            event("replace")
            replace(*args)
        def streamed(file, layout, pieces):
            def counted():
                for piece in pieces:
                    event("piece")
                    yield piece
            return stream(file, layout, counted())
        os.replace, tensors.write_streamed = replaced, streamed
        test_resume.wrong_start()
        test_resume.compressed(folder, folder / point, lambda stage, done, total: event(stage))
    finally:
        os._exit(1)
"""
# State, labels, four slices, state; labels, four slices, state. Then bases in eight pieces, scalings, errors.
POINTS = ["start-1", *(f"replace-{n}" for n in (1, 3, 5, 7, 8, 11, 13)), "piece-4", "piece-9"]


def wrong_start() -> None:
    def assignment(*args: object) -> torch.Tensor:
        next(arg for arg in args if callable(arg))("start", 1, 1)
        return torch.tensor(WRONG)

    clustering.assignment = assignment  # type: ignore[assignment]


@pytest.fixture(autouse=True)
def _wrong_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clustering, "assignment", clustering.assignment)  # put back at the end
    wrong_start()


def adapters_in(folder: Path) -> list[Adapter]:
    paths = [folder / f"a{i}" for i in range(6)]
    for i, path in enumerate(paths):
        if not path.exists():
            tiny_llama.write_adapter(path, FAMILY[i], rank=4, targets=["q_proj", "down_proj"])
            # Members of a family differ, but little.
            draw = torch.Generator().manual_seed(i)
            tensors = {
                name: value + 0.02 * value.std() * torch.randn(value.shape, generator=draw)
                for name, value in load_file(path / "adapter_model.safetensors").items()
            }
            save_file(tensors, path / "adapter_model.safetensors")
    return [read_adapter(path) for path in paths]


def compressed(folder: Path, output: Path, progress: Callable[[str, int, int], None] | None = None, **options: float):
    settings = {"rank": 4, "clusters": 2, **options}
    return compress(adapters_in(folder), output, progress=progress, **settings)  # type: ignore[arg-type]


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def visits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one for each slice that is fitted."""
    seen: list[int] = []
    real = passes.fit_slice
    monkeypatch.setattr(passes, "fit_slice", lambda *args, **options: (seen.append(1), real(*args, **options))[1])
    return seen


def test_killed_anywhere_it_goes_on_and_gives_the_same_bytes(tmp_path, monkeypatch):
    adapters_in(tmp_path)
    subprocess.run(
        [sys.executable, "-c", DYING, str(tmp_path), *POINTS],
        check=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    seen = visits(monkeypatch)
    whole = compressed(tmp_path, tmp_path / "whole")
    assert len(seen) == 2 * SLICES and [a.cluster for a in whole.manifest.adapters] == [0, 0, 0, 1, 1, 1]
    finished = {f"replace-{n}": max(0, min(n - 3, 4)) + max(0, min(n - 9, 4)) for n in range(1, 14)}
    for point in POINTS:
        assert not (tmp_path / point).exists() and (tmp_path / f".{point}.work").exists()
        seen.clear()
        compressed(tmp_path, tmp_path / point)
        assert content(tmp_path / point) == content(whole.path), point
        done = 0 if point == "start-1" else finished.get(point, 2 * SLICES)
        assert len(seen) == 2 * SLICES - done, point
    # Killed before its first note of what it does, it leaves an empty folder.
    left = {p.name for p in tmp_path.iterdir() if not p.name.startswith(".replace-1.")}
    assert left == {*POINTS, "whole", *(f"a{i}" for i in range(6))}


def interrupted(tmp_path: Path, name: str = "c", after: int = 2, error: BaseException | None = None) -> Path:
    def stop(stage: str, done: int, total: int) -> None:
        if stage == "fit" and done == after:
            raise error or KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt if error is None else type(error)):
        compressed(tmp_path, tmp_path / name, stop)
    return tmp_path / f".{name}.work"


@pytest.mark.parametrize("change", [{"rank": 3}, {"seed": 1}, {"dtype": "fp16"}, {"clusters": 3}])
def test_work_of_other_options_is_replaced_with_a_note(tmp_path, monkeypatch, caplog, change):
    interrupted(tmp_path)
    seen = visits(monkeypatch)
    other = compressed(tmp_path, tmp_path / "c", **change)
    assert "belongs to other adapters or options; starting anew" in caplog.text
    assert len(seen) >= SLICES and len(seen) % SLICES == 0
    assert content(other.path) == content(compressed(tmp_path, tmp_path / "straight", **change).path)


def test_work_of_other_adapters_is_replaced_and_another_error_limit_is_no_other_work(tmp_path, monkeypatch, caplog):
    interrupted(tmp_path)
    seen = visits(monkeypatch)
    # The limit decides what becomes of the fit, not the fit.
    compressed(tmp_path, tmp_path / "c", max_error=0.9)
    assert len(seen) == 2 * SLICES - 2 and not caplog.text
    interrupted(tmp_path, "d")
    shutil.rmtree(tmp_path / "a0")
    tiny_llama.write_adapter(tmp_path / "a0", 7, rank=4, targets=["q_proj", "down_proj"])
    seen.clear()
    compressed(tmp_path, tmp_path / "d")
    assert len(seen) % SLICES == 0 and "starting anew" in caplog.text


def test_ctrl_c_says_that_it_can_be_continued(tmp_path, capsys):
    adapters_in(tmp_path)
    real = passes.fit_slice
    paths = [str(tmp_path / f"a{i}") for i in range(6)]
    command = ["compress", *paths, "-o", str(tmp_path / "c"), "--rank", "4", "--clusters", "2"]
    calls = []

    def stop(*args, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **options)

    passes.fit_slice = stop
    try:
        assert cli.main(command) == 130
        assert "the same command goes on from the last finished slice" in capsys.readouterr().err
        assert (tmp_path / ".c.work" / "pass-0" / "00001.safetensors").exists() and not (tmp_path / "c").exists()
        assert cli.main(command) == 0
    finally:
        passes.fit_slice = real
    assert len(calls) == 3 + 2 * SLICES - 2 and not (tmp_path / ".c.work").exists()


def test_an_error_that_starting_again_would_not_cure_leaves_nothing(tmp_path):
    with pytest.raises(JDLoRAError, match="every adapter has a relative error above"):
        compressed(tmp_path, tmp_path / "c", rank=1, max_error=0.0)
    assert not (tmp_path / ".c.work").exists() and not (tmp_path / "c").exists()


def test_work_survives_a_full_disk(tmp_path, monkeypatch):
    real, calls = work._save, []

    def full(tensors, file):
        calls.append(file)
        if len(calls) == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, file)

    monkeypatch.setattr(work, "_save", full)
    with pytest.raises(JDLoRAError, match=r"cannot be written .No space left on device"):
        compressed(tmp_path, tmp_path / "c")
    seen = visits(monkeypatch)
    compressed(tmp_path, tmp_path / "c")
    assert len(seen) == 2 * SLICES - 2  # labels and two slices were written


def test_two_compressions_into_one_folder_are_refused(tmp_path):
    with WorkFolder(tmp_path / "c", "one") as first:
        first.open(tmp_path / ".c.1.new")
        with pytest.raises(JDLoRAError, match="another process is compressing into it"):
            compressed(tmp_path, tmp_path / "c")
        assert first.path.exists()
    assert not first.path.exists()


def test_damaged_work_is_done_again(tmp_path, monkeypatch):
    folder = interrupted(tmp_path, after=3)
    (folder / "pass-0" / "00001.safetensors").write_bytes(b"\x00" * 100)
    seen = visits(monkeypatch)
    again = compressed(tmp_path, tmp_path / "c")
    assert len(seen) == 2 * SLICES - 2
    assert content(again.path) == content(compressed(tmp_path, tmp_path / "straight").path)


def test_scalings_are_put_together_in_pieces_and_shards(tmp_path, monkeypatch):
    whole = compressed(tmp_path, tmp_path / "whole")
    row = SLICES * 4 * 4 * 2
    monkeypatch.setattr(collection_tensors, "_SHARD_BYTES", 4 * row)
    monkeypatch.setattr(collection_tensors, "_PIECE_BYTES", 3 * row)
    cut = compressed(tmp_path, tmp_path / "cut")
    assert sorted(cut.manifest.files)[2:] == ["scalings-00000.safetensors", "scalings-00001.safetensors"]
    assert all(torch.equal(cut.sigma(i), whole.sigma(i)) for i in range(6))
