"""``Report.to_html`` and ``Report.to_json`` with a path."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

from slimc.errors import InputError
from slimc.passes.report import LeftRow, Report, SiteRow

VOID = {"meta"}
"""Elements without an end."""


class Page(HTMLParser):
    """Collects texts and attributes, and checks that elements are closed in order."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(content)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def all(self, tag: str, name: str = "") -> list[dict[str, str | None]]:
        return [found for one, found in self.tags if one == tag and (found.get("class") or "") == name]


def row(name: str, bits: float = 4.0, output_error: float | None = 0.1) -> SiteRow:
    return SiteRow(name, (64, 32), "int4/32", bits, 0.2, 0.3, output_error)


def report(*sites: SiteRow, left: tuple[LeftRow, ...] = ()) -> Report:
    return Report([{"quantize": {"bits": 4}}, "fuse"], list(sites), list(left), calibration_tokens=512)


def written(path: Path, one: Report, title: str = "model") -> Page:
    one.to_html(path / "report.html", title=title)
    return Page((path / "report.html").read_text("utf-8"))


BLOCKS = [row(f"model.layers.{block}.mlp.{kind}", 3 + block, 0.1 + block / 10) for block in range(3) for kind in "ab"]


def test_totals_rows_and_reasons(tmp_path: Path) -> None:
    page = written(tmp_path, report(*BLOCKS, left=(LeftRow("lm_head", (300, 32), "output embedding"),)))
    text = "\n".join(page.words)
    assert "4.000" in page.words
    assert "6.1 kB" in page.words
    assert "in 6 layers; 24.6 kB in 16 bits" in page.words
    assert "mean output error; largest 0.3000" in page.words
    assert {"lm_head", "300 × 32", "output embedding", "9,600"} <= set(page.words)
    assert "- quantize:\n    bits: 4\n- fuse\n" in text
    assert [one["style"] for one in page.all("span", "bar bits")] == [
        f"width:{share}%" for share in ("60.0", "60.0", "80.0", "80.0", "100.0", "100.0")
    ]
    assert len(page.all("span", "bar error")) == 2 * 6


def test_a_line_for_each_kind_of_layer(tmp_path: Path) -> None:
    page = written(tmp_path, report(*BLOCKS, row("lm_head")))
    lines = page.all("polyline")
    assert len(lines) == 2
    heights = [float(point.split(",")[1]) for point in (lines[0]["points"] or "").split()]
    assert heights == sorted(heights, reverse=True), "a larger error is drawn higher"
    # Errors of 0.1 to 0.3 under a ceiling of 0.4, on a scale without an offset.
    steps = [earlier - later for earlier, later in pairwise(heights)]
    assert steps == pytest.approx([steps[0]] * 2, abs=0.11)
    assert {"mlp.a", "mlp.b", "0.4"} <= set(page.words)


def test_names_without_blocks_and_errors_that_nobody_measured(tmp_path: Path) -> None:
    page = written(tmp_path, report(row("first", output_error=None), row("second", output_error=None)))
    assert "Weight error by depth" in page.words
    assert "all layers, in order" in page.words
    assert "output error" not in page.words
    assert not any("mean output error" in word for word in page.words)


def test_a_single_layer_without_an_error(tmp_path: Path) -> None:
    single = SiteRow("only", (8, 8), "int8 per channel", 8.0, 0.0)
    assert len(written(tmp_path, report(single)).all("circle")) == 1


def test_experts_are_one_kind(tmp_path: Path) -> None:
    experts = [row(f"layers.{block}.experts.{expert}.up") for block in range(2) for expert in range(4)]
    page = written(tmp_path, report(*experts))
    assert len(page.all("polyline")) == 1
    assert "experts.*.up" in page.words


def test_names_are_escaped_and_nothing_is_fetched(tmp_path: Path) -> None:
    evil = "</td><script>alert(1)</script>\x1b[2J{body}"
    unrounded = SiteRow(f"a.0.{evil}", (8, 8), evil, 4.0, 0.1, unrounded=evil, fallback=evil)
    page = written(tmp_path, report(unrounded, left=(LeftRow(evil, (8, 8), evil),)), title=evil)
    assert len(page.all("script")) == 1
    assert evil.replace("\x1b", r"\x1b") in page.words
    content = (tmp_path / "report.html").read_text("utf-8")
    assert "\x1b" not in content
    assert not re.search(r"https?:|//|src=|href=|@import|url\(", content.partition("<script>")[0])
    policy = next(found["content"] for _, found in page.tags if found.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none';")


def test_equal_reports_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("a.html", "b.html"):
        report(*BLOCKS).to_html(tmp_path / name)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


@pytest.mark.parametrize("form", ["html", "json"])
def test_existing_files_are_not_overwritten_silently(tmp_path: Path, form: str) -> None:
    path, write = tmp_path / "report", getattr(report(*BLOCKS), f"to_{form}")
    path.write_text("mine")
    with pytest.raises(InputError, match="already exists.*--overwrite"):
        write(path)
    assert path.read_text() == "mine"
    write(path, overwrite=True)
    assert path.read_text() != "mine"
    with pytest.raises(InputError, match="is a folder"):
        write(tmp_path, overwrite=True)


def test_json_reads_back(tmp_path: Path) -> None:
    one = report(*BLOCKS, left=(LeftRow("lm_head", (300, 32), "output embedding"),))
    assert one.to_json(tmp_path / "report.json") == one.to_json()
    assert Report.from_json(json.loads((tmp_path / "report.json").read_text())) == one
