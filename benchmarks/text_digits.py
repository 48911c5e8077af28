"""Text to image without a download: `python benchmarks/text_digits.py`.

Makes a tiny CLIP text encoder with random weights, trains configs/digits_text.py on its features of captions such as "a
handwritten three", and measures whether the digit drawn is the one that the caption names. Writes
benchmarks/results/text_digits.json.
"""

from __future__ import annotations

import json
import string
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from uvit.common.cli import parse, run
from uvit.common.files import make_directory

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks" / "results" / "text_digits.json"
NUM_TOKENS, WIDTH = 24, 32


@dataclass(frozen=True, kw_only=True)
class Arguments:
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of training."""
    folder: str = "runs/digits_text"
    """Where the encoder and the runs go."""


def make_text_encoder(folder: Path, num_tokens: int = NUM_TOKENS, width: int = WIDTH) -> None:
    """Saves a CLIP text model with random weights and a tokenizer of single letters, as a CLIP from the hub lies."""
    characters = string.ascii_lowercase + string.digits + string.punctuation
    words = [*characters, *(f"{each}</w>" for each in characters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    last = vocabulary["<|endoftext|>"]
    config = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=num_tokens,
        bos_token_id=vocabulary["<|startoftext|>"],
        eos_token_id=last,
        pad_token_id=last,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        CLIPTextModel(config).save_pretrained(folder)
    CLIPTokenizer(vocab=vocabulary, merges=[]).save_pretrained(folder)


def train_and_measure(folder: Path, seed: int) -> dict[str, float]:
    """Trains with one seed; returns the two figures."""
    encoder, run_dir = folder / "text_encoder", folder / f"seed_{seed}"
    overrides = {
        "data.text_encoder": encoder,
        "model.num_context_tokens": NUM_TOKENS,
        "model.context_dim": WIDTH,
        "train.seed": seed,
        "train.run_dir": run_dir,
    }
    flags = [text for name, value in overrides.items() for text in (f"--{name}", str(value))]
    subprocess.run([sys.executable, "train.py", "configs/digits_text.py", *flags], cwd=ROOT, check=True)
    subprocess.run([sys.executable, "evaluate.py", "--checkpoint", str(run_dir)], cwd=ROOT, check=True)
    result = json.loads((run_dir / "evaluation.json").read_text())
    return {
        "seed": seed,
        "recognised": result["recognised"],
        "frechet_ratio": result["frechet"] / result["frechet_real"],
    }


def main(arguments: list[str]) -> None:
    """Makes the encoder, trains and writes the figures."""
    given = parse(Arguments, arguments, __doc__)
    folder = Path(given.folder).absolute()
    make_directory(folder)
    make_text_encoder(folder / "text_encoder")
    runs = [train_and_measure(folder, seed) for seed in given.seeds]
    encoder = f"random CLIP text model, 2 layers, {NUM_TOKENS} tokens of width {WIDTH}, letters for tokens"
    protocol = "configs/digits_text.py; evaluate.py: 2,000 unguided images, 200 a caption"
    make_directory(RESULT.parent)
    RESULT.write_text(json.dumps({"encoder": encoder, "protocol": protocol, "runs": runs}, indent=2) + "\n")
    for entry in runs:
        print(
            f"seed {entry['seed']}: recognised {entry['recognised']:.1%}, Fréchet {entry['frechet_ratio']:.2f} x real"
        )


if __name__ == "__main__":
    run(main)
