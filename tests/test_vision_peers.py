"""New random vision towers of the publishers' own code against ours.

Needs the extra `peers` (torch and transformers); without them it is skipped.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from slam_jax.interop import load_preprocessing, load_vision, save_vision
from slam_jax.vision_models import preprocess

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")

SIZES: dict[str, Any] = dict(
    hidden_size=36, num_hidden_layers=3, num_attention_heads=3, image_size=32, patch_size=8
)
MLP = dict(intermediate_size=40)
TEXT = dict(
    hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=50
)
# The class and its arguments. "Clip" and "Siglip" are whole models.
PEERS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("ViTModel", MLP),
    "vit, no biases": ("ViTForImageClassification", dict(**MLP, qkv_bias=False)),
    "dinov2": ("Dinov2Model", dict(mlp_ratio=2)),
    "dinov2, swiglu": ("Dinov2ForImageClassification", dict(mlp_ratio=4, use_swiglu_ffn=True)),
    "registers": ("Dinov2WithRegistersModel", dict(mlp_ratio=2, num_register_tokens=3)),
    "registers, swiglu": (
        "Dinov2WithRegistersModel",
        dict(hidden_size=30, mlp_ratio=3, use_swiglu_ffn=True),  # 60 hidden units become 64
    ),
    "clip vision": ("CLIPVisionModel", dict(**MLP, hidden_act="gelu")),
    "clip vision, projection": ("CLIPVisionModelWithProjection", MLP),
    "clip": ("CLIPModel", MLP),
    "siglip vision": ("SiglipVisionModel", dict(**MLP, image_size=35, patch_size=10)),
    "siglip": ("SiglipModel", MLP),
}
# Height and width: that of the positions, larger, smaller, and no multiples of a patch.
IMAGES = [(32, 32), (40, 56), (24, 16), (90, 35), (37, 37)]


def make(name: str) -> Any:
    """A model of the publisher's code; no parameter has a value that would hide it."""
    kind, fields = PEERS[name]
    torch.manual_seed(0)
    fields = {**SIZES, **fields}
    model = getattr(transformers, kind)
    if kind in ("CLIPModel", "SiglipModel"):
        config = model.config_class(text_config=TEXT, vision_config=fields)
    else:
        config = model.config_class(**fields)
    theirs = model(config)
    with torch.no_grad():
        for path, p in theirs.named_parameters():
            norm = "norm" in path and p.ndim == 1 and path.endswith("weight")
            p.copy_(norm + torch.randn(p.shape) * (0.3 if p.ndim < 2 else p[0].numel() ** -0.5))
    return theirs.eval()


def tower_of(model: Any) -> Any:
    for name in ("vision_model", "vit", "dinov2", "dinov2_with_registers"):
        model = getattr(model, name, model)
    return model


# Together: registers, gated MLPs, antialiasing, a whole model, a norm before the blocks.
FAST = ("registers, swiglu", "clip")


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in PEERS],
)
def pair(request, tmp_path_factory) -> tuple[Any, Any]:
    theirs = make(request.param)
    folder = tmp_path_factory.mktemp("peer")
    theirs.save_pretrained(folder)
    ours, _ = load_vision(folder)
    return tower_of(theirs), ours


def their_states(theirs: Any, pixels: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """The last hidden state, and all between the blocks."""
    dino = theirs.config.model_type.startswith("dinov2")
    options = {} if dino else dict(interpolate_pos_encoding=True)
    with torch.no_grad():
        output = theirs(
            torch.tensor(pixels.transpose(0, 3, 1, 2)), output_hidden_states=True, **options
        )
    return output.last_hidden_state.numpy(), [x.numpy() for x in output.hidden_states]


def close(found: Any, expected: np.ndarray, tolerance: float = 2e-4) -> None:
    assert expected.std() > 0.2
    bound = tolerance * max(1.0, float(expected.std()))
    np.testing.assert_allclose(found, expected, atol=bound, rtol=0)


@pytest.mark.parametrize("size", IMAGES, ids=str)
def test_states_are_theirs_at_any_size(pair, size):
    theirs, ours = pair
    pixels = np.random.default_rng(0).normal(size=(2, *size, 3)).astype(np.float32)
    last, between = their_states(theirs, pixels)
    close(jax.jit(lambda t, x: t(x))(ours, pixels), last)
    if size == IMAGES[1]:
        first = ours.config.num_prefix_tokens
        state = jax.jit(lambda t, x, layer: t.hidden_state(x, layer), static_argnums=2)
        for layer, expected in enumerate(between):
            close(state(ours, pixels, layer), expected)
        close(ours.patches(pixels, -2), between[-2][:, first:])


def test_they_open_what_we_save(pair, tmp_path):
    theirs, ours = pair
    save_vision(ours, tmp_path / "ours")
    options = dict(add_pooling_layer=False) if theirs.config.model_type == "vit" else {}
    again, loading = type(theirs).from_pretrained(
        tmp_path / "ours", output_loading_info=True, dtype=torch.float32, **options
    )
    # The token of masked pre-training is not part of a tower; this class has it always.
    assert set(loading["missing_keys"]) <= {"embeddings.mask_token"}
    assert not loading["unexpected_keys"] and not loading["mismatched_keys"]
    if theirs.config.model_type != "dinov2_with_registers":
        assert not loading["missing_keys"]
    pixels = np.random.default_rng(1).normal(size=(1, 32, 32, 3)).astype(np.float32)
    close(their_states(again.eval(), pixels)[0], their_states(theirs, pixels)[0], 1e-6)


def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    shapes = ((90, 120, 3), (300, 50, 3), (31, 17, 3), (224, 225, 3), (60, 80, 4))
    return [Image.fromarray(rng.integers(0, 256, shape, np.uint8)) for shape in shapes]


@pytest.mark.parametrize(
    ("kind", "prefix", "options"),
    [
        ("vit", "ViT", {}),
        ("clip_vision_model", "CLIP", {}),
        ("siglip_vision_model", "Siglip", {}),
        ("dinov2", "Bit", dict(size={"shortest_edge": 256}, image_mean=[0.485, 0.456, 0.406])),
        ("dinov2", "Bit", dict(do_resize=False, crop_size={"height": 61, "width": 100})),
        ("vit", "ViT", dict(size={"height": 20, "width": 33}, resample=1, do_normalize=False)),
        ("clip_vision_model", "CLIP", dict(do_center_crop=False, do_rescale=False)),
    ],
)
def test_pictures_are_prepared_as_theirs_are(kind, prefix, options, tmp_path):
    theirs = getattr(transformers, f"{prefix}ImageProcessorPil")(do_convert_rgb=True, **options)
    theirs.save_pretrained(tmp_path)
    Path(tmp_path, "config.json").write_text(f'{{"model_type": "{kind}"}}')
    how = load_preprocessing(tmp_path)
    for picture in pictures():
        expected = theirs(picture, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
        np.testing.assert_allclose(preprocess(picture, how), expected, atol=1e-5, rtol=1e-6)
