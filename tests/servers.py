"""Servers in a thread of this process, for tests that speak to them."""

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

from flax import nnx
from test_hub_tokenizer import TEMPLATE, byte_level

from slam_jax.data import HubTokenizer
from slam_jax.generation import ModelAndTokenizer
from slam_jax.language_models import make_config, make_model
from slam_jax.serving import Engine
from slam_jax.serving.server.app import make_app
from slam_jax.serving.server.connections import address_of, hosts_of, make_server, open_port
from slam_jax.serving.server.limits import Limits
from slam_jax.serving.server.served import Served


def chat_model(template: str | None = TEMPLATE) -> ModelAndTokenizer:
    """A language model of random weights with a tokenizer of bytes."""
    json = byte_level(bos=False).to_str()
    tokenizer = HubTokenizer(json, (1,), chat_template=template)
    sizes: Any = dict(vocab_size=tokenizer.vocab_size, context_length=256)
    config = make_config("standard", "tiny", **sizes)
    return ModelAndTokenizer(make_model(config, rngs=nnx.Rngs(0)), tokenizer, max_new_tokens=4)


@contextlib.contextmanager
def serving(
    loaded: Any, name: str = "tiny", limits: Limits | None = None, **settings: Any
) -> Iterator[tuple[str, Engine]]:
    """The address of a server of this model, and its engine; it has stopped at the end."""
    limits = limits or Limits()
    key = settings.pop("key", None)
    with Engine(loaded, **settings) as engine, open_port("127.0.0.1", 0) as listener:
        served = Served(loaded, name, engine.context, limits)
        app = make_app(engine, served, key=key, hosts=hosts_of(listener))
        server = make_server(app, engine, limits)
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        try:
            yield address_of(listener), engine
        finally:
            server.should_exit = True
            thread.join(60)
            assert not thread.is_alive()


def eventually(read: Any, expected: Any, seconds: float = 60.0) -> None:
    """Waits until `read()` is what is expected."""
    end = time.monotonic() + seconds
    while (found := read()) != expected:
        assert time.monotonic() < end, f"still {found!r}; expected {expected!r}"
        time.sleep(0.02)
