"""A run of the benchmark from flags to record, with engines that answer at once."""

import json
import sys
from typing import ClassVar


class Instant:
    """Stands in for an engine; `c64` dies at its start and `p32` in its second turn."""

    started: ClassVar[list] = []

    def __init__(self, spec, log):
        self.spec, self.log, self.turns = spec, log, 0
        self.memory_bytes = {"peak": 1 << 30}
        self.threads = 2
        self.stopped = False
        Instant.started.append(self)

    def wait_ready(self):
        import bench_engine

        if self.spec.key == "c64":
            raise bench_engine.EngineDied("no room")

    def run(self, workload, seed):
        import bench_engine

        self.turns += 1
        if self.spec.key == "p32" and self.turns == 2:
            raise bench_engine.EngineDied("killed")
        seconds = {"a": 1.0, "c8": 10.0, "s-c8": 20.0}.get(self.spec.key, 1.25)
        decode = workload.output_tokens > 1
        return bench_engine.Turn(seconds, 1000, seconds / 2 if decode else 0.0, 900 if decode else 0)

    def stop(self):
        self.stopped = True


def run_bench(monkeypatch, tmp_path, *flags):
    import bench

    Instant.started = []
    monkeypatch.setattr(bench, "Engine", Instant)
    monkeypatch.setattr(bench, "stop_on_termination", lambda: None)
    results = tmp_path / "bench.jsonl"
    monkeypatch.setattr(sys, "argv", ["bench", "--results", str(results), "--dtype", "float32", *flags])
    bench.main()
    assert all(engine.stopped for engine in Instant.started)
    (line,) = results.read_text().splitlines()
    return json.loads(line)


def test_one_run_gives_one_record_with_rates_ratios_and_goals_and_a_picture(monkeypatch, tmp_path, model):
    picture = tmp_path / "bench.svg"
    rows = ["a", "c64", "p32", "d1000", "s-c8", "s-d1000"]
    record = run_bench(
        monkeypatch, tmp_path, "--model", str(model), "--rounds", "3", "--rows", *rows, "--plot", str(picture)
    )
    rates = record["groups"][0]["tokens_per_second"]
    assert rates["decode"]["a"] == [1000] * 3 and rates["decode steps"]["d1000"] == [1440] * 3
    assert [group["rows"] for group in record["groups"]] == [
        *(["a", "p32", "d1000"], ["a", "d1000"], ["a", "s-d1000"], ["a", "s-c8", "s-d1000"])
    ]
    # Stock takes part in two rounds.
    assert record["groups"][3]["tokens_per_second"]["prefill"]["s-c8"] == [50, 50, None]
    assert record["ratios"]["decode"]["d1000/a"] == 0.8
    assert record["goals"]["d1000/a"]["met"] is False and record["goals"]["s-d1000/s-c8"]["met"] is True
    # Who died is left out and said, the others go on.
    assert set(record["failed"]) == {"c64", "p32"} and "p32" not in rates["decode"]
    assert record["rows"]["d1000"]["synthetic"] is True and record["rows"]["d1000"]["clusters"] == 8
    assert "compressed, 1,000 adapters, 8 clusters" in picture.read_text()


def test_engines_get_what_their_rows_say(monkeypatch, tmp_path, model):
    run_bench(monkeypatch, tmp_path, "--model", str(model), "--quick", "--rows", "a", "d1000", "s-p32", "s-c8")
    specs = {engine.spec.key: engine.spec for engine in Instant.started}
    assert specs["a"].adapters == [] and "additional_config" not in specs["a"].options
    assert len({name for name, _ in specs["d1000"].adapters}) == 1000
    # Uncompressed: the requests name PEFT folders, and a batch has room for all of them.
    assert len(specs["s-p32"].adapters) == specs["s-p32"].options["max_loras"] == 32
    assert not any(path.startswith("jd://") for _, path in specs["s-p32"].adapters)
    stock = specs["s-c8"].options
    assert stock["max_loras"] == stock["max_cpu_loras"] == 8 and len(stock["lora_target_modules"]) == 7


def test_the_picture_has_the_newest_of_each_row_under_equal_conditions(monkeypatch, tmp_path, model):
    import plot_bench

    results = tmp_path / "bench.jsonl"
    kept = []
    for dtype, rows in (("bfloat16", ["a", "s-d1000"]), ("float32", ["a", "d1000", "d8"]), ("float32", ["a", "d1000"])):
        results.unlink(missing_ok=True)
        kept.append(
            run_bench(monkeypatch, tmp_path, "--model", str(model), "--quick", "--dtype", dtype, "--rows", *rows)
        )
    kept[-1]["groups"][0]["tokens_per_second"]["decode"]["d1000"] = [500.0]
    results.write_text("".join(json.dumps(record) + "\n" for record in kept))
    found = plot_bench.newest(results)
    assert list(found["rows"]) == ["a", "d8", "d1000"]
    drawn = {key: group for group in reversed(found["groups"]) for key in group["rows"]}
    assert plot_bench.relative(drawn["d1000"], "decode", "d1000") == [0.5]
    assert plot_bench.relative(drawn["d8"], "decode", "d8") == [0.8]
