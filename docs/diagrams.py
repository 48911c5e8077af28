"""Draws docs/model.svg and docs/modules.svg: `python docs/diagrams.py`.

The model's blocks, tokens and widths are those of a backbone that is built for it; the modules' arrows are read from
their imports. So neither can tell what the code does not.
"""

from __future__ import annotations

import ast
import itertools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

import torch

from uvit import UViT

ROOT = Path(__file__).parent.parent
FONT = "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', Helvetica, Arial, sans-serif"
LINE = "#768390"  # lines and free text: legible on white and on black
INK = "#1f2328"  # text on boxes, which are light on either ground
WIDTH, GAP = 980, 16
SKIP, PALE_SKIP = "#d96c26", "#f5b183"
COLOURS = {
    "script": "#f2c14e",
    "run": "#f6d9a8",
    "bridge": "#d9c2f0",
    "model": "#a9cdf5",
    "process": "#a8e0d1",
    "data": "#f7bcbc",
    "ground": "#d5dae0",
}
DARKER = {
    "script": "#c9961a",
    "run": "#d29a4a",
    "bridge": "#a17fd0",
    "model": "#5b9ae0",
    "process": "#3fae8f",
    "data": "#e07a7a",
    "ground": "#768390",
}
"""Of the arrows that start there."""
LABELS = {
    "script": "scripts",
    "run": "a run and its figures",
    "bridge": "bridges",
    "model": "the model",
    "process": "diffusion",
    "data": "images and latents",
    "ground": "ground",
}
GROUPS = {
    "run": "generate evaluation features metrics checkpoint resume sharding optim card publish loader",
    "model": "backbone attention weights published precision reuse",
    "process": "diffusion samplers",
    "data": "data images latents latent_data",
    "ground": "errors interrupt files hub grid config cli",
}
EVERYWHERE = ("config", "errors")  # imported by nearly all: said in words, for their arrows would hide the others


# Pieces of a picture.


def text(x: float, y: float, words: str, size: int = 13, colour: str = INK, anchor: str = "middle", **more: str) -> str:
    """Returns a line of text, centred on y."""
    extra = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in more.items())
    place = f'x="{x:g}" y="{y + 0.35 * size:g}" font-size="{size}" fill="{colour}" text-anchor="{anchor}"'
    return f"<text {place}{extra}>{escape(words)}</text>"


def box(x: float, y: float, width: float, height: float, words: str, colour: str, size: int = 13, **more: str) -> str:
    """Returns a box with its centre at (x, y) and a line of text in it."""
    corner = f'x="{x - width / 2:g}" y="{y - height / 2:g}" width="{width:g}" height="{height:g}" rx="7"'
    return f'<rect {corner} fill="{colour}"/>' + text(x, y, words, size, **more)


def arrow(points: str, colour: str = LINE, width: float = 1.6) -> str:
    """Returns an arrow along an SVG path."""
    style = f'stroke="{colour}" stroke-width="{width:g}" marker-end="url(#{colour[1:]})"'
    return f'<path d="{points}" fill="none" {style}/>'


def picture(width: float, height: float, title: str, parts: Iterable[str]) -> str:
    """Returns an SVG file."""
    shape = 'viewBox="0 0 8 8" refX="7.5" refY="4" markerWidth="5.5" markerHeight="5.5" orient="auto"'
    heads = [
        f'<marker id="{colour[1:]}" {shape}><path d="M0 0 L8 4 L0 8 z" fill="{colour}"/></marker>'
        for colour in dict.fromkeys([LINE, SKIP, *DARKER.values()])
    ]
    size = f'width="{width:g}" height="{height:g}" viewBox="0 0 {width:g} {height:g}"'
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="{FONT}" role="img">'
    return "\n".join([opening, f"<title>{escape(title)}</title>", "<defs>", *heads, "</defs>", *parts, "</svg>"]) + "\n"


# The model.


def draw_tokens(centre: float, caption: str, position: str) -> list[str]:
    """Returns the inputs, and the tokens that they become, around an abscissa."""
    parts = [text(centre, 20, "what goes in", 14, LINE, font_weight="600")]
    inputs = [("label y", "label_emb", "process"), ("time t", "cos, sin", "data"), ("image x", "patch_embed", "model")]
    for number, (name, embedding, colour) in enumerate(inputs):
        x = centre + 118 * (number - 1)
        parts.append(box(x, 52, 100, 30, name, COLOURS[colour]))
        parts.append(arrow(f"M{x} 67 V88"))
        parts.append(text(x, 99, embedding, 12, LINE, font_style="italic"))
        parts.append(arrow(f"M{x} 110 V129"))
    pitch = 28
    for number in range(12):
        x, colour = centre - 168 + pitch * number, COLOURS[("process", "data", "model")[min(number, 2)]]
        parts.append(f'<rect x="{x}" y="132" width="{pitch - 3}" height="22" rx="4" fill="{colour}"/>')
    parts.append(text(centre + 180, 143, "…", 16, LINE))
    return [*parts, text(centre, 169, caption, 12, LINE), text(centre, 186, position, 12, LINE, font_style="italic")]


def draw_block(centre: float, top: float) -> list[str]:
    """Returns what is in a block, in a frame."""
    frame = f'<rect x="{centre - 120}" y="{top}" width="240" height="392" rx="12" fill="none" stroke="{LINE}"'
    parts = [frame + ' stroke-dasharray="5 5"/>', text(centre, top + 20, "a block", 14, LINE, font_weight="600")]
    colours = {"mlp": "model", "norm2": "ground", "attn": "model", "norm1": "ground"}
    y = {"mlp": top + 88, "norm2": top + 128, "attn": top + 210, "norm1": top + 250, "skip_linear": top + 306}
    for name, at in y.items():
        parts.append(box(centre, at, 120, 28, name, COLOURS[colours[name]] if name in colours else PALE_SKIP))
    for norm, layer, plus in (("norm2", "mlp", top + 50), ("norm1", "attn", top + 172)):
        branch, side = y[norm] + 24, centre + 94
        parts.append(
            f'<circle cx="{centre}" cy="{plus}" r="9" fill="{COLOURS["ground"]}"/>' + text(centre, plus, "+", 15)
        )
        parts.append(arrow(f"M{centre} {y[norm] - 14} V{y[layer] + 16}"))
        parts.append(arrow(f"M{centre} {y[layer] - 14} V{plus + 11}"))
        around = f"H{side - 8} Q{side} {branch} {side} {branch - 8} V{plus + 8} Q{side} {plus} {side - 8} {plus}"
        parts.append(arrow(f"M{centre} {branch} {around} H{centre + 11}"))
    parts.append(arrow(f"M{centre} {top + 163} V{y['norm2'] + 16}"))
    parts.append(arrow(f"M{centre} {y['skip_linear'] - 14} V{y['norm1'] + 16}"))
    below = y["skip_linear"] + 16
    parts.append(arrow(f"M{centre - 26} {below + 26} V{below}"))
    parts.append(arrow(f"M{centre + 26} {below + 26} V{below}", SKIP, 2))
    parts.append(text(centre - 30, below + 36, "tokens", 12, LINE))
    parts.append(text(centre + 30, below + 36, "skip", 12, SKIP))
    return [*parts, text(centre, below + 57, "skip_linear: in out_blocks alone", 12, LINE)]


def draw_model() -> str:
    """Returns the picture of U-ViT-S/2 for class-conditional 32x32 images."""
    with torch.device("meta"):
        model = UViT(num_classes=10)
    config = model.config
    rows, columns = config.grid_shape
    left, middle, right = 220, 390, 560
    width, height, gap, first = 150, 34, 50, 236
    num_pairs = len(model.in_blocks)
    bottom = first + gap * num_pairs + 14
    caption = f"{config.num_tokens} tokens of width {config.embed_dim}: 1 + 1 + {rows} · {columns}"
    parts = draw_tokens(left, caption, "+ pos_embed")
    parts.append(arrow(f"M{left} 196 V{first - height / 2 - 2}"))

    # Shallow blocks go down, deep ones up; the skips between them nest.
    for number in range(num_pairs):
        y = first + gap * number
        parts.append(box(left, y, width, height, f"in_blocks.{number}", COLOURS["model"]))
        parts.append(box(right, y, width, height, f"out_blocks.{num_pairs - 1 - number}", COLOURS["model"]))
        parts.append(arrow(f"M{left + width / 2} {y} H{right - width / 2 - 2}", SKIP, 2))
        if number + 1 < num_pairs:
            parts.append(arrow(f"M{left} {y + height / 2} V{y + gap - height / 2 - 2}"))
            parts.append(arrow(f"M{right} {y + gap - height / 2} V{y + height / 2 + 2}"))
    parts.append(text(middle, first - 14, "long skips", 13, SKIP, font_weight="600"))
    y = first + gap * (num_pairs - 1) + height / 2
    parts.append(box(middle, bottom, width, height, "mid_block", COLOURS["model"]))
    parts.append(arrow(f"M{left} {y} V{bottom - 8} Q{left} {bottom} {left + 8} {bottom} H{middle - width / 2 - 2}"))
    parts.append(arrow(f"M{middle + width / 2} {bottom} H{right - 8} Q{right} {bottom} {right} {bottom - 8} V{y + 2}"))

    # Tokens become an image again.
    parts.append(text(right, 20, "what comes out", 14, LINE, font_weight="600"))
    ends = {
        "prediction": "noise, data, v or flow: what it was trained for",
        "final_layer": "a 3×3 convolution on the image",
        "decoder_pred": "each patch's token to the patch's pixels",
        "norm": "a layer norm; then all but the patches are left out",
    }
    for number, (name, meaning) in enumerate(ends.items()):
        y = 52 + 42 * number
        parts.append(box(right, y, width, 28, name, COLOURS["ground" if number else "model"]))
        parts.append(text(right + width / 2 + 12, y, meaning, 12, LINE, "start"))
        below = y + 28 if number + 1 < len(ends) else first - height / 2
        parts.append(arrow(f"M{right} {below} V{y + 16}"))
    title = f"U-ViT: {config.depth + 1} blocks, {num_pairs} long skips"
    return picture(980, 616, title, [*parts, *draw_block(838, 208)])


# The modules.


def imports_of(path: Path) -> set[str]:
    """Names the modules of ours that a file imports; the package itself gives what the backbone has."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "uvit":
            found |= {"backbone" for alias in node.names if alias.name == "UViT"}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("uvit."):
            found.add(node.module.removeprefix("uvit."))
    return found


def read_modules() -> dict[str, set[str]]:
    """Returns the modules and scripts of the project, and what each imports of ours."""
    package = ROOT / "uvit"
    files = {".".join(path.relative_to(package).with_suffix("").parts): path for path in package.rglob("*.py")}
    files |= {path.name: path for path in ROOT.glob("*.py")}
    return {name: imports_of(path) for name, path in sorted(files.items()) if not name.endswith("__init__")}


def group_of(name: str) -> str:
    """Returns the group of a module.

    Raises:
        ValueError: a new module that has none.
    """
    if name.endswith(".py"):
        return "script"
    if name.startswith("integrations."):
        return "bridge"
    for group, members in GROUPS.items():
        if name in members.split():
            return group
    raise ValueError(f"every module must have a group in GROUPS of docs/diagrams.py, got {name}")


def reduce(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """Leaves out every arrow that a longer way implies."""

    def reached(name: str) -> set[str]:
        return graph[name].union(*(reached(each) for each in graph[name]))

    return {
        name: {to for to in targets if not any(to in reached(each) for each in targets)}
        for name, targets in graph.items()
    }


def layers_of(graph: dict[str, set[str]]) -> dict[str, int]:
    """Returns the layer of each module, 0 at the ground: above all that it imports, and as near its users as can be."""
    height: dict[str, int] = {}

    def climb(name: str) -> int:
        if name not in height:
            height[name] = 1 + max((climb(each) for each in graph[name]), default=-1)
        return height[name]

    top = max(map(climb, graph))
    users = defaultdict(set)
    for name, targets in graph.items():
        for target in targets:
            users[target].add(name)
    for name in sorted(graph, key=lambda name: -height[name]):
        if name.endswith(".py"):
            height[name] = top
        elif users[name] and len(users[name]) >= len(graph[name]):
            height[name] = min(height[user] for user in users[name]) - 1
    return height


def crossings(rows: Sequence[Sequence[str]], edges: Iterable[tuple[str, str]]) -> int:
    """Counts pairs of arrows between neighbouring rows that cross."""
    place = {name: (number, index) for number, row in enumerate(rows) for index, name in enumerate(row)}
    between = defaultdict(list)
    for upper, lower in edges:
        between[place[upper][0]].append((place[upper][1], place[lower][1]))
    return sum(
        (a - c) * (b - d) < 0 for pairs in between.values() for (a, b), (c, d) in itertools.combinations(pairs, 2)
    )


def order_rows(rows: list[list[str]], edges: Sequence[tuple[str, str]], sweeps: int = 60) -> list[list[str]]:
    """Returns the rows in the order with fewest crossings that barycentres lead to, downward and upward by turns."""
    best, fewest = rows, crossings(rows, edges)
    for sweep in range(sweeps):
        upward = sweep % 2 == 1
        fixed = defaultdict(list)
        for upper, lower in edges:
            fixed[lower if upward else upper].append(upper if upward else lower)
        rows = [list(row) for row in rows]
        for level in range(len(rows) - 1, -1, -1) if upward else range(len(rows)):
            place = {name: index / max(1, len(row) - 1) for row in rows for index, name in enumerate(row)}
            centre = {
                name: sum(place[each] for each in fixed[name]) / len(fixed[name]) if fixed[name] else place[name]
                for name in rows[level]
            }
            rows[level].sort(key=centre.__getitem__)
        count = crossings(rows, edges)
        if count < fewest:
            best, fewest = rows, count
    return best


def spread(rows: Sequence[Sequence[str]], edges: Sequence[tuple[str, str]], half: dict[str, float]) -> dict[str, float]:
    """Returns each name's abscissa: drawn towards those it has arrows with, as far as the boxes leave room."""
    x = {}
    for row in rows:
        room = (WIDTH - 2 * sum(half[name] for name in row)) / (len(row) + 1)
        at = 0.0
        for name in row:
            x[name] = at + room + half[name]
            at += room + 2 * half[name]
    neighbours = defaultdict(list)
    for upper, lower in edges:
        neighbours[upper].append(lower)
        neighbours[lower].append(upper)
    for _ in range(300):
        wish = {name: sum(x[each] for each in near) / len(near) for name, near in neighbours.items()}
        x = {name: 0.7 * here + 0.3 * wish.get(name, here) for name, here in x.items()}
        for row, _ in itertools.product(rows, range(8)):  # whatever overlaps is pushed apart, by both sides alike
            for one, next_one in itertools.pairwise(row):
                overlap = x[one] + half[one] + GAP + half[next_one] - x[next_one]
                if overlap > 0:
                    x[one], x[next_one] = x[one] - overlap / 2, x[next_one] + overlap / 2
    # The picture is stretched to its width.
    low = min(here - half[name] for name, here in x.items())
    high = max(here + half[name] for name, here in x.items())
    side = max(half.values()) + 8
    return {name: side + (here - low) * (WIDTH - 2 * side) / (high - low) for name, here in x.items()}


def draw_modules() -> str:
    """Returns the picture of the modules, layer on layer, each arrow from a module to one that it imports."""
    whole = read_modules()
    graph = reduce({name: targets - {*EVERYWHERE} for name, targets in whole.items() if name not in EVERYWHERE})
    height = layers_of(graph)

    # An arrow across several rows becomes a chain of short ones, through points that take part in the ordering.
    rows: list[list[str]] = [[] for _ in range(max(height.values()) + 1)]
    for name in graph:
        rows[height[name]].append(name)
    chains = []
    for name, target in ((name, target) for name, targets in graph.items() for target in sorted(targets)):
        levels = range(height[name] - 1, height[target], -1)
        points = [f"{name}>{target}@{level}" for level in levels]
        for level, point in zip(levels, points):
            rows[level].append(point)
        chains.append([name, *points, target])
    edges = [edge for chain in chains for edge in itertools.pairwise(chain)]
    rows = order_rows(rows, edges)
    shown = {name: name.removeprefix("integrations.") for name in graph}
    half = {name: 4.0 * len(shown[name]) + 14 if name in graph else 5.0 for row in rows for name in row}
    x = spread(rows, edges, half)

    step, tall = 70, 30
    y = {name: 30 + step * (len(rows) - 1 - level) for level, row in enumerate(rows) for name in row}
    parts = []
    for chain in chains:
        path = f"M{x[chain[0]]:.1f} {y[chain[0]] + tall / 2:g}"
        for upper, lower in itertools.pairwise(chain):
            start, end = y[upper] + tall / 2, y[lower] - tall / 2
            end -= 2 if lower in graph else 0
            bend = 0.5 * (end - start)
            path += f" C{x[upper]:.1f} {start + bend:g} {x[lower]:.1f} {end - bend:g} {x[lower]:.1f} {end:g}"
            path += "" if lower in graph else f" v{tall}"
        parts.append(arrow(path, DARKER[group_of(chain[0])], 1.5))
    for name in graph:
        parts.append(box(round(x[name], 1), y[name], 2 * half[name], tall, shown[name], COLOURS[group_of(name)]))
    bottom = 30 + step * len(rows)
    for number, name in enumerate(EVERYWHERE):
        words = f"{name}, which {sum(name in whole[each] for each in graph)} of the above import"
        parts.append(box(WIDTH * (2 * number + 1) / 4, bottom, WIDTH / 2 - 16, tall, words, COLOURS["ground"]))
    at = 8.0
    for group, meaning in LABELS.items():
        parts.append(f'<rect x="{at:g}" y="{bottom + 33:g}" width="14" height="14" rx="4" fill="{COLOURS[group]}"/>')
        parts.append(text(at + 20, bottom + 40, meaning, 12, LINE, "start"))
        at += 44 + 6.6 * len(meaning)
    words = "An arrow goes from a module to one that it imports, unless a longer way says so already."
    parts.append(text(WIDTH - 8, bottom + 64, words, 12, LINE, "end"))
    return picture(WIDTH, bottom + 80, "The modules of uvit and what each imports", parts)


PICTURES = {"model.svg": draw_model, "modules.svg": draw_modules}

if __name__ == "__main__":
    for name, draw in PICTURES.items():
        (ROOT / "docs" / name).write_text(draw())
