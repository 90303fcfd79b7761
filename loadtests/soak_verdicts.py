"""What must hold of a soak, and whether it did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from soak_adapters import BASE
from soak_counts import Clients, Comparison
from soak_reference import Checked
from soak_series import Growth, Thirds
from soak_traffic import Answer

GROWTH_MIB = 32.0
"""Of the last two thirds. In 20 minutes at 5 requests/s that is under 6 KB for each request."""
P50_RATIO, P99_RATIO = 1.2, 1.5
"""Last third over first. A p99 rests on some dozens of requests."""
LEAST_MINUTES = 10.0
"""Of a soak whose memory and latency are judged: before, caches fill, and percentiles are chance."""
TOLD_APART = 0.95


@dataclass(frozen=True)
class Verdict:
    """`held`: None where it could not be judged, and `figures` say why."""

    name: str
    held: bool | None
    figures: str


def failures_of(clients: Clients) -> list[str]:
    """Answers that are not as they should be: any error but 404 of a name that was unknown, and too few tokens."""
    found = []
    for answer in clients.answers:
        timing = answer.timing
        if timing.error == "http 404" and answer.name != BASE:
            if None not in clients.history.possible(answer.name, answer.sent, answer.ended):
                found.append(f"{answer.name}: 404, and it was known")
        elif timing.error:
            found.append(f"{answer.name}: {timing.error} {timing.detail}")
        elif not timing.left and timing.output_tokens != answer.output_tokens:
            found.append(f"{answer.name}: {timing.output_tokens} tokens of {answer.output_tokens}")
    return found


def verdicts_of(
    clients: Clients,
    comparisons: Sequence[Comparison],
    checked: Checked | None,
    growth: Growth | None,
    thirds: Thirds | None,
    *,
    minutes: float,
    idle: bool,
    exit_code: int | None,
) -> list[Verdict]:
    """All of them.

    Args:
        checked: None where answers were not compared with the reference.
        minutes: that the soak took.
        idle: the engine held no request in the end.
        exit_code: of the server while it should have run; None: it did.
    """
    return [
        Verdict("the server ran to the end", exit_code is None, "it did" if exit_code is None else f"exit {exit_code}"),
        _no_answer_lost(clients),
        _no_answer_crossed(checked),
        Verdict(
            "bad requests were refused as they should be",
            not clients.hostile.wrong_count,
            _some(sum(clients.hostile.statuses.values()), "bad requests", clients.hostile.wrong_count),
        ),
        Verdict(
            "adapters came and went",
            not clients.operator.failed,
            _some(len(clients.operator.events), "calls", len(clients.operator.failed), clients.operator.failed),
        ),
        _counts(comparisons),
        Verdict("nothing was left in the engine", idle, "no request runs or waits" if idle else "requests are left"),
        _memory_flat(growth, minutes),
        *(_latency_flat(thirds, minutes, name, most) for name, most in (("p50", P50_RATIO), ("p99", P99_RATIO))),
    ]


def all_held(verdicts: Sequence[Verdict]) -> bool:
    return all(verdict.held is not False for verdict in verdicts)


def kinds_of(answers: Sequence[Answer]) -> dict[str, int]:
    """How requests ended: ``whole``, ``left`` or the kind of error → how many."""
    ends = Counter(a.timing.error or ("left" if a.timing.left else "whole") for a in answers)
    return dict(sorted(ends.items()))


def _no_answer_lost(clients: Clients) -> Verdict:
    failures = failures_of(clients)
    ends = ", ".join(f"{n} {kind}" for kind, n in kinds_of(clients.answers).items())
    return Verdict("no answer was lost", not failures, _with_examples(ends, failures))


def _no_answer_crossed(checked: Checked | None) -> Verdict:
    name = "sampled answers are those of their adapter"
    if checked is None or not checked.answers:
        return Verdict(name, None, "not compared")
    apart = 1 - checked.confused / checked.others if checked.others else None
    figures = f"{checked.answers} of {checked.contents} contents, {len(checked.wrong)} wrong"
    if checked.undecided:
        figures += f", {len(checked.undecided)} with a far token (rounding: up to {checked.most_undecided})"
    if apart is not None:
        figures += f"; of {checked.others} comparisons with another's, {100 * apart:.0f} % told apart"
    told = apart is None or apart >= TOLD_APART
    held = not checked.wrong and len(checked.undecided) <= checked.most_undecided and told
    return Verdict(name, held, _with_examples(figures, checked.wrong))


def _counts(comparisons: Sequence[Comparison]) -> Verdict:
    wrong = [
        f"{c.name}: server {c.server:g}, clients {c.least:g}" + (f" to {c.most:g}" if c.most != c.least else "")
        for c in comparisons
        if not c.agrees
    ]
    figures = f"{len(comparisons) - len(wrong)} of {len(comparisons)} agree"
    return Verdict("server and clients count the same", not wrong, _with_examples(figures, wrong))


def _memory_flat(growth: Growth | None, minutes: float) -> Verdict:
    name = f"memory is flat (< {GROWTH_MIB:g} MiB after the first third)"
    if growth is None:
        return Verdict(name, None, "too few looks")
    worst = max(growth.own_mib, growth.resident_mib)
    figures = f"{growth.own_mib:+.1f} MiB its own, {growth.resident_mib:+.1f} MiB with files"
    return Verdict(name, worst < GROWTH_MIB if minutes >= LEAST_MINUTES else None, _too_short(figures, minutes))


def _latency_flat(thirds: Thirds | None, minutes: float, percentile: str, most: float) -> Verdict:
    name = f"latency is flat (TTFT {percentile}, last third ≤ {most:g} × first)"
    if thirds is None:
        return Verdict(name, None, "a third has no answer")
    ratio = thirds.ratio(percentile)
    first, last = (1e3 * getattr(spread, percentile) for spread in (thirds.first, thirds.last))
    figures = f"{ratio:.2f}: {first:.0f} ms, {last:.0f} ms"
    return Verdict(name, ratio <= most if minutes >= LEAST_MINUTES else None, _too_short(figures, minutes))


def _too_short(figures: str, minutes: float) -> str:
    return figures if minutes >= LEAST_MINUTES else f"{figures}; judged from {LEAST_MINUTES:g} minutes on"


def _some(count: int, what: str, wrong: int, examples: Sequence[str] = ()) -> str:
    return _with_examples(f"{count} {what}, {wrong} wrong", examples)


def _with_examples(figures: str, examples: Sequence[str]) -> str:
    return f"{figures}: {'; '.join(examples[:3])}" if examples else figures
