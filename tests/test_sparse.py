"""A U-ViT whose inner blocks see some of the patches: the network, what training draws, and whole runs."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from helpers.commands import refused
from helpers.runs import TINY, TINY_SPARSE, losses_of

from uvit import Config, UNet, UViT, UViTConfig
from uvit.commands import card, evaluate, sample, train
from uvit.common.errors import InputError
from uvit.config import ProcessConfig, SampleConfig, TrainConfig
from uvit.data.images import to_uint8
from uvit.diffusion.samplers import ImageNoise
from uvit.networks.sparse import put_tokens, take_tokens
from uvit.sampling.generate import generate
from uvit.sampling.runs import load_run
from uvit.training.checkpoint import load_checkpoint
from uvit.training.sparse import at_step, random_patches, sparse_inputs, structured_patches

CONFIG = UViTConfig(img_size=8, in_chans=1, embed_dim=32, depth=4, num_heads=4, num_classes=5, outer_pairs=1)
X = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
TIMES, LABELS = torch.tensor([3.0, 400.0, 999.0]), torch.tensor([0, 3, 4])
KEPT = torch.tensor([[0, 5, 10, 15], [3, 2, 1, 0], [7, 13, 8, 4]])
CPU = torch.device("cpu")


@pytest.fixture
def network():
    """A network of a gap token that is not small."""
    torch.manual_seed(0)
    network = UViT(CONFIG).eval()
    torch.nn.init.normal_(network.gap_token)
    return network


def plain_prediction(network, number, kept):
    """One image by the blocks, token by token; no `kept` leaves the inner blocks out."""
    tokens, conditions = network._embed(X[number, None], TIMES[number, None], LABELS[number, None], None, None, None)
    first, *inner, last = network.blocks
    h = outer = first(tokens, *conditions)
    deep = network.gap_token.repeat(1, h.shape[1], 1)
    if kept is not None:
        seen = [0, 1, *(2 + patch for patch in kept)]  # label, time, patches
        part, skips = h[:, seen], []
        for block in inner[: len(inner) // 2]:
            part = block(part, *conditions)
            skips.append(part)
        part = inner[len(inner) // 2](part, *conditions)
        for block in inner[len(inner) // 2 + 1 :]:
            part = block(part, *conditions, skips.pop())
        for place, token in zip(seen, part[0]):
            deep[0, place] = token
    return network._to_image(last(deep, *conditions, outer))


def test_a_prediction_from_some_patches_equals_that_of_each_image_token_by_token(network):
    dropped = torch.tensor([False, True, False])
    found = network(X, TIMES, LABELS, kept=KEPT, dropped=dropped)
    for number, image in enumerate(found):
        kept = None if dropped[number] else KEPT[number].tolist()
        torch.testing.assert_close(image[None], plain_prediction(network, number, kept))


def test_all_patches_in_any_order_are_all_patches(network):
    expected = network(X, TIMES, LABELS)
    order = torch.stack([torch.randperm(16) for _ in range(3)])
    torch.testing.assert_close(network(X, TIMES, LABELS, kept=order), expected)
    assert torch.equal(network(X, TIMES, LABELS, dropped=torch.zeros(3, dtype=torch.bool)), expected)
    without = UViT(CONFIG, outer_pairs=0).eval()
    without.load_state_dict({name: value for name, value in network.state_dict().items() if name != "gap_token"})
    assert torch.equal(without(X, TIMES, LABELS), expected)


def test_the_outer_pairs_predict_alone(network):
    everything = torch.ones(3, dtype=torch.bool)
    ran = []
    for number, block in enumerate(network.blocks):
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
    found = network.forward_outer(X, TIMES, LABELS)
    assert ran == [0, 4]
    assert torch.equal(found, network(X, TIMES, LABELS, dropped=everything))
    assert not torch.allclose(found, network(X, TIMES, LABELS))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_parameter_gets_a_gradient(checkpointing):
    torch.manual_seed(0)
    network = UViT(CONFIG, gradient_checkpointing=checkpointing)
    network(X, TIMES, LABELS, kept=KEPT, dropped=torch.tensor([False, True, False])).square().sum().backward()
    assert all(parameter.grad.any() for parameter in network.parameters())
    network.zero_grad()
    network(X, TIMES, LABELS, dropped=torch.zeros(3, dtype=torch.bool)).sum().backward()
    assert network.gap_token.grad is not None and not network.gap_token.grad.any()


def test_tokens_are_put_back_where_they_were_taken():
    h, gap = torch.randn(3, 18, 4, requires_grad=True), torch.full((1, 1, 4), 7.0)
    part = take_tokens(h, KEPT, 2)
    assert part.shape == (3, 6, 4)
    for number in range(3):
        assert torch.equal(part[number], h[number, [0, 1, *(2 + KEPT[number]).tolist()]])
    back = put_tokens(part, KEPT, gap, 2, 18)
    seen = torch.zeros(3, 18, dtype=torch.bool)
    seen[:, :2] = True
    seen.scatter_(1, 2 + KEPT, True)
    assert torch.equal(back[seen], h[seen]) and (back[~seen] == 7).all()
    back.sum().backward()
    assert torch.equal(h.grad, seen[..., None].expand_as(h).float())


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"kept": KEPT[:2]}, r"kept must be \(3, M\) with M at least 1, got \(2, 4\)"),
        ({"kept": KEPT[:, :0]}, r"kept must be \(3, M\) with M at least 1, got \(3, 0\)"),
        ({"kept": KEPT.float()}, "kept must be a tensor of int64 or int32, got one of torch.float32"),
        ({"kept": KEPT.tolist()}, "kept must be a tensor of int64 or int32, got list"),
        ({"dropped": torch.ones(3)}, "dropped must be a tensor of bool, got one of torch.float32"),
        ({"dropped": torch.ones(2, dtype=torch.bool)}, r"dropped must be \(3,\), got \(2,\)"),
    ],
)
def test_other_shapes_and_types_are_refused(network, inputs, message):
    with pytest.raises(InputError, match=message):
        network(X, TIMES, LABELS, **inputs)


def test_a_network_without_an_inner_part_has_none_to_leave_out():
    for network in (
        UViT(CONFIG, outer_pairs=0),
        UNet(img_size=8, in_chans=1, num_classes=5, model_channels=32, head_dim=16, attention_sizes=(8,)),
    ):
        with pytest.raises(InputError, match="kept and dropped need a network with sparse_pairs above 0, got 0"):
            network(X, TIMES, LABELS, kept=KEPT)
    with pytest.raises(
        InputError, match="a prediction by the outer pairs needs a network with sparse_pairs above 0, got 0"
    ):
        UViT(CONFIG, outer_pairs=0).forward_outer(X, TIMES, LABELS)


@pytest.mark.parametrize("fields", [{"outer_pairs": -1}, {"outer_pairs": 3}, {"skip": "none"}])
def test_pairs_that_a_network_has_not_are_refused(fields):
    with pytest.raises(InputError, match="outer_pairs must be 0"):
        dataclasses.replace(CONFIG, **fields)


@pytest.mark.parametrize(("keep", "of_each"), [(0.25, 1), (0.5, 2), (0.75, 3)])
def test_structured_patches_are_as_many_in_each_square(keep, of_each):
    kept = structured_patches((4, 6), keep, 4_000, CPU, torch.Generator().manual_seed(0))
    assert kept.shape == (4_000, 24 * keep)
    seen = torch.zeros(4_000, 24).scatter_(1, kept, 1.0)
    squares = seen.reshape(-1, 2, 2, 3, 2).sum(dim=(2, 4))
    assert (squares == of_each).all()
    torch.testing.assert_close(seen.mean(0), torch.full((24,), keep), rtol=0, atol=0.04)


@pytest.mark.parametrize(("keep", "count"), [(0.05, 1), (0.3, 7), (0.9, 22)])
def test_random_patches_are_different_ones_of_the_whole_image(keep, count):
    kept = random_patches((4, 6), keep, 4_000, CPU, torch.Generator().manual_seed(0))
    assert kept.shape == (4_000, count)
    seen = torch.zeros(4_000, 24).scatter_(1, kept, 1.0)
    assert (seen.sum(1) == count).all()
    torch.testing.assert_close(seen.mean(0), torch.full((24,), count / 24), rtol=0, atol=0.04)


def sparse_config(**fields):
    return Config(model=CONFIG, train=TrainConfig(**{"num_steps": 10, "token_keep": 0.25, **fields}))


def test_the_last_steps_see_all_patches():
    config = sparse_config(dense_share=0.3)
    assert [at_step(config, step).train.token_keep for step in range(10)] == [0.25] * 7 + [1.0] * 3
    assert {at_step(sparse_config(dense_share=0.0), step).train.token_keep for step in range(10)} == {0.25}
    assert {at_step(sparse_config(dense_share=1.0), step).train.token_keep for step in range(10)} == {1.0}


def test_what_is_drawn_depends_on_the_network_and_the_step():
    generator = torch.Generator().manual_seed(0)
    inputs = sparse_inputs(sparse_config(path_drop=0.3), 4_000, CPU, generator)
    assert inputs["kept"].shape == (4_000, 4)
    assert inputs["dropped"].float().mean().item() == pytest.approx(0.3, abs=0.03)
    inputs = sparse_inputs(sparse_config(token_keep=1.0), 40, CPU, generator)
    assert [*inputs] == ["dropped"]
    before = generator.get_state()
    inputs = sparse_inputs(sparse_config(token_keep=1.0, path_drop=0.0), 40, CPU, generator)
    assert not inputs["dropped"].any()
    dense = Config(model=dataclasses.replace(CONFIG, outer_pairs=0))
    assert sparse_inputs(dense, 40, CPU, generator) == {}
    assert torch.equal(generator.get_state(), before)  # the rest of the step draws what it would have drawn


@pytest.mark.parametrize(
    ("model", "fields", "message"),
    [
        ({"outer_pairs": 0}, {}, "train.token_keep 0.25 needs a U-ViT with model.outer_pairs above 0, got 0"),
        ({}, {"token_keep": 0.3}, "'structured' needs a grid of 2x2s and .* got 4x4 patches and 0.3"),
        ({"img_size": (8, 6)}, {}, "'structured' needs a grid of 2x2s and .* got 4x3 patches and 0.25"),
        (
            {},
            {"token_keep": 0.03, "token_choice": "random"},
            "train.token_keep must leave some of 16 patches and not all, got 0.03",
        ),
        ({}, {"token_keep": 0.97, "token_choice": "random"}, "must leave some of 16 patches and not all, got 0.97"),
        ({}, {"token_keep": 0.0}, "token_keep must be above 0 and at most 1, got 0"),
        ({}, {"token_keep": 1.5}, "token_keep must be above 0 and at most 1, got 1.5"),
        ({}, {"path_drop": 1.0}, r"path_drop must be in \[0, 1\), got 1"),
        ({}, {"dense_share": -0.1}, r"dense_share must be in \[0, 1\], got -0.1"),
    ],
)
def test_a_share_that_leaves_no_patches_is_refused(model, fields, message):
    with pytest.raises(InputError, match=message):
        Config(model=dataclasses.replace(CONFIG, **model), train=TrainConfig(**{"token_keep": 0.25, **fields}))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with two config files, as the current one."""
    monkeypatch.chdir(tmp_path)
    Path("sparse.py").write_text(TINY_SPARSE)
    Path("tiny.py").write_text(TINY)
    return tmp_path


def test_a_run_with_all_patches_is_todays_to_the_bit(folder):
    train.main(["tiny.py"])
    train.main("tiny.py --model.outer_pairs 1 --train.path_drop 0 --train.run_dir same".split())
    ours, theirs = load_checkpoint(Path("same")), load_checkpoint(Path("runs/tiny"))
    assert losses_of(Path("same")) == losses_of(Path("runs/tiny"))
    assert {*ours["ema"]} - {*theirs["ema"]} == {"gap_token"}
    assert all(torch.equal(ours["ema"][name], tensor) for name, tensor in theirs["ema"].items())


def test_a_resumed_run_equals_an_uninterrupted_one(folder):
    train.main(["sparse.py"])
    shutil.copytree("runs/sparse", "again", ignore=shutil.ignore_patterns("step_00000004*"))
    train.main("sparse.py --train.run_dir again".split())
    again, whole = load_checkpoint(Path("again")), load_checkpoint(Path("runs/sparse"))
    assert again["step"] == whole["step"] == 4
    for part in ("model", "ema"):
        assert all(torch.equal(again[part][name], tensor) for name, tensor in whole[part].items())
    assert not torch.equal(whole["model"]["gap_token"], whole["ema"]["gap_token"])


def test_a_longer_run_is_told_where_it_sees_all_patches(folder, capsys):
    train.main(["sparse.py"])
    train.main("sparse.py --train.num_steps 6".split())
    assert "so all blocks see all patches from another step on" in capsys.readouterr().out


@pytest.mark.parametrize("objective", ["instant", "average"])
@pytest.mark.parametrize(
    "choice", ["--train.token_choice random", "--train.accumulation_steps 2", "--model.time_conditioning adaln"]
)
def test_other_options_go_with_some_patches(folder, choice, objective):
    average = "--process.objective average --sample.sampler average".split()
    average += "--model.takes_interval True --model.takes_guidance True".split()
    train.main(["sparse.py", *choice.split(), *(average if objective == "average" else [])])
    assert len(losses_of(Path("runs/sparse"))) == 2


@pytest.mark.slow
@pytest.mark.parametrize("how", ["blocks", "model"])
def test_a_compiled_run_is_nearly_the_same(folder, how):
    train.main(["sparse.py"])
    train.main(["sparse.py", "--train.run_dir", "compiled", "--train.compile", how])
    assert losses_of(Path("compiled")) == pytest.approx(losses_of(Path("runs/sparse")), rel=1e-4)


def test_a_run_of_some_patches_needs_an_inner_part(folder, monkeypatch, capsys):
    message = refused("train", "tiny.py --train.token_keep 0.5", monkeypatch, capsys)
    assert "train.token_keep 0.5 needs a U-ViT with model.outer_pairs above 0, got 0" in message
    assert not Path("runs").exists()


def by_path(config, **settings):
    """The config with guidance 2 by path, and other settings of sampling."""
    settings = {"guidance": 2.0, "guidance_path": True, **settings}
    return dataclasses.replace(config, sample=dataclasses.replace(config.sample, **settings))


def test_guidance_by_path_leads_away_from_the_outer_blocks_alone(folder):
    """Each evaluation against its formula; the null class is the outer blocks', the label the whole network's."""
    train.main(["sparse.py"])
    config, model = load_run("runs/sparse", "auto", CPU)
    torch.nn.init.normal_(model.gap_token)
    labels = [3, 4, 5]
    found = generate(model, by_path(config, sampler="euler", num_steps=2), labels, seed=0, batch_size=2)
    noise = ImageNoise([(0, label, 0) for label in labels], (1, 8, 8), CPU)
    x, y, null = noise(), torch.tensor(labels), torch.full((3,), 10)
    with torch.no_grad():
        for t in (1.0, 0.5):
            times = torch.full((3,), 1000 * t)
            good, bad = model(x, times, y), model(x, times, null, dropped=torch.ones(3, dtype=torch.bool))
            x = x - 0.5 * (bad + 2 * (good - bad))
    assert (found.int() - to_uint8(x).int()).abs().max() <= 1  # in two batches
    assert not torch.equal(found, generate(model, by_path(config, guidance_path=False, num_steps=2), labels, seed=0))


def test_both_guidances_agree_where_nothing_is_left_out(folder):
    train.main(["sparse.py"])
    config, model = load_run("runs/sparse", "auto", CPU)
    model._leave_out = model._run_inner
    pictures = [generate(model, by_path(config, guidance_path=path), range(5), seed=0) for path in (True, False)]
    assert (pictures[0].int() - pictures[1].int()).abs().max() <= 1


def test_a_network_without_labels_is_guided_by_path(folder):
    unlabelled = "--model.num_classes 0 --model.null_class False --train.label_dropout 0".split()
    train.main(["sparse.py", *unlabelled, "--sample.guidance_path", "True"])
    config, model = load_run("runs/sparse", "auto", CPU)
    pictures = [generate(model, by_path(config, guidance=scale), [None] * 4, seed=0) for scale in (1.0, 3.0)]
    assert not torch.equal(*pictures)


def test_the_command_line_guides_by_path(folder, capsys):
    train.main(["sparse.py"])
    words = "--checkpoint runs/sparse --guidance 2 --guidance_path True --num_per_class 1"
    sample.main(words.split())
    assert "guidance w = 2 (the paper's s = 1) away from the outer blocks alone" in capsys.readouterr().out
    evaluate.main("--checkpoint runs/sparse --guidance 2 --guidance_path True --num_images 20".split())
    assert "away from the outer blocks alone" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("run_of", "words", "message"),
    [
        ("tiny.py", "--guidance_path True", "model.outer_pairs and train.path_drop above 0, got 0 and 0.1"),
        ("sparse.py --train.path_drop 0", "--guidance_path True", "train.path_drop above 0, got 1 and 0"),
        ("sparse.py", "--guidance_path True --guidance 1", "--guidance_path has no effect with guidance 1: give"),
        (
            "sparse.py",
            "--guidance_path True --guide RUN --guidance 2",
            "one network, got guidance_path True and --guide run: give --guidance_path False",
        ),
    ],
)
def test_a_path_that_cannot_be_left_out_is_refused(run_of, words, message, folder, monkeypatch, capsys):
    train.main([*run_of.split(), "--train.run_dir", "run"])
    capsys.readouterr()
    assert message in refused("sample", f"--checkpoint run {words.replace('RUN', 'run')}", monkeypatch, capsys)


def test_guidance_as_an_input_is_in_one_pass():
    fields = {"takes_interval": True, "takes_guidance": True, "null_class": True}
    with pytest.raises(InputError, match=r"sample\.guidance_path must be False with model\.takes_guidance"):
        Config(
            model=dataclasses.replace(CONFIG, **fields),
            process=ProcessConfig(objective="average"),
            sample=SampleConfig(sampler="average", guidance_path=True),
        )


def test_a_card_says_what_the_inner_blocks_saw(folder):
    train.main(["sparse.py", "--sample.guidance_path", "True"])
    card.main("runs/sparse card".split())
    written = Path("card/README.md").read_text()
    assert ", 50% of the patches for the inner blocks until the last steps |" in written
    assert "guidance w = 1.5 away from the outer blocks alone |" in written
