"""Runs every command of the README and the pages, shortened, in one shell, so that they cannot rot."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent

# The pages, and the languages of their blocks to run; Python of the other pages is run by the tests.
PAGES = {"README.md": "bash|python"} | dict.fromkeys(
    ("docs/your_images.md", "docs/import.md", "docs/few_steps.md"), "bash"
)
# What a command becomes: a pattern, and what takes its place.
SHORTENED = [
    (r"^make demo$", "make demo TRAIN_ARGS='--train.num_steps 20' EVALUATE_ARGS='--num_images 20'"),
    (r"(train\.py configs/digits(_few_steps)?\.py.*)$", r"\1 --train.num_steps 20"),
    (
        r"^python (train\.py configs/digits_text\.py)$",
        "python -c \"from benchmarks.text_digits import *; make_text_encoder(Path('runs/clip'))\"\n"
        r"python \1 --data.text_encoder runs/clip --model.num_context_tokens 24 --model.context_dim 32 "
        "--train.num_steps 20",
    ),
    (r"(evaluate\.py --checkpoint .*)$", r"\1 --num_images 20"),
]
# What is not run here, and why.
SKIPPED = {
    "pip install": "make has installed it",
    "make test": "has just run",
    "benchmarks/": "takes long: its figures are measured by hand and committed",
    "torchrun": "the tests run it",
    "uvit push": "needs a login to the hub; the tests serve one",
    "python app.py": "serves until it is stopped; the tests open it in a browser",
    "nnet_ema.pth": "needs a published file; the tests make one",
    "imagenet": "needs a download; the tests encode and train on photos",
    "mscoco": "needs a download; the tests encode and train on captions",
    "fashion": "needs a download; the tests train on such files",
    "birds": "needs images of your own; the tests make a folder of some",
}


def shell_lines() -> list[str]:
    """Returns the pages as a script: bash blocks, and Python blocks fed to python."""
    lines = []
    blocks = [
        found
        for page, languages in PAGES.items()
        for found in re.findall(rf"^```({languages})\n(.*?)^```", (ROOT / page).read_text(), re.M | re.S)
    ]
    for language, block in blocks:
        if language == "python":
            lines.append(f"python - <<'EXAMPLE'\n{block}EXAMPLE")
            continue
        for line in block.splitlines():
            command = line.partition("  #")[0].strip()
            reason = next((reason for text, reason in SKIPPED.items() if text in command), None)
            if reason:
                lines.append(f": 'skipped, {reason}:' {command!r}")
                continue
            for pattern, short in SHORTENED:
                command = re.sub(pattern, short, command)
            lines.append(command)
    return lines


def main() -> None:
    """Runs the script and stops at the first command that fails."""
    subprocess.run(["bash", "-ex"], input="\n".join(shell_lines()), text=True, cwd=ROOT, check=True)
    print(f"{', '.join(PAGES)}: every command ran")


if __name__ == "__main__":
    main()
