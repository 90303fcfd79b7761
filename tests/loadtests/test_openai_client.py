"""The streaming client against a server whose every answer is known, good and bad."""

import asyncio
import time

import pytest
from aiohttp import web
from openai_client import AnswerReader, Timing, open_session, stream_completion

from tests.loadtests.openai_server import event, every_token, piece, serving, streamed, usage


def asked(answer=every_token, prompt=(1, 2, 3), max_tokens=4, **options):
    """One request; returns its timing and what the server received."""

    async def run():
        async with serving(answer) as (url, bodies), open_session() as session:
            timing = await stream_completion(session, url, "adapter", prompt, max_tokens, **options)
            return timing, bodies[0]

    return asyncio.run(run())


def test_an_answer_is_timed_piece_by_piece():
    pause = 0.05

    async def slow(request, body):
        return await streamed(request, event(piece("a")), event(piece("b")), event(piece("c")),
                              event(usage(3, 3)), event(b"[DONE]"), pause=pause)  # fmt: skip

    timing, _ = asked(slow, keep_text=True)
    assert timing.error is None and timing.text == "abc"
    assert (timing.prompt_tokens, timing.output_tokens) == (3, 3)
    # Sleeps are never shorter; how much longer the machine decides.
    assert all(gap >= 0.9 * pause for gap in timing.gaps) and len(timing.gaps) == 2
    assert 0 < timing.ttft < timing.pieces[-1] <= timing.seconds
    assert timing.inter_token == pytest.approx(sum(timing.gaps) / 2)


def test_the_request_says_all_that_was_asked_for():
    _, body = asked(max_tokens=5, ignore_eos=True, api_key="secret")
    assert body["path"] == "/v1/completions" and body["authorization"] == "Bearer secret"
    assert body["model"] == "adapter" and body["prompt"] == [1, 2, 3] and body["max_tokens"] == 5
    assert body["stream"] is True and body["ignore_eos"] is True and body["temperature"] == 0
    messages = [{"role": "user", "content": "hello"}]
    _, chat = asked(prompt=messages)
    assert chat["path"] == "/v1/chat/completions" and chat["messages"] == messages and "prompt" not in chat


def test_tokens_are_the_servers_count_where_pieces_hold_several():
    async def merged(request, body):
        return await streamed(request, event(piece("a")), event(piece("b c d")), event(usage(3, 4)), event(b"[DONE]"))

    timing, _ = asked(merged)
    assert timing.output_tokens == 4 and len(timing.pieces) == 2
    end = timing.started + timing.seconds + 1
    assert timing.tokens_between(timing.started, end) == 4
    assert timing.tokens_between(timing.started - 1, timing.started) == 0


def test_a_server_that_does_not_count_is_counted_by_pieces():
    async def silent(request, body):
        return await streamed(request, event(piece("a")), event(piece("b")), event(b"[DONE]"))

    timing, _ = asked(silent)
    assert timing.error is None and timing.output_tokens == 2 and timing.prompt_tokens == 0


async def refused_by_http(request, body):
    return web.json_response({"error": {"message": "no such model"}}, status=404)


async def error_in_the_stream(request, body):
    return await streamed(request, event(piece("a")), event({"error": {"message": "engine died"}}))


async def ends_early(request, body):
    return await streamed(request, event(piece("a")))


async def says_nothing(request, body):
    return await streamed(request, event(b"[DONE]"))


async def no_json(request, body):
    return await streamed(request, event(b"{oops"), event(b"[DONE]"))


async def never_ends(request, body):
    await asyncio.sleep(60)
    return web.Response()


async def hangs_up(request, body):
    response = await streamed(request, event(piece("a")))
    request.transport.abort()
    return response


@pytest.mark.parametrize(
    ("answer", "kind", "detail"),
    [
        (refused_by_http, "http 404", "no such model"),
        (error_in_the_stream, "server", "engine died"),
        (ends_early, "cut", ""),
        (says_nothing, "empty", ""),
        (no_json, "malformed", "{oops"),
        (hangs_up, "disconnected", ""),
    ],
)
def test_each_way_to_fail_has_its_kind(answer, kind, detail):
    timing, _ = asked(answer)
    assert timing.error == kind and detail in timing.detail


def test_a_server_that_is_too_slow_is_a_timeout():
    timing, _ = asked(never_ends, timeout=0.1)
    assert timing.error == "timeout" and timing.ttft is None


def test_a_server_that_is_not_there_is_refused():
    async def run():
        async with open_session() as session:
            return await stream_completion(session, "http://127.0.0.1:9", "adapter", "hi", 1)

    assert asyncio.run(run()).error == "refused"


def test_a_client_that_leaves_makes_no_error():
    timing, _ = asked(max_tokens=50, leave_after=2)
    assert timing.left and timing.error is None and len(timing.pieces) == 2 == timing.output_tokens


def test_a_client_that_leaves_at_a_time_keeps_what_it_has():
    async def endless(request, body):
        return await streamed(request, *[event(piece("a"))] * 100, pause=0.05)

    begun = time.perf_counter()
    timing, _ = asked(endless, leave_at=begun + 0.3)
    assert timing.left and timing.error is None and 1 <= len(timing.pieces) < 100
    assert timing.started + timing.seconds == pytest.approx(begun + 0.3, abs=0.2)


def test_other_lines_of_the_protocol_are_skipped():
    reader = AnswerReader("m", 10.0)
    for line in (": ping", "", "event: message", 'data: {"choices": [{"text": "a"}]}', "data: [DONE]"):
        reader.feed(line, 11.0)
    timing = reader.timing(12.0)
    assert timing.error is None and timing.pieces == (1.0,) and timing.seconds == 2.0


def test_a_record_leaves_out_what_is_empty():
    good = Timing("m", 1.0, 2.0, (0.5, 1.23456789), 3, 2).as_json()
    assert good == {"model": "m", "started": 1.0, "seconds": 2.0, "pieces": [0.5, 1.234568], "prompt_tokens": 3,
                    "output_tokens": 2}  # fmt: skip
    assert Timing("m", 1.0, 2.0, error="timeout").as_json()["error"] == "timeout"
