"""The demonstration: a small base model, eight real adapters, compressed and served on this machine."""
