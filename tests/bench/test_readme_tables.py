"""The tables in README.md and docs/results.md: made of results, and in step with them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from slimc.bench.linear import SERVED

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    """The script, which is no part of the package."""
    spec = importlib.util.spec_from_file_location("readme_tables", ROOT / "benchmarks" / "readme_tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_texts_have_the_figures_of_the_files(tables: ModuleType) -> None:
    texts = [path.read_text("utf-8") for path in tables.TEXTS]
    for text in texts:
        assert tables.fill(text, tables.read_results()) == text
    assert all(any(f"<!-- {name} -->" in text for text in texts) for name in tables.TABLES)


def test_a_form_stands_in_one_line_with_its_kernels(tables: ModuleType) -> None:
    def row(layer: str, tokens: int, kernel: str, ratio: float) -> dict[str, object]:
        return {"form": "f", "layer": layer, "tokens": tokens, "kernel": kernel, "ratio": ratio, "held": 5 * 4 * 8 // 8}

    rows = [row("4x8", 1, "cuda-stream", 2.0), row("4x8", 256, "cuda-prefill", 0.5)]
    rows += [row("8x4", tokens, "cuda-stream", 1.25) for tokens in (1, 256)]
    titles, _, line = tables.forms_table(rows)
    assert titles == "| form | bits | kernels | 4 x 8 | 8 x 4 |"
    assert line == "| f | 5.0 | `stream`, `prefill` | 2.00 / 0.50 | 1.25 / 1.25 |"


def test_means_stand_where_all_served_layers_were_measured(tables: ModuleType) -> None:
    def row(layer: str, tokens: int, ratio: float) -> dict[str, object]:
        return {"model": "m", "layer": layer, "tokens": tokens, "over_cublas": ratio}

    rows = [row(layer, 1, ratio) for layer, ratio in zip((*SERVED, "gate"), (1, 1, 4, 4, 9), strict=True)]
    rows += [row("qkv", 16, 3)]
    rows[0]["over_int4"] = 2.0
    assert tables.linear_table(rows) == ["| tokens | m: over bf16 |", "|---|---|", "| 1 | 2.00 x |", "| 16 |  |"]


def test_whole_models_stand_beside_the_fastest_dense_one(tables: ModuleType) -> None:
    def row(variant: str, speed: float, memory: float, compiled: float | None = None) -> dict[str, object]:
        prompts = {"prompt_milliseconds": 30.4, "compiled_prompt_milliseconds": compiled}
        figures = {"tokens_per_second": speed, "memory": memory, **prompts}
        return {"model": "m", "batch": 1, "variant": variant, **figures}

    rows = [row("dense", 80, 14), row("dense, tuned", 100, 14), row("slimc", 250, 3.5, 12.6)]
    *_, tuned, last = tables.generate_table(rows)
    assert tuned == "| m | 1 | dense, tuned | 100 (1.00 x) | 30 ms | 14.0 GB (1.00 x) |"
    assert last == "| m | 1 | slimc | 250 (2.50 x) | 30 ms, compiled 13 ms | 3.5 GB (0.25 x) |"


def test_a_table_replaces_what_stood_in_its_place(tables: ModuleType) -> None:
    rows = [{"model": "m", "layer": layer, "tokens": 1, "over_cublas": 2.0} for layer in SERVED]
    text = "before\n<!-- gpu-linear -->\nold\n<!-- end -->\nafter\n<!-- gpu-generate -->\nkept\n<!-- end -->\n"
    filled = tables.fill(text, {"gpu-linear": rows})
    table = "\n".join(tables.linear_table(rows))
    assert filled == text.replace("old", f"\n{table}\n")
    assert tables.fill(filled, {"gpu-linear": rows}) == filled
    assert tables.fill("no table\n", {"gpu-linear": rows}) == "no table\n"
