"""Log logged for operators: one event a line, logfmt, and never one for each step."""

from vllm_jdlora.serving.event_log import SummedEvents, event, logfmt


def test_an_event_is_one_line_whatever_its_values_hold(logged):
    event("adapter_load", name='a b="c"\nevent=forged', seconds=0.123456, path="/models/x-1.0", cluster=None, size=3)
    assert logged == [
        r'jdlora event=adapter_load name="a b=\"c\"\nevent=forged" seconds=0.1235 path=/models/x-1.0 size=3'
    ]


def test_values_that_could_be_read_as_something_else_are_quoted():
    assert logfmt({"a": "", "b": "ü", "c": "x=y"}) == r'a="" b="\u00fc" c="x=y"'


def test_events_of_every_step_are_summed_up(logged):
    clock = iter((100.0, 101.0, 105.0, 110.5, 111.0))
    swaps = SummedEvents("swaps", every_seconds=10, clock=clock.__next__)
    for _ in range(5):
        swaps.add({"sigma_swaps": 2, "base_swaps": 0}, engine=0)
    swaps.add({"sigma_swaps": 0})
    assert logged == [
        "jdlora event=swaps engine=0 sigma_swaps=2 base_swaps=0",
        "jdlora event=swaps engine=0 sigma_swaps=6 base_swaps=0 seconds=10.5",
    ]
