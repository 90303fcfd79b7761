"""Compressed collections of adapters on disk."""

from vllm_jdlora.collection.io import Collection

open_collection = Collection.open

__all__ = ["Collection", "open_collection"]
