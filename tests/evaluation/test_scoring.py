"""Losses and greedy answers against PEFT, transformers' own loss and transformers' own generate."""

from __future__ import annotations

import random

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests import tiny_llama
from tests.evaluation.tiny_chat import write_chat_model, write_task
from vllm_jdlora.adapter import read_adapter
from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.evaluation import scoring
from vllm_jdlora.evaluation.model import SwitchableModel
from vllm_jdlora.evaluation.scoring import score
from vllm_jdlora.evaluation.tasks import END_OF_TURN, read_task
from vllm_jdlora.evaluation.variant import uncompressed

LIMIT = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("scoring")
    write_chat_model(root / "model")
    for name, seed in (("one", 1), ("two", 2)):
        tiny_llama.write_adapter(root / name, seed)
    write_task(root / "tasks" / "one.jsonl", 1, items=120)
    return root


@pytest.fixture(scope="module")
def model(folder):
    return SwitchableModel.load(folder / "model")


@pytest.fixture(scope="module")
def updates(folder):
    variant = uncompressed([read_adapter(folder / name) for name in ("one", "two")])
    return {name: variant.update(name) for name in ("one", "two")} | {"base": {}}


@pytest.fixture(scope="module")
def texts(model, folder):
    items = read_task(folder / "tasks", "one").items
    return [model.tokens(i.prompt) for i in items], [model.tokens(i.output + END_OF_TURN) for i in items]


@pytest.fixture(scope="module")
def stock(folder):
    """Adapter → transformers' own model with it, by PEFT; merged, as a second opinion on unmerged arithmetic."""
    models = {}
    for name in ("one", "two", "base"):
        plain = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32, attn_implementation="eager")
        models[name] = (
            plain if name == "base" else PeftModel.from_pretrained(plain, folder / name).merge_and_unload()
        ).eval()
    return models


def greedy(stock, model, prompt):
    """What transformers generates, one prompt at a time."""
    ids = torch.tensor([prompt])
    out = stock.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=LIMIT,
        do_sample=False,
        eos_token_id=model.end,
        pad_token_id=model.end,
    )
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("adapter", ["one", "two", "base"])
def test_loss_and_first_choices_are_those_of_transformers(adapter, model, updates, texts, stock):
    model.apply(updates[adapter])
    for found, prompt, target in zip(score(model, *texts, answers=False), *texts, strict=True):
        ids = torch.tensor([prompt + target])
        labels = ids.clone()
        labels[0, : len(prompt)] = -100
        with torch.inference_mode():
            expected = stock[adapter](input_ids=ids, labels=labels)
        # fp32 in another order of summation: a few 1e-7 of losses around 5.
        assert found.loss == pytest.approx(float(expected.loss), rel=1e-5)
        choices = expected.logits[0, len(prompt) - 1 : -1].argmax(-1)
        assert found.correct == int((choices == torch.tensor(target)).sum())
        assert found.tokens == len(target) and found.answer is None


def random_drafts(answers, targets):
    """Right, wrong, cut, lengthened and empty drafts, and some that leave the answer midway."""
    generator = random.Random(0)
    for answer, target in zip(answers, targets, strict=True):
        cut = generator.randrange(len(answer))
        wrong = [*answer[:cut], (answer[cut] + 1) % 250, *answer[cut + 1 :]]
        yield generator.sample([answer, wrong, answer[:cut], [*wrong[: cut + 1], 5], [*answer, 9, 9], target, []], k=3)


@pytest.mark.parametrize("adapter", ["one", "base"])
def test_answers_are_what_plain_greedy_decoding_gives_with_any_drafts(adapter, model, updates, texts, stock):
    prompts, targets = texts
    expected = [greedy(stock[adapter], model, prompt) for prompt in prompts]
    # The reference answer is a draft too. Make some of them right from the start, or for their first tokens.
    targets = [e if i % 3 == 0 else [*e[: i % 5], *t] for i, (e, t) in enumerate(zip(expected, targets, strict=True))]
    model.apply(updates[adapter])
    limits = {"max_new_tokens": LIMIT, "batch_tokens": 200}
    assert [s.answer for s in score(model, prompts, targets, **limits)] == expected
    for drafts in (list(random_drafts(expected, targets)), [[e] for e in expected]):
        assert [s.answer for s in score(model, prompts, targets, drafts, **limits)] == expected


def test_a_right_draft_saves_the_forward_passes(model, updates, texts, monkeypatch):
    prompts, targets = texts
    model.apply(updates["one"])
    answers = [[s.answer] for s in score(model, prompts, targets, max_new_tokens=LIMIT)]
    calls = []
    forward = scoring._forward
    monkeypatch.setattr(scoring, "_forward", lambda *args: calls.append(args) or forward(*args))
    score(model, prompts, targets, answers, max_new_tokens=LIMIT, batch_tokens=10**6)
    assert len(calls) == 3  # the shared prefix, the references, the drafts
    calls.clear()
    score(model, prompts, targets, max_new_tokens=LIMIT, batch_tokens=10**6)
    assert len(calls) > LIMIT


def test_batches_and_other_prompts_do_not_matter(model, updates, texts):
    model.apply(updates["two"])
    prompts, targets = texts
    together = score(model, prompts, targets, max_new_tokens=LIMIT)
    for i in range(0, len(prompts), 5):
        (alone,) = score(model, prompts[i : i + 1], targets[i : i + 1], max_new_tokens=LIMIT)
        assert alone.answer == together[i].answer
        assert alone.loss == pytest.approx(together[i].loss, rel=1e-5)  # fp32, other shapes
    small = score(model, prompts, targets, max_new_tokens=LIMIT, batch_tokens=1)
    assert [s.answer for s in small] == [s.answer for s in together]


def test_prompts_without_a_shared_beginning_and_equal_prompts(model, updates, texts, stock):
    model.apply(updates["one"])
    for prompts in ([[7, 8, 9], [9, 8], [30]], [[7, 8]] * 3):
        found = score(model, prompts, [[4, 5], [6], [model.end]], max_new_tokens=LIMIT)
        assert [s.answer for s in found] == [greedy(stock["one"], model, prompt) for prompt in prompts]


def test_an_adapter_leaves_nothing_behind(model, updates, texts):
    model.apply({})
    before = score(model, *texts, max_new_tokens=LIMIT)
    model.apply(updates["one"])
    assert score(model, *texts, max_new_tokens=LIMIT) != before
    model.apply({})
    assert score(model, *texts, max_new_tokens=LIMIT) == before


def test_the_answer_limit_cuts_and_an_end_token_ends(model, updates, texts):
    model.apply(updates["one"])
    long = score(model, *texts, max_new_tokens=LIMIT)
    short = score(model, *texts, max_new_tokens=5)
    assert [s.answer for s in short] == [s.answer[:5] for s in long]
    assert all(model.end not in s.answer[:-1] for s in long)


def test_an_adapter_of_another_model_is_refused(model, updates):
    name = "model.layers.0.self_attn.q_proj"
    b, a = updates["one"][name]
    with pytest.raises(JDLoRAError, match="no such linear module"):
        model.apply({"model.layers.9.self_attn.q_proj": (b, a)})
    with pytest.raises(JDLoRAError, match=r"adapter is \[128, 63\]"):
        model.apply({name: (b, a[:, :-1])})


def test_a_model_that_scales_its_logits_is_refused(folder, stock):
    scaled = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    forward = scaled.forward

    def halved(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits / 2
        return output

    scaled.forward = halved
    with pytest.raises(JDLoRAError, match="this architecture"):
        SwitchableModel(scaled, AutoTokenizer.from_pretrained(folder / "model"))


def test_bf16_is_close_to_fp32(folder, model, updates, texts):
    half = SwitchableModel.load(folder / "model", dtype="bf16")
    assert half.fingerprint != model.fingerprint
    for each in (half, model):
        each.apply(updates["one"])
    rough, exact = score(half, *texts, answers=False), score(model, *texts, answers=False)
    # bf16 keeps 8 bits: two layers leave about 1 % in logits of size 5.
    assert [s.loss for s in rough] == pytest.approx([s.loss for s in exact], abs=0.2)


def test_a_tokenizer_without_chat_markup_is_refused(folder, tmp_path):
    from tests.tiny_tokenizer import write_tokenizer

    plain = AutoTokenizer.from_pretrained(write_tokenizer(tmp_path / "plain", chat=False))
    with pytest.raises(JDLoRAError, match="im_end"):
        SwitchableModel(AutoModelForCausalLM.from_pretrained(folder / "model"), plain)
