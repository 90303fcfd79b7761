"""Compress many LoRA adapters into shared bases and serve them with vLLM."""

__version__ = "0.1.0"
