"""Real engines with fewer base slots than clusters serve the same trace with cluster order on and off."""

import json

import pytest

from tests.tiny_llama import write_model


@pytest.mark.server
def test_one_run_gives_one_record_in_which_bases_were_swapped(tmp_path):
    pytest.importorskip("vllm")
    from bench_cluster_order import main

    results = tmp_path / "results.jsonl"
    model = write_model(tmp_path / "model")
    few = ["--clusters=6", "--base-slots=2", "--members=4", "--rank=4", "--max-num-seqs=4", "--requests=24"]
    short = ["--rate=100", "--prompt=8", "--answer=4", "--rounds=1", f"--results={results}"]
    main([f"--model={model}", "--dtype=float32", *few, *short])
    record = json.loads(results.read_text())
    off, on = record["rows"]
    assert (off["cluster_order"], on["cluster_order"]) == (False, True)
    for row in (off, on):
        assert row["base_swaps"] > 2 and row["base_bytes"] > 0
        assert row["requests_per_second"] > 0 and row["first_token_p99"] >= row["first_token_p50"] > 0
