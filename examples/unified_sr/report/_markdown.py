"""``report.md``: what was run, what came out, and what it cost."""

from __future__ import annotations

from typing import Any

from ..checking import completed
from ..checkpoint import write_text_whole
from ..config import read_config
from ..run_folder import CONFIG, DONE, ENVIRONMENT, RunFolder
from ._plots import draw_plots
from ._table import change, markdown_table, perplexities, result_rows, result_table


def write_report(folder: RunFolder) -> None:
    """Draw the plots and write ``report.md`` of a run whose other files are all there."""
    settings = completed(read_config(folder.file(CONFIG)))
    summary: dict[str, Any] = folder.read_json("run.json")
    model = f" with {settings['model.name']}" if perplexities(folder) else ""
    sections = [
        f"# {settings['method.name']} on {settings['data.source']}{model}",
        _result(folder, settings, summary),
        *_plots(folder),
        _sampled(folder, settings),
        _data(folder, summary),
        _cost(folder, settings, summary),
    ]
    # Written last: its presence marks the run as finished.
    write_text_whole(folder.file(DONE), "\n\n".join(sections))


def _result(folder: RunFolder, settings: dict[str, Any], summary: dict[str, Any]) -> str:
    split = {"test": "test", "valid": "validation"}[settings["evaluation.split"]]
    evaluated = ", ".join(f"{count} {split} examples of {task}" for task, count in summary["evaluated"].items())
    text = f"Full ranking of the whole catalogue without the items the user had seen; {evaluated}."
    found = perplexities(folder)
    if found is not None:
        old, new = found
        rows = {"prompt": "examples per task", "sequence": "sequences"}[settings["model.format"]]
        text += (
            f" {summary['steps']} steps of {settings['training.batch_size']} {rows}, seed "
            f"{settings['seed']}. Perplexity on {summary['perplexity_tokens']} held-out tokens of general text: "
            f"{old:.2f} for the intact model, {new:.2f} after training ({change(old, new)})."
        )
    lines = ["## Result", "", result_table(folder), "", text]
    lines += ["", *(f"- {note}" for note in summary["notes"])] if summary["notes"] else []
    return "\n".join(lines)


def _plots(folder: RunFolder) -> list[str]:
    drawn = draw_plots(folder)
    return ["## Plots", *(f"![{caption}]({name})" for name, caption in drawn.items())] if drawn else []


def _sampled(folder: RunFolder, settings: dict[str, Any]) -> str:
    cells = [["", "zero-shot", settings["method.name"]]]
    cells += [[f"{name} (sampled)", f"{old:.4f}", f"{new:.4f}"] for name, old, new in result_rows(folder, sampled=True)]
    if perplexities(folder) is None:
        cells = [[row[0], row[2]] for row in cells]
    return "\n".join(
        [
            f"## The same among 1 + {settings['evaluation.negatives']} sampled items",
            "",
            "Only for comparison with literature that ranks among a few random negatives: these numbers are inflated.",
            "",
            markdown_table(cells),
        ]
    )


def _data(folder: RunFolder, summary: dict[str, Any]) -> str:
    statistics = folder.read_json("statistics.json")
    tasks = statistics["per_task"]
    keys = list(next(iter(tasks.values())))
    cells = [["", *tasks]]
    cells += [[key.replace("_", " "), *(f"{values[key]:g}" for values in tasks.values())] for key in keys]
    head = (
        f"{statistics['name']}: {statistics['users']} users, {statistics['items']} items, {statistics['events']} "
        f"events, density {statistics['density']:.3%}."
    )
    prompts = [f"- {task}: `{text}`" for task, text in summary["prompts"].items()]
    lines = ["## Data", "", head, "", markdown_table(cells)]
    return "\n".join([*lines, "", "Prompts look like this:", "", *prompts] if prompts else lines)


def _cost(folder: RunFolder, settings: dict[str, Any], summary: dict[str, Any]) -> str:
    environment = folder.read_json(ENVIRONMENT)
    seconds = summary["seconds"]
    cells = [["phase", "seconds"], *([name, f"{value:.1f}"] for name, value in seconds.items())]
    cells.append(["together", f"{sum(seconds.values()):.1f}"])
    lines = ["## Cost", "", markdown_table(cells), ""]
    throughput = summary["throughput"]
    if throughput:
        lines.append(
            f"{throughput['seconds_per_step']:.2f} s per step (median), {throughput['examples_per_second']:.1f} "
            f"examples/s, {throughput['tokens_per_second']:.0f} prompt tokens/s; {summary['trained_parameters']:,} "
            "trained weights."
        )
    resident, device = summary["peak_memory"]["resident"], summary["peak_memory"]["device"]
    on_device = "" if device is None else f", of tensors on the GPU {device / 2**30:.2f} GiB"
    lines.append(f"Peak memory of the process: {resident / 2**30:.2f} GiB{on_device}.")
    versions = ", ".join(f"{name} {version}" for name, version in environment["packages"].items() if version)
    git = environment["git"]
    changed = " with uncommitted changes" if git["uncommitted_changes"] else ""
    lines.append(
        f"{environment['cores']} cores, {environment['precision']}; Python {environment['python']}, {versions}; "
        f"revision {git['revision'] or 'unknown'}{changed}."
    )
    return "\n".join(lines)
