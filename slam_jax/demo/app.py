"""The page: inputs, a prompt, the answer as it is generated, and maps of the model's attention."""

import functools
import html
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import gradio as gr
import jax

from slam_jax.demo.examples import PROMPTS, SCENES, draw_whole, show, trained_views
from slam_jax.demo.reading import column_names, has_columns, read_request
from slam_jax.errors import UserError
from slam_jax.generation import Sampling, stream
from slam_jax.reporting.attention_html import attention_html
from slam_jax.training import Loaded

_BLANK_ROWS = 6


def make_app(loaded: Loaded) -> gr.Blocks:
    """The page for a trained model; `slam_jax.demo.serving.serve` serves it."""
    views = trained_views(loaded.config)
    image, text, aux = inputs = _inputs(loaded)
    prompt = gr.Textbox(label="Prompt", max_lines=1, elem_id="prompt", render=False)
    outputs = _outputs()
    with gr.Blocks(title="slam_jax", analytics_enabled=False) as app:
        gr.Markdown(_introduction(loaded), elem_id="intro")
        with gr.Row():
            with gr.Column():
                if views:
                    _offer_scenes(loaded, views, inputs, outputs)
                with gr.Row():
                    image.render()
                    text.render()
                aux.render()
                if not has_columns(loaded):
                    more = gr.Button("Add a row", size="sm", elem_id="more")
                    more.click(add_row, aux, aux, preprocess=False, api_visibility="private")
            with gr.Column():
                prompt.render()
                if views:
                    _offer_prompts(prompt)
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
    return app


def ask_model(
    loaded: Loaded,
    image: Mapping[str, Any] | None,
    text: str | None,
    aux: Mapping[str, Any],
    prompt: str | None,
    seed: Any,
    *numbers: Any,
) -> Iterator[tuple[str, str, str]]:
    """Yields what the page shows: the answer so far, a notice, and the attention maps; the last two
    are HTML. The notice says what is wrong with the question, or that the answer was cut or empty.

    Args:
      image: the uploaded file, with its `path` here and its `orig_name` on the visitor's machine.
      aux: the table, with its rows in `data`.
      numbers: the first fields of `Sampling`, in their order.
    """
    answer = ""
    yield answer, "", ""
    try:
        path = None if image is None else image["path"]
        request = read_request(loaded, path, text, aux["data"], prompt, seed)
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
        if image is not None:
            message = message.replace(image["path"], image["orig_name"] or "the image")
        yield answer, f'<p role="alert">{html.escape(message)}</p>', ""


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


def _inputs(loaded: Loaded) -> tuple[gr.Image, gr.Textbox, gr.Dataframe]:
    one_row = has_columns(loaded)
    image = gr.Image(
        label="Image",
        type="filepath",
        format="png",  # the default is a lossy one
        sources=["upload", "clipboard"],
        buttons=[],
        height=220,
        min_width=240,
        elem_id="image",
        render=False,
    )
    text = gr.Textbox(
        label="Text", lines=7, max_lines=7, min_width=240, elem_id="text", render=False
    )
    aux = gr.Dataframe(
        _blank_rows(loaded),
        headers=column_names(loaded),
        datatype="number",
        label="Aux: " + ("a row of numbers, blank = missing" if one_row else "rows of numbers"),
        interactive=True,
        buttons=[],
        elem_id="aux",
        render=False,
    )
    return image, text, aux


def _blank_rows(loaded: Loaded) -> list[list[None]]:
    return [[None] * len(column_names(loaded))] * (1 if has_columns(loaded) else _BLANK_ROWS)


def _outputs() -> list[Any]:
    return [
        gr.Textbox(label="Answer", interactive=False, elem_id="answer", render=False),
        gr.HTML(elem_id="notice", render=False),
        gr.HTML(elem_id="maps", render=False),
    ]


def _offer_scenes(
    loaded: Loaded, views: Mapping[str, str], inputs: Sequence[Any], outputs: Sequence[Any]
) -> None:
    """Pictures of scenes; a click on one shows it in the inputs, in the parts of the chosen view,
    and clears the outputs."""
    scenes = gr.Dataset(
        components=[gr.Image(format="png", render=False)],
        samples=[[draw_whole(scene)] for scene in SCENES],
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
        return index, image, text, rows or _blank_rows(loaded), *[""] * len(outputs)

    scenes.click(fill, [scenes, view], changed, api_visibility="private")
    view.input(fill, [chosen, view], changed, api_visibility="private")


def _offer_prompts(prompt: gr.Textbox) -> None:
    prompts = gr.Dataset(
        components=[prompt],
        samples=[[text] for text in PROMPTS],
        label="What it knows, of any colour",
        elem_id="prompts",
    )
    prompts.click(lambda sample: sample[0], prompts, prompt, api_visibility="private")


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
