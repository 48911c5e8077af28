"""The page of app.py: what it draws, what it refuses, and a person in front of it."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import shutil
import signal
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from urllib.parse import urlparse

import httpx
import pytest
import torch
from helpers.browser import Page, needs_browser, open_browser
from helpers.runs import ROOT
from PIL import Image
from torch.nn.modules.module import register_module_forward_pre_hook

from uvit import UViT
from uvit.commands import app
from uvit.common.errors import InputError
from uvit.config import load_config, to_json
from uvit.integrations import page_drawing
from uvit.integrations.page import FIRST_CLASSES, build_page, launch
from uvit.weights.tensors import write_weights

pytestmark = pytest.mark.filterwarnings("ignore:::gradio.queueing")  # what it asks of pandas


@pytest.mark.slow
def test_the_command_listens_on_this_machine_alone_until_it_is_stopped(runs):
    command = [sys.executable, str(ROOT / "app.py"), "--runs", str(runs), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        assert line.startswith(f"runs of {runs} at http://127.0.0.1:"), process.stderr.read()
        address = line.split()[4].rstrip(",")
        assert '"title":"uvit"' in httpx.get(address).text
        with pytest.raises(OSError):  # another address of this machine
            socket.create_connection(("127.0.0.2", urlparse(address).port), timeout=5)
    finally:
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 143 and errors == "\nstopped by SIGTERM\n"


def test_a_used_port_and_a_missing_folder_are_refused(runs, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(InputError, match=f"cannot listen on 127.0.0.1:{port}: .* give another --port"):
            app.main(["--runs", str(runs), "--port", str(port)])
    with pytest.raises(InputError, match="folder of runs not found: "):
        app.main(["--runs", str(tmp_path / "none")])
    with pytest.raises(InputError, match="port must be 0 to 65535, got 65536"):
        app.main(["--port", "65536"])


def test_a_port_that_is_taken_at_the_last_moment(runs, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as other:
        monkeypatch.setattr(socket, "create_server", lambda _: contextlib.nullcontext(other))
        with pytest.raises(InputError, match=r"cannot listen on 127.0.0.1:.*: it is in use; give another --port"):
            launch(build_page(runs), "127.0.0.1", 0)


def test_a_proxy_between_the_page_and_itself_is_one_line(runs, monkeypatch):
    for name in ("no_proxy", "NO_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    page = build_page(runs)
    with pytest.raises(InputError, match=r"the page does not answer at .*: set NO_PROXY=localhost,127.0.0.1 "):
        launch(page, "127.0.0.1", 0)
    page.close(verbose=False)


@pytest.fixture
def served(runs):
    """The address of a page that draws from `runs`."""
    page = build_page(runs)
    yield launch(page, "127.0.0.1", 0)
    page.close(verbose=False)


@pytest.fixture(scope="module")
def driver():
    with open_browser() as driver:
        yield driver


def call(address: str, **changed: object) -> str:
    """Asks for a drawing as a program does, and returns what the server answers."""
    values = {"run": "tiny", "classes": [], "prompts": "", "num_per_class": 1, "guidance": 1, "steps": 1}
    values |= {"sampler": "ddim", "seed": 0, "denoising": "none", **changed}
    started = httpx.post(f"{address}gradio_api/call/draw", json={"data": list(values.values())})
    return httpx.get(f"{address}gradio_api/call/draw/{started.json()['event_id']}", timeout=60).text


def test_api_calls_get_images_and_the_same_checks(served, runs, capfd):
    shutil.copytree(runs / "tiny", runs.parent / "outside")
    assert call(served).startswith("event: complete") and "image.png" in call(served)
    for name in ("../outside", str(runs.parent / "outside")):
        answer = call(served, run=name)
        assert answer.startswith("event: error") and "run not found in" in answer
    assert "seed must be int" in call(served, seed="x")
    assert "&lt;b&gt;" in call(served, run="<b>")  # shown as it is, not as a page's code
    assert "Traceback" not in "".join(capfd.readouterr())
    for path in (runs / "tiny" / "config.json", ROOT / "setup.cfg"):
        assert httpx.get(f"{served}gradio_api/file={path}").status_code == 403


@contextmanager
def before_each_prediction(act):
    """Acts whenever a network is called, in whatever thread."""

    def hook(module, inputs):
        if isinstance(module, UViT):
            act()

    handle = register_module_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def test_too_little_memory_is_one_line(served, capfd):
    with before_each_prediction(lambda: torch.empty(2**60, dtype=torch.uint8)):
        assert "not enough memory for that many images: draw fewer" in call(served)
    assert "Traceback" not in "".join(capfd.readouterr())


@needs_browser
def test_only_the_first_classes_are_selected_if_there_are_too_many(served, runs, driver):
    config = load_config(runs / "tiny" / "config.json")
    model = dataclasses.replace(config.model, num_classes=1000)
    config = dataclasses.replace(
        config,
        model=model,
        data=dataclasses.replace(config.data, class_names=()),
        sample=dataclasses.replace(config.sample, guidance=12.0),
    )
    (runs / "many").mkdir()
    (runs / "many" / "config.json").write_text(to_json(config))
    write_weights(runs / "many", UViT(model).state_dict())
    page = Page(driver, served)
    page.choose_run("many")
    picture = Image.open(io.BytesIO(httpx.get(page.draw()).content))
    assert picture.size[1] == 2 + FIRST_CLASSES * 66
    assert f"--guidance {page_drawing.MAX_GUIDANCE:g}" in page.find("#command").text.replace("\n", " ")


@needs_browser
def test_a_user_chooses_settings_and_sees_new_images(served, runs, driver):
    shutil.copytree(runs / "tiny", runs / "second")
    page = Page(driver, served)
    assert page.source() is None
    page.choose_run("second")
    page.choose("classes", "three", "seven")
    page.type("num_per_class", 2)
    first = page.draw()
    picture = Image.open(io.BytesIO(httpx.get(first).content))
    assert picture.format == "PNG" and picture.size[1] == 2 + 2 * 66
    assert "runs/second --classes three seven --num_per_class 2" in page.find("#command").text.replace("\n", " ")
    assert not page.source("film")
    page.type("seed", 7)
    page.pick("denoising", "animation")
    assert httpx.get(page.draw()).content != httpx.get(first).content
    film = Image.open(io.BytesIO(httpx.get(page.wait(lambda: page.source("film"))).content))
    assert film.format == "WEBP" and film.n_frames == 3
    link = page.find("#grid a[download]")
    assert httpx.get(link.get_attribute("href")).headers["content-type"] == "image/png"


@needs_browser
def test_the_page_asks_nothing_of_the_internet(served, driver):
    page = Page(driver, served)
    page.draw()
    asked = driver.execute_script("return performance.getEntriesByType('resource').map(each => each.name)")
    hosts = {urlparse(each).hostname for each in asked if not each.startswith(("data:", "blob:"))}
    assert len(asked) < 250 and hosts == {"127.0.0.1"}  # a browser lists no more than 250


@needs_browser
def test_a_run_deleted_meanwhile_is_one_line_and_the_page_stays_up(served, runs, driver):
    shutil.copytree(runs / "tiny", runs / "second")
    page = Page(driver, served)
    page.choose_run("second")
    shutil.rmtree(runs / "second")
    page.press()
    error = page.error()
    assert error.startswith("run not found in") and "'second'" in error and "Traceback" not in error
    page.choose_run("tiny")
    assert page.draw()


@needs_browser
def test_a_second_request_waits_its_turn(served, driver):
    may_end, predictions = threading.Event(), []

    def wait():
        predictions.append(threading.get_ident())
        assert may_end.wait(60)

    with before_each_prediction(wait):
        try:
            first = Page(driver, served)
            first.press()
            first.wait(lambda: predictions)
            driver.switch_to.new_window("window")
            second = Page(driver, served)
            second.press()
            second.wait(lambda: "queue" in second.find("#grid").text)
            assert len(predictions) == 1 and second.source() is None
            may_end.set()
            assert second.wait(second.source)
            driver.close()
        finally:
            may_end.set()
            driver.switch_to.window(driver.window_handles[0])
        assert first.wait(first.source)
    assert len(predictions) == 2 * 2  # both drew, of two steps each
