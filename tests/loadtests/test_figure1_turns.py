"""Turns of two servers in this process: equal requests, and an end when the spread is known."""

import asyncio
import statistics
import threading
from dataclasses import replace

import pytest
from aiohttp import web
from figure1_turns import Turns, TurnSpec, half_width, take_turns, warm_up
from metrics_page import wait_until_idle
from replay import Target
from traffic_summary import summarise
from workload import TrafficSpec, generate

from tests.loadtests.openai_server import event, piece, serving, streamed, usage
from vllm_jdlora.errors import JDLoRAError

TRACE = generate(TrafficSpec(4, 64, prompt=(3, 6), output=(2, 5)))


@pytest.fixture
def servers():
    """(url, bodies) of a slow and of a fast server; `waiting` is what their metrics say, from request to request."""
    loop, ready, where, waiting = asyncio.new_event_loop(), threading.Event(), [], []

    def answering(pause):
        async def answer(request, body):
            tokens = body["max_tokens"]
            events = [event(piece("a"))] * tokens
            return await streamed(request, *events, event(usage(1, tokens)), event(b"[DONE]"), pause=pause)

        return answer

    async def metrics(request):
        count = waiting.pop(0) if waiting else 0
        return web.Response(text=f'vllm:num_requests_running{{engine="0"}} {count}.0\n')

    async def serve():
        more = {"/metrics": metrics}
        async with serving(answering(0.02), more=more) as slow, serving(answering(0.01), more=more) as fast:
            where.extend((slow, fast, stop := asyncio.Event()))
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    assert ready.wait(30)
    yield where[0], where[1], waiting
    loop.call_soon_threadsafe(where[2].set)
    thread.join()


def spec(**changes):
    values = {"users": 2, "seconds": 0.8, "settle": 0.2, "least": 2, "most": 2, "spread": 0.0}
    return TurnSpec(**{**values, **changes})


def targets(servers):
    (slow, slow_bodies), (fast, fast_bodies), _ = servers
    names = tuple("abcd")
    return Target(slow, "base", None, 1000), Target(fast, "base", names, 1000), slow_bodies, fast_bodies


def test_both_get_the_same_requests_and_the_faster_one_has_the_higher_ratio(servers):
    base, server, base_bodies, bodies = targets(servers)
    told = []
    turns = take_turns(base, server, TRACE, spec(), on_turn=told.append)
    assert len(turns.base) == len(turns.server) == len(turns.ratios) == 2 and turns.errors == 0
    assert all(1.2 < ratio < 3 for ratio in turns.ratios)  # pauses of 20 and of 10 ms
    assert {body["model"] for body in base_bodies} == {"base"} and {body["model"] for body in bodies} == set("abcd")
    assert told == ["turn 1", "turn 1", "turn 2", "turn 2"]
    # Each pair begins elsewhere, and both at the same request.
    prompts = [[tuple(body["prompt"]) for body in one] for one in (base_bodies, bodies)]
    for first in (0, 32):
        expected = tuple(TRACE.prompt_ids(first, 1000))
        assert expected in prompts[0] and expected in prompts[1]


def test_turns_end_once_the_spread_is_known(servers):
    base, server, *_ = targets(servers)
    turns = take_turns(base, server, TRACE, spec(seconds=0.3, settle=0.1, least=2, most=6, spread=100.0))
    assert len(turns.ratios) == 2


def test_a_server_that_gives_nothing_is_an_error(servers):
    base, server, *_ = targets(servers)
    with pytest.raises(JDLoRAError, match="gave no token"):
        take_turns(replace(base, url="http://127.0.0.1:9"), server, TRACE, spec(seconds=0.2))


def test_the_other_waits_until_a_server_is_idle(servers):
    (url, _), _, waiting = servers
    waiting[:] = [2, 1, 0, 5]
    wait_until_idle(url)
    assert waiting == [5]
    waiting[:] = [1] * 100
    with pytest.raises(JDLoRAError, match="still works"):
        wait_until_idle(url, seconds=0.5)
    with pytest.raises(JDLoRAError, match="does not answer"):
        wait_until_idle("http://127.0.0.1:9")


def test_warming_up_asks_the_end_of_the_trace(servers):
    base, _, bodies, _ = targets(servers)
    asyncio.run(warm_up(base, TRACE, spec(settle=0.1)))
    assert tuple(bodies[0]["prompt"]) in {tuple(TRACE.prompt_ids(i, 1000)) for i in (62, 63)}


def test_half_width_is_student_s_interval():
    values = [0.9, 1.0, 1.1, 1.0]
    # t of 3 degrees of freedom; the standard error is the sample's deviation over the root of n.
    assert half_width(values) == pytest.approx(3.18 * statistics.stdev(values) / 2 / 1.0, rel=1e-6)
    assert half_width([1.0]) == float("inf") and half_width([2.0, 2.0]) == 0


def test_ratios_are_pair_by_pair():
    def turn(tokens):
        from openai_client import Timing

        return summarise([Timing("m", 0, 1.0, (0.5,) * tokens, 1, tokens)], 0, 1)

    assert Turns([turn(10), turn(20)], [turn(5), turn(40)]).ratios == [0.5, 2.0]
