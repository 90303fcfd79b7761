"""Compressed collections of adapters on disk."""

from vllm_jdlora.collection.io import Collection

__all__ = ["Collection"]
