"""Traffic as data: when requests arrive, which adapter each names, and how long its prompt and its answer are.

A `Trace` is made once from a seed, kept as JSONL, and replayed against any server (`replay.py`). What follows the
literature is defined as there:

- arrivals `gamma`, popularity `power` and uniform lengths: S-LoRA (arXiv 2311.03285), its generator's draws in its
  order, so that a seed gives the very same trace;
- popularity `distinct`, `uniform`, `skewed`, `identical`, `geometric`: the groups of Punica (arXiv 2310.18547).

    python loadtests/workload.py trace.jsonl --arrivals gamma:2:1 --popularity power:0.3 --adapters 1000 --requests 600
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from vllm_jdlora.errors import JDLoRAError

FORMAT = 1
BASE = -1
"""The adapter of a request to the base model."""
WORDS = [
    *("time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school"),
    *("state", "family", "student", "group", "country", "problem", "hand", "part", "place", "case", "week"),
]
"""Of one token each in most vocabularies."""


@dataclass(frozen=True)
class TraceRequest:
    """One request.

    Attributes:
        at: seconds after the start of the trace; 0 in a closed loop, where users decide.
        adapter: its number, or `BASE`.
        prompt_tokens, output_tokens: lengths, at least 1.
    """

    at: float
    adapter: int
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True)
class TrafficSpec:
    """All that decides a trace.

    Attributes:
        adapters: how many there are to name.
        requests: how many requests.
        arrivals: ``closed`` (users decide), ``gamma:RATE:CV`` (independent gaps of mean 1/RATE seconds and coefficient
            of variation CV; 1 is Poisson) or ``bursts:RATE:SIZE`` (SIZE at once, Poisson, RATE requests/s in the mean).
        popularity: ``power:ALPHA`` (S-LoRA: a share x of the requests goes to the first x^(1/ALPHA) of the adapters;
            1 is even), ``zipf:S`` (the i-th adapter's share is proportional to i^-S) or one of Punica's: ``distinct``
            (every request another adapter), ``uniform`` (the root of the number of requests in equal groups),
            ``skewed`` (one request against all others), ``identical``, ``geometric:RATIO`` (groups of 1, RATIO,
            RATIO², …). Where there are fewer adapters than groups, they take turns.
        prompt, output: lengths in tokens are drawn uniformly from [low, high).
        base_share: the share of requests, drawn afterwards, that go to the base model instead.
        seed: of all draws.

    Raises:
        JDLoRAError: a value out of its range, or a name that is not known.
    """

    adapters: int
    requests: int
    arrivals: str = "closed"
    popularity: str = "power:1"
    prompt: tuple[int, int] = (8, 512)
    output: tuple[int, int] = (8, 512)
    base_share: float = 0.0
    seed: int = 42

    def __post_init__(self) -> None:
        if self.adapters < 1 or self.requests < 1:
            raise JDLoRAError(f"a trace needs an adapter and a request: {self.adapters} and {self.requests} given")
        for name in ("prompt", "output"):
            low, high = getattr(self, name)
            if not 1 <= low < high:
                raise JDLoRAError(
                    f"{name} lengths are drawn from [low, high) with 1 <= low < high, not [{low}, {high})"
                )
        if not 0 <= self.base_share <= 1:
            raise JDLoRAError(f"base_share is between 0 and 1, not {self.base_share}")
        _parsed("arrivals", self.arrivals, _ARRIVALS)
        _parsed("popularity", self.popularity, _POPULARITY)

    def with_seed(self, seed: int) -> TrafficSpec:
        return replace(self, seed=seed)


@dataclass(frozen=True)
class Trace:
    """Requests in the order of their arrival, and what they were made from."""

    spec: TrafficSpec
    requests: tuple[TraceRequest, ...]

    def write(self, file: Path) -> None:
        """A header line with the specification, then a line for each request: [at, adapter, prompt, output]."""
        lines = [json.dumps({"trace": FORMAT, **asdict(self.spec)})]
        lines += [json.dumps([r.at, r.adapter, r.prompt_tokens, r.output_tokens]) for r in self.requests]
        file.write_text("\n".join(lines) + "\n")

    @classmethod
    def read(cls, file: Path) -> Trace:
        """Raises: JDLoRAError: `file` is not a trace, or it was cut off."""
        try:
            header, *lines = [json.loads(line) for line in file.read_text().splitlines()]
            if header.pop("trace") != FORMAT:
                raise JDLoRAError(f"{file} is a trace of another format than {FORMAT}: make it again")
            spec = TrafficSpec(**{**header, "prompt": tuple(header["prompt"]), "output": tuple(header["output"])})
            requests = tuple(TraceRequest(*line) for line in lines)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise JDLoRAError(f"{file} is not a trace ({error}): make one with loadtests/workload.py") from error
        if len(requests) != spec.requests:
            raise JDLoRAError(f"{file} has {len(requests)} of {spec.requests} requests: make it again")
        return cls(spec, requests)

    def prompt_ids(self, index: int, vocabulary: int, round_: int = 0) -> list[int]:
        """Token ids of a request's prompt, the same for every server; another `round_` gives others of that length."""
        return self._draw(index, round_).choices(range(vocabulary // 50, vocabulary), k=self._length(index))

    def prompt_text(self, index: int, round_: int = 0) -> str:
        """Words, about one token each, for servers that take no token ids."""
        return " ".join(self._draw(index, round_).choices(WORDS, k=self._length(index)))

    def _draw(self, index: int, round_: int) -> random.Random:
        return random.Random(f"prompt {self.spec.seed} {index} {round_}")

    def _length(self, index: int) -> int:
        return self.requests[index].prompt_tokens


def generate(spec: TrafficSpec) -> Trace:
    """The trace of a specification; the same one every time."""
    # The legacy generator, whose streams numpy keeps as they are, and S-LoRA's order: adapters, lengths, gaps.
    draw = np.random.RandomState(spec.seed)
    n = spec.requests
    popularity, parameters = _parsed("popularity", spec.popularity, _POPULARITY)
    adapters = popularity(draw, n, spec.adapters, *parameters)
    prompts, outputs = draw.randint(*spec.prompt, n), draw.randint(*spec.output, n)
    arrivals, parameters = _parsed("arrivals", spec.arrivals, _ARRIVALS)
    times = arrivals(draw, n, *parameters)
    if spec.base_share:
        adapters = np.where(draw.random_sample(n) < spec.base_share, BASE, adapters)
    columns = (times.tolist(), adapters.tolist(), prompts.tolist(), outputs.tolist())
    return Trace(spec, tuple(TraceRequest(*values) for values in zip(*columns, strict=True)))


# --- arrivals: [n] seconds, rising ------------------------------------------------------------------------------------


def _closed(draw: np.random.RandomState, n: int) -> np.ndarray:
    return np.zeros(n)


def _gamma(draw: np.random.RandomState, n: int, rate: float, cv: float) -> np.ndarray:
    return np.cumsum(draw.gamma(1 / cv**2, cv**2 / rate, n))


def _bursts(draw: np.random.RandomState, n: int, rate: float, size: float) -> np.ndarray:
    starts = np.cumsum(draw.exponential(size / rate, math.ceil(n / size)))
    return np.repeat(starts, int(size))[:n]


# --- popularity: [n] numbers of adapters ------------------------------------------------------------------------------


def _power(draw: np.random.RandomState, n: int, adapters: int, alpha: float) -> np.ndarray:
    # A draw of exactly 1 would be one too far.
    return np.minimum((draw.power(alpha, n) * adapters).astype(int), adapters - 1)


def _zipf(draw: np.random.RandomState, n: int, adapters: int, s: float) -> np.ndarray:
    shares = np.arange(1, adapters + 1, dtype=float) ** -s
    return draw.choice(adapters, n, p=shares / shares.sum())


def _grouped(sizes: Callable[..., list[int]]) -> Callable[..., np.ndarray]:
    """Requests in groups of these sizes, one adapter a group, in an order drawn at random."""

    def numbers(draw: np.random.RandomState, n: int, adapters: int, *parameters: float) -> np.ndarray:
        groups = sizes(n, *parameters)
        who = np.repeat(np.arange(len(groups)) % adapters, groups)
        draw.shuffle(who)
        return who

    return numbers


def uniform_groups(n: int) -> list[int]:
    """As many groups as the root of n, rounded up, whose sizes differ by one at most, the larger ones first."""
    groups = math.ceil(math.sqrt(n))
    return [n // groups + (i < n % groups) for i in range(groups)]


def geometric_groups(n: int, ratio: float) -> list[int]:
    """Groups of 1, ⌊ratio⌋, ⌊ratio²⌋, … while they leave something for a last one; the largest first."""
    sizes: list[int] = []
    size = 1.0
    while sum(sizes) + int(size) < n:
        sizes.append(int(size))
        size *= ratio
    return sorted([*sizes, n - sum(sizes)], reverse=True)


@dataclass(frozen=True)
class _Kind:
    """A choice by name: its function, and what each number after the name must be above or at least."""

    make: Callable[..., np.ndarray]
    names: tuple[str, ...] = ()
    above: float = 0
    at_least: float = -math.inf


_ARRIVALS = {
    "closed": _Kind(_closed),
    "gamma": _Kind(_gamma, ("RATE", "CV")),
    "bursts": _Kind(_bursts, ("RATE", "SIZE")),
}
_POPULARITY = {
    "power": _Kind(_power, ("ALPHA",)),
    "zipf": _Kind(_zipf, ("S",), above=-math.inf, at_least=0),
    "distinct": _Kind(_grouped(lambda n: [1] * n)),
    "uniform": _Kind(_grouped(uniform_groups)),
    "skewed": _Kind(_grouped(lambda n: [1, n - 1] if n > 1 else [1])),
    "identical": _Kind(_grouped(lambda n: [n])),
    "geometric": _Kind(_grouped(geometric_groups), ("RATIO",), above=1),
}


def _parsed(what: str, text: str, kinds: dict[str, _Kind]) -> tuple[Callable[..., np.ndarray], list[float]]:
    name, *values = str(text).split(":")
    known = ", ".join(":".join((key, *kind.names)) for key, kind in kinds.items())
    if name not in kinds:
        raise JDLoRAError(f"{what} {text!r} is not known: one of {known}")
    kind = kinds[name]
    try:
        numbers = [float(value) for value in values]
    except ValueError:
        numbers = []
    good = len(numbers) == len(values) == len(kind.names)
    if not good or not all(math.isfinite(x) and x > kind.above and x >= kind.at_least for x in numbers):
        raise JDLoRAError(f"{what} {text!r} does not have the numbers of {':'.join((name, *kind.names))}")
    if name == "bursts" and (numbers[1] < 1 or numbers[1] % 1):
        raise JDLoRAError(f"{what} {text!r}: the size of a burst is a whole number")
    return kind.make, numbers


def add_arguments(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """The flags that `spec_of` reads; `defaults` replace those of `TrafficSpec`."""
    default = {**{f: getattr(TrafficSpec(1, 1), f) for f in ("arrivals", "popularity", "prompt", "output")}, **defaults}
    parser.add_argument("--arrivals", default=default["arrivals"], help="closed, gamma:RATE:CV or bursts:RATE:SIZE")
    parser.add_argument(
        "--popularity",
        default=default["popularity"],
        help="power:ALPHA, zipf:S, distinct, uniform, skewed, identical or geometric:RATIO",
    )
    for name in ("prompt", "output"):
        parser.add_argument(
            f"--{name}-tokens", nargs=2, type=int, metavar=("LOW", "HIGH"), default=default[name], help="[LOW, HIGH)"
        )
    parser.add_argument("--base-share", type=float, default=0.0, help="share of requests to the base model")
    parser.add_argument("--seed", type=int, default=42)


def spec_of(args: argparse.Namespace, *, adapters: int, requests: int) -> TrafficSpec:
    return TrafficSpec(
        adapters=adapters,
        requests=requests,
        arrivals=args.arrivals,
        popularity=args.popularity,
        prompt=tuple(args.prompt_tokens),
        output=tuple(args.output_tokens),
        base_share=args.base_share,
        seed=args.seed,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--adapters", type=int, required=True)
    parser.add_argument("--requests", type=int, required=True)
    add_arguments(parser)
    args = parser.parse_args()
    try:
        trace = generate(spec_of(args, adapters=args.adapters, requests=args.requests))
    except JDLoRAError as error:
        parser.error(str(error))
    trace.write(args.file)
    print(f"{len(trace.requests)} requests over {trace.requests[-1].at:.1f} s in {args.file}")


if __name__ == "__main__":
    main()
