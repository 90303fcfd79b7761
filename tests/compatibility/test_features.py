"""vLLM's features with compressed adapters: one engine for most of them, each compared with merged weights."""

import json
import re
from pathlib import Path

import pytest
import torch

from tests import reference, tiny_models, tiny_tokenizer
from tests.compatibility import engines
from tests.compatibility.test_architectures import TOLERANCE, deltas
from vllm_jdlora.adapter import read_adapter
from vllm_jdlora.cli import main
from vllm_jdlora.collection.build import compress

pytestmark = pytest.mark.server

NAMES = ["first", "second", "third"]
FIRST, SECOND = NAMES[:2]
WHO = [FIRST, SECOND, None]
PROMPT = [(5 * i) % 90 + 2 for i in range(20)]  # printable: text is compared too
LONG = [(11 * i) % 250 + 2 for i in range(150)]  # in chunks: the engine takes 64 tokens a step
CACHED = [(3 * i) % 250 + 2 for i in range(3 * engines.BLOCK + 5)]
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "mood": {"enum": ["good", "bad"]}},
    "required": ["ok", "mood"],
    "additionalProperties": False,
}
PATTERN = "[a-f]{4}(x|yz)"
CHOICES = ["apple", "banana", "cherry"]
# Loops are what prompts propose: a drafter that looks n-grams up finds them.
REPEATING = [[40 + i for i in (0, 1, 2, 3)] * 6, [90, 17, 33] * 8, PROMPT]
SPECULATIVE = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict:
    """A model with a tokenizer, and three adapters of one cluster."""
    root = tmp_path_factory.mktemp("features")
    model = tiny_tokenizer.write_tokenizer(tiny_models.write_model(root / "model", "llama"), chat=False)
    folders = [tiny_models.write_adapter(root / name, model, seed) for seed, name in enumerate(NAMES)]
    collection = compress([read_adapter(f) for f in folders], root / "collection", rank=8, clusters=1, dtype="fp32")
    return {"model": str(model), "collection": str(collection.path)}


@pytest.fixture(scope="module")
def results(files) -> tuple[dict, dict, dict]:
    """Of the engine for features, of one that speculates, and of one for embeddings."""
    return tuple(
        engines.run(
            files
            | {
                "kind": "features",
                "two": [FIRST, SECOND],
                "prompt": PROMPT,
                "long": LONG,
                "cached": CACHED,
                "structured": {"json": SCHEMA, "regex": PATTERN, "choice": CHOICES},
                "options": {
                    "skip_tokenizer_init": False,
                    "enable_prefix_caching": True,
                    "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
                },
            },
            files
            | {
                "kind": "speculative",
                "prompts": REPEATING,
                "who": [FIRST, SECOND, None],
                "options": {"speculative_config": SPECULATIVE, "disable_log_stats": False},
            },
            files
            | {
                "kind": "embeddings",
                "prompts": [PROMPT, LONG[:40], PROMPT],
                "who": [FIRST, SECOND, None],
                "options": {"runner": "pooling", "skip_tokenizer_init": False, "max_num_batched_tokens": 192},
            },
        )
    )


@pytest.fixture(scope="module")
def served(results) -> dict:
    return engines.answered(results[0])


@pytest.fixture(scope="module")
def model(files):
    return tiny_models.read_model(files["model"])


def check(model, files, name, prompt, answer) -> None:
    with reference.merged(model, deltas(files, name)) as merged:
        reference.check_greedy(merged, prompt, answer["tokens"], answer["logprobs"], TOLERANCE)


@torch.no_grad()
def logprobs_of(model, files, name, tokens) -> torch.Tensor:
    """[tokens, vocabulary]: of what follows each token."""
    with reference.merged(model, deltas(files, name)) as merged:
        return merged(torch.tensor([tokens])).logits[0].float().log_softmax(-1)


def test_prompts_that_are_prefilled_in_chunks_equal_merged_weights(served, model, files):
    for name, prompt, answer in zip(WHO, [LONG, PROMPT, LONG], served["chunked"], strict=True):
        check(model, files, name, prompt, answer)


def test_cached_prefixes_are_reused_by_their_own_adapter_alone(served, model, files):
    """All adapters lie in one cluster, so that their requests differ in nothing but Σ."""
    for name, answer in zip([FIRST, SECOND, None, FIRST], served["prefix"], strict=True):
        check(model, files, name, CACHED, answer)
    assert [answer["cached"] for answer in served["prefix"]] == [0, 0, 0, 3 * engines.BLOCK]


def test_structured_output_is_the_best_that_the_constraint_allows(served, model, files):
    texts = {kind: [answer["text"] for answer in answers] for kind, answers in served["structured"].items()}
    for text in texts["json"]:
        found = json.loads(text)
        assert isinstance(found["ok"], bool) and found["mood"] in ("good", "bad")
    assert all(re.fullmatch(PATTERN, text) for text in texts["regex"])
    assert all(text in CHOICES for text in texts["choice"])
    # What the adapter makes of it: among the tokens that the pattern allows, the one that merged weights prefer.
    allowed = set(token_ids(files, "abcdef"))
    for name, answer in zip(WHO, served["structured"]["regex"], strict=True):
        tokens = answer["tokens"]
        found = logprobs_of(model, files, name, [*PROMPT, *tokens])
        for place, token in enumerate(tokens[:4]):
            row = found[len(PROMPT) - 1 + place]
            assert token in allowed and row[token] >= max(row[t] for t in allowed) - TOLERANCE
    first_letters = {choice[0]: choice for choice in CHOICES}
    ids = dict(zip(first_letters, token_ids(files, "".join(first_letters)), strict=True))
    for name, answer in zip(WHO, served["structured"]["choice"], strict=True):
        row = logprobs_of(model, files, name, PROMPT)[-1]
        best = max(first_letters, key=lambda letter: row[ids[letter]].item())
        assert answer["text"] == first_letters[best]


def token_ids(files, text: str) -> list[int]:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(files["model"])(text, add_special_tokens=False)["input_ids"]


def test_logprobs_of_answers_and_prompts_equal_merged_weights(served, model, files):
    for name, answer in zip([FIRST, SECOND], served["logprobs"], strict=True):
        found = logprobs_of(model, files, name, [*PROMPT, *answer["tokens"]])
        for place, best in enumerate(answer["best"]):
            row = found[len(PROMPT) - 1 + place]
            assert len(best) >= 5
            assert max(abs(row[int(token)] - value) for token, value in best.items()) <= TOLERANCE
            assert min(best.values()) >= row.topk(5).values[-1] - TOLERANCE
        assert answer["prompt"][0] is None and len(answer["prompt"]) == len(PROMPT)
        for place, known in enumerate(answer["prompt"][1:]):
            assert str(PROMPT[place + 1]) in known
            assert max(abs(found[place][int(token)] - value) for token, value in known.items()) <= TOLERANCE


def test_several_samples_of_a_prompt_have_the_merged_weights_logprobs(served, model, files):
    for name, answer in zip([FIRST, None], served["samples"], strict=True):
        samples = answer["samples"]
        assert len({tuple(sample["tokens"]) for sample in samples}) == 3
        for sample in samples:
            found = logprobs_of(model, files, name, [*PROMPT, *sample["tokens"]])[len(PROMPT) - 1 : -1]
            expected = found[torch.arange(len(sample["tokens"])), torch.tensor(sample["tokens"])]
            assert (expected - torch.tensor(sample["logprobs"])).abs().max() <= TOLERANCE


def test_beams_have_the_merged_weights_logprobs_and_are_no_worse_than_greedy(served, model, files):
    for name, beams in zip([FIRST, SECOND], served["beams"], strict=True):
        assert len(beams) == 3
        for beam in beams:
            found = logprobs_of(model, files, name, [*PROMPT, *beam["tokens"]])[len(PROMPT) - 1 : -1]
            expected = found[torch.arange(len(beam["tokens"])), torch.tensor(beam["tokens"])].sum()
            assert abs(expected - beam["logprob"]) <= len(beam["tokens"]) * TOLERANCE
        greedy = served["logprobs"][[FIRST, SECOND].index(name)]
        assert beams[0]["logprob"] >= sum(greedy["logprobs"][:5]) - 5 * TOLERANCE


def test_answers_with_drafted_tokens_equal_merged_weights(results, model, files):
    speculated = engines.answered(results[1])
    for name, prompt, answer in zip(WHO, REPEATING, speculated["answers"], strict=True):
        check(model, files, name, prompt, answer)
    assert speculated["accepted"] > 0


def test_embeddings_equal_those_of_merged_weights(results, model, files):
    embedded = engines.answered(results[2])["embeddings"]
    for name, prompt, embedding in zip(WHO, [PROMPT, LONG[:40], PROMPT], embedded, strict=True):
        with torch.no_grad(), reference.merged(model, deltas(files, name)) as merged:
            state = merged.model(torch.tensor([prompt])).last_hidden_state[0, -1]
        assert (torch.nn.functional.normalize(state, dim=0) - torch.tensor(embedding)).abs().max() <= TOLERANCE
    assert embedded[0] != embedded[2]


def test_a_seed_draws_the_same_answer_whoever_is_beside_it(served):
    once, other, again = served["seeded"]
    assert once["tokens"] == again["tokens"] != other["tokens"]


def test_the_plan_counts_the_bytes_that_the_worker_allocates(served, files, capsys):
    command = ["plan", files["collection"], "--base-model", files["model"], "--device", "cpu", "--dtype", "fp32"]
    capsys.readouterr()
    assert main([*command, "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)["choices"][0]["bytes"]["device"]
    allocated = served["bytes"]
    assert (planned["bases"], planned["plain_slots"]) == (allocated["bases"], allocated["plain_slots"])
    assert planned["each_adapter"] * allocated["slots"] == allocated["scalings"]
    assert allocated["slots"] == len(NAMES) + 1  # and the identity
    assert planned["total"] == sum(allocated[part] for part in ("bases", "plain_slots", "scalings"))


@pytest.fixture(scope="module", params=["none", "fp8"])
def scarce(request, files, tmp_path_factory) -> dict:
    """Of two workers of tensor parallelism, with room for one of two clusters and two of four adapters.

    Bases of 8 bits stay so: this is a CPU.
    """
    root = tmp_path_factory.mktemp("scarce")
    model = Path(files["model"])
    names = [*NAMES, "fourth"]
    folders = [tiny_models.write_adapter(root / name, model, seed) for seed, name in enumerate(names)]
    adapters = [read_adapter(folder) for folder in folders]
    out = root / "collection"
    collection = str(compress(adapters, out, rank=8, clusters=2, dtype="fp32", quantize=request.param).path)
    jdlora = {"collection": collection, "base_slots": 1, "scaling_slots": 2}
    options = {"tensor_parallel_size": 2, "additional_config": {"jdlora": jdlora}}
    job = {"kind": "greedy_and_bytes", "prompts": [PROMPT, LONG, PROMPT, LONG[:9], PROMPT], "who": [*names, None]}
    job |= {"collection": collection, "options": options}
    if request.param != "none":
        job["unfit"] = files["collection"]
    # Two workers on a machine of two cores: one thread each, wherever there is room.
    env = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    (result,) = engines.run(files | job, env=env)
    return files | job | engines.answered(result)


def test_the_plan_counts_scarce_slots_and_one_rank_of_tensor_parallelism(scarce, capsys):
    flags = ["--device=cpu", "--dtype=fp32", "--tensor-parallel-size=2", "--jd-base-slots=1", "--jd-scaling-slots=2"]
    capsys.readouterr()
    assert main(["plan", scarce["collection"], "--base-model", scarce["model"], *flags, "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)["choices"][0]["bytes"]["device"]
    allocated = scarce["bytes"]
    assert (planned["bases"], planned["plain_slots"]) == (allocated["bases"], allocated["plain_slots"])
    assert planned["total"] == sum(allocated[part] for part in ("bases", "plain_slots", "scalings"))


def test_answers_with_scarce_slots_equal_merged_weights(scarce, model):
    for name, prompt, answer in zip(scarce["who"], scarce["prompts"], scarce["answers"], strict=True):
        check(model, scarce, name, prompt, answer)


def test_a_server_with_bases_of_8_bits_says_how_to_serve_others(scarce):
    if "unfit" not in scarce:
        pytest.skip("bases of 16 bits take the place of any")
    assert "are not quantised and this server has buffers for fp8" in scarce["refusal"]
    assert "--jd-base-bits 16 takes every kind" in scarce["refusal"]
