"""Stored configurations with fields that this version no longer has."""

import json
from pathlib import Path

import pytest

import slam_jax
from slam_jax.errors import ConfigError
from slam_jax.training import Experiment, default_config
from slam_jax.training.experiment import as_json

UNUSED = {
    "model": {
        "exchange_every": None,
        "process_views": [],
        "instruction_std": 0.02,
        "process_dropout": 0.0,
        "memory_reads_processes": False,
        "balance_fusion": False,
    },
    "loss": {"similarity": 0.0, "alone": 0.0},
}


def config_with(**groups):
    config = as_json(default_config("tiny"))
    return {**config, **{name: {**config[name], **fields} for name, fields in groups.items()}}


def test_fields_that_were_not_used_are_left_out():
    expected = Experiment.from_config(default_config("tiny"))
    assert Experiment.from_config(config_with(**UNUSED)) == expected
    # It concerns the initial values alone, which a checkpoint has.
    assert Experiment.from_config(config_with(model={"instruction_std": 0.5})) == expected


@pytest.mark.parametrize(
    ("group", "name", "value", "last"),
    [
        ("model", "exchange_every", 1, "0.26"),
        ("model", "process_views", ["all", "near", "strided", "others"], "0.26"),
        ("model", "process_dropout", 0.1, "0.26"),
        ("model", "memory_reads_processes", True, "0.26"),
        ("loss", "similarity", 0.1, "0.26"),
        ("model", "balance_fusion", True, "0.27"),
        ("loss", "alone", 0.1, "0.27"),
    ],
)
def test_a_field_that_was_used_is_named_with_the_last_version_that_has_it(group, name, value, last):
    with pytest.raises(ConfigError, match=rf"^{group}\.{name} is .*, use slam_jax {last}$"):
        Experiment.from_config(config_with(**{group: {name: value}}))


def test_the_shipped_model_was_stored_with_them():
    folder = Path(slam_jax.__file__).parent / "trained" / "quickstart"
    stored = json.loads((folder / "model.json").read_text())["config"]
    assert UNUSED["model"].keys() <= stored["model"].keys()
    Experiment.from_config(stored)
