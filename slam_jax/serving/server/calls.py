"""Requests of OpenAI's protocol, checked, as requests to the engine."""

import dataclasses
import secrets
from collections.abc import Mapping
from typing import Any

from slam_jax.errors import InputError
from slam_jax.generation import Request, Sampling
from slam_jax.serving.server.fields import Fields
from slam_jax.serving.server.messages import read_aux, read_image, read_messages, to_request
from slam_jax.serving.server.refusals import Refused
from slam_jax.serving.server.served import Served

_MOST_TOP = 20  # alternatives of each token
_MOST_TOP_OF_COMPLETIONS = 5
_LIMIT = "max_completion_tokens"  # the newer name of max_tokens

# Fields that change no answer: notes of the client, where it is stored, and what is charged.
_IGNORED = frozenset(
    {
        *("user", "metadata", "store", "service_tier", "safety_identifier", "prediction"),
        *("prompt_cache_key", "prompt_cache_retention", "parallel_tool_calls"),
    }
)
_NO_TOOLS = "this server calls no tools; leave it out"
# Fields that are known, with the values that change nothing.
_ONLY: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "tools": (([],), _NO_TOOLS),
    "tool_choice": (("none", "auto"), _NO_TOOLS),
    "functions": (([],), _NO_TOOLS),
    "function_call": (("none", "auto"), _NO_TOOLS),
    "logit_bias": (({},), "not supported; leave it out"),
    "presence_penalty": ((0, 0.0), "not supported but as 0; use repetition_penalty"),
    "frequency_penalty": ((0, 0.0), "not supported but as 0; use repetition_penalty"),
    "modalities": ((["text"],), 'this server answers in texts; expected ["text"]'),
    "reasoning_effort": (("none",), "not supported; leave it out"),
    "verbosity": ((), "not supported; leave it out"),
    "audio": ((), "this server answers in texts; leave it out"),
    "web_search_options": ((), "this server searches nothing; leave it out"),
}


@dataclasses.dataclass(frozen=True)
class Call:
    """A checked request.

    chat: of /v1/chat/completions; else of /v1/completions. requests: one, or one of each prompt.
    num_top: how many alternatives of each token are shown; None = no log-probabilities at all.
    constraint: what the answer must be, as ("choice" | "regex" | "json", value); None = anything.
    """

    chat: bool
    requests: tuple[Request, ...]
    sampling: Sampling
    stream: bool = False
    include_usage: bool = False
    num_top: int | None = None
    constraint: tuple[str, Any] | None = None


def read_chat(given: Mapping[str, Any], served: Served) -> Call:
    """The call of a body of /v1/chat/completions; raises Refused."""
    fields = Fields(given)
    _check_model(fields, served)
    sampling, seed = _read_sampling(fields, served)
    messages, aux = read_messages(fields.take("messages"), served), read_aux(fields, served)
    logprobs, num_top = fields.flag("logprobs"), fields.whole("top_logprobs", 0, _MOST_TOP)
    if num_top and not logprobs:
        raise Refused("top_logprobs: needs logprobs to be true", "top_logprobs")
    constraint = _read_constraint(fields)
    stream, usage = _read_stream(fields)
    _finish(fields)
    request = to_request(messages, aux, seed, served)
    top = (num_top or 0) if logprobs else None
    return Call(True, (request,), sampling, stream, usage, top, constraint)


def read_completion(given: Mapping[str, Any], served: Served) -> Call:
    """The call of a body of /v1/completions; raises Refused.

    Where the model reads more than prompts, `images` (data URLs), `text` and `aux` are its inputs.
    """
    fields, most = Fields(given), served.limits.prompts
    _check_model(fields, served)
    sampling, seed = _read_sampling(fields, served)
    prompts = fields.take("prompt")
    prompts = [prompts] if isinstance(prompts, str) else prompts
    if not isinstance(prompts, list) or not prompts:
        raise Refused("prompt: expected a text or a list of texts", "prompt")
    if not all(isinstance(prompt, str) for prompt in prompts):
        raise Refused("prompt: expected texts; numbers of tokens are not read", "prompt")
    if len(prompts) > most or len(prompts) * sampling.num_samples > served.limits.samples:
        raise Refused(
            f"{len(prompts):,} prompts with n = {sampling.num_samples}; at most {most:,} prompts "
            f"and {served.limits.samples:,} answers in sum",
            "prompt",
        )
    urls = fields.texts("images", most) or []
    images = [read_image(url, f"images[{i}]") for i, url in enumerate(urls)]
    text, aux = fields.text("text"), read_aux(fields, served)
    num_top = fields.whole("logprobs", 0, _MOST_TOP_OF_COMPLETIONS)
    fields.only("echo", False, why="not supported; leave it out")
    fields.only("suffix", "", why="not supported; leave it out")
    fields.only("best_of", 1, sampling.num_samples, why="not supported; use n")
    constraint = _read_constraint(fields)
    stream, usage = _read_stream(fields)
    _finish(fields)
    made = tuple(Request(prompt, text, images or None, aux, seed) for prompt in prompts)
    return Call(False, made, sampling, stream, usage, num_top, constraint)


def _check_model(fields: Fields, served: Served) -> None:
    name = fields.text("model")
    if name not in (None, served.name):
        raise Refused(
            f"model {name[:80]!r} is not here; this server has {served.name!r}",
            "model",
            status=404,
            code="model_not_found",
        )


def _read_sampling(fields: Fields, served: Served) -> tuple[Sampling, int]:
    """The rules, and the seed: that of the client modulo 2**32, or else a random one."""
    limits = served.limits
    stop = fields.texts("stop", limits.stops) or []
    if any(not text for text in stop) or sum(map(len, stop)) > limits.stop_length:
        expected = f"texts that are not empty, of at most {limits.stop_length:,} letters in sum"
        raise Refused(f"stop: expected {expected}", "stop")
    tokens = [fields.whole(name, 1, served.context) for name in ("max_tokens", _LIMIT)]
    if None not in tokens and len(set(tokens)) > 1:
        raise Refused(f"max_tokens and {_LIMIT} differ; give one of them", "max_tokens")
    seed = fields.whole("seed", -(2**63), 2**64 - 1)
    try:
        sampling = Sampling(
            max_new_tokens=next((each for each in tokens if each is not None), None),
            temperature=fields.number("temperature", 0.0, 100.0) or 0.0,
            top_p=fields.number("top_p", 0.0, 1.0),
            top_k=fields.whole("top_k", -1, 2**31 - 1),
            min_p=fields.number("min_p", 0.0, 1.0),
            repetition_penalty=fields.number("repetition_penalty", 1e-3, 1e3) or 1.0,
            num_samples=fields.whole("n", 1, limits.samples) or 1,
            stop=stop,
        )
    except InputError as error:
        raise Refused(str(error)) from None
    return sampling, secrets.randbits(32) if seed is None else seed % 2**32


def _read_constraint(fields: Fields) -> tuple[str, Any] | None:
    """The constraint of `response_format`, or of `structured_outputs`, a field of vLLM."""
    found = [_read_format(fields), _read_structured(fields)]
    if None not in found:
        raise Refused("response_format and structured_outputs; give one of them", "response_format")
    return next((each for each in found if each is not None), None)


def _read_format(fields: Fields) -> tuple[str, Any] | None:
    group = fields.group("response_format")
    if group is None:
        return None
    kind = group.text("type")
    if kind not in ("text", "json_object", "json_schema"):
        group.refuse("type", kind, "text, json_object or json_schema")
    holder = group.group("json_schema") if kind == "json_schema" else None
    group.done()
    if kind == "text":
        return None
    if kind == "json_object":
        return "json", {"type": "object"}
    schema = None if holder is None else holder.take("schema")
    if holder is None or not isinstance(schema, dict):
        group.refuse("json_schema", schema, 'an object, as in {"schema": {...}}')
    # Answers always follow the schema.
    holder.done(frozenset({"name", "description", "strict"}))
    return "json", schema


def _read_structured(fields: Fields) -> tuple[str, Any] | None:
    group = fields.group("structured_outputs")
    if group is None:
        return None
    found = {"choice": group.texts("choice", 1024), "regex": group.text("regex")}
    schema = group.take("json")
    if schema is not None and not isinstance(schema, dict | str):
        group.refuse("json", schema, "a JSON schema")
    group.done()
    given = [(kind, v) for kind, v in {**found, "json": schema}.items() if v is not None]
    if len(given) != 1:
        expected = "one of choice, regex and json"
        raise Refused(f"structured_outputs: expected {expected}", "structured_outputs")
    return given[0]


def _read_stream(fields: Fields) -> tuple[bool, bool]:
    """Whether to stream, and whether to end with the numbers of tokens."""
    stream, options = fields.flag("stream"), fields.group("stream_options")
    if options is None:
        return stream, False
    if not stream:
        raise Refused("stream_options: needs stream to be true", "stream_options")
    usage = options.flag("include_usage")
    options.done(frozenset({"include_obfuscation"}))
    return stream, usage


def _finish(fields: Fields) -> None:
    for name, (values, why) in _ONLY.items():
        fields.only(name, *values, why=why)
    fields.done(_IGNORED)


def as_constraint(loaded: Any, wanted: tuple[str, Any] | None) -> Any:
    """The engine's constraint; raises InputError where no answer can meet it."""
    if wanted is None:
        return None
    # It needs llguidance, which a server without constraints does not.
    from slam_jax.serving.constraints import choices, json_schema, regex

    kind, value = wanted
    return {"choice": choices, "regex": regex, "json": json_schema}[kind](loaded, value)
