"""The diagrams of a configuration."""

import dataclasses
from pathlib import Path

from flax import nnx

from slam_jax.data import tokenizer_from_json
from slam_jax.errors import require
from slam_jax.reporting.diagrams.layers import draw_decoder_layer, draw_process_layer
from slam_jax.reporting.diagrams.shapes import find_shapes
from slam_jax.reporting.diagrams.whole import draw_model
from slam_jax.slam_v3 import SlamV3, SlamV3Config
from slam_jax.slam_v3.config import PARTS
from slam_jax.training import Experiment
from slam_jax.training.checkpoint import Step
from slam_jax.training.loading import read_saved


def draw_workdir(
    workdir: str | Path, step: Step = None, *, text: int = 36, aux: int = 6
) -> dict[str, str]:
    """`draw_diagrams` of the SLAM v3 of a run or of a folder to share; reads no weights.

    Raises what `slam_jax.load` and `draw_diagrams` raise.
    """
    saved = read_saved(workdir, step)
    vocab_size = tokenizer_from_json(saved.tokenizer).vocab_size
    config = Experiment.from_config(saved.config).with_vocabulary(vocab_size)
    return draw_diagrams(config, text=text, aux=aux)


def draw_diagrams(
    config: SlamV3Config, *, text: int = 36, aux: int = 6, prompt: int = 5, max_length: int = 16
) -> dict[str, str]:
    """SVG files by name: "model.svg", "process_layer.svg" and "decoder_layer.svg".

    Names, shapes and numbers of parameters are those of a model that is built without memory. text,
    aux, prompt: tokens of a text, auxiliary vectors and tokens of a question, of one example, which
    also has an image. max_length: tokens that the cache has room for.

    Raises ConfigError for a model without some of its parts or with another decoder.
    """
    require(not config.without, "without", config.without, f"() to draw a model with all {PARTS}")
    own = config.language_model is None
    require(own, "decoder.pretrained", "a model", "None: the diagram is of SLAM v3's own decoder")
    config = dataclasses.replace(config, scan_layers=False)
    model = nnx.eval_shape(lambda: SlamV3(config, rngs=nnx.Rngs(0)))
    shapes = find_shapes(model, text, aux, prompt, max_length)
    return {
        "model.svg": draw_model(model, shapes),
        "process_layer.svg": draw_process_layer(model, shapes),
        "decoder_layer.svg": draw_decoder_layer(model, shapes),
    }
