"""New random models of the publishers' own code against ours: forward, cached decode, gradients.

Needs the extra `peers` (torch and transformers); without them it is skipped.
"""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from slam_jax.interop import load_pretrained, save_pretrained
from slam_jax.language_models import make_config, make_model
from slam_jax.training.losses import language_model_loss

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")

SIZES = dict(
    vocab_size=101,
    hidden_size=48,
    intermediate_size=56,
    num_attention_heads=6,
    max_position_embeddings=4_096,
    pad_token_id=None,
)
MAMBA = dict(mamba_d_state=5, mamba_dt_rank=7, mamba_d_conv=3, use_mamba_kernels=False)
YARN = dict(
    rope_type="yarn",
    rope_theta=10_000.0,
    factor=4.0,
    original_max_position_embeddings=16,
    beta_fast=4.0,
    beta_slow=1.0,
    mscale=0.707,
    mscale_all_dim=0.707,
)
LATENT = dict(
    kv_lora_rank=20,
    q_lora_rank=28,
    qk_nope_head_dim=8,
    qk_rope_head_dim=6,
    v_head_dim=10,
    moe_intermediate_size=24,
    n_routed_experts=12,
    n_shared_experts=3,
    num_experts_per_tok=3,
    first_k_dense_replace=1,
)
PAIRS = [1.0, 1.1, 1.3, 1.7]  # LongRoPE has a factor for each pair of features
LONG = dict(rope_type="longrope", rope_theta=1e4, short_factor=PAIRS, long_factor=[9.0] * 4)
HALF = dict(num_hidden_layers=4, use_sliding_window=True, sliding_window=12, max_window_layers=2)
LIMITED = dict(topk_method="group_limited_greedy", n_group=4, topk_group=2)
PEERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", dict(num_hidden_layers=3, num_key_value_heads=2)),
    "llama yarn tied": (
        "Llama",
        dict(
            num_hidden_layers=2,
            num_key_value_heads=6,
            tie_word_embeddings=True,
            head_dim=10,
            rope_parameters={k: v for k, v in YARN.items() if "mscale" not in k},
        ),
    ),
    "llama biases linear": (
        "Llama",
        dict(
            num_hidden_layers=2,
            num_key_value_heads=2,
            attention_bias=True,
            mlp_bias=True,
            rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=3.0),
        ),
    ),
    "llama dynamic": (
        "Llama",
        dict(
            num_hidden_layers=2,
            rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=3.0),
        ),
    ),
    "llama longrope": (
        "Llama",
        dict(num_hidden_layers=2, original_max_position_embeddings=2_048, rope_parameters=LONG),
    ),
    "mistral": ("Mistral", dict(num_hidden_layers=3, num_key_value_heads=2, sliding_window=9)),
    "qwen2": ("Qwen2", dict(num_key_value_heads=2, **HALF)),
    "qwen3": ("Qwen3", dict(num_key_value_heads=2, head_dim=10, attention_bias=True, **HALF)),
    "hunyuan_v1_dense": (
        "HunYuanDenseV1",
        dict(
            num_hidden_layers=3,
            num_key_value_heads=2,
            head_dim=8,
            rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, alpha=50.0, factor=1.0),
        ),
    ),
    "jamba with one expert": (
        "Jamba",
        dict(
            **MAMBA,
            num_hidden_layers=4,
            num_key_value_heads=3,
            attn_layer_period=2,
            attn_layer_offset=1,
            num_experts=1,
            num_experts_per_tok=2,
        ),
    ),
    "deepseek_v3": (
        "DeepseekV3",
        dict(
            **LATENT,
            num_key_value_heads=6,
            num_hidden_layers=3,
            n_group=4,
            topk_group=2,
            routed_scaling_factor=1.7,
        ),
    ),
    "deepseek_v3 halves": (
        "DeepseekV3",
        dict(
            **LATENT,
            num_key_value_heads=6,
            num_hidden_layers=2,
            n_group=1,
            topk_group=1,
            norm_topk_prob=False,
            rope_interleave=False,
            rope_parameters=YARN,
        ),
    ),
    "mixtral": (
        "Mixtral",
        dict(num_hidden_layers=3, num_key_value_heads=3, num_local_experts=5, sliding_window=None),
    ),
    "jamba": (
        "Jamba",
        dict(
            **MAMBA,
            num_hidden_layers=6,
            num_key_value_heads=3,
            attn_layer_period=3,
            attn_layer_offset=1,
            num_experts=5,
            num_experts_per_tok=2,
        ),
    ),
    "deepseek_v2": (
        "DeepseekV2",
        dict(**LATENT, **LIMITED, num_hidden_layers=3, routed_scaling_factor=1.7),
    ),
    "deepseek_v2 lite": (
        "DeepseekV2",
        dict(**{**LATENT, "q_lora_rank": None}, topk_method="greedy", num_hidden_layers=2),
    ),
    "deepseek_v2 yarn": (
        "DeepseekV2",
        dict(**LATENT, **LIMITED, num_hidden_layers=2, rope_parameters=YARN),
    ),
    "hunyuan_v1_moe": (
        "HunYuanMoEV1",
        dict(
            num_hidden_layers=3,
            num_key_value_heads=2,
            head_dim=8,
            num_experts=5,
            moe_topk=3,
            rope_parameters=dict(rope_type="dynamic", rope_theta=10_000.0, alpha=50.0, factor=1.0),
        ),
    ),
}


def make(name: str) -> Any:
    """A model of the publisher's code; no parameter has a value that would hide it."""
    prefix, fields = PEERS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{prefix}Config")(**{**SIZES, **fields})
    config._attn_implementation = "eager"
    theirs = getattr(transformers, f"{prefix}ForCausalLM")(config)
    with torch.no_grad():
        for path, p in theirs.named_parameters():
            norm = "norm" in path
            p.copy_(
                norm + torch.randn(p.shape) * (0.2 if norm or p.ndim < 2 else p.shape[-1] ** -0.5)
            )
    return theirs.eval()


# Together these have latent attention, grouped queries, routed and shared experts, YaRN and NTK.
FAST = ("deepseek_v2 yarn", "hunyuan_v1_moe")


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in PEERS],
)
def pair(request, tmp_path_factory) -> tuple[Any, Any]:
    """A model of theirs, and ours, read from the folder that they saved."""
    theirs = make(request.param)
    folder = tmp_path_factory.mktemp("peer")
    theirs.save_pretrained(folder)
    ours, _ = load_pretrained(folder)
    return theirs, ours


def tokens(rows: int = 2, length: int = 40) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 101, (rows, length))


def close(x: Any, y: Any, tolerance: float = 2e-4) -> None:
    y = y.detach().numpy() if hasattr(y, "detach") else y
    np.testing.assert_allclose(x, y, atol=tolerance, rtol=tolerance)


def test_the_forward_pass_is_theirs_far_beyond_the_first_positions(pair):
    theirs, ours = pair
    text = tokens()
    with torch.no_grad():
        expected = theirs(torch.tensor(text)).logits
    assert expected.std() > 0.2
    close(jax.jit(lambda m, t: m(t).logits)(ours, text), expected)


def test_left_padded_rows_are_theirs(pair):
    theirs, ours = pair
    text, mask = tokens(), np.arange(40) >= np.array([[11], [0]])
    with torch.no_grad():
        positions = torch.tensor(np.maximum(mask.cumsum(-1) - 1, 0))
        arguments = dict(attention_mask=torch.tensor(mask).long(), position_ids=positions)
        if theirs.config.model_type == "jamba":
            del arguments["position_ids"]
        expected = theirs(torch.tensor(text), **arguments).logits.numpy()
    found = jax.jit(lambda m, t, mask: m(t, mask).logits)(ours, text, mask)
    close(found[0, 11:], expected[0, 11:])
    close(found[1], expected[1])


def test_the_cached_decode_is_theirs(pair):
    theirs, ours = pair
    text, start = tokens(), 33
    with torch.no_grad():
        past = theirs(torch.tensor(text[:, :start]), use_cache=True)
        logits, cache = ours.prefill(text[:, :start], ours.init_cache((2,), 40))
        close(logits, past.logits)
        step = jax.jit(lambda m, t, c: m.decode_step(t, c))
        for t in range(start, 40):
            token = torch.tensor(text[:, t : t + 1])
            past = theirs(token, past_key_values=past.past_key_values, use_cache=True)
            logits, cache = step(ours, text[:, t], cache)
            close(logits, past.logits[:, -1])


def test_gradients_of_the_loss_are_theirs(pair, tmp_path):
    """With the load balance where they have one. Their gradients come in the form of weights."""
    theirs, ours = pair
    text = torch.tensor(tokens())
    # A single expert has no router.
    several = getattr(theirs.config, "num_experts", 2) > 1
    balanced = theirs.config.model_type in ("mixtral", "jamba") and several
    if balanced:
        theirs.config.output_router_logits = True
        theirs.router_aux_loss_coef = theirs.config.router_aux_loss_coef = 0.5
        ours.config = dataclasses.replace(ours.config, balance_loss=0.5)
    theirs.zero_grad()
    output = theirs(text, labels=text)
    output.loss.backward()
    theirs.config.output_router_logits = False

    def loss(model):
        parts = language_model_loss(model, jnp.asarray(text.numpy()))
        aux = 0.0
        if balanced:
            # They balance over all tokens, and the last one has no successor to be wrong about.
            aux = model(jnp.asarray(text.numpy())).aux_loss
        return parts.cross_entropy + aux

    value, gradient = jax.jit(jax.value_and_grad(loss))(ours)
    close(value, output.loss)
    weights = {path: p.detach().clone() for path, p in theirs.named_parameters()}
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(torch.zeros_like(p) if p.grad is None else p.grad)
    theirs.save_pretrained(tmp_path / "gradient")
    with torch.no_grad():
        for path, p in theirs.named_parameters():
            p.copy_(weights[path])
    expected, _ = load_pretrained(tmp_path / "gradient")
    pairs = zip(
        jax.tree_util.tree_leaves_with_path(nnx.state(gradient)),
        jax.tree.leaves(nnx.state(expected)),
        strict=True,
    )
    for (path, mine), reference in pairs:
        scale = np.abs(reference).max()
        # An expert that nobody chose has none, and the bias of the choice never has.
        name = jax.tree_util.keystr(path)
        assert scale > 1e-5 or "experts" in name or "choice_bias" in name
        assert np.abs(mine - reference).max() <= 2e-3 * scale, name


def test_they_open_what_we_save(pair, tmp_path):
    theirs, ours = pair
    save_pretrained(ours, tmp_path / "ours", max_shard_bytes=100_000)
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    kind = getattr(transformers, config["architectures"][0])
    again, loading = kind.from_pretrained(
        tmp_path / "ours", output_loading_info=True, dtype=torch.float32, use_safetensors=True
    )
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    text = torch.tensor(tokens())
    with torch.no_grad():
        expected, found = theirs(text).logits, again.eval()(text).logits
    close(found.numpy(), expected, 1e-5)


def test_they_open_a_model_whose_head_width_follows_from_its_heads(tmp_path):
    """Their code for it takes a missing width for a number."""
    config = make_config("hunyuan_v1_moe", "tiny", head_dim=None)
    save_pretrained(make_model(config, rngs=nnx.Rngs(0)), tmp_path)
    theirs = transformers.HunYuanMoEV1ForCausalLM.from_pretrained(tmp_path)
    assert theirs.config.head_dim == config.embed_dim // config.num_heads
