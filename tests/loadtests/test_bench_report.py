"""Ratios are taken within rounds and groups, goals are read literally, and every reported ratio can be measured."""

import pytest


def modules():
    import bench_engine
    import bench_report
    import bench_rows

    return bench_engine, bench_report, bench_rows


def group_of(rates: dict[str, list[float | None]], measure: str = "decode"):
    _, report, rows = modules()
    known = {row.key: row for row in rows.ROWS}
    return report.Group([known[key] for key in rates], {measure: rates})


def test_a_ratio_is_the_median_of_those_within_each_round():
    _, report, _ = modules()
    # The machine halves its speed in the second round: medians of rates would say 110 / 100.
    group = group_of({"a": [100, 50, 200], "d1000": [110, 45, 220]})
    assert report.ratios_of([group])["decode"]["d1000/a"] == pytest.approx(1.1)


def test_rounds_that_a_row_sat_out_do_not_count():
    _, report, _ = modules()
    group = group_of({"c8": [10, None, None], "d1000": [50, 500, 500]})
    assert report.ratios_of([group])["decode"] == {"d1000/c8": 5}


def test_no_ratio_across_groups():
    _, report, _ = modules()
    assert not report.ratios_of([group_of({"a": [100]}), group_of({"s-d1000": [90]})])
    both = [group_of({"a": [100]}), group_of({"a": [200], "s-d1000": [90]})]
    assert report.ratios_of(both)["decode"] == {"s-d1000/a": 0.45}


@pytest.mark.parametrize(
    ("ratio", "figure", "met"),
    [
        ("d1000/a", 0.95, True),
        ("d1000/a", 0.949, False),
        ("s-d1000/a", 0.9, True),
        ("d1000/c8", 3.9, False),
        ("d1000/d8", 0.985, True),
        ("d1000/d8", 1.03, False),  # then eight adapters would be slower than a thousand
        ("d1000-k128/d1000", 0.96, True),
    ],
)
def test_goals_are_those_of_the_project(ratio, figure, met):
    _, report, _ = modules()
    (goal,) = (g for g in report.GOALS if g.ratio == ratio)
    assert goal.met(figure) is met


def test_every_reported_ratio_is_within_a_group_every_row_runs_and_groups_are_small():
    _, report, rows = modules()
    groups = [[row.key for row in group] for group in rows.groups_of(list(rows.ROWS), report.RATIOS)]
    assert {key for group in groups for key in group} == {row.key for row in rows.ROWS}
    assert all(group[0] == "a" and len(group) == len(set(group)) <= 7 for group in groups)
    for name in report.RATIOS:
        assert any(set(name.split("/")) <= set(group) for group in groups), name
    # The goals that are within percents of each other are measured without stock vLLM beside them.
    assert groups[0] == ["a", "p32", "d8", "d1000", "d1000-k128"]


def test_a_choice_of_rows_makes_no_group_that_compares_nothing():
    _, report, rows = modules()
    chosen = [row for row in rows.ROWS if row.key in ("a", "d1000", "s-d1000")]
    groups = rows.groups_of(chosen, report.RATIOS)
    assert [[row.key for row in group] for group in groups] == [["a", "d1000"], ["a", "s-d1000"]]


def test_rows_without_adapters_alone_are_one_group():
    _, report, rows = modules()
    base = [row for row in rows.ROWS if row.kind == "base"]
    assert rows.groups_of(base, report.RATIOS) == [base]


def test_rates_count_the_steps_that_only_decode_apart():
    engine, report, rows = modules()
    group = report.Group([rows.ROWS[0]])
    workload = engine.Workload("decode", 32, 64, 64)
    group.add(1, 3, rows.ROWS[0], workload, engine.Turn(4.0, 2048, 3.0, 2016))
    assert group.rates == {"decode": {"a": [None, 512.0, None]}, report.DECODE_STEPS: {"a": [None, 672.0, None]}}


def test_the_requests_of_a_batch_name_different_adapters_and_others_in_the_next_round():
    engine, _, _ = modules()
    one, two = engine.drawn(1000, 32, seed=1), engine.drawn(1000, 32, seed=2)
    assert len(set(one)) == len(set(two)) == 32 and set(one) != set(two)
    assert one == engine.drawn(1000, 32, seed=1)
    shared = engine.drawn(8, 32, seed=1)
    assert sorted(shared) == sorted(4 * list(range(8)))
