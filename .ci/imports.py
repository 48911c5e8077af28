"""Installs the built wheel with the core dependencies alone, imports each of its modules, and uses it.

It has an environment of its own and runs in an empty folder: neither the checkout nor the package of an extra can help.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
CONFIG = """
from uvit.config import Config, DataConfig, SampleConfig, TrainConfig, UViTConfig

config = Config(
    model=UViTConfig(img_size=8, in_chans=1, embed_dim=16, depth=2, num_heads=2, num_classes=10, null_class=True),
    data=DataConfig(name="digits"),
    train=TrainConfig(num_steps=4, batch_size=16, num_threads=1, save_every=2, sample_every=2),
    sample=SampleConfig(num_steps=2),
)
"""
PRELOADED = ("accelerate", "datasets", "timm", "torchvision", "tyro")  # take long: every fork has them
COMMANDS = (
    "--help",
    "train tiny.py",
    "sample --checkpoint runs/tiny --num_per_class 1 --output grid.png",
    "evaluate --checkpoint runs/tiny --num_images 20",
    "card runs/tiny card",
)
WRITTEN = ("runs/tiny/model.safetensors", "grid.png", "runs/tiny/evaluation.json", "card/README.md")


def build_wheel(folder: Path, uv: Path) -> Path:
    """Builds the wheel, from the source distribution, so that nothing left in build/ gets into it.

    Raises:
        SystemExit: it holds other files of the package than the checkout.
    """
    subprocess.run([uv, "build", "--quiet", "--out-dir", folder, ROOT], check=True)
    (wheel,) = folder.glob("*.whl")
    expected = {str(path.relative_to(ROOT)) for path in [*ROOT.glob("uvit/**/*.py"), ROOT / "uvit/py.typed"]}
    found = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("uvit/")}
    if found != expected:
        raise SystemExit(f"the wheel lacks {sorted(expected - found)} and has besides {sorted(found - expected)}")
    return wheel


def find_missing_package(module: str) -> str | None:
    """Imports a module; returns the package that it lacks, or None."""
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        return str(error.name).partition(".")[0]
    return None


def import_modules() -> None:
    """Imports each installed module in a process of its own, and prints how many there are.

    Raises:
        SystemExit: one lacks what is not the package of an extra.
    """
    extras = {
        re.split(r"[^\w-]", requirement)[0].replace("-", "_")
        for requirement in importlib.metadata.requires("uvit") or []
        if "extra ==" in requirement and '"dev"' not in requirement
    }
    files = [file for file in importlib.metadata.files("uvit") or [] if file.suffix == ".py"]
    modules = [".".join(file.with_suffix("").parts).removesuffix(".__init__") for file in files]
    for library in PRELOADED:
        importlib.import_module(library)
    with multiprocessing.get_context("fork").Pool(maxtasksperchild=1) as pool:
        packages = pool.map(find_missing_package, modules, chunksize=1)
    missing = {module: package for module, package in zip(modules, packages) if package is not None}
    wrong = {
        module: package
        for module, package in missing.items()
        if package not in extras or not module.startswith("uvit.integrations.")
    }
    if wrong:
        raise SystemExit(f"modules lack packages that they must do without: {wrong}")
    print(f"{len(modules) - len(missing)} of {len(modules)} modules imported, the others need an extra: {missing}")


def main() -> None:
    """Builds, installs, imports and uses the package; stops at the first failure."""
    uv = ROOT / ".venv/bin/uv"
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    with tempfile.TemporaryDirectory() as folder:
        wheel, python, empty = build_wheel(Path(folder, "dist"), uv), f"{folder}/venv/bin/python", Path(folder, "empty")
        subprocess.run([uv, "venv", "--quiet", "--python", ROOT / ".venv/bin/python", f"{folder}/venv"], check=True)
        install = [uv, "pip", "install", "--quiet", "--python", python]
        subprocess.run([*install, "--constraints", ROOT / "constraints.txt", wheel], check=True)
        empty.mkdir()
        Path(empty, "tiny.py").write_text(CONFIG)
        in_folder = {"cwd": empty, "env": environment, "check": True}
        imported = subprocess.run([python, __file__, "import"], stdout=subprocess.PIPE, text=True, **in_folder)
        for command in COMMANDS:
            print(f"+ python -m uvit {command}", flush=True)
            subprocess.run([python, "-m", "uvit", *command.split()], **in_folder)
        if missing := [name for name in WRITTEN if not Path(empty, name).is_file()]:
            raise SystemExit(f"the commands have not written {missing}")
    print(f"the wheel with core dependencies alone: {imported.stdout.strip()}; {len(COMMANDS)} commands ran")


if __name__ == "__main__":
    if sys.argv[1:] == ["import"]:
        import_modules()
    else:
        main()
