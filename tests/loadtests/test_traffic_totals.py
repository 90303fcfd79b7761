"""Totals of several processes are those of one that had all answers."""

from openai_client import Timing
from traffic_totals import TrafficTotals

ANSWERS = [
    (Timing("m", 0, 2.0, (0.5, 2.0), 10, 2), 102.0),
    (Timing("m", 0, 3.0, (2.5, 3.0), 20, 2), 104.0),
    (Timing("m", 0, 1.0, error="timeout"), 105.0),
    (Timing("m", 0, 4.0, (1.0,), 30, 1), 110.0),
]


def totals(answers):
    found = TrafficTotals()
    for timing, now in answers:
        found.add(timing, slo=2.0, now=now)
    return found


def test_answers_errors_and_attainment_are_counted():
    found = totals(ANSWERS)
    assert (found.finished, found.prompt_tokens, found.output_tokens, found.in_time) == (3, 60, 5, 2)
    assert found.errors == {"timeout": 1} and found.attainment == 2 / 4
    assert (found.begin, found.end) == (100.0, 110.0)
    row = found.row()
    assert row["requests/s"] == "0.30" and row["output tokens/s"] == "0.50" and row["errors"] == "timeout 1"


def test_parts_add_up_to_the_whole():
    whole, parts = totals(ANSWERS), TrafficTotals()
    for part in (ANSWERS[:1], [], ANSWERS[1:]):
        parts.add_totals(totals(part).as_json())
    assert parts == whole


def test_nothing_has_no_rates():
    assert TrafficTotals().attainment is None and TrafficTotals().row()["requests/s"] == ""
