"""Draw `docs/assets/tradeoff.svg` from the committed results: what each method ranks, against what it forgot.

    python docs/_figures/tradeoff.py

Every method is a point (the mean of its seeds) and a dot for each seed. Across: the perplexity of general text after
training over that before, on a logarithmic scale. Up: NDCG@10 of search in the ranking of the whole catalogue.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "examples" / "unified_sr" / "results"
PICTURE = ROOT / "docs" / "assets" / "tradeoff.svg"

WIDTH, HEIGHT = 1120, 480
TOP, BOTTOM = 78, 404  # of the axes, pixels
RATIOS = (1, 2, 5, 10, 20, 50, 100)


@dataclass(frozen=True)
class Label:
    """The words at a point, and where: pixels from it, and the side of the words that is there."""

    text: str
    right: float = 12
    down: float = 5
    anchor: str = "start"


@dataclass(frozen=True)
class Panel:
    """One data set: its folder, its title, the left and right end of its axis, the top of its scale."""

    folder: str
    title: str
    left: float
    right: float
    top: float
    step: float
    labels: dict[str, Label]

    def x(self, ratio: float) -> float:
        """Pixels from the left of a perplexity ratio."""
        return self.left + 14 + (self.right - self.left - 14) * math.log(ratio) / math.log(RATIOS[-1])

    def y(self, value: float) -> float:
        """Pixels from the top of an NDCG."""
        return BOTTOM - (BOTTOM - TOP) * value / self.top


PANELS = (
    Panel(
        "amazon-industrial",
        "Amazon Industrial & Scientific",
        70,
        545,
        0.6,
        0.1,
        {
            "gems-normalized-44k": Label("GEMS, 44k tokens, normalized", 6, 42),
            "gems": Label("GEMS", 2, -13),
            "gems-shared-first-normalized": Label("GEMS, 4 × rate"),
            "gems-paper": Label("GEMS as published", 12, 4),
            "adamw-kept": Label("AdamW, 1/4 of its rate", 12, 10),
            "adamw": Label("AdamW", 10, 22),
            "cagrad": Label("CAGrad", 4, -12, "end"),
            "pcgrad": Label("PCGrad", 8, -10),
            "galore": Label("GaLore", 8, -14, "middle"),
            "lora": Label("LoRA", 4, 28, "middle"),
            "lora-kept": Label("LoRA, 1/16 of its rate"),
            "zero-shot": Label("before training", 12, -2),
        },
    ),
    Panel(
        "movielens",
        "MovieLens-100K",
        630,
        1100,
        0.25,
        0.05,
        {
            "gems-normalized-44k": Label("GEMS, 44k tokens, normalized", 14, 8),
            "gems": Label("GEMS", 14, -4),
            "adamw-other-rates": Label("AdamW, 1/2 of its rate", -4, -40),
            "adamw": Label("AdamW"),
            "lora": Label("LoRA"),
            "zero-shot": Label("before training", 12, -2),
        },
    ),
)

STYLE = """<style>
.page { fill: #ffffff }
text { fill: #222222 }
.note { fill: #555555; font-size: 14px }
.title { font-weight: bold }
.axis { stroke: #888888; fill: none }
.grid { stroke: #e4e4e4; fill: none }
.ours { fill: #5b4b8a }
.theirs { fill: #b85c00 }
.none { fill: #777777 }
.seed { opacity: 0.4 }
@media (prefers-color-scheme: dark) {
.page { fill: #1e2129 }
text { fill: #f0f0f4 }
.note { fill: #b9bcc8 }
.grid { stroke: #353944 }
.ours { fill: #b9a8ee }
.theirs { fill: #f0a34f }
.none { fill: #a5a8b3 }
text.ours, text.theirs, text.none { filter: brightness(1.15) }
}
</style>"""


def measured(folder: Path) -> list[tuple[float, float]]:
    """The perplexity ratio and the search NDCG@10 of each seed of a method."""
    points = []
    for path in sorted(folder.glob("seed-*/metrics.json")):
        metrics = json.loads(path.read_text(encoding="utf-8"))
        before, after = metrics["zero_shot"], metrics["final"]
        ratio = after["general"]["perplexity"] / before["general"]["perplexity"]
        points.append((ratio, after["search"]["ndcg@10"]))
    return points


def kind(method: str) -> str:
    """The class of a method's colour."""
    return "none" if method == "zero-shot" else "ours" if method.startswith("gems") else "theirs"


def axes(panel: Panel) -> list[str]:
    """What stands in a panel before there is a point."""
    parts = [f'<text x="{panel.left}" y="52" class="title">{panel.title.replace("&", "&amp;")}</text>']
    for count in range(round(panel.top / panel.step) + 1):
        value = count * panel.step
        y = panel.y(value)
        parts.append(f'<path d="M{panel.left} {y:.1f}H{panel.right}" class="grid"/>')
        parts.append(f'<text x="{panel.left - 8}" y="{y + 5:.1f}" text-anchor="end" class="note">{value:g}</text>')
    for ratio in RATIOS:
        x = panel.x(ratio)
        parts.append(f'<path d="M{x:.1f} {BOTTOM}V{BOTTOM + 6}" class="axis"/>')
        parts.append(f'<text x="{x:.1f}" y="{BOTTOM + 24}" text-anchor="middle" class="note">{ratio}</text>')
    parts.append(f'<path d="M{panel.left} {BOTTOM}H{panel.right}" class="axis"/>')
    middle = (panel.left + panel.right) / 2
    words = "perplexity of general text, as a multiple of that before training"
    return [*parts, f'<text x="{middle}" y="{BOTTOM + 50}" text-anchor="middle" class="note">{words}</text>']


def points(panel: Panel) -> list[str]:
    """A point and its words for each method, above the dots of the seeds."""
    dots, marks = [], []
    for method, label in panel.labels.items():
        found = measured(RESULTS / panel.folder / method)
        if not found:
            raise FileNotFoundError(f"no seed-*/metrics.json in {RESULTS / panel.folder / method}")
        name = kind(method)
        if len(found) > 1:
            dots += [
                f'<circle cx="{panel.x(ratio):.1f}" cy="{panel.y(value):.1f}" r="3" class="{name} seed"/>'
                for ratio, value in found
            ]
        # The mean of perplexities, as the results' own tables have it.
        x, y = panel.x(fmean(ratio for ratio, _ in found)), panel.y(fmean(value for _, value in found))
        marks.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="6" class="{name}"/>')
        place = f'x="{x + label.right:.1f}" y="{y + label.down:.1f}" text-anchor="{label.anchor}"'
        marks.append(f'<text {place} font-size="15" class="{name}">{label.text}</text>')
    return dots + marks


def draw() -> str:
    """The picture, as SVG that any browser shows, in the colours of a light or a dark page."""
    title = "Search NDCG@10 against what general text has lost, by method, on two data sets"
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="\'DejaVu Sans\', Verdana, Helvetica, Arial, sans-serif" font-size="17" role="img" '
        f'aria-labelledby="title">\n<title id="title">{title}</title>\n{STYLE}\n'
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="12" class="page"/>'
    )
    note = '<text x="70" y="24" class="note">NDCG@10 of search (higher is better; further left forgot less)</text>'
    body = [part for panel in PANELS for part in (*axes(panel), *points(panel))]
    return "\n".join([head, note, *body, "</svg>\n"])


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
    print(f"wrote {PICTURE.relative_to(ROOT)}")
