"""The soak test's own judgement: what must hold is found broken where it is, and its traffic is as it says."""

from __future__ import annotations

import asyncio
import signal
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import psutil
import pytest
import torch
from metrics_page import read_counters
from openai_client import Timing, open_session
from plot_soak import last_record, plot
from soak_adapters import Content, History, Spell, churn_adapters
from soak_churn import Event, Operator
from soak_counts import Clients, Comparison, compare_counts
from soak_hostile import COMPLETIONS, GONE, LOAD, HostileClient, HostileRequest, hostile_requests
from soak_reference import (
    TOLERANCES,
    Checked,
    Distance,
    Tolerance,
    check_answers,
    contents_of,
    distance,
    is_its_own,
    most_by_chance,
)
from soak_run import Interrupts
from soak_series import MIB, Growth, Thirds, growth_of, pieces_of, thirds_of
from soak_traffic import Answer, SharedStems, SoakTraffic
from soak_verdicts import all_held, verdicts_of
from soak_watch import Seen, Watch
from traffic_summary import Spread
from workload import TrafficSpec, generate

from tests.loadtests.openai_server import event, piece, serving, streamed
from vllm_jdlora.errors import JDLoRAError

FIRST, SECOND = Content(1, 1), Content(1, 2)


def answer(name="a", sent=10.0, seconds=1.0, tokens=4, ttft=0.2, fate="whole", **timing) -> Answer:
    pieces = tuple(np.linspace(ttft, seconds, tokens).tolist())
    values = {"pieces": pieces, "prompt_tokens": 8, "output_tokens": tokens, **timing}
    return Answer(0, name, sent, 8, 4, fate, False, Timing(name, sent, seconds, **values))


def clients_of(*answers: Answer) -> Clients:
    history = History({"a": [Spell(FIRST, 0.0)], "base": [Spell(None, 0.0)]})
    return Clients(answers, HostileClient(None, ""), Operator(None, "", None, history), history)


GOOD = Comparison("answers finished", 5, 5, 5)
RIGHT = Checked(answers=10, contents=8, others=4)
FLAT = Growth(1200.0, 3.0, 5.0)
EVEN = Spread(0.2, 0.2, 0.3, 0.5)


def judged(clients, comparisons=(GOOD,), checked=RIGHT, growth=FLAT, last=EVEN, minutes=30.0, idle=True, code=None):
    thirds = Thirds(EVEN, last)
    found = verdicts_of(clients, comparisons, checked, growth, thirds, minutes=minutes, idle=idle, exit_code=code)
    return [verdict.name.partition(" (")[0] for verdict in found if verdict.held is False]


def test_a_good_soak_holds():
    left = answer(fate="left", left=True, output_tokens=2)
    assert judged(clients_of(answer(), answer(name="base"), left)) == []


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        ({"error": "cut"}, "the stream ended without its mark"),
        ({"error": "disconnected"}, "the server went away"),
        ({"error": "http 500"}, "an error of the server"),
        ({"output_tokens": 3}, "a token is missing"),
        ({"error": "http 404"}, "its name was known all the time"),
        ({"name": "base", "error": "http 404"}, "the base model is never unknown"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_answer_that_is_not_whole_is_lost(bad, why):
    assert judged(clients_of(answer(), answer(**bad))) == ["no answer was lost"]


def test_an_unknown_name_may_be_unknown():
    clients = clients_of(answer(error="http 404"))
    clients.history.change("a", None, called=9.0, answered=9.5)
    assert judged(clients) == []


def test_everything_that_breaks_is_said():
    good = clients_of(answer())
    assert judged(good, comparisons=[replace(GOOD, server=6)]) == ["server and clients count the same"]
    crossed = Checked(answers=10, contents=8, others=4, wrong=["a, request 3"])
    assert judged(good, checked=crossed) == ["sampled answers are those of their adapter"]
    undecided = Checked(answers=10, contents=8, undecided=["a, request 3", "a, request 4"], most_undecided=1)
    assert judged(good, checked=undecided) == ["sampled answers are those of their adapter"]
    assert judged(good, checked=replace(undecided, most_undecided=2)) == []
    blind = Checked(answers=10, contents=8, others=4, confused=2)
    assert judged(good, checked=blind) == ["sampled answers are those of their adapter"]
    assert judged(good, growth=Growth(1200.0, 40.0, 5.0)) == ["memory is flat"]
    assert judged(good, growth=Growth(1200.0, 3.0, 40.0)) == ["memory is flat"]
    assert judged(good, last=replace(EVEN, p50=0.3)) == ["latency is flat"]
    assert judged(good, last=replace(EVEN, p99=0.9)) == ["latency is flat"]
    assert judged(good, idle=False) == ["nothing was left in the engine"]
    assert judged(good, code=0) == ["the server ran to the end"]
    good.operator.failed.append("load x: 500")
    good.hostile.wrong_count = 1
    assert judged(good) == ["bad requests were refused as they should be", "adapters came and went"]


def test_a_short_soak_says_nothing_of_memory_and_latency():
    growth, last = Growth(40.0, 400.0, 400.0), replace(EVEN, p50=2.0, p99=9.0)
    assert judged(clients_of(answer()), growth=growth, last=last, minutes=1.0) == []
    assert all_held(verdicts_of(clients_of(), [], None, None, None, minutes=1.0, idle=True, exit_code=None))


def page(**values: float) -> str:
    lines = [f'vllm:request_success_total{{finished_reason="length"}} {values["finished"]}']
    lines += [f'http_requests_total{{handler="{COMPLETIONS}",method="POST",status="2xx"}} {values["good"]}']
    lines += [f'http_requests_total{{handler="{COMPLETIONS}",method="POST",status="4xx"}} {values["refused"]}']
    lines += [f"vllm:generation_tokens_total {values['tokens']}", f"vllm:prompt_tokens_total {values['prompts']}"]
    lines += [
        f'jdlora:adapter_loads_total{{result="compressed"}} {values["loads"]}',
        'jdlora:adapters_known{kind="x"} 1',
    ]
    return "\n".join([*lines, 'jdlora:collection_info{revision="r"} 1']) + "\n"


def test_counts_are_compared_with_what_the_clients_saw():
    zero = dict.fromkeys(("finished", "good", "refused", "tokens", "prompts", "loads"), 0)
    clients = clients_of(answer(), answer(), answer(left=True, output_tokens=2), answer(error="http 404", tokens=0))
    clients.hostile.statuses = Counter(
        {("malformed", COMPLETIONS, "400"): 3, ("half", COMPLETIONS, GONE): 1, ("load", LOAD, "400"): 1}
    )
    clients.operator.events.append(Event("load", 1.0, 2.0, "a"))
    clients.operator.outcomes["compressed"] += 1
    right = {"finished": 2, "good": 3, "refused": 5, "tokens": 11, "prompts": 24, "loads": 1}

    def wrong(**changes: float) -> list[str]:
        after = read_counters(page(**(right | changes)))
        found = compare_counts(clients, read_counters(page(**zero)), after, "r")
        return [comparison.name for comparison in found if not comparison.agrees]

    assert wrong() == []
    assert wrong(finished=3) == wrong(refused=4) == wrong(tokens=12) == [], "only the server knows"
    assert wrong(finished=1) == wrong(finished=4) == ["answers finished"]
    assert wrong(refused=6) == ["completions refused 4xx"] and wrong(good=4) == ["completions answered 2xx"]
    assert wrong(tokens=9) == wrong(tokens=13) == ["output tokens"] and wrong(prompts=25) == ["prompt tokens"]
    assert wrong(loads=2) == ["adapters loaded compressed"]


def test_a_server_that_is_gone_does_not_end_the_watch():
    async def run() -> list[Seen]:
        async with open_session() as session:
            watch, left = Watch(session, "http://127.0.0.1:9", psutil.Process()), iter(range(3))
            await watch.keep_looking(0.0, lambda: next(left, None) is None)
            return watch.seen

    assert asyncio.run(run()) == []


def greedy(model, deltas, prompt: list[int], given: Answer, tokens: int = 4) -> Answer:
    """`given` with what a model answers to the prompt with ΔW merged."""
    from tests.reference import merged

    chosen, logprobs = [], []
    with torch.no_grad(), merged(model, deltas):
        for _ in range(tokens):
            best = model(torch.tensor([[*prompt, *chosen]])).logits[0, -1].log_softmax(-1).max(-1)
            chosen.append(best.indices.item())
            logprobs.append(best.values.item())
    told = tuple(f"token_id:{token}" for token in chosen)
    return replace(given, timing=replace(given.timing, tokens=told, logprobs=tuple(logprobs)))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(folder, model in fp32)"""
    from transformers import AutoModelForCausalLM

    from tests.tiny_llama import write_model

    folder = write_model(tmp_path_factory.mktemp("tiny"))
    return folder, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


EXACT = Tolerance(1e-4, token=1e-4, off=0.0, behind=1e-4, undecided=0.0)


def test_an_answer_of_another_adapter_is_far_away(tiny):
    from tests.reference import merged

    _, model = tiny
    name = "model.layers.0.self_attn.q_proj"
    draw = torch.Generator().manual_seed(0)
    ours, others = ({name: 0.3 * torch.randn(128, 64, generator=draw)} for _ in range(2))
    prompt = [5, 6, 7]
    given = greedy(model, ours, prompt, answer())
    with torch.no_grad(), merged(model, ours):
        found = distance(model, prompt, given, EXACT)
        assert found.within(EXACT) and found.logprob < 1e-5 and found.behind < 1e-5
    with torch.no_grad(), merged(model, others):
        assert not distance(model, prompt, given, EXACT).within(EXACT)


def test_answers_are_those_of_their_names_contents_and_of_no_others(tiny):
    folder, model = tiny
    history = History({"a": [Spell(FIRST, 0.0)], "b": [Spell(SECOND, 0.0)]})
    trace = generate(TrafficSpec(2, 2, prompt=(6, 9), output=(4, 5)))
    contents = churn_adapters.deltas(folder, FIRST), churn_adapters.deltas(folder, SECOND)
    right = [
        greedy(model, deltas, trace.prompt_ids(i, 256), replace(answer(name=name), index=i))
        for i, (name, deltas) in enumerate(zip("ab", contents, strict=True))
    ]
    seen = []
    checked = check_answers(folder, right, history, trace, 256, EXACT, lambda: seen.append(1))
    assert (checked.answers, checked.contents, len(seen)) == (2, 2, 2)
    assert not checked.wrong and not checked.undecided
    # Of however few contents, one is compared with an answer of others, or that they are told apart is never seen.
    assert (checked.others, checked.confused) == (1, 0)
    assert checked.nearest_other.logprob > 10 * checked.farthest.logprob

    crossed = [replace(right[0], name="b"), replace(right[1], name="a")]
    checked = check_answers(folder, crossed, history, trace, 256, EXACT, lambda: None)
    assert len(checked.wrong) == 2 and checked.confused == checked.others == 1


def test_rounding_may_move_few_tokens_of_an_answer_far_and_no_answer_as_a_whole():
    tolerance = TOLERANCES["bfloat16"]
    assert Distance(0.32, off=0.2, behind=13.3).within(tolerance)
    assert not Distance(0.2, off=0.3, behind=0.2).within(tolerance), "of another adapter, where many tokens are sure"
    assert not Distance(0.4, off=0.2, behind=0.2).within(tolerance)


def test_an_answer_that_rounding_moved_as_a_whole_is_told_from_anothers_by_other_contents():
    far = [Distance(2.1, 0.8, 5.5), Distance(4.2, 1.0, 9.3)]
    assert is_its_own(Distance(0.49, 0.45, 2.4), far)
    assert not is_its_own(Distance(2.3, 0.9, 7.8), far), "as far from its own as from others"
    assert not is_its_own(Distance(1.2, 0.6, 4.0), far), "between its own and another, as after a stale cache"
    assert not is_its_own(Distance(0.49, 0.45, 2.4), []), "nothing to tell it by"


@pytest.mark.parametrize(("count", "share"), [(450, 0.036), (30, 0.036), (450, 0.0), (0, 0.036)])
def test_more_answers_than_by_chance_are_told(count, share):
    most, draw = most_by_chance(count, share), np.random.default_rng(0)
    seen = draw.binomial(count, share, 200_000)
    assert (seen > most).mean() <= 1.3e-3
    assert most == 0 or (seen > most - 1).mean() > 0.8e-3


def test_an_answer_may_be_of_any_content_its_name_had_meanwhile_but_not_of_the_base():
    clients = clients_of()
    clients.history.change("a", None, called=9.0, answered=9.5)
    clients.history.change("a", SECOND, called=10.5, answered=10.7)
    assert contents_of(answer(sent=8.0, seconds=0.5), clients.history) == [FIRST]
    assert contents_of(answer(sent=9.2, seconds=2.0), clients.history) == [FIRST, SECOND]
    assert contents_of(answer(sent=11.0, seconds=1.0), clients.history) == [SECOND]
    assert contents_of(answer(name="base"), clients.history) == [None]


def test_pieces_hold_every_token_and_request_of_the_soak():
    answers = [answer(sent=100.0 + i, seconds=3.0, tokens=6, ttft=0.1 * (1 + i % 3)) for i in range(27)]
    seen = [Seen(100.0 + i, 50 * MIB, 80 * MIB, 2, 1, 9 * MIB, {"Worker": 30 * MIB}) for i in range(30)]
    pieces = pieces_of(answers, seen, begin=100.0, seconds=30.5, piece=4.0)
    assert [p.seconds for p in pieces] == [4.0] * 7 + [2.5]
    assert sum(p.seconds * p.tokens_per_second for p in pieces) == pytest.approx(
        27 * 6, abs=31 * 0.05
    )  # rates are to a tenth
    assert sum(p.requests for p in pieces) == 27
    assert pieces[0].ttft_p50 == pytest.approx(0.15) and pieces[-1].ttft_p50 is None
    assert (pieces[0].own_mib, pieces[0].resident_mib, pieces[0].own_mib_of) == (50, 80, {"Worker": 30})


def test_growth_is_that_of_the_last_two_thirds_whatever_single_looks_say():
    def looks(own) -> list[Seen]:
        return [Seen(float(t), int(own(t) * MIB), 90 * MIB, 0, 0, 0, {}) for t in range(0, 901, 10)]

    filling = looks(lambda t: min(t, 300.0))
    assert growth_of(filling, 0.0, 900.0) == Growth(600.0, 0.0, 0.0)
    leaking = looks(lambda t: t / 10 + (500 if t == 700 else 0))
    assert growth_of(leaking, 0.0, 900.0).own_mib == pytest.approx(60.0, rel=0.01)
    assert growth_of(leaking[:2], 0.0, 900.0) is None


def test_thirds_are_by_the_time_of_sending():
    answers = [answer(sent=float(t), ttft=0.1 if t < 60 else 0.3) for t in range(90)]
    thirds = thirds_of(answers, 0.0, 90.0)
    assert thirds.ratio("p50") == thirds.ratio("p99") == pytest.approx(3.0)
    assert thirds_of(answers[:20], 0.0, 90.0) is None


# --- traffic ----------------------------------------------------------------------------------------------------------


def sent_to_a_slow_server(requests: int, *, stop_after: float | None = None) -> SoakTraffic:
    async def slowly(request, body):
        tokens = body["max_tokens"]
        events = [event(piece("x")) for _ in range(tokens)]
        usage = {"choices": [], "usage": {"prompt_tokens": len(body["prompt"]), "completion_tokens": tokens}}
        return await streamed(request, *events, event(usage), event(b"[DONE]"), pause=0.01)

    async def run() -> SoakTraffic:
        spec = TrafficSpec(5, requests, arrivals="gamma:200:1", prompt=(8, 40), output=(4, 10), base_share=0.1)
        trace = SharedStems(spec, generate(spec).requests)
        async with serving(slowly) as (url, _), open_session() as session:
            names = [f"n{i}" for i in range(5)]
            history = History({name: [Spell(FIRST, 0.0)] for name in (*names, "arrived-1")})
            traffic = SoakTraffic(session, url, trace, names, 100, history, checked_share=0.5)
            stop = asyncio.Event()
            if stop_after is not None:
                asyncio.get_running_loop().call_later(stop_after, stop.set)
            await traffic.send(time.perf_counter(), 60.0, stop, lambda: None)
            return traffic

    return asyncio.run(run())


def test_some_clients_leave_and_the_others_get_all():
    traffic = sent_to_a_slow_server(400)
    assert sorted(a.index for a in traffic.answers) == list(range(400))
    assert not [a for a in traffic.answers if a.timing.error]
    fates = Counter(a.fate for a in traffic.answers)
    assert fates["left"] >= 5 and fates["cancelled"] >= 2
    for given in traffic.answers:
        if given.fate == "whole":
            assert given.timing.output_tokens == given.output_tokens and not given.timing.left
        elif given.fate == "left":
            assert given.timing.left and 1 <= len(given.timing.pieces) < given.output_tokens
        assert not given.checked or given.fate == "whole"
    names = Counter(a.name for a in traffic.answers)
    assert names["base"] and names["arrived-1"] and names["n0"]
    assert 100 < sum(a.checked for a in traffic.answers) < 300


def test_it_stops_when_it_is_told_and_waits_for_what_it_sent():
    traffic = sent_to_a_slow_server(4000, stop_after=0.3)
    assert 0 < len(traffic.answers) < 1000
    assert not [a for a in traffic.answers if a.timing.error]


def test_prompts_share_beginnings():
    spec = TrafficSpec(5, 64, prompt=(8, 40), output=(4, 10))
    trace = SharedStems(spec, generate(spec).requests)
    for i in range(16):
        one, other = trace.prompt_ids(i, 1000), trace.prompt_ids(i + 16, 1000)
        assert len(one) == trace.requests[i].prompt_tokens
        assert all(x == y for x, y in zip(one, other, strict=False))
    assert trace.prompt_ids(0, 1000)[:8] != trace.prompt_ids(1, 1000)[:8]


def test_every_kind_of_bad_request_is_sent_in_each_turn():
    requests = hostile_requests(["n1", "n2"], 128, seed=1)
    first, second = ([next(requests).kind for _ in range(21)] for _ in range(2))
    assert Counter(first) == Counter(second)
    words = {kind.partition(":")[0] for kind in first}
    assert words == {
        "malformed",
        "oversized",
        "unknown model",
        "unknown path",
        "load",
        "unload",
        "reload",
        "half a request",
    }


def test_what_a_server_makes_of_bad_requests_is_counted():
    async def refuse(request, body):
        from aiohttp import web

        return web.json_response({}, status=404 if body["model"] == "nobody" else 200)

    async def run() -> HostileClient:
        async with serving(refuse) as (url, _), open_session() as session:
            client = HostileClient(session, url)
            for model in ("nobody", "n1"):
                body = f'{{"model": "{model}"}}'.encode()
                await client.send(HostileRequest("unknown model", COMPLETIONS, body, frozenset({404})))
            await client.send(HostileRequest("half", COMPLETIONS, b'{"model"', frozenset(), half=True))
            client.url = "http://127.0.0.1:9"
            await client.send(HostileRequest("nobody there", COMPLETIONS, b"{}", frozenset({400})))
            return client

    client = asyncio.run(run())
    statuses = {(kind, status): n for (kind, _, status), n in client.statuses.items()}
    assert statuses == {
        ("unknown model", "404"): 1,
        ("unknown model", "200"): 1,
        ("half", GONE): 1,
        ("nobody there", "error"): 1,
    }
    assert client.wrong_count == 2 and client.count("unknown model") == 2
    assert client.wrong[0].startswith("unknown model: 200") and client.wrong[1].startswith("nobody there: error")


def test_ctrl_c_ends_the_soak_once_and_the_process_the_second_time():
    async def run() -> bool:
        stop = asyncio.Event()
        with Interrupts(stop):
            signal.raise_signal(signal.SIGINT)
            await asyncio.wait_for(stop.wait(), 5)
            await asyncio.sleep(0)
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        return stop.is_set()

    term = signal.getsignal(signal.SIGTERM)
    try:
        assert asyncio.run(run())
    finally:
        signal.signal(signal.SIGTERM, term)


# --- picture ----------------------------------------------------------------------------------------------------------


def test_a_record_is_drawn_and_the_same_one_alike(tmp_path):
    answers = [answer(sent=float(t)) for t in range(60)]
    seen = [Seen(float(t), 50 * MIB, 80 * MIB, 2, 1, 9 * MIB, {}) for t in range(60)]
    record = {
        "capacity": {"output_tokens_per_second": 5.0},
        "pieces": [vars(p) for p in pieces_of(answers, seen, 0.0, 60.0, 5.0)],
        "events": [["load", 3.0, 3.1, "a"], ["reload", 20.0, 20.1, "b"], ["reload, other bases", 40.0, 45.0, "c"]],
    }
    drawn = [plot(record, tmp_path / f"{i}.svg").read_text() for i in range(2)]
    assert drawn[0] == drawn[1]
    assert "collection reloaded" in drawn[0] and "capacity, measured before" in drawn[0] and "p99" in drawn[0]


def test_there_must_be_a_record_to_draw(tmp_path):
    with pytest.raises(JDLoRAError, match="make soak"):
        last_record(tmp_path / "none.jsonl")
