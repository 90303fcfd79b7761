"""Throughput side by side: base, stock vLLM with one adapter and with all, and compressed adapters (`make bench`).

Every configuration is a real vLLM engine in a process of its own. All engines are started first and then take turns
on the same prompts, round after round, so that a machine whose speed drifts slows all of them alike; what is
reported are medians over the rounds and ratios between them. One JSON line is appended to `results/bench.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOG_TAIL = 25


@dataclass(frozen=True)
class Configuration:
    """One engine: its key in the table, what it is, and the adapters that its requests name."""

    key: str
    title: str
    adapters: str  # none | one | all
    kind: str  # base | stock | jd
    eager: bool = False


CONFIGURATIONS = (
    Configuration("a", "base without LoRA", "none", "base"),
    Configuration("a-eager", "base without LoRA, not compiled", "none", "base", eager=True),
    Configuration("b", "stock vLLM, one adapter", "one", "stock"),
    Configuration("c", "stock vLLM, all adapters", "all", "stock"),
    Configuration("d", "compressed, all adapters", "all", "jd"),
)


@dataclass(frozen=True)
class Workload:
    """What one timed run does: `requests` prompts of `prompt_tokens`, each answered by `output_tokens`."""

    name: str
    requests: int
    prompt_tokens: int
    output_tokens: int

    def tokens(self) -> int:
        """The tokens that count: generated ones, or the prompt's where only one token is generated."""
        return self.requests * (self.output_tokens if self.output_tokens > 1 else self.prompt_tokens)


# --- the engine's process ---------------------------------------------------------------------------------------------


def serve_runs(spec: dict) -> None:
    """Start the engine of `spec`, then answer each workload that comes in on stdin by seconds on stdout."""
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", HF_HUB_OFFLINE="1", VLLM_LOGGING_LEVEL="WARNING")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever vLLM prints goes to the log
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    configuration = Configuration(**spec["configuration"])
    paths = [Path(p) for p in spec["adapters"]]
    options = {}
    requests: list[LoRARequest | None] = [None]
    if configuration.kind == "stock":
        used = paths if configuration.adapters == "all" else paths[:1]
        options = {"enable_lora": True, "max_loras": len(used), "max_cpu_loras": len(used), "max_lora_rank": 16}
        requests = [LoRARequest(p.name, i + 1, str(p)) for i, p in enumerate(used)]
    elif configuration.kind == "jd":
        from vllm_jdlora.collection import Collection
        from vllm_jdlora.serving.requests import lora_requests

        options = {"additional_config": {"jdlora": {"collection": spec["collection"]}}}
        requests = list(lora_requests(Collection.open(spec["collection"])).values())
    llm = LLM(
        spec["model"],
        dtype=spec["dtype"],
        max_model_len=2048,
        max_num_seqs=spec["batch"],
        max_num_batched_tokens=2048,
        kv_cache_memory_bytes=512 << 20,
        enable_prefix_caching=False,
        enforce_eager=configuration.eager,
        **options,
    )

    def run(workload: Workload) -> float:
        rng = random.Random(workload.name)
        prompts = [
            {"prompt_token_ids": [rng.randrange(1000, 40000) for _ in range(workload.prompt_tokens)]}
            for _ in range(workload.requests)
        ]
        who = [requests[i % len(requests)] for i in range(workload.requests)]
        params = SamplingParams(temperature=0, max_tokens=workload.output_tokens, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        llm.generate(prompts, params, lora_request=who, use_tqdm=False)
        return time.perf_counter() - start

    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps({"seconds": run(Workload(**json.loads(line)))}), file=answers, flush=True)


class Engine:
    """The parent's handle on one engine process."""

    def __init__(self, configuration: Configuration, spec: dict, log: Path):
        self.configuration, self.log = configuration, log
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--engine", json.dumps({**spec, "configuration": asdict(configuration)})],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            text=True,
        )

    def wait_ready(self) -> None:
        self._answer()

    def run(self, workload: Workload) -> float:
        """Seconds of one run."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asdict(workload)) + "\n")
        self._process.stdin.flush()
        return self._answer()["seconds"]

    def _answer(self) -> dict:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            tail = "\n".join(self.log.read_text().splitlines()[-LOG_TAIL:])
            raise SystemExit(f"bench: the engine of ({self.configuration.key}) died; the end of its log:\n{tail}")
        return json.loads(line)

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


# --- the report -------------------------------------------------------------------------------------------------------


def hardware() -> dict:
    """Processor, cores and the CPU features that decide about bf16."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    fields = dict(
        (k.strip(), v.strip()) for k, _, v in (line.partition(":") for line in info.splitlines()) if k.strip()
    )
    flags = set(fields.get("flags", "").split())
    return {
        "cpu": fields.get("model name", platform.processor()),
        "cores": os.cpu_count(),
        "features": [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in flags],
    }


def versions() -> dict:
    return {name: metadata.version(name) for name in ("vllm", "torch", "vllm-jdlora")}


def commit() -> str:
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    return subprocess.run(git, capture_output=True, text=True).stdout.strip()


def print_table(rates: dict[str, dict[str, list[float]]], workloads: list[Workload]) -> None:
    from rich.console import Console
    from rich.table import Table

    for workload in workloads:
        table = Table(
            title=f"{workload.name}: {workload.requests} requests, {workload.prompt_tokens} tokens in, "
            f"{workload.output_tokens} out"
        )
        for column in ("", "configuration", "tokens/s", "spread", "of (a)", "of (c)"):
            table.add_column(column, justify="left" if column in ("", "configuration") else "right")
        row = rates[workload.name]
        for c in CONFIGURATIONS:
            if c.key not in row:
                continue
            rate = statistics.median(row[c.key])
            spread = f"{min(row[c.key]):.0f}–{max(row[c.key]):.0f}"
            against = [f"{ratio(row, c.key, other):.2f}" if other in row else "–" for other in ("a", "c")]
            table.add_row(c.key, c.title, f"{rate:.0f}", spread, *against)
        Console().print(table)


def ratio(row: dict[str, list[float]], one: str, other: str) -> float:
    """Median over the rounds of the ratio within a round: both numbers of each come from the same minute."""
    return statistics.median(x / y for x, y in zip(row[one], row[other], strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=Path, default=ROOT / "demo" / "adapters", help="folder of PEFT adapters")
    parser.add_argument("--model", type=Path, help="base model folder (default: the demo's, prepared if need be)")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--clusters", type=int, default=4)
    parser.add_argument("--batch", type=int, default=32, help="concurrent requests")
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default=None, help="default: bfloat16 where the CPU has it, else float32")
    parser.add_argument("--only", nargs="*", choices=[c.key for c in CONFIGURATIONS], help="leave the others out")
    parser.add_argument("--results", type=Path, default=ROOT / "loadtests" / "results" / "bench.jsonl")
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.engine:
        return serve_runs(json.loads(args.engine))

    from rich.progress import Progress

    from vllm_jdlora.adapter import read_adapters
    from vllm_jdlora.collection.build import compress
    from vllm_jdlora.demo.environment import cpu_dtype

    if args.model is None:
        from vllm_jdlora.demo.base_model import prepare_base_model

        args.model = prepare_base_model()
    machine = hardware()
    dtype = args.dtype or cpu_dtype(set(machine["features"]))
    workloads = [
        Workload("decode", args.batch, 64, args.output_tokens),
        Workload("prefill", 8, 512, 1),
    ]
    chosen = [c for c in CONFIGURATIONS if not args.only or c.key in args.only]
    with tempfile.TemporaryDirectory() as scratch:
        adapters, _ = read_adapters([args.adapters])
        collection = compress(adapters, Path(scratch) / "collection", rank=args.rank, clusters=args.clusters)
        errors = [a.relative_error for a in collection.manifest.adapters]
        spec = {
            "model": str(args.model),
            "adapters": [str(a.path) for a in adapters],
            "collection": str(collection.path),
            "dtype": dtype,
            "batch": args.batch,
        }
        engines: list[Engine] = []
        rates: dict[str, dict[str, list[float]]] = {w.name: {c.key: [] for c in chosen} for w in workloads}
        try:
            with Progress() as progress:
                task = progress.add_task("starting engines", total=len(chosen))
                for configuration in chosen:
                    # One at a time: two cores, and each start compiles or packs weights.
                    engines.append(Engine(configuration, spec, Path(scratch) / f"{configuration.key}.log"))
                    engines[-1].wait_ready()
                    progress.advance(task)
                task = progress.add_task("warm-up and rounds", total=(args.rounds + 1) * len(chosen) * len(workloads))
                for round_ in range(args.rounds + 1):
                    for workload in workloads:
                        for engine in engines:
                            seconds = engine.run(workload)
                            if round_:
                                rates[workload.name][engine.configuration.key].append(workload.tokens() / seconds)
                            progress.advance(task)
        finally:
            for engine in engines:
                engine.stop()

    print_table(rates, workloads)
    record = {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "hardware": machine,
        "versions": versions(),
        "dtype": dtype,
        "adapters": len(adapters),
        "rank": args.rank,
        "clusters": args.clusters,
        "relative_error": {"mean": statistics.mean(errors), "max": max(errors)},
        "rounds": args.rounds,
        "workloads": [asdict(w) for w in workloads],
        "tokens_per_second": {w: {k: [round(x, 1) for x in v] for k, v in row.items()} for w, row in rates.items()},
        "ratios": {
            w: {f"d/{other}": round(ratio(row, "d", other), 3) for other in ("a", "a-eager", "c") if other in row}
            for w, row in rates.items()
            if "d" in row
        },
    }
    args.results.parent.mkdir(parents=True, exist_ok=True)
    with args.results.open("a") as f:
        f.write(json.dumps(record) + "\n")
    for name, ratios in record["ratios"].items():
        print(f"{name}: " + ", ".join(f"({k}) = {v:.2f}" for k, v in ratios.items()))
    print(f"relative error of the compressed adapters: mean {statistics.mean(errors):.3f}, max {max(errors):.3f}")
    print(f"appended to {args.results}")


if __name__ == "__main__":
    main()
