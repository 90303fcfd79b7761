"""The load tests are scripts and not a package: they import each other by their folder, as when they are run."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "loadtests"))


@pytest.fixture
def model(tmp_path):
    """Folder of a model that has a config and no weights: all that benchmarks read of it before engines start."""
    folder = tmp_path / "model"
    folder.mkdir()
    config = {
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "vocab_size": 100,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder
