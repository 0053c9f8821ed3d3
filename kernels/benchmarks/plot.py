"""Draw speed against memory from a table of train_step.py: `python kernels/benchmarks/plot.py CSV`.

Writes one SVG beside the CSV, with a panel per batch shape and a point per engine and mode. Peak
allocated memory is on the x axis, tokens per second on the y axis: better is up and to the left.
"""

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 430, 300, 62, 14, 34, 44
COLORS = {"tuneline": "#c2410c", "tuneline-fp8": "#7c2d12", "unsloth": "#1d4ed8"}
COLORS |= {"liger": "#15803d", "peft": "#52525b"}
NAMES = {"liger": "PEFT + Liger", "peft": "PEFT", "unsloth": "Unsloth"}
STEPS = (1, 2, 2.5, 5, 10, 20, 25, 50)


def ticks(largest: float, most: int = 5) -> list[float]:
    """Return round numbers from 0 to beyond the largest."""
    power = 10.0 ** (len(str(int(largest))) - 2)
    step = next(step * power for step in STEPS if largest / (step * power) <= most)
    return [step * i for i in range(int(largest / step) + 2)]


def panel(title: str, rows: Sequence[dict[str, str]], x: int, y: int) -> list[str]:
    """Draw one panel."""
    points = [
        (row, float(row["peak_allocated_gib"]), float(row["tokens_per_second"])) for row in rows
    ]
    xs, ys = ticks(max(p[1] for p in points)), ticks(max(p[2] for p in points))
    inner_width, inner_height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def place(gib: float, rate: float) -> tuple[float, float]:
        across, up = gib / xs[-1] * inner_width, rate / ys[-1] * inner_height
        return x + LEFT + across, y + HEIGHT - BOTTOM - up

    out = [f'<text x="{x + LEFT}" y="{y + 20}" font-weight="600">{title}</text>']
    for value in xs:
        px, base = place(value, 0)
        out.append(f'<line x1="{px:.1f}" x2="{px:.1f}" y1="{y + TOP}" y2="{base:.1f}"/>')
        out.append(f'<text class="m" x="{px:.1f}" y="{base + 16:.1f}">{value:g}</text>')
    for value in ys:
        start, py = place(0, value)
        out.append(f'<line x1="{start}" x2="{x + WIDTH - RIGHT}" y1="{py:.1f}" y2="{py:.1f}"/>')
        out.append(f'<text class="e" x="{start - 6}" y="{py + 4:.1f}">{value:,.0f}</text>')
    middle = x + LEFT + inner_width / 2
    out.append(f'<text class="m" x="{middle}" y="{y + HEIGHT - 8}">peak allocated, GiB</text>')
    taken: list[float] = []
    for row, gib, rate in sorted(points, key=lambda point: -point[2]):
        px, py = place(gib, rate)
        text_y = max([py + 4, *(y + 12 for y in taken if abs(y - py - 4) < 12)])
        taken.append(text_y)
        name = NAMES.get(row["engine"], row["engine"])
        fill = COLORS.get(row["engine"], "#000")
        out.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="5" fill="{fill}"/>')
        end = px > x + WIDTH - 130
        where = f'class="e" x="{px - 9:.1f}"' if end else f'x="{px + 9:.1f}"'
        label = f"{name}, {row['mode']}"
        out.append(f'<text {where} y="{text_y:.1f}" fill="{fill}">{label}</text>')
    return out


def main() -> None:
    """Draw one CSV."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("csv", type=Path, help="a table of train_step.py")
    args = parser.parse_args()
    with args.csv.open(newline="") as file:
        rows = list(csv.DictReader(file))
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    body: list[str] = []
    for i, shape in enumerate(shapes):
        found = [row for row in rows if row["shape"] == shape]
        title = f"{shape} tokens, tokens per second"
        body += panel(title, found, i % 2 * WIDTH, 26 + i // 2 * HEIGHT)
    width, height = min(len(shapes), 2) * WIDTH, 26 + -(-len(shapes) // 2) * HEIGHT
    first = rows[0]
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}">'
        "<style>text{font:12px sans-serif}line{stroke:#ddd}.m{text-anchor:middle}"
        ".e{text-anchor:end}</style>"
        f'<rect width="{width}" height="{height}" fill="#fff"/>'
        f'<text x="{LEFT}" y="18">{first["model"]}, {first["device"]}, {first["versions"]}</text>'
    )
    path = args.csv.with_suffix(".svg")
    path.write_text("\n".join([head, *body, "</svg>"]) + "\n")
    print(path)


if __name__ == "__main__":
    main()
