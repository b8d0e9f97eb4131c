"""The demo page: in a browser, as a visitor sees it, and its parts without one."""

import asyncio
import contextlib
import functools
import http.client
import itertools
import json
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Any
from urllib.parse import urlsplit

import gradio as gr
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from test_generation import make_loaded
from test_hub_tokenizer import TEMPLATE, byte_level

import slam_jax
from slam_jax.data import AuxFormat, HubTokenizer
from slam_jax.demo import chat
from slam_jax.demo.app import add_row, ask_model, make_app, read_aux
from slam_jax.demo.examples import PROMPTS, SCENES, show, trained_views
from slam_jax.generation import ModelAndTokenizer, Request, Sampling, generate, stream
from slam_jax.language_models import make_config, make_model
from slam_jax.reporting.attention import attention_html
from slam_jax.serving import Engine
from slam_jax.slam_v3 import ImageConfig

pytestmark = pytest.mark.release

NOTHING = "nothing to answer from: give at least one of text, image and aux"
USUAL: Any = (0, 32, 0, 0, 1, 0, 1)  # the seed and the fields of Sampling, as on the page
CUT = "The answer was cut: raise max tokens, under Sampling, to see more."
WAIT_S = 120


@pytest.fixture(scope="module")
def loaded(small_run):
    return slam_jax.load(small_run)


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("picture") / "a <b>picture.png"
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def command(*arguments, before=""):
    """The command line of `python -m slam_jax.demo`, with some code that runs before it."""
    main = "runpy.run_module('slam_jax.demo', run_name='__main__', alter_sys=True)"
    return [sys.executable, "-c", f"import runpy, signal, sys; {before}{main}", *arguments]


def text_of(loaded, *request):
    [answer] = generate(loaded, [Request(*request)])
    return answer.text


# In a browser.


@pytest.fixture(scope="module")
def page(small_run, tmp_path_factory):
    """(process, address, folder of its temporary files)"""
    folder = tmp_path_factory.mktemp("page")
    environment = {
        **os.environ,
        "TMPDIR": str(folder),
        # As tests/conftest.py has it for what the answers are compared with.
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
    }
    # In the background of a shell that reads a script, Ctrl-C is ignored.
    heard = "signal.signal(signal.SIGINT, signal.default_int_handler); "
    process = subprocess.Popen(
        command(f"--workdir={small_run}", "--port=0", before=heard),
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        out: Any = process.stdout
        said: queue.Queue[str] = queue.Queue()
        threading.Thread(target=lambda: said.put(out.readline()), daemon=True).start()
        address = said.get(timeout=WAIT_S).partition(" ")[0]
        assert address.startswith("http://127.0.0.1:"), process.communicate()[1]
        yield process, address, folder
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def browser(page, tmp_path_factory):
    programs = [shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome")]
    chromium, driver = next(filter(None, programs), None), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("there is no chromium with a chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for switch in (
        "headless",
        "no-sandbox",
        "disable-gpu",
        "disable-dev-shm-usage",
        "no-first-run",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
        "window-size=1280,900",
        f"user-data-dir={tmp_path_factory.mktemp('browser')}",
    ):
        options.add_argument(f"--{switch}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    driven = webdriver.Chrome(options, webdriver.ChromeService(driver))
    driven.implicitly_wait(WAIT_S)
    try:
        driven.get(page[1])
        yield driven
    finally:
        driven.quit()


def find(browser, selector):
    return browser.find_element(By.CSS_SELECTOR, selector)


def eventually(read, expected):
    """Waits until `read()` is as expected; what the page shows comes from the server, in pieces."""
    until = time.monotonic() + WAIT_S
    value = None
    while time.monotonic() < until:
        with contextlib.suppress(Exception):  # an element may be replaced while it is read
            value = read()
            if expected(value):
                return value
        time.sleep(0.05)
    raise AssertionError(f"still {value!r}")


def answer_and_maps(browser):
    maps = eventually(lambda: find(browser, "#maps").text, lambda text: "layer 2, head 2" in text)
    return find(browser, "#answer textarea").get_property("value"), maps


def test_an_empty_question_shows_an_error_and_the_page_stays_usable(browser):
    find(browser, "#ask").click()
    notice = eventually(lambda: find(browser, "#notice p").text, bool)
    assert notice == NOTHING
    assert "Traceback" not in browser.page_source


def test_a_picture_and_a_prompt_get_the_answer_of_generate_and_maps_of_it(browser, loaded, picture):
    find(browser, "#image input[type=file]").send_keys(str(picture))
    find(browser, "#image img")
    prompt = find(browser, "#prompt :is(input, textarea)")
    prompt.send_keys("shape of red", Keys.ENTER)
    answer, maps = answer_and_maps(browser)
    assert answer == text_of(loaded, "shape of red", None, picture)
    assert {"p0", "p1", "p2", "p3"} <= set(maps.split())
    assert find(browser, "#notice").text in ("", CUT)


def test_an_example_and_its_prompt_are_chosen_by_a_click_each(browser, loaded):
    browser.find_elements(By.CSS_SELECTOR, "#scenes button.gallery-item")[2].click()
    eventually(lambda: find(browser, "#maps").text, lambda text: not text)
    browser.find_elements(By.CSS_SELECTOR, "#prompts button.gallery-item")[3].click()
    prompt = find(browser, "#prompt :is(input, textarea)")
    eventually(lambda: prompt.get_property("value"), lambda text: text == PROMPTS[3])
    find(browser, "#ask").click()
    answer, maps = answer_and_maps(browser)
    assert answer == text_of(loaded, PROMPTS[3], None, None, show(SCENES[2], "aux").aux)
    assert "red" in maps and "yellow" in maps


def test_a_file_that_is_no_picture_and_has_html_in_its_name_shows_an_error(browser, tmp_path):
    path = tmp_path / "<i>no picture.png"
    path.write_text("<svg>")
    find(browser, "#image input[type=file]").send_keys(str(path))
    find(browser, "#image img")
    find(browser, "#ask").click()
    notice = eventually(lambda: find(browser, "#notice p").text, bool)
    assert notice == f"{path.name} is no picture of a known kind, such as PNG or JPEG"


def test_a_picture_is_talked_about_in_the_second_tab(browser, loaded, picture):
    """The second question is about the picture that came with the first one."""
    [tab] = [x for x in browser.find_elements(By.CSS_SELECTOR, "[role=tab]") if x.text == "Chat"]
    tab.click()
    find(browser, "#chat_question input[type=file]").send_keys(str(picture))
    find(browser, "#chat_question .thumbnail-item")
    for i, question in enumerate(("shape of red", "shape of blue")):
        find(browser, "#chat_question textarea").send_keys(question, Keys.ENTER)
        expected = text_of(loaded, question, None, picture)

        def answers():
            return [x.text for x in browser.find_elements(By.CSS_SELECTOR, ".bot .message-content")]

        eventually(answers, lambda found, i=i, text=expected: found[i:] == [text])
    shares = browser.execute_script("return document.querySelectorAll('[aria-label=Share]')")
    assert not any(button.is_displayed() for button in shares)  # they send it to another machine


def test_no_request_leaves_this_machine(browser):
    browser.refresh()
    find(browser, "#ask")
    messages = (json.loads(entry["message"])["message"] for entry in browser.get_log("performance"))
    asked = [
        urlsplit(message["params"]["request"]["url"])
        for message in messages
        if message["method"] == "Network.requestWillBeSent"
    ]
    # What the browser's own pages, such as that of a new tab, are made of has other schemes.
    hosts = {url.hostname for url in asked if url.scheme in ("http", "https", "ws", "wss")}
    assert hosts == {"127.0.0.1"}


def test_a_foreign_host_name_that_resolves_to_this_machine_is_refused(page):
    connection = http.client.HTTPConnection("127.0.0.1", urlsplit(page[1]).port, timeout=WAIT_S)
    with contextlib.closing(connection):
        connection.request("GET", "/", headers={"Host": "elsewhere.example"})
        assert connection.getresponse().status == 400


def test_ctrl_c_ends_the_server_with_one_line_and_removes_uploaded_pictures(page):
    process, _, folder = page
    assert list(folder.iterdir())
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=WAIT_S)
    assert (process.returncode, errors) == (130, "interrupted\n")
    assert not list(folder.iterdir())


# Started wrongly.


def assert_ends(command, message):
    done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr and done.stderr.count("\n") == 1


def test_a_port_that_is_taken_is_named_in_one_line():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        message = f"port {port}: Address already in use; give another with --port"
        assert_ends(command("--workdir=nowhere", f"--port={port}"), message)


def test_without_gradio_the_page_says_how_to_get_it():
    lacking = command("--workdir=nowhere", before="sys.modules['gradio'] = None; ")
    assert_ends(lacking, "pip install 'slam_jax[demo]'")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workdir=nowhere", "--port=0"], "nowhere"),
        (["--workdir=nowhere", "--port=70000"], "port"),
        (["--workdir=nowhere", "more"], "unknown argument 'more'"),
    ],
)
def test_a_start_with_wrong_arguments_ends_with_one_line(arguments, message):
    assert_ends(command(*arguments), message)


# Without a browser.


def ask(loaded, image=None, text="", rows=(), prompt="shape of red", numbers=USUAL):
    file = None if image is None else {"path": str(image), "orig_name": image.name}
    return list(ask_model(loaded, file, text, {"data": rows}, prompt, *numbers))


def test_an_answer_comes_in_pieces_and_then_its_maps(loaded):
    rows = show(SCENES[0], "aux").aux
    shown = ask(loaded, rows=rows, prompt="how many", numbers=(5, 24, 9, 0, 1, 0, 1))
    request = Request("how many", aux=rows, seed=5)
    pieces_of = stream(loaded, request, Sampling(max_new_tokens=24, temperature=9.0))
    so_far = ["", *itertools.accumulate(pieces_of)]
    *_, answer = so_far
    assert len(so_far) > 2
    assert [answer for answer, _, _ in shown] == [*so_far, answer, answer]
    assert not any(notice for _, notice, _ in shown[:-2])
    assert ("The answer was cut" in shown[-1][1]) == (pieces_of.finish == "length")
    assert not any(maps for _, _, maps in shown[:-2])
    assert attention_html(loaded, request, answer) in shown[-1][2]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, NOTHING),
        ({"rows": [["", None, " "] * 3 + [""]] * 2}, NOTHING),
        ({"rows": [[1] * 9 + ["x<1"]]}, "aux, row 1, y: 'x<1' is no number"),
        ({"rows": [[1] * 11]}, "aux is 1 x 11 numbers; expected rows of 10"),
        ({"rows": [[1] * 9 + [""]]}, "aux has a number that is missing"),
        ({"text": "a", "prompt": "red " * 2000}, "the context is 1,024 tokens of at most"),
        ({"text": "a", "numbers": (0.5, *USUAL[1:])}, "seed is 0.5; expected a whole number"),
        ({"text": "a", "numbers": (None, *USUAL[1:])}, "seed is None; expected a whole number"),
        ({"text": "a", "numbers": (0, 0, *USUAL[2:])}, "max_new_tokens is 0; expected 1"),
        ({"text": "a", "numbers": (0, 4, -1, *USUAL[3:])}, "temperature is -1; expected 0"),
    ],
)
def test_what_cannot_be_answered_is_one_line_of_escaped_html(loaded, given, message):
    *_, (answer, notice, maps) = ask(loaded, **given)
    assert (answer, maps) == ("", "")
    assert notice.startswith('<p role="alert">') and "\n" not in notice
    assert message.replace("<", "&lt;").replace("'", "&#x27;") in notice


def test_an_error_about_a_picture_names_the_file_as_the_visitor_knows_it(loaded, tmp_path):
    file = {"path": str(tmp_path / "3f2a" / "image.png"), "orig_name": "holiday.png"}
    *_, (_, notice, _) = ask_model(loaded, file, "", {"data": []}, "red", *USUAL)
    assert "holiday.png: no such file" in notice and str(tmp_path) not in notice


def test_a_model_of_several_pictures_is_asked_about_a_gallery(tmp_path):
    image = ImageConfig(size=24, stage_widths=(8, 16), max_images=2)
    loaded = make_loaded(image=image)._replace(config={"data": {"name": "folder"}})
    gallery = next(each for each in build(loaded).blocks.values() if isinstance(each, gr.Gallery))
    assert gallery.label == "Up to 2 images"
    items: Any = []
    for name in ("red", "blue", "lime"):
        Image.new("RGB", (8, 8), name).save(tmp_path / f"{name}.png")
        path = str(tmp_path / f"{name}.png")
        items.append({"image": {"path": path, "orig_name": name}, "caption": None})

    def asked(items):
        return list(ask_model(loaded, items, "", {"data": []}, "red", *USUAL))[-1]

    paths = [item["image"]["path"] for item in items[:2]]
    answer, _, maps = asked(items[:2])
    assert answer == text_of(loaded, "red", None, paths) and "p0 over picture 2" in maps
    assert "3 pictures; the model reads at most model.image.max_images=2" in asked(items)[1]
    items[1]["image"]["path"] += "x"
    assert "blue: no such file" in asked(items[:2])[1]


@pytest.mark.parametrize(
    ("rows", "one_row", "expected"),
    [
        ([], False, None),
        ([["", None], ["  ", float("nan")]], False, None),
        ([[1, "2.5"], ["", ""], ["-1e2", 0]], False, [[1, 2.5], [-100, 0]]),
        ([[1, ""]], False, [[1, None]]),
        ([["", "3"]], True, [None, 3]),
        ([["", ""], [4, "3"]], True, [4, 3]),
    ],
)
def test_blank_cells_and_rows_of_the_table_are_missing_numbers(rows, one_row, expected):
    assert read_aux(rows, ["x", "y"], one_row=one_row) == expected


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([["", ""], ["", "1,5"]], "aux, row 2, y: '1,5' is no number"),
        ([[1, 2, "three"]], "aux, row 1, column 3: 'three' is no number"),
        ([[1, 2], [3, 4]], "aux has 2 rows; expected one"),
    ],
)
def test_a_cell_that_cannot_be_read_is_named(rows, message):
    with pytest.raises(ValueError, match=message):
        read_aux(rows, ["x", "y"], one_row=True)


def test_the_sampling_the_page_starts_with_is_the_greedy_one_of_generate():
    assert Sampling(*USUAL[1:]).rules == Sampling().rules


def test_a_row_is_added_at_the_end():
    assert add_row({"headers": ["x", "y"], "data": [[1, 2]]}) == [[1, 2], [None, None]]


def build(loaded, make=make_app):
    """The app; in a loop, for outside of one gradio makes some that it does not close."""

    async def build():
        return make(loaded)

    return asyncio.run(build())


def table_of(app):
    [table] = [block for block in app.blocks.values() if isinstance(block, gr.Dataframe)]
    return table


def test_the_table_has_the_columns_and_rows_that_the_data_have(loaded):
    table = table_of(build(loaded))
    assert table.headers == list(loaded.aux_format.names)
    unnamed = table_of(build(loaded._replace(aux_format=None)))
    assert unnamed.headers == [f"x{i}" for i in range(1, 11)]
    columns = AuxFormat.of_columns(("width", "price"), np.array([[1.0, 2.0]]))
    one_row = table_of(build(loaded._replace(aux_format=columns)))
    assert one_row.headers == ["width", "price"]
    assert len(one_row.value["data"]) == 1 < len(table.value["data"])


def test_only_a_run_of_scenes_has_examples(loaded):
    def datasets(config):
        app = build(loaded._replace(config=config))
        return [block for block in app.blocks.values() if isinstance(block, gr.Dataset)]

    config = loaded.config
    assert len(datasets(config)) == 2
    assert not datasets({**config, "data": {**config["data"], "name": "folder"}})


def test_examples_are_of_the_test_split_in_the_views_of_the_run(loaded):
    assert set(SCENES) <= set(range(9_800, 10_000))
    assert trained_views(loaded.config) == {"aux only": "aux"}
    rates = dict.fromkeys(("image", "image_text", "split_image_aux"), 1.0)
    views = trained_views({"data": {"name": "sort_of_clevr", "stages": [[0, rates]]}})
    assert views == {
        "image only": "image",
        "image and text": "image_text",
        "half image, half aux": "split_image_aux",
    }
    half = show(SCENES[0], "split_image_aux")
    assert half.image is not None and half.text == "" and len(half.aux) == 3
    whole = show(SCENES[0], "text")
    assert whole.image is None and whole.text.count(" .") == 6 and whole.aux == []


def test_gradio_sends_no_analytics_and_offers_no_public_api(loaded):
    app = build(loaded)
    assert app.analytics_enabled is False
    assert not any(fn.api_visibility == "public" for fn in app.fns.values())


def test_a_language_model_is_asked_in_a_conversation():
    """Earlier messages are part of the request; notes about what is wrong are not."""
    tokenizer = HubTokenizer(byte_level(bos=False).to_str(), (1,), chat_template=TEMPLATE)
    config = make_config("standard", "tiny", vocab_size=tokenizer.vocab_size)
    loaded = ModelAndTokenizer(make_model(config, rngs=nnx.Rngs(0)), tokenizer, max_new_tokens=4)
    before = [
        {"role": "user", "content": [{"type": "text", "text": "the cat"}], "metadata": None},
        {"role": "assistant", "content": "sat", "metadata": {}},
        {"role": "assistant", "content": "", "metadata": {"title": "cut: raise max tokens"}},
        {"role": "user", "content": "<|end|>"},
        {"role": "assistant", "content": "", "metadata": {"title": "refused"}},
    ]
    turns = [
        {"role": "user", "content": "the cat"},
        {"role": "assistant", "content": "sat"},
        {"role": "user", "content": "the dog"},
    ]
    [expected] = generate(loaded, [Request(messages=turns)], Sampling(4))
    with Engine(loaded, slots=1) as engine:
        [*_, (text, note)] = chat.answer(loaded, engine, "the dog", before, 4, 0)
        assert text == expected.text and "raise max tokens" in note.metadata["title"]
        [*_, refused] = chat.answer(loaded, engine, "<|end|>", [], 4, 0)
        holds = "message 0 holds '<|end|>', which the template adds itself"
        assert (refused.content, refused.metadata["title"]) == ("", holds)
        pieces: Any = chat.answer(loaded, engine, "the dog", before, 40, 0)
        next(pieces)
        pieces.close()  # the visitor has left
        assert build(loaded, functools.partial(chat.make_chat, engine=engine)).title == "slam_jax"
    assert engine.stats().requests["cancelled"] == 1
    plain = ModelAndTokenizer(loaded.model, HubTokenizer(tokenizer.json), max_new_tokens=4)
    [expected] = generate(plain, [Request("the")], Sampling(4))
    with Engine(plain, slots=1) as engine:
        [*_, last] = chat.answer(plain, engine, "the", before, 4, 0)
    assert last[0] == expected.text


def test_a_conversation_is_about_the_picture_that_was_shown_last(loaded, picture, tmp_path):
    other = tmp_path / "notes.txt"
    other.write_text("no picture")
    before = [
        {"role": "user", "content": [{"path": str(other)}, "shape of red"]},
        {"role": "user", "content": [{"type": "file", "file": {"path": str(picture)}}, "red"]},
        {"role": "assistant", "content": "circle"},
    ]
    with Engine(loaded, slots=1) as engine:

        def asked(files, history=()):
            message = {"text": "shape of red", "files": files}
            return list(chat.answer_about_pictures(loaded, engine, message, history, ""))[-1]

        expected = text_of(loaded, "shape of red", None, str(picture))
        assert asked([], before) == asked([str(picture)]) == expected
        refused = asked([str(other)], before).metadata["title"]
        assert refused.startswith("notes.txt is no picture of a known kind")
        assert asked([]).metadata["title"] == NOTHING
        tabs = build(functools.partial(make_app, loaded), lambda make: make(engine))
    assert [x.label for x in tabs.blocks.values() if isinstance(x, gr.Tab)] == ["Ask", "Chat"]
