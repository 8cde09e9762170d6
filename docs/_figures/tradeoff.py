"""Draw `docs/assets/tradeoff.svg` from the committed results: what each method ranks, against what it forgot.

    python docs/_figures/tradeoff.py

Every method is a point (the mean of its seeds) and a dot for each seed. Across: the perplexity of general text after
training over that before, on a logarithmic scale. Up: NDCG@10 of search in the ranking of the whole catalogue. What has
no language model has nothing to forget and is not shown.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))  # run as a file, a script knows its own folder alone

from examples.unified_sr.compare import chosen_methods, group_runs, leader, place_labels, trade  # noqa: E402
from examples.unified_sr.tables import read_tables  # noqa: E402

RESULTS = ROOT / "examples" / "unified_sr" / "results"
PICTURE = ROOT / "docs" / "assets" / "tradeoff.svg"

WIDTH, HEIGHT = 1120, 480
TOP, BOTTOM = 78, 404  # of the axes, pixels
METRIC = "ndcg@10"
TITLES = {"amazon-industrial": "Amazon Industrial & Scientific", "movielens-100k": "MovieLens-100K"}
SHOWN: tuple[str, ...] = ()
"""Labels of the methods in the picture; none: those that `compare` draws."""

NAMES = {
    "zero-shot": "before training",
    "gems": "GEMS",
    "gems-paper": "GEMS as published",
    "adamw": "AdamW",
    "lora": "LoRA",
    "galore": "GaLore",
    "pcgrad": "PCGrad",
    "cagrad": "CAGrad",
}
FONT = 15  # of the words at a point, pixels

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


@dataclass(frozen=True)
class Panel:
    """One data set: its runs, the left and right end of its axis, and the ends of its scales."""

    title: str
    runs: Any
    left: float
    right: float
    top: float
    step: float
    ratios: tuple[int, ...]

    @classmethod
    def of(cls, data: str, runs: Any, left: float, right: float) -> Panel:
        """Choose what is shown, and scales that hold it."""
        groups = group_runs(runs, METRIC)
        found = trade(groups, METRIC)
        shown = {*chosen_methods(found, SHOWN), *found.index[found["method"] == "zero-shot"]}
        kept = groups[groups["group"].isin(shown) & groups["perplexity"].notna()]
        most = float(kept[f"search_{METRIC}"].max())
        step = next(size for size in (0.01, 0.02, 0.05, 0.1, 0.2) if 6 * size >= most)
        farthest = float((kept["perplexity"] / kept["perplexity_before"]).max())
        known = [digit * 10**power for power in range(6) for digit in (1, 2, 5)]
        last = next(place for place, ratio in enumerate(known) if ratio >= farthest and ratio > 1)
        ratios = known[: last + 1] if last < 9 else known[: last + 3 : 3]
        return cls(TITLES.get(data, data), kept, left, right, step * math.ceil(1.05 * most / step), step, tuple(ratios))

    def x(self, ratio: float) -> float:
        """Pixels from the left of a perplexity ratio."""
        return self.left + 14 + (self.right - self.left - 14) * math.log(ratio) / math.log(self.ratios[-1])

    def y(self, value: float) -> float:
        """Pixels from the top of an NDCG."""
        return BOTTOM - (BOTTOM - TOP) * value / self.top


def panels() -> list[Panel]:
    """The two data sets side by side."""
    runs = read_tables(RESULTS).runs
    runs = runs[runs["split"] == "test"]
    places = ((70.0, 545.0), (630.0, 1100.0))
    return [
        Panel.of(str(data), found, *place) for (data, found), place in zip(runs.groupby("data"), places, strict=False)
    ]


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
    for ratio in panel.ratios:
        x = panel.x(ratio)
        parts.append(f'<path d="M{x:.1f} {BOTTOM}V{BOTTOM + 6}" class="axis"/>')
        parts.append(f'<text x="{x:.1f}" y="{BOTTOM + 24}" text-anchor="middle" class="note">{ratio:,}</text>')
    parts.append(f'<path d="M{panel.left} {BOTTOM}H{panel.right}" class="axis"/>')
    middle = (panel.left + panel.right) / 2
    words = "perplexity of general text, as a multiple of that before training"
    return [*parts, f'<text x="{middle}" y="{BOTTOM + 50}" text-anchor="middle" class="note">{words}</text>']


def points(panel: Panel) -> list[str]:
    """A point and its words for each method, above the dots of the seeds."""
    dots, marks, places, texts, kinds = [], [], [], [], []
    runs = panel.runs.assign(ratio=panel.runs["perplexity"] / panel.runs["perplexity_before"])
    for group, found in runs.groupby("group", sort=False):
        name = kind(found["method"].iloc[0])
        seeds = list(zip(found["ratio"], found[f"search_{METRIC}"], strict=True))
        if len(seeds) > 1:
            dots += [
                f'<circle cx="{panel.x(ratio):.1f}" cy="{panel.y(value):.1f}" r="3" class="{name} seed"/>'
                for ratio, value in seeds
            ]
        # The mean of perplexities, as the results' own tables have it.
        places.append((panel.x(found["ratio"].mean()), panel.y(found[f"search_{METRIC}"].mean())))
        texts.append(NAMES.get(str(group), str(group)))
        kinds.append(name)
        marks.append(f'<circle cx="{places[-1][0]:.1f}" cy="{places[-1][1]:.1f}" r="6" class="{name}"/>')
    sizes = [(0.6 * FONT * len(text), 1.15 * FONT) for text in texts]
    bounds = (panel.left, TOP - 16.0, panel.right + 10, float(BOTTOM))
    for place, text, name, box in zip(places, texts, kinds, place_labels(places, sizes, bounds, gap=11), strict=True):
        line = leader(place, box)
        if line is not None:
            marks.append('<path d="M{:.1f} {:.1f}L{:.1f} {:.1f}" class="axis"/>'.format(*line[0], *line[1]))
        where = f'x="{box[0]:.1f}" y="{box[3] - 0.3 * FONT:.1f}"'
        marks.append(f'<text {where} font-size="{FONT}" class="{name}">{text}</text>')
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
    body = [part for panel in panels() for part in (*axes(panel), *points(panel))]
    return "\n".join([head, note, *body, "</svg>\n"])


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
    print(f"wrote {PICTURE.relative_to(ROOT)}")
