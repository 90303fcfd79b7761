"""The flags of `vllm serve`: what they turn into, and which combinations are refused with a reason."""

import math
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests import tiny_llama
from vllm_jdlora.adapter import read_adapter
from vllm_jdlora.collection import Collection
from vllm_jdlora.collection.build import compress
from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.serving import engine_settings, starting_collection, startup_build
from vllm_jdlora.serving.adapter_names import enter_collection
from vllm_jdlora.serving.engine_settings import SCHEDULER, WORKER, apply_to_engine_args
from vllm_jdlora.serving.flags import apply_flags
from vllm_jdlora.serving.http_routes import AdapterRoutes
from vllm_jdlora.serving.options import AGE_CAP, CONFIG_KEY, AdapterPath, ServingOptions, buffer_rank


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("flags")
    folders = [tiny_llama.write_adapter(root / "adapters" / f"a{i}", i, targets=["q_proj", "v_proj"]) for i in range(3)]
    plain = tiny_llama.write_adapter(root / "plain", 9, targets=["o_proj"])
    model = tiny_llama.write_model(root / "model")
    collection = compress([read_adapter(f) for f in folders], root / "collection", rank=8, clusters=1, dtype="fp32")
    return {"root": root, "plain": plain, "model": model, "collection": collection.path, "dir": root / "adapters"}


@pytest.fixture(scope="module")
def parser():
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return make_arg_parser(FlexibleArgumentParser())


def parse(parser, files, *flags: str):
    args = parser.parse_args(["--model", str(files["model"]), *flags])
    apply_flags(args)
    return args


def engine_args(args):
    from vllm.engine.arg_utils import AsyncEngineArgs

    result = AsyncEngineArgs.from_cli_args(args)
    apply_to_engine_args(result)
    return result


def test_without_the_flag_nothing_changes(parser, files):
    args = parse(parser, files)
    assert args.lora_modules is None and not args.additional_config


def test_a_collection_becomes_engine_settings_and_routes_of_the_api_server(parser, files, logged):
    flags = ("--lora-compression=jd", f"--lora-collection={files['collection']}", "--jd-base-slots=1")
    args = parse(parser, files, *flags, "--middleware=my.Middleware")
    revision = Collection.open(files["collection"]).manifest.revision
    assert args.lora_modules is None  # each of these would be a call to the engine
    assert args.middleware == ["my.Middleware", f"{AdapterRoutes.__module__}.{AdapterRoutes.__name__}"]
    engine = engine_args(args)
    assert engine.enable_lora and engine.worker_cls == WORKER and engine.scheduler_cls == SCHEDULER
    assert engine.lora_target_modules == ["q_proj", "v_proj"]
    assert engine.max_lora_rank == 16 and engine.max_loras == 1
    options = ServingOptions.from_additional_config(engine.additional_config)
    assert (options.revision, options.scaling_slots, options.plain_slots) == (revision, 3, 1)
    assert (options.base_slots, options.arrivals) == (1, "")
    told = f"revision={revision} method=full rank=8 clusters=1 quantize=none adapters=3 plain=0"
    assert [line for line in logged if "event=collection" in line] == [
        f"jdlora event=collection path={files['collection']} {told}"
    ]


def test_with_runtime_updates_a_server_has_a_folder_for_arrivals_of_its_own(parser, files, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
    flags = ("--lora-compression=jd", f"--lora-collection={files['collection']}")
    (tmp_path / "vllm-jdlora" / "arrivals" / "1" / "left-behind").mkdir(parents=True)
    found = []
    for adapter_dir in (None, files["dir"]):
        args = parse(parser, files, *flags, *([f"--jd-adapter-dir={adapter_dir}"] if adapter_dir else []))
        apply_flags(args)  # again, which claims nothing more
        assert args.jd_adapter_dir == (adapter_dir and str(adapter_dir))
        found.append(Path(ServingOptions.from_additional_config(args.additional_config).arrivals))
    assert found == [tmp_path / "vllm-jdlora" / "arrivals" / str(i) for i in range(2)]
    assert all(f.stat().st_mode & 0o777 == 0o700 and not list(f.iterdir()) for f in found)
    with pytest.raises(JDLoRAError, match="no such folder"):
        parse(parser, files, *flags, f"--jd-adapter-dir={tmp_path}/none")


def test_a_folder_for_arrivals_is_free_again_and_gone_when_its_server_has_ended(tmp_path):
    program = (
        "from vllm_jdlora.serving.arrivals_folder import claim_arrivals_folder as c; print(c()); (c() / 'x').touch()"
    )
    for _ in range(2):
        env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
        claimed = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True)
        assert Path(claimed.stdout.strip()) == tmp_path / "vllm-jdlora" / "arrivals" / "0"
        assert sorted(p.name for p in (tmp_path / "vllm-jdlora" / "arrivals").iterdir()) == ["0.lock", "1.lock"]


@pytest.mark.parametrize(
    ("flags", "age_cap", "cluster_order"),
    [
        ([], AGE_CAP, True),
        (["--jd-age-cap=0.5", "--jd-cluster-order=off"], 0.5, False),
        (["--jd-age-cap=inf", "--jd-cluster-order=auto"], math.inf, True),
    ],
)
def test_who_waits_for_scarce_slots_can_be_chosen(parser, files, flags, age_cap, cluster_order):
    args = parse(parser, files, "--lora-compression=jd", f"--lora-collection={files['collection']}", *flags)
    options = ServingOptions.from_additional_config(engine_args(args).additional_config)
    assert (options.age_cap, options.cluster_order) == (age_cap, cluster_order)


@pytest.mark.parametrize(
    ("quantize", "asked", "on_cpu", "bits"),
    [
        ("none", None, True, 16),
        ("int8", None, True, 8),
        ("fp8", None, True, 8),
        ("int8", None, False, 16),
        ("int8", 16, True, 16),
        ("int8", 8, False, 8),
    ],
)
def test_bases_of_a_quantised_collection_stay_in_8_bits_on_cpu_unless_asked_for_otherwise(
    parser, files, monkeypatch, tmp_path, quantize, asked, on_cpu, bits
):
    monkeypatch.setattr(engine_settings, "_on_cpu", lambda: on_cpu)
    adapters = [read_adapter(f) for f in sorted(files["dir"].iterdir())]
    collection = compress(adapters, tmp_path / "c", rank=4, clusters=1, quantize=quantize)
    flags = ["--lora-compression=jd", f"--lora-collection={collection.path}"]
    args = parse(parser, files, *flags, *([f"--jd-base-bits={asked}"] if asked else []))
    assert ServingOptions.from_additional_config(engine_args(args).additional_config).base_bits == bits


def test_bases_in_buffers_wider_than_they_are_are_told_of(parser, files, logged):
    flags = ("--lora-compression=jd", f"--lora-collection={files['collection']}")
    assert engine_args(parse(parser, files, *flags)).max_lora_rank == 16
    [told] = [line for line in logged if "--max-lora-rank" in line]
    assert "of rank 8, lie in buffers of rank 16: --max-lora-rank 8 makes" in told
    logged.clear()
    assert engine_args(parse(parser, files, *flags, "--max-lora-rank=8")).max_lora_rank == 8
    assert not [line for line in logged if "--max-lora-rank" in line]


def test_settings_may_be_applied_twice(parser, files):
    args = parse(parser, files, "--lora-compression=jd", f"--lora-collection={files['collection']}", "--max-loras=3")
    apply_flags(args)
    engine = engine_args(args)
    before = (engine.max_loras, dict(engine.additional_config))
    apply_to_engine_args(engine)
    assert (engine.max_loras, engine.additional_config) == before


def test_plain_adapters_beside_a_collection_widen_what_is_wrapped(parser, files):
    args = parse(
        parser,
        files,
        "--lora-compression=jd",
        f"--lora-collection={files['collection']}",
        "--lora-modules",
        f"mine={files['plain']}",
    )
    assert [m.name for m in args.lora_modules] == ["mine"]
    assert engine_args(args).lora_target_modules == ["o_proj", "q_proj", "v_proj"]


def test_adapters_without_a_collection_are_compressed_at_start_up_once(parser, files, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    flags = ("--lora-compression=jd", f"--lora-dir={files['dir']}")
    first = parse(parser, files, *flags).additional_config[CONFIG_KEY]["collection"]
    monkeypatch.setattr(startup_build, "compress", None)  # a second compression would fail
    again = parse(parser, files, *flags)
    assert again.additional_config[CONFIG_KEY]["collection"] == first
    assert again.lora_modules is None and [a.name for a in Collection.open(first).manifest.adapters] == [
        "a0",
        "a1",
        "a2",
    ]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--lora-dir={dir}"], "--lora-dir needs --lora-compression jd"),
        (["--jd-scaling-slots=4"], "--jd-scaling-slots needs --lora-compression jd"),
        (["--jd-adapter-dir={dir}"], "--jd-adapter-dir needs --lora-compression jd"),
        (
            ["--lora-compression=jd", "--lora-collection={collection}", "--jd-adapter-dir={dir}"],
            "needs VLLM_ALLOW_RUNTIME_LORA_UPDATING=1",
        ),
        (["--lora-compression=jd"], "needs adapters"),
        (["--lora-compression=jd", "--lora-dir={root}/none"], "no such folder"),
        (["--lora-compression=jd", "--lora-dir={model}"], "adapter_config.json"),
        (["--lora-compression=jd", "--lora-collection={model}"], "collection"),
        (["--lora-compression=jd", "--lora-collection={collection}", "--lora-modules", "a1={plain}"], "named 'a1'"),
        (["--lora-compression=jd", "--lora-collection={collection}", "--pipeline-parallel-size=2"], "tensor parallel"),
        (["--lora-compression=jd", "--lora-collection={collection}", "--worker-cls=my.Worker"], "my.Worker"),
        (["--lora-compression=jd", "--lora-collection={collection}", "--scheduler-cls=my.Scheduler"], "my.Scheduler"),
        (["--lora-compression=jd", "--lora-collection={collection}", "--enable-sleep-mode"], "--enable-sleep-mode"),
        (["--lora-compression=jd", "--lora-collection={collection}", "--fully-sharded-loras"], "on CPU"),
        (
            ["--lora-compression=jd", "--lora-collection={collection}", "--jd-max-error=0"],
            "jdlora compress --max-error",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(parser, files, flags, told):
    with pytest.raises(JDLoRAError, match=told):
        engine_args(parse(parser, files, *(f.format(**files) for f in flags)))


@pytest.mark.parametrize("eager", [False, True])
def test_the_model_is_compiled_as_without_lora(parser, files, eager):
    from vllm.engine.arg_utils import AsyncEngineArgs

    flags = ["--kv-cache-memory-bytes=1000000", *(["--enforce-eager"] if eager else [])]
    compressed = parse(parser, files, *flags, "--lora-compression=jd", f"--lora-collection={files['collection']}")
    modes = [
        AsyncEngineArgs.from_cli_args(args).create_engine_config().compilation_config.mode
        for args in (compressed, parse(parser, files, *flags))
    ]
    assert modes[0] == modes[1]


@pytest.mark.parametrize(
    "flags",
    [
        ["--jd-scaling-slots=0"],
        ["--jd-max-error=1.5"],
        ["--lora-compression=svd"],
        ["--jd-age-cap=-1"],
        ["--jd-age-cap=nan"],
        ["--jd-cluster-order=on"],
    ],
)
def test_values_out_of_range_are_usage_errors(parser, files, flags):
    with pytest.raises(SystemExit):
        parser.parse_args(["--model", str(files["model"]), *flags])


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({}, "needs `collection`"),
        ({"collection": ""}, "path of a collection"),
        ({"collection": "x", "slots": 3}, "does not know slots"),
        ({"collection": "x", "scaling_slots": 0}, "at least 1"),
        ({"collection": "x", "max_error": 2}, "between 0 and 1"),
        ({"collection": "x", "age_cap": -1}, "seconds from 0"),
        ({"collection": "x", "age_cap": math.nan}, "seconds from 0"),
        ({"collection": "x", "age_cap": "2"}, "seconds from 0"),
        ({"collection": "x", "cluster_order": "off"}, "true or false"),
        ("x", "must be a dictionary"),
    ],
)
def test_offline_options_are_checked(values, told):
    with pytest.raises(JDLoRAError, match=told):
        ServingOptions.from_additional_config({CONFIG_KEY: values})


def test_adapter_paths_go_there_and_back():
    for path in (AdapterPath("abc", 3, "my#adapter"), AdapterPath("abc", 0, "a:1+2", "ff00")):
        assert AdapterPath.parse(str(path)) == path
    assert AdapterPath.parse("/some/folder") is None
    with pytest.raises(JDLoRAError, match="not the path"):
        AdapterPath.parse("jd://abc#a")


def test_buffers_are_as_wide_as_vllm_has_them():
    assert [buffer_rank(r) for r in (1, 7, 16, 17, 48, 200, 512)] == [1, 8, 16, 32, 64, 256, 512]
    with pytest.raises(JDLoRAError, match="512"):
        buffer_rank(513)


def test_compiled_code_is_kept_for_every_collection_and_not_for_another_model_config(parser, files, tmp_path):
    from vllm.engine.arg_utils import AsyncEngineArgs

    adapters = [read_adapter(f) for f in sorted(files["dir"].iterdir())]
    fewer = compress(adapters[:2], tmp_path / "fewer", rank=8, clusters=2)

    def key(collection, *flags):
        args = parse(parser, files, "--lora-compression=jd", f"--lora-collection={collection}", *flags)
        config = AsyncEngineArgs.from_cli_args(args).create_engine_config()
        sent = pickle.loads(pickle.dumps(config))  # as workers get it
        assert ServingOptions.from_additional_config(sent.additional_config).collection == str(collection)
        assert sent.compute_hash() == config.compute_hash()
        return config.compute_hash()

    first = key(files["collection"])
    assert first == key(fewer.path, "--jd-scaling-slots=1", "--max-loras=4", "--max-cpu-loras=7")
    assert first != key(files["collection"], '--additional-config={"other": 1}')
    assert first != key(files["collection"], "--lora-target-modules=o_proj")


def test_vllms_own_limit_of_adapters_in_a_batch_does_not_bind(parser, files):
    from vllm.engine.arg_utils import AsyncEngineArgs

    args = parse(
        parser, files, "--lora-compression=jd", f"--lora-collection={files['collection']}", "--max-num-seqs=17"
    )
    lora = AsyncEngineArgs.from_cli_args(args).create_engine_config().lora_config
    assert lora.max_loras == lora.max_cpu_loras == 17


def test_a_damaged_collection_is_told_of_before_any_request_though_its_check_is_only_begun(parser, files, tmp_path):
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext

    damaged = tmp_path / "damaged"
    shutil.copytree(files["collection"], damaged)
    file = damaged / "scalings-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    args = parse(parser, files, "--lora-compression=jd", f"--lora-collection={damaged}")

    def config(headless=False, count=1, rank=0):
        engine = AsyncEngineArgs.from_cli_args(args)
        engine._api_process_count, engine._api_process_rank = count, rank
        return engine.create_engine_config(UsageContext.OPENAI_API_SERVER, headless=headless)

    for enters_no_names in ({"headless": True}, {"count": 2, "rank": -1}):
        with pytest.raises(JDLoRAError, match="changed after it was written"):
            config(**enters_no_names)
    models = SimpleNamespace(engine_client=SimpleNamespace(vllm_config=config()))
    with pytest.raises(JDLoRAError, match="changed after it was written"):
        enter_collection(models)
    config(count=2, rank=1)  # the process that started this one has checked


def test_a_starting_process_opens_its_collection_once_unless_it_is_replaced(files, tmp_path):
    folder = tmp_path / "collection"
    shutil.copytree(files["collection"], folder)
    first = starting_collection.open_once(str(folder))
    starting_collection.check_meanwhile(str(folder))
    assert starting_collection.checked(str(folder)) is first is starting_collection.open_once(str(folder))
    os.replace(shutil.copyfile(folder / "collection.json", tmp_path / "new"), folder / "collection.json")
    assert starting_collection.open_once(str(folder)) is not first
    starting_collection.forget()
    assert starting_collection.open_once(str(files["collection"])).path == files["collection"]
    starting_collection.forget()
