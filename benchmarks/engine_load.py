"""Many clients of one engine: exactness, memory, throughput and the time to the first token.

    python benchmarks/engine_load.py                       # a tiny model of random weights
    python benchmarks/engine_load.py --model=FOLDER|FILE.gguf --requests=64 --slots=8 --context=512

A tenth of the requests is cancelled and a tenth is wrong on purpose. Every other answer is compared
bitwise with that of an engine which serves the request alone and has no prompt cache, and with that
of `generate`, where it may differ if the two deciding scores, noise included, differ by less than
1e-4.
"""

import argparse
import ctypes
import dataclasses
import itertools
import random
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slam_jax.errors import UserError
from slam_jax.generation import Request, Sampling, generate
from slam_jax.generation.answering import Answer
from slam_jax.generation.requests import allowed_tokens, read_inputs, read_prompts
from slam_jax.generation.sampling import keep_allowed
from slam_jax.serving import Engine, Event, RequestFailed

TEXT = "the cat dog saw sat on mat a red blue circle and then some more of it naïve café 日本"
WORDS = TEXT.split(" ")
BROKEN = ("prompt", "seed", "num_top", "inputs", "on_event", "copy", "allowed", "advance", "empty")
NEARLY = 1e-4


@dataclasses.dataclass(frozen=True)
class Case:
    """A request of a client. kind: "whole", "cancelled" or one of BROKEN."""

    kind: str
    request: Request
    sampling: Sampling


@dataclasses.dataclass
class Outcome:
    """answer: of a whole request. first: seconds to its first token. wrong: what was not as it
    should be."""

    answer: Answer | None = None
    first: float | None = None
    wrong: str | None = None


@dataclasses.dataclass
class Load:
    """What a load has shown. rss: bytes resident after the first requests, and at the end."""

    cases: list[Case]
    outcomes: list[Outcome]
    seconds: float
    rss: tuple[int, int]

    def whole(self) -> list[tuple[Case, Answer]]:
        pairs = zip(self.cases, self.outcomes, strict=True)
        return [(case, found.answer) for case, found in pairs if found.answer is not None]

    @property
    def wrong(self) -> list[str]:
        return [found.wrong for found in self.outcomes if found.wrong is not None]

    @property
    def new_tokens(self) -> int:
        return sum(count(answer) for _, answer in self.whole())


class Breaks:
    """A constraint of which one method fails, or which allows nothing."""

    finished = False

    def __init__(self, name: str, size: int, error: type[BaseException] = ValueError):
        self.name, self.size, self.error = name, size, error

    def copy(self) -> "Breaks":
        return self._unless("copy", self)

    def allowed(self) -> np.ndarray:
        return self._unless("allowed", np.full(self.size, self.name != "empty"))

    def advance(self, token: int) -> None:
        self._unless("advance", None)

    def _unless(self, name: str, value: Any) -> Any:
        if name == self.name:
            raise self.error(f"{name} failed")
        return value


def make_cases(number: int, room: int, inputs: Sequence[dict[str, Any]] = ({},)) -> list[Case]:
    """Requests of random lengths and rules. room: tokens of a slot. inputs: those of a request."""
    rng = random.Random(0)
    beginnings = [" ".join(rng.choices(WORDS, k=room // 6)) for _ in range(4)]
    broken = itertools.cycle(BROKEN)
    cases = []
    for i in range(number):
        words = rng.choices(WORDS, k=rng.randint(1, max(1, room // 16)))
        prompt = " ".join([rng.choice(beginnings), *words] if rng.random() < 0.5 else words)
        drawn = rng.random() < 0.7
        sampling = Sampling(
            max_new_tokens=rng.choice((1, 4, 12, 16)),
            temperature=rng.uniform(0.5, 1.5) if drawn else 0.0,
            top_k=rng.choice((None, None, 5, 40)),
            top_p=rng.choice((None, None, 0.9)),
            min_p=rng.choice((None, None, 0.05)),
            repetition_penalty=rng.choice((1.0, 1.0, 1.3)),
            num_samples=rng.choice((1, 1, 1, 2)),
            stop=rng.choice(((), (), ("e",), ("at", "lu"))),
        )
        kind = {0: "cancelled", 5: next(broken)}.get(i % 10, "whole")
        cases.append(Case(kind, Request(prompt, seed=i % 97, **rng.choice(inputs)), sampling))
    return cases


def run_load(engine: Engine, cases: list[Case], clients: int, after: int = 200) -> Load:
    """Submits all cases from so many threads. rss is first read when `after` of them are done."""
    outcomes = [Outcome() for _ in cases]
    numbers, done, rss = itertools.count(), itertools.count(1), [0, 0]

    def client() -> None:
        while (i := next(numbers)) < len(cases):
            try:
                outcomes[i] = serve(engine, cases[i])
            except Exception as error:
                outcomes[i] = Outcome(wrong=f"{cases[i].kind}: {error!r}")
            if next(done) == after:
                rss[0] = resident()

    threads = [threading.Thread(target=client) for _ in range(clients)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - start
    rss[1] = resident()
    return Load(cases, outcomes, seconds, (rss[0] or rss[1], rss[1]))


def serve(engine: Engine, case: Case) -> Outcome:
    """One request, as a client sees it."""
    if case.kind in BROKEN:
        return serve_broken(engine, case)
    first: list[float] = []
    start = time.perf_counter()

    def on_event(event: Event) -> None:
        if not first:
            first.append(time.perf_counter() - start)

    ticket = engine.submit(case.request, case.sampling, on_event=on_event)
    if case.kind == "cancelled":
        time.sleep(0.001 * (case.request.seed % 8))
        ticket.cancel()
        ticket.result(600.0)
        return Outcome()
    return Outcome(ticket.result(600.0), first[0])


def serve_broken(engine: Engine, case: Case) -> Outcome:
    """A request that must fail, for the reason that it has, and in no other way."""
    request: Any = case.request
    settings: Any = {}
    if case.kind == "prompt":
        request = dataclasses.replace(request, prompt="cat " * 20_000)
    elif case.kind == "seed":
        request = dataclasses.replace(request, seed=-1)
    elif case.kind == "inputs":
        request = dataclasses.replace(request, text=3)
    elif case.kind == "num_top":
        settings = {"num_top": 1_000}
    elif case.kind == "on_event":
        settings = {"on_event": fail}
    else:
        size = engine.vocabulary
        settings = {"constraint": Breaks(case.kind, size)}
    try:
        engine.submit(request, case.sampling, **settings).result(600.0)
    except RequestFailed as error:
        early = case.kind in ("prompt", "seed", "inputs", "num_top")
        return Outcome(wrong=f"{case.kind}: {error}" if early else None)
    except UserError as error:
        late = case.kind not in ("prompt", "seed", "inputs", "num_top")
        return Outcome(wrong=f"{case.kind}: {error}" if late else None)
    return Outcome(wrong=f"{case.kind}: it did not fail")


def fail(event: Event) -> None:
    raise ValueError("on_event failed")


def serve_alone(engine: Engine, pairs: list[tuple[Case, Answer]]) -> tuple[int, float]:
    """How many answers differ from those that the engine gives to one request at a time, and its
    new tokens a second."""
    differ, new, start = 0, 0, time.perf_counter()
    for case, answer in pairs:
        alone = engine.submit(case.request, case.sampling).result()
        differ += alone != answer
        new += count(alone)
    return differ, new / (time.perf_counter() - start)


def compare_generate(loaded: Any, pairs: list[tuple[Case, Answer]]) -> Counter[str]:
    """How many samples are equal to those of `generate`, nearly tied where they differ, or
    wrong."""
    counts: Counter[str] = Counter()
    for case, answer in pairs:
        [expected] = generate(loaded, [case.request], case.sampling)
        for number, (a, b) in enumerate(zip(answer.samples, expected.samples, strict=True)):
            if a.tokens == b.tokens:
                close = np.allclose(a.logprobs, b.logprobs, atol=1e-3)
                counts["equal" if close and a[::3] == b[::3] else "wrong"] += 1
            else:
                gap = deciding_gap(loaded, case, number, a.tokens, b.tokens)
                counts["nearly tied" if gap < NEARLY else "wrong"] += 1
    return counts


def deciding_gap(
    loaded: Any, case: Case, number: int, ours: Sequence[int], others: Sequence[int]
) -> float:
    """The difference of the scores, noise included, of the first two tokens that differ."""
    pairs = list(zip(ours, others, strict=False))
    place = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    if place is None:
        return float("inf")
    prompts = read_prompts(loaded, [case.request], 1)
    prompt = prompts.tokens[0, : prompts.lengths[0]].tolist()
    inputs = read_inputs(loaded, [case.request])
    memory = None if inputs is None else loaded.model.encode(inputs)
    row = np.array([prompt + list(ours[:place])], np.int32)
    cache = loaded.model.init_cache((1,), row.shape[1])
    logits = loaded.model.prefill(row, cache, memory)[0][0, -1]
    allowed = allowed_tokens(loaded)
    if allowed is not None:
        logits = jnp.where(allowed, logits, -jnp.inf)
    seen = np.zeros(len(logits), bool)
    seen[row[0]] = True
    penalty = case.sampling.repetition_penalty
    scores = jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
    if case.sampling.temperature:
        key = jax.random.fold_in(jax.random.key(case.request.seed), number)
        noise = jax.random.gumbel(jax.random.fold_in(key, place), scores.shape, scores.dtype)
        scaled = (scores - scores.max()) / case.sampling.temperature
        scores = keep_allowed(scaled, case.sampling.rules) + noise
    return abs(float(scores[ours[place]] - scores[others[place]]))


def count(answer: Answer) -> int:
    return sum(len(sample.tokens) for sample in answer.samples)


def resident() -> int:
    """The bytes of this process in memory, without what glibc holds although it is free."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmRSS"))


def tiny_model() -> Any:
    """A language model of random weights."""
    from flax import nnx

    from slam_jax.data import Tokenizer
    from slam_jax.generation import ModelAndTokenizer
    from slam_jax.language_models import make_config, make_model

    tokenizer = Tokenizer.train([TEXT] * 9, 300)
    config = make_config("standard", "tiny", vocab_size=tokenizer.vocab_size, context_length=256)
    graphdef, shapes = nnx.split(nnx.eval_shape(lambda: make_model(config, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: jnp.array(rng.normal(0, 0.2, p.shape), p.dtype), shapes)
    return ModelAndTokenizer(nnx.merge(graphdef, params), tokenizer)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--model", help="as `slam_jax.load` takes it; without, a tiny model")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--context", type=int)
    parser.add_argument("--chunk", type=int, default=64)
    parser.add_argument("--prompt_cache_mb", type=int, default=16)
    args = parser.parse_args()
    if args.model is None:
        loaded = tiny_model()
    else:
        from slam_jax import load

        loaded = load(args.model)
    settings: Any = dict(
        max_waiting=args.clients, slots=args.slots, context=args.context, chunk=args.chunk
    )
    with Engine(loaded, **settings, prompt_cache_mb=args.prompt_cache_mb) as engine:
        cases = make_cases(args.requests, engine.context)
        run_load(engine, cases[:24], args.clients)  # compiles
        load = run_load(engine, cases, args.clients)
        stats = engine.stats()
    with Engine(loaded, **settings, prompt_cache_mb=0) as other:
        serve_alone(other, load.whole()[:8])
        differ, rate = serve_alone(other, load.whole())
    report(load, differ, rate, stats)
    counts = compare_generate(loaded, load.whole())
    print(f"compared with generate: {dict(counts)}")


def report(load: Load, differ: int, rate: float, stats: Any) -> None:
    firsts = sorted(found.first for found in load.outcomes if found.first is not None)
    ours, late = load.new_tokens / load.seconds, firsts[int(0.95 * len(firsts))]
    print(f"{len(load.cases):,} requests in {load.seconds:.1f} s; slots: {stats.slots}")
    print(f"not as they should be: {len(load.wrong)} {load.wrong[:3]}")
    print(f"whole answers: {len(load.whole()):,}; differ from those alone: {differ}")
    print(f"slots in use at the end: {stats.active}; waiting: {stats.waiting}")
    print(f"resident memory: {load.rss[0] >> 20:,} MiB, then {load.rss[1] >> 20:,} MiB")
    print(f"new tokens a second: {ours:,.0f}; one at a time {rate:,.0f}; ratio {ours / rate:.2f}")
    print(f"time to the first token, 95th percentile: {late * 1e3:,.0f} ms")
    print(f"prompt tokens: {stats.prompt_tokens:,}, reused {stats.reused_prompt_tokens:,}")


if __name__ == "__main__":
    main()
