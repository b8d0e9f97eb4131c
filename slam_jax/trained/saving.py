"""Writes trained and published models as folders to share."""

import dataclasses
from pathlib import Path
from typing import Any

from slam_jax.data.hub_tokenizer import HubTokenizer
from slam_jax.data.tokenizer import Tokenizer
from slam_jax.errors import require
from slam_jax.generation import ModelAndTokenizer
from slam_jax.interop import pretrained
from slam_jax.layers.lora import LoraConfig, merge_lora
from slam_jax.layers.quantization import weights_of
from slam_jax.trained.card import make_card
from slam_jax.trained.folder import CARD, Trained, write_folder
from slam_jax.training.checkpoint.trees import by_name
from slam_jax.training.experiment import as_json
from slam_jax.training.loading import Loaded
from slam_jax.training.state import split_model


def save_pretrained(
    loaded: Any, folder: str | Path, *, dtype: str | None = None, max_shard_bytes: int = 5 * 10**9
) -> None:
    """Writes a model as a folder that `slam_jax.load` takes.

    A language model is written in the form of its publisher, which other libraries read as well.
    A SLAM v3 has config.json, weights under our names, a tokenizer and a model card; published
    parts inside it are written too, so that nothing else is needed. Adapters of LoRA are merged.

    Args:
      loaded: what `slam_jax.load` returned; a `ModelAndTokenizer`; or a language model alone, which
        is written without a tokenizer.
      dtype: of the stored weights of a SLAM v3, None = as they are. A language model keeps its own,
        and so does a model of `slam_jax.quantize`.

    Raises:
      InputError: the folder is not empty, the model was never published in such a form, or a weight
        is too large for the dtype.
      WriteError: the folder cannot be written; nothing is left behind.
    """
    if isinstance(loaded, Loaded):
        loaded, aux = merged(loaded), loaded.aux_format
        about = Trained(
            config=loaded.config,
            step=loaded.step,
            max_new_tokens=loaded.max_new_tokens,
            aux=None if aux is None else aux.to_json(),
            tokenizer=loaded.tokenizer.to_json(),
            weights=weights_of(loaded.model),
        )
        stored = loaded.model.config.param_dtype
        if about.weights != "float32":
            stored = about.weights
            require(dtype is None, "dtype", dtype, f"None, since the weights are {stored}")
        card = make_card(loaded, "", None, None, dtype or stored)
        weights = by_name(split_model(loaded.model)[1])
        write_folder(folder, about, weights, card, dtype=dtype, max_shard_bytes=max_shard_bytes)
        return
    files: dict[str, str] = {}
    model = loaded
    if isinstance(loaded, ModelAndTokenizer):
        model, tokenizer = loaded.model, loaded.tokenizer
        hub = HubTokenizer.of(tokenizer) if isinstance(tokenizer, Tokenizer) else tokenizer
        files = {**hub.to_files(), CARD: _card(model)}
    pretrained.save_pretrained(model, folder, max_shard_bytes=max_shard_bytes, files=files)


def merged(loaded: Loaded) -> Loaded:
    """The same model with its adapters merged, and without them in its configuration."""
    if not loaded.config["model"].get("lora", {}).get("rank"):
        return loaded
    off = as_json(dataclasses.asdict(LoraConfig()))
    config = {**loaded.config, "model": {**loaded.config["model"], "lora": off}}
    return loaded._replace(model=merge_lora(loaded.model), config=config)


def _card(model: Any) -> str:
    count = sum(x.size for x in by_name(split_model(model)[1]).values())
    return (
        f"# {type(model).__name__}\n\n{count:,} parameters, written by slam_jax in the form of the "
        'publisher.\n\n```python\nimport slam_jax\n\nloaded = slam_jax.load("FOLDER")\n```\n'
    )
