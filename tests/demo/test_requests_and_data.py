"""What the demo ships and asks: adapters with cards, requests that fit them, and the format they were trained on."""

import json
from pathlib import Path

import pytest

from vllm_jdlora.adapter import read_adapters
from vllm_jdlora.demo import uncompressed
from vllm_jdlora.demo.requests import ChatRequest, read_requests
from vllm_jdlora.demo.run import DATA
from vllm_jdlora.errors import JDLoRAError

CHAT = [{"role": "user", "content": "Do this.\nthat"}]


def render(messages, **options) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    template = (DATA / "chat_template.jinja").read_text()
    return render_jinja_template([messages], chat_template=template, **options)[0][0]


def test_the_chat_template_makes_the_prompt_that_the_adapters_were_trained_on():
    # As training wrote it: no system turn, instruction and input on two lines.
    expected = "<|im_start|>user\nDo this.\nthat<|im_end|>\n<|im_start|>assistant\n"
    assert render(CHAT, add_generation_prompt=True) == expected


def test_a_system_turn_is_kept_when_there_is_one():
    text = render([{"role": "system", "content": "Be brief."}, *CHAT], add_generation_prompt=False)
    assert text == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nDo this.\nthat<|im_end|>\n"


def test_each_of_the_eight_adapters_has_a_card_with_licence_and_losses():
    adapters, _ = read_adapters([DATA / "adapters"])
    assert len(adapters) == 8
    for adapter in adapters:
        card = (adapter.path / "README.md").read_text()
        assert "Licence of the data" in card and "test loss" in card, adapter.name
        assert {p.name for p in adapter.path.iterdir()} == {
            "adapter_config.json",
            "adapter_model.safetensors",
            "README.md",
        }


def test_the_shipped_requests_are_for_three_adapters_and_the_base_model():
    names = [a.name for a in read_adapters([DATA / "adapters"])[0]]
    requests = read_requests(DATA / "requests.json", names)
    assert [r.adapter is None for r in requests] == [False, False, False, True]
    for request in requests[:3]:
        card = (DATA / "adapters" / request.adapter / "README.md").read_text()
        assert request.messages[0]["content"].splitlines()[0] in card  # the instruction it was trained with


def test_other_adapters_get_the_base_models_question():
    requests = read_requests(DATA / "requests.json", ["d", "c", "b", "a"])
    assert [r.adapter for r in requests] == ["a", "b", "c", None]
    assert len({r.messages[0]["content"] for r in requests}) == 1


@pytest.mark.parametrize("text", ["", "{}", '[{"adapter": "a"}]', "[]"])
def test_a_request_file_that_cannot_be_used_is_named(tmp_path, text):
    file = tmp_path / "requests.json"
    file.write_text(text)
    with pytest.raises(JDLoRAError, match=r"requests\.json"):
        read_requests(file, ["a"])


def test_an_adapter_is_asked_as_the_model():
    request = ChatRequest("mine", tuple(CHAT), 8)
    assert request.body("base")["model"] == "mine"
    assert ChatRequest(None, tuple(CHAT), 8).body("base")["model"] == "base"


@pytest.fixture
def counted(monkeypatch, tmp_path):
    """Folders with the files that answers are keyed by, and a generator that counts what it is asked."""
    asked: list[str | None] = []

    def generate(base, adapters, requests, template) -> list[str]:
        asked.extend(r.adapter for r in requests)
        return [f"answer of {r.adapter}" for r in requests]

    monkeypatch.setattr(uncompressed, "_generate", generate)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "conversion.json").write_text("{}")
    (tmp_path / "template").write_text("t")
    adapter = tmp_path / "adapters" / "a"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text(json.dumps({}))
    (adapter / "adapter_model.safetensors").write_bytes(b"1")
    return tmp_path, asked


def answers(folder: Path) -> list[str]:
    requests = [ChatRequest("a", tuple(CHAT), 8), ChatRequest(None, tuple(CHAT), 8)]
    return uncompressed.uncompressed_answers(
        folder / "base", folder / "adapters", requests, folder / "template", folder / "cache" / "answers.json"
    )


def test_answers_are_generated_once(counted):
    folder, asked = counted
    assert answers(folder) == answers(folder) == ["answer of a", "answer of None"]
    assert asked == ["a", None]


def test_an_adapter_that_changed_is_asked_again_and_only_that(counted):
    folder, asked = counted
    answers(folder)
    (folder / "adapters" / "a" / "adapter_model.safetensors").write_bytes(b"2")
    answers(folder)
    assert asked == ["a", None, "a"]


def test_a_damaged_answer_cache_is_made_again(counted):
    folder, asked = counted
    answers(folder)
    (folder / "cache" / "answers.json").write_text("{broken")
    answers(folder)
    assert asked == ["a", None, "a", None]
