"""A Hugging Face causal language model whose LoRA can be swapped: unmerged, y = W x + B (A x)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from vllm_jdlora.adapter import file_digest
from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.evaluation.attention import IMPLEMENTATION, new_cache, tiled_mask
from vllm_jdlora.evaluation.tasks import END_OF_TURN, Item
from vllm_jdlora.evaluation.variant import Update

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class SwitchableModel:
    """A base model with at most one adapter on it at a time.

    Attributes:
        model: the causal language model, in eval mode.
        tokenizer: its tokenizer.
        end: id of the token that ends an answer.
        fingerprint: digest of the model's files and dtype; part of the key of every record.
    """

    def __init__(self, model: Any, tokenizer: Any, fingerprint: str = ""):
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.fingerprint = fingerprint
        self.end: int = tokenizer.convert_tokens_to_ids(END_OF_TURN)
        if self.end is None or self.end == tokenizer.unk_token_id:
            raise JDLoRAError(f"the model's tokenizer has no token {END_OF_TURN}; the task prompts are ChatML")
        self._linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        self._hooked: set[str] = set()
        self._factors: dict[str, tuple[Tensor, Tensor]] = {}
        self._take_attention()

    @classmethod
    def load(cls, path: str | Path, *, dtype: str = "fp32") -> SwitchableModel:
        """Load a model folder.

        Raises:
            JDLoRAError: transformers cannot read the model, or this module cannot run it.
        """
        path = Path(path)
        if not (path / "config.json").is_file():
            raise JDLoRAError(f"{path}: no config.json; the base model is a Hugging Face folder")
        bars = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            model = AutoModelForCausalLM.from_pretrained(path, dtype=DTYPES[dtype], attn_implementation="sdpa")
            tokenizer = AutoTokenizer.from_pretrained(path)
        except (OSError, ValueError) as error:
            raise JDLoRAError(f"{path}: not a model that transformers can load ({error})") from error
        finally:
            if bars:
                logging.enable_progress_bar()
        return cls(model, tokenizer, fingerprint_of(path, dtype))

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def apply(self, update: Update) -> None:
        """Put one adapter's ΔW = B A on the model in place of the one before; an empty one gives the base model.

        Raises:
            JDLoRAError: a slice that the model does not have, or of another shape.
        """
        factors = {}
        for name, (b, a) in update.items():
            linear = self._linears.get(name)
            if linear is None:
                raise JDLoRAError(f"{name}: the base model has no such linear module; is it the adapters' base model?")
            shape = (b.shape[0], a.shape[1])
            if shape != (linear.out_features, linear.in_features):
                raise JDLoRAError(
                    f"{name}: the adapter is {list(shape)}, the base model "
                    f"[{linear.out_features}, {linear.in_features}]; is it the adapters' base model?"
                )
            place = linear.weight.device, linear.weight.dtype
            factors[name] = b.to(*place), a.to(*place)
            if name not in self._hooked:
                self._hooked.add(name)
                linear.register_forward_hook(self._hook(name))
        self._factors = factors

    def hidden(self, ids: Tensor, positions: Tensor, mask: Tensor, cache: Any) -> Tensor:
        """Last hidden states [B, T, d] of the tokens ``ids`` [B, T]; ``cache`` grows by their keys and values.

        Args:
            ids: token ids.
            positions: their positions in their sequences [B, T].
            mask: bool [B, T, cached + T], what each token sees.
            cache: of the batch (:func:`vllm_jdlora.evaluation.attention.new_cache`).
        """
        config = self.model.config
        groups = config.num_attention_heads // config.num_key_value_heads
        output = self.model.base_model(
            input_ids=ids,
            position_ids=positions,
            attention_mask=tiled_mask(mask, groups, self.model.dtype),
            past_key_values=cache,
            use_cache=True,
        )
        return output.last_hidden_state

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [N, vocabulary] in fp32 of hidden states [N, d]."""
        return self.model.get_output_embeddings()(hidden).float()

    def tokens(self, text: str) -> list[int]:
        """Token ids of a piece of text, special tokens recognised, none added."""
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def text(self, ids: Sequence[int]) -> str:
        """The text of an answer without its end token and without blanks around it."""
        return self.tokenizer.decode([i for i in ids if i != self.end]).strip()

    def _hook(self, name: str) -> Any:
        def add_update(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
            pair = self._factors.get(name)
            if pair is None:
                return output
            b, a = pair
            shrunk = nn.functional.linear(inputs[0], a).flatten(0, -2)
            return torch.addmm(output.flatten(0, -2), shrunk, b.T).view_as(output)

        return add_update

    def _take_attention(self) -> None:
        """Switch to this package's attention, and refuse a model whose logits come out differently from here.

        Some architectures scale or cap logits after the output embedding, or want another mask.
        """
        # A text: bf16 is chaos on rows of special tokens.
        tokens = self.tokens(Item("Name a colour.", "The sky on a clear day.", "").prompt)
        ids = torch.tensor([tokens], device=self.device)
        n = ids.shape[1]
        mask = torch.ones(n, n, dtype=torch.bool, device=self.device).tril()[None]
        positions = torch.arange(n, device=self.device)[None]
        with torch.inference_mode():
            expected = self.model(input_ids=ids).logits[0].float()
            self.model.set_attn_implementation(IMPLEMENTATION)
            cache = new_cache()
            hidden = [
                self.hidden(ids[:, part], positions[:, part], mask[:, part, : part.stop], cache)
                for part in (slice(0, 9), slice(9, n))
            ]
            found = self.logits(torch.cat(hidden, dim=1)[0])
        # Rounding alone gives 1e-6 of the logits' size in fp32, 1e-2 in bf16.
        tolerance = 1e-4 if self.model.dtype == torch.float32 else 5e-2
        if torch.linalg.norm(expected - found) > tolerance * torch.linalg.norm(expected):
            raise JDLoRAError("this architecture is not one whose logits the evaluation can compute (Llama's is)")


def fingerprint_of(path: Path, dtype: str) -> str:
    """Digest of the dtype and of what the folder holds: config, tokenizer, weights."""
    digest = hashlib.sha256(dtype.encode())
    for file in sorted(path.glob("*")):
        if file.suffix in (".json", ".safetensors", ".jinja", ".model", ".txt"):
            digest.update(f"{file.name} {file_digest(file)}\n".encode())
    return digest.hexdigest()
