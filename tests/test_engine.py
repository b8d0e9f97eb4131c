"""An engine gives each request the answer that it has alone, whoever joins, leaves or fails."""

import dataclasses
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_generation import UNEQUAL, make_loaded, picture
from test_hub_tokenizer import TEMPLATE, byte_level

from benchmarks.engine_load import Breaks
from slam_jax.data import HubTokenizer
from slam_jax.errors import ConfigError, InputError
from slam_jax.generation import ModelAndTokenizer, Request, Sampling, generate
from slam_jax.generation.answering import Answer
from slam_jax.language_models import make_config, make_model
from slam_jax.serving import Engine, EngineClosed, Event, QueueFull, RequestFailed, memories
from slam_jax.serving.recent import Recent
from slam_jax.slam_v3.config import DecoderConfig

DRAWN = Sampling(max_new_tokens=12, temperature=1.0, top_p=0.9, num_samples=2)
STOPPED = Sampling(
    max_new_tokens=12,
    temperature=1.5,
    repetition_penalty=1.3,
    num_samples=2,
    stop=("<|user|>", "e"),
)
GREEDY = Sampling(max_new_tokens=16)
PROMPTS = ["the cat", "the dog saw the cat " * 3, "naïve café 日本"]
ASKED = [
    *((Request(prompt, seed=i), DRAWN) for i, prompt in enumerate(PROMPTS)),
    *((Request(prompt, seed=i), STOPPED) for i, prompt in enumerate(PROMPTS)),
    (Request(PROMPTS[1]), GREEDY),
    (Request("x", seed=9), Sampling(max_new_tokens=1, temperature=2.0, top_k=4, min_p=0.1)),
]


def language(name: str = "standard", **changes: Any) -> ModelAndTokenizer:
    """A model of random weights, of which four rows of the vocabulary are no tokens."""
    ends = (1, *range(200, 220))
    tokenizer = HubTokenizer(byte_level(bos=False).to_str(), ends, chat_template=TEMPLATE)
    changes = {"vocab_size": tokenizer.vocab_size + 4, "context_length": 96, **changes}
    config = make_config(name, "tiny", **changes)
    graphdef, shapes = nnx.split(nnx.eval_shape(lambda: make_model(config, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: jnp.array(rng.normal(0, 0.2, p.shape), p.dtype), shapes)
    return ModelAndTokenizer(nnx.merge(graphdef, params), tokenizer)


@pytest.fixture(scope="module")
def loaded() -> ModelAndTokenizer:
    return language()


@pytest.fixture(scope="module")
def engine(loaded) -> Iterator[Engine]:
    with Engine(loaded, slots=3, chunk=16) as engine:
        yield engine


@pytest.fixture(scope="module")
def alone(engine) -> list[Answer]:
    return [engine.submit(*each).result() for each in ASKED]


def assert_idle(engine: Engine) -> None:
    """All slots are free soon."""
    for _ in range(200):
        stats = engine.stats()
        if not stats.active and not stats.waiting:
            return
        time.sleep(0.05)
    raise AssertionError(stats)


def assert_close(answer: Answer, expected: Answer) -> None:
    for a, b in zip(answer.samples, expected.samples, strict=True):
        assert (a.tokens, a.text, a.finish) == (b.tokens, b.text, b.finish)
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)


def test_answers_are_those_of_generate(loaded, alone):
    for sampling in (DRAWN, STOPPED):
        chosen = [i for i, each in enumerate(ASKED) if each[1] is sampling]
        expected = generate(loaded, [ASKED[i][0] for i in chosen], sampling)
        for i, answer in zip(chosen, expected, strict=True):
            assert_close(alone[i], answer)
    finishes = {sample.finish for answer in alone for sample in answer.samples}
    assert finishes == {"end", "stop", "length"}
    known = loaded.tokenizer.vocab_size
    assert max(t for answer in alone for s in answer.samples for t in s.tokens) < known


def check_bits(engine: Engine, asked: list[Any], alone: list[Answer]) -> None:
    """Among others, some of which are cancelled, in any order and slot, nothing changes."""
    tickets, other = [], "cancelled " * (engine.context // 20)
    for seed in range(3):
        for i in np.random.default_rng(seed).permutation(len(asked)):
            tickets.append((i, engine.submit(*asked[i])))
            if i % 3 == 0:
                neighbour = dataclasses.replace(asked[i][0], prompt=other, seed=seed)
                ticket = engine.submit(neighbour, Sampling(16, temperature=1.0))
                if i % 2 == 0:
                    ticket.cancel()
    for i, ticket in tickets:
        assert ticket.result() == alone[i]
    assert engine.stats().reused_prompt_tokens > 0
    assert_idle(engine)


def test_bits_do_not_depend_on_neighbours_slots_cancellations_or_stored_prompts(engine, alone):
    check_bits(engine, ASKED, alone)


KINDS = {
    "bfloat16": lambda: language(dtype="bfloat16"),
    "states": lambda: language("jamba"),
    "latents": lambda: language("deepseek_v2"),
    "mixture in bfloat16": lambda: language("deepseek_v2", dtype="bfloat16"),
    "more rows of experts": lambda: language("moe", num_experts_per_token=2),
    "layers that share keys": lambda: language("hunyuan_large"),
    "ring": lambda: language("standard", window=8),
    "short convolution": lambda: language("slam_v6"),
    "SLAM v3": lambda: make_loaded(window=8),
    "SLAM v3 in bfloat16": lambda: make_loaded(dtype="bfloat16"),
    "SLAM v3 with a bottleneck": lambda: make_loaded(num_memory_tokens=4),
    "SLAM v3 with a language model": lambda: make_loaded(decoder=standard_decoder()),
}


def standard_decoder() -> DecoderConfig:
    vocab_size = make_loaded().tokenizer.vocab_size
    settings: Any = dict(vocab_size=vocab_size, context_length=64)
    return DecoderConfig("folder", 2, "standard", make_config("standard", "tiny", **settings))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_bits_of_every_kind_of_cache_and_answers_of_generate(kind):
    loaded, asked = KINDS[kind](), ASKED[:3] + ASKED[5:]
    if "SLAM v3" in kind:
        about = [{"image": picture(1)}, {"text": "red", "image": picture(2)}]
        for i, (request, rules) in enumerate(asked):
            request = dataclasses.replace(request, prompt=request.prompt[:24], **about[i % 2])
            asked[i] = (request, dataclasses.replace(rules, stop=()))
    with Engine(loaded, slots=5, chunk=16) as engine:
        alone = [engine.submit(*each).result() for each in asked]
        check_bits(engine, asked, alone)
    with Engine(loaded, slots=5, chunk=16, prompt_cache_mb=0) as engine:
        assert [engine.submit(*each).result() for each in asked] == alone
    if "bfloat16" not in kind:
        for each, answer in list(zip(asked, alone, strict=True))[:2]:
            assert_close(answer, generate(loaded, [each[0]], each[1])[0])


def test_the_next_turn_of_a_conversation_reads_no_chunk_of_its_prompt_twice(engine, monkeypatch):
    turns = [{"role": "user", "content": PROMPTS[1]}]
    first = engine.submit(Request(messages=turns), GREEDY)
    turns += [{"role": "assistant", "content": "the cat"}, {"role": "user", "content": "the dog"}]
    first.result()
    before = engine.stats().reused_prompt_tokens
    second = engine.submit(Request(messages=turns), GREEDY)
    again = second.result()
    whole = (first.prompt_tokens - 1) // 16 * 16
    assert engine.stats().reused_prompt_tokens - before == whole > 0
    assert (first.reused_prompt_tokens, second.reused_prompt_tokens) == (0, whole)
    monkeypatch.setattr(engine._scheduler._prompts, "_chunks", Recent(0))
    assert engine.submit(Request(messages=turns), GREEDY).result() == again
    assert engine.stats().reused_prompt_tokens - before == whole


def test_events_come_in_order_and_make_up_the_answer(engine, alone):
    for (request, sampling), answer in zip(ASKED, alone, strict=True):
        events = list(engine.submit(request, sampling, num_top=3))
        for number, sample in enumerate(answer.samples):
            own = [event for event in events if event.sample == number]
            assert "".join(event.text for event in own) == sample.text
            assert sum((event.tokens for event in own), ()) == sample.tokens
            assert sum((event.logprobs for event in own), ()) == sample.logprobs
            assert [event.finish for event in own] == [None] * (len(own) - 1) + [sample.finish]
            for event in own:
                [top], [token], [logprob] = event.top, event.tokens, event.logprobs
                assert len(top) == 3 and sorted(top, key=lambda each: -each[1]) == list(top)
                assert dict(top).get(token, logprob) == logprob <= top[0][1]


def test_memories_are_shared_and_answers_are_those_of_generate():
    loaded = make_loaded()
    requests = [UNEQUAL[1], Request("circle", text="red", seed=3)]
    with Engine(loaded, slots=2, chunk=16) as engine:
        alone = [engine.submit(request, DRAWN).result() for request in requests]
        again = [engine.submit(request, DRAWN) for request in requests * 2]
        assert [ticket.result() for ticket in again] == alone * 2
        stats = engine.stats()
        assert (stats.encodes, stats.reused_encodes) == (2, 4)
        long = Request("red", aux=np.zeros((1000, 5)))
        with pytest.raises(InputError, match="memory tokens and there is room for"):
            engine.submit(long)
        held, released = threading.Event(), threading.Event()

        def slow(*given: Any, **settings: Any) -> Any:
            held.set()
            released.wait(60)
            return encode(*given, **settings)

        encode = memories._encode
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(memories, "_encode", slow)
            new = Request("circle", text="blue", seed=3)
            caller = threading.Thread(target=lambda: engine.submit(new, DRAWN))
            caller.start()
            assert held.wait(60)
            running = engine.submit(requests[0], DRAWN)
            assert running.result(30.0) == alone[0], "it waited for the inputs of another request"
            released.set()
            caller.join()
    for answer, expected in zip(alone, generate(loaded, requests, DRAWN), strict=True):
        assert_close(answer, expected)


def test_a_cancelled_request_ends_at_once_and_a_late_one_times_out(engine, alone):
    cancelled = threading.Event()
    settings: Any = dict(on_event=lambda event: cancelled.wait(60))
    ticket = engine.submit(*ASKED[0], **settings)
    ticket.cancel()
    cancelled.set()
    late = engine.submit(*ASKED[0], deadline=0.0).result()
    for finish, answer in (("cancelled", ticket.result()), ("timeout", late)):
        for sample, whole in zip(answer.samples, alone[0].samples, strict=True):
            assert sample.finish == finish and len(sample.tokens) <= 1 < len(whole.tokens)
            assert sample.tokens == whole.tokens[: len(sample.tokens)]
    assert_idle(engine)


@pytest.mark.parametrize("name", ["copy", "allowed", "advance", "empty", "on_event"])
@pytest.mark.parametrize("error", [ValueError, SystemExit])
def test_what_fails_in_one_request_ends_that_request_alone(engine, loaded, alone, name, error):
    def on_event(event: Event) -> None:
        raise error("on_event failed")

    neighbour = engine.submit(*ASKED[0])
    if name == "on_event":
        failing = engine.submit(*ASKED[1], on_event=on_event)
    else:
        constraint = Breaks(name, loaded.model.config.vocab_size, error)
        failing = engine.submit(*ASKED[1], constraint=constraint)
    with pytest.raises(RequestFailed, match="failed|it allows no token"):
        failing.result(60.0)
    assert neighbour.result() == alone[0]
    assert_idle(engine)


class Only:
    """A constraint: the given tokens one after the other."""

    def __init__(self, tokens: list[int], size: int):
        self.tokens, self.size = list(tokens), size

    def copy(self) -> "Only":
        return Only(self.tokens, self.size)

    def allowed(self) -> np.ndarray:
        return np.arange(self.size) == self.tokens[0]

    def advance(self, token: int) -> None:
        assert token == self.tokens.pop(0)

    @property
    def finished(self) -> bool:
        return not self.tokens


def test_a_constraint_says_what_may_come_and_log_probabilities_stay_those_of_the_model(
    engine, loaded
):
    tokens = loaded.tokenizer.encode("the dog")
    constraint = Only(tokens, loaded.model.config.vocab_size)
    answer = engine.submit(Request("the cat"), DRAWN, constraint=constraint).result()
    ids = np.array([loaded.tokenizer.encode_prompt("the cat") + tokens])
    known = loaded.tokenizer.vocab_size
    logits = jax.jit(lambda model, ids: model(ids).logits[0, :, :known])(loaded.model, ids)
    logprobs = jax.nn.log_softmax(logits)[-len(tokens) - 1 : -1]
    for sample in answer.samples:
        assert (sample.text, sample.finish) == ("the dog", "end")
        found = logprobs[np.arange(len(tokens)), np.array(tokens)]
        np.testing.assert_allclose(sample.logprobs, found, atol=1e-4)


def test_text_that_may_become_a_stop_string_is_held_back(engine, loaded):
    letters = [token for letter in "the dog sat" for token in loaded.tokenizer.encode(letter)]
    constraint = Only(letters, loaded.model.config.vocab_size)
    sampling = Sampling(20, stop=("dog sits", "og s"))
    events = list(engine.submit(Request("the cat"), sampling, constraint=constraint))
    assert "".join(event.text for event in events) == "the d"
    assert events[-1].finish == "stop"


def test_a_failure_of_the_device_ends_what_runs_and_the_engine_goes_on(engine, alone, monkeypatch):
    step = engine._scheduler._slots.step
    failures = [ValueError("device failed")]

    def failing(*args: Any) -> Any:
        if failures:
            raise failures.pop()
        return step(*args)

    monkeypatch.setattr(engine._scheduler._slots, "step", failing)
    with pytest.raises(RequestFailed, match="device failed"):
        engine.submit(*ASKED[0]).result()
    assert engine.submit(*ASKED[0]).result() == alone[0]
    assert not engine.stats().broken


def test_a_device_that_fails_always_breaks_the_engine_which_says_so(loaded, monkeypatch):
    def failing(*args: Any) -> Any:
        raise ValueError("device failed")

    with Engine(loaded, slots=2, chunk=16) as engine:
        monkeypatch.setattr(engine._scheduler._slots, "step", failing)
        tickets = [engine.submit(Request("the", seed=i)) for i in range(20)]
        for ticket in tickets:
            with pytest.raises(RequestFailed, match="device failed"):
                ticket.result()
        assert engine.stats().broken
        with pytest.raises(EngineClosed, match="the engine broke"):
            engine.submit(Request("the"))


def test_only_so_many_requests_wait_and_a_closed_engine_takes_none(loaded):
    gate = threading.Event()
    engine = Engine(loaded, slots=3, chunk=16, max_waiting=2)

    def hold(event: Event) -> None:
        gate.wait()

    held = engine.submit(Request("the"), Sampling(2), on_event=hold)
    while engine.stats().waiting:
        time.sleep(0.01)
    tickets = [engine.submit(Request("the"), Sampling(2)) for _ in range(2)]
    try:
        with pytest.raises(QueueFull, match="2 requests wait, which is max_waiting"):
            engine.submit(Request("the"))
    finally:
        gate.set()
    engine.close()
    assert all(ticket.done for ticket in (held, *tickets))
    with pytest.raises(EngineClosed, match="the engine is closed"):
        engine.submit(Request("the"))


@pytest.mark.parametrize(
    ("request_", "settings", "message"),
    [
        (Request("the"), {"num_top": 21}, "num_top is 21; expected 0 to 20"),
        (Request("the"), {"deadline": float("nan")}, "deadline is nan"),
        (Request("the"), {"sampling": Sampling(96)}, "prompt of 1 tokens and 96 new ones"),
        (Request("the " * 99), {}, r"prompt of \d+ tokens and 1 new ones"),
        (
            Request(messages=[{"role": "user", "content": "a" * 10**4}] * 3),
            {},
            "prompt of 30,000 characters; the context is 96 tokens",
        ),
        (Request("the", text="red"), {}, "this model reads prompts alone"),
        (Request("the", seed=-1), {}, "seed is -1"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused_at_once(engine, request_, settings, message):
    with pytest.raises(InputError, match=message):
        engine.submit(request_, **settings)


def test_arguments_of_an_engine_are_checked(loaded):
    for name, value in {"slots": 0, "context": 97, "chunk": 8, "max_waiting": 0}.items():
        with pytest.raises(ConfigError, match=f"{name} is {value}; expected at"):
            Engine(loaded, **{name: value})
    with pytest.raises(ConfigError, match="chunk is 24; expected a power of two"):
        Engine(loaded, chunk=24)


def test_the_least_recently_used_values_are_dropped():
    kept = Recent(24)
    for key in "abc":
        kept.put(key, np.zeros(1))
    kept.touch("ba")
    kept.put("d", np.zeros(1))
    assert [kept.get(key) is not None for key in "abcd"] == [True, True, False, True]
    kept.put("e", np.zeros(4))
    assert kept.get("e") is None and (len(kept), kept.num_bytes) == (3, 24)
