"""Published names and axes of the tensors of language models, as tables of their parts."""

from slam_jax.interop.tensors import Row, Table

# Patterns of einops, from our axes to the published ones. PyTorch has the outputs of a map first.
VECTOR, TABLE = "d -> d", "v d -> v d"
LINEAR, STACKED = "i o -> o i", "e i o -> e o i"
HEADS_IN, HEADS_OUT = "d n h -> (n h) d", "n h d -> d (n h)"


def model(*layer: Table, norm: str = "model.norm") -> Table:
    """The tensors of a whole model, from those of a layer."""
    top = {
        "model.embed_tokens.weight": Row("embedding.embedding", TABLE),
        f"{norm}.weight": Row("norm.scale", VECTOR),
        "lm_head.weight": Row("head.kernel", LINEAR),
    }
    return top | {f"model.layers.{{i}}.{k}": row for table in layer for k, row in table.items()}


def norms(**names: str) -> Table:
    """names: our norms by their published names."""
    return {f"{theirs}.weight": Row(f"{ours}.scale", VECTOR) for theirs, ours in names.items()}


def attention(ours: str = "attention", keys: str | None = None) -> Table:
    """keys: where our keys and values are, None = in the attention. Biases are read where our model
    has them."""
    keys = keys or ours
    return {
        "self_attn.q_proj.bias": Row(f"{ours}.query.bias", "n h -> (n h)"),
        "self_attn.k_proj.bias": Row(f"{keys}.key.bias", "n h -> (n h)"),
        "self_attn.v_proj.bias": Row(f"{keys}.value.bias", "n h -> (n h)"),
        "self_attn.o_proj.bias": Row(f"{ours}.out.bias", VECTOR),
        "self_attn.q_proj.weight": Row(f"{ours}.query.kernel", HEADS_IN),
        "self_attn.k_proj.weight": Row(f"{keys}.key.kernel", HEADS_IN),
        "self_attn.v_proj.weight": Row(f"{keys}.value.kernel", HEADS_IN),
        "self_attn.o_proj.weight": Row(f"{ours}.out.kernel", HEADS_OUT),
    }


def gated(theirs: str, ours: str = "mlp") -> Table:
    parts = ("gate", "up", "down")
    biases = {f"{theirs}.{p}_proj.bias": Row(f"{ours}.{p}.bias", VECTOR) for p in parts}
    return biases | {f"{theirs}.{p}_proj.weight": Row(f"{ours}.{p}.kernel", LINEAR) for p in parts}


def experts(
    mlp: str,
    router: str = "gate",
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    fused_mlp: str | None = None,
) -> Table:
    """The router and the experts; one tensor for each expert as on the hub, or for all experts of a
    layer as transformers 5 has them in memory.

    names: the published names of gate, up and down. fused_mlp: instead of `mlp` in fused files.
    """
    is_fused, is_not = (lambda _, fused: fused), (lambda _, fused: not fused)
    scores = "mlp.router.scores.kernel"
    gate, up, down = ours = [f"mlp.experts.{part}.kernel" for part in ("gate", "up", "down")]
    rows = {
        f"{mlp}.{router}.weight": Row(scores, LINEAR, lambda _, fused: not fused or not fused_mlp),
        f"{fused_mlp or mlp}.experts.gate_up_proj": Row(f"{gate} {up}", STACKED, is_fused),
        f"{fused_mlp or mlp}.experts.down_proj": Row(down, STACKED, is_fused),
    }
    for name, path in zip(names, ours, strict=True):
        rows[f"{mlp}.experts.{{e}}.{name}.weight"] = Row(path, LINEAR, is_not)
    if fused_mlp:
        rows[f"{fused_mlp}.{router}.weight"] = Row(scores, LINEAR, is_fused)
    return rows


PRE_NORMS = norms(input_layernorm="attention_norm", post_attention_layernorm="mlp_norm")
STANDARD = model(PRE_NORMS, attention(), gated("mlp"))


def qk_norms(queries: str, keys: str) -> Table:
    return {
        f"self_attn.{queries}.weight": Row("attention.q_norm.scale", VECTOR),
        f"self_attn.{keys}.weight": Row("attention.k_norm.scale", VECTOR),
    }


QK_NORMS = qk_norms("query_layernorm", "key_layernorm")
_QUERIES = "attention.q_nope.kernel attention.q_rope.kernel"
_LATENT_ATTENTION = {
    "self_attn.q_proj.weight": Row(_QUERIES, HEADS_IN, lambda c, _: c.q_lora_rank is None),
    "self_attn.q_a_proj.weight": Row("attention.q_down.kernel", LINEAR),
    "self_attn.q_a_layernorm.weight": Row("attention.q_norm.scale", VECTOR),
    "self_attn.q_b_proj.weight": Row(_QUERIES, HEADS_IN, lambda c, _: c.q_lora_rank is not None),
    "self_attn.kv_a_proj_with_mqa.weight": Row(
        "attention.kv_down.kernel attention.k_rope.kernel", LINEAR
    ),
    "self_attn.kv_a_layernorm.weight": Row("attention.kv_norm.scale", VECTOR),
    "self_attn.kv_b_proj.weight": Row("attention.k_up.kernel attention.v_up.kernel", HEADS_IN),
    "self_attn.o_proj.weight": Row("attention.out.kernel", HEADS_OUT),
}
MAMBA = {
    "mamba.in_proj.weight": Row("mixer.value.kernel mixer.gate.kernel", LINEAR),
    "mamba.in_proj.bias": Row("mixer.value.bias mixer.gate.bias", VECTOR),
    "mamba.conv1d.weight": Row("mixer.conv_filter", "w i -> i 1 w"),
    "mamba.conv1d.bias": Row("mixer.conv_bias", VECTOR),
    "mamba.x_proj.weight": Row("mixer.dt_down.kernel mixer.b.kernel mixer.c.kernel", LINEAR),
    "mamba.dt_layernorm.weight": Row("mixer.dt_norm.scale", VECTOR),
    "mamba.b_layernorm.weight": Row("mixer.b_norm.scale", VECTOR),
    "mamba.c_layernorm.weight": Row("mixer.c_norm.scale", VECTOR),
    "mamba.dt_proj.weight": Row("mixer.dt_up.kernel", LINEAR),
    "mamba.dt_proj.bias": Row("mixer.dt_up.bias", VECTOR),
    "mamba.A_log": Row("mixer.a_log", TABLE),
    "mamba.D": Row("mixer.skip", VECTOR),
    "mamba.out_proj.weight": Row("mixer.out.kernel", LINEAR),
    "mamba.out_proj.bias": Row("mixer.out.bias", VECTOR),
}

DEEPSEEK = model(
    PRE_NORMS,
    _LATENT_ATTENTION,
    gated("mlp"),
    experts("mlp"),
    {"mlp.gate.e_score_correction_bias": Row("mlp.router.choice_bias", VECTOR)},
    gated("mlp.shared_experts", "mlp.shared"),
)
