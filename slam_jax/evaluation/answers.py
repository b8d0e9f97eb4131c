"""Lets a model answer evaluation questions and counts what it got right."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from slam_jax.data import EvaluationBatch, Tokenizer
from slam_jax.evaluation.metrics import bootstrap_interval, retrieval_metrics
from slam_jax.generation import greedy_decode
from slam_jax.runtime.distributed import to_host
from slam_jax.slam_v3.streams import Inputs

RETRIEVAL_VIEW = "image_text"
"""The view whose text and image both show the whole scene, so one can be found by the other."""


class Answer(NamedTuple):
    """One question and what the model said, with the log-probability (nats) of saying just that."""

    view: str
    scene: int
    kind: str
    needs_both: bool
    prompt: str
    answer: str
    given: str
    logprob: float

    @property
    def correct(self) -> bool:
        return self.given.strip() == self.answer.strip()


class Results(NamedTuple):
    """`metrics` as they stand in metrics.json, and every answer behind them."""

    metrics: dict[str, Any]
    answers: list[Answer]


@partial(jax.jit, static_argnames=("graphdef", "max_new_tokens", "eos_id", "pad_id"))
def _generate(graphdef, params, inputs, tokens, prompt_length, max_new_tokens, eos_id, pad_id):
    model = nnx.merge(graphdef, params)
    # The tokens hold the answers too: nothing after the prompt may reach the model.
    in_prompt = jnp.arange(tokens.shape[-1]) < prompt_length[..., None]
    return greedy_decode(
        model,
        model.encode(inputs),
        jnp.where(in_prompt, tokens, pad_id),
        prompt_length,
        max_new_tokens=max_new_tokens,
        eos_id=eos_id,
        pad_id=pad_id,
    )


@partial(jax.jit, static_argnames="graphdef")
def _embed(graphdef, params, inputs):
    model = nnx.merge(graphdef, params)
    text = Inputs(text=inputs.text, text_mask=inputs.text_mask)
    image = Inputs(image=inputs.image, image_mask=inputs.image_mask)
    return jnp.stack([model.embed(text), model.embed(image)])


def evaluate(
    graphdef: nnx.GraphDef,
    params: Any,
    batches_by_view: Mapping[str, Iterable[EvaluationBatch]],
    tokenizer: Tokenizer,
    *,
    step: int,
    max_new_tokens: int = 8,
    seed: int = 0,
) -> Results:
    """Answers every question of every view by greedy decoding; right means equal as text.

    One encode serves all questions of a scene. Batches of one view must share their shapes, so each
    view compiles once, also over many calls with the same `graphdef`.

    A view `X_only_Y` is view X with just its rendering Y: it gives no row of its own, but the entry
    `needs_both_Y_only` of view X, beside its `needs_both`: the questions that need both renderings.
    The view `image_text` also gives retrieval between the two, where they belong together.

    Args:
      graphdef, params: `nnx.split(model, nnx.Param)`.
      batches_by_view: what `slam_jax.data.evaluation_batches` yields for each view.
      step: the training step of `params`, copied into the metrics.
      max_new_tokens: longest answer, its <eos> included.
      seed: of the bootstrap.
    """
    answers: list[Answer] = []
    retrieval = {}
    for view, batches in batches_by_view.items():
        scene, embeddings = 0, []
        for batch, examples, valid in batches:
            new = _generate(
                graphdef,
                params,
                batch.inputs,
                batch.tokens,
                batch.prompt_length,
                max_new_tokens,
                tokenizer.eos_id,
                tokenizer.pad_id,
            )
            if view == RETRIEVAL_VIEW and batch.paired:
                pair = _embed(graphdef, params, batch.inputs)
                embeddings.append(to_host(pair)[:, :valid])
            new = to_host(new)
            given = zip(new.tokens.tolist(), new.logprobs.sum(axis=-1).tolist(), strict=True)
            for example, rows in zip(examples, given, strict=False):
                answers += _read(view, scene, example, *rows, tokenizer)
                scene += 1
        if embeddings:
            retrieval = retrieval_metrics(*np.concatenate(embeddings, axis=1))
    metrics = {"step": step, "views": _accuracies(answers, seed)}
    return Results(metrics | ({"retrieval": retrieval} if retrieval else {}), answers)


def _read(view, scene, example, rows, logprobs, tokenizer):
    columns = (example.kinds, example.needs_both, example.prompts, example.answers, rows, logprobs)
    for kind, needs_both, prompt, answer, row, logprob in zip(*columns, strict=True):
        # decode stops at <eos>.
        given = tokenizer.decode(row)
        yield Answer(view, scene, kind, needs_both, prompt, answer, given, logprob)


def _accuracies(answers, seed):
    # view -> entry -> scene -> whether each of its questions was answered rightly
    correct = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for answer in answers:
        view, _, only = answer.view.partition("_only_")
        if not only:
            correct[view][answer.kind][answer.scene].append(answer.correct)
        if answer.needs_both:
            entry = f"needs_both_{only}_only" if only else "needs_both"
            correct[view][entry][answer.scene].append(answer.correct)
    return {
        view: {entry: _summary(list(scenes.values()), seed) for entry, scenes in entries.items()}
        for view, entries in correct.items()
    }


def _summary(correct_by_scene, seed):
    mean, low, high = bootstrap_interval(correct_by_scene, seed=seed)
    return {"accuracy": mean, "low": low, "high": high, "n": sum(map(len, correct_by_scene))}
