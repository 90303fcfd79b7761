"""Traces against their definitions: S-LoRA's generator and Punica's groups, written here a second time."""

import itertools
import json

import numpy as np
import pytest
from workload import (
    BASE,
    Trace,
    TraceRequest,
    TrafficSpec,
    generate,
    geometric_groups,
    main,
    uniform_groups,
)

from vllm_jdlora.errors import JDLoRAError


def adapters_of(trace):
    return np.array([request.adapter for request in trace.requests])


def gaps_of(trace):
    return np.diff([0.0, *(request.at for request in trace.requests)])


def test_a_seed_gives_the_trace_that_s_lora_s_generator_gives():
    # What benchmarks/trace.py::generate_requests gave for 100 adapters, alpha 0.3, 2 requests/s, cv 2, 4 s, seed 42.
    golden = [(0.017135944712908184, 3, 107, 499), (0.08675752476792623, 84, 367, 421),
              (0.3670542810197608, 35, 159, 301), (0.3816230124452622, 18, 138, 393),
              (0.46815087142442086, 0, 157, 199), (0.47133004450771226, 0, 316, 451),
              (0.7438155317157246, 0, 265, 284), (0.7438513464505397, 61, 351, 168)]  # fmt: skip
    trace = generate(TrafficSpec(100, 8, "gamma:2:2", "power:0.3"))
    assert trace.requests == tuple(TraceRequest(*values) for values in golden)


@pytest.mark.parametrize(("rate", "cv"), [(0.5, 1.0), (10, 1.0), (2, 4.0), (2, 0.3)])
def test_gamma_arrivals_have_their_rate_and_their_variation(rate, cv):
    gaps = gaps_of(generate(TrafficSpec(1, 40_000, f"gamma:{rate}:{cv}")))
    # Standard error of the mean: cv/√n = 2 % for cv 4; that of the cv is larger for heavy tails.
    assert gaps.mean() == pytest.approx(1 / rate, rel=0.06)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.06)


def test_power_law_popularity_is_the_inverse_power_of_the_share():
    share = adapters_of(generate(TrafficSpec(1000, 50_000, popularity="power:0.3"))) < 10
    assert share.mean() == pytest.approx(0.01**0.3, abs=0.01)
    even = np.bincount(adapters_of(generate(TrafficSpec(10, 50_000, popularity="power:1"))), minlength=10)
    assert even.min() > 0.9 * even.max()


def test_zipf_popularity_falls_with_the_power_of_the_rank():
    counts = np.bincount(adapters_of(generate(TrafficSpec(100, 200_000, popularity="zipf:1.1"))), minlength=100)
    for rank in (2, 5, 20):
        assert counts[0] / counts[rank - 1] == pytest.approx(rank**1.1, rel=0.15)


def test_lengths_are_uniform_in_their_half_open_range():
    trace = generate(TrafficSpec(1, 20_000, prompt=(8, 16), output=(3, 5)))
    prompts = np.bincount([r.prompt_tokens for r in trace.requests])
    outputs = np.bincount([r.output_tokens for r in trace.requests])
    assert set(np.nonzero(prompts)[0]) == set(range(8, 16)) and set(np.nonzero(outputs)[0]) == {3, 4}
    assert prompts[8:].min() > 0.9 * prompts[8:].max()


@pytest.mark.parametrize("n", [1, 2, 3, 7, 16, 33, 133])
def test_punica_s_groups_hold_every_request(n):
    for groups in (uniform_groups(n), geometric_groups(n, 1.5)):
        assert sum(groups) == n and min(groups) >= 1 and groups == sorted(groups, reverse=True)
    assert len(uniform_groups(n)) == np.ceil(np.sqrt(n))
    assert max(uniform_groups(n)) - min(uniform_groups(n)) <= 1


def test_geometric_groups_grow_by_their_ratio():
    assert geometric_groups(32, 1.5) == [11, 7, 5, 3, 2, 2, 1, 1]
    assert geometric_groups(15, 2) == [8, 4, 2, 1]


@pytest.mark.parametrize(
    ("popularity", "sizes"),
    [
        ("distinct", [1] * 32),
        ("identical", [32]),
        ("skewed", [1, 31]),
        ("uniform", [5, 5, 5, 5, 6, 6]),
        ("geometric:1.5", [1, 1, 2, 2, 3, 5, 7, 11]),
    ],
)
def test_punica_s_popularity_by_name(popularity, sizes):
    who = adapters_of(generate(TrafficSpec(1000, 32, popularity=popularity)))
    assert sorted(np.unique(who, return_counts=True)[1]) == sizes
    assert list(who) != sorted(who) or len(sizes) == 1, "the groups are mixed"


def test_fewer_adapters_than_groups_take_turns():
    who = adapters_of(generate(TrafficSpec(5, 32, popularity="distinct")))
    assert sorted(np.bincount(who)) == [6, 6, 6, 7, 7]


def test_bursts_come_at_once_and_keep_the_rate():
    trace = generate(TrafficSpec(1, 20_002, "bursts:4:10"))
    groups = [len(list(same)) for _, same in itertools.groupby(r.at for r in trace.requests)]
    assert set(groups[:-1]) == {10} and groups[-1] == 2
    assert len(trace.requests) / trace.requests[-1].at == pytest.approx(4, rel=0.1)


def test_a_closed_loop_has_no_times():
    assert {request.at for request in generate(TrafficSpec(3, 50)).requests} == {0.0}


def test_the_base_gets_its_share_and_the_rest_stays_as_it_was():
    plain, mixed = (generate(TrafficSpec(50, 5000, "gamma:2:1", base_share=share)) for share in (0, 0.25))
    to_base = adapters_of(mixed) == BASE
    assert to_base.mean() == pytest.approx(0.25, abs=0.03)
    assert all(a == b for a, b, base in zip(plain.requests, mixed.requests, to_base, strict=True) if not base)


def test_a_trace_survives_its_file(tmp_path):
    file = tmp_path / "trace.jsonl"
    trace = generate(TrafficSpec(7, 20, "gamma:2:1", "zipf:1", base_share=0.3, seed=5))
    trace.write(file)
    assert Trace.read(file) == trace
    assert json.loads(file.read_text().splitlines()[0])["seed"] == 5


@pytest.mark.parametrize("damage", ["", "[1, 2]\n", "{}\n", '{"trace": 9}\n', "cut"])
def test_a_file_that_is_no_trace_is_refused(tmp_path, damage):
    file = tmp_path / "trace.jsonl"
    generate(TrafficSpec(7, 20)).write(file)
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-3]) if damage == "cut" else damage)
    with pytest.raises(JDLoRAError, match="trace"):
        Trace.read(file)


def test_prompts_are_the_same_for_every_server_and_new_in_every_round():
    trace = generate(TrafficSpec(7, 3, prompt=(5, 9)))
    again = generate(TrafficSpec(7, 3, prompt=(5, 9)))
    ids = trace.prompt_ids(1, 1000)
    assert ids == again.prompt_ids(1, 1000) and len(ids) == trace.requests[1].prompt_tokens
    assert ids != trace.prompt_ids(1, 1000, round_=1) and min(ids) >= 20 and max(ids) < 1000
    assert len(trace.prompt_text(1).split()) == trace.requests[1].prompt_tokens


@pytest.mark.parametrize(
    "wrong",
    [
        {"arrivals": "poisson"},
        {"arrivals": "gamma:1"},
        {"arrivals": "gamma:0:1"},
        {"arrivals": "gamma:a:1"},
        {"arrivals": "bursts:1:2.5"},
        {"popularity": "power:nan"},
        {"popularity": "zipf:-1"},
        {"popularity": "geometric:1"},
        {"popularity": "distinct:2"},
        {"prompt": (8, 8)},
        {"output": (0, 8)},
        {"base_share": 1.5},
        {"adapters": 0},
        {"requests": 0},
    ],
)
def test_what_cannot_be_made_is_refused_with_its_reason(wrong):
    with pytest.raises(JDLoRAError):
        TrafficSpec(**{"adapters": 3, "requests": 3, **wrong})


def test_the_command_writes_what_its_flags_say(tmp_path, monkeypatch, capsys):
    file = tmp_path / "trace.jsonl"
    flags = "--adapters 9 --requests 5 --arrivals gamma:2:1 --popularity zipf:1 --prompt-tokens 4 9 --seed 3"
    monkeypatch.setattr("sys.argv", ["workload", str(file), *flags.split()])
    main()
    assert Trace.read(file) == generate(TrafficSpec(9, 5, "gamma:2:1", "zipf:1", prompt=(4, 9), seed=3))
    assert "5 requests" in capsys.readouterr().out
