"""What users get wrong is one line and exit status 2, whatever the command."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from helpers.commands import refused
from helpers.edited import edit_json
from helpers.idx import save_idx, write_idx
from helpers.images import DIGITS, save_folder
from helpers.runs import TEXT, files_of

from uvit import UViT
from uvit.config import load_config
from uvit.training.checkpoint import save_checkpoint
from uvit.weights.tensors import read_weights, write_weights

BAD_INPUT = [
    ("train", "", "first argument must be a config file"),
    ("train", "nowhere.py", "config file not found: nowhere.py"),
    ("train", "tinny.py", "did you mean 'tiny.py'?"),
    ("train", "tiny.py --optim.lrr 1", "--optim.lrr"),
    ("train", "tiny.py --optim.lrr 1", "did you mean --optim.lr?"),
    ("train", "tiny.py --optim.lr fast", "could not convert string to float: 'fast'"),
    ("train", "tiny.py --optim.lr -1", "lr must be above 0, got -1"),
    ("train", "tiny.py --train.num_steps 1.5", "1.5"),
    ("train", "tiny.py --train.num_steps 0", "num_steps must be at least 1, got 0"),
    ("train", "tiny.py --train.num_steps", "--train.num"),
    ("train", "tiny.py --model.depth 3", "depth must be even and at least 2, got 3"),
    ("train", "tiny.py --model.num_heads 3", "embed_dim 16 must be divisible by num_heads 3"),
    ("train", "tiny.py --model.patch_size 3", "img_size must be divisible by patch_size 3, got 8"),
    ("train", "tiny.py --model.patch_bottleneck -1", "patch_bottleneck must be at least 0, got -1"),
    (
        "train",
        "tiny.py --model.patch_bottleneck 8 --model.patch_embed conv",
        "patch_bottleneck must be 0 with patch_embed 'conv', got 8",
    ),
    ("train", "tiny.py --process.min_divisor 1", "min_divisor must be in [0, 1), got 1"),
    ("train", "tiny.py --process.min_divisor 0.05", "min_divisor must be 0 unless the error of 'data' or 'noise' is"),
    ("train", "tiny.py --model.skip cat", "'cat'"),
    ("train", "tiny.py --model.attention xformers", "attention 'xformers' needs a CUDA device, got 'cpu'"),
    ("train", "tiny.py --model.img_size 16", "digits are 1x8x8 images, got a model for 1x16x16"),
    ("train", "tiny.py --model.num_classes 9", "num_classes must be 10 for data 'digits', got 9"),
    ("train", "tiny.py --model.null_class False", "needs model.null_class, got False"),
    ("train", "tiny.py --train.mixed_precision fp16", "needs a CUDA device, got 'cpu'"),
    ("train", "tiny.py --train.accumulation_steps 3", "batch_size 8 must be divisible by accumulation_steps 3"),
    ("train", "tiny.py --data.name empty", "data folder empty is empty"),
    ("train", "tiny.py --data.name no/such", "cannot load split 'train' of data 'no/such'"),
    (
        "train",
        "tiny.py --data.name cut",
        "cut/train-images-idx3-ubyte must have 20x8x8 bytes after its header, got 1270",
    ),
    (
        "train",
        "tiny.py --data.name uneven",
        "uneven/train-labels-idx1-ubyte.gz must have a label for each of 20 images",
    ),
    ("train", "tiny.py --data.name half --model.img_size 16", "images of data 'half' are 8x8, got a model for 16x16"),
    (
        "evaluate",
        "--images half --reference half --split test",
        "split 'test' of data 'half' must be t10k-images-idx3-ubyte, plain or .gz, found no such file",
    ),
    ("train", "tiny.py --train.tracker wandb", "train.tracker 'wandb' needs the package wandb"),
    ("train", "tiny.py --train.run_dir tiny.py/run", "cannot write to tiny.py/run: tiny.py is not a folder"),
    ("train", "tiny.py --train.seed 99999999999999999999999", "seed must be below 9223372036854775808"),
    ("train", "tiny.py --model.context_dim 8 --model.num_context_tokens 4", "got both model.num_classes 10 and"),
    (
        "train",
        f"tiny.py {' '.join(TEXT)} --data.text_encoder nowhere --train.run_dir new",
        "text encoder not found: nowhere",
    ),
    (
        "train",
        f"tiny.py {' '.join(TEXT)} --data.text_encoder no/such --train.run_dir new",
        "text encoder 'no/such' is not a folder on disk",
    ),
    (
        "train",
        f"tiny.py {' '.join(TEXT)} --data.text_encoder clip --model.context_dim 9 --train.run_dir new",
        "gives 24 tokens of width 8, expected model.num_context_tokens 24 and model.context_dim 9",
    ),
    (
        "train",
        f"tiny.py {' '.join(TEXT)} --data.text_encoder clip --model.num_context_tokens 77 --train.run_dir new",
        "gives 24 tokens of width 8, expected model.num_context_tokens 77 and model.context_dim 8",
    ),
    (
        "train",
        "tiny.py --data.autoencoder vae --train.run_dir new",
        "data 'digits' is not a folder of latents, got data.autoencoder 'vae': make it with encode.py",
    ),
    ("train", "tiny.py --data.name one --model.img_size 8 --train.run_dir new", "must have 2 images or more, got 1"),
    ("train", "tiny.py --data.scale_factor 0", "scale_factor must be above 0, got 0"),
    ("train", "tiny.py --data.class_names a b", "data.class_names must have model.num_classes 10 names, got 2"),
    ("train", "tiny.py --train.num_steps 8 --optim.lr 1e-5", "holds a run with optim.lr 0.01, got 1e-05"),
    ("train", "tiny.py --train.num_steps 8 --optim.name adamw", "holds a run with optim.name 'muon', got 'adamw'"),
    ("train", "tiny.py --train.num_steps 8 --data.name folder.png", "holds a run with data.name"),
    ("train", "tiny.py --train.run_dir foreign", "the checkpoint in foreign does not fit the config: it has no model"),
    ("train", "tiny.py --train.run_dir emptied", "config.json: Config must be a JSON object, got []"),
    ("train", "tiny.py --model.embed_dim 32", "runs/tiny holds a run with model.embed_dim 16, got 32"),
    ("train", "tiny.py --train.label_dropout 0", "sample.guidance 1.5 needs train.label_dropout above 0, got 0"),
    ("train", "tiny.py --train.alignment layersink", "'layersink'"),
    (
        "train",
        "tiny.py --train.alignment dispersive --train.accumulation_steps 8",
        "train.alignment 'dispersive' needs parts of a batch of 2 images or more, got 1",
    ),
    (
        "train",
        "tiny.py --train.alignment layersync --train.alignment_weight -1",
        "alignment_weight must be None or at least 0",
    ),
    (
        "train",
        "tiny.py --train.alignment repa --train.run_dir new",
        "alignment_encoder must be 'timm:MODEL' with alignment 'repa', got None",
    ),
    (
        "train",
        "tiny.py --train.alignment repa --train.alignment_encoder timm:no_such --train.run_dir new",
        "timm model 'no_such' cannot be loaded: ",
    ),
    (
        "train",
        "tiny.py --train.alignment repa --train.alignment_encoder timm:test_vit --train.run_dir new",
        "timm model 'test_vit' cannot be loaded: ",
    ),
    (
        "train",
        "tiny.py --train.alignment irepa --train.alignment_encoder timm:test_vit "
        "--train.alignment_encoder_weights gone --train.run_dir new",
        "no weights at gone",
    ),
    ("sample", "", "--checkpoint"),
    ("sample", "--checkpoint nowhere", "checkpoint not found: nowhere"),
    ("sample", "--checkpoint runs/tini", "checkpoint not found: runs/tini, did you mean 'runs/tiny'?"),
    ("sample", "--checkpoint empty", "cannot read empty/config.json"),
    ("sample", "--checkpoint tiny.py", "tiny.py holds only weights, expected a run"),
    ("sample", "--checkpoint tiny.py --config tiny.py", "tiny.py is not a valid weights-only file"),
    ("sample", "--checkpoint bare --config tiny.py", "bare is not the model of tiny.py: "),
    ("sample", "--checkpoint bare", "bare holds only weights, expected a run: give the run's config with --config"),
    ("sample", "--checkpoint other", "do not fit their config"),
    ("sample", "--checkpoint runs/tiny --classes 10", "class must be 0 to 9 or a class name, got '10'"),
    ("sample", "--checkpoint runs/tiny --classes thre", "got 'thre', did you mean 'three'?"),
    ("sample", "--checkpoint runs/tiny --prompt cat", "a model with context_dim 0 takes no prompt, got 'cat'"),
    ("sample", "--checkpoint runs/text --classes 3", "a model with num_classes 0 takes no class, got '3'"),
    ("sample", "--checkpoint runs/text --text_encoder empty", "text encoder 'empty' has no config.json"),
    ("sample", "--checkpoint promptless", "a model with context_dim 8 draws from prompts, got none"),
    ("sample", "--checkpoint discrete --t_end 1e-4", "schedule 'ldm' begins at time 0.001, got a grid with 0.0001"),
    ("sample", "--checkpoint discrete --steps 2000", "schedule 'ldm' begins at time 0.001, got a grid with 0.0005"),
    ("sample", "--checkpoint runs/tiny --t_end 0.6", "t_end must be in [0, 0.5), got 0.6"),
    ("sample", "--checkpoint runs/tiny --sampler dpm", "'dpm'"),
    ("sample", "--checkpoint runs/tiny --steps 0", "num_steps must be at least 1, got 0"),
    ("sample", "--checkpoint runs/tiny --steps many", "'many'"),
    ("sample", "--checkpoint runs/tiny --num_per_class 0", "num_per_class must be at least 1, got 0"),
    ("sample", "--checkpoint runs/tiny --guidance 1.4 --paper_scale 0.4", "got both: 1.4 and 0.4"),
    ("sample", "--checkpoint runs/tiny --seed -1", "seed must be at least 0, got -1"),
    ("sample", "--checkpoint runs/tiny --guidance_interval 0.7 0.2", "guidance_interval must be two times"),
    ("sample", "--checkpoint runs/tiny --output tiny.py/grid.png", "cannot write to tiny.py: tiny.py is not a folder"),
    (
        "sample",
        "--checkpoint runs/tiny --output grid.gifx",
        ".png, .jpg or .npz, got 'grid.gifx'",
    ),
    ("sample", "--checkpoint runs/tiny --output folder.png", "folder.png: it is a folder"),
    ("sample", "--checkpoint runs/tiny --output grid.psd", "output must be a path ending in .png, .jpg or .npz"),
    ("sample", "--checkpoint runs/tiny --batch_size 0", "batch_size must be at least 1, got 0"),
    ("sample", "--checkpoint runs/tiny --attention xformers", "needs a CUDA device, got 'cpu'"),
    ("sample", "--checkpoint runs/tiny --sampler euler_maruyama --spacing uniform", "needs spacing 'log_snr'"),
    ("evaluate", "--checkpoint nowhere", "checkpoint not found: nowhere"),
    ("evaluate", "--checkpoint runs/tiny --seed -1", "seed must be at least 0, got -1"),
    ("evaluate", "--checkpoint runs/tiny --num_images 7", "num_images must be a multiple of 10 classes"),
    ("sample", "--checkpoint nan", "weights of nan must be finite, got NaN or infinity"),
    ("evaluate", "--images texts --reference digits", "data 'texts' must have a column of images, got columns text"),
    ("sample", "--checkpoint runs/tiny --reuse 2:2", "K of at most 1 pairs of blocks, got 2:2"),
    ("sample", "--checkpoint runs/tiny --reuse 1:1", "'none' or K:EVERY with K at least 1 and EVERY at least 2"),
    ("evaluate", "--checkpoint runs/tiny --steps 0", "num_steps must be at least 1, got 0"),
    ("evaluate", "", "give --checkpoint or --images, got neither"),
    ("evaluate", "--checkpoint runs/tiny --images x.npz --reference y", "give --checkpoint or --images, got both"),
    ("evaluate", "--images x.npz", "--reference 'test' needs --checkpoint"),
    ("evaluate", "--images x.npz --reference y.npz", "cannot read images (arr_0) of x.npz"),
    (
        "evaluate",
        "--images folder.png --reference digits --features pixels",
        "data 'digits' can have 1 (grey) channels, got 3",
    ),
    (
        "evaluate",
        "--checkpoint runs/tiny --reference other.npz",
        "of 3 features of 'inception', expected 64 of 'pixels'",
    ),
    ("evaluate", "--checkpoint runs/tiny --reference sized.npz", "images of size (4, 16), expected (8, 8)"),
    ("evaluate", "--checkpoint runs/tiny --reference tiny.py", "cannot load split 'train' of data 'tiny.py'"),
    (
        "evaluate",
        "--checkpoint runs/tiny --features dino",
        "features must be 'pixels', 'judge', 'inception' or 'timm:MODEL'",
    ),
    (
        "evaluate",
        "--checkpoint runs/tiny --classifier svn",
        "classifier must be 'svm', 'judge', 'timm:MODEL' or 'none', got",
    ),
    ("evaluate", "--checkpoint runs/tiny --features inception --feature_weights gone", "no weights at gone"),
    ("evaluate", "--checkpoint runs/tiny --features judge --feature_weights gone", "no weights at gone"),
    ("evaluate", "--images three.npz --reference three.npz --features judge", "'judge' needs the labelled images of a"),
    (
        "evaluate",
        "--checkpoint runs/text --reference fits.npz",
        "draws the captions of a reference data set, got stat",
    ),
    (
        "evaluate",
        "--images folder.png --reference folder.png --features pixels --classifier svm",
        "'svm' needs the labelled",
    ),
    ("evaluate", "--images folder.png --reference one --steps 3", "--steps is for images to draw from a --checkpoint"),
    ("evaluate", "--images big.npz --reference big.npz --features pixels", "must be 4096 or fewer, 3x64x64 images"),
    (
        "evaluate",
        "--checkpoint runs/tiny --reference folder.png --split test",
        "data 'folder.png' has no part 'test': expected folders train and test",
    ),
    ("evaluate", "--checkpoint runs/tiny --reference imaginary.npz", "must hold mu and sigma of real numbers, got"),
    ("evaluate", "--checkpoint runs/tiny --reference negative.npz", "must hold a positive semidefinite sigma"),
    (
        "evaluate",
        "--checkpoint runs/tiny --reference three.npz",
        "the classifier knows 10 classes, three.npz has labels of 13 classes: give --classifier none",
    ),
    ("evaluate", "stats", "Missing from evaluate.py stats: STR Data set"),
    ("evaluate", "stats digits --output ref.txt", "output must be a path ending in .npz, got 'ref.txt'"),
    ("evaluate", "stats nowhere --output ref.npz", "cannot load split 'train' of data 'nowhere'"),
    ("evaluate", "stats digits --features pixels --output tiny.py/ref.npz", "cannot write to tiny.py"),
    ("encode", "", "--data"),
    ("encode", "--data nowhere --output out", "cannot load split 'train' of data 'nowhere'"),
    ("encode", "--data photos --output out --image_size 0", "image_size must be at least 1, got 0"),
    ("encode", "--data photos --output out --image_size 1000000", "image_size must be at most 16,384, got 1000000"),
    ("encode", "--data photos --output out --image_size 8 --autoencoder nowhere", "autoencoder not found: nowhere"),
    ("encode", "--data photos --output out --image_size 8 --autoencoder empty", "cannot read empty/config.json"),
    ("encode", "--data one --output out --image_size 8", "must have 2 images or more, got 1"),
    ("encode", "--data photos --output out --on_error ignore", "'ignore'"),
    ("convert", "nowhere out", "checkpoint not found: nowhere"),
    ("convert", "tiny.py out", "tiny.py is not a valid weights-only file"),
    ("convert", "runs/tiny runs/text", "runs/text holds a run, whose config.json would be overwritten"),
    ("convert", "runs/tiny out --num_heads 3", "embed_dim 16 must be divisible by num_heads 3"),
    ("train", "tiny.py --model.embed_dim 1000000000", "parameters, got up to 8.5e+19"),
    ("train", "tiny.py --data.num_workers 100000", "num_workers must be at most 1,024, got 100000"),
    ("sample", f"--checkpoint {'n' * 300}", "checkpoint not found: nnn"),
    ("sample", "--checkpoint user/model/../../..", "checkpoint not found: user/model/../../.."),
    ("sample", "--checkpoint runs/tiny --classes \x1b[31m", r"class must be 0 to 9 or a class name, got '\x1b[31m'"),
    ("evaluate", "--checkpoint runs/tiny --num_images 99999999999", "num_images must be at most 10,000,000"),
    ("train", "tiny.py --train.run_dir bare", "bare holds weights that are no run's: use another"),
    ("train", "tiny.py --train.run_dir new --sample.mixed_precision fp16", "'fp16' needs a CUDA device, got 'cpu'"),
    (
        "train",
        "tiny.py --train.run_dir new --process.schedule ldm --process.prediction noise --sample.t_end 1e-5",
        "schedule 'ldm' begins at time 0.001, got a grid with 1e-05",
    ),
    ("train", "exits.py", "exits.py cannot be read as Python: SystemExit: bye"),
    ("train", "tiny.py --train.run_dir locked", "cannot write to locked/.lock: it is a folder"),
    ("sample", "--checkpoint runs/tiny --guidance 1e30", "guidance must be at most 10,000 in size, got 1e+30"),
    ("sample", "--checkpoint runs/tiny --paper_scale 1e308", "guidance must be at most 10,000 in size, got 1e+308"),
    ("sample", "--checkpoint complex", "patch_embed.proj.weight is torch.complex64, expected floating point"),
    (
        "evaluate",
        "--checkpoint runs/tiny --features dino --output new/deep/figures.json",
        "features must be 'pixels', ",
    ),
    ("train", "tiny.py --data.name zero --train.run_dir new", "of the data (zero/"),
    (
        "sample",
        "--checkpoint runs/tiny --text_encoder clip",
        "--text_encoder is for a model with a context, got 'clip'",
    ),
    ("evaluate", "--checkpoint runs/tiny --reference object.npz", "object.npz does not hold statistics"),
    ("encode", "--data folder.png --output folder.png", "--output must be another folder than that of the images"),
    ("encode", "--data folder.png --output runs/tiny", "got runs/tiny, which has a config.json"),
]


@pytest.fixture(scope="session")
def obstacles(trained_on_text) -> None:
    """Runs, weights and images that bad input names, beside the trained runs."""
    trained = trained_on_text
    shutil.copytree(trained / "runs/text", trained / "promptless")
    edit_json(trained / "promptless/config.json", sample__prompts=[])
    shutil.copytree(trained / "runs/tiny", trained / "discrete")
    edit_json(trained / "discrete/config.json", process__schedule="ldm")
    (trained / "exits.py").write_text("raise SystemExit('bye')")
    (trained / "locked/.lock").mkdir(parents=True)
    shutil.copytree(trained / "runs/tiny", trained / "complex")
    weights = read_weights(trained / "complex/model.safetensors")
    write_weights(trained / "complex", {**weights, "patch_embed.proj.weight": weights["patch_embed.proj.weight"] * 1j})
    for name in ("empty", "other"):
        (trained / name).mkdir()
    edit_json(trained / "runs/tiny/config.json", trained / "other/config.json", model__embed_dim=32)
    (trained / "other" / "model.safetensors").write_bytes((trained / "runs/tiny/model.safetensors").read_bytes())
    UViT(depth=2, embed_dim=8, num_heads=1).save_pretrained(trained / "bare")
    shutil.copytree(trained / "runs/tiny", trained / "nan")
    weights = read_weights(trained / "nan/model.safetensors")
    write_weights(trained / "nan", {name: tensor * torch.nan for name, tensor in weights.items()})
    (trained / "texts").mkdir()
    (trained / "texts/words.txt").write_text("a word\n")
    save_folder(trained / "folder.png", classes=DIGITS, count=1)
    save_folder(trained / "zero", classes=DIGITS, count=1)
    for path in (trained / "zero").rglob("*.png"):
        path.write_bytes(b"")
    np.savez(trained / "object.npz", mu=np.zeros(64), sigma=np.eye(64), num_images=np.array(None))
    save_folder(trained / "one", classes="a", count=1)
    np.savez(trained / "other.npz", mu=np.zeros(3), sigma=np.eye(3), features="inception")
    np.savez(trained / "fits.npz", mu=np.zeros(64), sigma=np.eye(64))
    np.savez(trained / "big.npz", arr_0=np.zeros((2, 64, 64, 3), np.uint8))
    np.savez(trained / "three.npz", arr_0=np.zeros((2, 8, 8, 1), np.uint8), arr_1=np.array([0, 12]))
    np.savez(trained / "imaginary.npz", mu=np.zeros(64), sigma=np.eye(64) * 1j)
    np.savez(trained / "negative.npz", mu=np.zeros(64), sigma=-np.eye(64))
    np.savez(trained / "sized.npz", mu=np.zeros(64), sigma=np.eye(64), features="pixels", image_size=(4, 16))
    for name in ("half", "cut"):
        save_idx(trained / name, num_test=0)
    images = trained / "cut/train-images-idx3-ubyte"
    images.write_bytes(images.read_bytes()[:-10])
    save_idx(trained / "uneven", names="-{}-ubyte.gz")
    write_idx(trained / "uneven/train-labels-idx1-ubyte.gz", np.zeros(19, np.uint8))
    for name, text in (("foreign", (trained / "runs/tiny/config.json").read_text()), ("emptied", "[]")):
        save_checkpoint(trained / name, load_config(trained / "runs/tiny/config.json"), 2, {}, keep=1)
        (trained / name / "config.json").write_text(text)


@pytest.mark.skipif(torch.cuda.is_available(), reason="some of these are fine with CUDA")
@pytest.mark.parametrize(("name", "arguments", "message"), BAD_INPUT)
@pytest.mark.usefixtures("obstacles", "offline")
def test_bad_input_is_one_line_and_exit_2(name, arguments, message, workdir, monkeypatch, capsys):
    before = files_of(workdir)
    assert message in refused(name, arguments, monkeypatch, capsys)
    assert files_of(workdir) == before
