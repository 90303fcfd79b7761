"""Summaries of records made by hand: means, relative performance, intervals."""

from __future__ import annotations

import numpy as np
import pytest

from tests.evaluation.records import record
from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.evaluation.summary import summarise


def test_relative_performance_is_averaged_over_adapters_not_over_items():
    records = [
        record("uncompressed", "a", [1, 0.5], size=1600, error=0),
        record("uncompressed", "b", [0.4] * 8, size=1600, error=0),
        record("ours", "a", [0.75, 0.0], losses=[2, 1], tokens=[3, 1]),
        record("ours", "b", [0.4] * 8),
    ]
    plain, ours = summarise(records)
    assert (plain.variant, plain.share_of_bytes, plain.relative_rouge_l.mean) == ("uncompressed", 1, 1)
    assert (ours.bytes_per_adapter, ours.share_of_bytes, ours.adapters) == (400, 0.5, 2)
    assert ours.rouge_l == pytest.approx((0.375 + 0.4) / 2)
    assert ours.relative_rouge_l.mean == pytest.approx((0.5 + 1) / 2)
    assert (ours.relative_rouge_l.worst, ours.relative_rouge_l.worst_adapter) == (pytest.approx(0.5), "a")
    assert ours.loss_change.mean == pytest.approx((1.75 - 1) / 2)  # losses weigh by tokens
    assert (ours.loss_change.worst, ours.loss_change.worst_adapter) == (pytest.approx(0.75), "a")


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    """30 worlds of 20 adapters whose relative score is drawn around 0.9; items are noise that both share in part."""
    generator = np.random.default_rng(0)
    inside = 0
    for _ in range(30):
        records = []
        for adapter in range(20):
            items = generator.uniform(0.5, 1, 25)
            truth = generator.normal(0.9, 0.05)
            records.append(record("uncompressed", str(adapter), list(items)))
            records.append(record("ours", str(adapter), list(items * truth + generator.normal(0, 0.02, 25))))
        found = summarise(records, resamples=200)[1].relative_rouge_l
        inside += found.low <= 0.9 <= found.high
        assert found.high - found.low < 0.08
    # 28.5 expected of 30; fewer than 25 has a probability below 1 % at 95 %, 8 % at 90 %.
    assert inside >= 25


def test_intervals_are_the_same_every_time_and_none_where_nothing_varies():
    records = [record(v, a, [0.5, 1.0, 0.25]) for v in ("uncompressed", "ours") for a in "abc"]
    first, second = summarise(records), summarise(records)
    assert first == second
    found = first[1].relative_rouge_l
    assert (found.low, found.high) == (1, 1)  # the same items are drawn for both


def test_an_adapter_that_scores_nothing_uncompressed_is_left_out_of_ratios():
    records = [
        record("uncompressed", "a", [0.0, 0.0]),
        record("uncompressed", "b", [1.0, 1.0]),
        record("ours", "a", [0.5, 0.5]),
        record("ours", "b", [0.5, 1.0]),
    ]
    found = summarise(records)[1].relative_rouge_l
    assert (found.mean, found.worst_adapter) == (0.75, "b")
    assert summarise([r for r in records if r.adapter == "a"])[1].relative_rouge_l is None


def test_without_answers_there_is_no_rouge_and_leakage_records_do_not_count():
    records = [record(v, a, [1.0], answers=False) for v in ("uncompressed", "ours") for a in "ab"]
    rows = summarise([*records, record("ours", "a", [0.0], task="b", losses=[9.0], answers=False)])
    assert rows[1].relative_rouge_l is None and rows[1].rouge_l is None and rows[1].loss == 1


def test_an_adapter_without_its_uncompressed_record_is_refused():
    with pytest.raises(JDLoRAError, match="no uncompressed record of b"):
        summarise([record("uncompressed", "a", [1]), record("ours", "b", [1])])
