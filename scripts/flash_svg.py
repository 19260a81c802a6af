"""Draw the tiles of a causal mask with a window, as docs/flash_attention.md shows them: those visited are `Mask.view`.

.venv/bin/python scripts/flash_svg.py docs/flash_attention.svg
"""

import sys
from pathlib import Path

from llm_jax.ops.mask import Mask

GREY, BLUE, ORANGE = "#79818b", "#3b82f6", "#f0731a"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
LEFT, TOP, TILE, TILES = 44, 64, 26, 8  # pixels, pixels, pixels, a side of the square


def text(x: float, y: float, words: str, anchor: str = "start", **style: str) -> str:
    extra = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in style.items())
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}"{extra}>{words}</text>'


def box(x: float, y: float, width: float, height: float, colour: str, opacity: float) -> str:
    shape = f'x="{x}" y="{y}" width="{width}" height="{height}" rx="2"'
    return f'<rect {shape} fill="{colour}" fill-opacity="{opacity}" stroke="{colour}" stroke-opacity=".6"/>'


def arrow(x: float, y: float, length: float) -> str:
    return f'<path d="M{x} {y}h{length}m-5 -4l5 4l-5 4" fill="none" stroke="{ORANGE}" stroke-width="1.5"/>'


def scores(row: int) -> list[str]:
    """Draw the square of all scores; `row` is the row of tiles being computed."""
    mask, side = Mask(window=4 * 128), TILES * TILE
    view, whole = mask.view(TILES * 128, TILES * 128, 128, 128), mask.materialise(TILES * 128, TILES * 128)[0]
    shapes = [
        text(LEFT + side / 2, TOP - 10, "keys", "middle"),
        f'<g transform="translate({LEFT - 10} {TOP + side / 2}) rotate(-90)">{text(0, 0, "queries", "middle")}</g>',
    ]
    for i in range(TILES):
        for j in range(TILES):
            cut = not whole[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128].all()
            colour, opacity = (ORANGE if i == row else BLUE, 0.25 if cut else 0.6) if view[i, j] else (GREY, 0)
            shapes.append(box(LEFT + j * TILE + 1, TOP + i * TILE + 1, TILE - 2, TILE - 2, colour, opacity))
    first = int(view[row].argmax())
    y = TOP + row * TILE + TILE / 2
    return [*shapes, arrow(LEFT + first * TILE + 4, y, int(view[row].sum()) * TILE - 8)]


def chip() -> list[str]:
    """Draw what one row of tiles needs at a time, and where it is kept."""
    x, y, side = 330, TOP, 84
    return [
        f'<path d="M{x - 34} {TOP}V{TOP + TILES * TILE}" stroke="{GREY}" stroke-opacity=".25"/>',
        text(x, TOP - 10, "on the chip, for one row of tiles", font_weight="600"),
        box(x, y + 34, 24, side, BLUE, 0.6),
        text(x + 12, y + 28, "Q", "middle"),
        box(x + 36, y + 34, side, side, ORANGE, 0.25),
        text(x + 36 + side / 2, y + 81, "S = Q Kᵀ", "middle"),
        box(x + 36, y + 6, side, 20, ORANGE, 0.6),
        text(x + 36 + side / 2, y + 20, "K, V", "middle", fill="#fff"),
        arrow(x + 42 + side, y + 16, 40),
        text(x + 90 + side, y + 20, "the next, while this is computed"),
        box(x + 48 + side, y + 34, 8, side, BLUE, 0.6),
        *(text(x + 64 + side, y + 60 + 20 * line, kept) for line, kept in enumerate("mℓo")),
        text(x + 80 + side, y + 60, "the largest score so far"),
        text(x + 80 + side, y + 80, "the sum of exp(s - m)"),
        text(x + 80 + side, y + 100, "the sum of exp(s - m) v"),
        box(x, y + 146, 10, 10, BLUE, 0.6),
        text(x + 18, y + 155, "all of it is seen"),
        box(x, y + 166, 10, 10, BLUE, 0.25),
        text(x + 18, y + 175, "seen in part: masked inside the tile"),
        box(x, y + 186, 10, 10, GREY, 0),
        text(x + 18, y + 195, "out of view: neither computed nor fetched"),
    ]


def main(out: str) -> None:
    head = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 284" width="720" height="284" role="img"'
    title = "Attention, tile by tile"
    lines = [
        f'{head} font-family="{FONT}" font-size="12" fill="{GREY}">',
        f"<title>{title}</title>",
        text(0, 16, title, font_size="15", font_weight="600"),
        text(0, 35, "a causal mask with a window; one row of tiles at work"),
        *scores(row=5),
        *chip(),
        "</svg>",
    ]
    Path(out).write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
