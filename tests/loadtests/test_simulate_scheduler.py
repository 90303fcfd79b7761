"""The simulation runs the real scheduler: what cluster order gives where base slots are scarce, the same each time."""

import json
import math

import pytest

pytest.importorskip("vllm")

COSTS = {"step_seconds": 8e-3, "token_seconds": 2e-5, "base_bytes": 84e6, "bandwidth": 25e9}
CLUSTERS = 64


def traffic(seed=0):
    """More than the slots can serve."""
    from workload import TrafficSpec

    lengths = {"prompt": (16, 48), "output": (12, 36)}
    return TrafficSpec(CLUSTERS, 600, arrivals="gamma:150:1", popularity="zipf:1", seed=seed, **lengths)


def run(asked):
    from simulate_scheduler import Costs, policies, simulate

    compared = policies(base_slots=6, age_cap=1.0)
    return [simulate(policy, asked, Costs(**COSTS), members=4, max_num_seqs=16) for policy in compared]


@pytest.fixture(scope="module")
def overloaded():
    return run(traffic())


def test_the_same_seed_gives_the_same_figures(overloaded):
    assert run(traffic()) == overloaded
    assert run(traffic(seed=1)) != overloaded


def test_every_request_is_admitted_under_every_order(overloaded):
    from workload import generate

    rare = sum(request.adapter >= CLUSTERS * 0.9 for request in generate(traffic()).requests)
    assert rare > 10 and all(row["rare_requests"] == rare for row in overloaded)


def test_cluster_order_touches_and_swaps_fewer_clusters_and_answers_more(overloaded):
    _, first_come, ordered, resident = overloaded
    for figure in ("clusters_per_step", "swaps_per_step"):
        assert ordered[figure] < 0.95 * first_come[figure]
    assert first_come["requests_per_second"] < ordered["requests_per_second"] < resident["requests_per_second"]


@pytest.mark.parametrize("rate", [60, 100, 150])
def test_no_request_waits_longer_than_first_come_first_served_and_the_age_cap_in_seconds(rate):
    """From a load that is served to twice of it; without the cap the rarest wait for as long as there is traffic."""
    from dataclasses import replace

    from simulate_scheduler import Costs, Policy, simulate

    asked = replace(traffic(), arrivals=f"gamma:{rate}:1")
    age_cap = 1.0
    first_come, capped, uncapped = (
        simulate(Policy("", 6, cap, ordered), asked, Costs(**COSTS), members=4, max_num_seqs=16)
        for cap, ordered in ((math.inf, False), (age_cap, True), (math.inf, True))
    )
    for figure in ("wait_max", "rare_wait_max"):
        assert capped[figure] <= first_come[figure] + age_cap
    assert uncapped["wait_max"] > first_come["wait_max"] + age_cap


def test_waits_of_the_rarest_clusters_are_told_apart():
    from wait_figures import wait_figures

    assert wait_figures([(cluster, float(cluster)) for cluster in range(20)], 20) == {
        "wait_mean": 9.5,
        "wait_p50": 9.5,
        "wait_p99": 18.81,
        "wait_max": 19.0,
        "rare_wait_p50": 18.5,
        "rare_wait_p99": 18.99,
        "rare_wait_max": 19.0,
        "rare_requests": 2,
    }
    assert wait_figures([(0, 1.0)], 20)["rare_wait_p99"] is None


def test_the_record_is_written_and_drawn(tmp_path, capsys):
    from simulate_scheduler import main

    results, picture = tmp_path / "results.jsonl", tmp_path / "plot.svg"
    small = ["--seconds=2", "--clusters=20", "--base-slots=2", "--answer=8", "--prompt=16", "--waiting=50"]
    files = [f"--results={results}", f"--plot={picture}"]
    main(["--rates", "20", "40", "--max-num-seqs=8", *small, *files, "--json"])
    record = json.loads(capsys.readouterr().out)
    assert record == json.loads(results.read_text())
    assert [(row["max_num_seqs"], row["rate"]) for row in record["rows"]] == [(8, 20)] * 4 + [(8, 40)] * 4
    assert all(row["median_ms"] > 0 for row in record["host"])
    assert "<svg" in picture.read_text()
