"""A server for clients of OpenAI's protocol: slam-serve --model=DIR

Prints its address and a call to try; Ctrl-C or SIGTERM ends it after the answers in progress. Only
programs on this machine reach it; --host gives another address, which needs a key. Needs
`pip install 'slam_jax[serve]'`.
"""

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

from absl import flags

from slam_jax.errors import InputError
from slam_jax.runtime import cli, shared_flags

_KEY_VARIABLE = "SLAM_JAX_API_KEY"
_LEAST_KEY = 16  # letters of a key that others may try to guess

shared_flags.define_model()
NAME = flags.DEFINE_string(
    "name", None, "The model's name for clients; by default that of its file or folder."
)
HOST = flags.DEFINE_string(
    "host", "127.0.0.1", "The address to serve; others than this need a key."
)
PORT = flags.DEFINE_integer(
    "port", 8000, "The port; 0 = any free one.", lower_bound=0, upper_bound=65535
)
KEY = flags.DEFINE_string(
    "api_key", None, f"The key that clients must send; better given as ${_KEY_VARIABLE}."
)
SLOTS = flags.DEFINE_integer(
    "slots", 4, "Answers that are computed at once.", lower_bound=1, upper_bound=256
)
CONTEXT = flags.DEFINE_integer(
    "context",
    None,
    "Tokens of a prompt and its answer; by default the model's, at most 2,048.",
    lower_bound=16,
)
WAITING = flags.DEFINE_integer(
    "max_waiting", 64, "Requests that may wait for a slot; more get 429.", lower_bound=1
)
SECONDS = shared_flags.define_seconds(
    "max_seconds", 300.0, "Longest time of an answer, its time in the queue included."
)


def main(arguments: list[str]) -> None:
    cli.refuse(arguments)
    missing = [name for name in ("starlette", "uvicorn") if not importlib.util.find_spec(name)]
    if missing:
        raise InputError(f"the server needs {missing[0]}: pip install 'slam_jax[serve]'")
    from slam_jax.serving.server.connections import (
        address_of,
        hosts_of,
        is_loopback,
        open_port,
        serve,
    )

    local, key = is_loopback(HOST.value), KEY.value or os.environ.get(_KEY_VARIABLE) or None
    if not local and len(key or "") < _LEAST_KEY:
        raise InputError(
            f"--host={HOST.value} is open to other machines; set ${_KEY_VARIABLE} to a key of at "
            f"least {_LEAST_KEY} letters, or leave --host out"
        )
    with open_port(HOST.value, PORT.value) as listener:
        # Imported here because importing JAX takes seconds, in which Ctrl-C must already work.
        from slam_jax.generation import Request, Sampling
        from slam_jax.runtime.compile_cache import enable_compile_cache
        from slam_jax.serving import Engine
        from slam_jax.serving.server.app import make_app
        from slam_jax.serving.server.limits import Limits
        from slam_jax.serving.server.served import Served
        from slam_jax.training import load

        enable_compile_cache()
        given: Any = flags.FLAGS
        loaded = load(given.model, given.step, given.base, weights=given.weights)
        limits = Limits(answer_time=SECONDS.value)
        engine = Engine(loaded, slots=SLOTS.value, context=CONTEXT.value, max_waiting=WAITING.value)
        with engine:
            name = NAME.value or Path(given.model).resolve().name.removesuffix(".gguf")
            served = Served(loaded, name, engine.context, limits)
            app = make_app(engine, served, key=key, hosts=None if key else hosts_of(listener))
            address = address_of(listener)
            print(f"{address}/v1 serves {served.name} (Ctrl-C stops it)")
            print(example_call(served, address, with_key=key is not None), flush=True)
            # What is compiled for the first request is then compiled before a client waits for it.
            engine.submit(
                Request("a", "a" if served.reads_inputs else None), Sampling(max_new_tokens=1)
            )
            serve(app, listener, engine, limits)


def example_call(served: Any, address: str, *, with_key: bool) -> str:
    """A line for a shell that calls the server."""
    key = f' -H "Authorization: Bearer ${_KEY_VARIABLE}"' if with_key else ""
    asked: dict[str, Any]
    if served.reads_inputs:
        about = [{"role": "system", "content": "red circle at 24 65 ."}]
        asked = {"messages": [*about, {"role": "user", "content": "shape of red"}]}
    elif served.has_template:
        asked = {"messages": [{"role": "user", "content": "What is the capital of France?"}]}
    else:
        asked = {"prompt": "Once upon a time", "max_tokens": 20}
    path = "completions" if "prompt" in asked else "chat/completions"
    return (
        f"curl {address}/v1/{path} -H 'Content-Type: application/json'{key} "
        f"-d '{json.dumps(asked)}'"
    )


if __name__ == "__main__":
    cli.run(main)
