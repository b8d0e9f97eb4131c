"""The terminal chat: what it asks, its commands, and Ctrl-C in a terminal."""

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest
from PIL import Image
from servers import chat_model, eventually

from slam_jax.data.scenes import describe, tabulate
from slam_jax.data.sort_of_clevr import draw, make_scene
from slam_jax.errors import InputError
from slam_jax.generation import Request, Sampling
from slam_jax.serving import Engine
from slam_jax.serving.chat import terminal
from slam_jax.serving.chat.conversation import Conversation
from slam_jax.training import load

WAIT_S = 60
COMMAND = [sys.executable, "-m", "slam_jax.serving.chat", "--model=quickstart"]


@pytest.fixture(scope="module")
def engine():
    with Engine(chat_model(), slots=1, context=128) as engine:
        yield engine


def turns(*texts: str) -> list[dict[str, str]]:
    return [
        {"role": "user" if i % 2 == 0 else "assistant", "content": x} for i, x in enumerate(texts)
    ]


def test_a_conversation_is_asked_in_turns_and_the_oldest_go_first(engine):
    """The system message stays, a question goes with its answer, and room is left to answer in."""
    talk = Conversation(chat_model(), 128, 30, system="the dog", seed=2**32 - 1)
    assert talk.ask("the cat").messages == [
        {"role": "system", "content": "the dog"},
        *turns("the cat"),
    ]
    talk.add("the cat", "x" * 30)
    talk.add("the dog", "y" * 30)
    asked = talk.ask("z" * 20)
    assert asked.seed == 1 and talk.dropped == 2
    assert asked.messages == [
        {"role": "system", "content": "the dog"},
        *turns("the dog", "y" * 30, "z" * 20),
    ]
    talk.clear()
    assert talk.ask("the").messages == [{"role": "system", "content": "the dog"}, *turns("the")]
    talk.add("the", "x")
    talk.ask("z" * 500)  # it cannot be answered, so that nothing is forgotten
    assert talk.ask("z").messages == [
        {"role": "system", "content": "the dog"},
        *turns("the", "x", "z"),
    ]
    with pytest.raises(InputError, match="reads texts alone"):
        talk.show(["picture.png"])
    plain = Conversation(chat_model(template=None), 128, 30)
    plain.add("the cat", "sat")
    assert plain.ask("the dog") == Request("the dog", seed=1)


def test_slam_v3_is_asked_about_what_is_shown(tmp_path):
    """Pictures, numbers and the system text stay until others are given."""
    loaded = load("quickstart")
    objects, _ = make_scene(9_800)
    picture, numbers = str(tmp_path / "a picture.png"), tmp_path / "numbers.json"
    Image.fromarray(draw(objects, [0, 1])).save(picture)
    aux = tabulate(objects, [2, 3])
    numbers.write_text(json.dumps(np.asarray(aux).tolist()))
    text = describe(objects, [4, 5])
    talk = Conversation(loaded, 1024, 32)
    lines = [f"/system {text}", f"/image '{picture}'", f"/aux {numbers}", "/seed 7"]
    chat = terminal.Chat(None, talk, None, "quickstart")
    assert [chat.command(*line[1:].split(" ", 1)) for line in lines] == [""] * 4
    asked = talk.ask("shape of red")
    assert (asked.prompt, asked.text, list(map(str, asked.image))) == (
        "shape of red",
        text,
        [picture],
    )
    np.testing.assert_allclose(asked.aux, aux)
    with pytest.raises(InputError, match="is no picture"):
        chat.command("image", str(numbers))
    chat.command("clear", "")
    assert talk.ask("red") == Request("red", text, seed=7)


def test_lines_are_answered_and_what_is_wrong_is_said(engine, monkeypatch, capsys, tmp_path):
    saved, other = tmp_path / "talk.json", tmp_path / "other"
    other.write_text("mine")
    lines = [
        "the cat",
        "",
        "<|end|>",
        "/what",
        "//dog",
        f"/save {saved}",
        f"/save {other}",
        "/seed x",
        f"/seed {'9' * 5000}",
        "/save ~no-such-user/talk",
        "/save a\0b",
    ]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    talk = Conversation(chat_model(), 128, 4)
    terminal.Chat(engine, talk, Sampling(4), "tiny").run()
    first = engine.submit(Request(messages=turns("the cat")), Sampling(4)).result().text
    asked = Request(messages=turns("the cat", first, "/dog"))
    second = engine.submit(asked, Sampling(4)).result().text
    out, errors = capsys.readouterr()
    written = f"written to {saved}\nwritten to ~no-such-user/talk\n"
    assert out == f"{first}\n{second}\n{written}"
    assert json.loads(saved.read_text())["messages"] == turns("the cat", first, "/dog", second)
    assert other.read_text() == "mine"
    cut = "[cut at the limit of tokens; --max_new_tokens raises it]"
    assert errors.splitlines() == [
        cut,
        "[message 0 holds '<|end|>', which the template adds itself]".replace("0", "2"),
        "[there is no command /what; /help lists them]",
        cut,
        f"[{other} is there already; give another name]",
        "[/seed x: expected a whole number from 0 to 4294967295]",
        f"[/seed {'9' * 40}...: expected a whole number from 0 to 4294967295]",
        "[/save: expected a file]",
    ]


def test_a_chat_ends_where_nobody_reads_its_answers(engine, monkeypatch):
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            if text:
                raise BrokenPipeError
            return 0

    monkeypatch.setattr(sys, "stdin", io.StringIO("the cat\nthe dog"))
    monkeypatch.setattr(sys, "stdout", Closed())
    with pytest.raises(BrokenPipeError):
        terminal.Chat(engine, Conversation(chat_model(), 128, 4), Sampling(4), "tiny").run()


def test_a_stopped_answer_is_cancelled_and_kept_as_far_as_it_came(engine, monkeypatch):
    shown: list[str] = []

    def interrupt(text: str) -> str:
        shown.append(text)
        if len(shown) == 3:
            raise KeyboardInterrupt
        return text

    monkeypatch.setattr(terminal, "_printable", interrupt)
    monkeypatch.setattr(sys, "stdin", io.StringIO("the cat"))
    talk = Conversation(chat_model(), 128, 80)
    terminal.Chat(engine, talk, Sampling(80, 50.0), "tiny").run()
    eventually(lambda: engine.stats().requests.get("cancelled"), 1)
    assert talk.turns == turns("the cat", "".join(shown)) and len(shown) == 3


class Terminal:
    """A chat in a pseudo-terminal."""

    def __init__(self, *arguments: str, home: Any):
        own, other = pty.openpty()
        self.process = subprocess.Popen(
            [*COMMAND, *arguments],
            stdin=other,
            stdout=other,
            stderr=other,
            env={**os.environ, "XDG_STATE_HOME": str(home), "TERM": "dumb"},
        )
        os.close(other)
        self._own, self.seen = own, ""

    def write(self, text: str) -> None:
        os.write(self._own, text.encode())

    def read_until(self, text: str, more: int = 0) -> str:
        """What came until the text, which is consumed, once there are `more` letters after it."""
        end = time.monotonic() + WAIT_S
        while text not in self.seen or len(self.seen.partition(text)[2]) < more:
            assert time.monotonic() < end, self.seen
            if select.select([self._own], [], [], 0.1)[0]:
                self.seen += os.read(self._own, 4096).decode(errors="replace")
        found, _, self.seen = self.seen.partition(text)
        return found

    def interrupt_until(self, text: str) -> None:
        """Sends Ctrl-C until the text comes: input() may miss one that comes while it begins to
        wait."""
        for _ in range(WAIT_S):
            self.process.send_signal(signal.SIGINT)
            if select.select([self._own], [], [], 5)[0]:
                break
        self.read_until(text)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._own)


@pytest.mark.release
def test_ctrl_c_stops_the_answer_and_ctrl_d_ends_the_chat(tmp_path, signals_heard):
    """At such a temperature answers are long: these two have 657 and 803 tokens."""
    rules = ("--temperature=100", "--max_new_tokens=900", "--seed=8")
    there = Terminal(*rules, "--system=red", home=tmp_path)
    try:
        there.read_until("> ")
        for _ in range(2):
            there.write("shape of red\n")
            there.read_until("shape of red\r\n", more=20)
            there.process.send_signal(signal.SIGINT)
            assert "Traceback" not in there.read_until("[stopped]")
            there.read_until("> ")
        there.write("shape")
        there.read_until("shape")
        there.interrupt_until("[Ctrl-D ends the chat]")
        there.read_until("> ")
        there.write("\x04")
        assert there.process.wait(WAIT_S) == 0
        history = (tmp_path / "slam_jax" / "chat_history").read_text()
        assert history.split("\n")[:1] == ["shape of red"]
    finally:
        there.close()


@pytest.mark.slow
def test_a_pipe_is_answered_line_by_line():
    done = subprocess.run(
        [*COMMAND, "--system=red circle at 24 65 ."],
        input="shape of red\nshape of red",
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "circle\ncircle\n", "")
