from __future__ import annotations

import errno
import io
import json
import os
import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

import slimc
from slimc import recipes
from slimc.cli import app
from slimc.cli.terminal import say
from slimc.errors import NumericsError, VerifyError
from slimc.progress import for_console
from slimc.runtime.devices import default_device

SMALL = ["--samples", "4", "--length", "32", "--batch", "2"]


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def run(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own, as a user does."""
    words = [sys.executable, "-m", "slimc", *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, timeout=300, **options)


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory, tiny_llama_folder: Path) -> tuple[Path, Result]:
    folder = tmp_path_factory.mktemp("compressed") / "small"
    return folder, invoke("compress", tiny_llama_folder, "-o", folder, *SMALL)


# ---------------------------------------------------------------------------------------------------- help, version


def test_version() -> None:
    result = invoke("--version")
    assert (result.exit_code, result.stdout) == (0, f"slimc {slimc.__version__}\n")


@pytest.mark.parametrize(
    "command",
    ["bench", "compress", "eval", "export", "generate", "inspect", "kernels", "plan", "recipes", "tune", "verify"],
)
def test_help_teaches_by_example(command: str) -> None:
    result = invoke(command, "--help")
    assert result.exit_code == 0
    assert "Examples" in result.stdout
    assert f"slimc {command} " in result.stdout


def test_paragraphs_of_help_are_not_broken_where_their_source_is() -> None:
    about = invoke("bench", "--help").stdout.split("Examples")[0]
    (paragraph,) = [part for part in re.split(r"\n\s*\n", about) if part.lstrip().startswith("linear:")]
    lines = paragraph.strip().split("\n")
    assert len(lines) > 1
    for line, following in pairwise(line.rstrip() for line in lines):
        # With margins of one, lines of 80 columns have room for 78: the next word found none.
        assert len(f"{line} {following.split()[0]}") > 78


def test_no_command_shows_the_help() -> None:
    assert "compress" in invoke().output


def test_help_is_quick_because_nothing_heavy_is_imported() -> None:
    code = (
        "import sys; from slimc.cli import main; sys.argv = ['slimc', '--help']\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)), file=sys.stderr)"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert process.stderr == "[]\n"
    assert "compress" in process.stdout


# ------------------------------------------------------------------------------------------------------------- plan


def test_a_plan_is_a_recipe_that_compress_runs(tiny_llama_folder: Path, tmp_path: Path) -> None:
    result = invoke("plan", tiny_llama_folder, "--budget", "3.4bpw", "-o", tmp_path / "plan.yaml", "-q", *SMALL)
    assert result.exit_code == 0, result.output
    assert "model.layers.0.mlp.down_proj" in result.stdout
    assert f"slimc compress {tiny_llama_folder} -o small --recipe {tmp_path / 'plan.yaml'}" in result.stdout
    done = invoke("compress", tiny_llama_folder, "-o", tmp_path / "small", "-r", tmp_path / "plan.yaml", "-q")
    assert done.exit_code == 0, done.output
    assert slimc.report(slimc.load(tmp_path / "small")).bits_per_weight <= 3.4


def test_a_plan_may_choose_from_a_menu_of_ones_own(tiny_llama_folder: Path, tmp_path: Path) -> None:
    expressions = "{w4: [{quantize: {bits: 4, group: 32}}], w2: [{quantize: {bits: 2}}]}"
    passes = f"passes: [calibrate, {{per_site: {{expressions: {expressions}}}}}, fuse]\n"
    (tmp_path / "menu.yaml").write_text(passes)
    result = invoke("plan", tiny_llama_folder, "-b", "3bpw", "--menu", tmp_path / "menu.yaml", "-q", *SMALL)
    assert result.exit_code == 0, result.output
    assert "w4 x " in result.stdout
    assert "Nothing was written" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-b", "3"], "'3' is no budget; write 3.2bpw"),
        (["-b", "1bpw"], "the least that the menu can reach"),
        (["-b", "3bpw", "-o", "plan.txt"], "ends in .yaml"),
        (["-b", "3bpw", "-o", f"{__file__}/plan.yaml"], "test_cli.py is a file"),
        (["-b", "3bpw", "--menu", "none.yaml"], "there is no recipe file 'none.yaml'"),
        (["-b", "3bpw", "--target", "speed"], "there is no target 'speed'; there are 'size', 'decode'"),
    ],
)
def test_a_plan_that_cannot_be_made_says_why(tiny_llama_folder: Path, arguments: list[str], message: str) -> None:
    result = invoke("plan", tiny_llama_folder, *arguments, "-q", *SMALL)
    assert (result.exit_code, message in result.stderr) == (2, True), result.output


def test_what_was_measured_for_a_plan_serves_the_next_one(tiny_llama_folder: Path, tmp_path: Path) -> None:
    kept = tmp_path / "measured.json"
    for budget in ("3.4bpw", "4bpw"):
        given = SMALL if budget == "3.4bpw" else []
        result = invoke("plan", tiny_llama_folder, "-b", budget, "--sensitivities", kept, "-q", *given)
        assert result.exit_code == 0, result.output
        assert f"(budget {budget})" in result.stdout
    result = invoke("plan", tiny_llama_folder, "-b", "4bpw", "--sensitivities", kept, "-q", *SMALL)
    assert result.exit_code == 2
    assert "a file that is not there yet" in " ".join(result.stderr.split())


def test_a_plan_does_not_replace_a_file_unasked(tiny_llama_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text("mine")
    result = invoke("plan", tiny_llama_folder, "-b", "3bpw", "-o", tmp_path / "plan.yaml", "-q")
    assert result.exit_code == 2
    assert "add --overwrite" in result.stderr
    assert (tmp_path / "plan.yaml").read_text() == "mine"


# ---------------------------------------------------------------------------------------------------------- recipes


def test_recipes_are_listed_and_printed() -> None:
    listing = invoke("recipes").stdout
    assert all(name in listing for name in recipes.names())
    assert not any(line.endswith(" ") for line in listing.splitlines())
    printed = invoke("recipes", "rtn-w4").stdout
    assert printed == recipes.load("rtn-w4").to_yaml()


# -------------------------------------------------------------------------------------------------------- end to end


def test_compress_writes_a_folder_and_says_what_it_did(compressed: tuple[Path, Result]) -> None:
    folder, result = compressed
    assert result.exit_code == 0, result.output
    assert (folder / "slimc.json").is_file()
    assert "14 layers take" in result.stdout
    assert "compress: done in" in result.stderr
    assert not folder.with_name("small.partial").exists()


def test_inspect_shows_every_layer_and_what_was_left(compressed: tuple[Path, Result]) -> None:
    folder, _ = compressed
    result = invoke("inspect", folder)
    assert result.exit_code == 0, result.output
    assert "model.layers.1.mlp.down_proj" in result.stdout
    assert "2:4 int4" in result.stdout
    left = result.stdout.split("Left dense:")[1]
    assert "lm_head" in left or "embed_tokens" in left
    assert "14 layers: " in left


def test_inspect_adds_up(compressed: tuple[Path, Result]) -> None:
    folder, _ = compressed
    record = json.loads(invoke("inspect", folder, "--json").stdout)
    totals = record["totals"]
    assert totals["sites"] == len(record["sites"]) == 14
    assert totals["site_weights"] == sum(row["shape"][0] * row["shape"][1] for row in record["sites"])
    promised = sum(row["bits"] * row["shape"][0] * row["shape"][1] for row in record["sites"]) / totals["site_weights"]
    assert totals["bits_per_weight"] == pytest.approx(promised, rel=0.01)
    on_disk = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert totals["file_bytes"] == on_disk > totals["site_bytes"] + totals["dense_bytes"]


def test_inspect_filters_by_name(compressed: tuple[Path, Result]) -> None:
    folder, _ = compressed
    record = json.loads(invoke("inspect", folder, "--json", "--sites", "*.mlp.*").stdout)
    assert len(record["sites"]) == 6
    assert "6 of 14 layers shown. The whole model:" in invoke("inspect", folder, "--sites", "*.mlp.*").stdout
    assert "shown" not in invoke("inspect", folder).stdout
    result = invoke("inspect", folder, "--sites", "*.moe.*")
    assert result.exit_code == 2
    assert "no compressed layer" in result.stderr


def test_inspect_writes_a_page(compressed: tuple[Path, Result], tmp_path: Path) -> None:
    folder, _ = compressed
    path = tmp_path / "report.html"
    result = invoke("inspect", folder, "--html", path)
    assert (result.exit_code, result.stdout) == (0, "")
    assert "14 layers; open it in a browser" in result.stderr
    assert "<h1>small</h1>" in path.read_text()
    again = invoke("inspect", folder, "--html", path)
    assert (again.exit_code, "already exists" in again.stderr) == (2, True)
    assert invoke("inspect", folder, "--html", path, "--overwrite").exit_code == 0


def test_inspect_prints_the_graph(compressed: tuple[Path, Result]) -> None:
    folder, _ = compressed
    result = invoke("inspect", folder, "--graph")
    assert result.exit_code == 0, result.output
    assert "slim.linear" in result.stdout


@pytest.mark.parametrize("which", ["dense", "compressed"])
def test_eval_measures_either_model(
    which: str, compressed: tuple[Path, Result], tiny_llama_folder: Path, english: Path
) -> None:
    model = tiny_llama_folder if which == "dense" else compressed[0]
    arguments = ["eval", model, "--text", english, "--windows", 2, "--length", 64]
    record = json.loads(invoke(*arguments, "--json", "--quiet").stdout)
    assert (record["windows"], record["length"]) == (2, 64)
    # A random model knows nothing: its perplexity is about the size of its vocabulary.
    assert 300 < record["perplexity"] < 500
    assert f"perplexity {record['perplexity']:.3f}" in invoke(*arguments).stdout


def test_generate_says_what_to_do_about_a_folder_without_a_tokenizer(
    compressed: tuple[Path, Result], tiny_llama_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "small"
    shutil.copytree(compressed[0], folder, ignore=shutil.ignore_patterns("tokenizer*"))
    arguments = ["generate", folder, "--prompt", "Alice", "--tokens", 2]
    refused = invoke(*arguments)
    assert refused.exit_code == 2
    advice = "copy tokenizer.json and tokenizer_config.json of the dense model"
    assert f"{folder} has no tokenizer, so it cannot read text; {advice}" in " ".join(refused.output.split())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_llama_folder / name, folder)
    assert invoke(*arguments).exit_code == 0


@pytest.mark.parametrize("which", ["dense", "compressed"])
def test_generate_continues_and_is_repeatable(
    which: str, compressed: tuple[Path, Result], tiny_llama_folder: Path
) -> None:
    model = tiny_llama_folder if which == "dense" else compressed[0]
    arguments = ["generate", model, "--prompt", "Alice [was", "--tokens", 8, "--temperature", 1, "--seed", 3]
    first, second = invoke(*arguments), invoke(*arguments)
    assert first.exit_code == 0, first.output
    assert first.stdout == second.stdout
    assert first.stdout.startswith("Alice [was")
    assert "tokens in" in first.stderr


def test_options_reach_the_recipe(tmp_path: Path, tiny_llama_folder: Path, english: Path) -> None:
    result = invoke(
        *("compress", tiny_llama_folder, "-o", tmp_path / "small", "--recipe", "slim-w4-2x4-grouped"),
        *("--calibration", english),
        *("--set", "quantize.bits=3", "--set", "quantize.group=32", "--skip", "low_rank", "--exclude", "*.layers.0.*"),
        *("--dump-dir", tmp_path / "dump", "--quiet", *SMALL),
    )
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    record = json.loads(invoke("inspect", tmp_path / "small", "--json").stdout)
    assert {row["expression"] for row in record["sites"]} == {"2:4 int3/32"}
    assert not any(".layers.0." in row["name"] for row in record["sites"])
    assert sum(".layers.0." in row["name"] for row in record["left"]) == 7
    assert record["calibration_tokens"] == 4 * 32
    assert len(list((tmp_path / "dump").glob("*.txt"))) >= 2


def test_a_recipe_may_round_the_inputs(tmp_path: Path, tiny_llama_folder: Path) -> None:
    recipe = tmp_path / "a8.yaml"
    recipe.write_text("passes: [{quantize: {group: 32}}, {activations: {kind: int8}}, fuse]", encoding="utf-8")
    folder = tmp_path / "small"
    words = ("compress", tiny_llama_folder, "-o", folder, "--recipe", recipe, "--quiet")
    result = invoke(*words, "--set", "activations.kind=fp8")
    assert result.exit_code == 0, result.output
    record = json.loads(invoke("inspect", folder, "--json").stdout)
    assert {row["expression"] for row in record["sites"]} == {"int4/32, fp8 inputs"}
    assert {row["unrounded"] for row in record["sites"]} == {None}
    assert "activation=2" in invoke("inspect", folder, "--graph").stdout
    result = invoke(*words, "--overwrite", "--set", "activations.kind=fp8", "--set", "quantize.bits=8")
    assert result.exit_code == 0, result.output
    shown = " ".join(invoke("inspect", folder).stdout.split())
    assert "inputs not rounded" in shown
    bad = invoke(*words, "--overwrite", "--set", "activations.bits=4")
    assert bad.exit_code != 0
    assert "activations: bits must be 8, not 4" in bad.output


# -------------------------------------------------------------------------------------- interrupted, resumed, replaced


def test_an_interrupted_run_says_how_to_resume_and_does(
    tmp_path: Path, tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from slimc.passes.journal import Journal

    arguments = ["compress", tiny_llama_folder, "-o", tmp_path / "small", "--quiet", *SMALL]
    write, written = Journal.write, []

    def interrupt_at_the_fourth(self: Journal, name: str, *rest: Any) -> None:
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(name)
        write(self, name, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "write", interrupt_at_the_fourth)
        result = invoke(*arguments)
    assert result.exit_code == 130
    assert "--resume goes on from there" in result.stderr
    assert not (tmp_path / "small").exists()

    refused = invoke("compress", "no-model-is-opened", *arguments[2:])
    assert refused.exit_code == 2
    assert "--resume" in refused.stderr

    rewritten = []

    def record(self: Journal, name: str, *rest: Any) -> None:
        rewritten.append(name)
        write(self, name, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "write", record)
        resumed = invoke(*arguments, "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert not set(written) & set(rewritten)
    assert not (tmp_path / "small.partial").exists()

    assert invoke(*arguments[:2], "-o", tmp_path / "straight", "--quiet", *SMALL).exit_code == 0
    for path in (tmp_path / "straight").glob("slimc*"):
        assert path.read_bytes() == (tmp_path / "small" / path.name).read_bytes()


@pytest.mark.parametrize("moment", ["record_tokens", "begin"])
def test_an_interruption_before_the_first_layer_is_resumed_too(
    moment: str, tmp_path: Path, tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from slimc.passes.journal import Journal

    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    arguments = ["compress", tiny_llama_folder, "-o", tmp_path / "small", "--set", "low_rank.rank=1", "--quiet", *SMALL]
    with monkeypatch.context() as patch:
        patch.setattr(Journal, moment, interrupt)
        assert invoke(*arguments).exit_code == 130
    result = invoke(*arguments, "--resume")
    assert result.exit_code == 0, result.output


def test_a_run_that_failed_leaves_nothing_in_the_way(tmp_path: Path, tiny_llama_folder: Path, english: Path) -> None:
    arguments = ["compress", tiny_llama_folder, "-o", tmp_path / "small", "--calibration", english, "--quiet"]
    assert "give a longer text" in invoke(*arguments, "--samples", 1000).stderr
    result = invoke(*arguments, *SMALL)
    assert result.exit_code == 0, result.output


def interrupted(arguments: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a command that is interrupted after its first layer."""
    from slimc.passes.journal import Journal

    write = Journal.write

    def interrupt(self: Journal, *record: Any) -> None:
        write(self, *record)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "write", interrupt)
        assert invoke(*arguments).exit_code == 130


def test_a_corrected_command_is_not_refused(
    tmp_path: Path, tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from slimc.passes.journal import Journal

    arguments = ["compress", tiny_llama_folder, "-o", tmp_path / "small", "--recipe", "rtn-w4", "--quiet"]

    def fail(self: Journal, *record: object) -> None:
        raise NumericsError("NaN in x")

    for corrected in ([], ["--resume"]):
        with monkeypatch.context() as patch:
            patch.setattr(Journal, "write", fail)
            assert "NaN in x" in invoke(*arguments, "--set", "quantize.bits=3").stderr
        assert (tmp_path / "small.partial" / "journal.json").is_file()
        result = invoke(*arguments, *corrected)
        assert result.exit_code == 0, result.output
        (tmp_path / "small").rename(tmp_path / f"done-{len(corrected)}")


def test_overwrite_discards_what_an_interrupted_run_left(
    tmp_path: Path, tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments: list[object] = ["compress", tiny_llama_folder, "-o", tmp_path / "small", "--recipe", "rtn-w4", "--quiet"]
    interrupted(arguments, monkeypatch)
    result = invoke(*arguments, "--set", "quantize.bits=3", "--overwrite")
    assert (result.exit_code, result.stderr) == (0, "")
    assert "3." in result.stdout.split("layers take")[1]


def test_resume_and_overwrite_start_again_where_the_run_is_another(
    tmp_path: Path, tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments: list[object] = ["compress", tiny_llama_folder, "-o", tmp_path / "small", "--recipe", "rtn-w4", "--quiet"]
    interrupted(arguments, monkeypatch)
    other = [*arguments, "--set", "quantize.bits=3", "--resume"]
    refused = invoke(*other)
    assert refused.exit_code == 2
    assert "belongs to another run" in refused.stderr
    result = invoke(*other, "--overwrite")
    assert result.exit_code == 0, result.output
    assert "starting again" in result.stderr
    assert not (tmp_path / "small.partial").exists()


def test_calibration_options_are_ignored_with_a_note_where_nothing_calibrates(
    tmp_path: Path, tiny_llama_folder: Path
) -> None:
    result = invoke("compress", tiny_llama_folder, "-o", tmp_path / "small", "-r", "rtn-w4", "--quiet", *SMALL)
    assert result.exit_code == 0, result.output
    assert result.stderr == "Ignored: --samples, --length, --batch. The recipe rtn-w4 does not calibrate.\n"


def test_an_existing_folder_is_replaced_only_on_demand(tmp_path: Path, tiny_llama_folder: Path) -> None:
    arguments = ["compress", tiny_llama_folder, "-o", tmp_path / "small", "--recipe", "rtn-w4", "--quiet"]
    assert invoke(*arguments).exit_code == 0
    before = (tmp_path / "small" / "slimc.json").read_bytes()
    changed = [*arguments, "--set", "quantize.bits=8"]
    refused = invoke(*changed)
    assert refused.exit_code == 2
    assert "add --overwrite to replace it" in refused.stderr
    assert (tmp_path / "small" / "slimc.json").read_bytes() == before
    assert invoke(*changed, "--overwrite").exit_code == 0
    assert (tmp_path / "small" / "slimc.json").read_bytes() != before


def test_a_complete_folder_needs_no_resuming(tmp_path: Path, tiny_llama_folder: Path) -> None:
    arguments = ["compress", tiny_llama_folder, "-o", tmp_path / "small", "--recipe", "slim-w4", "--quiet", *SMALL]
    few = ["--skip", "low_rank"]
    assert invoke(*arguments, *few).exit_code == 0
    run = tmp_path / "small" / "run.json"
    before = run.read_bytes()
    again = invoke(*arguments, *few, "--resume")
    assert again.exit_code == 0, again.output
    assert "is complete, of the same model, calibration and recipe, so there is nothing" in again.stdout
    for changed in ([], [*few, "--set", "quantize.bits=3"], [*few, "--set", "calibrate.seed=1"]):
        refused = invoke(*arguments, *changed, "--resume")
        assert refused.exit_code == 2
        assert "is complete, but with another recipe" in refused.stderr
    assert run.read_bytes() == before
    run.unlink()
    without_record = invoke(*arguments, *few, "--resume")
    assert without_record.exit_code == 0
    assert "keeps no record of its model and calibration text" in without_record.stdout


def test_a_complete_folder_of_another_model_or_text_is_not_taken_for_this_one(
    tmp_path: Path, tiny_llama_folder: Path, english: Path
) -> None:
    model = shutil.copytree(tiny_llama_folder, tmp_path / "model")
    arguments = ["compress", model, "-o", tmp_path / "small", "--skip", "low_rank", "--resume", "--quiet", *SMALL]
    assert invoke(*arguments, "--calibration", english).exit_code == 0
    before = (tmp_path / "small" / "slimc.json").read_bytes()

    def refusal(*options: object) -> str:
        refused = invoke(*arguments, *options)
        assert refused.exit_code == 2, refused.output
        assert "add --overwrite to replace it" in refused.stderr
        return refused.stderr

    assert "of another run: the calibration changed" in refusal()
    assert "the choice of sites changed" in refusal("--calibration", english, "--exclude", "*q_proj")
    elsewhere = json.loads((tmp_path / "small" / "run.json").read_text())
    elsewhere["fingerprint"] |= {"number of threads": 99, "version of torch": "1.0", "device": "an abacus"}
    (tmp_path / "small" / "run.json").write_text(json.dumps(elsewhere))
    assert invoke(*arguments, "--calibration", english).exit_code == 0
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    assert "the model's weights changed" in refusal("--calibration", english)
    assert (tmp_path / "small" / "slimc.json").read_bytes() == before


def test_a_folder_that_was_put_aside_is_found_before_any_work(tmp_path: Path, compressed: tuple[Path, Result]) -> None:
    aside = tmp_path / ".small.abcd_123.old" / "small"
    shutil.copytree(compressed[0], aside)
    refused = invoke("compress", "no-such-model", "-o", tmp_path / "small")
    assert refused.exit_code == 2
    assert "small: already exists; add --overwrite" in refused.stderr
    aside.parent.mkdir()
    (tmp_path / "small").rename(aside)
    said = invoke("generate", tmp_path / "small", "--prompt", "a", "--tokens", "1")
    assert said.exit_code == 0, said.output


def test_files_of_others_are_never_replaced(tmp_path: Path, tiny_llama_folder: Path) -> None:
    precious = tmp_path / "small" / "precious.txt"
    precious.parent.mkdir()
    precious.write_text("mine")
    refused = invoke("compress", tiny_llama_folder, "-o", tmp_path / "small", "--overwrite")
    assert refused.exit_code == 2
    assert "slimc did not write" in refused.stderr
    assert precious.read_text() == "mine"


# ------------------------------------------------------------------------------- what is printed, and where it runs


def test_paths_and_names_are_printed_as_they_are(tmp_path: Path, tiny_llama_folder: Path) -> None:
    folder = tmp_path / "x[" / "b]:key:\x1b[2J"
    result = invoke("compress", tiny_llama_folder, "-o", folder, "--recipe", "rtn-w4", "--quiet")
    assert result.exit_code == 0, result.output
    assert f"{tmp_path}/x[/b]:key:\\x1b[2J: " in result.stdout
    assert "\x1b" not in result.output


def test_names_in_a_folder_are_no_markup_and_no_commands(tmp_path: Path, compressed: tuple[Path, Result]) -> None:
    folder = tmp_path / "hostile"
    shutil.copytree(compressed[0], folder)
    name, hostile = "model.layers.0.mlp.up_proj", "[/x]:key:\x1b[2J\x9b"
    record = json.loads((folder / "slimc.json").read_text())
    text = json.dumps(record).replace(name, json.dumps(hostile)[1:-1])
    report = json.loads(text)["report"]
    (folder / "slimc.json").write_text(json.dumps(record | {"report": report}))
    result = invoke("inspect", folder)
    assert result.exit_code == 0, result.output
    assert "[/x]:key:\\x1b[2J\\x9b" in result.stdout
    as_json = invoke("inspect", folder, "--json").stdout
    assert hostile in [row["name"] for row in json.loads(as_json)["sites"]]
    assert not {"\x1b", "\x9b"} & {*result.output, *as_json}


def test_generated_text_keeps_its_lines_and_tabs(capsys: pytest.CaptureFixture[str]) -> None:
    say("a\tb\n:key: [bold]\x1b[31m\ud800", end="")
    assert capsys.readouterr().out == "a\tb\n:key: [bold]\\x1b[31m\\ud800"


def test_live_progress_shows_names_as_they_are() -> None:
    terminal = io.StringIO()
    console = Console(file=terminal, force_terminal=True, width=120, _environ={"TERM": "xterm"})
    with for_console(console) as progress:
        progress.start("[/y]", 2)
        progress.advance("[/y]", note="[/x]\x1b[2J")
    assert "[/y]" in terminal.getvalue()
    assert "[/x]\\x1b[2J" in terminal.getvalue()


@pytest.mark.parametrize(("accelerator", "chosen"), [("cuda", "cuda"), ("mps", "cpu"), (None, "cpu")])
def test_only_cuda_is_chosen_unasked(accelerator: str | None, chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    found = None if accelerator is None else torch.device(accelerator)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: found)
    assert default_device().type == chosen


# -------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compress", "{missing}", "-o", "{out}"], "missing"),
        (["compress", "{model}", "-o", "{out}", "--recipe", "slim-w4-24"], "did you mean 'slim-w4-2x4'?"),
        (
            ["compress", "{model}", "-o", "{out}", "--recipe", "{recipe}"],
            "'pases' (did you mean 'passes'?)",
        ),
        (["compress", "{model}", "-o", "{out}", "--recipe", "{order}"], "prune needs calibrate before it"),
        (["compress", "{model}", "-o", "{out}", "--set", "bits=3"], "write PASS.OPTION=VALUE"),
        (["compress", "{model}", "-o", "{out}", "--set", "quantize.bits=77"], "bits"),
        (["compress", "{model}", "-o", "."], "'.' has no name of its own"),
        (["compress", "{model}", "-o", "/"], "'/' has no name of its own"),
        (["compress", "{model}", "-o", "{out}/.."], "has no name of its own"),
        (["compress", "{model}", "-o", "{out}", "-r", "rtn-w4", "--set", "calibrate.samples=3"], "no pass 'calibrate'"),
        (["compress", "{model}", "-o", "{out}", "--skip", "prun"], "did you mean 'prune'?"),
        (["compress", "{model}", "-o", "{out}", "--calibration", "{missing}"], "cannot be read: No such file"),
        (["compress", "{model}", "-o", "{out}", "--calibration", "{letter}"], "the text has 1 token, but"),
        (["compress", "{model}", "-o", "{out}", "--calibration", "{letter}"], "--samples and --length, in Python"),
        (["compress", "{model}", "-o", "{out}", "--calibration", "{empty}"], "empty.txt is empty"),
        (["compress", "{model}", "-o", "{out}", "--calibration", "sefl"], "no such file (did you mean 'self'?)"),
        (["compress", "{model}", "-o", "{out}", "--calibration", "{binary}"], "not UTF-8"),
        (["compress", "{model}", "-o", "{out}", "--device", "abacus"], "no device 'abacus'; name cpu, cuda or cuda:N"),
        (["compress", "{model}", "-o", "{empty}"], "is a file"),
        (["compress", "{small}", "-o", "{out}"], "compressed already"),
        (["eval", "{model}", "--text", "{missing}"], "cannot be read: No such file"),
        (["eval", "{model}", "--text", "{empty}"], "empty.txt is empty"),
        (["eval", "{model}", "--text", "{letter}", "--length", "64"], "windows: --windows and --length"),
        (["eval", "{model}", "--text", "{letter}"], "--length 1024 is more than the 256 tokens that this Llama"),
        (["eval", "{missing}", "--text", "{letter}"], "missing"),
        (["generate", "{model}", "--prompt", ""], "the prompt is empty"),
        (["generate", "{model}", "--prompt", "Hi", "--chat"], "no chat template"),
        (["inspect", "{missing}"], "no such folder"),
        (["inspect", "{model}"], "not a folder that slimc wrote"),
        (["recipes", "slim"], "there is no recipe 'slim'"),
    ],
)
def test_bad_input_is_one_clear_message(
    arguments: list[str], message: str, tmp_path: Path, tiny_llama_folder: Path, compressed: tuple[Path, Result]
) -> None:
    places = {
        "model": tiny_llama_folder,
        "small": compressed[0],
        "missing": tmp_path / "missing",
        "out": tmp_path / "out",
        "empty": tmp_path / "empty.txt",
        "letter": tmp_path / "letter.txt",
        "binary": tmp_path / "binary.bin",
        "recipe": tmp_path / "recipe.yaml",
        "order": tmp_path / "order.yaml",
    }
    places["empty"].write_text("\n")
    places["letter"].write_text("a")
    places["binary"].write_bytes(b"\xff\xfe\xff")
    places["recipe"].write_text("pases: [fuse]")
    places["order"].write_text("passes: [quantize, prune, fuse]")
    result = invoke(*(argument.format_map(places) for argument in arguments))
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.output
    assert result.stdout == ""
    assert not places["out"].exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["comprss"], "Did you mean 'compress'"),
        (["compress", "model"], "--output"),
        (["compress", "model", "-o", "out", "--samples", "0"], "--samples"),
        (["compress", "model", "-o", "out", "--dtype", "float"], "--dtype"),
        (["generate", "model"], "--prompt"),
    ],
)
def test_bad_usage_exits_with_2(arguments: list[str], message: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr


# ------------------------------------------------------------------------------------- what becomes of an exception


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (NumericsError("NaN in x"), 2, "error: NaN in x\n"),
        (VerifyError("node y"), 1, "error: node y\n"),
        (OSError(errno.ENOSPC, "No space left on device", "out/x"), 2, "the disk is full (out/x)"),
        (PermissionError(errno.EACCES, "Permission denied", "out"), 2, "error: out: Permission denied\n"),
        (ZeroDivisionError("division by zero"), 1, "(ZeroDivisionError: division by zero)"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_exceptions_become_exit_codes(
    error: BaseException, code: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(name: object) -> None:
        raise error

    monkeypatch.setattr(recipes, "load", fail)
    result = invoke("recipes", "any")
    assert result.exit_code == code
    assert message in result.stderr
    assert ("--debug" in result.stderr) == isinstance(error, ZeroDivisionError)


def test_debug_shows_the_traceback() -> None:
    process = run("--debug", "recipes", "slim")
    assert process.returncode == 1
    assert "Traceback" in process.stderr
    assert "RecipeError: there is no recipe 'slim'" in process.stderr


def test_the_command_as_a_process(tmp_path: Path) -> None:
    process = run("compress", tmp_path / "missing", "-o", tmp_path / "out")
    assert process.returncode == 2
    assert process.stderr.startswith("error: ")
    assert "missing" in process.stderr
    assert "Traceback" not in process.stderr


def test_a_closed_pipe_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        process = subprocess.run(
            [sys.executable, "-m", "slimc", "recipes"], stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60
        )
    finally:
        os.close(writer)
    assert "Traceback" not in process.stderr
    assert "error" not in process.stderr


# ---------------------------------------------------------------------------------------------------------------- tune


def test_tune_shows_the_choices(compressed: tuple[Path, Result]) -> None:
    result = invoke("tune", compressed[0], "--device", "cpu")
    assert result.exit_code == 0
    assert "on CUDA GPUs only" in result.stderr
    assert "model.layers.0.mlp.down_proj" in result.stdout
    assert "decode" in result.stdout


def test_tune_wants_a_compressed_folder(tiny_llama_folder: Path) -> None:
    result = invoke("tune", tiny_llama_folder)
    assert result.exit_code == 2
    assert "is no folder that slimc wrote" in result.stderr


# ------------------------------------------------------------------------------------------------------------- bench


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "finds no CUDA GPU here"),
        (["linear", "--tokens", "1,x"], "--tokens takes whole numbers above 0"),
        (["generate", "--batches", "0"], "--batches takes whole numbers above 0"),
        (["generate", "--models", "llama-2-70b"], "generate has no model 'llama-2-70b'"),
        (["--models", "lama-3-8b"], "did you mean 'llama-3-8b'"),
    ],
)
def test_bench_says_what_it_cannot_do(arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = invoke("bench", *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


def test_bench_runs_both_and_writes_the_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from slimc.bench import generate, linear

    asked: list[object] = []

    def measure_layers(models: object, tokens: object, *, save: Any) -> dict[str, Any]:
        asked.append((models, tokens))
        save({"rows": ["layers"]})
        return {"rows": ["layers"]}

    def measure_models(models: object, *, batches: object, save: Any) -> None:
        asked.append((models, batches))
        save({"rows": ["models"]})

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(linear, "run", measure_layers)
    monkeypatch.setattr(linear, "plot", lambda rows, to: asked.append((rows, to)))
    monkeypatch.setattr(generate, "run", measure_models)
    options = ("--models", "llama-3-8b", "--tokens", "1, 16", "--batches", "4")
    result = invoke("bench", *options, "-o", tmp_path / "new", "--plot", tmp_path / "a.png")
    assert result.exit_code == 0
    assert asked.pop(1) == (["layers"], tmp_path / "a.png")
    assert asked == [(["llama-3-8b"], [1, 16]), (["llama-3-8b"], [4])]
    assert json.loads((tmp_path / "new" / "linear.json").read_text()) == {"rows": ["layers"]}
    assert json.loads((tmp_path / "new" / "generate.json").read_text()) == {"rows": ["models"]}
