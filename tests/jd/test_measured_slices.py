"""Slices that errors are predicted from: they stand for all, every cluster is fitted somewhere, gaps are guessed."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.jd.dense import ListSource, random_factors
from vllm_jdlora.jd import measured_slices as module
from vllm_jdlora.jd.clustering import probe_slices, weighted_slices
from vllm_jdlora.jd.measured_slices import MeasuredSlices, clusters_by_slice, filled, measured_slices
from vllm_jdlora.jd.problem import SliceProblem


def test_measured_slices_hold_every_projection_alike_and_spread_over_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    probe = SliceProblem.from_factors(random_factors(2, 8, 8, 1), "s")
    names = [f"layers.{layer}.{p}_proj" for layer in range(30) for p in "qkv"]
    found = MeasuredSlices([probe] * 90, names, 32)
    chosen = [names[i] for i in found.indices]
    assert len(set(chosen)) == 24 and found.projections == 3
    for p in "qkv":
        layers = [int(name.split(".")[1]) for name in chosen if name.endswith(f"{p}_proj")]
        assert len(layers) == 8 and max(b - a for a, b in itertools.pairwise(layers)) <= 4
        assert layers[0] <= 2 and layers[-1] >= 27
    assert {name[-6] for name in chosen[:3]} == set("qkv")  # the first few stand for all
    assert sorted(MeasuredSlices([probe] * 6, names[:6], 32).indices) == list(range(6))
    monkeypatch.setattr(module, "_MEASURED_VALUES", 6 * 32)  # six slices of two adapters of rank 1
    assert len(MeasuredSlices([probe] * 90, names, 32)) == 6


def test_few_adapters_are_fitted_in_every_slice() -> None:
    assert clusters_by_slice(torch.tensor([0, 2, 2, 0]), 3) == [[0, 2]] * 3


def test_of_many_adapters_every_cluster_is_fitted_equally_often_and_slices_have_about_as_many() -> None:
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(40, (2000,), generator=draw)
    fitted = clusters_by_slice(labels, 6)
    assert sorted(itertools.chain(*fitted)) == list(range(40))  # each once
    sizes = torch.bincount(labels)
    loads = [int(sizes[each].sum()) for each in fitted]
    assert max(loads) - min(loads) <= int(sizes.max())
    few = clusters_by_slice(labels % 4, 6)  # two clusters in each slice at least, to tell them from the slices
    assert sorted(itertools.chain(*few)) == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert all(len(set(each)) == 2 for each in few)


def test_what_an_adapter_times_a_slice_makes_is_filled_in_exactly() -> None:
    draw = torch.Generator().manual_seed(0)
    adapter, part = 0.2 + 0.2 * torch.rand(30, 1, generator=draw), 0.5 + torch.rand(6, generator=draw)
    truth = (adapter * part).double()
    # Rows of the same adapters in every slice: then the slices' means are those of all.
    known = torch.zeros(30, 6, dtype=torch.bool)
    known[:10], known[10:20, 1], known[20:, 4] = True, True, True
    known[10:20, 4], known[20:, 1] = True, True
    guess = filled(torch.where(known, truth, torch.nan).nan_to_num(), known)
    assert torch.equal(guess[known], truth[known])
    # Slice means of different adapters: ratios are right up to how these differ.
    torch.testing.assert_close(guess, truth, rtol=0.15, atol=0)
    nowhere = torch.zeros(30, 6, dtype=torch.bool)
    nowhere[:, 0] = True
    assert torch.allclose(filled(truth * nowhere, nowhere)[:, 5], truth[:, 0].mean() * truth[:, 0] / truth[:, 0].mean())


def test_slices_that_are_held_are_not_read_again_and_are_the_same() -> None:
    source = ListSource([random_factors(3, 20, 16, 2, seed=m) for m in range(12)])
    slices = weighted_slices(source, None, 0)
    assert source.reads == 8  # the probes, for the adapters' energies
    probes = probe_slices(slices, 0)
    measured = list(measured_slices(slices))
    assert len(probes) == 8 and len(measured) == 12 and source.reads == 12
    slices.held.clear()
    for index, (probe, again) in enumerate(zip(probes, probe_slices(slices, 0), strict=True)):
        assert torch.equal(probe.bt, again.bt) and torch.equal(probe.importance, again.importance), index


def test_no_more_is_held_than_memory_has_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    source = ListSource([random_factors(3, 20, 16, 2, seed=m) for m in range(12)])
    monkeypatch.setattr("vllm_jdlora.jd.clustering._PROBE_VALUES", 2 * 6 * 36 + 1)
    assert len(weighted_slices(source, None, 0).held) == 2
    monkeypatch.setattr("vllm_jdlora.jd.clustering._PROBE_VALUES", 1)
    assert len(weighted_slices(source, None, 0).held) == 1
