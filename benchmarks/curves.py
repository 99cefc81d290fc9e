"""Curves of several runs in one picture, as those of docs/benchmarks.md.

    python -m benchmarks.curves --output curves.png --panel eval/accuracy runs/tiny/grpo runs/tiny/rloo \\
      --panel eval/divergence runs/tiny/gkd-0 runs/tiny/gkd-1

A panel is a metric and the directories of the runs that have it; a line is called as its directory is.
"""

import argparse
import json
from pathlib import Path


def points(run: Path, metric: str) -> list[tuple[int, float]]:
    """Steps and values of the metric in metrics.jsonl, of the rows that have it."""
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(row["step"], row[metric]) for row in rows if row.get(metric) is not None]


def draw(panels: list[list[str]], output: Path) -> None:
    """Write the picture, a panel beside the other."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * len(panels), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for place, (metric, *runs) in enumerate(panels, 1):
        axes = figure.add_subplot(1, len(panels), place, xlabel="step", ylabel=metric)
        for run in map(Path, runs):
            found = points(run, metric)
            if not found:
                raise SystemExit(f"{run}: no row of metrics.jsonl has {metric}")
            axes.plot(*zip(*found, strict=True), "o-", markersize=3, linewidth=1.2, label=run.name)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(output, dpi=110)


def main() -> None:
    """Read the arguments and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--panel", nargs="+", action="append", required=True, metavar="METRIC RUN")
    options = parser.parse_args()
    draw(options.panel, options.output)


if __name__ == "__main__":
    main()
