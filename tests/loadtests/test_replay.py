"""Replaying a trace against a server in this process: who is asked for, when, by how many, and what is written."""

import asyncio
import json

import pytest
import replay
from aiohttp import web
from openai_client import open_session
from replay import Target, replay_at_its_times, replay_by_users
from served_models import ask_models, read_names
from workload import BASE, TrafficSpec, generate

from tests.loadtests.openai_server import event, every_token, piece, serving, streamed
from vllm_jdlora.errors import JDLoRAError

NAMES = ("base", "c", "a", "b")


def spec(**changes):
    lengths = {"prompt": (3, 6), "output": (2, 5)}
    return TrafficSpec(**{"adapters": 3, "requests": 12, "seed": 1, **lengths, **changes})


def replayed(how, trace, answer=every_token, **target):
    """(answers by index, bodies received)."""
    answers = []

    async def run():
        async with serving(answer) as (url, bodies), open_session() as session:
            await how(session, Target(url, "base", ("a", "b", "c"), **target), trace, answers.append)
            return bodies

    bodies = asyncio.run(run())
    return answers, bodies


def by_users(users, **options):
    return lambda session, target, trace, on: replay_by_users(session, target, trace, users, on_answer=on, **options)


def at_its_times(scale=1.0):
    return lambda session, target, trace, on: replay_at_its_times(
        session, target, trace, time_scale=scale, on_answer=on
    )


def test_every_request_goes_to_its_adapter_with_its_lengths():
    trace = generate(spec(base_share=0.3))
    answers, bodies = replayed(by_users(1), trace, vocabulary=100)
    assert len(bodies) == 12
    for request, body, answered in zip(trace.requests, bodies, answers, strict=True):
        assert body["model"] == ("base" if request.adapter == BASE else "abc"[request.adapter])
        assert len(body["prompt"]) == request.prompt_tokens and body["ignore_eos"] is True
        assert answered.timing.output_tokens == request.output_tokens and answered.timing.error is None


def test_prompts_are_words_where_a_server_takes_no_ids():
    trace = generate(spec())
    _, bodies = replayed(by_users(2), trace)
    assert all(isinstance(body["prompt"], str) for body in bodies)


def test_an_open_loop_keeps_to_the_trace_s_times_whatever_the_server_does():
    async def slow(request, body):
        await asyncio.sleep(0.5)
        return await every_token(request, body)

    trace = generate(spec(arrivals="gamma:40:1"))
    answers, _ = replayed(at_its_times(2.0), trace, slow)
    begin = min(a.due - 2 * trace.requests[a.index].at for a in answers)
    for answered in answers:
        assert answered.due - begin == pytest.approx(2 * trace.requests[answered.index].at, abs=1e-6)
        # Late only as far as the machine is busy, and never by the half second of the answer before it.
        assert 0 <= answered.timing.started - answered.due < 0.3


def test_a_closed_loop_never_has_more_requests_than_users():
    running, most = 0, 0

    async def counted(request, body):
        nonlocal running, most
        running, most = running + 1, max(most, running + 1)
        await asyncio.sleep(0.02)
        running -= 1
        return await every_token(request, body)

    answers, _ = replayed(by_users(4), generate(spec()), counted)
    assert most == 4 and sorted(a.index for a in answers) == list(range(12))


def test_a_timed_loop_begins_again_with_new_prompts_and_ends_on_time():
    import time

    async def some(request, body):
        await asyncio.sleep(0.01)
        return await every_token(request, body)

    until = time.perf_counter() + 1.0
    answers, bodies = replayed(by_users(3, until=until, first=10), generate(spec()), some, vocabulary=1000)
    assert answers[0].index in (10, 11) and len(answers) > 15
    prompts = [tuple(body["prompt"]) for body in bodies]
    assert len(set(prompts)) == len(prompts), "a prompt that is asked again could be in the prefix cache"
    assert all(a.timing.started + a.timing.seconds < until + 0.2 for a in answers)
    assert not any(a.timing.error for a in answers)


def test_a_trace_with_more_adapters_than_names_is_refused():
    with pytest.raises(JDLoRAError, match="4 adapters and there are 3"):
        replayed(by_users(1), generate(spec(adapters=4)))


def test_the_command_writes_header_answers_and_summary(tmp_path, monkeypatch, capsys):
    trace, results = tmp_path / "trace.jsonl", tmp_path / "answers.jsonl"
    generate(spec(arrivals="gamma:100:1")).write(trace)

    async def run():
        async with serving(models=NAMES) as (url, _):
            flags = [str(trace), "--url", url, "--base", "base", "--results", str(results), "--json"]
            monkeypatch.setattr("sys.argv", ["replay", *flags])
            await asyncio.to_thread(replay.main)

    asyncio.run(run())
    header, *answers, closing = map(json.loads, results.read_text().splitlines())
    assert header["trace"]["adapters"] == 3 and len(answers) == 12
    assert closing["summary"]["finished"] == 12 and closing["summary"] == json.loads(capsys.readouterr().out)
    assert all(a["started"] >= a["due"] >= 0 for a in answers)


def test_errors_are_the_command_s_exit_code(tmp_path, monkeypatch, capsys):
    trace = tmp_path / "trace.jsonl"
    generate(spec()).write(trace)

    async def broken(request, body):
        if body["model"] == "a":
            return await streamed(request, event(piece("x")))
        return await every_token(request, body)

    async def run():
        async with serving(broken, models=NAMES) as (url, _):
            monkeypatch.setattr("sys.argv", ["replay", str(trace), "--url", url, "--base", "base", "--users", "2"])
            await asyncio.to_thread(replay.main)

    with pytest.raises(SystemExit) as stopped:
        asyncio.run(run())
    assert stopped.value.code == 1 and "errors: cut" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--seconds", "3"], "needs --users"),
        ([], "no times of its own"),
        (["--users", "1", "--url", "http://127.0.0.1:9"], "OpenAI-compatible"),
    ],
)
def test_flags_that_cannot_work_are_refused_with_the_reason(tmp_path, monkeypatch, capsys, flags, reason):
    trace = tmp_path / "trace.jsonl"
    generate(spec()).write(trace)
    monkeypatch.setattr("sys.argv", ["replay", str(trace), *flags])
    with pytest.raises(SystemExit) as stopped:
        replay.main()
    assert stopped.value.code == 2 and reason in capsys.readouterr().err


def listed(models, **options):
    async def run():
        async def none(request, body):
            return web.Response()

        async with serving(none, models=models) as (url, _):
            return await asyncio.to_thread(ask_models, url, **options)

    return asyncio.run(run())


def test_a_server_s_list_is_its_base_and_its_adapters_in_order():
    served = listed(({"id": "base", "parent": None}, {"id": "z", "parent": "base"}, {"id": "a", "parent": "base"}))
    assert served.base == "base" and served.adapters == ("a", "z")
    assert listed(NAMES, base="base").adapters == ("a", "b", "c")
    with pytest.raises(JDLoRAError, match="does not list the base model other"):
        listed(NAMES, base="other")


def test_names_of_a_file(tmp_path):
    file = tmp_path / "names"
    file.write_text("# mine\nb\n\n a \n")
    assert read_names(file) == ("b", "a")
    file.write_text("# nothing\n")
    with pytest.raises(JDLoRAError, match="names no adapter"):
        read_names(file)
    with pytest.raises(JDLoRAError, match="cannot read"):
        read_names(tmp_path / "missing")
