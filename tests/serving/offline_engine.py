"""One offline engine in a process of its own: a JSON specification on stdin, the answers as one JSON line on stdout."""

import json
import os
import sys

COMPRESSED = "adapter-0"
MARK = "answers: "
"""Begins the line of the answers; vLLM prints before and after it."""


def as_json(answer) -> dict:
    output = answer.outputs[0]
    pairs = zip(output.token_ids, output.logprobs, strict=True)
    return {"tokens": list(output.token_ids), "logprobs": [found[token].logprob for token, found in pairs]}


def decode_while_an_adapter_is_loaded(engine, spec, params, requests) -> list[dict]:
    """Two requests of one adapter and one of another decode; between two steps a third adapter is loaded, which takes
    a slot from under them."""
    from vllm_jdlora.kernels import cpu_grouped

    cpu_grouped._GATHERED_NUMBERS = 0  # the form that reads Σ from its slot in every step
    for i in spec["interrupted"]:
        prompt = {"prompt_token_ids": spec["prompts"][i]}
        engine.add_request(str(i), prompt, params, lora_request=requests[spec["who"][i]])
    finished = {}
    for step in range(40):
        for output in engine.step():
            if output.finished:
                finished[output.request_id] = output
        if step == 3:
            engine.add_lora(requests[spec["intruder"]])
    return [as_json(finished[str(i)]) for i in spec["interrupted"]]


def decode_while_a_revision_is_loaded(llm, spec, params, before: str, after: str, ids: int, beside=False) -> list[dict]:
    """Requests of one revision decode; between two steps another one is loaded, and requests of it join them."""
    from vllm_jdlora.collection import Collection

    engine = llm.llm_engine
    finished = {}

    def ask(first: int, collection: str, lora_ids_from: int) -> None:
        requests = requests_of(Collection.open(collection), lora_ids_from)
        for i, place in enumerate(spec["interrupted"]):
            prompt = {"prompt_token_ids": spec["prompts"][place]}
            engine.add_request(str(first + i), prompt, params, lora_request=requests[spec["who"][place]])

    ask(0, before, ids)
    for step in range(40):
        for output in engine.step():
            if output.finished:
                finished[output.request_id] = output
        if step == 3:
            load(llm, after, beside)
            ask(len(spec["interrupted"]), after, ids + 1000)
    return [as_json(finished[str(i)]) for i in range(2 * len(spec["interrupted"]))]


def load_bases_beside(llm, spec, params) -> list[list[dict]]:
    """Other bases come while requests of those before them decode, and then the first ones come back in that way."""
    folders = [spec["jdlora"]["collection"], spec["beside"], spec["jdlora"]["collection"]]
    return [
        decode_while_a_revision_is_loaded(llm, spec, params, *folders[i : i + 2], 5000 + 3000 * i, True) for i in (0, 1)
    ]


def load(llm, folder: str, beside: bool = False) -> list[dict]:
    from vllm_jdlora.collection import Collection

    args = (folder, Collection.open(folder).manifest.revision, beside)
    return llm.collective_rpc("jdlora_load_collection", args=args)


def replace_bases(llm, spec, generate) -> dict:
    """Nothing runs. Collections that fit are served, one that does not is refused and changes nothing."""
    from vllm_jdlora.collection import Collection
    from vllm_jdlora.errors import JDLoRAError

    result: dict = {"answers": []}
    for i, folder in enumerate(spec["other_bases"]):
        result["loaded"] = load(llm, folder)
        result["answers"].append(generate(requests_of(Collection.open(folder), 3000 + 100 * i)))
    try:
        load(llm, spec["unfit"])
    except JDLoRAError as error:
        result["refusal"] = str(error)
    result["answers"].append(generate(requests_of(Collection.open(folder), 4000)))
    return result


def requests_of(collection, lora_ids_from: int) -> dict:
    from vllm_jdlora.serving.requests import lora_requests

    return {
        name: type(request)(name, lora_ids_from + request.lora_int_id, request.lora_path)
        for name, request in lora_requests(collection).items()
    }


def main() -> None:
    spec = json.load(sys.stdin)
    options = spec["options"]
    os.environ.update(VLLM_LOGGING_LEVEL="WARNING", HF_HUB_OFFLINE="1")
    if options.get("tensor_parallel_size", 1) == 1:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    else:
        # Two workers on a machine of two cores: one thread each, wherever there is room.
        os.environ.update(VLLM_CPU_OMP_THREADS_BIND="nobind", OMP_NUM_THREADS="1")
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    from vllm_jdlora.collection import Collection
    from vllm_jdlora.serving.requests import lora_requests

    llm = LLM(
        spec["model"],
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=128,
        max_num_seqs=16,
        max_num_batched_tokens=256,
        kv_cache_memory_bytes=64 << 20,
        additional_config={"jdlora": spec["jdlora"]},
        **options,
    )
    requests = lora_requests(Collection.open(spec["jdlora"]["collection"]))
    first = len(requests) + 1
    requests |= {n: LoRARequest(n, first + i, path) for i, (n, path) in enumerate(spec["plain"].items())}
    params = SamplingParams(temperature=0, max_tokens=8, logprobs=1, detokenize=False, ignore_eos=True)

    def generate(requests) -> list[dict]:
        answers = llm.generate(
            [{"prompt_token_ids": p} for p in spec["prompts"]],
            params,
            lora_request=[requests.get(name) for name in spec["who"]],
            use_tqdm=False,
        )
        return [as_json(a) for a in answers]

    result = {"answers": generate(requests), "statistics": llm.collective_rpc("jdlora_statistics")}
    if "intruder" in spec:
        result["interrupted"] = decode_while_an_adapter_is_loaded(llm.llm_engine, spec, params, requests)
    if "unreadable" in spec:
        lost = [LoRARequest(name, 9000 + i, path) for i, (name, path) in enumerate(spec["unreadable"].items())]
        who = [requests[COMPRESSED], *lost, None, requests[COMPRESSED]]
        for key in ("ended", "ended again"):
            prompts = [{"prompt_token_ids": prompt} for prompt in spec["prompts"][: len(who)]]
            outputs = llm.generate(prompts, params, lora_request=who, use_tqdm=False)
            result[key] = [(o.outputs[0].finish_reason, list(o.outputs[0].token_ids)) for o in outputs]
    if "beside" in spec:
        result["beside"] = load_bases_beside(llm, spec, params)
        result["statistics"] = llm.collective_rpc("jdlora_statistics")
    if "revision" in spec:
        served = spec["jdlora"]["collection"]
        result["revisions"] = decode_while_a_revision_is_loaded(llm, spec, params, served, spec["revision"], 1000)
        plain = {name: requests[name] for name in spec["plain"]}
        result["replaced"] = replace_bases(llm, spec, lambda compressed: generate(compressed | plain))
        result["statistics"] = llm.collective_rpc("jdlora_statistics")
    print(f"\n{MARK}{json.dumps(result)}", flush=True)


if __name__ == "__main__":
    main()
