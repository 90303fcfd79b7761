"""Logits of a batch's answer tokens, the batch's common start run once; gradients flow through it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vllm_jdlora.evaluation.training_data import Batch


def scored_logits(model: Any, batch: Batch) -> Tensor:
    """[scored positions, vocabulary] fp32 of a Hugging Face causal language model.

    Keys and values of the common start are repeated for each row, so results are those of whole sequences.
    """
    from transformers import DynamicCache

    decoder = model.base_model
    cache = DynamicCache()
    rows, length = batch.ids.shape
    shared = batch.prefix.shape[1]
    if shared:
        decoder(input_ids=batch.prefix, past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(rows)
    hidden = decoder(
        input_ids=batch.ids,
        attention_mask=torch.cat([batch.mask.new_ones(rows, shared), batch.mask], dim=1),
        position_ids=torch.arange(shared, shared + length).expand(rows, -1),
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    logits: Tensor = model.get_output_embeddings()(hidden[batch.scored])
    return logits.float()
