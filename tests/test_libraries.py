from __future__ import annotations

import logging

import datasets
import diffusers.utils.logging
import pytest
import transformers.utils.logging

from uvit.common.libraries import quiet

LIBRARIES = ("datasets", "diffusers", "huggingface_hub", "transformers", "xformers")
SWITCHES = {"diffusers": diffusers.utils.logging, "transformers": transformers.utils.logging}


def settings():
    """The levels of the libraries' loggers, and whether they show progress bars."""
    bars = {name: module.is_progress_bar_enabled() for name, module in SWITCHES.items()}
    bars["datasets"] = not datasets.are_progress_bars_disabled()
    return {name: logging.getLogger(name).level for name in LIBRARIES}, bars


@pytest.fixture
def chatty():
    """Loggers at levels of their own, and all bars shown, as long as the test lasts."""
    levels, bars = settings()
    for number, name in enumerate(LIBRARIES):
        logging.getLogger(name).setLevel(logging.DEBUG + number)
    for module in SWITCHES.values():
        module.enable_progress_bar()
    datasets.enable_progress_bars()
    yield settings()
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    for name, module in SWITCHES.items():
        (module.enable_progress_bar if bars[name] else module.disable_progress_bar)()
    (datasets.enable_progress_bars if bars["datasets"] else datasets.disable_progress_bars)()


@pytest.mark.parametrize("error", [None, ZeroDivisionError])
def test_levels_and_bars_are_restored_however_the_block_ends(chatty, error):
    try:
        with quiet(*LIBRARIES):
            levels, bars = settings()
            assert {*levels.values()} == {logging.CRITICAL} and not any(bars.values())
            if error:
                raise error
    except ZeroDivisionError:
        assert error
    assert settings() == chatty


@pytest.mark.usefixtures("chatty")
def test_other_libraries_are_not_silenced_and_silent_ones_stay_silent():
    datasets.disable_progress_bars()
    before = settings()
    with quiet("datasets", "huggingface_hub"):
        levels, bars = settings()
        assert levels["transformers"] == before[0]["transformers"] and bars["transformers"]
        assert levels["huggingface_hub"] == logging.CRITICAL
    assert settings() == before and datasets.are_progress_bars_disabled()


def test_a_warning_is_not_printed(capsys):
    with quiet("diffusers"):
        logging.getLogger("diffusers.models").warning("a warning")
    assert capsys.readouterr() == ("", "")
