"""Does compression keep what the adapters learnt? Needs the `evaluate` extra and a base model."""
