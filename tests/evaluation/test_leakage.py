"""The leakage study: which pairs, and what their changes of loss amount to."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from tests.evaluation.records import record
from vllm_jdlora.evaluation.leakage import Change, Pair, changes, distribution, pairs_of


def collection(clusters):
    entries = [SimpleNamespace(name=name, cluster=k) for name, k in clusters.items()]
    return SimpleNamespace(manifest=SimpleNamespace(adapters=entries))


def test_pairs_share_a_cluster_and_as_many_do_not():
    clusters = {"a": 0, "b": 0, "c": 1, "d": 1, "e": 1, "untested": 0}
    pairs = pairs_of(collection(clusters), ["a", "b", "c", "d", "e", "plain"])
    together = {(p.adapter, p.task) for p in pairs if p.together}
    assert together == {("a", "b"), ("b", "a")} | {(x, y) for x in "cde" for y in "cde" if x != y}
    apart = [(p.adapter, p.task) for p in pairs if not p.together]
    assert len(apart) == len(set(apart)) == len(together)
    assert all(clusters[x] != clusters[y] for x, y in apart)


def test_a_limit_draws_the_same_pairs_every_time():
    clusters = {str(i): i % 3 for i in range(15)}
    drawn = pairs_of(collection(clusters), list(clusters), count=5)
    assert len(drawn) == 10 and drawn == pairs_of(collection(clusters), list(clusters), count=5)
    assert drawn != pairs_of(collection(clusters), list(clusters), count=5, seed=1)


def test_one_cluster_leaves_nothing_to_control_with_and_one_adapter_no_pair():
    assert all(p.together for p in pairs_of(collection({"a": 0, "b": 0}), ["a", "b"]))
    assert pairs_of(collection({"a": 0}), ["a"]) == []


def test_the_change_is_the_compressed_adapters_loss_on_the_others_task_less_its_own_before():
    class Recorded:
        originals = "uncompressed"

        def measure(self, variant, adapter, task, answers):
            assert (adapter, task, answers) == ("a", "b", False)
            return record(variant, adapter, [1.0], task=task, losses=[{"uncompressed": 3.0, "ours": 2.5}[variant]])

    (found,) = changes(Recorded(), "ours", [Pair("a", "b", True)])
    assert found.loss == -0.5


def test_the_distribution_is_that_of_the_changes():
    values = np.random.default_rng(0).normal(0.1, 1, 400)
    pair, before = Pair("a", "b", True), record("u", "a", [1.0], losses=[5.0])
    found = distribution([Change(pair, before, record("o", "a", [1.0], losses=[5.0 + v])) for v in values])
    assert found.pairs == 400 and found.mean == pytest.approx(values.mean())
    assert found.percentiles["p50"] == pytest.approx(np.median(values))
    assert found.improved == np.mean(values < 0)
    # The normal interval of a mean: ± 1.96 σ/√n; the bootstrap's own noise is a few per cent of its width.
    half = 1.96 * values.std() / 20
    assert (found.low, found.high) == (
        pytest.approx(values.mean() - half, abs=0.1 * half),
        pytest.approx(values.mean() + half, abs=0.1 * half),
    )
