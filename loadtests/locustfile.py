"""Locust over many adapters: OpenAI streaming requests, each naming an adapter drawn by `workload.py`.

    locust -f loadtests/locustfile.py --host http://localhost:8000 --users 32           # web page on port 8089
    locust -f loadtests/locustfile.py --host http://localhost:8000 --headless --users 32 --run-time 2m --csv out \\
        --popularity power:0.3 --ttft-slo 6 --least-attainment 0.99

Its statistics have the time to the first token (``TTFT``), the mean time for each further token (``inter-token``) and
``end-to-end``, each for adapters and for the base. Rates of tokens, attainment of the TTFT limit and kinds of error are
a tab of the web page, lines on the terminal, and ``PREFIX_traffic.csv`` beside the files of ``--csv``. Users ask one
request after the other; with ``--arrivals gamma:…`` they wait for the trace's times, which takes as many users as there
may be requests at once. Every worker process of a distributed run has a trace of its own, and its rate.
``--requests`` ends a test by its work and not by the clock, so that no request is cut off.
"""

from __future__ import annotations

import csv
import itertools
import json
import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gevent
from geventhttpclient import HTTPClient
from locust import User, events, task
from locust.exception import StopUser
from locust.runners import WorkerRunner
from openai_client import AnswerReader, Timing, request_body
from served_models import ask_models, read_names
from traffic_summary import SLO_SECONDS
from traffic_totals import TrafficTotals
from workload import BASE, Trace, add_arguments, generate, spec_of

from vllm_jdlora.errors import JDLoRAError

TAB = "traffic"
SPENT = "spent"
API_KEY = os.environ.get("OPENAI_API_KEY")


class RequestFailed(Exception):
    """Its text is the kind alone: Locust counts errors by it."""


class Traffic:
    """What the users of this process share: the trace, the names in it, and the totals."""

    def __init__(self, environment: Any):
        options = environment.parsed_options
        self.options = options
        self.totals = TrafficTotals()
        served = ask_models(environment.host, api_key=API_KEY, base=options.base)
        self.base = served.base
        self.adapters = read_names(Path(options.adapters_file)) if options.adapters_file else served.adapters
        if not self.adapters:
            raise JDLoRAError(f"{environment.host} lists no adapters: start it with some")
        spec = spec_of(options, adapters=len(self.adapters), requests=options.trace_requests)
        worker = max(0, getattr(environment.runner, "worker_index", 0))
        self.trace: Trace = generate(spec.with_seed(spec.seed + worker))
        self.begin = time.perf_counter()
        self._numbers: Iterator[int] = itertools.count() if options.requests is None else iter(range(options.requests))
        self.answered = 0

    @property
    def spent(self) -> bool:
        """Whether all of ``--requests`` are answered."""
        return self.answered == self.options.requests

    def next_request(self) -> tuple[float, str, str | list[int], int, str]:
        """(when it is due by ``time.perf_counter()``, model, prompt, output tokens, what Locust calls it).

        Raises:
            StopUser: there have been as many as ``--requests`` says.
        """
        if (number := next(self._numbers, None)) is None:
            raise StopUser
        round_, index = divmod(number, len(self.trace.requests))
        request = self.trace.requests[index]
        due = self.begin + round_ * self.trace.requests[-1].at + request.at
        vocabulary = self.options.vocabulary
        prompt = (
            self.trace.prompt_ids(index, vocabulary, round_) if vocabulary else self.trace.prompt_text(index, round_)
        )
        if request.adapter == BASE:
            return due, self.base, prompt, request.output_tokens, "base"
        return due, self.adapters[request.adapter], prompt, request.output_tokens, "adapters"


@events.init_command_line_parser.add_listener
def add_flags(parser: Any) -> None:
    # The web page edits flags of one value only.
    flags: Any = SimpleNamespace(add_argument=partial(parser.add_argument, include_in_web_ui=False))
    add_arguments(flags)
    flags.add_argument("--requests", type=int, help="of each process, then the test ends; default: until --run-time")
    flags.add_argument("--trace-requests", type=int, default=10_000, help="after so many the traffic begins again")
    flags.add_argument("--adapters-file", help="names, one a line; default: what the server lists")
    flags.add_argument("--base", help="name of the base model, where the server does not say")
    flags.add_argument("--vocabulary", type=int, help="prompts are token ids below it; default: text")
    flags.add_argument("--until-eos", action="store_true", help="answers may end by themselves")
    flags.add_argument("--request-timeout", type=float, default=600.0, help="seconds without a byte")
    flags.add_argument("--ttft-slo", type=float, default=SLO_SECONDS, help="limit of the time to the first token, s")
    flags.add_argument("--least-attainment", type=float, help="exit code 1 where a smaller share keeps the limit")


@events.init.add_listener
def prepare(environment: Any, **_: Any) -> None:
    environment.traffic_totals = TrafficTotals()
    environment.events.report_to_master.add_listener(partial(report, environment))
    environment.events.worker_report.add_listener(partial(collect, environment))
    if environment.web_ui:
        add_tab(environment)


@events.test_start.add_listener
def begin_traffic(environment: Any, **_: Any) -> None:
    """At the start of every test, from the web page too."""
    try:
        environment.traffic = Traffic(environment)
    except JDLoRAError as error:
        print(f"the load test cannot start: {error}")
        environment.process_exit_code = 2
        gevent.spawn(environment.runner.quit)
        raise
    environment.traffic_totals = environment.traffic.totals
    environment.spent_workers = set()


def end(environment: Any) -> None:
    """Of the test; without the web page also of Locust. Users are waited for, so not from one of them."""
    runner = environment.runner
    gevent.spawn(runner.quit if environment.parsed_options.headless else runner.stop)


def report(environment: Any, client_id: str, data: dict[str, Any]) -> None:
    """A worker's totals since its last report go to the master, and whether there will be more."""
    data[TAB] = environment.traffic_totals.as_json()
    data[SPENT] = hasattr(environment, "traffic") and environment.traffic.spent
    environment.traffic_totals = TrafficTotals()
    if hasattr(environment, "traffic"):
        environment.traffic.totals = environment.traffic_totals


def collect(environment: Any, client_id: str, data: dict[str, Any]) -> None:
    environment.traffic_totals.add_totals(data[TAB])
    if data[SPENT]:
        environment.spent_workers.add(client_id)
        if len(environment.spent_workers) == environment.runner.worker_count:
            end(environment)


@events.quitting.add_listener
def conclude(environment: Any, **_: Any) -> None:
    """The last words: totals to the terminal and beside Locust's own CSV files, and the exit code."""
    if isinstance(environment.runner, WorkerRunner):
        return
    row, options = environment.traffic_totals.row(), environment.parsed_options
    print(f"\ntraffic, TTFT limit {options.ttft_slo:g} s")
    for title, value in row.items():
        print(f"  {title:24}{value or '–'}")
    if options.csv_prefix:
        with open(f"{options.csv_prefix}_traffic.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, row)
            writer.writeheader()
            writer.writerow(row)
    least, attained = options.least_attainment, environment.traffic_totals.attainment
    if least is not None and (attained is None or attained < least):
        environment.process_exit_code = 1


def add_tab(environment: Any) -> None:
    """The totals as a table of the web page, refreshed with its own statistics."""
    from flask import request

    columns = [{"key": title, "title": title} for title in TrafficTotals().row()]
    environment.web_ui.template_args["extended_tabs"] = [{"title": "Traffic", "key": TAB}]
    environment.web_ui.template_args["extended_tables"] = [{"key": TAB, "structure": columns}]

    @environment.web_ui.app.after_request
    def extend(response: Any) -> Any:
        if request.path == "/stats/requests" and response.is_json:
            extra = {"extended_stats": [{"key": TAB, "data": [environment.traffic_totals.row()]}]}
            response.set_data(json.dumps({**response.json, **extra}))
        return response


class AdapterUser(User):
    """Asks for one answer after the other and reads it as it comes."""

    host = "http://localhost:8000"

    def on_start(self) -> None:
        timeout = self.environment.parsed_options.request_timeout
        self.http = HTTPClient.from_url(self.environment.host, connection_timeout=30.0, network_timeout=timeout)

    def on_stop(self) -> None:
        self.http.close()

    @task
    def ask(self) -> None:
        traffic: Traffic = self.environment.traffic
        due, model, prompt, tokens, name = traffic.next_request()
        if (early := due - time.perf_counter()) > 0:
            gevent.sleep(early)
        options = {} if traffic.options.until_eos else {"ignore_eos": True}
        timing = self._answer(*request_body(model, prompt, tokens, **options), model)
        traffic.totals.add(timing, slo=traffic.options.ttft_slo, now=time.time())
        traffic.answered += 1
        if traffic.spent and not isinstance(self.environment.runner, WorkerRunner):
            end(self.environment)
        self._tell("end-to-end", name, timing.seconds, RequestFailed(timing.error) if timing.error else None)
        if timing.error:
            gevent.sleep(0.1)  # a server that refuses must not be asked thousands of times a second
            return
        for kind, seconds in (("TTFT", timing.ttft), ("inter-token", timing.inter_token)):
            if seconds is not None:
                self._tell(kind, name, seconds)

    def _answer(self, path: str, body: dict[str, Any], model: str) -> Timing:
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {API_KEY}"} if API_KEY else {})}
        reader = AnswerReader(model, time.perf_counter())
        response = None
        try:
            response = self.http.post(path, body=json.dumps(body), headers=headers)
            if response.status_code != 200:
                reader.fail(f"http {response.status_code}", response.read().decode(errors="replace"))
            else:
                while line := response.readline(b"\n"):
                    reader.feed(line, time.perf_counter())
        except TimeoutError:
            reader.fail("timeout")
        except ConnectionRefusedError:
            reader.fail("refused")
        except OSError as error:
            reader.fail("disconnected", str(error))
        finally:
            if response is not None:
                response.release()  # also when a user is stopped in the middle of an answer
        return reader.timing(time.perf_counter())

    def _tell(self, kind: str, name: str, seconds: float, error: Exception | None = None) -> None:
        self.environment.events.request.fire(
            request_type=kind,
            name=name,
            response_time=1000 * seconds,
            response_length=0,
            exception=error,
            context=self.context(),
        )
