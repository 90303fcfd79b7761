"""The commands of `jdlora`, one module each: `add_to` gives it its arguments and what to run."""
