"""Rates and latencies of requests whose times are known."""

import numpy as np
import pytest
from openai_client import Timing
from traffic_summary import Spread, lines_of, quantile, summarise


def answered(started, *pieces, prompt=10, tokens=None, **rest):
    tokens = len(pieces) if tokens is None else tokens
    return Timing("m", started, pieces[-1] if pieces else 1.0, pieces, prompt, tokens, **rest)


def test_only_what_comes_in_the_window_counts():
    timings = [
        answered(0.0, 1.0, 2.0, 3.0),  # one token before, two inside; it ends inside, its first token came before
        answered(3.0, 1.0, 2.0),  # all of it inside
        answered(5.5, 1.0, 6.0),  # begins inside, ends after
    ]
    summary = summarise(timings, 2.0, 7.0)
    assert summary.finished == 2 and summary.requests_per_second == 2 / 5
    assert summary.output_tokens_per_second == 5 / 5
    assert summary.tokens_per_second == (5 + 2 * 10) / 5
    assert summary.ttft.mean == 1.0 and summary.end_to_end.p50 == 2.5
    assert summary.inter_token.mean == 1.0


def test_attainment_and_satisfaction_count_failures_as_missed():
    timings = [
        answered(0.0, 1.0),
        answered(0.0, 3.0),
        answered(0.0, 8.0),
        Timing("m", 0.0, 2.0, error="http 500"),
    ]
    summary = summarise(timings, 0.0, 10.0, slo=6.0)
    assert summary.slo_attainment == 2 / 4 and summary.errors == {"http 500": 1}
    assert summary.satisfaction == pytest.approx(((1 - 1 / 36) + (1 - 9 / 36)) / 4)
    assert summary.finished == 3
    text = "\n".join(lines_of(summary))
    assert "http 500 1" in text and "6 s: 50.0 %" in text


def test_who_left_gives_tokens_and_no_latency():
    summary = summarise([answered(0.0, 1.0, 2.0, left=True)], 0.0, 10.0)
    assert summary.finished == 0 and summary.output_tokens_per_second == 0.2 and summary.end_to_end is None
    assert summary.ttft.mean == 1.0


def test_nothing_is_no_error():
    summary = summarise([], 0.0, 2.0)
    assert summary.requests_per_second == 0 and summary.ttft is None and summary.slo_attainment is None
    assert "errors: none" in "\n".join(lines_of(summary))
    assert summary.as_json()["ttft"] is None


def test_quantiles_are_numpy_s():
    values = sorted(np.random.default_rng(0).exponential(size=37).tolist())
    for q in (0, 0.1, 0.5, 0.9, 0.99, 1):
        assert quantile(values, q) == pytest.approx(np.quantile(values, q))
    spread = Spread.of([3.0, 1.0, 2.0])
    assert (spread.mean, spread.p50) == (2.0, 2.0)
