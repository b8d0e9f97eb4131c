"""Arms of torch and transformers, as their users would run them, on the same weights and tokens."""

import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.comparison import Arm
from benchmarks.device import torch_device
from benchmarks.ours import LEARNING_RATE, WEIGHT_DECAY, tokens

Call = Callable[[], Any]
NEEDS = ("torch", "transformers")
COMPILED_NEEDS = (*NEEDS, "g++")  # torch.compile compiles C++


def beside(
    ours: Callable[..., Call],
    build: Callable[..., Call],
    given: Mapping[str, Any],
    aim: float,
    *,
    mine: Mapping[str, Any] = {},
    other: Mapping[str, Any] = {},
    compiled: bool = False,
) -> list[Arm]:
    """Our arm and that of transformers; `mine` and `other` are arguments of one of them only.

    compiled: a third is the second by torch.compile.
    """
    arms = [
        Arm("slam_jax", ours, {**given, **mine}),
        Arm("transformers", build, {**given, **other}, needs=NEEDS, aim=aim),
    ]
    if compiled:
        given = {**given, **other, "compiled": True}
        arms.append(Arm("torch.compile", build, given, needs=COMPILED_NEEDS, aim=aim))
    return arms


def torch() -> Any:
    """torch, with as many threads as XLA."""
    import torch  # pyright: ignore[reportMissingImports]

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    torch.set_num_threads(cores or 1)
    return torch


def forward(
    folder: str, rows: int, length: int, *, compiled: bool = False, dtype: str = "float32"
) -> Call:
    """Logits [rows, length, V]."""
    model = load(folder, dtype).eval()
    run = torch().compile(model) if compiled else model
    given = _tokens(model, rows, length)

    @torch().inference_mode()
    def call():
        return run(given, use_cache=False).logits

    return call


def training_step(
    folder: str, rows: int, length: int, *, compiled: bool = False, autocast: bool = False
) -> Call:
    """Forward, backward and AdamW, in its fastest form; the cross-entropy before the update.

    autocast: products in bfloat16, parameters in float32.
    """
    model = load(folder, "float32").train()
    run = torch().compile(model) if compiled else model
    optimizer = torch().optim.AdamW(
        model.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True
    )
    given = _tokens(model, rows, length + 1)

    def call():
        optimizer.zero_grad(set_to_none=True)
        with torch().autocast(model.device.type, torch().bfloat16, enabled=autocast):
            logits = run(given[:, :-1], use_cache=False).logits
        loss = torch().nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), given[:, 1:].flatten()
        )
        loss.backward()
        optimizer.step()
        return loss.detach()

    return call


def decoding(folder: str, context: int, rows: int = 1, dtype: str = "float32") -> Call:
    """Logits [rows, V] of one more token after `context` tokens."""
    model = load(folder, dtype).eval()
    given = _tokens(model, rows, context + 1)
    with torch().inference_mode():
        past = model(given[:, :-1], use_cache=True, logits_to_keep=1).past_key_values

    @torch().inference_mode()
    def call():
        nonlocal past
        output = model(given[:, -1:], past_key_values=past, use_cache=True)
        past = output.past_key_values
        return output.logits[:, -1]

    return call


def generation(folder: str, prompt: list[int], new_tokens: int) -> Call:
    """The greedy continuation [new_tokens] of one prompt."""
    model = load(folder, "float32").eval()
    given = torch().tensor([prompt], device=model.device)

    def call():
        all_tokens = model.generate(
            given,
            attention_mask=torch().ones_like(given),
            do_sample=False,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
        )
        return all_tokens[0, len(prompt) :]

    return call


def load(folder: str, dtype: str) -> Any:
    import transformers  # pyright: ignore[reportMissingImports]

    # Warnings about arguments that were renamed after the oldest supported version.
    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    auto: Any = transformers.AutoModelForCausalLM
    model = auto.from_pretrained(folder, dtype=getattr(torch(), dtype))
    return model.to(torch_device(torch()))


def _tokens(model: Any, rows: int, length: int) -> Any:
    made = torch().from_numpy(tokens(model.config.vocab_size, rows, length)).long()
    return made.to(model.device)
