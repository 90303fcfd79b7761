"""Plots: the right curves with the right points, in files that are the same every time."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.evaluation.records import record
from vllm_jdlora.evaluation import plot_style, plots
from vllm_jdlora.evaluation.summary import summarise


@pytest.fixture
def records():
    found = []
    for adapter, score in (("a", 0.8), ("b", 0.5)):
        found += [
            record("base", adapter, [0.1] * 4, size=0, error=1),
            record("uncompressed", adapter, [score] * 4, size=1600, error=0),
            record("ours: R 8", adapter, [score * 0.9] * 4, size=100, error=0.4),
            record("ours: R 16", adapter, [score] * 4, size=200, error=0.2),
            record("svd: r 1", adapter, [score * 0.5] * 4, size=100, error=0.6),
        ]
    return found


@pytest.fixture
def drawn(monkeypatch):
    """The axes of every figure, as they were when it was saved."""
    axes = []
    finish = plot_style.SavedFigure.__exit__

    def keep(self, *reason):
        axes.extend(self.figure.axes)
        return finish(self, *reason)

    monkeypatch.setattr(plot_style.SavedFigure, "__exit__", keep)
    return axes


def curves(axis):
    return {line.get_label(): line.get_xydata().tolist() for line in axis.lines}


def test_error_and_performance_over_bytes_are_one_curve_a_family(records, tmp_path, drawn):
    file = plots.plot_over_bytes(summarise(records), tmp_path / "new" / "bytes.svg")
    left, right = drawn
    assert curves(left) == {"ours": [[1 / 16, 0.4], [1 / 8, 0.2]], "svd": [[1 / 16, 0.6]]}
    heights = [list(line.get_ydata()) for line in right.lines]
    assert heights == [pytest.approx([90, 100]), pytest.approx([50]), [85], [100, 100]]
    assert [t.get_text() for t in left.get_xticklabels()] == ["1/8", "1/16"]
    assert "relative error" in left.get_ylabel() and "ROUGE-L" in right.get_ylabel()
    first = file.read_bytes()
    assert plots.plot_over_bytes(summarise(records), file).read_bytes() == first
    assert [path.name for path in file.parent.iterdir()] == ["bytes.svg"]


def test_without_answers_the_loss_takes_their_place(records, tmp_path, drawn):
    without = [replace(r, loss=r.loss + r.relative_error, answers=[], rouge_l=None) for r in records]
    without = [replace(r, losses=[loss + r.relative_error for loss in r.losses]) for r in without]
    plots.plot_over_bytes(summarise(without), tmp_path / "bytes.svg")
    right = drawn[1]
    heights = [list(line.get_ydata()) for line in right.lines]
    assert heights == [pytest.approx([0.4, 0.2]), pytest.approx([0.6]), [0, 0]]
    assert "loss" in right.get_ylabel() and right.get_ylim()[0] < 0 and right.get_ylim()[1] > 0.6


def test_performance_over_error_has_a_point_for_each_adapter(records, tmp_path, drawn):
    assert plots.plot_performance_over_error(records, tmp_path / "error.png").read_bytes()[1:4] == b"PNG"
    (axis,) = drawn
    points = {c.get_label(): sorted(c.get_offsets().tolist()) for c in axis.collections}
    assert points["ours"] == [[0.2, 100], [0.2, 100], [0.4, pytest.approx(90)], [0.4, pytest.approx(90)]]
    assert points["svd"] == [[0.6, pytest.approx(50)]] * 2


def test_convergence_is_one_curve_a_name(tmp_path, drawn):
    plots.plot_convergence({"start": [0.5, 0.2, 0.1], "warm": [0.11]}, tmp_path / "c.svg")
    assert curves(drawn[0]) == {"start": [[0, 0.5], [1, 0.2], [2, 0.1]], "warm": [[0, 0.11]]}


def test_a_plot_that_fails_leaves_no_file(tmp_path):
    with pytest.raises(TypeError):
        plots.plot_convergence({"a": None}, tmp_path / "c.svg")
    assert list(tmp_path.iterdir()) == []
