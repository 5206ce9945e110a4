"""The tables of GPU figures in README.md and docs/results.md, made of the files of results: none is copied by hand.

    python benchmarks/readme_tables.py            (writes them into the texts)
    python benchmarks/readme_tables.py --check    (fails if they are not what the files give)

A table stands between a line like ``<!-- gpu-linear -->``, ``gpu-generate`` or ``gpu-forms``, and ``<!-- end -->``;
the files are written with ``--json`` by the benchmarks of these names.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from slimc.bench.linear import SERVED, geometric_mean

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TEXTS = (ROOT / "README.md", ROOT / "docs" / "results.md")

Row = dict[str, Any]


def linear_table(rows: Sequence[Row]) -> list[str]:
    """Return the mean ratios of layers: over bf16, over the fastest int4 kernel, with rounded inputs, and decoded."""
    served = [row for row in rows if row["layer"] in SERVED]
    models = list(dict.fromkeys(row["model"] for row in served))
    counts = sorted({row["tokens"] for row in served})

    def mean(model: str, count: int, key: str) -> str:
        of = [row for row in served if (row["model"], row["tokens"]) == (model, count)]
        layers = {row["layer"] for row in served if row["model"] == model}
        whole = {row["layer"] for row in of} == layers and all(key in row for row in of)
        return f"{geometric_mean([row[key] for row in of]):.2f} x" if whole else ""

    columns = {
        "over bf16": "over_cublas",
        "over int4": "over_int4",
        "int8 inputs, over bf16": "int8_over_cublas",
        "`cuda-dense`, over bf16": "fallback_over_cublas",
    }
    cells = {
        (model, title): [mean(model, count, key) for count in counts]
        for model in models
        for title, key in columns.items()
    }
    kept = [place for place, values in cells.items() if any(values)]
    return _table(
        ["tokens", *(f"{model}: {title}" for model, title in kept)],
        [[str(count), *(cells[place][index] for place in kept)] for index, count in enumerate(counts)],
    )


def generate_table(rows: Sequence[Row]) -> list[str]:
    """Return speed and memory of whole models, beside those of the fastest dense one of the same batch."""
    lines = []
    for row in rows:
        alike = [one for one in rows if (one["model"], one["batch"]) == (row["model"], row["batch"])]
        dense = [one for one in alike if one["variant"].startswith("dense")]
        best = max(dense, key=lambda one: one["tokens_per_second"], default=None)
        speed = f" ({row['tokens_per_second'] / best['tokens_per_second']:.2f} x)" if best else ""
        memory = f" ({row['memory'] / best['memory']:.2f} x)" if best else ""
        lines.append([
            row["model"],
            str(row["batch"]),
            row["variant"],
            f"{row['tokens_per_second']:.0f}{speed}",
            _prompt(row),
            f"{row['memory']:.1f} GB{memory}",
        ])  # fmt: skip
    return _table(["model", "batch", "weights", "tokens/s", "prompt", "memory, at most"], lines)


def forms_table(rows: Sequence[Row]) -> list[str]:
    """Return for each form, beside its kernels and bits a weight, how fast it is over dense in each layer."""
    layers, counts = ({row[key]: None for row in rows} for key in ("layer", "tokens"))
    of = {(row["form"], row["layer"], row["tokens"]): row for row in rows}
    lines = []
    for form in dict.fromkeys(row["form"] for row in rows):
        alike = [row for row in rows if row["form"] == form]
        kernels = dict.fromkeys(f"`{row['kernel'].removeprefix('cuda-')}`" for row in alike)
        sides = [int(side) for side in alike[0]["layer"].split("x")]
        bits = 8 * alike[0]["held"] / (sides[0] * sides[1])
        speeds = [" / ".join(f"{of[form, layer, count]['ratio']:.2f}" for count in counts) for layer in layers]
        lines.append([form, f"{bits:.1f}", ", ".join(kernels), *speeds])
    return _table(["form", "bits", "kernels", *(layer.replace("x", " x ") for layer in layers)], lines)


def _prompt(row: Row) -> str:
    compiled = row.get("compiled_prompt_milliseconds")
    return f"{row['prompt_milliseconds']:.0f} ms" + ("" if compiled is None else f", compiled {compiled:.0f} ms")


def _table(titles: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}", *(f"| {' | '.join(cells)} |" for cells in lines)]


TABLES: dict[str, tuple[str, Callable[[Sequence[Row]], list[str]]]] = {
    "gpu-linear": ("gpu-linear-h100.json", linear_table),
    "gpu-generate": ("gpu-generate-h100.json", generate_table),
    "gpu-forms": ("gpu-forms-h100.json", forms_table),
}
"""What makes a table, by its name in the text: a file of results, and a function of its rows."""


def fill(text: str, results: Mapping[str, Sequence[Row]]) -> str:
    """Return a text with its tables made anew from results, by the tables' names; it need not have all of them."""
    for name, rows in results.items():
        before, begin, rest = text.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        if end:
            text = "\n".join([before + begin, *TABLES[name][1](rows), "", end + after])
    return text


def read_results() -> dict[str, Sequence[Row]]:
    """Return the rows of every table's file."""
    return {name: json.loads((RESULTS / file).read_text("utf-8"))["rows"] for name, (file, _) in TABLES.items()}


def main() -> None:
    """Write the tables, or check them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a table is not up to date")
    options = parser.parse_args()
    results = read_results()
    for path in TEXTS:
        text = path.read_text("utf-8")
        filled = fill(text, results)
        if not options.check:
            path.write_text(filled, "utf-8")
        elif filled != text:
            sys.exit(
                f"tables in {path.name} are not those of benchmarks/results; run python benchmarks/readme_tables.py"
            )


if __name__ == "__main__":
    main()
