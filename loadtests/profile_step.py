"""Where the microseconds of a decode step and of a prefill step go, base beside compressed (`make profile`).

Each engine runs in a process of its own; they take turns, so that a slow minute slows both. For each function the mean
over the faster half of the steps: it adds up, and leaves out the steps that something else on the machine disturbed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench_engine import Engine, EngineSpec, Workload, stop_on_termination
from bench_rows import engine_options, jd_options
from profile_points import LOGITS, SET_ACTIVE, STEP
from synthetic_collections import ATTENTION, LINEAR, write_collection

from vllm_jdlora.serving.options import IN_PYTHON

OPERATOR = "LoRA operator"
FORWARD = "model forward"


@dataclass
class Profile:
    """Mean microseconds and calls in a step by path of labels, over `steps` steps."""

    microseconds: dict[str, float]
    calls: dict[str, float]
    steps: int

    @classmethod
    def of(cls, steps: list[dict[str, Any]]) -> Profile:
        steps = sorted(steps, key=lambda s: s["times"][STEP][0])
        steps = steps[: (len(steps) + 1) // 2]
        seconds: dict[str, float] = defaultdict(float)
        calls: dict[str, float] = defaultdict(float)
        for step in steps:
            for path, (s, n) in step["times"].items():
                seconds[path] += s / len(steps)
                calls[path] += n / len(steps)
        return cls({p: 1e6 * s for p, s in seconds.items()}, dict(calls), len(steps))

    def rest(self, path: str) -> float:
        """What the functions timed inside `path` leave of it."""
        depth = path.count("/") + 1
        inside = sum(us for p, us in self.microseconds.items() if p.startswith(path + "/") and p.count("/") == depth)
        return self.microseconds[path] - inside

    def has_parts(self, path: str) -> bool:
        return any(p.startswith(path + "/") for p in self.microseconds)

    def at(self, label: str) -> tuple[float, float]:
        """Microseconds and calls of one label, wherever it is called."""
        paths = [p for p in self.microseconds if p.rpartition("/")[2] == label]
        return sum(self.microseconds[p] for p in paths), sum(self.calls[p] for p in paths)


def tree(profiles: dict[str, Profile]) -> list[str]:
    """All paths, parents first, in the order in which a step calls them."""
    seen: dict[str, None] = {}
    for profile in profiles.values():
        seen |= dict.fromkeys(profile.microseconds)
    order = {path: i for i, path in enumerate(seen)}

    def below(path: str) -> list[str]:
        depth = path.count("/") + 1
        children = [p for p in seen if p.startswith(path + "/") and p.count("/") == depth]
        # A function's time is noted when it returns: siblings are in the order of their returns.
        return [path, *(q for p in sorted(children, key=order.__getitem__) for q in below(p))]

    return below(STEP)


def print_profile(title: str, profiles: dict[str, Profile]) -> None:
    from rich.console import Console
    from rich.table import Table

    keys = list(profiles)
    table = Table(title=title)
    table.add_column("µs in a step")
    for key in keys:
        table.add_column(key, justify="right")
    compared = keys[1:]
    for key in compared:
        table.add_column(f"{key} − {keys[0]}", justify="right")
    table.add_column("calls", justify="right")

    def add(name: str, values: list[float], calls: str = "") -> None:
        table.add_row(
            name, *(f"{v:.0f}" if v else "–" for v in values), *(f"{v - values[0]:+.0f}" for v in values[1:]), calls
        )

    for path in tree(profiles):
        indent = "  " * path.count("/")
        calls = max(p.calls.get(path, 0) for p in profiles.values())
        add(
            indent + path.rpartition("/")[2],
            [p.microseconds.get(path, 0.0) for p in profiles.values()],
            f"{calls:.3g}" if calls != 1 else "",
        )
        if any(p.has_parts(path) for p in profiles.values()):
            add(f"{indent}  · rest", [p.rest(path) if path in p.microseconds else 0.0 for p in profiles.values()])
    Console(width=130).print(table)
    base = profiles[keys[0]]
    for key in compared:
        for line in _what_lora_costs(key, profiles[key], base):
            print(line)


def _what_lora_costs(key: str, profile: Profile, base: Profile) -> list[str]:
    whole = profile.microseconds[STEP] - base.microseconds[STEP]
    forward = profile.at(FORWARD)[0] - base.at(FORWARD)[0]
    operator, calls = profile.at(OPERATOR)
    active = profile.at(SET_ACTIVE)[0]
    logits = profile.at(LOGITS)[0] - base.at(LOGITS)[0]
    lines = [
        f"({key}) {base.microseconds[STEP] / profile.microseconds[STEP]:.3f} of the base's speed; "
        f"{whole:+.0f} µs a step: forward {forward:+.0f}, adapters and plan {active:+.0f}, logits {logits:+.0f}, "
        f"others {whole - forward - active - logits:+.0f}"
    ]
    if calls:
        beside = forward - operator
        lines.append(
            f"    in the forward: operator {operator:.0f} ({calls:.0f} calls of {operator / calls:.1f}), "
            f"beside it {beside:+.0f} ({beside / calls:+.1f} a call: dispatch, copies, other compiled code)"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="base model folder (default: the demo's, prepared if need be)")
    parser.add_argument("--targets", choices=["attention", "linear"], default="attention", help="q,k,v or all seven")
    parser.add_argument("--adapters", type=int, default=1000)
    parser.add_argument("--clusters", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--output-tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--dtype", default=None, help="default: bfloat16 where the CPU has it, else float32")
    parser.add_argument("--eager", action="store_true", help="without compilation")
    parser.add_argument("--no-base", action="store_true", help="the compressed engine alone")
    parser.add_argument("--json", type=Path, help="write the means to this file as well")
    parser.add_argument("--torch-profiler", action="store_true", help="tables by operator as well")
    args = parser.parse_args()
    stop_on_termination()

    from bench_conditions import default_dtype, default_model

    model = args.model or default_model()
    dtype = args.dtype or default_dtype()
    options = engine_options(dtype, args.batch, eager=args.eager)
    decode = Workload("decode", args.batch, 16, args.output_tokens)
    workloads = [decode, Workload("prefill of 8", 8, 512, 1), Workload("prefill of 1", 1, 512, 1, repeat=4)]
    with tempfile.TemporaryDirectory() as scratch:
        collection = write_collection(
            Path(scratch) / "collection",
            model,
            ATTENTION if args.targets == "attention" else LINEAR,
            adapters=args.adapters,
            clusters=args.clusters,
            rank=args.rank,
        )
        # A timer sees calls that Python makes; the operator takes some µs more in Python.
        os.environ[IN_PYTHON] = "1"
        specs = [] if args.no_base else [EngineSpec("base", str(model), [], options, profile=True)]
        adapters, compressed = jd_options(collection, options)
        specs.append(EngineSpec("compressed", str(model), adapters, compressed, profile=True))
        engines: list[Engine] = []
        steps: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
        missing: dict[str, None] = {}
        try:
            for spec in specs:
                engines.append(Engine(spec, Path(scratch) / f"{spec.key}.log"))
                engines[-1].wait_ready()
            for round_ in range(args.rounds + 1):
                for workload in workloads:
                    for engine in engines:
                        profile = engine.run(workload, round_).profile
                        assert profile is not None
                        missing |= dict.fromkeys(profile["missing"])
                        if round_:
                            steps[workload.name, engine.spec.key] += _steps_of(workload, profile["steps"])
            record = report(args, dtype, workloads, steps)
            if missing:
                print("not in these versions, so not timed: " + ", ".join(missing))
            if args.json:
                args.json.write_text(json.dumps(record, indent=1))
            for workload in workloads if args.torch_profiler else ():
                few = replace(workload, output_tokens=min(workload.output_tokens, 8), repeat=1)
                for engine in engines:
                    profile = engine.run(few, 0, torch_profiler=True).profile
                    assert profile is not None
                    print(f"\n{workload.name}, {engine.spec.key}\n{profile['table']}", flush=True)
        finally:
            for engine in engines:
                engine.stop()


def report(
    args: argparse.Namespace,
    dtype: str,
    workloads: list[Workload],
    steps: Mapping[tuple[str, str], list[dict[str, Any]]],
) -> dict[str, dict[str, dict[str, float]]]:
    """Print the tables of all workloads; the means behind them."""
    record = {}
    for workload in workloads:
        profiles = {key: Profile.of(found) for (name, key), found in steps.items() if name == workload.name}
        of_all = statistics.median(p.steps for p in profiles.values())
        title = f"{workload.name}: {_batch(workload)}, {dtype}, {args.targets}, {args.adapters} adapters in "
        title += f"{args.clusters} clusters of rank {args.rank}; mean of {of_all:.0f} steps"
        print()
        print_profile(title, profiles)
        record[workload.name] = {key: p.microseconds for key, p in profiles.items()}
    sys.stdout.flush()
    return record


def _batch(workload: Workload) -> str:
    if workload.output_tokens > 1:
        return f"{workload.requests} requests"
    return f"{workload.requests} x {workload.prompt_tokens} tokens"


def _steps_of(workload: Workload, steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The steps that the workload is about: only decoding, or as many prompt tokens as one step takes."""
    if workload.output_tokens > 1:
        return [s for s in steps if s["tokens"] == s["requests"] == workload.requests]
    most = max(s["tokens"] for s in steps)
    return [s for s in steps if s["tokens"] == most]


if __name__ == "__main__":
    main()
