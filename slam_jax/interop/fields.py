"""Tables of published fields: a row has a field and our attribute, for reading and for writing."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from slam_jax.errors import InputError, shorten
from slam_jax.layers.rotary import Llama3, LongRope, Rope, Yarn

_LARGEST = 1e30
_KINDS: dict[type, tuple[Any, str]] = {
    int: (int, "a whole number"),
    float: ((int, float), "a number"),
    bool: (bool, "true or false"),
}


# Fields of any model that change no outputs.
HARMLESS = {
    # About the file.
    *("_commit_hash", "_name_or_path", "architectures", "model_type", "transformers_version"),
    # How the publisher's library computes and returns the same outputs.
    *("_attn_implementation_autoset", "attn_implementation", "chunk_size_feed_forward"),
    *("gradient_checkpointing", "output_attentions", "output_hidden_states", "return_dict"),
    *("torchscript", "use_bfloat16", "use_cache"),
    # Training, and heads of classifiers.
    *("attention_dropout", "finetuning_task", "id2label", "label2id", "num_labels"),
    *("problem_type", "task_specific_params"),
    # Tokens and how text is generated, which the tokenizer and generation_config.json say. Older
    # versions of transformers wrote them for every model.
    *("add_cross_attention", "bad_words_ids", "begin_suppress_tokens", "bos_token_id"),
    *("cross_attention_hidden_size", "decoder_start_token_id", "diversity_penalty", "do_sample"),
    *("early_stopping", "encoder_no_repeat_ngram_size", "eos_token_id"),
    *("exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id"),
    *("is_decoder", "is_encoder_decoder", "length_penalty", "max_length", "min_length"),
    *("no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences"),
    *("output_scores", "pad_token_id", "prefix", "remove_invalid_values", "repetition_penalty"),
    *("return_dict_in_generate", "sep_token_id", "suppress_tokens", "temperature"),
    *("tf_legacy_loss", "tie_encoder_decoder", "tokenizer_class", "top_k", "top_p", "typical_p"),
}


class Group:
    """The fields of a JSON file, or of a group inside it whose name is `prefix`."""

    def __init__(self, data: Mapping[str, Any], prefix: str = "", file: str = "config.json"):
        self.data, self.prefix, self.file = data, prefix, file

    def get(self, key: str, kind: Any, default: Any = ...) -> Any:
        """A value of a kind (int, float or bool); null and absent give the default, `...` = none.

        A list of equal whole numbers, one for each layer, counts as one of them.
        """
        value, (types, expected) = self.data.get(key), _KINDS[kind]
        each: Any = value if types is int and isinstance(value, list) else [value]
        value: Any = each[0] if len(set(map(repr, each))) == 1 else value
        if value is None and default is not ...:
            return default
        fits = isinstance(value, types) and isinstance(value, bool) == (types is bool)
        if value is None or not fits or not abs(value) < _LARGEST:  # NaN is not below it
            raise self.wrong(key, expected)
        return kind(value)

    def read(self, table: "Fields") -> dict[str, Any]:
        """The attributes that these fields give.

        Raises InputError, naming the field.
        """
        values = {}
        for row in table:
            if row.attribute is None and row.read is None and row.default is ...:
                continue
            if row.when is not None and self.data.get(row.when[0]) != row.when[1]:
                value = row.when[2]
            elif row.read is None or isinstance(row.read, type):
                kind = int if row.default in (..., None) else type(row.default)
                value = self.get(row.key, row.read or kind, row.default)
            else:
                try:
                    value = row.read(self, row.key)
                except (TypeError, OverflowError, ZeroDivisionError):
                    raise self.wrong(row.key, "another value, with which one can compute") from None
            if row.attribute is not None:
                values[row.attribute] = value
        return values

    def wrong(self, key: str, expected: str) -> InputError:
        value = shorten(repr(self.data.get(key)), 80)
        name = shorten(f"{self.prefix}{key}", 80)
        return InputError(f"{self.file}: {name} is {value}; expected {expected}")


class Field(NamedTuple):
    """A row of a table.

    key: the published name. attribute: ours; None = nothing of ours depends on the field.
    default: the publisher's; `...` = the field is required, None = the attribute is optional.
    read: the kind of the value, or a function of (group, key) that returns it; None = the kind of
      the default, int where it has none.
    write: what is written for a configuration; None = the attribute, or the default where that is
      None; `...` = the field is not written. With a key and `write` alone the field is written for
      other libraries and not read.
    when: (key, value, off): without this value of another field the attribute is `off`.
    """

    key: str
    attribute: str | None = None
    default: Any = ...
    read: type | Callable[[Group, str], Any] | None = None
    write: Callable[[Any], Any] | None = None
    when: tuple[str, Any, Any] | None = None


Fields = tuple[Field, ...]


def only(key: str, *allowed: Any) -> Field:
    """A field of which only some values are built; the first is the default, and is written."""

    def read(group: Group, key: str) -> Any:
        value = group.data.get(key, allowed[0])
        if value not in allowed:
            expected = " or ".join(map(repr, allowed))
            raise group.wrong(key, f"{expected}, which is all that is built")
        return value

    return Field(key, read=read, write=lambda _: allowed[0])


def write_fields(table: Fields, config: Any) -> dict[str, Any]:
    """The published fields of a configuration."""
    values = {}
    for row in table:
        if row.write is not None:
            values[row.key] = row.write(config)
        else:
            value = getattr(config, row.attribute or "")
            values[row.key] = row.default if value is None else value
    return {key: value for key, value in values.items() if value is not ...}


_YARN = (
    Field("factor", "factor", read=float),
    Field("original_max_position_embeddings", "original_length"),
    Field("beta_fast", "beta_fast", 32.0),
    Field("beta_slow", "beta_slow", 1.0),
    Field("mscale", "mscale", None, float),
    Field("mscale_all_dim", "mscale_all_dim", None, float),
)
_LLAMA3 = (
    Field("factor", "factor", read=float),
    Field("low_freq_factor", "low_freq_factor", read=float),
    Field("high_freq_factor", "high_freq_factor", read=float),
    Field("original_max_position_embeddings", "original_length"),
)


def _read_factors(group: Group, key: str) -> tuple[float, ...]:
    value: Any = group.data.get(key)
    numbers = isinstance(value, list) and all(
        isinstance(x, (int, float)) and not isinstance(x, bool) for x in value
    )
    if not numbers or not 0 < len(value) <= 1 << 16:
        raise group.wrong(key, "a list with a number for each pair of features")
    return tuple(float(x) for x in value)


_ROPES: dict[str, Fields] = {
    "default": (only("factor", 1.0),),
    "linear": (Field("factor", "linear_factor", read=float),),
    "yarn": _YARN,
    "llama3": _LLAMA3,
    "longrope": (
        Field("short_factor", "short", read=_read_factors),
        Field("long_factor", read=_read_factors),
        Field("factor", "factor", None, float),
        Field("attention_factor", "attention_factor", None, float),
        Field("original_max_position_embeddings", "original_length", None),
    ),
    # Within the context these are the plain positions; see `rope`.
    "dynamic": (Field("factor", read=float),),
    "alpha": (Field("alpha", "ntk_alpha", read=float),),
}
# Hunyuan's files have some fields of YaRN beside its own stretching, which does not use them.
_UNUSED = ("factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")


def rope(
    base: float = 10_000.0,
    *,
    interleaved: bool = False,
    interleave_key: str | None = None,
    alpha: bool = False,
) -> Fields:
    """The fields of the rotary positions, for configurations with an attribute `rope`.

    base: the publisher's default. interleave_key: a field that may change `interleaved`. alpha:
    whether the publisher's code knows the NTK stretching by `alpha`.

    "dynamic" without alpha changes the frequencies of texts beyond `max_position_embeddings` alone,
    which is the most that our model reads. "longrope" has other factors for texts beyond the
    original context, and then keys that are in a cache already would be wrong; so the model is
    limited to the original context, see `context_of`.
    """

    def read(group: Group, key: str) -> Rope:
        """Reads both spellings: `rope_parameters`, or `rope_theta` beside `rope_scaling`."""
        groups = {k: v for k in ("rope_parameters", key) if (v := group.data.get(k)) is not None}
        if len(groups) > 1 and len({repr(_spelled(each)) for each in groups.values()}) > 1:
            raise InputError(
                f"config.json: {' beside '.join(groups)} with other content; expected one of them"
            )
        key, data = next(iter(groups.items()), ("rope_parameters", {}))
        if not isinstance(data, Mapping):
            raise group.wrong(key, "a group of fields")
        inner = Group({"rope_theta": group.data.get("rope_theta"), **data}, f"{key}.")
        kind = str(data.get("rope_type", data.get("type", "default")))
        if kind == "dynamic" and alpha:
            kind = "alpha"
        if kind not in _ROPES or (kind == "alpha" and not alpha):
            kinds = "dynamic (with alpha)" if alpha else "dynamic"
            kinds = f"default, linear, {kinds}, yarn, llama3 or longrope"
            raise inner.wrong("rope_type" if "rope_type" in data else "type", kinds)
        theta, values = inner.get("rope_theta", float, base), inner.read(_ROPES[kind])
        known = {"rope_theta", "rope_type", "type", *(field.key for field in _ROPES[kind])}
        known |= set(_UNUSED if kind == "alpha" else ())
        for other in sorted(inner.data.keys() - known, key=str):
            if inner.data[other] is not None:
                raise inner.wrong(other, "nothing: it is not built")
        pairs = interleaved
        if interleave_key is not None:
            pairs = group.get(interleave_key, bool, interleaved)
        if kind == "yarn":
            return Rope(theta, pairs, yarn=Yarn(**values))
        if kind == "llama3":
            return Rope(theta, pairs, llama3=Llama3(**values))
        if kind == "longrope":
            return Rope(theta, pairs, longrope=_long_rope(group, **values))
        return Rope(theta, pairs, **values)

    theta = Field("rope_theta", write=lambda c: c.rope.base)
    scaling = Field("rope_scaling", "rope", read=read, write=_write_rope)
    if interleave_key is None:
        return theta, scaling
    return theta, scaling, Field(interleave_key, write=lambda c: c.rope.interleaved)


def _spelled(data: Any) -> Any:
    """The fields of a rotary group in one order and spelling, without those of other groups."""
    if not isinstance(data, Mapping):
        return data
    fields = {"rope_type" if key == "type" else key: value for key, value in data.items()}
    return sorted((str(k), v) for k, v in fields.items() if k != "rope_theta" and v is not None)


def _long_rope(
    group: Group,
    short: tuple[float, ...],
    factor: float | None,
    attention_factor: float | None,
    original_length: int | None,
) -> LongRope:
    """The factors of texts within the original context, and the magnitude, which concerns all."""
    longest = group.get("max_position_embeddings", int, 2_048)
    original = original_length or group.get("original_max_position_embeddings", int, longest)
    grown = factor or longest / original
    if attention_factor is None:
        grows = grown > 1 and original > 1
        attention_factor = math.sqrt(1 + math.log(grown) / math.log(original)) if grows else 1.0
    return LongRope(short, attention_factor)


def context_of(default: int = 2_048) -> Field:
    """The longest text: `max_position_embeddings`, or the original context where LongRoPE has other
    factors beyond it."""

    def read(group: Group, key: str) -> int:
        longest = group.get(key, int, default)
        for name in ("rope_parameters", "rope_scaling"):
            data = group.data.get(name)
            if isinstance(data, Mapping) and "longrope" in (
                data.get("rope_type"),
                data.get("type"),
            ):
                inner = Group(data, f"{name}.")
                above = group.get("original_max_position_embeddings", int, longest)
                return inner.get("original_max_position_embeddings", int, above)
        return longest

    return Field("max_position_embeddings", "context_length", default, read)


def _write_rope(config: Any) -> dict[str, Any] | None:
    found: Rope = config.rope
    if found.llama3 is not None:
        return {"rope_type": "llama3"} | write_fields(_LLAMA3, found.llama3)
    if found.longrope is not None:
        factors = list(found.longrope.factors)
        return {
            "rope_type": "longrope",
            "short_factor": factors,
            "long_factor": factors,
            "attention_factor": found.longrope.magnitude,
            "original_max_position_embeddings": config.context_length,
        }
    if found.linear_factor != 1.0:
        return {"rope_type": "linear", "factor": found.linear_factor}
    if found.yarn is not None:
        values = write_fields(_YARN, found.yarn)
        return {"type": "yarn"} | {key: v for key, v in values.items() if v is not None}
    stretched = found.ntk_alpha != 1.0
    return {"type": "dynamic", "alpha": found.ntk_alpha, "factor": 1.0} if stretched else None
