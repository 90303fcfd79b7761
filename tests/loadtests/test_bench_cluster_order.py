"""Real servers with fewer base slots than clusters serve the same trace with cluster order on and off."""

import json

import pytest


@pytest.mark.server
def test_one_run_gives_one_record_in_which_bases_were_swapped(tmp_path):
    pytest.importorskip("vllm")
    from bench_cluster_order import main

    from tests.tiny_llama import write_model
    from tests.tiny_tokenizer import write_tokenizer

    results = tmp_path / "results.jsonl"
    model = write_model(write_tokenizer(tmp_path / "model"))
    few = ["--clusters=6", "--base-slots=2", "--members=4", "--rank=4", "--max-num-seqs=4", "--requests=24"]
    short = ["--rate=100", "--prompt=8", "--answer=4", "--rounds=1", "--age-cap=1", f"--results={results}"]
    main([f"--model={model}", "--dtype=float32", *few, *short])
    record = json.loads(results.read_text())
    assert record["age_cap"] == 1.0
    off, on = record["rows"]
    assert (off["cluster_order"], on["cluster_order"]) == (False, True)
    for row, summary in ((off, record["summary"]["off"]), (on, record["summary"]["on"])):
        assert row["base_swaps"] > 2 and row["base_bytes"] > 0
        assert 1 <= row["clusters"] / row["steps"] <= 2, "a step holds no more clusters than there are slots"
        assert row["requests_per_second"] > 0 and row["first_token_p99"] >= row["first_token_p50"] > 0
        assert summary["base_swaps"] == row["base_swaps"], "of one round"


def test_members_of_a_cluster_take_turns():
    from bench_cluster_order import Members
    from workload import Trace, TraceRequest, TrafficSpec

    members = Members([["a", "b"], ["c"]])
    trace = Trace(TrafficSpec(2, 4), tuple(TraceRequest(0.0, cluster, 1, 1) for cluster in (0, 0, 1, 1)))
    asked = members.asked_by(trace)
    assert [members.names[request.adapter] for request in asked.requests] == ["a", "b", "c", "c"]
    assert asked.spec.adapters == 3


def test_medians_are_over_rounds_and_waits_over_the_requests_of_all_rounds():
    from cluster_order_report import COUNTERS, Turn, summary_of

    def turn(order, round_, swaps, waits):
        return Turn(order, round_, 2.0, dict.fromkeys(COUNTERS, 1.0) | {"base_swaps": swaps}, waits)

    rounds = [turn(True, 0, 4.0, [(0, 1.0)] * 3), turn(True, 1, 6.0, [(0, 1.0), (3, 9.0)])]
    summary = summary_of([*rounds, turn(False, 0, 100.0, [(3, 50.0)])], True, 4)
    assert summary["base_swaps"] == 5.0 and summary["requests_per_second"] == (1.5 + 1.0) / 2
    assert (summary["first_token_p50"], summary["first_token_max"]) == (1.0, 9.0)
    assert (summary["rare_requests"], summary["rare_first_token_max"]) == (1, 9.0)
