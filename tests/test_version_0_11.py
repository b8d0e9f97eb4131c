"""What version 0.11.0 wrote loads, answers and resumes as it did there.

`fixtures/v0_11_0` was written by version 0.11.0 itself: step 4 of a run of 8 steps over all views
(Muon, averaged parameters, dropout, bottleneck), a language-model folder, and what 0.11.0 computed
from them (`expected.npz`). The stored configuration lacks every field that later versions added,
so these tests also show that an absent field means the behaviour of 0.11.0.
"""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from slam_jax.interop import load_pretrained
from slam_jax.runtime.signals import Stop, Stopped
from slam_jax.slam_v3 import Inputs, SlamV3
from slam_jax.training import load, train
from slam_jax.training.checkpoint import Checkpoints
from slam_jax.training.metrics import read_metrics

FIXTURES = Path(__file__).parent / "fixtures" / "v0_11_0"
INPUTS = ("text", "text_mask", "image", "image_mask", "aux", "aux_mask")


@pytest.fixture(scope="module")
def expected():
    with np.load(FIXTURES / "expected.npz") as arrays:
        return dict(arrays)


def test_a_checkpoint_gives_the_logits_that_it_gave(expected):
    loaded = load(FIXTURES / "run")
    assert loaded.step == 4
    assert loaded.max_new_tokens == 32  # no length of answers is stored with it
    inputs = Inputs(**{name: expected[name] for name in INPUTS})
    logits = jax.jit(SlamV3.__call__)(loaded.model, expected["tokens"], inputs).logits
    np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=1e-5)


def test_a_language_model_folder_gives_the_logits_that_it_gave(expected):
    model, _ = load_pretrained(FIXTURES / "deepseek_v2")
    logits = jax.jit(lambda model, tokens: model(tokens).logits)(model, expected["lm_tokens"])
    np.testing.assert_allclose(logits, expected["lm_logits"], rtol=0, atol=1e-5)


class _StopAfterTwoSteps(Stop):
    """Asks the run to stop once it has asked twice: after its second step."""

    asked = 0

    @property
    def requested(self) -> bool:
        self.asked += 1
        return self.asked >= 2


@pytest.mark.release
@pytest.mark.parametrize("scan_layers", [None, pytest.param(True, marks=pytest.mark.slow)])
def test_a_run_resumes_where_it_stopped(expected, tmp_path, monkeypatch, scan_layers):
    monkeypatch.setenv("SLAM_JAX_DATA_DIR", str(tmp_path / "data"))
    workdir = tmp_path / "run"
    shutil.copytree(FIXTURES / "run", workdir)
    config = Checkpoints(workdir).read_config("latest")
    config["model"]["scan_layers"] = scan_layers
    with pytest.raises(Stopped):
        train(config, workdir, _StopAfterTwoSteps())
    assert Checkpoints(workdir).steps() == [4, 6]
    steps = [r for r in read_metrics(workdir) if r["split"] == "train" and r["step"] > 4]
    assert [r["step"] for r in steps] == expected["later_steps"][:2].tolist()
    # Sums are rounded in another order, so the losses agree closely, but not to the last bit.
    for name, key in (("total", "later_losses"), ("grad_norm", "later_norms")):
        np.testing.assert_allclose([r[name] for r in steps], expected[key][:2], rtol=1e-3)


def test_the_stored_config_is_that_of_0_11_0():
    """The fixture must not be rewritten by a later version: its fields are those of 0.11.0."""
    config = json.loads((FIXTURES / "run/checkpoints/4/config.json").read_text())
    groups = ("model", "data", "loss", "optimizer", "run", "mesh")
    assert [len(config[group]) for group in groups] == [25, 10, 3, 12, 9, 5]
