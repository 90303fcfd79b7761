"""One vLLM engine in a process of its own that runs workloads when told to, and the parent's handle on it.

Run as a script it is the engine: the specification is its argument, each line of stdin a turn, each line of stdout
what came of it. All that vLLM prints goes to the log.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

LOG_TAIL = 25


@dataclass(frozen=True)
class Workload:
    """What one timed run does: `requests` prompts of `prompt_tokens`, each answered by `output_tokens`.

    ``repeat``: how many times in one turn, one after the other; for runs too short to time alone.
    """

    name: str
    requests: int
    prompt_tokens: int
    output_tokens: int
    repeat: int = 1


@dataclass(frozen=True)
class EngineSpec:
    """One engine.

    Attributes:
        key: its row in the table.
        model: folder of the base model.
        adapters: (name, vLLM's path) of each adapter that its requests may name; none for the base model.
        options: further arguments of ``vllm.LLM``.
        profile: time the functions of a step (``profile_points``).
    """

    key: str
    model: str
    adapters: list[tuple[str, str]]
    options: dict[str, Any] = field(default_factory=dict)
    profile: bool = False


@dataclass(frozen=True)
class Turn:
    """What came of one workload.

    Attributes:
        seconds: from the first request in to the last token out.
        tokens: what counts: tokens generated, or the prompts' where each request generates only one.
        decode_seconds: of the steps that only decode, and the tokens that they gave.
        profile: of a profiled engine, see ``profile_points``.
    """

    seconds: float
    tokens: int
    decode_seconds: float
    decode_tokens: int
    profile: dict[str, Any] | None = None


class EngineDied(RuntimeError):
    """An engine's process ended; the message has the end of its log."""


def stop_on_termination() -> None:
    """SIGTERM as Ctrl-C: engines are stopped and scratch folders removed on the way out."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


class Engine:
    """The parent's handle on one engine process."""

    def __init__(self, spec: EngineSpec, log: Path):
        self.spec, self.log = spec, log
        self.memory_bytes: dict[str, int] = {}
        self.threads = 0
        self._process = subprocess.Popen(
            [sys.executable, __file__, spec.key],  # the key is for those who look at processes
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            text=True,
        )
        self._tell(asdict(spec))

    def wait_ready(self) -> None:
        ready = self._answer()
        self.memory_bytes, self.threads = ready["memory_bytes"], ready["threads"]

    def run(self, workload: Workload, seed: int, **extra: Any) -> Turn:
        """One turn; the same seed draws the same prompts and, of as many adapters, the same ones."""
        self._tell({"workload": asdict(workload), "seed": seed, **extra})
        answer = self._answer()
        self.memory_bytes = answer.pop("memory_bytes")
        return Turn(**answer)

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()

    def _tell(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self._died()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._died()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _died(self) -> NoReturn:
        tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-LOG_TAIL:])
        raise EngineDied(f"the engine of ({self.spec.key}) died; the end of its log:\n{tail}")


# --- the engine's process ---------------------------------------------------------------------------------------------


def drawn(adapters: int, requests: int, seed: int) -> list[int]:
    """The adapter of each request: all distinct where there are enough, else each as often as the others."""
    order = random.Random(f"adapters {seed}").sample(range(adapters), min(adapters, requests))
    return [order[i % len(order)] for i in range(requests)]


def memory_bytes() -> dict[str, int]:
    """Of this process: resident now and at most, and its own share (pages shared with others count in part)."""
    found = {}
    names = {"VmRSS": "resident", "VmHWM": "peak", "Pss": "proportional"}
    for file in ("/proc/self/status", "/proc/self/smaps_rollup"):
        for line in Path(file).read_text().splitlines() if Path(file).exists() else ():
            key, _, rest = line.partition(":")
            if key in names:
                found[names[key]] = int(rest.split()[0]) << 10
    return found


def serve_turns() -> None:
    """Start the engine that the first line of stdin specifies, then answer each turn."""
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", HF_HUB_OFFLINE="1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever vLLM prints goes to the log
    spec = EngineSpec(**json.loads(sys.stdin.readline()))
    import torch
    from vllm import LLM
    from vllm.lora.request import LoRARequest

    requests = [LoRARequest(name, i + 1, path) for i, (name, path) in enumerate(spec.adapters)]
    llm = LLM(spec.model, skip_tokenizer_init=True, enable_prefix_caching=False, **spec.options)
    for request in requests:
        llm.llm_engine.add_lora(request)  # as `vllm serve --lora-modules` does when it starts
    points = None
    if spec.profile:
        from profile_points import StepTimers

        points = StepTimers(llm)
    ready = {"memory_bytes": memory_bytes(), "threads": torch.get_num_threads()}
    print(json.dumps(ready), file=answers, flush=True)
    for line in sys.stdin:
        message = json.loads(line)
        turn = _run(llm.llm_engine, Workload(**message["workload"]), requests, message["seed"])
        answer = asdict(turn) | {"memory_bytes": memory_bytes()}
        if points is not None:
            answer["profile"] = points.take()
        if message.get("torch_profiler"):
            answer["profile"] = _op_table(llm.llm_engine, message, requests)
        print(json.dumps(answer), file=answers, flush=True)


def _run(engine: Any, workload: Workload, adapters: list[Any], seed: int) -> Turn:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    rng = random.Random(f"{workload.name} {seed}")
    params = SamplingParams(
        temperature=0,
        max_tokens=workload.output_tokens,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )
    tokens = engine.model_config.get_vocab_size()
    seconds = decode_seconds = 0.0
    decode_tokens = 0
    for repeat in range(workload.repeat):
        prompts = [
            [rng.randrange(tokens // 50, tokens) for _ in range(workload.prompt_tokens)]
            for _ in range(workload.requests)
        ]
        who = drawn(len(adapters), workload.requests, seed + repeat) if adapters else []
        start = time.perf_counter()
        for i, prompt in enumerate(prompts):
            lora = adapters[who[i]] if adapters else None
            engine.add_request(f"{seed}-{repeat}-{i}", {"prompt_token_ids": prompt}, params, lora_request=lora)
        begun: set[str] = set()
        while engine.has_unfinished_requests():
            before = time.perf_counter()
            outputs = engine.step()
            taken = time.perf_counter() - before
            # The first token of a request comes from the step that read its prompt.
            if outputs and begun.issuperset(o.request_id for o in outputs):
                decode_seconds += taken
                decode_tokens += len(outputs)
            begun.update(o.request_id for o in outputs)
        seconds += time.perf_counter() - start
    counted = workload.output_tokens if workload.output_tokens > 1 else workload.prompt_tokens
    return Turn(seconds, workload.repeat * workload.requests * counted, decode_seconds, decode_tokens)


def _op_table(engine: Any, message: dict[str, Any], adapters: list[Any]) -> dict[str, Any]:
    """The same turn again under torch's profiler: its table by operator."""
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        _run(engine, Workload(**message["workload"]), adapters, message["seed"])
    return {
        "table": profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=40, max_name_column_width=60)
    }


if __name__ == "__main__":
    serve_turns()
