"""What the tests of serving share: log lines, the base model, a collection of real adapters, and running servers."""

import logging
from pathlib import Path

import pytest
import torch

DEMO = Path(__file__).parents[2] / "demo"
COMPRESSED = [
    "fv_antonym",
    "ii_active_to_passive",
    "task363_sst2_polarity_classification",
    "task379_agnews_topic_classification",
    "task875_emotion_classification",
]
PLAIN = "ii_sentence_similarity"
RUNTIME = "fv_alphabetically_first_5"

SERVER_ARGS = [
    "--dtype=float32",
    "--max-model-len=512",
    "--max-num-seqs=32",
    "--kv-cache-memory-bytes=268435456",
    f"--chat-template={DEMO / 'chat_template.jinja'}",
    "--served-model-name=base",
]


def adapter_folder(name: str) -> Path:
    return DEMO / "adapters" / name


@pytest.fixture
def logged():
    """Messages of the package's logger."""

    class Messages(logging.Handler):
        def __init__(self):
            super().__init__()
            self.seen = []

        def emit(self, record):
            self.seen.append(record.getMessage())

    handler, logger = Messages(), logging.getLogger("vllm.jdlora")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler.seen
    logger.removeHandler(handler)
    logger.setLevel(level)


@pytest.fixture(scope="session")
def base_model() -> Path:
    from vllm_jdlora.demo.base_model import prepare_base_model

    return prepare_base_model()


@pytest.fixture(scope="session")
def collection(tmp_path_factory) -> Path:
    """Five real adapters, one cluster of rank 64, as the CLI makes them."""
    from vllm_jdlora.cli import main

    target = tmp_path_factory.mktemp("collection") / "five"
    folders = [str(adapter_folder(name)) for name in COMPRESSED]
    assert main(["compress", *folders, "-o", str(target), "--rank", "64", "--clusters", "1"]) == 0
    return target


@pytest.fixture(scope="session")
def jd_server(base_model, collection, tmp_path_factory):
    from vllm_jdlora.demo.server import Server

    args = [
        str(base_model),
        *SERVER_ARGS,
        "--lora-compression=jd",
        f"--lora-collection={collection}",
        "--lora-modules",
        f"{PLAIN}={adapter_folder(PLAIN)}",
        "--max-loras=2",
    ]
    env = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    with Server(args, env=env, log_path=tmp_path_factory.mktemp("logs") / "jd.log") as server:
        yield server


@pytest.fixture(scope="session")
def reference_model(base_model):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def tokenizer(base_model):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base_model)
