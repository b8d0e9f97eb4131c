"""The diagrams of one layer of the processes and of one layer of the decoder."""

from slam_jax.reporting.diagrams.canvas import STREAMS, Canvas, Number, find, shape
from slam_jax.reporting.diagrams.shapes import Shapes
from slam_jax.slam_v3 import SlamV3


def draw_process_layer(model: SlamV3, s: Shapes) -> str:
    canvas, path = Canvas(model), "processes.stack.layers.0"
    sizes, step, y = [stream.tokens.shape[1] for stream in s.streams], 126, 84
    canvas.text(50, 25, f"tokens x of all streams {shape(s.x)}", "shape", "start")
    _draw_legend(canvas, 296, 46)
    canvas.arrow((40, 16), (40, y + 3 * step + 8))
    canvas.module("processes.stack.instruction", 62, 34, 88, 36, kind="process")
    canvas.arrow((62, 52), (48, 52))
    canvas.plus(40, 52)
    attention = ("query", "key", "value", "out")
    rows = (
        ("isolated", f"{path}.isolated", attention, "isolated attention: own stream"),
        ("shared", path, ("query", "query_bias", "out"), "shared attention: the bank"),
        ("mlp", f"{path}.mlp", ("gate", "up", "down"), "MLP: each token by itself"),
    )
    for i, (kind, where, maps, label) in enumerate(rows):
        top = y + i * step
        _draw_sublayer(canvas, top, f"{path}.norms.{i}", 116, label, "process")
        for j, name in enumerate(maps):
            x = 160 + 94 * (j % 2)
            _draw_map(canvas, f"{where}.{name}", x, top + 26 + 44 * (j // 2), 88, "process")
        _draw_mask(canvas, 352, top + 27, sizes, kind)
    canvas.box(254, y + step + 70, 88, 38, "cache")
    canvas.text(298, y + step + 86, "bank K, V", "title")
    canvas.text(298, y + step + 99, shape(s.k), "small")
    end = y + 3 * step + 8
    canvas.module("processes.stack.norm", 10, end, 60, 36, kind="process")
    canvas.arrow((70, end + 18), (92, end + 18))
    canvas.text(98, end + 22, f"outputs y {shape(s.y)}", "shape", "start")
    return canvas.svg(
        end + 48,
        "One layer of the four processes",
        "Isolated attention, in which a token reads the tokens of its own stream; shared "
        "attention, in which it reads the bank, which has all streams; and an MLP. Each is added "
        "to the state.",
    )


def _draw_legend(canvas: Canvas, x: Number, y: Number) -> None:
    for i, name in enumerate(STREAMS):
        canvas.box(x + 52 * i, y - 8, 9, 9, f"plain fill-{name} half", 0)
        canvas.text(x + 12 + 52 * i, y, name, "small", "start")
    canvas.text(x, y + 15, "a row reads the columns", "small", "start")


def _draw_sublayer(
    canvas: Canvas, y: Number, norm: str, height: Number, label: str, kind: str = "box"
) -> None:
    """A norm, an empty box for what it is given to, and the way back to the residual stream."""
    canvas.module(norm, 58, y, 64, 36, kind=kind, label=norm.rpartition("layers.0.")[2])
    canvas.arrow((40, y + 18), (58, y + 18))
    canvas.arrow((122, y + 18), (150, y + 18))
    canvas.box(150, y, 300, height, "group")
    canvas.text(160, y + 16, label, "title", "start")
    canvas.arrow((150, y + height - 18), (48, y + height - 18))
    canvas.plus(40, y + height - 18)


def _draw_map(
    canvas: Canvas,
    path: str,
    x: Number,
    y: Number,
    w: Number,
    kind: str = "box",
    height: Number = 38,
) -> None:
    """A linear map or a single parameter, with the shape of its kernel."""
    part = find(canvas.model, path)
    note = shape(getattr(part, "kernel", part)) if hasattr(part, "kernel") else shape(part)
    canvas.module(path, x, y, w, height, note, kind=kind, counted=False)


def _draw_mask(canvas: Canvas, x: Number, y: Number, sizes: list[int], kind: str) -> None:
    """Which tokens (rows) read which tokens (columns), coloured by stream."""
    side, start = 82.0, 0.0
    for name, size in zip(STREAMS, sizes, strict=True):
        width = side * size / sum(sizes)
        top, height = (start, width) if kind == "isolated" else (0.0, side)
        if kind != "mlp":
            canvas.box(x + start, y + top, width, height, f"plain fill-{name} half", 0)
        start += width
    if kind == "mlp":
        canvas.diagonal(x, y, side)
    canvas.box(x, y, side, side, "frame", 0)


def draw_decoder_layer(model: SlamV3, s: Shapes) -> str:
    canvas, path, config = Canvas(model), "decoder.layers.0", model.config
    first, second, third = 34, 34 + 274, 34 + 274 + 88
    canvas.text(
        50, 25, f"states h [1, 1, {s.tokens.shape[-1]}, {config.embed_dim}]", "shape", "start"
    )
    canvas.arrow((40, 16), (40, third + 96))
    _draw_sublayer(canvas, first, f"{path}.norms.0", 264, "attention: latent, to the text so far")
    _draw_latent_attention(canvas, model, s, first)
    _draw_sublayer(canvas, second, f"{path}.norms.1", 78, "memory_attention")
    canvas.text(442, second + 16, f"memory {shape(s.memory)}", "small", "end")
    for i, name in enumerate(("q", "k_up", "v_up", "out")):
        at = f"{path}.memory_attention.{name}"
        _draw_map(canvas, at, 158 + 72 * i, second + 26, 68)
    _draw_sublayer(canvas, third, f"{path}.norms.2", 78, "mlp: SwiGLU")
    for i, name in enumerate(("gate", "up", "down")):
        _draw_map(canvas, f"{path}.mlp.{name}", 158 + 72 * i, third + 26, 68)
    return canvas.svg(
        third + 108,
        "One layer of the decoder and its cache",
        "Latent attention to the text so far, attention to the memory, and an MLP. The cache has a "
        "latent and a rotated key for each token, from which the keys and values of all heads are "
        "computed. Plain attention would cache these keys and values.",
    )


def _draw_latent_attention(canvas: Canvas, model: SlamV3, s: Shapes, y: Number) -> None:
    """The maps of the attention, the cache, and what plain attention would cache, to scale."""
    config, path = model.config, "decoder.layers.0.attention"
    low_rank = config.q_lora_rank is not None
    names = (*["q_down"] * low_rank, "q_nope", "q_rope")
    w = 142 / len(names) - 4
    for i, name in enumerate(names):
        _draw_map(canvas, f"{path}.{name}", 158 + (w + 4) * i, y + 26, w)
    _draw_map(canvas, f"{path}.kv_down", 312, y + 26, 66)
    _draw_map(canvas, f"{path}.k_rope", 382, y + 26, 60)
    canvas.module(f"{path}.kv_norm", 312, y + 74, 66, 26, counted=False)
    canvas.arrow((345, y + 64), (345, y + 74))
    top, depth = y + 116, 72.0
    capacity, used = s.cache.c_kv.shape[-2], s.tokens.shape[-1]
    heads = config.num_heads * config.head_dim
    latent, rope = s.cache.c_kv.shape[-1], s.cache.k_rope.shape[-1]
    scale = 138 / (2 * heads)
    canvas.arrow((345, y + 100), (345, top - 2), kind="bank")
    canvas.arrow((412, y + 64), (412, top - 2), kind="bank")
    row = depth / capacity
    for x, numbers, kind in (
        (158, heads, "line"),
        (158 + 69 + 2, heads, "line"),
        (345 - scale * latent / 2, latent, "cache"),
        (412 - scale * rope / 2, rope, "cache"),
    ):
        canvas.box(x, top, scale * numbers, row * used, f"plain fill-{kind} half", 0)
        canvas.box(x, top, scale * numbers, depth, f"plain fill-{kind} pale", 0)
    canvas.text(228, top + depth + 14, f"K, V of plain attention: {2 * heads}", "small")
    canvas.text(345, top + depth + 14, f"c_kv {latent}", "small")
    canvas.text(412, top + depth + 14, f"k_rope {rope}", "small")
    for i, name in enumerate(("k_up", "v_up", "out")):
        _draw_map(canvas, f"{path}.{name}", 158 + 96 * i, y + 216, 92)
