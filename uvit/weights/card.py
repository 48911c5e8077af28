"""Model cards: what a published model is, how it was trained and evaluated, and how to load it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from uvit.config import CONFIG_FILE, INCEPTION, Config, NetworkConfig, UNetConfig, UViTConfig

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

CARD_FILE = "README.md"
PAPERS: dict[type[NetworkConfig], str] = {UViTConfig: "arxiv:2209.12152", UNetConfig: "arxiv:2105.05233"}
INTRODUCTIONS: dict[type[NetworkConfig], str] = {
    UViTConfig: "A [U-ViT](https://arxiv.org/abs/2209.12152), a vision transformer for diffusion models with long skip "
    "connections",
    UNetConfig: "A [U-Net](https://arxiv.org/abs/2105.05233) for diffusion models, with attention at low resolutions",
}
TASKS = {
    "text": "text-to-image",
    "class": "class-conditional-image-generation",
    "none": "unconditional-image-generation",
}
HUB_TASKS = (TASKS["text"], TASKS["none"])
"""The tasks that the hub knows; it has none for class labels."""


def _frechet_name(protocol: Mapping[str, str]) -> str:
    return "FID" if protocol["features"].startswith(INCEPTION) else "Fréchet distance"


def describe_figures(results: Mapping[str, Any], protocol: Mapping[str, str]) -> list[str]:
    """Describes figures, one per line.

    Args:
        results: figures by name, as evaluate.py saves them.
        protocol: how they were measured.
    """
    lines = []
    if "recognised" in results:
        real = results.get("recognised_real")
        lines.append(
            f"recognised {results['recognised']:.1%}" + ("" if real is None else f" (real images: {real:.1%})")
        )
    name = _frechet_name(protocol)
    if results.get("frechet_real"):
        times = results["frechet"] / results["frechet_real"]
        lines.append(f"{name} {times:.2f} x real ({results['frechet']:.3f} against {results['frechet_real']:.3f})")
    else:
        lines.append(f"{name} {results['frechet']:.3f}")
    for key, name in (("kid", "KID"), ("inception_score", "Inception score")):
        if key in results:
            lines.append(f"{name} {results[key]:.4g} ± {results[key + '_deviation']:.2g}")
    return lines


def _task(model: NetworkConfig) -> str:
    return TASKS["text" if model.context_dim else "class" if model.num_classes else "none"]


def _metadata(
    model: NetworkConfig, name: str, config: Config | None, results: Mapping[str, Any], protocol: Mapping[str, str]
) -> ModelCardData:
    """Returns the hub's metadata: tags, the task, and figures as a model index."""
    from huggingface_hub import EvalResult, ModelCardData

    task = _task(model)
    names = {"recognised": "Recognised by a classifier", "kid": "KID", "inception_score": "Inception score"}
    measured = [
        EvalResult(
            task_type=task,
            dataset_type=config.data.name,
            dataset_name=protocol["reference"].partition(": ")[0],
            metric_type="fid" if key == "frechet" and _frechet_name(protocol) == "FID" else key,
            metric_name=_frechet_name(protocol) if key == "frechet" else names[key],
            metric_value=results[key],
        )
        for key in ("frechet", *names)
        if config is not None and key in results
    ]
    return ModelCardData(
        library_name="uvit",
        pipeline_tag=task if task in HUB_TASKS else None,
        tags=[model.title.lower(), "diffusion", task, PAPERS[type(model)]],
        model_name=name,
        eval_results=measured or None,
    )


def _table(rows: Mapping[str, str]) -> list[str]:
    """Returns the lines of a Markdown table with two columns."""
    cells = [(key, value.replace("|", r"\|")) for key, value in rows.items()]
    return ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in cells), ""]


def _recipe(config: Config, width: float | None) -> dict[str, str]:
    """Returns the main settings of a run, as text; its config.json has the rest."""
    process, data, optim, train, sampling = config.process, config.data, config.optim, config.train, config.sample
    average = " (the average over an interval)" if process.objective == "average" else ""
    rows = {
        "process": f"{process.schedule} schedule, predicts {process.prediction}{average}, "
        f"{process.time_distribution} times, weighting {process.weighting}",
        "data": f"{data.name}, {'mirrored at random' if data.flip else 'not mirrored'}",
        "optimizer": f"{optim.name}, learning rate {optim.lr:g}, {optim.warmup_steps:,} steps of warm-up, "
        f"decay {optim.decay}, weight decay {optim.weight_decay:g}",
        "training": f"{train.num_steps:,} steps of {train.batch_size:,} images, precision {train.mixed_precision}, "
        f"label dropout {train.label_dropout:g}, seed {train.seed}",
        "weights": f"average with decay {train.ema_decay:g}"
        if width is None
        else f"power-function average of relative width {width:g} (arXiv 2312.02696)",
        "sampling": f"{sampling.sampler}, {sampling.num_steps} steps, guidance w = {sampling.guidance:g}",
    }
    if train.token_keep < 1:
        rows["training"] += f", {train.token_keep:.0%} of the patches for the inner blocks until the last steps"
    if train.alignment_factor:
        rows["training"] += f", alignment {train.alignment} with weight {train.alignment_factor:g}"
    if sampling.guidance_path and sampling.guidance != 1:
        rows["sampling"] += " away from the outer blocks alone"
    if data.autoencoder is not None:
        rows["autoencoder"] = f"{data.autoencoder}, latents times {data.scale_factor:g}"
    if config.model.context_dim:
        rows["text encoder"] = data.text_encoder
    return rows


def model_card(
    model: NetworkConfig,
    num_parameters: int,
    name: str = "user/model",
    config: Config | None = None,
    evaluation: tuple[Mapping[str, Any], Mapping[str, str]] | None = None,
    grid: tuple[str, int] | None = None,
    average_width: float | None = None,
) -> str:
    """Writes a model card.

    Args:
        model: the network's config.
        num_parameters: how many it has.
        name: of the model on the hub.
        config: the run that trained it, if known.
        evaluation: figures of exactly these weights and their protocol, as evaluate.py saves them.
        grid: file name of a picture of samples beside the card, and the training step at which it was drawn.
        average_width: relative width of the average that the weights are; None for that of the run's decay.

    Returns:
        Markdown, with the hub's metadata at its top.
    """
    results, protocol = evaluation or ({}, {})
    height, width = model.image_shape
    longest = (config and config.process.unit_of_time) or 1000
    takes = {f"x, (B, {model.in_chans}, {height}, {width})": True, f"timesteps, (B,) in [0, {longest:g}]": True}
    null = f', {model.null_label} for "no label"' if model.null_class else ""
    takes |= {f"y, (B,) labels below {model.num_classes}{null}": bool(model.num_classes)}
    takes |= {f"context, (B, {model.num_context_tokens}, {model.context_dim})": bool(model.context_dim)}
    takes |= {"interval, (B,) lengths of intervals that end at the timesteps": model.takes_interval}
    takes |= {"guidance, (B, 3) scales and the times in [0, 1] between which they act": model.takes_guidance}
    arguments = ", ".join(text.partition(",")[0] for text, taken in takes.items() if taken)
    arguments = re.sub("context|interval|guidance", r"\g<0>=\g<0>", arguments)
    conditions = [f"{model.num_classes:,} classes"] * bool(model.num_classes)
    conditions += ['one label for "no label"'] * model.null_class
    conditions += [f"{model.num_context_tokens} tokens of width {model.context_dim}"] * bool(model.context_dim)
    backbone = {
        "backbone": f"{num_parameters:,} parameters, {model.description}",
        "image"
        if config is None or config.data.autoencoder is None
        else "latent": f"{model.in_chans}x{height}x{width}",
        "conditions": ", ".join(conditions) or "none",
    }
    network = model.title.replace("-", "")
    output = "The output has the shape of `x`."
    if model.predicted_chans != model.in_chans:
        output = f"The first {model.in_chans} of its {model.predicted_chans} channels are the prediction."
    lines = [
        f"---\n{_metadata(model, name, config, results, protocol).to_yaml()}\n---\n",
        f"# {name.rpartition('/')[2]}\n",
        f"{INTRODUCTIONS[type(model)]}, of the Python package `uvit`.\n",
        *([f"![samples]({grid[0]})\n", f"Drawn at step {grid[1]:,} of the training.\n"] if grid else []),
        "## Load it\n",
        "The package is installed from its source folder, with `pip install .`.\n",
        "```python",
        f"from uvit import {network}",
        f'model = {network}.from_pretrained("{name}")',
        f"output = model({arguments})",
        "```\n",
        "; ".join(f"`{text.partition(',')[0]}`{text.partition(',')[2]}" for text, taken in takes.items() if taken)
        + f". {output}\n",
    ]
    if config is not None:
        lines += ["Images:\n", "```bash", f"python -m uvit sample --checkpoint {name} --output grid.png", "```\n"]
        for option, encoder in (("autoencoder", config.data.autoencoder), ("text_encoder", config.data.text_encoder)):
            needed = option == "autoencoder" or config.model.context_dim
            if needed and encoder is not None and encoder.startswith("./"):
                lines += [f"It was trained with a local copy of {encoder[2:]}: give yours with `--{option}`.\n"]
    lines += ["## Recipe\n", *_table(backbone | ({} if config is None else _recipe(config, average_width)))]
    lines += [f"`{CONFIG_FILE}` holds every option.\n"]
    if evaluation is not None:
        lines += ["## Figures\n", *(f"- {line}" for line in describe_figures(results, protocol))]
        lines += ["\nHow they were measured:\n", *_table(protocol)]
    return "\n".join(lines).rstrip() + "\n"
