"""Power-function averages: their mathematics, as they are kept in a run, and rebuilt by the command."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.commands import refused
from helpers.runs import files_of, losses_of
from helpers.same_runs import assert_same
from torch import nn

from uvit import UViT
from uvit.commands import average, card, evaluate, sample, train
from uvit.common.errors import InputError
from uvit.config import MAX_WIDTH, TrainConfig, average_files, load_config
from uvit.training.averages import Averages
from uvit.training.checkpoint import load_checkpoint
from uvit.weights.averages import decay_at, exponent_of, fit, rebuild
from uvit.weights.tensors import read_weights, write_tensors

QUICK = "--train.sample_every 0 --train.tracker none --train.num_threads 1 --optim.name adamw"
KEPT = f"{QUICK} --train.average_widths 0.05 0.1"


def shares(width: float, num_updates: int) -> np.ndarray:
    """The share that the weights after each update have in an average: the difference of (k / T)^(γ + 1)."""
    return np.diff((np.arange(num_updates + 1) / num_updates) ** (exponent_of(width) + 1))


@pytest.mark.parametrize("width", [0.001, 0.05, 0.1, 0.2, MAX_WIDTH])
def test_a_width_is_the_standard_deviation_of_its_density(width):
    gamma = exponent_of(width)
    assert gamma >= 0 and math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))) == pytest.approx(width, rel=1e-9)
    t = (np.arange(200_000) + 0.5) / 200_000
    density = (gamma + 1) * t**gamma / 200_000
    mean = (density * t).sum()
    assert math.sqrt((density * (t - mean) ** 2).sum()) == pytest.approx(width, rel=1e-3)


def test_a_uniform_average_is_the_widest():
    assert exponent_of(12**-0.5) == pytest.approx(0, abs=1e-6)
    assert [decay_at(12**-0.5, update) for update in (1, 2, 4)] == pytest.approx([0, 1 / 2, 3 / 4], abs=1e-6)


@pytest.mark.parametrize("width", [0.01, 0.1, 0.25])
def test_decays_amount_to_the_shares(width):
    decays = [decay_at(width, update) for update in range(1, 41)]
    expected = [(1 - decays[k]) * math.prod(decays[k + 1 :]) for k in range(40)]
    np.testing.assert_allclose(shares(width, 40), expected, rtol=1e-9, atol=1e-15)


def test_a_tracked_average_is_the_weighted_sum_of_the_weights(tmp_path):
    torch.manual_seed(0)
    network = nn.Linear(3, 4)
    tracked = Averages(network, TrainConfig(average_widths=(0.05, 0.2)), tmp_path)
    seen = []
    for _ in range(50):
        nn.init.normal_(network.weight)
        seen.append(network.weight.detach().double().clone())
        tracked.update(network)
    for width in (0.05, 0.2):
        expected = sum(share * weight for share, weight in zip(shares(width, 50), seen))
        torch.testing.assert_close(tracked.averages[width]["weight"].double(), expected, rtol=0, atol=1e-6)
        assert torch.equal(tracked.averages[width]["bias"], network.bias)


def test_a_fit_is_the_best_sum_of_densities():
    widths, ends = [0.05, 0.1] * 3, [20, 20, 40, 40, 60, 60]
    fine = 4000  # parts of an update
    t = (np.arange(60 * fine) + 0.5) / fine

    def density(width, end):
        gamma = exponent_of(width)
        return np.where(t < end, (gamma + 1) / end * (t / end) ** gamma, 0)

    basis = np.stack([density(*each) for each in zip(widths, ends)])
    for width in (0.03, 0.07, 0.15):
        coefficients, error = fit(widths, ends, width, 60)
        assert coefficients.sum() == pytest.approx(1, abs=1e-9)
        # Written as the last one plus differences from it, whose least squares have no condition.
        wanted = density(width, 60)
        free = np.linalg.lstsq((basis[:-1] - basis[-1]).T, wanted - basis[-1], rcond=None)[0]
        np.testing.assert_allclose(coefficients[:-1], free, rtol=1e-3, atol=1e-4)
        reached = np.linalg.norm(coefficients @ basis - wanted) / np.linalg.norm(wanted)
        assert error == pytest.approx(reached, rel=1e-3) and 0 < error < 0.5


def test_a_fit_to_what_was_kept_is_that():
    coefficients, error = fit([0.05, 0.1] * 2, [30, 30, 60, 60], 0.1, 60)
    np.testing.assert_allclose(coefficients, [0, 0, 0, 1], atol=1e-6)
    assert error < 1e-6
    assert fit([0.2], [60], 0.1, 60)[0] == pytest.approx([1])


@pytest.fixture(scope="module")
def kept(trained, tmp_path_factory) -> Path:
    """A folder with tiny.py and a run of 64 steps, runs/kept, which kept two averages."""
    folder = tmp_path_factory.mktemp("averages")
    shutil.copy(trained / "tiny.py", folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train.main(["tiny.py", *KEPT.split(), *"--train.num_steps 64 --train.run_dir runs/kept".split()])
    return folder


@pytest.fixture
def beside(kept, tmp_path, monkeypatch) -> Path:
    """A copy of that folder, as the current one."""
    shutil.copytree(kept, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def distance(found, expected) -> float:
    """Of two state dicts, in parts of the second one's norm."""
    ours, theirs = (torch.cat([each[name].double().flatten() for name in expected]) for each in (found, expected))
    return (torch.linalg.vector_norm(ours - theirs) / torch.linalg.vector_norm(theirs)).item()


def test_a_rebuilt_width_is_the_one_that_was_tracked(beside):
    for width in (0.07, 0.12, 0.2):
        options = f"{QUICK} --train.average_widths {width} --train.num_steps 64 --train.run_dir runs/w"
        train.main(["tiny.py", *options.split()])
        for step in (40, 64):
            kept = read_weights(Path(f"runs/w/averages/step_000000{step}.safetensors"))
            tracked = {name.partition("/")[2]: each for name, each in kept.items() if name != "updates"}
            rebuilt, how = rebuild(Path("runs/kept"), width, step)
            assert (how.step, how.num_snapshots, rebuilt.keys()) == (step, step // 2, tracked.keys())
            assert distance(rebuilt, tracked) < 1e-3
            nearest, _ = rebuild(Path("runs/kept"), 0.05 if width < 0.075 else 0.1, step)
            assert distance(nearest, tracked) > 5e-3  # which is no answer
        final = load_checkpoint(Path("runs/w"))["model"]
        assert distance(tracked, final) > 0.01  # they do differ
        shutil.rmtree("runs/w")
    exact, how = rebuild(Path("runs/kept"), 0.05)
    state = load_checkpoint(Path("runs/kept"))["averages"]
    assert distance(exact, {name: state[f"0.05/{name}"] for name in exact}) < 1e-6 and how.error < 1e-6


def test_averages_change_nothing_else(beside):
    train.main(["tiny.py", *QUICK.split(), *"--train.num_steps 64 --train.run_dir runs/plain".split()])
    with_them, without = load_checkpoint(Path("runs/kept")), load_checkpoint(Path("runs/plain"))
    averages = with_them.pop("averages")
    assert int(averages["updates"]) == 64
    assert_same(with_them, without)
    assert losses_of(Path("runs/kept")) == losses_of(Path("runs/plain"))
    assert not Path("runs/plain/averages").exists()


def test_a_resumed_run_has_the_same_averages(beside):
    for steps in ("5", "64"):
        options = f"{KEPT} --train.average_every 2 --train.num_steps {steps} --train.run_dir runs/parts"
        train.main(["tiny.py", *options.split()])
    kept = Path("runs/kept/averages")
    Path("runs/parts/averages/step_00000005.safetensors").unlink()  # where the first part ended
    assert_same(load_checkpoint(Path("runs/parts"))["averages"], load_checkpoint(Path("runs/kept"))["averages"])
    assert files_of(Path("runs/parts/averages")) == files_of(kept) and len(files_of(kept)) == 32


def test_no_snapshot_is_of_no_updates(tiny, tmp_path):
    """As where the first steps are skipped, since they are not finite."""
    averages = Averages(UViT(tiny), TrainConfig(average_widths=(0.1,), average_every=1), tmp_path)
    averages.snapshot(1, is_end=False, is_main=True)
    assert not average_files(tmp_path)


def test_a_narrow_width_is_fitted_without_a_warning(recwarn):
    coefficients, error = fit([0.001, 0.288] * 4, [1, 1, 10, 10, 100, 100, 1000, 1000], 0.001, 1000)
    assert coefficients[-2] == pytest.approx(1) and error < 1e-3 and not recwarn.list


def test_the_search_warns_of_a_width_that_cannot_be_fitted(beside, capsys):
    options = f"{QUICK} --train.average_widths 0.001 0.288 --train.num_steps 4 --train.run_dir runs/narrow"
    train.main(["tiny.py", *options.split()])
    evaluate.main("--checkpoint runs/narrow --num_images 20 --widths 0.1".split())
    assert "warning: the snapshots only allow a fit of width 0.1 to" in capsys.readouterr().err


def test_snapshots_after_the_step_that_a_run_resumes_from_are_removed(beside):
    """Also where the run does not write another one."""
    shutil.rmtree("runs/kept/checkpoints/step_00000064")
    options = f"{KEPT} --train.num_steps 63 --train.run_dir runs/kept --train.average_every 100"
    train.main(["tiny.py", *options.split()])
    last = load_checkpoint(Path("runs/kept"))["step"]
    names = [path.stem for path in average_files(Path("runs/kept"))]
    assert last == 63 and names[-2:] == ["step_00000062", "step_00000063"]


def test_a_later_snapshot_that_cannot_be_removed_stops_the_run(beside, monkeypatch, capsys):
    Path("runs/kept/averages/step_00000099.safetensors").mkdir()
    options = f"tiny.py {KEPT} --train.num_steps 66 --train.run_dir runs/kept"
    assert "cannot remove a snapshot of a later step: " in refused("train", options.split(), monkeypatch, capsys)


@pytest.mark.parametrize(("num_steps", "number"), [(1, 1), (32, 32), (63, 32), (64, 32), (1_500, 32)])
def test_a_run_keeps_no_more_snapshots_than_it_should(num_steps, number, tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr("uvit.training.averages.write_tensors", lambda path, tensors: written.append(path))
    averages = Averages(nn.Linear(1, 1), TrainConfig(num_steps=num_steps, average_widths=(0.1,)), tmp_path)
    averages.updates = 1
    for step in range(1, num_steps + 1):
        averages.snapshot(step, is_end=step == num_steps, is_main=True)
    assert len(written) == number


def test_averages_that_cannot_be_written_are_a_warning(beside, capsys, monkeypatch):
    options = f"{KEPT} --train.num_steps 2 --train.average_every 1 --train.run_dir runs/blocked"
    Path("runs/blocked").mkdir()
    Path("runs/blocked/averages").touch()
    train.main(["tiny.py", *options.split()])
    printed = capsys.readouterr().err
    assert "warning: cannot write runs/blocked/averages/step_00000001.safetensors, training continues: " in printed
    assert load_checkpoint(Path("runs/blocked"))["step"] == 2


def test_other_widths_make_another_run(beside, monkeypatch, capsys):
    options = f"tiny.py {QUICK} --train.num_steps 66 --train.run_dir runs/kept"
    line = refused("train", f"{options} --train.average_widths 0.07", monkeypatch, capsys)
    assert "holds a run with train.average_widths (0.05, 0.1), got (0.07,)" in line
    anyway = "--train.resume_anyway True"
    line = refused("train", f"{options} --train.average_widths 0.07 {anyway}", monkeypatch, capsys)
    assert "does not fit the config: averages of other widths or weights" in line
    train.main([*options.split(), *anyway.split()])
    assert "averages" not in load_checkpoint(Path("runs/kept"))
    capsys.readouterr()
    line = refused("train", f"{options} --train.average_widths 0.07 {anyway}".replace("66", "67"), monkeypatch, capsys)
    assert "does not fit the config: it has no averages" in line


def test_the_command_writes_a_run_to_draw_from(beside, capsys):
    before = files_of(Path("runs/kept"))
    average.main("runs/kept --width 0.08".split())
    assert files_of(Path("runs/kept")) == before
    folder = Path("runs/kept-width-0.08")
    assert {*files_of(folder)} == {"config.json", "model.safetensors", "average.json"}
    assert load_config(folder / "config.json") == load_config(Path("runs/kept/config.json"))
    assert_same(read_weights(folder / "model.safetensors"), rebuild(Path("runs/kept"), 0.08)[0])
    printed = capsys.readouterr()
    assert "runs/kept to runs/kept-width-0.08: average of width 0.08 at step 64, from 32 snapshots" in printed.out
    assert "warning" not in printed.err
    how = json.loads((folder / "average.json").read_text())
    assert (how["run"], how["width"], how["step"], how["num_snapshots"]) == ("runs/kept", 0.08, 64, 32)
    sample.main(f"--checkpoint {folder} --num_per_class 1 --output drawn.png".split())
    average.main("runs/kept --width 0.01 --step 6 --output other".split())  # which few snapshots hardly tell
    assert Path("other/model.safetensors").is_file()
    assert "warning: the snapshots only allow a fit of width 0.01 to " in capsys.readouterr().err


def test_training_does_not_overwrite_an_average(beside, monkeypatch, capsys):
    average.main("runs/kept --width 0.08".split())
    before = files_of(beside)
    options = f"tiny.py {KEPT} --train.num_steps 2 --train.run_dir"
    line = refused("train", f"{options} runs/kept-width-0.08".split(), monkeypatch, capsys)
    assert "holds an average of another run: use another --train.run_dir, or start from it with --train.init" in line
    assert files_of(beside) == before
    train.main(f"{options} runs/next --train.init runs/kept-width-0.08".split())


def test_evaluate_searches_the_width(beside, capsys):
    evaluate.main("--checkpoint runs/kept --num_images 20 --widths 0.06 0.15".split())
    saved = json.loads(Path("runs/kept/widths.json").read_text())
    figures = {width: each["frechet"] for width, each in saved["widths"].items()}
    assert [*figures] == ["0.06", "0.15"] and len({*figures.values()}) == 2
    assert str(saved["best"]) == min(figures, key=figures.get)
    assert not Path("runs/kept/evaluation.json").exists()
    printed = capsys.readouterr().out
    assert printed.count("Fréchet distance ") == 2 and "width 0.06:" in printed
    assert f"best width {saved['best']:g} by the Fréchet distance" in printed
    weights = saved["widths"]["0.06"]["protocol"]["weights"]
    assert weights.startswith("EMA of runs/kept-width-0.06, width 0.06 at step 64, hash ")
    average.main("runs/kept --width 0.06".split())
    evaluate.main("--checkpoint runs/kept-width-0.06 --num_images 20".split())
    alone = json.loads(Path("runs/kept-width-0.06/evaluation.json").read_text())
    assert_same(alone, saved["widths"]["0.06"])


def test_a_broken_file_of_how_it_was_made_is_refused_before_the_drawing(beside, monkeypatch, capsys):
    average.main("runs/kept --width 0.08".split())
    Path("runs/kept-width-0.08/average.json").write_text("{}")
    monkeypatch.setattr("uvit.evaluation.measure.draw_with_progress", lambda *_: pytest.fail("it draws"))
    options = "--checkpoint runs/kept-width-0.08 --num_images 20"
    line = refused("evaluate", options, monkeypatch, capsys)
    assert "average.json: RebuiltAverage must have a field 'run', got none" in line


def test_errors_name_a_rebuilt_average_by_its_width(beside, monkeypatch, capsys):
    Path("deep.py").write_text(Path("tiny.py").read_text().replace("depth=2", "depth=4"))
    line = refused("evaluate", "--checkpoint runs/kept --widths 0.1 --config deep.py", monkeypatch, capsys)
    assert line.startswith("error: runs/kept-width-0.1 is not the model of deep.py")


def test_a_card_says_what_the_weights_are(beside):
    average.main("runs/kept --width 0.08".split())
    card.main("runs/kept-width-0.08 card".split())
    of_width = "power-function average of relative width 0.08 (arXiv 2312.02696)"
    assert of_width in Path("card/README.md").read_text()
    shutil.copy("runs/kept/model.safetensors", "runs/kept-width-0.08")  # other weights than it was written for
    for name in ("kept-width-0.08", "kept"):
        card.main([f"runs/{name}", name])
        assert "average with decay 0.5" in Path(name, "README.md").read_text()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("average runs/kept --width 0.3", "width must be 0.001 to 0.288, got 0.3"),
        ("average runs/kept --width 0", "width must be 0.001 to 0.288, got 0"),
        ("average runs/kept --width nan", "nan"),
        ("average runs/kept", "--width"),
        ("average runs/kept --width 0.1 --step 7", "such as 6, got 7"),
        ("average runs/kept --width 0.1 --output runs", "the output must be a new folder, got runs, which exists"),
        ("average runs/nowhere --width 0.1", "run folder not found: runs/nowhere"),
        ("average runs --width 0.1", "runs has no averages to rebuild a width from: train it with --train.average_w"),
        (
            "evaluate --checkpoint runs/kept --widths 0.1 0.3",
            "widths must be different widths of 0.001 to 0.288, got (0.1,",
        ),
        (
            "evaluate --checkpoint runs/kept --widths 0.1 0.1",
            "widths must be different widths of 0.001 to 0.288, got (",
        ),
        ("evaluate --checkpoint runs/nope --widths 0.1", "run folder not found: runs/nope"),
        ("evaluate --checkpoint runs --widths 0.1", "runs has no averages to rebuild a width from"),
        ("evaluate --images x.npz --reference y --widths 0.1", "--widths is for images to draw from a --checkpoint"),
        ("train tiny.py --train.average_widths 0.3", "average_widths must be different widths of 0.001 to 0.288"),
        ("train tiny.py --train.average_widths 0.1 0.1", "average_widths must be different widths of 0.001 to 0.288"),
        ("train tiny.py --train.average_every 9", "average_every must be None without average_widths, got 9"),
        ("train tiny.py --train.average_every 0", "average_every must be None or at least 1, got 0"),
    ],
)
def test_bad_input_is_one_line(command, message, beside, monkeypatch, capsys):
    name, *words = command.split()
    before = files_of(beside)
    assert message in refused(name, words, monkeypatch, capsys)
    assert files_of(beside) == before


def test_broken_snapshots_are_refused(beside):
    path = Path("runs/kept/averages/step_00000064.safetensors")
    content, run_dir = path.read_bytes(), Path("runs/kept")
    broken = {
        "is not a valid safetensors file": content[:1000],
        "is damaged, its weights must have hash": content[:-1] + bytes([content[-1] ^ 1]),
    }
    for message, bytes_ in broken.items():
        path.write_bytes(bytes_)
        with pytest.raises(InputError, match=message):
            rebuild(run_dir, 0.1)
    one = {"0.1/weight": torch.ones(2), "updates": torch.tensor(3)}
    other = "must hold averages by their width and name, got other tensors"
    for message, tensors in (
        (other, {**one, "0.4/weight": torch.ones(2)}),
        (other, {**one, "weight": torch.ones(2)}),
        (other, {"0.1/weight": torch.ones(2)}),
        (other, {"updates": torch.tensor(3)}),
        (other, {**one, "updates": torch.tensor(0)}),
        (other, {**one, "updates": torch.ones(2)}),
        ("must hold the same weights for each width as step_00000002.safetensors, got others", one),
    ):
        path.unlink()
        write_tensors(path, tensors)
        with pytest.raises(InputError, match=message):
            rebuild(run_dir, 0.1)


def test_averages_that_are_not_finite_are_refused(beside):
    path = Path("runs/kept/averages/step_00000064.safetensors")
    tensors = read_weights(path)
    next(value for name, value in tensors.items() if name.startswith("0.05/")).fill_(math.nan)
    path.unlink()
    write_tensors(path, tensors)
    with pytest.raises(InputError, match="averages in runs/kept must be finite, got NaN or infinity"):
        rebuild(Path("runs/kept"), 0.1)


def test_an_interrupted_average_leaves_nothing(beside, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("uvit.weights.averages.save_json", fail)
    with pytest.raises(InputError, match=r"cannot write to runs/kept-width-0.08: No space left"):
        average.main("runs/kept --width 0.08".split())
    assert sorted(path.name for path in Path("runs").iterdir()) == ["kept"]
