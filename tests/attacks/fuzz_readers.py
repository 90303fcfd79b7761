"""Coverage-guided fuzzing of what reads bytes from outside; by hand, with `pip install atheris`:

    python tests/attacks/fuzz_readers.py tensor_file|config|manifest [CORPUS_FOLDER] [-max_total_time=SECONDS]

Whatever the bytes, a reader gives a value or raises JDLoRAError; what it takes as a tensor file, safetensors reads too.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["vllm_jdlora", "json"]):
    from vllm_jdlora.collection.schema import CollectionManifest
    from vllm_jdlora.errors import JDLoRAError
    from vllm_jdlora.peft_config import PeftConfig
    from vllm_jdlora.tensor_file import TensorFile

from safetensors import safe_open

FOLDER = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))


def tensor_file(data: bytes) -> None:
    file = FOLDER / "x.safetensors"
    file.write_bytes(data)
    try:
        opened = TensorFile(file)
    except JDLoRAError:
        return
    with safe_open(file, framework="pt") as expected:
        assert set(expected.keys()) == set(opened.tensors)
        for name, place in opened.tensors.items():
            assert expected.get_slice(name).get_shape() == list(place.shape)


def config(data: bytes) -> None:
    file = FOLDER / "adapter_config.json"
    file.write_bytes(data)
    try:
        PeftConfig.read(file).rank_and_scale("model.layers.0.self_attn.q_proj")
    except JDLoRAError:
        return


def manifest(data: bytes) -> None:
    text = data.decode("utf-8", "replace")
    try:
        CollectionManifest.from_json(text)
    except JDLoRAError:
        return


SEEDS = {
    tensor_file: b'\x3a\0\0\0\0\0\0\0{"a":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]}}  \0\0\0\0\0\0\0\0',
    config: json.dumps(
        {"r": 4, "lora_alpha": 8, "target_modules": ["q"], "rank_pattern": {"q.*": 2}, "modules_to_save": None}
    ).encode(),
    manifest: b'{"format_version": 2, "revision": "x", "slices": [], "adapters": [], "plain": [], "skipped": [], '
    b'"base_model": {"name": null, "fingerprint": null}, "files": {}}',
}


def main() -> None:
    target = {f.__name__: f for f in SEEDS}[sys.argv[1]]
    seeds = FOLDER / "seeds"
    seeds.mkdir()
    (seeds / "seed").write_bytes(SEEDS[target])
    atheris.Setup([sys.argv[0], *sys.argv[2:], str(seeds)], target)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
