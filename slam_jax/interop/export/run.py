"""Runs the model in this folder. It needs jax and numpy, and `tokenizers` for texts.

    python run.py --prompt="..."            (or --ids=1,2,3)
    python run.py --prompt="..." --image=IMAGE.npy

    model = Model("FOLDER")
    [answer] = model.generate([[1, 57, 80]], inputs={"image": pixels})

`manifest.json` says what the model reads. Only JSON, arrays and StableHLO are read.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path

import jax
import jax.export
import jax.numpy as jnp
import numpy as np


class Model:
    """encode, prefill and decode_step as they were exported, and generate, which calls them.

    Raises ValueError where a file was changed, or this jax cannot run it.
    """

    def __init__(self, folder=Path(__file__).parent):
        self.folder = Path(folder)
        sys.path.append(str(self.folder / "packages"))  # flatbuffers, unless it is installed
        self.about = about = json.loads((self.folder / "manifest.json").read_text("utf-8"))
        self.batch, self.max_length = about["batch"], about["max_length"]
        made, ours = about["made_with"]["jax"], jax.__version__
        least = jax.export.minimum_supported_calling_convention_version
        if _numbers(ours) < _numbers(made) or about["made_with"]["calling_convention"] < least:
            raise ValueError(f"made with jax {made}, which jax {ours} cannot run; install {made}")
        backend = jax.default_backend()
        platforms = {"gpu": ("cuda", "rocm")}.get(backend, (backend,))
        groups = [about["platforms"][each] for each in platforms if each in about["platforms"]]
        if not groups:
            raise ValueError(f"made for {', '.join(about['platforms'])}; this is {backend}")
        self._files, self._programs = about["programs"][groups[0]], {}
        arrays = {}
        for file in {each["file"] for each in about["weights"]}:
            with np.load(self._check(file), allow_pickle=False) as stored:
                arrays.update({name: stored[name] for name in stored.files})
        self.weights = tuple(
            jax.device_put(arrays.pop(each["name"]).view(jnp.dtype(each["dtype"])))
            for each in about["weights"]
        )

    def encode(self, examples):
        """The memory of one example a row: dicts of "image", "text" and "aux", one at least."""
        inputs = []
        for array, mask in zip(*[iter(self.about["inputs"])] * 2, strict=True):
            name, shape, dtype = array["name"], array["shape"], np.dtype(array["dtype"])
            values, present = np.zeros(shape, dtype), np.zeros(mask["shape"], bool)
            several = present.ndim > 1  # pictures, tokens or vectors; fewer are padded
            for row, example in enumerate(examples):
                if example.get(name) is None:
                    continue
                value = np.asarray(example[name])
                given = list(value.shape)
                fits = len(given) == len(shape) - 1 and given[0] <= shape[1]
                fits = fits and given[several:] == shape[1 + several :]
                if not fits or not np.can_cast(value.dtype, dtype, "same_kind"):
                    raise ValueError(f"{name} is {value.dtype}{given}; give {dtype}{shape[1:]}")
                values[row, : given[0]] = value
                present[(row, slice(given[0])) if several else row] = True
            inputs += [values, present]
        return self._call("encode", self.weights, *inputs)

    def prefill(self, tokens, lengths, memory=()):
        """Logits [batch, vocabulary] after right-padded prompts [batch, T], T a bucket; a cache."""
        name = f"prefill_{tokens.shape[1]}"
        return self._call(name, self.weights, memory, np.int32(tokens), np.int32(lengths))

    def decode_step(self, tokens, cache, memory=()):
        """Logits after one more token a row, and the cache with it. The given cache is used up."""
        return self._call("decode_step", self.weights, memory, cache, np.int32(tokens))

    def generate(self, prompts, inputs=None, max_new_tokens=None):
        """The most probable answer to each prompt (token ids), its end token included.

        inputs: a dict as of `encode` for all prompts, or a list with one for each.
        """
        about, rows = self.about, [list(map(int, prompt)) for prompt in prompts]
        lengths = [len(row) for row in rows]
        buckets = [size for size in about["prompt_lengths"] if size >= max(lengths, default=0)]
        if not rows or len(rows) > self.batch or not min(lengths) or not buckets:
            most = max(about["prompt_lengths"])
            raise ValueError(f"give 1 to {self.batch} prompts of 1 to {most} tokens each")
        if not all(0 <= each < about["vocab_size"] for row in rows for each in row):
            raise ValueError(f"token ids are from 0 to {about['vocab_size'] - 1}")
        limit = max_new_tokens or about["sampling"]["max_new_tokens"]
        limits = [min(limit, self.max_length - length) for length in lengths]
        memory = ()
        if about["inputs"]:
            inputs = [inputs or {}] * len(rows) if not isinstance(inputs, list) else inputs
            some = [any(value is not None for value in each.values()) for each in inputs]
            if len(inputs) != len(rows) or not all(some):
                raise ValueError(f"give inputs: {[each['name'] for each in about['inputs'][::2]]}")
            memory = self.encode([*inputs, *[inputs[-1]] * (self.batch - len(rows))])
        tokens = np.full((self.batch, buckets[0]), about["pad_id"], np.int32)
        for i in range(self.batch):  # rows beyond the prompts repeat the last one
            row = rows[min(i, len(rows) - 1)]
            tokens[i, : len(row)] = row
        padded = lengths + lengths[-1:] * (self.batch - len(rows))
        logits, cache = self.prefill(tokens, np.array(padded), memory)
        answers, done = [[] for _ in rows], [most < 1 for most in limits]
        while True:
            chosen = np.asarray(jnp.argmax(logits, axis=-1))
            for i, answer in enumerate(answers):
                if not done[i]:
                    answer.append(int(chosen[i]))
                    done[i] = answer[-1] in about["end_ids"] or len(answer) == limits[i]
            if all(done):
                return answers
            logits, cache = self.decode_step(chosen, cache, memory)

    def to_ids(self, text):
        """The token ids of a prompt. It needs the package `tokenizers`."""
        rule, tokenizer = self.about["prompt"], self._tokenizer()
        tokenizer.encode_special_tokens = rule["literal"]
        ids = tokenizer.encode(text, add_special_tokens=rule["adds_special"]).ids
        if rule["adds_special"] and ids[-1:] == [rule["eos_id"]]:
            ids = ids[:-1]  # the answer comes before the end
        return [*rule["first"], *ids] or [rule["if_empty"]]

    def to_text(self, ids):
        """The text of an answer, without its end. It needs the package `tokenizers`."""
        kept = [each for each in ids if each not in self.about["end_ids"]]
        return self._tokenizer().decode(kept, skip_special_tokens=True)

    def _tokenizer(self):
        import tokenizers

        path = self._check("tokenizer/tokenizer.json")
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    def _call(self, name, *arguments):
        if name not in self._programs:
            if name not in self._files:
                raise ValueError(f"no {name}; there are {', '.join(self._files)}")
            program = jax.export.deserialize(bytearray(self._check(self._files[name]).read_bytes()))
            donated = (2,) if name == "decode_step" else ()
            self._programs[name] = jax.jit(program.call, donate_argnums=donated)
        return self._programs[name](*arguments)

    def _check(self, name):
        with open(self.folder / name, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != self.about["files"].get(name):
                raise ValueError(f"{name} is not the file that was exported; copy it again")
        return self.folder / name


def _numbers(version):
    return tuple(int(part) for part in version.split(".")[:2])


def main():
    parser = argparse.ArgumentParser(description="Asks the model in this folder.")
    parser.add_argument("--prompt", default="", help="a text; it needs the package tokenizers")
    parser.add_argument("--ids", help="or token ids, separated by commas")
    parser.add_argument("--image", help="a .npy file of pixels, uint8")
    parser.add_argument("--max_new_tokens", type=int)
    given, model = parser.parse_args(), Model()
    pixels = {"image": np.load(given.image, allow_pickle=False)} if given.image else None
    prompt = given.ids.split(",") if given.ids else model.to_ids(given.prompt)
    [answer] = model.generate([prompt], pixels, given.max_new_tokens)
    print(",".join(map(str, answer)) if given.ids else model.to_text(answer))


if __name__ == "__main__":
    try:
        main()
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")
