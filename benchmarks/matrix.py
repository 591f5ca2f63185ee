"""The doctor's matrix as a picture: which case works on which MLX, natively and through mlxshim.

python -m mlxshim --json > matrix-0.32.4.json        # for each MLX, in its environment
python -m benchmarks.matrix matrix-*.json --out docs/benchmarks/matrix.svg
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ._program import pyplot

COLOURS = {"PASS": "#a5d6a7", "WRONG": "#ef5350", "HANG": "#8e24aa", "crash": "#b71c1c"}
RAISED = "#ffb74d"
SIDES = ("native", "mlxshim")


def kind(verdict: str) -> str:
    return "crash" if verdict.startswith("SIG") else verdict


def cell(row: dict[str, Any]) -> tuple[str, str, str]:
    """(colour, text, colour of the text) of one verdict."""
    verdict = kind(row["verdict"])
    if verdict not in COLOURS:
        return RAISED, "raises", "black"
    if verdict == "PASS":
        return COLOURS[verdict], f"{row['error']:.0e}", "#1b5e20"
    return COLOURS[verdict], row["verdict"], "white"


def draw(found: list[dict[str, Any]], out: Path) -> None:
    plt = pyplot()
    plt.rcParams.update({"svg.hashsalt": "matrix", "svg.fonttype": "none"})

    cases = list(dict.fromkeys(row["case"] for one in found for row in one["results"]))
    columns = [(one, side) for one in found for side in SIDES]
    figure, axis = plt.subplots(figsize=(2.6 + 0.85 * len(columns), 0.6 + 0.22 * len(cases)))
    for x, (one, side) in enumerate(columns):
        rows = {row["case"]: row for row in one["results"] if row["side"] == side}
        left = x + 0.12 * (x // len(SIDES))
        for y, case in enumerate(cases):
            colour, text, ink = cell(rows[case])
            axis.add_patch(plt.Rectangle((left, y), 0.96, 0.92, color=colour, linewidth=0))
            where = (left + 0.48, y + 0.48)
            axis.text(*where, text, ha="center", va="center", color=ink, fontsize=6.5)
        label = "MLX alone" if side == "native" else "mlxshim"
        axis.text(left + 0.48, -0.25, label, ha="center", va="bottom", fontsize=7.5)
        if side == SIDES[0]:
            title = f"MLX {one['mlx']}"
            axis.text(left + 0.98, -1.3, title, ha="center", va="bottom", weight="bold", fontsize=9)
    axis.set(xlim=(-0.1, len(columns) + 0.5), ylim=(len(cases) + 0.2, -2.3))
    axis.set_yticks([y + 0.46 for y in range(len(cases))], cases, fontsize=7.5)
    axis.set_xticks([])
    axis.tick_params(length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)
    about = found[-1]
    system = "Linux" if "linux" in about["platform"].lower() else about["platform"].split("-")[0]
    axis.set_xlabel(
        f"{system}, {about['device']}. 4/2: attention of 4 query heads and 2 K/V heads. "
        "A case that passes shows its largest error against the loop.",
        fontsize=7.5,
    )
    figure.savefig(out, bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/matrix.svg"))
    options = parser.parse_args()
    found = [json.loads(file.read_text()) for file in options.files]
    draw(sorted(found, key=lambda one: [int(n) for n in one["mlx"].split(".")[:3]]), options.out)


if __name__ == "__main__":
    main()
