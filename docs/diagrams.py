"""Draws docs/model.svg and docs/modules.svg, and lists the files in docs/reading.md: `python docs/diagrams.py`.

The model's blocks, tokens and widths are read from a U-ViT that is built for the picture; the rooms, their modules and
the arrows between them from the files, their docstrings and their imports. So nothing shown here can differ from the
code.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

import torch

from uvit import UViT

ROOT = Path(__file__).parent.parent
FONT = "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', Helvetica, Arial, sans-serif"
LINE = "#768390"  # lines and free text: legible on white and on black
INK = "#1f2328"  # text on boxes, which are light on either ground
WIDTH = 980
SKIP, PALE_SKIP = "#d96c26", "#f5b183"
COLOURS = {"process": "#a8e0d1", "model": "#a9cdf5", "data": "#f7bcbc", "ground": "#d5dae0"}
ROOM_COLOURS = ("#d5dae0", "#f3e3ae", "#bfe8dc", "#bcd8f6", "#d9c8ef", "#f7c9c9", "#f8d8b0")
BEGIN, END = "<!-- made by docs/diagrams.py -->\n\n", "\n<!-- end of what docs/diagrams.py made -->"
SCRIPTS = "scripts"
"""The room of what starts a command: the files at the root, and `__main__`."""
PADDING, GAP = 14, 16
CHIP_HEIGHT, CHIP_GAP = 26, 8
ARROW_LENGTH = 30  # between two rows of rooms
TALL_WIDTH = 220


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
        for colour in (LINE, SKIP)
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


# The rooms.


def read_rooms() -> dict[str, dict[str, Path]]:
    """Returns the modules of each room by their names; the scripts at the root, and `__main__`, are one more."""
    package = ROOT / "uvit"
    rooms: dict[str, dict[str, Path]] = {}
    for path in sorted(package.glob("*/*.py")):
        if path.stem != "__init__":
            rooms.setdefault(path.parent.name, {})[path.stem] = path
    rooms[SCRIPTS] = {path.name: path for path in sorted(ROOT.glob("*.py"))}
    rooms[SCRIPTS]["python -m uvit"] = package / "__main__.py"
    return rooms


def summary(path: Path) -> str:
    """Returns the first line of a module's docstring."""
    return (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0].removesuffix(".")


def list_files() -> str:
    """Returns a Markdown table of the rooms, from the top to the bottom, and of what each of their files is for."""
    rooms, rows = read_rooms(), find_rows(reduce(read_imports()))
    lines = ["| room or file | what it is for |", "|---|---|"]
    for room in sorted(rooms.keys() - {SCRIPTS}, key=lambda room: (-rows[room][0], room)):
        folder = f"uvit/{room}"
        lines.append(f"| [**{room}**](../{folder}) | **{summary(ROOT / folder / '__init__.py')}** |")
        lines += [f"| [`{name}`](../{folder}/{name}.py) | {summary(path)} |" for name, path in rooms[room].items()]
    return "\n".join(lines) + "\n"


def rooms_in(path: Path) -> set[str]:
    """Returns the rooms that a file imports, including imports inside functions and under TYPE_CHECKING."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return {name.split(".")[1] for name in names if name.startswith("uvit.")} & read_rooms().keys()


def read_imports() -> dict[str, set[str]]:
    """Returns the other rooms that each room imports."""
    return {room: set().union(*map(rooms_in, files.values())) - {room} for room, files in read_rooms().items()}


def reduce(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """Leaves out each arrow that a longer path implies."""

    def reached(name: str) -> set[str]:
        return graph[name].union(*map(reached, graph[name]))

    return {name: targets - set().union(*map(reached, targets)) for name, targets in graph.items()}


def find_rows(graph: dict[str, set[str]]) -> dict[str, range]:
    """Returns the rows of each room, 0 at the bottom: from just above what it imports to just below its users."""
    rows: dict[str, range] = {}

    def height(name: str) -> int:
        return 1 + max(map(height, graph[name]), default=-1)

    for name in graph:
        users = [height(user) for user, targets in graph.items() if name in targets]
        rows[name] = range(height(name), min(users, default=height(name) + 1))
    return rows


def find_columns(rows: dict[str, range]) -> dict[str, tuple[float, float]]:
    """Returns the left and right edge of each room: tall rooms are on the right, those of one row share the rest."""
    columns: dict[str, tuple[float, float]] = {}
    right = [float(WIDTH)] * (1 + max(row[-1] for row in rows.values()))  # what tall rooms leave of each row
    for name in rows:
        if len(rows[name]) > 1:
            edge = min(right[row] for row in rows[name])
            columns[name] = (edge - TALL_WIDTH, edge)
            for row in rows[name]:
                right[row] = edge - TALL_WIDTH - GAP
    for row, edge in enumerate(right):
        here = [name for name in rows if [*rows[name]] == [row]]
        for number, name in enumerate(here):
            width = (edge + GAP) / len(here)
            columns[name] = (number * width, (number + 1) * width - GAP)
    return columns


def chip_width(name: str) -> float:
    """Returns the width of the box of a module."""
    return 7.4 * len(name) + 20


def line_width(modules: Sequence[str]) -> float:
    """Returns the width of the boxes of some modules side by side."""
    return sum(map(chip_width, modules)) + CHIP_GAP * (len(modules) - 1)


def split(modules: Sequence[str], width: float) -> list[Sequence[str]]:
    """Returns modules in as few lines as fit a width, of about equally many; at worst in a line each."""
    size = len(modules)
    for count in range(1, size + 1):
        lines = [modules[size * n // count : size * (n + 1) // count] for n in range(count)]
        if max(map(line_width, lines)) <= width:
            break
    return lines


class Room:
    """A box with the name and purpose of a room, and its modules.

    Args:
        name: of the room.
        modules: their names.
        is_tall: whether it spans several rows, with one module a line.
        left, right: its edges.
    """

    def __init__(self, name: str, modules: Sequence[str], is_tall: bool, left: float, right: float) -> None:
        self.name, self.left, self.right = name, left, right
        self.top = self.bottom = 0.0
        self.purpose = "What starts a command"
        if name != SCRIPTS:
            self.purpose = summary(ROOT / "uvit" / name / "__init__.py").partition(":")[0].partition(".")[0]
        # The name is beside the modules of a wide room, and above those of others.
        self.is_wide = right - left > WIDTH / 2
        self.header_width = 2 * PADDING + max(9 * len(name), 6 * len(self.purpose)) if self.is_wide else 0.0
        self.header_height = 0 if self.is_wide else 44
        self.lines = split(modules, 0 if is_tall else right - left - self.header_width - 2 * PADDING)

    @property
    def height(self) -> float:
        """The height that its content needs."""
        lines = len(self.lines) * (CHIP_HEIGHT + CHIP_GAP) - CHIP_GAP
        return max(lines + self.header_height, 40) + 2 * PADDING - 4

    def draw(self, colour: str) -> list[str]:
        """Returns its box, name and modules."""
        corner = f'x="{self.left:g}" y="{self.top:g}" width="{self.right - self.left:g}"'
        parts = [f'<rect {corner} height="{self.bottom - self.top:g}" rx="12" fill="{colour}"/>']
        middle = (self.top + self.bottom) / 2
        x, anchor = (self.left + PADDING, "start") if self.is_wide else ((self.left + self.right) / 2, "middle")
        y = middle - 10 if self.is_wide else self.top + PADDING + 4
        parts.append(text(x, y, self.name, 15, INK, anchor, font_weight="600"))
        parts.append(text(x, y + 19, self.purpose, 12, INK, anchor))
        centre = (self.left + self.header_width + self.right) / 2
        y = middle + self.header_height / 2 - (len(self.lines) - 1) * (CHIP_HEIGHT + CHIP_GAP) / 2
        for line in self.lines:
            x = centre - line_width(line) / 2
            for module in line:
                parts.append(box(x + chip_width(module) / 2, y, chip_width(module), CHIP_HEIGHT, module, "#ffffff"))
                x += chip_width(module) + CHIP_GAP
            y += CHIP_HEIGHT + CHIP_GAP
        return parts


def draw_rooms() -> str:
    """Returns the picture of the rooms in rows, with an arrow from each to those that it imports."""
    modules, graph = {name: [*files] for name, files in read_rooms().items()}, reduce(read_imports())
    rows = find_rows(graph)
    columns = find_columns(rows)
    rooms = {name: Room(name, modules[name], len(rows[name]) > 1, *columns[name]) for name in rows}

    # A row is as high as its highest room.
    tops, y = {}, 8.0
    for row in reversed(range(1 + max(each[-1] for each in rows.values()))):
        height = max((room.height for name, room in rooms.items() if [*rows[name]] == [row]), default=0)
        tops[row] = y, y + height
        y += height + ARROW_LENGTH
    for name, room in rooms.items():
        room.top, room.bottom = tops[rows[name][-1]][0], tops[rows[name][0]][1]

    parts = []
    for name, targets in graph.items():
        for target in sorted(targets):
            upper, lower = rooms[name], rooms[target]
            x = (max(upper.left, lower.left) + min(upper.right, lower.right)) / 2
            parts.append(arrow(f"M{x:g} {upper.bottom:g} V{lower.top - 2:g}", LINE, 2))
    for number, name in enumerate(sorted(rooms, key=lambda name: rows[name][0])):
        parts += rooms[name].draw(ROOM_COLOURS[number % len(ROOM_COLOURS)])
    words = "Arrows point from a room to those that it imports; those that a longer path implies are left out."
    parts.append(text(WIDTH - 8, y - ARROW_LENGTH + 20, words, 12, LINE, "end"))
    return picture(WIDTH, y - ARROW_LENGTH + 36, "The rooms of uvit, their modules, and what each room imports", parts)


PICTURES = {"model.svg": draw_model, "modules.svg": draw_rooms}


def main() -> None:
    """Draws the pictures, and writes the list of files into docs/reading.md."""
    for name, draw in PICTURES.items():
        (ROOT / "docs" / name).write_text(draw())
    page = ROOT / "docs" / "reading.md"
    before, _, rest = page.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}{list_files()}{END}{after}")


if __name__ == "__main__":
    main()
