"""Every language model by name, with its presets by name.

`seed` is the size of the published comparison: width 512, 16 heads, MLPs of 2,048, a vocabulary of
10,000, 6 layers (5 blocks in SLAM v4 to v6). The fields that the comparison does not state
(experts, ranks, groups) are set near the proportions of the published models. `small` is half as
wide, for training on a laptop; `tiny` is for tests.
The other presets are published models.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from flax import nnx

from slam_jax.errors import ConfigError, check_names, shorten
from slam_jax.language_models.config import LanguageModelConfig
from slam_jax.language_models.deepseek_v2 import DeepseekV2, DeepseekV2Config
from slam_jax.language_models.hunyuan_large import HunyuanLarge, HunyuanLargeConfig
from slam_jax.language_models.hunyuan_v1_moe import HunyuanV1MoE, HunyuanV1MoEConfig
from slam_jax.language_models.jamba import Jamba, JambaConfig
from slam_jax.language_models.moe import MoE, MoEConfig
from slam_jax.language_models.slam_v3_text import SlamV3Text, SlamV3TextConfig
from slam_jax.language_models.slam_v4 import SlamV4, SlamV4Config
from slam_jax.language_models.slam_v4_champion import SlamV4Champion, SlamV4ChampionConfig
from slam_jax.language_models.slam_v5 import SlamV5, SlamV5Config
from slam_jax.language_models.slam_v6 import SlamV6, SlamV6Config
from slam_jax.language_models.standard import Standard, StandardConfig
from slam_jax.layers.rotary import Rope, Yarn


class System(NamedTuple):
    """title: as in the published comparison. presets: fields of the config by preset."""

    title: str
    config: type[LanguageModelConfig]
    model: Callable[..., nnx.Module]
    presets: Mapping[str, Mapping[str, Any]]


_BFLOAT16 = dict(param_dtype="bfloat16", dtype="bfloat16")
_SEED = dict(vocab_size=10_000, embed_dim=512, mlp_dim=2_048, num_heads=16)
_SEED_LAYERS = dict(**_SEED, num_layers=6)
_SEED_LATENT = dict(kv_lora_rank=128, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32)
_SMALL = dict(vocab_size=2_048, embed_dim=256, mlp_dim=768, num_heads=8, context_length=1_024)
_SMALL_LAYERS = dict(**_SMALL, num_layers=4)
_SMALL_LATENT = dict(kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32)
_TINY = dict(vocab_size=61, embed_dim=32, mlp_dim=48, num_heads=4, context_length=64)
_TINY_LAYERS = dict(**_TINY, num_layers=3)
_TINY_LATENT = dict(kv_lora_rank=12, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6)

_JAMBA = dict(vocab_size=65_536, num_kv_heads=8, context_length=262_144, **_BFLOAT16)
_GROUPS = dict(num_experts=8, num_groups=4, top_groups=2)
_DEEPSEEK = dict(vocab_size=102_400, kv_lora_rank=512, context_length=163_840, **_BFLOAT16)
_DEEPSEEK_V2 = (
    dict(**_DEEPSEEK, embed_dim=5_120, mlp_dim=12_288, num_layers=60, num_heads=128)
    | dict(q_lora_rank=1_536, expert_dim=1_536, num_experts=160, num_groups=8, top_groups=3)
    | dict(routed_scale=16.0)
)


def _yarn(mscale: float) -> Rope:
    """Stretches 4,096 tokens 40 times, with DeepSeek's temperature."""
    yarn = Yarn(40.0, 4_096, mscale=mscale, mscale_all_dim=mscale)
    return Rope(interleaved=True, yarn=yarn)


SYSTEMS: dict[str, System] = {
    "slam_v6": System(
        "SLAM V6 Jamba killer",
        SlamV6Config,
        SlamV6,
        {"seed": _SEED, "small": _SMALL, "tiny": _TINY},
    ),
    "jamba": System(
        "Jamba 1.5",
        JambaConfig,
        Jamba,
        {
            "seed": dict(**_SEED_LAYERS, num_kv_heads=4, num_experts=8),
            "small": dict(**_SMALL_LAYERS, num_kv_heads=4, num_experts=4)
            | dict(attention_period=4, attention_offset=2),
            "tiny": dict(**_TINY, num_layers=4, num_kv_heads=2, num_experts=4, state_dim=4)
            | dict(attention_period=4, attention_offset=2),
            "mini_1.5": dict(**_JAMBA, embed_dim=4_096, mlp_dim=14_336)
            | dict(num_layers=32, num_heads=32),
            "large_1.5": dict(**_JAMBA, embed_dim=8_192, mlp_dim=24_576)
            | dict(num_layers=72, num_heads=64),
        },
    ),
    "deepseek_v2": System(
        "DeepSeek V2.5",
        DeepseekV2Config,
        DeepseekV2,
        {
            "seed": dict(**_SEED_LAYERS, **_SEED_LATENT, **_GROUPS)
            | dict(expert_dim=512, q_lora_rank=192, num_experts_per_token=2),
            "small": dict(**_SMALL_LAYERS, **_SMALL_LATENT, **_GROUPS)
            | dict(expert_dim=192, q_lora_rank=96, num_experts_per_token=2),
            "tiny": dict(**_TINY_LAYERS, **_TINY_LATENT, **_GROUPS)
            | dict(expert_dim=12, q_lora_rank=20, num_experts_per_token=3, routed_scale=2.0),
            "v2": dict(**_DEEPSEEK_V2, rope=_yarn(0.707)),
            "v2.5": dict(**_DEEPSEEK_V2, rope=_yarn(1.0)),
            "v2_lite": dict(**_DEEPSEEK, embed_dim=2_048, mlp_dim=10_944, expert_dim=1_408)
            | dict(num_layers=27, num_heads=16, rope=_yarn(0.707)),
        },
    ),
    "hunyuan_large": System(
        "Hunyuan Large",
        HunyuanLargeConfig,
        HunyuanLarge,
        {
            "seed": dict(**_SEED_LAYERS, num_kv_heads=2, num_experts=8),
            "small": dict(**_SMALL_LAYERS, num_kv_heads=2, num_experts=4),
            "tiny": dict(**_TINY_LAYERS, num_kv_heads=2, num_experts=4),
            "large": dict(vocab_size=128_512, embed_dim=6_400, mlp_dim=18_304, num_layers=64)
            | dict(num_heads=80, num_kv_heads=8, head_dim=80, rope=Rope(ntk_alpha=100_000.0))
            | dict(context_length=262_144, **_BFLOAT16),
        },
    ),
    "slam_v4_champion": System(
        "SLAM V4 Champion",
        SlamV4ChampionConfig,
        SlamV4Champion,
        {"seed": _SEED, "small": _SMALL, "tiny": _TINY},
    ),
    "slam_v5": System(
        "SLAM V5",
        SlamV5Config,
        SlamV5,
        {
            "seed": dict(**_SEED, **_SEED_LATENT),
            "small": dict(**_SMALL, **_SMALL_LATENT),
            "tiny": dict(**_TINY, **_TINY_LATENT),
        },
    ),
    "slam_v4": System(
        "SLAM V4", SlamV4Config, SlamV4, {"seed": _SEED, "small": _SMALL, "tiny": _TINY}
    ),
    "standard": System(
        "Standard Transformer",
        StandardConfig,
        Standard,
        {
            "seed": _SEED_LAYERS,
            "small": dict(**_SMALL_LAYERS, num_kv_heads=4),
            "tiny": dict(**_TINY_LAYERS, num_kv_heads=2),
        },
    ),
    "moe": System(
        "MoE Transformer",
        MoEConfig,
        MoE,
        {
            "seed": _SEED_LAYERS,
            "small": dict(**_SMALL_LAYERS, num_kv_heads=4, num_experts=4),
            "tiny": dict(**_TINY_LAYERS, num_kv_heads=2, num_experts=4),
        },
    ),
    "slam_v3_text": System(
        "SLAM V3, text alone",
        SlamV3TextConfig,
        SlamV3Text,
        {
            "seed": _SEED,
            "small": dict(**_SMALL, kv_lora_rank=64),
            "tiny": dict(**_TINY, kv_lora_rank=12, text_window=8),
        },
    ),
    "hunyuan_v1_moe": System(
        "Hunyuan A13B",
        HunyuanV1MoEConfig,
        HunyuanV1MoE,
        {
            "small": dict(**_SMALL_LAYERS, num_kv_heads=4, num_experts=4, num_experts_per_token=2),
            "tiny": dict(**_TINY_LAYERS, num_kv_heads=2, num_experts=4, num_experts_per_token=2),
        },
    ),
}

# The nine systems of the published comparison, in its order.
ROCKET = (
    "slam_v6",
    "slam_v4_champion",
    "slam_v5",
    "slam_v4",
    "moe",
    "standard",
    "jamba",
    "deepseek_v2",
    "hunyuan_large",
)


def make_config(name: str, preset: str = "seed", **changes: Any) -> Any:
    """The configuration of a system: a preset with some fields changed.

    Raises ConfigError for an unknown system, preset or field.
    """
    if name not in SYSTEMS:
        check_names([name], list(SYSTEMS), "the registry of language models")
    system = SYSTEMS[name]
    if preset not in system.presets:
        known = ", ".join(system.presets)
        raise ConfigError(f"preset is {shorten(repr(preset))}; {name} has {known}")
    fields = list(system.config.__dataclass_fields__)
    check_names(changes, fields, system.config.__name__)
    return system.config(**{**system.presets[preset], **changes})


def make_model(config: Any, *, rngs: nnx.Rngs) -> Any:
    """The model of a configuration, with random parameters."""
    for system in SYSTEMS.values():
        if type(config) is system.config:
            return system.model(config, rngs=rngs)
    raise ConfigError(f"config is a {type(config).__name__}; expected one that make_config returns")
