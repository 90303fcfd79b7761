"""Task files: the split, the prompt, and what is wrong in a bad line."""

import json

import pytest

from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.evaluation.tasks import Item, read_task


def write(folder, count, name="t"):
    lines = [{"instruction": "i", "input": str(n), "output": "o"} for n in range(count)]
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.mark.parametrize(("count", "sizes"), [(10, (8, 1, 1)), (814, (651, 81, 82)), (1200, (960, 120, 120))])
def test_splits_are_80_10_10_in_file_order_and_leave_nothing_out(tmp_path, count, sizes):
    write(tmp_path, count)
    parts = [read_task(tmp_path, "t", split=split).items for split in ("train", "validation", "test")]
    assert tuple(map(len, parts)) == sizes
    assert [item.input for part in parts for item in part] == [str(n) for n in range(count)]


def test_a_limit_takes_the_first_items_and_changes_the_digest(tmp_path):
    write(tmp_path, 100)
    whole, part = read_task(tmp_path, "t"), read_task(tmp_path, "t", limit=4)
    assert part.items == whole.items[:4] and part.sha256 != whole.sha256
    assert read_task(tmp_path, "t", limit=10).sha256 == whole.sha256


def test_the_prompt_is_chatml_without_a_system_turn():
    assert Item("Do it.", "this", "x").prompt == "<|im_start|>user\nDo it.\nthis<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not a line of JSON"),
        ("[" * 100_000, "not a line of JSON"),
        ("[1]", "instruction, input and output"),
        ('{"instruction": "a", "input": "b"}', "instruction, input and output"),
        ('{"instruction": "a", "input": 3, "output": "c"}', "instruction, input and output"),
        ('{"instruction": "a", "input": "b", "output": " "}', "the output is empty"),
    ],
)
def test_a_bad_line_is_named_with_its_number(tmp_path, line, reason):
    write(tmp_path, 20)
    with open(tmp_path / "t.jsonl", "a") as file:
        file.write("\n" + line + "\n")
    with pytest.raises(JDLoRAError, match=rf"t.jsonl:22: .*{reason}"):
        read_task(tmp_path, "t")


def test_missing_and_unreadable_files_and_empty_splits_say_what_to_do(tmp_path):
    with pytest.raises(JDLoRAError, match="missing; the task data of adapter 'other' is a file of its name"):
        read_task(tmp_path, "other")
    (tmp_path / "b.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(JDLoRAError, match="cannot be read"):
        read_task(tmp_path, "b")
    write(tmp_path, 5)
    with pytest.raises(JDLoRAError, match="too few for a validation split"):
        read_task(tmp_path, "t", split="validation")
    with pytest.raises(JDLoRAError, match="no split named 'dev'"):
        read_task(tmp_path, "t", split="dev")
