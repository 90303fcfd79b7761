"""Real engines, one after another in a process of their own: jobs as JSON on stdin, one line for each on stdout."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

MARK = "job: "
"""Begins the line of each result; vLLM prints between them."""
GPU_PATH = os.environ.get("TRITON_INTERPRET") == "1"
BLOCK = 32
"""Tokens of a block of the KV cache."""


def run(
    *jobs: dict[str, Any], timeout: float = 300, gpu_path: bool = False, env: dict[str, str] | None = None
) -> list[dict[str, Any]]:
    """The result of each job. A job names its kind (a function below), model, collection and engine options.

    gpu_path: the engines take what a worker on CUDA takes for adapters, with Triton's kernels in the interpreter.
    env: variables of the child.
    """
    done = subprocess.run(
        [sys.executable, "-m", "tests.compatibility.engines"],
        env={**os.environ, **({"TRITON_INTERPRET": "1"} if gpu_path else {}), **(env or {})},
        input=json.dumps(jobs),
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=Path(__file__).parents[2],
    )
    results = [line.removeprefix(MARK) for line in done.stdout.splitlines() if line.startswith(MARK)]
    assert len(results) == len(jobs), done.stderr[-4000:]
    return [json.loads(result) for result in results]


def answered(result: dict[str, Any]) -> dict[str, Any]:
    """A result, which must not be an error."""
    assert "error" not in result, result["error"]
    return result


# --- in the child -----------------------------------------------------------------------------------------------------


def greedy(engine: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Greedy answers to prompts of ids, all in one batch; ``who`` names the adapter of each, None for the base."""
    tokens = job.get("tokens", 8)
    return {"answers": _generate(engine, job["requests"], job["prompts"], job["who"], max_tokens=tokens)}


def features(engine: Any, job: dict[str, Any]) -> dict[str, Any]:
    """What one engine can do beside greedy answers; see test_features.py for what each must give."""
    from vllm.sampling_params import BeamSearchParams, StructuredOutputsParams

    requests, first, second = job["requests"], *job["two"]
    prompt, long = job["prompt"], job["long"]
    out: dict[str, Any] = {"chunked": _generate(engine, requests, [long, prompt, long], [first, second, None])}
    out["prefix"] = [_generate(engine, requests, [job["cached"]], [name])[0] for name in (first, second, None, first)]
    out["structured"] = {
        kind: _generate(
            engine,
            requests,
            [prompt, prompt, prompt],
            [first, second, None],
            max_tokens=40,
            ignore_eos=False,
            structured_outputs=StructuredOutputsParams(**{kind: constraint}),
        )
        for kind, constraint in job["structured"].items()
    }
    out["logprobs"] = _generate(engine, requests, [prompt] * 2, [first, second], logprobs=5, prompt_logprobs=3)
    out["samples"] = _generate(engine, requests, [prompt] * 2, [first, None], n=3, temperature=1.0)
    out["seeded"] = _generate(engine, requests, [prompt] * 3, [first, second, first], temperature=1.0, seed=11)
    beams = engine.beam_search(
        [{"prompt_token_ids": prompt}] * 2,
        BeamSearchParams(beam_width=3, max_tokens=5, ignore_eos=True),
        lora_request=[requests[first], requests[second]],
    )
    out["beams"] = [
        [{"tokens": s.tokens[len(prompt) :], "logprob": s.cum_logprob} for s in found.sequences] for found in beams
    ]
    return out | {"bytes": engine.collective_rpc(_device_bytes)[0]}


def greedy_and_bytes(engine: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Greedy answers, what the worker's tensors for adapters take, and what a reload to ``unfit`` says, if given."""
    out = greedy(engine, job) | {"bytes": engine.collective_rpc(_device_bytes)[0]}
    return out | {"refusal": _refusal(engine, job["unfit"])} if "unfit" in job else out


def speculative(engine: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Greedy answers, and how many drafted tokens were accepted."""
    out = greedy(engine, job)
    counted = {metric.name: getattr(metric, "value", None) for metric in engine.get_metrics()}
    return out | {"accepted": counted["vllm:spec_decode_num_accepted_tokens"]}


def embeddings(engine: Any, job: dict[str, Any]) -> dict[str, Any]:
    """The embedding of each prompt."""
    found = engine.embed(
        [{"prompt_token_ids": p} for p in job["prompts"]],
        lora_request=[job["requests"].get(name) for name in job["who"]],
        use_tqdm=False,
    )
    return {"embeddings": [answer.outputs.embedding for answer in found]}


def _generate(engine: Any, requests: dict[str, Any], prompts: list, who: list, **options: Any) -> list[dict[str, Any]]:
    from vllm import SamplingParams

    params = {"temperature": 0, "max_tokens": 8, "logprobs": 1, "detokenize": False, "ignore_eos": True} | options
    params["detokenize"] = params["detokenize"] or "structured_outputs" in params
    found = engine.generate(
        [{"prompt_token_ids": p} for p in prompts],
        SamplingParams(**params),
        lora_request=[requests.get(name) for name in who],
        use_tqdm=False,
    )
    return [_as_json(answer) for answer in found]


def _as_json(answer: Any) -> dict[str, Any]:
    def found(place: dict[int, Any] | None) -> dict[int, float] | None:
        return None if place is None else {token: value.logprob for token, value in place.items()}

    first = answer.outputs[0]
    return {
        "tokens": list(first.token_ids),
        "logprobs": _chosen(first),
        "text": first.text,
        "cached": answer.num_cached_tokens,
        "best": [found(place) for place in first.logprobs],
        "prompt": [found(place) for place in answer.prompt_logprobs or []],
        "samples": [
            {
                "tokens": list(s.token_ids),
                "logprobs": [p[t].logprob for t, p in zip(s.token_ids, s.logprobs, strict=True)],
            }
            for s in answer.outputs
        ],
    }


def _refusal(engine: Any, collection: str) -> str:
    from vllm_jdlora.collection import Collection

    revision = Collection.open(collection).manifest.revision
    try:
        engine.collective_rpc("jdlora_load_collection", args=(collection, revision))
    except Exception as error:  # of a worker in another process it is vLLM's own
        return str(error)
    return ""


def _chosen(output: Any) -> list[float]:
    return [place[token].logprob for token, place in zip(output.token_ids, output.logprobs, strict=True)]


def _device_bytes(worker: Any) -> dict[str, int]:
    """Sums of the very tensors that the worker holds for adapters."""
    manager = worker.model_runner.lora_manager._adapter_manager
    clusters = manager._lora_bases
    bases: list[Any] = []
    plain: list[Any] = []
    for layer in manager.modules.values():
        wrapper, stacked = layer.punica_wrapper, (*layer.lora_a_stacked, *layer.lora_b_stacked)
        if hasattr(wrapper, "_packed"):
            # On CPU the stacks are one slot in truth, through which vLLM writes all.
            plain += [stack[:1] for stack in stacked]
            stacked = (wrapper._packed._v, *wrapper._packed._u)
            if (eight_bit := wrapper._eight_bit) is not None:
                bases += [eight_bit._v, *eight_bit._u, eight_bit._scales]
        elif (eight_bit := wrapper.module.eight_bit) is not None:
            bases += [*eight_bit.v, *eight_bit.u, eight_bit.v_scale, eight_bit.u_scale]
            plain += stacked
            continue
        bases += [stack[:clusters] for stack in stacked]
        plain += [stack[clusters:] for stack in stacked]
    sigma = manager.compressed.scalings.sigma
    sizes = {"bases": bases, "plain_slots": plain, "scalings": [sigma]}
    counted = {name: sum(t.numel() * t.element_size() for t in tensors) for name, tensors in sizes.items()}
    return counted | {"slots": len(sigma)}


def _engine(job: dict[str, Any]) -> Any:
    from vllm import LLM

    options = {
        "dtype": "float32",
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "max_model_len": 192,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 64,
        "block_size": BLOCK,
        "kv_cache_memory_bytes": 32 << 20,
        "additional_config": {"jdlora": {"collection": job["collection"]}},
    }
    if GPU_PATH:
        options["worker_extension_cls"] = "tests.compatibility.cuda_stand_in.Extension"
    return LLM(job["model"], **options | job.get("options", {}))


def _requests(job: dict[str, Any]) -> dict[str, Any]:
    from vllm.lora.request import LoRARequest

    from vllm_jdlora.collection import Collection
    from vllm_jdlora.serving.requests import lora_requests

    requests = lora_requests(Collection.open(job["collection"]))
    first = len(requests) + 1
    return requests | {n: LoRARequest(n, first + i, path) for i, (n, path) in enumerate(job.get("plain", {}).items())}


def main() -> None:
    jobs = json.load(sys.stdin)
    os.environ.update(VLLM_LOGGING_LEVEL="WARNING", HF_HUB_OFFLINE="1", VLLM_ENABLE_V1_MULTIPROCESSING="0")
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.platforms import current_platform

    from vllm_jdlora.serving import engine_settings

    if GPU_PATH:
        # What a CPU has no kernels for is refused on it; here there are Triton's.
        engine_settings._refuse_8_bits_where_there_are_none = lambda *_: None
        engine_settings._refuse_conflicts = lambda *_: None
    for job in jobs:
        engine = None
        try:
            engine = _engine(job)
            result = globals()[job["kind"]](engine, job | {"requests": _requests(job)})
        except Exception:
            result = {"error": traceback.format_exc()[-3000:]}
        print(f"\n{MARK}{json.dumps(result)}", flush=True)
        del engine
        # Registered once, they stay; vLLM's search for them in a second engine trips over llvmlite's objects.
        type(current_platform).register_triton_kernel_overrides = classmethod(lambda cls: None)
        gc.collect()
        cleanup_dist_env_and_memory()


if __name__ == "__main__":
    main()
