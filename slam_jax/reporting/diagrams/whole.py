"""The diagram of the whole model, from the inputs to the next token."""

from typing import Any

from slam_jax.reporting.diagrams.canvas import STREAMS, WIDTH, Canvas, Number, shape
from slam_jax.reporting.diagrams.shapes import Shapes
from slam_jax.slam_v3 import SlamV3

_MARGIN = 20.0
_INNER = WIDTH - 2 * _MARGIN


def draw_model(model: SlamV3, s: Shapes) -> str:
    canvas = Canvas(model)
    y = _draw_streams(canvas, model, s)
    y = _draw_joint_block(canvas, s, y)
    y = _draw_processes(canvas, model, s, y)
    y = _draw_fusion(canvas, model, s, y)
    y = _draw_decoder(canvas, model, s, y)
    return canvas.svg(
        y,
        "SLAM v3 from inputs to answer",
        "Text, image and auxiliary vectors become streams of tokens. A joint block reads all of "
        "them and computes a bank of keys and values. Four processes run in parallel over the "
        "tokens and read the bank. The fusion adds their outputs to the tokens, the memory bank "
        "compresses the result to the memory, and the decoder answers from it.",
    )


def _draw_streams(canvas: Canvas, model: SlamV3, s: Shapes) -> Number:
    """The inputs and what makes streams of them; returns where the next part begins."""
    kinds, w = ("token ids", "pixels", "numbers"), 128.0
    convolution = ["text_convolution"] * (model.streams.text_convolution is not None)
    parts = (["text_norm", *convolution], ["image", "image_norm"], ["aux", "aux_norm"])
    canvas.module("streams", _MARGIN, 100, _INNER, 112, kind="group")
    for i, (name, kind) in enumerate(zip(STREAMS, kinds, strict=True)):
        x = 28 + i * (w + 10)
        middle = x + w / 2
        canvas.box(x, 14, w, 38, f"{name} strong", 19)
        canvas.text(middle, 30, name, "title")
        canvas.text(middle, 44, f"{kind} {shape(getattr(s.inputs, name))}", "small")
        canvas.arrow((middle, 52), (middle, 124))
        for j, part in enumerate(parts[i]):
            module = getattr(model.streams, part)
            notes = [] if "_" in part else [type(module).__name__]
            canvas.module(f"streams.{part}", x, 124 + 48 * j, w, (46, 34)[j], *notes, kind=name)
        canvas.arrow((middle, 170), (middle, 172), head=False)
        canvas.arrow((middle, 206), (middle, 238))
        canvas.text(middle + 6, 228, shape(s.streams[i].tokens), "shape", "start")
    canvas.module("embedding", 28, 60, w, 34, kind="text")
    return 238


def _draw_joint_block(canvas: Canvas, s: Shapes, y: Number) -> Number:
    canvas.module("level_one", _MARGIN, y, _INNER, 76, kind="group", label="level_one  JointBlock")
    canvas.module("level_one.block", 28, y + 23, 140, 46, "attention, then MLP")
    canvas.arrow((168, y + 46), (196, y + 46))
    for i, name in enumerate(("norm", "key", "value")):
        canvas.module(f"level_one.{name}", 196 + 79 * i, y + 23, 73, 46, kind="cache")
    return y + 76


def _draw_processes(canvas: Canvas, model: SlamV3, s: Shapes, y: Number) -> Number:
    """Also the lines of the tokens, which the fusion reads too, and of the bank."""
    count, layers, top = model.config.num_processes, model.config.num_process_layers, y + 46
    bus, residual = top + 116, top + 286
    canvas.arrow((98, y - 7), (98, top))
    canvas.arrow((98, y + 38), (10, y + 38), (10, residual), (28, residual))
    canvas.text(105, y + 17, "tokens x of all streams", "soft", "start")
    canvas.text(105, y + 31, shape(s.x), "shape", "start")
    canvas.text(414, y + 23, "bank: keys and values", "soft", "end")
    canvas.text(414, y + 37, f"2 x {shape(s.k)}", "shape", "end")
    axis = f"one vmap over {count} processes: each parameter has a leading axis {count}"
    path = "processes.stack"
    canvas.module(path, _MARGIN, top, _INNER, 204, axis, kind="group")
    shown, gap = min(count, 4), 8.0
    w = (_INNER - 16 - gap * (shown - 1)) / shown
    way = ((420, y - 7), (420, y + 9), (450, y + 9), (450, bus), (28 + w / 4, bus))
    canvas.arrow(*way, head=False, kind="bank")
    boxes = (
        ("instruction", "added to x", 38),
        ("layers.0.isolated", "own stream", 76),
        ("layers.0.query", "shared attention", 126),
        ("layers.0.mlp", "each token", 164),
    )
    for p in range(shown):
        x = 28 + p * (w + gap)
        canvas.arrow((x + w / 2, top + 68), (x + w / 2, top + 164), head=False)
        canvas.arrow((x + w / 4, bus), (x + w / 4, top + 126), kind="bank")
        for part, note, offset in boxes:
            more: Any = dict(kind="process", counted=False)
            canvas.module(f"{path}.{part}", x, top + offset, w, 30, note, **more)
    if layers > 1 or count > shown:
        more = f"{count} processes of {layers} layers"
        canvas.text(WIDTH - 28, top + 202, more, "small", "end")
    return top + 204


def _draw_fusion(canvas: Canvas, model: SlamV3, s: Shapes, y: Number) -> Number:
    canvas.arrow((180, y), (180, y + 34))
    canvas.text(187, y + 15, "outputs y of the processes", "soft", "start")
    canvas.text(187, y + 29, shape(s.y), "shape", "start")
    top, w = y + 34, 92.0
    canvas.module("fusion", _MARGIN, top, _INNER, 124, kind="group")
    boxes = (("x", "residual"), ("mean", "of the outputs"))
    for i in range(4):
        x = 28 + i * (w + 12)
        if i < 2:
            canvas.box(x, top + 24, w, 46)
            canvas.text(x + w / 2, top + 44, boxes[i][0], "title")
            canvas.text(x + w / 2, top + 58, boxes[i][1], "small")
        if i:
            canvas.text(x - 6, top + 52, "+", "plus")
    canvas.module("fusion.concat", 28 + 2 * (w + 12), top + 24, w, 46, "all outputs")
    canvas.module("fusion.cross_modal", 28 + 3 * (w + 12), top + 24, w, 46, "other streams")
    canvas.arrow((230, top + 70), (230, top + 82))
    middle = ("mlp", "bottleneck") if model.fusion.bottleneck is not None else ("mlp",)
    for i, name in enumerate(middle):
        canvas.module(f"fusion.{name}", 164 + 140 * i, top + 82, 132, 34)
    return top + 124


def _draw_decoder(canvas: Canvas, model: SlamV3, s: Shapes, y: Number) -> Number:
    layers, top, w = model.config.num_decoder_layers, y + 112, 128.0
    times = f"decoder  {layers} layers" if layers > 1 else "decoder"
    canvas.module("decoder", _MARGIN, top, _INNER, 118, kind="group", label=times)
    canvas.box(28, y + 24, w, 30, "box strong", 15)
    canvas.text(92, y + 43, f"question {shape(s.tokens)}", "small")
    canvas.arrow((92, y + 54), (92, y + 62))
    canvas.module("embedding", 28, y + 62, w, 30, "that of text", kind="text", counted=False)
    canvas.arrow((148, y + 92), (148, top + 24))
    canvas.arrow((230, y), (230, y + 24))
    canvas.module("memory_bank", 166, y + 24, w, 46, "MemoryCompressor")
    canvas.arrow((294, y + 47), (304, y + 47))
    canvas.module("alignment", 304, y + 24, w, 46, "retrieval")
    canvas.arrow((230, y + 70), (230, top + 24), kind="bank")
    canvas.text(237, y + 87, "memory", "soft", "start")
    canvas.text(237, y + 101, shape(s.memory), "shape", "start")
    canvas.text(432, y + 87, f"unit vector {shape(s.embedding)}", "small", "end")
    path = "decoder.layers.0"
    canvas.module(f"{path}.attention", 28, top + 24, w, 46, "latent, to the text")
    canvas.module(f"{path}.memory_attention", 166, top + 24, w, 46, "to the memory")
    canvas.module(f"{path}.mlp", 304, top + 24, w, 46)
    canvas.arrow((156, top + 47), (166, top + 47))
    canvas.arrow((294, top + 47), (304, top + 47))
    cache = "  ".join(f"{name} {shape(getattr(s.cache, name))}" for name in ("c_kv", "k_rope"))
    canvas.box(28, top + 82, 266, 28, "cache")
    canvas.text(161, top + 100, f"cache: {cache}", "small")
    canvas.arrow((92, top + 82), (92, top + 70), kind="bank")
    end = top + 132
    canvas.arrow((368, top + 70), (368, end))
    canvas.module("head", 304, end, w, 32)
    canvas.arrow((304, end + 16), (156, end + 16))
    canvas.text(230, end + 10, shape(s.logits), "shape")
    canvas.text(230, end + 30, "logits", "small")
    canvas.box(28, end, w, 32, "box strong", 16)
    canvas.text(92, end + 20, "next token", "title")
    return end + 46
