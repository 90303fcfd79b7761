"""A server's Prometheus page: fetched, read as a whole, or looked at for one figure."""

from __future__ import annotations

import time

import httpx
from prometheus_client.parser import text_string_to_metric_families

from vllm_jdlora.errors import JDLoRAError

Counters = dict[tuple[str, tuple[tuple[str, str], ...]], float]
"""(name of a sample, sorted labels) → value."""


def fetch_page(url: str) -> str:
    """The text of the page of the server at `url`.

    Raises:
        JDLoRAError: it does not answer, or not with a page.
    """
    try:
        return httpx.get(f"{url}/metrics", timeout=60, trust_env=False).raise_for_status().text
    except httpx.HTTPError as error:
        raise JDLoRAError(f"{url} does not answer with its metrics: {error}") from error


def read_counters(text: str) -> Counters:
    """All samples of a page."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value_of(counters: Counters, name: str, **labels: str) -> float:
    """The sum of the samples of this name that have these labels; 0 where there is none."""
    return sum(
        value
        for (found, pairs), value in counters.items()
        if found == name and all(dict(pairs).get(key) == label for key, label in labels.items())
    )


def gauge(text: str, name: str) -> float:
    """The sum of a gauge's samples; 0 where there is none. Parsing the whole page would cost a measurement too much."""
    lines = (line for line in text.splitlines() if line.startswith((name + "{", name + " ")))
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def requests_running(text: str) -> float:
    return gauge(text, "vllm:num_requests_running")


def requests_waiting(text: str) -> float:
    return gauge(text, "vllm:num_requests_waiting")


def wait_until_idle(url: str, *, seconds: float = 60.0) -> None:
    """Requests that were left are dropped by the server within a step or two; then another may have the machine.

    Raises:
        JDLoRAError: it still works on some, or does not answer.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        page = fetch_page(url)
        if not requests_running(page) and not requests_waiting(page):
            return
        time.sleep(0.2)
    raise JDLoRAError(f"{url} still works on requests {seconds:g} s after their clients left")
