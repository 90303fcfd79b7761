"""Distillation of Σ: against divergences computed from merged weights, and on collections as users have them."""

import gc
import json
import shutil
import weakref
from dataclasses import replace

import pytest
import torch

from tests import tiny_llama, tiny_tokenizer
from tests.collection.measured import moments_that_shun, stored_error
from vllm_jdlora.adapter import read_adapters
from vllm_jdlora.cli import main
from vllm_jdlora.collection import Collection
from vllm_jdlora.collection.build import compress
from vllm_jdlora.collection.schema import BaseModel
from vllm_jdlora.collection.second_moments import Origin, SecondMoments
from vllm_jdlora.evaluation import distillation
from vllm_jdlora.evaluation.distil_collection import on_own_activations
from vllm_jdlora.evaluation.distillation import DistillationSettings, Distilled, Distiller
from vllm_jdlora.evaluation.scored_logits import scored_logits
from vllm_jdlora.evaluation.tasks import read_task
from vllm_jdlora.evaluation.training_data import make_batch, read_examples

SETTINGS = DistillationSettings(steps=15, batch=4, learning_rate=0.1)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny model, three adapters strong enough to change its answers, their data, and a poor collection of them."""
    root = tmp_path_factory.mktemp("distillation")
    tiny_tokenizer.write_tokenizer(tiny_llama.write_model(root / "model"))
    (root / "data").mkdir()
    for i, name in enumerate("abc"):
        tiny_llama.write_adapter(root / "adapters" / name, i, targets=["q_proj", "v_proj"])
        lines = [
            {"instruction": "Say", "input": f"{'xyz'[j % 3] * (1 + j % 4)}{name}", "output": "xyz"[j % 3] * 2}
            for j in range(30)
        ]
        (root / "data" / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    adapters, _ = read_adapters([root / "adapters"])
    compress(adapters, root / "c", rank=4, clusters=1, dtype="fp32")
    return root


def merged(model_folder, delta):
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    for name, (b, a) in delta.items():
        model.get_submodule(name).weight.data += b @ a
    return model


def divergence(teacher, student, examples):
    """Mean KL over answer tokens, one example at a time."""
    total, count = 0.0, 0
    with torch.no_grad():
        for example in examples:
            ids = torch.tensor([example.tokens])
            p, q = (m(input_ids=ids).logits[0, example.answer - 1 : -1].log_softmax(-1) for m in (teacher, student))
            total += float((p.exp() * (p - q)).sum())
            count += len(p)
    return total / count


@pytest.fixture(scope="module")
def parts(world):
    """What the distiller gets for adapter b."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(world / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    adapter = next(a for a in read_adapters([world / "adapters"])[0] if a.name == "b")
    original = {name: adapter.factors(name) for name in adapter.slices}
    collection = Collection.open(world / "c")
    sigma = dict(
        zip([s.name for s in collection.manifest.slices], collection.sigma(collection.index_of("b")), strict=True)
    )
    bases = {name: tuple(side[0] for side in collection.basis(name)) for name in sigma}
    examples = read_examples(read_task(world / "data", "b", split="train"), tokenizer, 192)
    return model, original, bases, sigma, examples


def test_the_divergences_reported_are_those_of_merged_weights_and_fall(world, parts):
    model, original, bases, sigma, examples = parts
    settings = replace(SETTINGS, examples=16, validation=8)
    found = Distiller(model).distil(original, bases, sigma, examples, settings)
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(0)).tolist()[:24]
    held = [examples[i] for i in order[:6]]  # a quarter at most is held out
    teacher = merged(world / "model", original)
    for scalings, reported in ((sigma, found.before), (found.sigma, found.after)):
        student = merged(world / "model", {n: (bases[n][0] @ scalings[n], bases[n][1]) for n in sigma})
        # fp32 rounding of logits of order ten, through another order of sums
        assert reported == pytest.approx(divergence(teacher, student, held), rel=1e-3, abs=1e-6)
    assert found.after < 0.8 * found.before


def test_lengths_of_batches_recur_and_say_the_same(parts):
    model, *_, examples = parts
    for chosen in (examples[:1], examples[:3], examples[3:10]):
        batch = make_batch(chosen)
        rounded = distillation._in_steps(batch)
        assert rounded.prefix.shape[1] % 8 == 0 and rounded.ids.shape[1] % 8 == 0
        # The same sums in products of other shapes: fp32 rounding of logits of order ten.
        torch.testing.assert_close(scored_logits(model, rounded), scored_logits(model, batch), rtol=1e-4, atol=1e-4)


def test_scalings_stay_where_nothing_is_gained(parts):
    model, original, bases, sigma, examples = parts
    found = Distiller(model).distil(original, bases, sigma, examples, replace(SETTINGS, learning_rate=1e3))
    assert found.after == found.before
    assert all(torch.equal(found.sigma[name], sigma[name]) for name in sigma)


def test_adapters_that_are_close_enough_are_left_alone(parts):
    model, original, bases, sigma, examples = parts
    few = replace(SETTINGS, examples=16, validation=8)
    before = Distiller(model).distil(original, bases, sigma, examples, few).before
    an_answer = 3 * before  # "xx" and the end of the turn: three tokens each
    found = Distiller(model).distil(
        original, bases, sigma, examples, replace(few, enough=an_answer * 1.01), lambda: pytest.fail("refitted")
    )
    assert found.after == found.before == before > 0
    assert all(torch.equal(found.sigma[name], sigma[name]) for name in sigma)
    asked = []
    found = Distiller(model).distil(
        original, bases, sigma, examples, replace(few, enough=an_answer * 0.99), lambda: asked.append(1) or sigma
    )
    assert asked and found.after < before


def test_scalings_refitted_on_own_activations_have_the_least_output_error_on_them(parts):
    _, original, bases, sigma, _ = parts
    name = next(iter(sigma))
    (u, v), (b, a) = bases[name], original[name]
    x = torch.randn(500, v.shape[1], generator=torch.Generator().manual_seed(1)).double()
    x = x * torch.logspace(0, -1, v.shape[1])
    moment = x.T @ x / 500
    origin = Origin(BaseModel("tiny"), "0" * 64, texts=1, tokens=500, max_tokens=500, dtype="fp32")
    own = SecondMoments(origin, {name: name}, {name: moment.float()})
    found = on_own_activations({name: (b, a)}, {name: (u, v)}, own, "full")[name].double()
    # Least squares over the entries of Σ, with the metric's ridge as further inputs.
    ridge = (1e-3 * moment.diagonal().mean()).sqrt() * torch.eye(v.shape[1]).double()
    inputs = torch.cat([x / 500**0.5, ridge])
    seen = inputs @ v.double().T
    best = torch.linalg.lstsq(seen, inputs @ a.double().T @ b.double().T @ u.double()).solution.T
    assert torch.allclose(found, best, atol=1e-4 * float(best.abs().max()))  # u is orthonormal to fp32 rounding


def command(world, output, *more):
    arguments = ["distill", str(world / "c"), "-o", str(output), "--base-model", str(world / "model")]
    arguments += ["--adapters", str(world / "adapters"), "--data", str(world / "data")]
    return main([*arguments, "--steps", "6", "--dtype", "fp32", "--enough", "0", *more])


def test_the_command_writes_a_collection_with_the_same_bases_and_honest_errors(world, tmp_path, capsys):
    assert command(world, tmp_path / "d", "--json") == 0
    results = json.loads(capsys.readouterr().out)
    assert sum(r["after"] for r in results) < sum(r["before"] for r in results)
    old, new = Collection.open(world / "c"), Collection.open(tmp_path / "d")
    for part in old.manifest.slices:
        assert all(torch.equal(x, y) for x, y in zip(old.basis(part.name), new.basis(part.name), strict=True))
    adapter = next(a for a in read_adapters([world / "adapters"])[0] if a.name == "b")
    row, lost, energy = new.index_of("b"), 0.0, 0.0
    for i, part in enumerate(new.manifest.slices):
        (b, a), (u, v) = adapter.factors(part.name), new.basis(part.name)
        delta = b.double() @ a.double()
        lost += float((delta - u[0].double() @ new.sigma(row)[i].double() @ v[0].double()).square().sum())
        energy += float(delta.square().sum())
    assert new.manifest.adapters[row].relative_error == pytest.approx((lost / energy) ** 0.5, rel=1e-6)
    assert not list(tmp_path.glob("*.distilling*"))


def test_a_refit_without_any_divergence_is_told_as_one(world, tmp_path, capsys, monkeypatch):
    """Zero is a divergence, and not one that is missing."""

    def lossless(self, adapter, bases, sigma, *more):
        return Distilled(dict(sigma), before=0.3, after=0.0, refitted=0.0)

    monkeypatch.setattr(Distiller, "distil", lossless)
    assert command(world, tmp_path / "d", "--json") == 0
    assert [r["refitted"] for r in json.loads(capsys.readouterr().out)] == [0.0, 0.0, 0.0]


def test_errors_of_outputs_are_stated_anew_in_the_collections_own_metric(world, tmp_path):
    moments = moments_that_shun(world / "adapters" / "a")
    moments.save(tmp_path / "moments.safetensors")
    adapters, _ = read_adapters([world / "adapters"])
    compress(adapters, tmp_path / "c", rank=4, clusters=1, dtype="fp32", moments=moments)
    shutil.copytree(world / "model", tmp_path / "model")
    for name in ("adapters", "data"):
        shutil.copytree(world / name, tmp_path / name)
    assert command(tmp_path, tmp_path / "none") == 2  # without its moments
    assert command(tmp_path, tmp_path / "d", "--moments", str(tmp_path / "moments.safetensors")) == 0
    new = Collection.open(tmp_path / "d")
    for entry in new.manifest.adapters:
        source = world / "adapters" / entry.name
        # fp32 Σ and bases, the reference rounds ΔW to fp32
        assert entry.output_error == pytest.approx(stored_error(new.path, entry.name, source, moments), rel=1e-5)
        assert entry.relative_error == pytest.approx(stored_error(new.path, entry.name, source), rel=1e-5)
    assert new.slice_output_errors().isfinite().all()
    assert new.manifest.error_reached is None  # that was the fit's


def test_what_an_adapter_took_is_free_when_it_is_done(parts):
    """No graph, cache of keys and values or answers of one adapter outlives it, nor waits for the cycle collector."""
    model, original, bases, sigma, examples = parts
    distiller = Distiller(model)
    alive = []
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            distiller.distil(original, bases, sigma, examples, replace(SETTINGS, steps=3))
            alive.append(sum(type(thing) is torch.Tensor for thing in gc.get_objects()))
    finally:
        gc.enable()
    assert alive[0] == alive[1] == alive[2]


def test_while_the_scalings_are_trained_no_answers_to_the_held_out_examples_are_kept(parts, monkeypatch):
    model, original, bases, sigma, examples = parts
    distiller, answers, left = Distiller(model), [], []
    run, divergence_of = distiller._run, distillation._divergence

    def watched(*args):
        found = run(*args)
        answers.append(weakref.ref(found))
        return found

    def watching(teacher, student):
        if student.requires_grad:
            left.append(sum(ref() is not None for ref in answers))
        return divergence_of(teacher, student)

    monkeypatch.setattr(distiller, "_run", watched)
    monkeypatch.setattr(distillation, "_divergence", watching)
    distiller.distil(original, bases, sigma, examples, replace(SETTINGS, steps=3))
    assert left == [2, 2, 2]  # the two answers of the step itself


def test_a_run_that_was_stopped_goes_on(world, tmp_path, monkeypatch):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert command(world, whole) == 0
    distil, calls = Distiller.distil, []

    def stopping(self, *args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return distil(self, *args)

    monkeypatch.setattr(Distiller, "distil", stopping)
    assert command(world, resumed) == 130
    assert not resumed.exists()
    assert command(world, resumed) == 0
    assert len(calls) == 4  # two before the stop, the one that was stopped, and once more
    assert Collection.open(whole).manifest.revision == Collection.open(resumed).manifest.revision


def test_other_adapters_than_those_compressed_are_refused(world, tmp_path, capsys):
    tiny_llama.write_adapter(tmp_path / "adapters" / "a", 7, targets=["q_proj", "v_proj"])
    arguments = ["distill", str(world / "c"), "-o", str(tmp_path / "d"), "--base-model", str(world / "model")]
    assert main([*arguments, "--adapters", str(tmp_path / "adapters"), "--data", str(world / "data")]) == 2
    assert "was changed since it was compressed" in capsys.readouterr().err
