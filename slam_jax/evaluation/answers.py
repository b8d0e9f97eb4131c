"""Greedy answers of a model to evaluation questions, and the share of them that is right."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float

from slam_jax.data import AnyTokenizer, EvaluationBatch
from slam_jax.data.splits import connect
from slam_jax.evaluation.answered import Answer, group_by_slice
from slam_jax.evaluation.metrics import retrieval_metrics
from slam_jax.evaluation.scores import EXACT_MATCH, score_answers
from slam_jax.generation import greedy_decode
from slam_jax.layers.masks import prefix_mask
from slam_jax.runtime.distributed import to_host
from slam_jax.slam_v3.streams import Inputs

RETRIEVAL_VIEW = "image_text"
"""The view whose text and image both show the whole scene, so that one can retrieve the other."""


class Results(NamedTuple):
    """`metrics` as in metrics.json, and every answer behind them.

    losses: for each view the mean cross-entropy of the tokens of the expected answers, in nats; in
    the metrics as "loss".
    """

    metrics: dict[str, Any]
    answers: list[Answer]
    losses: Mapping[str, float] = MappingProxyType({})


def evaluate(
    graphdef: nnx.GraphDef,
    params: Any,
    batches_by_view: Mapping[str, Iterable[EvaluationBatch]],
    tokenizer: AnyTokenizer,
    *,
    step: int,
    max_new_tokens: int = 8,
    baseline_answer: str | None = None,
    seed: int = 0,
    metrics: Sequence[str] = (EXACT_MATCH,),
) -> Results:
    """Answers all questions of all views by greedy decoding; an answer is right if its text is one
    of the references.

    One encode serves all questions of a scene. Batches of a view must have equal shapes: then each
    view is compiled once, also over several calls with the same `graphdef`.

    A view `X_only_Y` shows one half of view X. It becomes an entry `needs_both_Y_only` of view X,
    over the questions that need both halves. The view `image_text` also gives retrieval metrics if
    its text and image show the same.

    graphdef, params: `nnx.split(model, nnx.Param)`. batches_by_view: of `evaluation_batches`. step:
    of `params`, copied into the metrics. max_new_tokens: longest answer, including its <eos>.
    baseline_answer: adds the share of questions that this answer gets right (`baseline`). seed: of
    the bootstrap. metrics: of `slam_jax.evaluation.METRICS`; those besides "exact_match" become
    `scores` of each entry.
    """
    ids = dict(eos_id=tokenizer.end_ids, pad_id=tokenizer.pad_id, known=tokenizer.known)
    answers, losses, retrieval = [], {}, {}
    shown: dict[int, tuple[bytes, ...]] = {}
    for view, batches in batches_by_view.items():
        place, embeddings, nats = 0, [], np.zeros(2)
        for batch, examples, valid in batches:
            new = _generate(graphdef, params, batch, max_new_tokens=max_new_tokens, **ids)
            if view == RETRIEVAL_VIEW and batch.paired:
                pair = _embed(graphdef, params, batch.inputs)
                embeddings.append(to_host(pair)[:, :valid])
            new, sums = to_host(new)
            nats += np.sum(sums[:, :valid], axis=(1, 2))
            rows = zip(examples, new.tokens.tolist(), new.logprobs.sum(-1).tolist(), strict=False)
            for example, tokens, logprobs in rows:
                predicted = map(tokenizer.decode, tokens)  # up to <eos>
                questions = (example.kinds, example.needs_both, example.prompts, example.answers)
                known = example.references or [(answer,) for answer in example.answers]
                number = place if example.record is None else example.record
                for row in zip(*questions, predicted, logprobs, known, strict=True):
                    answer = Answer(view, number, *row, place=example.place, record=number)
                    answers.append(answer)
                shown[number] = example.contents
                place += 1
        if nats[1]:
            losses[view] = float(nats[0] / nats[1])
        if embeddings:
            retrieval = retrieval_metrics(*np.concatenate(embeddings, axis=1))
    scenes = number_scenes(shown)
    answers = [answer._replace(scene=scenes[answer.scene]) for answer in answers]
    found = {"step": step, "views": summarise(answers, seed, baseline_answer, metrics)}
    found |= {"retrieval": retrieval} if retrieval else {}
    found |= {"loss": losses} if losses else {}
    found |= {} if baseline_answer is None else {"baseline_answer": baseline_answer}
    return Results(found, answers, losses)


def number_scenes(shown: Mapping[int, Sequence[bytes]]) -> dict[int, int]:
    """The scene of each record: the smallest number of the records that show the same.

    shown: what each record shows; () = what no other one does. Two records are also in one scene
    where others connect them, as A and B, B and C do with A and C.
    """
    groups, first = connect(shown.values()), {}
    return {
        number: first.setdefault(groups[shown[number][0]], number) if shown[number] else number
        for number in sorted(shown)
    }


def most_frequent_answer(answers: Iterable[str]) -> str | None:
    """The answer that occurs most often, None without answers."""
    counts = Counter(map(str.strip, answers))
    return counts.most_common(1)[0][0] if counts else None


@partial(jax.jit, static_argnames=("graphdef", "max_new_tokens", "eos_id", "pad_id"))
def _generate(graphdef, params, batch, *, max_new_tokens, eos_id, pad_id, known):
    model = nnx.merge(graphdef, params)
    if known is not None:  # the model may have more rows than the tokenizer has tokens
        known = jnp.pad(known, (0, model.config.vocab_size - len(known)))
    # The tokens contain the answers: mask everything after the prompt.
    in_prompt = prefix_mask(batch.prompt_length, batch.tokens.shape[-1])
    memory = model.encode(batch.inputs)
    new = greedy_decode(
        model,
        memory,
        jnp.where(in_prompt, batch.tokens, pad_id),
        batch.prompt_length,
        max_new_tokens=max_new_tokens,
        eos_id=eos_id,
        pad_id=pad_id,
        allowed=known,
    )
    return new, _answer_nats(model, batch, memory)


def _answer_nats(model: Any, batch: Any, memory: Any) -> Float[Array, "2 B Q"]:
    """The negative log-probability of each expected answer, and the number of its tokens."""
    states, targets = model.decode_hidden(batch.tokens[..., :-1], memory), batch.tokens[..., 1:]

    def nats_at(position: Any) -> jax.Array:
        state, target = position
        return optax.softmax_cross_entropy_with_integer_labels(model.logits(state), target)

    # One position at a time, as logits of a large vocabulary would not fit for all.
    along = jnp.moveaxis(states, -2, 0), jnp.moveaxis(targets, -1, 0)
    nats = jnp.moveaxis(jax.lax.map(nats_at, along), 0, -1)
    mask = batch.answer_mask
    return jnp.stack([jnp.where(mask, nats, 0.0).sum(-1), mask.sum(-1).astype(nats.dtype)])


@partial(jax.jit, static_argnames="graphdef")
def _embed(graphdef, params, inputs):
    model = nnx.merge(graphdef, params)
    text = Inputs(text=inputs.text, text_mask=inputs.text_mask)
    image = Inputs(image=inputs.image, image_mask=inputs.image_mask)
    return jnp.stack([model.embed(text), model.embed(image)])


def summarise(
    answers: Iterable[Answer],
    seed: int = 0,
    baseline: str | None = None,
    metrics: Sequence[str] = (EXACT_MATCH,),
) -> dict[str, Any]:
    """By view and kind of question: accuracy, interval and count, and `scores` of other metrics."""
    others = [name for name in metrics if name != EXACT_MATCH]
    summaries: dict[str, dict[str, Any]] = defaultdict(dict)
    for (view, entry), group in group_by_slice(answers).items():
        scores = score_answers(group, (EXACT_MATCH, *others), baseline=baseline, seed=seed)
        exact = scores[EXACT_MATCH]
        row = {"accuracy": exact.score, "low": exact.low, "high": exact.high, "n": exact.n}
        row |= {} if baseline is None else {"baseline": exact.baseline}
        row |= {"scores": {name: scores[name]._asdict() for name in others}} if others else {}
        summaries[view][entry] = row
    return dict(summaries)
