"""The page: inputs, a prompt, the answer as it is generated, and maps of the model's attention."""

import functools
import html
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import gradio as gr
import jax

from slam_jax.demo.chat import add_picture_chat
from slam_jax.demo.examples import PROMPTS, SCENES, show, trained_views
from slam_jax.errors import InputError, UserError, shorten
from slam_jax.generation import Request, Sampling, stream
from slam_jax.reporting.attention import attention_html
from slam_jax.serving import Engine
from slam_jax.training import Loaded

_BLANK_ROWS = 6


def make_app(loaded: Loaded, engine: Engine | None = None) -> gr.Blocks:
    """The page for a trained model; `slam_jax.demo.serving.serve` serves it.

    engine: answers in a second tab, a conversation; None = a page without it.
    """
    with gr.Blocks(title="slam_jax", analytics_enabled=False) as app:
        gr.Markdown(_introduction(loaded), elem_id="intro")
        if engine is None:
            _add_questions(loaded)
        else:
            with gr.Tabs():
                with gr.Tab("Ask"):
                    _add_questions(loaded)
                with gr.Tab("Chat"):
                    add_picture_chat(loaded, engine)
    return app


def _add_questions(loaded: Loaded) -> None:
    """Adds the inputs, the prompt and what is shown of the answer."""
    views = trained_views(loaded.config)
    image, text, aux = inputs = _inputs(loaded)
    prompt = gr.Textbox(label="Prompt", max_lines=1, elem_id="prompt", render=False)
    outputs = [
        gr.Textbox(label="Answer", interactive=False, elem_id="answer", render=False),
        gr.HTML(elem_id="notice", render=False),
        gr.HTML(elem_id="maps", render=False),
    ]
    with gr.Row():
        with gr.Column():
            if views:
                _offer_scenes(loaded, views, inputs, outputs)
            with gr.Row():
                image.render()
                text.render()
            aux.render()
            if not _has_columns(loaded):
                more = gr.Button("Add a row", size="sm", elem_id="more")
                more.click(add_row, aux, aux, preprocess=False, api_visibility="private")
        with gr.Column():
            prompt.render()
            if views:
                prompts = gr.Dataset(
                    components=[prompt],
                    samples=[[text] for text in PROMPTS],
                    label="Questions to try, about any colour",
                    elem_id="prompts",
                )
                prompts.click(lambda x: x[0], prompts, prompt, api_visibility="private")
            ask = gr.Button("Ask", variant="primary", elem_id="ask")
            with gr.Accordion("Sampling", open=False, elem_id="sampling"), gr.Row():
                numbers = _numbers(loaded)
            for output in outputs:
                output.render()
    gr.on(
        [ask.click, prompt.submit],
        functools.partial(ask_model, loaded),
        [*inputs, prompt, *numbers],
        outputs,
        preprocess=False,  # so that a bad image is reported like any other bad input
        show_progress="minimal",
        show_progress_on=outputs[0],
        api_visibility="private",
    )


def ask_model(
    loaded: Loaded,
    image: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None,
    text: str | None,
    aux: Mapping[str, Any],
    prompt: str | None,
    seed: Any,
    *numbers: Any,
) -> Iterator[tuple[str, str, str]]:
    """Yields what the page shows: the answer so far, a notice, and the attention maps; the last two
    are HTML. The notice says what is wrong with the question, or that the answer was cut or empty.

    Args:
      image: the uploaded file, with its `path` here and its `orig_name` on the visitor's machine;
        or the items of a gallery, each with such a file as its `image`.
      aux: the table, with its rows in `data`.
      numbers: the first fields of `Sampling`, in their order.
    """
    answer, files = "", _files(image)
    yield answer, "", ""
    try:
        paths = [file["path"] for file in files]
        rows = read_aux(aux["data"], _column_names(loaded), one_row=_has_columns(loaded))
        picture = paths[0] if len(paths) == 1 else paths or None
        request = Request(prompt or "", text or None, picture, rows, seed)
        pieces = stream(loaded, request, Sampling(*numbers))
        for piece in pieces:
            answer += piece
            yield answer, "", ""
        notice = "" if answer else "<p>The model's answer is empty.</p>"
        if pieces.finish == "length":
            notice += "<p>The answer was cut: raise max tokens, under Sampling, to see more.</p>"
        heading = "<h3>Where it looked</h3>"
        yield answer, notice, f"{heading}<p>…</p>"
        yield answer, notice, heading + attention_html(loaded, request, answer)
    except UserError as error:
        message = str(error)
        for file in files:
            message = message.replace(file["path"], file["orig_name"] or "the image")
        yield answer, f'<p role="alert">{html.escape(message)}</p>', ""


def _files(image: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None) -> list[Any]:
    if image is None:
        return []
    return [image] if isinstance(image, Mapping) else [item["image"] for item in image]


def read_aux(
    rows: Sequence[Sequence[Any]], names: Sequence[str], *, one_row: bool
) -> list[Any] | None:
    """Rows of numbers, or one row where `one_row`; blank cells become None.

    Blank rows are left out; None where all are blank. Raises InputError, naming the cell, for a
    cell that is not a number, and for several rows where one is expected.
    """
    read = []
    for i, cells in enumerate(rows):
        # The visitor may add columns; the model then says how many it expects.
        more = [f"column {j + 1}" for j in range(len(names), len(cells))]
        named = zip(cells, [*names, *more], strict=False)
        read.append([_number(cell, f"row {i + 1}, {name}") for cell, name in named])
    filled = [row for row in read if any(number is not None for number in row)]
    if one_row and len(filled) > 1:
        raise InputError(f"aux has {len(filled)} rows; expected one")
    if not filled:
        return None
    return filled[0] if one_row else filled


def _number(cell: Any, where: str) -> float | None:
    text = "" if cell is None else str(cell).strip()
    try:
        number = float(text or "nan")
    except ValueError:
        raise InputError(f"aux, {where}: {shorten(text, 30)!r} is no number") from None
    return None if math.isnan(number) else number


def add_row(aux: Mapping[str, Any]) -> list[list[Any]]:
    """The table's rows and a blank one."""
    return [*aux["data"], [None] * len(aux["headers"])]


def _introduction(loaded: Loaded) -> str:
    count = sum(leaf.size for leaf in jax.tree.leaves(loaded.model))
    return (
        f"# slam_jax\n{count:,} parameters, trained on {loaded.config['data']['name']} for "
        f"{loaded.step:,} steps. Give an image, a text, a table of numbers or any mix of them, "
        "and ask."
    )


def _inputs(loaded: Loaded) -> tuple[Any, gr.Textbox, gr.Dataframe]:
    kind = "a row of numbers, blank = missing" if _has_columns(loaded) else "rows of numbers"
    usual: dict[str, Any] = dict(
        type="filepath",
        format="png",  # the default is a lossy one
        sources=["upload", "clipboard"],
        buttons=[],
        height=220,
        min_width=240,
        elem_id="image",
        render=False,
    )
    most = loaded.model.config.image.max_images
    image: Any = (
        gr.Image(label="Image", **usual)
        if most == 1
        else gr.Gallery(label=f"Up to {most} images", file_types=["image"], **usual)
    )
    text = gr.Textbox(
        label="Text", lines=7, max_lines=7, min_width=240, elem_id="text", render=False
    )
    aux = gr.Dataframe(
        _blank_rows(loaded),
        headers=_column_names(loaded),
        datatype="number",
        label=f"Aux: {kind}",
        interactive=True,
        buttons=[],
        elem_id="aux",
        render=False,
    )
    return image, text, aux


def _column_names(loaded: Loaded) -> list[str]:
    """The column names of the table of auxiliary vectors, or x1, x2, .. where they have none."""
    if loaded.aux_format is not None:
        return list(loaded.aux_format.names)
    return [f"x{i + 1}" for i in range(loaded.model.config.aux_dim)]


def _has_columns(loaded: Loaded) -> bool:
    """Whether the table has one row, with a number for each column of the data."""
    return loaded.aux_format is not None and loaded.aux_format.has_columns


def _blank_rows(loaded: Loaded) -> list[list[None]]:
    return [[None] * len(_column_names(loaded))] * (1 if _has_columns(loaded) else _BLANK_ROWS)


def _offer_scenes(
    loaded: Loaded, views: Mapping[str, str], inputs: Sequence[Any], outputs: Sequence[Any]
) -> None:
    """Pictures of scenes; a click on one shows it in the inputs, in the parts of the chosen view,
    and clears the outputs."""
    scenes = gr.Dataset(
        components=[gr.Image(format="png", render=False)],
        samples=[[show(scene, "image").image] for scene in SCENES],
        type="index",
        label="Scenes that training never saw",
        elem_id="scenes",
    )
    view = gr.Radio(
        list(views.items()),
        value=next(iter(views.values())),
        label="shown as",
        visible=len(views) > 1,
        elem_id="view",
    )
    chosen = gr.State(0)
    changed = [chosen, *inputs, *outputs]

    def fill(index: int, view: str) -> tuple[Any, ...]:
        image, text, rows = show(SCENES[index], view)
        if loaded.model.config.image.max_images > 1:
            image = None if image is None else [image]
        return index, image, text, rows or _blank_rows(loaded), *[""] * len(outputs)

    scenes.click(fill, [scenes, view], changed, api_visibility="private")
    view.input(fill, [chosen, view], changed, api_visibility="private")


def _numbers(loaded: Loaded) -> list[gr.Number]:
    """The seed and the first fields of `Sampling`, in their order; 0 = no top-k."""
    fields = (
        ("seed", "seed", 0, 1),
        ("max tokens", "max_new_tokens", loaded.max_new_tokens, 1),
        ("temperature", "temperature", 0, 0.1),
        ("top-k, 0 = all", "top_k", 0, 1),
        ("top-p", "top_p", 1, 0.05),
        ("min-p", "min_p", 0, 0.05),
        ("repetition penalty", "repetition_penalty", 1, 0.1),
    )
    return [
        gr.Number(value, label=label, step=step, min_width=130, elem_id=elem_id)
        for label, elem_id, value, step in fields
    ]
