"""Do Locust (`locustfile.py`) and ``vllm bench serve`` measure the same throughput of one server under the same load?

    vllm serve MODEL --served-model-name base --lora-compression jd --lora-collection COLLECTION &
    python loadtests/cross_check.py --url http://localhost:8000 --tokenizer MODEL

Both keep as many users busy until as many requests are answered, with prompts and answers of fixed lengths, each
request for an adapter drawn evenly. The rate is all output tokens over the time from the first request to the last
token, filling and draining included, in both. They take turns, there and back, after a run of Locust that is not
counted. Exit code 1 where the medians differ by more than `--within`.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from served_models import ServedModels, ask_models

from vllm_jdlora.errors import JDLoRAError

LOCUSTFILE = Path(__file__).parent / "locustfile.py"


@dataclass(frozen=True)
class Load:
    """What both are asked for.

    Attributes:
        url, served: the server and what it lists.
        tokenizer: folder of the base model.
        users: requests that run at once.
        prompt, output: tokens of every request.
        requests: of every run.
        seed: of the first round's prompts.
    """

    url: str
    served: ServedModels
    tokenizer: Path
    users: int
    prompt: int
    output: int
    requests: int
    seed: int


def by_vllm(load: Load, scratch: Path, round_: int) -> float:
    """Output tokens/s as ``vllm bench serve`` reports them."""
    result = scratch / f"vllm-{round_}.json"
    _run(
        [
            str(Path(sys.executable).parent / "vllm"),
            *("bench", "serve", "--backend", "openai", "--base-url", load.url, "--endpoint", "/v1/completions"),
            *("--model", load.served.base, "--tokenizer", str(load.tokenizer), "--dataset-name", "random"),
            *("--random-input-len", str(load.prompt), "--random-output-len", str(load.output), "--ignore-eos"),
            # By itself it samples, which costs the server time; the locustfile asks for greedy answers.
            *("--temperature", "0"),
            *("--num-prompts", str(load.requests), "--max-concurrency", str(load.users)),
            *("--seed", str(load.seed + round_)),
            *("--lora-modules", *load.served.adapters, "--lora-assignment", "random", "--disable-tqdm"),
            *("--save-result", "--result-filename", str(result)),
        ]
    )
    report = json.loads(result.read_text())
    if report["completed"] != load.requests:
        raise JDLoRAError(f"vllm bench serve completed {report['completed']} of {load.requests} requests")
    rate: float = report["output_throughput"]
    return rate


def by_locust(load: Load, scratch: Path, round_: int) -> float:
    """Output tokens/s as the locustfile reports them."""
    prefix = scratch / f"locust-{round_}"
    vocabulary = json.loads((load.tokenizer / "config.json").read_text())["vocab_size"]
    _run(
        [
            *(sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--host", load.url, "--headless"),
            *("--users", str(load.users), "--spawn-rate", str(load.users), "--requests", str(load.requests)),
            *("--only-summary", "--csv", str(prefix), "--vocabulary", str(vocabulary)),
            *("--seed", str(load.seed + round_)),
            *("--prompt-tokens", str(load.prompt), str(load.prompt + 1)),
            *("--output-tokens", str(load.output), str(load.output + 1)),
        ]
    )
    with open(f"{prefix}_traffic.csv") as file:
        (row,) = csv.DictReader(file)
    if row["requests"] != str(load.requests):
        raise JDLoRAError(f"Locust completed {row['requests']} of {load.requests} requests: {row['errors']}")
    return float(row["output tokens/s"])


def _run(command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        tail = "\n".join(done.stdout.splitlines()[-25:])
        raise JDLoRAError(f"{' '.join(command[:4])} … ended with {done.returncode}:\n{tail}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://localhost:8000")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of the base model")
    parser.add_argument("--users", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--requests", type=int, default=160, help="of each run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, help="default: the clock, as a server keeps the prompts that it has seen")
    parser.add_argument("--within", type=float, default=0.05)
    args = parser.parse_args()
    seed = int(time.time()) if args.seed is None else args.seed
    ways: dict[str, Callable[[Load, Path, int], float]] = {"vllm bench serve": by_vllm, "locust": by_locust}
    rates: dict[str, list[float]] = {name: [] for name in ways}
    try:
        load = Load(
            args.url,
            ask_models(args.url),
            args.tokenizer,
            args.users,
            args.prompt_tokens,
            args.output_tokens,
            args.requests,
            seed,
        )
        with tempfile.TemporaryDirectory(prefix="jdlora-cross-check-") as scratch:
            by_locust(load, Path(scratch), args.rounds)
            for round_ in range(args.rounds):
                for name in list(ways) if round_ % 2 == 0 else reversed(ways):
                    rates[name].append(ways[name](load, Path(scratch), round_))
                    print(f"round {round_ + 1}, {name}: {rates[name][-1]:.1f} output tokens/s", flush=True)
    except JDLoRAError as error:
        parser.error(str(error))
    one, other = (statistics.median(values) for values in rates.values())
    print(f"locust / vllm bench serve: {other / one:.3f}")
    if abs(other / one - 1) > args.within:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
