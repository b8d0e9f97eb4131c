"""Starts a run with the weights of another run, or of a folder, where they fit."""

import dataclasses
import functools
import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from slam_jax.data import AnyTokenizer
from slam_jax.errors import ConfigError, UserError, write_whole
from slam_jax.layers.lora import is_adapter, merge_lora
from slam_jax.runtime import distributed
from slam_jax.runtime.files import sha256
from slam_jax.trained.folder import WEIGHTS, find_folder
from slam_jax.training.checkpoint import Checkpoints
from slam_jax.training.checkpoint.manifest import NAME as MANIFEST
from slam_jax.training.checkpoint.trees import by_name, from_names
from slam_jax.training.loading import Loaded, LoadedLanguageModel, load
from slam_jax.training.sharding import on_one_device
from slam_jax.training.state import TrainState, first_average, split_model

REPORT = "init_from.json"
VOCABULARY_AXES = {"embedding/embedding": 0, "head/kernel": 1}
"""Arrays that have one row for each token, and along which axis."""

_MOST_LISTED = 200  # arrays of a kind in the report


def begin_from(
    source: str,
    workdir: Path,
    moved: Sequence[str | Path],
    state: TrainState,
    tokenizer: AnyTokenizer,
    provided: Collection[str] = (),
) -> tuple[TrainState, str]:
    """The state of a new run with the weights of `source`, and a report in one line.

    Arrays of the same name and shape are copied, with the dtype of `state`. Of arrays with a row
    for each token, the rows of the same token are copied. All others keep their initial values.
    Adapters of the source are merged, unless the new run has all of them. The whole report is
    written to `workdir/init_from.json`.

    source: of `RunConfig.init_from`. moved: folders with its base weights. tokenizer: of the new
    run. provided: names of frozen parameters that keep the values of their base.

    Raises ConfigError where `source` cannot be loaded or nothing matches.
    """
    own = by_name(state.params) | by_name(state.frozen or {})
    loaded, given = _read(source, moved, own)
    rows = _rows(loaded.tokenizer.ids_by_token, tokenizer.ids_by_token)
    fits = {x: _fit(x, own[x], given.get(x), rows) for x in own if x not in provided}
    new = {name: fit.value for name, fit in fits.items() if fit.value is not None}
    if not new:
        raise ConfigError(
            f"run.init_from is {source!r}: none of its {len(given):,} arrays has the name and "
            "shape of one of this model; choose a run of a similar model"
        )
    unused = sorted(given.keys() - own.keys())
    report = _report(source, loaded, fits, unused, None if rows is None else len(rows[0]))
    if distributed.is_first_process():
        write_whole(workdir / REPORT, json.dumps(report, indent=1) + "\n")
    params, frozen = (part and _replaced(part, new) for part in (state.params, state.frozen))
    ema = state.ema and first_average(params)
    state = dataclasses.replace(state, params=params, ema=ema, frozen=frozen)
    return state, report["summary"]


def _read(
    source: str, moved: Sequence[str | Path], own: Collection[str]
) -> tuple[Loaded | LoadedLanguageModel, dict[str, Any]]:
    """The source and its parameters; adapters are merged, unless `own` has all of them."""
    with on_one_device():
        try:
            loaded = load(source, base=moved)
        except UserError as error:
            raise ConfigError(f"run.init_from is {source!r}: {error}") from error
        given = by_name(split_model(loaded.model)[1])
        if any(is_adapter(name) and name not in own for name in given):
            given = by_name(split_model(merge_lora(loaded.model))[1])
    return loaded, given


class _Fit(NamedTuple):
    """What a parameter begins with, None = its initial values; and what is to be said of it."""

    value: np.ndarray | None
    kind: str = "matched"
    reason: str = ""


def _rows(theirs: Mapping[str, int], ours: Mapping[str, int]) -> tuple[list[int], list[int]] | None:
    """The ids of the tokens that both tokenizers have, here and there; None = the same ids."""
    if theirs == ours:
        return None
    both = sorted(ours.keys() & theirs.keys(), key=ours.__getitem__)
    return [ours[token] for token in both], [theirs[token] for token in both]


def _fit(name: str, x: Any, given: Any, rows: tuple[list[int], list[int]] | None) -> _Fit:
    """`x` with the values of `given`, where it has them."""
    if given is None:
        return _Fit(None, "absent")
    axis = None if rows is None else VOCABULARY_AXES.get(name)
    shape, other = ([n for i, n in enumerate(each.shape) if i != axis] for each in (x, given))
    if shape != other:
        return _Fit(None, "other_shape", f"{list(x.shape)} here and {list(given.shape)} there")
    value = np.asarray(given).astype(x.dtype)
    if rows is not None and axis is not None:
        here, there = ((*[slice(None)] * axis, ids) for ids in rows)
        value, all_rows = np.array(distributed.to_host(x)), value
        value[here] = all_rows[there]
    if given.dtype == x.dtype:
        return _Fit(value)
    return _Fit(value, "cast", f"{x.dtype} here and {given.dtype} there")


def _replaced(params: Any, new: Mapping[str, np.ndarray]) -> Any:
    """Parameters with other values for those named, in the same structure and shardings."""
    values = from_names({**by_name(params), **new}, params)
    place = functools.partial(jax.device_put, may_alias=False)  # a step deletes its state
    return jax.tree.map(lambda x, old: place(x, old.sharding), values, params)


def _report(
    source: str,
    loaded: Loaded | LoadedLanguageModel,
    fits: Mapping[str, _Fit],
    unused: list[str],
    tokens: int | None,
) -> dict[str, Any]:
    """The content of `REPORT`. tokens: those in both vocabularies, None = the same vocabulary."""
    counts = Counter(fit.kind for fit in fits.values())
    words = {"cast": "of them cast", "absent": "absent there", "other_shape": "of another shape"}
    parts = [f"{counts['matched'] + counts['cast']:,} of {len(fits):,} arrays match"]
    parts += [f"{counts[kind]:,} {text}" for kind, text in words.items() if counts[kind]]
    if tokens is not None:
        parts.append(f"rows of {tokens:,} tokens copied")
    parts += [f"{len(unused):,} there unused"] if unused else []
    report: dict[str, Any] = {
        "source": source,
        "step": loaded.step,
        "sha256": _sha256(source, loaded.step),
        "summary": f"began with {source}, step {loaded.step:,}: {', '.join(parts)} ({REPORT})",
    }
    for kind in words:
        report[kind] = _bounded(
            f"{name}: {fit.reason}".rstrip(": ") for name, fit in fits.items() if fit.kind == kind
        )
    return {**report, "unused": _bounded(unused)}


def _bounded(lines: Iterable[str]) -> list[str]:
    lines = list(lines)
    more = len(lines) - _MOST_LISTED
    return [*lines[:_MOST_LISTED], *([f"and {more:,} more"] if more > 0 else [])]


def _sha256(source: str, step: int) -> str:
    """The sha256 of the folder's weights, or of the checkpoint's manifest, which has those of all
    its files."""
    folder = find_folder(source)
    path = (
        Checkpoints(source).directory / str(step) / MANIFEST if folder is None else folder / WEIGHTS
    )
    return sha256(path)
