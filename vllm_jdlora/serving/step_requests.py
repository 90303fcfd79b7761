"""Who is in a step, by request: read from vLLM's model runners without a Python object for each token.

vLLM itself hands its LoRA manager tuples with an entry for each token and compares them with those of the step before,
which takes milliseconds for a long prefill. Here a step is two arrays over requests.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from vllm.lora.layers import LoRAMappingType

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest


MOST_DUMMIES = 32
"""Adapters that warm-up and graph capture pretend to have. vLLM would make a request for each Σ slot, every time."""


@dataclass(frozen=True, eq=False)
class StepRequests:
    """The requests of a step in the order of their tokens.

    Attributes:
        lora_ids: int [requests], 0 for the base model. A view of what vLLM goes on writing to.
        tokens: int [requests], how many tokens each has in the step.
        adapters: the adapters' requests, each at least once.
    """

    lora_ids: np.ndarray
    tokens: np.ndarray
    adapters: list[LoRARequest]

    @functools.cached_property
    def key(self) -> tuple[bytes, bytes]:
        """Ids and token counts as they are now."""
        return self.lora_ids.tobytes(), self.tokens.tobytes()

    def asks_for(self, adapters: list[LoRARequest]) -> bool:
        """Whether these are the very objects; a request that came meanwhile may name another path under an id."""
        return len(adapters) == len(self.adapters) and all(map(operator.is_, adapters, self.adapters))


def take_over(runner: Any) -> None:
    """Let a model runner tell its LoRA manager requests instead of tokens, and warm up with a few adapters.

    Only methods of this one object are replaced. What does not come through them (warm-up, graph capture, or a vLLM
    that calls others) reaches the manager by vLLM's own way, with the same result.

    Args:
        runner: a V1 or V2 model runner (CPU or GPU).
    """
    runner.set_active_loras = functools.partial(_set_active_loras, runner, runner.set_active_loras)
    for name in ("maybe_setup_dummy_loras", "maybe_select_dummy_loras"):
        setattr(runner, name, functools.partial(_with_few_dummies, getattr(runner, name)))
    if hasattr(runner, "lora_state"):  # V2
        runner.lora_state.make_lora_inputs = functools.partial(_make_lora_inputs, runner.lora_state)
        runner._set_active_loras = functools.partial(_set_active_requests, runner, runner._set_active_loras)


def _with_few_dummies(stock: Any, lora_config: Any, *args: Any, **kwargs: Any) -> Any:
    """``maybe_setup_dummy_loras`` and ``maybe_select_dummy_loras`` as if there were few slots."""
    if lora_config is not None and lora_config.max_loras > MOST_DUMMIES:
        lora_config = dataclasses.replace(lora_config, max_loras=MOST_DUMMIES)
    return stock(lora_config, *args, **kwargs)


def _set_active_loras(
    runner: Any,
    stock: Any,
    input_batch: Any,
    num_scheduled_tokens: np.ndarray,
    num_sampled_tokens: np.ndarray | None = None,
    mapping_type: LoRAMappingType = LoRAMappingType.LANGUAGE,
) -> None:
    """V1's ``set_active_loras``. Sampled tokens matter to the LoRA of logits alone, which is refused."""
    if mapping_type is not LoRAMappingType.LANGUAGE:
        stock(input_batch, num_scheduled_tokens, num_sampled_tokens, mapping_type)
        return
    adapters = list(input_batch.lora_id_to_lora_request.values())
    lora_ids = input_batch.request_lora_mapping[: input_batch.num_reqs]
    runner.lora_manager.set_active_requests(StepRequests(lora_ids, num_scheduled_tokens, adapters))


def _make_lora_inputs(
    state: Any, req_ids: list[str], idx_mapping: np.ndarray, num_scheduled_tokens: np.ndarray
) -> tuple[tuple[int, ...], StepRequests, set[LoRARequest]]:
    """``LoraState.make_lora_inputs``, whose result goes only to ``_set_active_loras``."""
    adapters = [r for r in map(state.lora_requests.get, req_ids) if r is not None]
    return (), StepRequests(state.lora_ids[idx_mapping], num_scheduled_tokens, adapters), set()


def _set_active_requests(
    runner: Any, stock: Any, prompt_mapping: Any, token_mapping: Any, lora_requests: Any, *args: Any, **kwargs: Any
) -> None:
    """``LoRAModelRunnerMixin._set_active_loras``: ours after :func:`_make_lora_inputs`, vLLM's for dummies."""
    if isinstance(token_mapping, StepRequests):
        runner.lora_manager.set_active_requests(token_mapping)
    else:
        stock(prompt_mapping, token_mapping, lora_requests, *args, **kwargs)
