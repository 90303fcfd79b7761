"""Samples of a Prometheus page: all of them parsed, or one gauge looked at."""

from metrics_page import gauge, read_counters, value_of


def test_values_are_summed_over_the_labels_that_are_not_asked_for():
    counters = read_counters('x_total{a="1",b="1"} 2\nx_total{a="1",b="2"} 3\nx_total{a="2",b="1"} 5\n')
    assert value_of(counters, "x_total") == 10 and value_of(counters, "x_total", a="1") == 5
    assert value_of(counters, "x_total", a="3") == value_of(counters, "y_total") == 0


def test_a_gauge_is_read_without_its_namesakes():
    page = '# TYPE x gauge\nx{engine="0"} 2.0\nx{engine="1"} 3.0\nx_total{engine="0"} 7.0\n'
    assert gauge(page, "x") == value_of(read_counters(page), "x") == 5
    assert gauge(page, "y") == 0
