"""The page of app.py: what it draws, what it refuses, and a person in front of it."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import urlparse

import httpx
import numpy as np
import pytest
import torch
from browser import Page, needs_browser, open_browser
from PIL import Image
from test_cli import ROOT, finished, told  # noqa: F401

import app
import sample
from uvit import UViT
from uvit.common.errors import InputError
from uvit.config import load_config, to_json
from uvit.integrations import demo
from uvit.integrations.page import Drawing, build_page, draw, find_run, launch, list_runs
from uvit.weights.tensors import write_weights

pytestmark = pytest.mark.filterwarnings("ignore:::gradio.queueing")  # what it asks of pandas


def ignore(done: int, total: int) -> None:
    """A progress bar that nobody sees."""


@pytest.fixture
def runs(finished, tmp_path) -> Path:  # noqa: F811
    """A folder with one run, tiny."""
    shutil.copytree(finished / "runs" / "tiny", tmp_path / "runs" / "tiny")
    return tmp_path / "runs"


def test_the_command_that_the_page_shows_draws_the_same_grid(runs, monkeypatch):
    monkeypatch.chdir(runs.parent)
    asked = Drawing(run="tiny", classes=("three", "7"), num_per_class=3, guidance=2.0, steps=3, sampler="heun", seed=5)
    seen = []
    drawn = draw(Path("runs"), asked, lambda *each: seen.append(each))
    assert seen == [(6 * k, 30) for k in range(1, 6)] and drawn.denoising is None
    command = drawn.command.split()
    assert command[:2] == ["python", "sample.py"]
    sample.main([*command[2:], "--output", "grid.png"])
    assert np.array_equal(np.asarray(Image.open("grid.png")), np.asarray(drawn.grid))
    assert "6 images" in drawn.summary and "guidance w = 2 " in drawn.summary


def test_a_text_model_draws_prompts(told, monkeypatch):  # noqa: F811
    monkeypatch.chdir(told)
    asked = Drawing(run="told", prompts=("a three", "a nine"), num_per_class=2, steps=2, denoising="strip")
    drawn = draw(Path("runs"), asked, ignore)
    assert drawn.denoising and "--prompt 'a three' 'a nine'" in drawn.command


def test_the_denoising_begins_in_noise_and_ends_in_the_images(runs):
    asked = {"run": "tiny", "classes": ("0", "1"), "num_per_class": 2, "steps": 12}
    drawn = draw(runs, Drawing(**asked, denoising="animation"), ignore)
    film = Image.open(io.BytesIO(drawn.denoising))
    assert film.n_frames == 13
    film.seek(12)
    assert np.array_equal(np.asarray(film.convert("RGB")), np.asarray(drawn.grid))

    again = draw(runs, Drawing(**asked, denoising="strip"), ignore)
    assert np.array_equal(np.asarray(again.grid), np.asarray(drawn.grid))
    strip, grid = np.asarray(Image.open(io.BytesIO(again.denoising)).convert("RGB")), np.asarray(drawn.grid)
    cell = 64  # the last of a row of the strip is the first image of that row of the grid
    assert strip.shape[1] - (grid.shape[1] - 2 * (cell + 2)) == demo.STRIP_COLUMNS * (cell + 2)
    left = grid.shape[1] - 2 * (cell + 2)
    assert np.array_equal(strip[2 : 2 + cell, -cell - 2 : -2], grid[2 : 2 + cell, left : left + cell])
    assert not np.array_equal(strip[2 : 2 + cell, left : left + cell], grid[2 : 2 + cell, left : left + cell])


@pytest.mark.parametrize(("denoising", "together"), [("none", 4), ("strip", 6)])
def test_as_many_are_drawn_at_a_time_as_is_fastest_unless_they_are_followed(runs, monkeypatch, denoising, together):
    monkeypatch.setattr("uvit.generate.default_batch_size", lambda *_: 4)
    seen = []
    asked = Drawing(run="tiny", classes=("1", "2"), num_per_class=3, steps=2, denoising=denoising)
    draw(runs, asked, lambda *each: seen.append(each))
    assert seen[0] == (together, 12) and seen[-1] == (12, 12)


def test_a_film_of_many_images_is_made_smaller():
    tall = [Image.new("RGB", (30, demo.MAX_WEBP_SIDE + 1), colour) for colour in ("red", "blue")]
    film = Image.open(io.BytesIO(demo._to_webp(tall)))
    assert film.n_frames == 2 and film.size == (30, demo.MAX_WEBP_SIDE)


def test_runs_are_found_newest_first_and_weights_alone_are_not(runs):
    shutil.copytree(runs / "tiny", runs / "group" / "second")
    os.utime(runs / "tiny" / "model.safetensors", (1, 1))
    shutil.copytree(runs / "tiny", runs / "weights")
    config = json.loads((runs / "tiny" / "config.json").read_text())
    (runs / "weights" / "config.json").write_text(json.dumps(config["model"]))
    assert list_runs(runs) == ["group/second", "tiny"]


def test_what_is_deleted_meanwhile_or_has_no_name_to_print_is_left_out(runs, monkeypatch):
    for name in ["two\nlines", *[os.fsdecode(b"\xff")] * (sys.platform == "linux")]:
        shutil.copytree(runs / "tiny", runs / name)
    shutil.copytree(runs / "tiny", runs / "second")
    assert sorted(list_runs(runs)) == ["second", "tiny"]

    def delete(config: Path) -> bool:
        if config.parent.name == "second":
            shutil.rmtree(config.parent)
        return True

    monkeypatch.setattr(demo, "_holds_run", delete)
    assert list_runs(runs) == ["tiny"]


def test_a_run_deleted_before_it_is_loaded_is_not_asked_of_the_hub(runs, monkeypatch):
    shutil.copytree(runs / "tiny", runs / "group" / "second")
    monkeypatch.chdir(runs.parent)

    def find_and_delete(*given) -> Path:
        found = find_run(*given)
        shutil.rmtree(found.parent)
        return found

    monkeypatch.setattr(demo, "find_run", find_and_delete)
    with pytest.raises(InputError, match=r"^checkpoint not found: second$"):
        draw(Path("runs"), Drawing(run="group/second"), ignore)


def test_other_folders_of_the_machine_are_not_named(runs, tmp_path):
    (tmp_path / "encoders" / "vae-large").mkdir(parents=True)
    config = json.loads((runs / "tiny" / "config.json").read_text())
    config["data"]["autoencoder"] = str(tmp_path / "encoders" / "vae")
    (runs / "tiny" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"^autoencoder not found: vae$"):
        draw(runs, Drawing(run="tiny"), ignore)


def test_no_name_leads_out_of_the_folder(runs, tmp_path):
    outside = tmp_path / "outside"
    shutil.copytree(runs / "tiny", outside)
    (runs / "linked").symlink_to(outside)
    (runs / "files").mkdir()
    for name in ("config.json", "model.safetensors"):
        (runs / "files" / name).symlink_to(outside / name)
    assert list_runs(runs) == ["tiny"]
    names = ["../outside", str(outside), "linked", "files", "tiny/../../outside", "tiny/", ".", "", None, 3, ["tiny"]]
    for name in names:
        with pytest.raises(InputError, match="run not found in"):
            find_run(runs, name)
    (tmp_path / "elsewhere").symlink_to(runs)  # the folder itself may be a link
    assert list_runs(tmp_path / "elsewhere") == ["tiny"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"steps": 251}, "steps must be at most 250, got 251"),
        ({"steps": 2.5}, "steps must be int, got 2.5"),
        ({"num_per_class": 0}, "num_per_class must be at least 1, got 0"),
        ({"num_per_class": 11}, "images must be at most 100 in all, got 10 × 11"),
        ({"guidance": -9.0}, "guidance must be at most 8 in size, got -9.0"),
        ({"sampler": "dim"}, "did you mean 'ddim'?"),
        ({"seed": None}, "seed must be int, got None"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"classes": "three"}, "classes must be"),
        ({"classes": ("thre",)}, "did you mean 'three'?"),
        ({"prompts": ("a three",)}, "takes no prompt, got 'a three'"),
        ({"denoising": "film"}, "denoising must be one of 'none', 'strip', 'animation', got 'film'"),
        ({"run": "tony"}, "run not found in .*: 'tony', did you mean 'tiny'?"),
    ],
)
def test_what_a_request_gets_wrong_is_one_line(runs, changed, message):
    with pytest.raises(InputError, match=message.replace("?", r"\?")) as caught:
        draw(runs, Drawing(**{"run": "tiny", "steps": 1, **changed}), ignore)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_the_command_listens_on_this_machine_alone_until_it_is_stopped(runs):
    command = [sys.executable, str(ROOT / "app.py"), "--runs", str(runs), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        assert line.startswith(f"runs of {runs} at http://127.0.0.1:"), process.stderr.read()
        address = line.split()[4].rstrip(",")
        assert "U-ViT" in httpx.get(address).text
        with pytest.raises(OSError):  # another address of this machine
            socket.create_connection(("127.0.0.2", urlparse(address).port), timeout=5)
    finally:
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 143 and errors == "\nstopped by SIGTERM\n"


def test_a_port_in_use_and_no_such_folder(runs, tmp_path):
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


def test_a_program_gets_images_and_the_same_checks(served, runs, capfd):
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


def test_too_little_memory_is_one_line(served, monkeypatch, capfd):
    monkeypatch.setattr(demo, "generate", lambda *_: torch.empty(2**60, dtype=torch.uint8))
    assert "not enough memory for that many images: draw fewer" in call(served)
    assert "Traceback" not in "".join(capfd.readouterr())


@needs_browser
def test_the_first_press_draws_where_all_classes_are_too_many(served, runs, driver):
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
    assert picture.size[1] == 2 + demo.FIRST_CLASSES * 66
    assert f"--guidance {demo.MAX_GUIDANCE:g}" in page.find("#command").text.replace("\n", " ")


@needs_browser
def test_a_person_chooses_presses_and_sees_other_images(served, runs, driver):
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
def test_a_second_request_waits_its_turn(served, driver, monkeypatch):
    may_end, drawing, most = threading.Event(), [], []

    def slow(*arguments, **named):
        drawing.append(1)
        most.append(len(drawing))
        assert may_end.wait(60)
        drawing.pop()
        return generate(*arguments, **named)

    generate = demo.generate
    monkeypatch.setattr(demo, "generate", slow)
    try:
        first = Page(driver, served)
        first.press()
        first.wait(lambda: most)
        driver.switch_to.new_window("window")
        second = Page(driver, served)
        second.press()
        second.wait(lambda: "queue" in second.find("#grid").text)
        assert most == [1] and second.source() is None
        may_end.set()
        assert second.wait(second.source)
        assert most == [1, 1]
        driver.close()
    finally:
        may_end.set()
        driver.switch_to.window(driver.window_handles[0])
    assert first.wait(first.source)
