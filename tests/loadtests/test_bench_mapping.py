"""The benchmark of a step's metadata plans with the real managers, ours and stock vLLM's, and keeps a record."""

import json
import sys

import bench_mapping


def test_each_kind_of_step_is_measured_on_all_sides(tmp_path, monkeypatch):
    results = tmp_path / "results.jsonl"
    monkeypatch.setattr(bench_mapping, "KNOWN", (8, 300))
    monkeypatch.setattr(sys, "argv", ["bench_mapping", "--repeats", "4", "--results", str(results)])
    bench_mapping.main()
    [record] = map(json.loads, results.read_text().splitlines())
    measured = {(row["known"], row["step"], row["side"]) for row in record["rows"] if row["min_us"] > 0}
    assert len(measured) == 2 * len(bench_mapping.STEPS) * 3
