"""What the uncompressed adapters answer: Hugging Face and PEFT on the CPU, in fp32, greedy."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_jdlora.adapter import content_digest, file_digest
from vllm_jdlora.atomic_file import replacing
from vllm_jdlora.demo.base_model import MANIFEST
from vllm_jdlora.demo.cache import text_digest
from vllm_jdlora.demo.requests import ChatRequest


def uncompressed_answers(
    base_model: Path, adapters_dir: Path, requests: Sequence[ChatRequest], chat_template: Path, cache_file: Path
) -> list[str]:
    """One answer for each request; those given before for the same content come from ``cache_file``.

    Args:
        base_model: folder made by :func:`vllm_jdlora.demo.base_model.prepare_base_model`.
        adapters_dir: holds a PEFT folder for each adapter asked for.
        requests: what is asked.
        chat_template: Jinja file that makes prompts from messages.
        cache_file: JSON file of digest → answer; made, and made again if unreadable.
    """
    known = _read_cache(cache_file)
    keys = [_key(base_model, adapters_dir, request, chat_template) for request in requests]
    missing = [(key, request) for key, request in zip(keys, requests, strict=True) if key not in known]
    if missing:
        answers = _generate(base_model, adapters_dir, [request for _, request in missing], chat_template.read_text())
        known |= dict(zip([key for key, _ in missing], answers, strict=True))
        cache_file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(cache_file) as new:
            new.write_text(json.dumps(known, indent=1) + "\n")
    return [known[key] for key in keys]


def _read_cache(file: Path) -> dict[str, str]:
    try:
        known = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _key(base_model: Path, adapters_dir: Path, request: ChatRequest, chat_template: Path) -> str:
    return text_digest(
        [
            file_digest(base_model / MANIFEST),
            file_digest(chat_template),
            "" if request.adapter is None else content_digest(adapters_dir / request.adapter),
            json.dumps([request.messages, request.max_tokens]),
        ]
    )


def _generate(base_model: Path, adapters_dir: Path, requests: Sequence[ChatRequest], chat_template: str) -> list[str]:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(base_model)
    answers: list[str] = []
    for request in requests:
        # Loaded for each: PEFT changes the model it wraps, and this one loads in well under a second.
        model: Any = AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32)
        if request.adapter is not None:
            model = PeftModel.from_pretrained(model, adapters_dir / request.adapter)
        model.eval()
        prompt = tokenizer.apply_chat_template(
            list(request.messages),
            chat_template=chat_template,
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        with torch.inference_mode():
            tokens = model.generate(**prompt, max_new_tokens=request.max_tokens, do_sample=False)
        answers.append(tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))
    return answers
