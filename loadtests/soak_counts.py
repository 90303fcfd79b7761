"""Do the server's counters say what the clients of the soak test saw?

Whether an answer whose client left was finished before the server noticed, only the server knows: such counts have
a lower and an upper bound. All others must be equal.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from metrics_page import Counters, value_of
from soak_adapters import History
from soak_churn import Operator
from soak_hostile import CHAT, COMPLETIONS, GONE, LOAD_NO_FOLDER, RELOAD, UNLOAD, HostileClient
from soak_traffic import Answer


@dataclass(frozen=True)
class Comparison:
    """A count: the server's, and what it may be by what the clients saw."""

    name: str
    server: float
    least: float
    most: float

    @property
    def agrees(self) -> bool:
        return self.least <= self.server <= self.most


@dataclass(frozen=True)
class Clients:
    """All that was asked of the server."""

    answers: Sequence[Answer]
    hostile: HostileClient
    operator: Operator
    history: History

    def refused(self, path: str) -> int:
        """Requests to this path that were answered with 4xx."""
        hostile = sum(n for (_, p, status), n in self.hostile.statuses.items() if p == path and status.startswith("4"))
        own = sum((a.timing.error or "").startswith("http 4") for a in self.answers) if path == COMPLETIONS else 0
        return hostile + own


def compare_counts(clients: Clients, before: Counters, after: Counters, revision: str) -> list[Comparison]:
    """Counters of the soak: `after` less `before`; `revision` of the collection that was loaded last.

    vLLM's HTTP counters leave ``/v1/load_lora_adapter`` out (it excludes every path with ``/load`` in it); loads are
    compared by ``jdlora:adapter_loads``.
    """

    def grown(name: str, **labels: str) -> float:
        return value_of(after, name, **labels) - value_of(before, name, **labels)

    def finished(reason: str) -> float:
        return grown("vllm:request_success_total", finished_reason=reason)

    def http(status: str, **labels: str) -> float:
        return grown("http_requests_total", status=status, **labels)

    def loaded(result: str) -> float:
        return grown("jdlora:adapter_loads_total", result=result)

    whole = [a for a in clients.answers if a.timing.error is None and not a.timing.left]
    broken_off = [a for a in clients.answers if a.timing.left]
    answers = len(whole), len(whole) + len(broken_off)
    tokens = sum(a.timing.output_tokens for a in whole)
    prompts = sum(a.timing.prompt_tokens for a in whole)
    half = sum(n for (_, _, status), n in clients.hostile.statuses.items() if status == GONE)
    refused = clients.refused(COMPLETIONS)
    kinds = Counter(event.kind for event in clients.operator.events)
    outcomes = clients.operator.outcomes
    bounds: dict[str, tuple[float, float, float]] = {
        "answers finished": (finished("length"), *answers),
        "completions answered 2xx": (http("2xx", handler=COMPLETIONS), *answers),
        "completions refused 4xx": (http("4xx", handler=COMPLETIONS), refused, refused + half),
        "output tokens": (
            grown("vllm:generation_tokens_total"),
            tokens + sum(a.timing.output_tokens for a in broken_off),
            tokens + sum(a.output_tokens for a in broken_off),
        ),
        "prompt tokens": (
            grown("vllm:prompt_tokens_total"),
            prompts,
            prompts + sum(a.prompt_tokens for a in broken_off),
        ),
    }
    equal: dict[str, tuple[float, float]] = {
        "answers ended by an error": (finished("error"), 0),
        "answers that stopped early": (finished("stop"), 0),
        "chats refused 4xx": (http("4xx", handler=CHAT), clients.refused(CHAT)),
        "unloads 2xx": (http("2xx", handler=UNLOAD), kinds["unload"]),
        "unloads refused 4xx": (http("4xx", handler=UNLOAD), clients.refused(UNLOAD)),
        "reloads 2xx": (http("2xx", handler=RELOAD), kinds["reload"] + kinds["reload, other bases"]),
        "reloads refused 4xx": (http("4xx", handler=RELOAD), clients.refused(RELOAD)),
        "answers 5xx": (http("5xx"), 0),
        "adapters loaded compressed": (loaded("compressed"), outcomes["compressed"]),
        "adapters loaded plain": (loaded("plain"), outcomes["plain"]),
        "adapters refused": (loaded("refused"), clients.hostile.count(LOAD_NO_FOLDER)),
        "adapters known": (value_of(after, "jdlora:adapters_known"), len(clients.history.now())),
        "revision served": (value_of(after, "jdlora:collection_info", revision=revision), 1),
    }
    return [
        *(Comparison(name, *values) for name, values in bounds.items()),
        *(Comparison(name, server, client, client) for name, (server, client) in equal.items()),
    ]


def http_growth(before: Counters, after: Counters) -> dict[str, int]:
    """Path and class of status → requests that the server counted."""
    found = {}
    for (name, labels), value in after.items():
        if name == "http_requests_total" and (more := value - before.get((name, labels), 0.0)):
            pairs = dict(labels)
            found[f"{pairs['method']} {pairs['handler']} {pairs['status']}"] = int(more)
    return dict(sorted(found.items()))
