"""`jdlora plan` as a user meets it: exact bytes, errors that the compression keeps, a command that can be run."""

import argparse
import json
import re
import shlex

import pytest

from tests import tiny_llama, tiny_models
from tests.collection.families import write_member
from vllm_jdlora.cli import main
from vllm_jdlora.collection import Collection
from vllm_jdlora.commands.byte_budget import byte_budget, size_in_bytes
from vllm_jdlora.jd import error_curves


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    root = tmp_path_factory.mktemp("plan")
    for i in range(6):
        tiny_llama.write_adapter(root / "my adapters" / f"a{i}", i, targets=["q_proj", "v_proj"])
    return root / "my adapters"


@pytest.fixture(autouse=True)
def few_measurements(monkeypatch):
    monkeypatch.setattr(error_curves, "_CLUSTERS", (1, 2))


def planned(capsys, *arguments) -> dict:
    assert main(["plan", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def one_error_line(capsys) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("jdlora: ")]
    assert len(lines) == 1
    return lines[0]


def test_the_recommended_command_gives_the_bytes_and_errors_that_were_promised(adapters, tmp_path, capsys):
    facts = planned(capsys, adapters, "--max-bytes", "90%", "--device-memory", "1MiB", "--adapters-expected", "60")
    best = facts["recommended"]
    command = [str(tmp_path / "c") if part == "COLLECTION" else part for part in shlex.split(best["command"])]
    assert command[0] == "jdlora" and main(command[1:]) == 0
    collection = Collection.open(tmp_path / "c")
    capsys.readouterr()
    stored = []
    for part in collection.manifest.slices:
        stored += collection.basis(part.name)
    stored += [collection.sigma(i) for i in range(6)]
    disk = best["bytes"]["disk"]
    assert disk["total"] == sum(t.numel() * t.element_size() for t in stored) == best["total_bytes"]
    assert disk["each_adapter"] == stored[-1].numel() * 2 and best["bytes"]["host"] == 6 * disk["each_adapter"]
    files = [f.stat().st_size for f in (tmp_path / "c").glob("*.safetensors")]
    assert disk["total"] <= sum(files) <= disk["total"] + 4096 * len(files)  # and headers
    assert best["total_bytes"] <= 0.9 * facts["bytes"]["adapters"]
    # All slices are probes here; one sweep from the leading columns is a little worse than the fit of that rank.
    errors = [a.relative_error for a in collection.manifest.adapters]
    assert sum(errors) / 6 == pytest.approx(best["relative_error"]["mean"], rel=0.1, abs=0.01)
    assert best["method"] == collection.manifest.method == "diag"  # strangers: nothing that Σ [R, R] could use

    made = planned(capsys, tmp_path / "c", "--device-memory", "1MiB", "--adapters-expected", "60")["choices"][0]
    assert {key: made[key] for key in ("rank", "clusters", "bytes", "fit", "expected")} == {
        key: best[key] for key in ("rank", "clusters", "bytes", "fit", "expected")
    }
    assert main(["plan", str(tmp_path / "c")]) == 0
    assert "of the values as stored" in capsys.readouterr().out


def test_a_choice_for_an_error_is_certified(adapters, capsys):
    best = planned(capsys, adapters, "--max-error", "0.9")["recommended"]
    assert best["method"] == "full"
    assert best["bounds"]["lower"] <= best["bounds"]["predicted"] <= best["bounds"]["upper"]


def test_traffic_is_predicted_for_the_recommended_size_and_for_a_collection(adapters, tmp_path, capsys):
    facts = planned(capsys, adapters, "--max-error", "0.9", "--traffic")
    steps, best = facts["traffic"]["steps"], facts["recommended"]
    assert (facts["traffic"]["rank"], facts["traffic"]["clusters"]) == (best["rank"], best["clusters"])
    assert facts["traffic"]["gpu"] == "H100" and "shapes" not in facts
    assert steps[-1]["plain"]["bytes"] > steps[-1]["compressed"]["bytes"] > 0
    assert "traffic" not in planned(capsys, adapters)
    assert main(["compress", str(adapters), "-o", str(tmp_path / "c"), "--rank", "4", "--clusters", "1"]) == 0
    capsys.readouterr()
    assert main(["plan", str(tmp_path / "c"), "--traffic", "A100"]) == 0
    shown = capsys.readouterr().out
    assert "on A100, predicted, not measured" in shown and "1 clusters of rank 4" in shown


def test_room_is_counted_in_slots_and_scalings_as_a_server_allocates_them(adapters, capsys):
    memory = 1 << 20
    facts = planned(capsys, adapters, "--device-memory", "1MiB", "--adapters-expected", "12")
    slot = facts["bytes"]["plain_slot"]
    # A slot of vLLM is as wide as its next buffer width, 8, and has k_proj as well, which lies beside q and v.
    q, v, hidden = 128, 64, tiny_llama.HIDDEN
    assert slot == tiny_llama.LAYERS * 2 * 8 * (3 * hidden + q + 2 * v)
    for row in facts["choices"]:
        device, fit = row["bytes"]["device"], row["fit"]
        fixed = device["bases"] + device["plain_slots"] + device["each_adapter"]
        assert device["total"] == fixed + 6 * device["each_adapter"]
        assert fit["plain_slots"] == memory // slot
        assert fixed + fit["on_these_bases"] * device["each_adapter"] <= memory
        assert fixed + (fit["on_these_bases"] + 1) * device["each_adapter"] > memory
        of_one_cluster = device["bases"] // row["clusters"]
        for more, fits in ((0, True), (1, False)):
            n = fit["at_this_error"] + more
            clusters = -(-row["clusters"] * n // 6)
            grown = clusters * of_one_cluster + device["plain_slots"] + (n + 1) * device["each_adapter"]
            assert (grown <= memory) is fits
        assert row["expected"]["clusters"] == 2 * row["clusters"]
        assert row["expected"]["device"] - device["total"] == device["bases"] + 6 * device["each_adapter"]
        assert row["expected"]["disk"] == 2 * row["bytes"]["disk"]["total"]
        assert row["expected"]["plain_slots"] == 12 * slot
    on_disk = [row["bytes"]["disk"]["total"] for row in facts["choices"]]
    assert on_disk == sorted(on_disk)


DESCRIBED = ("--adapter-rank", "16", "--target-modules", "q_proj,v_proj")


def test_a_plain_adapter_of_higher_rank_widens_every_buffer_of_the_server(adapters, tmp_path, capsys):
    stranger = tiny_llama.write_adapter(tmp_path / "stranger", 9, rank=24, targets=["q_proj", "v_proj"])
    assert main(["compress", str(adapters), "-o", str(tmp_path / "c"), "--rank", "4", "--clusters", "1"]) == 0
    narrow = planned_after(capsys, tmp_path / "c")
    assert main(["add", str(tmp_path / "c"), str(stranger), "--max-error", "0.1"]) == 0
    wide = planned_after(capsys, tmp_path / "c")
    assert wide["each_adapter"] == 4 * narrow["each_adapter"]  # Σ [32, 32] and not [16, 16]
    assert wide["bases"] == 2 * narrow["bases"] and wide["plain_slots"] == 2 * narrow["plain_slots"]


def test_modules_that_only_plain_adapters_change_have_buffers_as_well(adapters, tmp_path, capsys):
    stranger = tiny_llama.write_adapter(tmp_path / "stranger", 9, targets=["q_proj", "o_proj"])
    assert main(["compress", str(adapters), "-o", str(tmp_path / "c"), "--rank", "4", "--clusters", "1"]) == 0
    before = planned_after(capsys, tmp_path / "c")
    assert main(["add", str(tmp_path / "c"), str(stranger)]) == 0
    capsys.readouterr()
    facts = planned(capsys, tmp_path / "c")
    assert facts["plain"] == ["stranger"] and facts["wrapped_modules"] == 2 * tiny_llama.LAYERS
    device, q, hidden = facts["choices"][0]["bytes"]["device"], 128, tiny_llama.HIDDEN
    added = tiny_llama.LAYERS * 2 * 16 * (q + hidden)  # o_proj's A and B, in bf16, rank 16
    assert device["bases"] == before["bases"] + added and device["plain_slots"] == before["plain_slots"] + added
    assert device["each_adapter"] == before["each_adapter"] * 4 // 3, "beside q, k and v"


def test_adapters_that_an_error_budget_keeps_plain_are_counted_as_the_collection_that_is_made_of_them(tmp_path, capsys):
    for i in range(8):
        write_member(tmp_path / "a" / f"m{i}", 0, i)
    write_member(tmp_path / "a" / "stranger", 1, 9, rank=24)
    flags = ("--device-memory", "1MiB", "--adapters-expected", "90")
    best = planned(capsys, tmp_path / "a", "--max-error", "0.3", *flags)["recommended"]
    assert best["plain"] == ["stranger"] and best["method"] == "full"
    command = [str(tmp_path / "c") if part == "COLLECTION" else part for part in shlex.split(best["command"])]
    assert main(command[1:]) == 0
    capsys.readouterr()
    made = planned(capsys, tmp_path / "c")["choices"][0]
    assert best["bytes"] == made["bytes"]
    assert best["bytes"]["disk"]["total"] == best["total_bytes"]
    # Σ [32, 32] for the stranger's rank of 24, in fp16 or bf16, of the four slices and v_proj beside them.
    device, disk = best["bytes"]["device"], best["bytes"]["disk"]
    assert device["each_adapter"] == 2 * 6 * 32**2
    assert best["bytes"]["host"] == 8 * disk["each_adapter"]
    # Of ninety such adapters ten are plain.
    expected = best["expected"]
    assert expected["clusters"] == 10 * best["clusters"] and expected["host"] == 80 * disk["each_adapter"]
    assert expected["disk"] == 10 * disk["total"]
    fixed = device["bases"] + device["plain_slots"] + device["each_adapter"]
    assert expected["device"] == fixed + 9 * device["bases"] + 80 * device["each_adapter"]
    most = best["fit"]["on_these_bases"]
    for adapters, fits in ((most, True), (most + 1, False)):
        assert (fixed + (adapters - adapters // 9) * device["each_adapter"] <= 1 << 20) is fits


def planned_after(capsys, collection) -> dict:
    """Device bytes of a collection, whatever was printed before."""
    capsys.readouterr()
    return planned(capsys, collection)["choices"][0]["bytes"]["device"]


def test_slots_that_a_server_is_given_bound_what_is_on_the_device(adapters, tmp_path, capsys):
    assert main(["compress", str(adapters), "-o", str(tmp_path / "c"), "--rank", "4", "--clusters", "3"]) == 0
    everything = planned_after(capsys, tmp_path / "c")
    flags = ("--jd-base-slots", "2", "--jd-scaling-slots", "4", "--device-memory", "1GiB", "--adapters-expected", "600")
    row = planned(capsys, tmp_path / "c", *flags)["choices"][0]
    device = row["bytes"]["device"]
    assert device["bases"] == everything["bases"] * 2 // 3
    assert device["total"] == device["bases"] + device["plain_slots"] + 5 * device["each_adapter"]
    assert row["expected"]["device"] == device["total"], "the rest is brought when it is asked for"
    assert row["fit"]["on_these_bases"] is row["fit"]["at_this_error"] is None
    assert main(["plan", str(tmp_path / "c"), *flags]) == 0
    assert re.search(r"\bany +any\b", capsys.readouterr().out)
    few = planned(capsys, tmp_path / "c", "--jd-scaling-slots", "4", "--device-memory", str(device["total"]))
    assert few["choices"][0]["fit"]["at_this_error"] == 4, "two clusters of three have two adapters each"
    more = planned(capsys, tmp_path / "c", "--jd-base-slots", "7")["choices"][0]["bytes"]["device"]
    assert more["bases"] == everything["bases"] * 7 // 3, "room for bases to come"


def test_a_rank_of_tensor_parallelism_has_its_share_of_each_module(tmp_path, capsys):
    model = tiny_models.write_model(tmp_path / "model", "llama")
    config = json.loads((model / "config.json").read_text())
    heads, keys, hidden, inner = (
        config[name] for name in ("num_attention_heads", "num_key_value_heads", "hidden_size", "intermediate_size")
    )
    head, layers = config["head_dim"], config["num_hidden_layers"]
    described = ("--base-model", model, "--adapters-expected", "9", "--adapter-rank", "8")
    every = (*described, "--target-modules", "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj")
    for ranks in (1, 2, 4):
        facts = planned(capsys, *every, "--tensor-parallel-size", ranks)
        q, k, mlp = heads * head // ranks, max(1, keys // ranks) * head, inner // ranks
        numbers = 3 * hidden + q + 2 * k + q + hidden + 2 * (hidden + mlp) + mlp + hidden
        row = next(row for row in facts["choices"] if (row["rank"], row["clusters"]) == (8, 1))
        assert row["bytes"]["device"]["bases"] == 2 * 16 * layers * numbers
        assert row["bytes"]["device"]["each_adapter"] == 2 * 7 * layers * 16**2
    assert main(["plan", *map(str, every), "--tensor-parallel-size", "3"]) == 2
    assert "cannot be divided by 3" in one_error_line(capsys)


def test_what_is_divided_among_ranks_must_be_known(adapters, capsys):
    assert main(["plan", str(adapters), "--tensor-parallel-size", "2"]) == 2
    assert "--tensor-parallel-size needs --base-model" in one_error_line(capsys)


def test_adapters_that_are_only_described_are_planned_for_from_the_models_config(tmp_path, capsys):
    model = tiny_models.write_model(tmp_path / "model", "llama")
    (model / "model.safetensors").unlink()  # the config is enough
    facts = planned(capsys, "--base-model", model, "--adapters-expected", "1000", *DESCRIBED, "--device-memory", "1GiB")
    assert facts["slices"] == 4 and facts["wrapped_modules"] == 2 and not facts["unknown_slices"]
    assert facts["bytes"]["adapters"] == 1000 * 2 * 16 * 2 * (64 + 128 + 64 + 64)
    assert {row["rank"] for row in facts["choices"]} >= {8, 16}
    assert all(row["relative_error"] is None for row in facts["choices"])
    assert all(row["bytes"]["disk"]["total"] < facts["bytes"]["adapters"] for row in facts["choices"])
    assert main(["plan", "--base-model", str(model), "--adapters-expected", "1000", *DESCRIBED]) == 0
    assert "give a sample of them" in capsys.readouterr().out


def test_a_description_that_does_not_fit_is_refused_in_one_line(adapters, tmp_path, capsys):
    model = tiny_models.write_model(tmp_path / "moe", "qwen3_moe")
    described = ["plan", "--base-model", str(model), "--adapters-expected", "9", "--adapter-rank", "8"]
    assert main([*described, "--target-modules", "q_proj,experts"]) == 2
    line = one_error_line(capsys)
    assert "no linear layers named experts" in line and "k_proj, o_proj" in line and "cannot be compressed" in line
    assert main(described) == 2
    assert "--target-modules is missing" in one_error_line(capsys)
    assert main([*described, "--target-modules", "q_proj", "--max-error", "0.5"]) == 2
    assert "give a sample of them" in one_error_line(capsys)
    assert main(["plan", str(adapters), "--adapter-rank", "8"]) == 2
    assert "describe adapters where none is given" in one_error_line(capsys)
    assert main(["plan", str(adapters), "--base-model", str(tmp_path / "nothing")]) == 2
    assert "no causal language model" in one_error_line(capsys)


def test_a_plot_shows_device_memory_over_adapters(adapters, tmp_path, capsys):
    assert main(["plan", str(adapters), "--device-memory", "8GiB", "--plot", str(tmp_path / "plan.svg")]) == 0
    drawn = (tmp_path / "plan.svg").read_text()
    assert "GiB on the device" in drawn and "plain LoRA slots of rank 4" in drawn and "adapters in a cluster" in drawn


def test_an_error_budget_is_in_the_command_and_the_table_is_readable(adapters, capsys):
    assert main(["plan", str(adapters), "--max-error", "0.9", "--device-memory", "8GiB"]) == 0
    out = capsys.readouterr().out
    assert "mean" in out and "plain LoRA slots" in out and "relative (not squared), predicted from 4 of 4" in out
    assert f"jdlora compress '{adapters}' -o COLLECTION --rank" in out and "--max-error 0.9" in out


def test_budgets_that_cannot_be_met_are_refused_in_one_line(adapters, tmp_path, capsys):
    assert main(["plan", str(adapters), "--max-bytes", "10"]) == 2
    assert "10 bytes are too few for 6 adapters: the smallest choice" in one_error_line(capsys)
    assert main(["plan", str(adapters), "--max-error", "0.9", "--max-bytes", "1%"]) == 2
    assert "more than --max-bytes 1%" in one_error_line(capsys)
    assert main(["plan", str(adapters), "--max-error", "1.5"]) == 2
    assert "--max-error is a relative error" in one_error_line(capsys)


@pytest.mark.parametrize(
    ("text", "size"), [("10MiB", 10 << 20), ("1GB", 10**9), ("1.5k", 1536), ("8 GiB", 8 << 30), ("123", 123)]
)
def test_sizes_are_read_as_people_write_them(text, size):
    assert size_in_bytes(text) == size and byte_budget(text).of(5) == size


@pytest.mark.parametrize(("text", "size"), [("25%", 250), ("1/8", 125), ("12.5%", 125), ("100%", 1000)])
def test_shares_are_of_the_uncompressed_bytes(text, size):
    assert byte_budget(text).of(1000) == size


@pytest.mark.parametrize("text", ["", "much", "0", "1/0", "150%", "-1/8", "0%", "5 Mb/s", "1e9", "nan%", "٣MiB"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError):
        byte_budget(text)
