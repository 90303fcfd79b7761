"""The trainer: its loss against Hugging Face's own, learning, and going on after a kill with the same weights."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from tests import tiny_llama, tiny_tokenizer
from vllm_jdlora.adapter import read_adapter
from vllm_jdlora.cli import main
from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.evaluation import train as train_module
from vllm_jdlora.evaluation.tasks import read_task
from vllm_jdlora.evaluation.train import TrainSettings, answer_loss, train
from vllm_jdlora.evaluation.training_data import epoch_order, make_batch, read_examples

SETTINGS = TrainSettings(rank=4, alpha=8, steps=12, batch=4, learning_rate=1e-2, checkpoints=3)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tiny_llama.write_model(tmp_path_factory.mktemp("model") / "tiny-llama")
    return tiny_tokenizer.write_tokenizer(folder)


@pytest.fixture(scope="module")
def tokenizer(model_folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_folder)


@pytest.fixture(scope="module")
def task_file(tmp_path_factory):
    """Forty items whose answer is the input's first letter, thrice."""
    words = [f"{first}{'xyz'[i % 3] * (1 + i % 5)}" for i, first in enumerate("abcdefgh" * 5)]
    file = tmp_path_factory.mktemp("tasks") / "letters.jsonl"
    file.write_text("".join(json.dumps({"instruction": "Say", "input": w, "output": w[0] * 3}) + "\n" for w in words))
    return file


@pytest.fixture(scope="module")
def trained(model_folder, task_file, tmp_path_factory):
    output = tmp_path_factory.mktemp("trained") / "letters"
    return output, train(model_folder, task_file, output, SETTINGS, show_progress=False)


@pytest.fixture(scope="module")
def examples(task_file, tokenizer):
    return read_examples(read_task(task_file.parent, "letters", split="train"), tokenizer, 192)


def plain_loss(model, examples):
    """Hugging Face's loss of whole sequences one by one, prompts masked out, weighted by answer tokens."""
    total, count = 0.0, 0
    for example in examples:
        ids = torch.tensor([example.tokens])
        labels = ids.clone()
        labels[:, : example.answer] = -100
        scored = len(example.tokens) - example.answer
        total = total + model(input_ids=ids, labels=labels).loss * scored
        count += scored
    return total / count


def test_examples_are_prompt_answer_and_end_of_turn(tokenizer, examples):
    assert len(examples) == 32
    tokens, answer = examples[0].tokens, examples[0].answer
    assert tokenizer.decode(tokens[:answer]) == "<|im_start|>user\nSay\nax<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(tokens[answer:]) == "aaa<|im_end|>"


@pytest.mark.parametrize("chosen", [range(5), [7], range(0, 32, 8)])
def test_loss_and_gradients_are_those_of_whole_sequences(model_folder, examples, chosen):
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    batch = make_batch([examples[i] for i in chosen])
    assert batch.prefix.shape[1] >= 10  # "<|im_start|>user\nSay\n"
    weights = [layer.self_attn.k_proj.weight for layer in model.model.layers]
    loss, correct = answer_loss(model, batch)
    got = torch.autograd.grad(loss, weights)
    expected = plain_loss(model, [examples[i] for i in chosen])
    # fp32 sums in another order.
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(got, torch.autograd.grad(expected, weights), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)
    assert 0 <= int(correct) <= len(batch.labels)


def test_an_epoch_has_every_example_once_in_another_order_and_little_padding(examples):
    orders = [epoch_order(examples, 4, 0, epoch) for epoch in range(2)]
    for order in orders:
        assert sorted(i for batch in order for i in batch) == list(range(32))
    assert orders[0] != orders[1] and orders[0] == epoch_order(examples, 4, 0, 0) != epoch_order(examples, 4, 1, 0)
    widths = [{len(examples[i].tokens) for i in batch} for batch in orders[0]]
    assert max(map(len, widths)) <= 2


def test_the_loss_falls(trained):
    metrics = trained[1]
    assert metrics["steps"] == len(metrics["train_losses"]) == 12
    assert metrics["lora_test_loss"] < 0.8 * metrics["base_test_loss"]
    assert sum(metrics["train_losses"][-3:]) < 0.8 * sum(metrics["train_losses"][:3])


def test_the_folder_is_a_peft_adapter_with_the_measured_loss(model_folder, task_file, trained, tokenizer):
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    output, metrics = trained
    adapter = read_adapter(output)
    assert adapter.rank == 4 and adapter.base_model == "tiny-llama" and len(adapter.slices) == 3 * tiny_llama.LAYERS
    assert [f.name for f in output.parent.iterdir()] == ["letters"]
    assert json.loads((output / "train_metrics.json").read_text())["lora_test_loss"] == metrics["lora_test_loss"]
    base = LlamaForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, output).eval()
    test = read_task(task_file.parent, "letters", split="test")
    with torch.no_grad():
        loss = plain_loss(model, read_examples(test, tokenizer, 192))
    # Stored in bf16, measured in fp32.
    assert float(loss) == pytest.approx(metrics["lora_test_loss"], rel=0.02)


class Killed(Exception):
    pass


@pytest.mark.parametrize("at", [3, 4, 11])
def test_a_killed_run_goes_on_to_the_same_weights(model_folder, task_file, trained, tmp_path, monkeypatch, at):
    step = train_module._Run._step

    def dies(self):
        if self._done.step == at:
            raise Killed
        step(self)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(train_module._Run, "_step", dies)
        train(model_folder, task_file, tmp_path / "letters", SETTINGS, save_every=3, show_progress=False)
    assert [f.name for f in tmp_path.iterdir()] == ["letters.training.safetensors"]
    ran = []
    monkeypatch.setattr(train_module._Run, "_step", lambda self: (ran.append(1), step(self)))
    metrics = train(model_folder, task_file, tmp_path / "letters", SETTINGS, save_every=3, show_progress=False)
    assert len(ran) <= 12 - at + 2  # not from the start
    ours, expected = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "letters", trained[0]))
    assert all(torch.equal(ours[key], expected[key]) for key in expected)
    for key in set(metrics) - {"seconds"}:
        assert metrics[key] == trained[1][key]


def test_a_checkpoint_of_other_settings_or_damaged_is_refused(model_folder, task_file, tmp_path, monkeypatch):
    save = train_module._Run._save

    def save_and_die(self):
        save(self)
        raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(train_module._Run, "_save", save_and_die)
        train(model_folder, task_file, tmp_path / "a", SETTINGS, show_progress=False)
    with pytest.raises(JDLoRAError, match="other settings; remove it"):
        train(model_folder, task_file, tmp_path / "a", replace(SETTINGS, steps=9), show_progress=False)
    (tmp_path / "a.training.safetensors").write_bytes(b"none")
    with pytest.raises(JDLoRAError, match="damaged"):
        train(model_folder, task_file, tmp_path / "a", SETTINGS, show_progress=False)


def test_the_best_or_the_last_weights_are_kept(model_folder, tmp_path):
    # What is learnt from the first 80 % is wrong in the rest: the validation loss goes up in the end.
    items = [{"instruction": "Say", "input": "x", "output": "aaa" if i < 32 else "bbb"} for i in range(40)]
    (tmp_path / "turn.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    settings = replace(SETTINGS, checkpoints=6, learning_rate=3e-2)
    metrics = {
        keep: train(
            model_folder, tmp_path / "turn.jsonl", tmp_path / keep, replace(settings, keep=keep), show_progress=False
        )
        for keep in ("best", "last")
    }
    losses = metrics["best"]["validation_losses"]
    assert losses == metrics["last"]["validation_losses"] and [step for step, _ in losses] == [2, 4, 6, 8, 10, 12]
    best = min(losses, key=lambda pair: pair[1])
    assert metrics["best"]["kept_step"] == metrics["best"]["best_step"] == best[0] < 12
    assert metrics["last"]["kept_step"] == 12
    # Validation and test items are alike.
    assert metrics["best"]["lora_test_loss"] == pytest.approx(best[1], rel=1e-4)
    assert metrics["last"]["lora_test_loss"] == pytest.approx(losses[-1][1], rel=1e-4)


@pytest.mark.parametrize(
    ("change", "told"),
    [({"rank": 0}, "rank"), ({"steps": 0}, "steps"), ({"learning_rate": 2}, "learning rate"), ({"keep": "x"}, "keep")],
)
def test_bad_settings_are_refused(change, told):
    with pytest.raises(JDLoRAError, match=told):
        TrainSettings(**change)


def test_the_command_trains_and_refuses_what_exists(model_folder, task_file, tmp_path, capsys):
    command = ["train", str(task_file), "--base-model", str(model_folder), "-o", str(tmp_path / "a")]
    assert main([*command, "--steps", "2", "--rank", "2", "--targets", "q_proj", "--batch", "8"]) == 0
    assert "2 steps (0.5 epochs)" in capsys.readouterr().out
    assert read_adapter(tmp_path / "a").rank == 2
    assert main(command) == 2
    assert "exists already" in capsys.readouterr().err
    assert main([*command[:-1], str(tmp_path / "b"), "--targets", "no_such"]) == 2
    assert "no LoRA on no_such" in capsys.readouterr().err
    assert main([*command[:-1], str(tmp_path / "b"), "--max-tokens", "5"]) == 2
    assert "more than 5 tokens" in capsys.readouterr().err
