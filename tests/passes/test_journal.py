"""The journal: a run that dies anywhere and is resumed gives the same bytes, and no other run is mistaken for it."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import slimc
from slimc.errors import FormatError, InputError, ResumeError
from slimc.passes import Calibrate, Fuse, LowRank, Prune, Quantize
from slimc.passes.journal import Journal, discard

PASSES = [Calibrate(samples=4, length=12, batch=2), Quantize(), Prune(), LowRank(rank=2, bits=4, group=4), Fuse()]


class Killed(BaseException):
    """What a crash looks like from inside."""


def saved(small: nn.Module, folder: Path) -> dict[str, bytes]:
    slimc.save(small, folder)
    return {path.name: path.read_bytes() for path in folder.glob("slimc*")}


@pytest.mark.parametrize("position", range(5))
def test_a_run_interrupted_at_any_site_is_resumed_byte_for_byte(
    position: int, network: nn.Module, batches: list[Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = saved(slimc.compile(network, batches, PASSES), tmp_path / "straight")
    write, written = Journal.write, []

    def die(self: Journal, name: str, *rest: Any) -> None:
        if len(written) == position:
            raise Killed
        written.append(name)
        write(self, name, *rest)

    before = {name: value.clone() for name, value in network.state_dict().items()}
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "write", die)
        if position < 4:
            with pytest.raises(Killed):
                slimc.compile(network, batches, PASSES, journal=tmp_path / "journal", inplace=True)
        else:
            slimc.compile(network, batches, PASSES, journal=tmp_path / "journal")
    assert network.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    solved: list[str] = []

    def record(self: Journal, name: str, *rest: Any) -> None:
        solved.append(name)
        write(self, name, *rest)

    monkeypatch.setattr(Journal, "write", record)
    resumed = slimc.compile(network, batches, PASSES, journal=tmp_path / "journal", resume=True)
    assert [*written, *solved] == ["gate", "up", "mix", "down"]
    assert saved(resumed, tmp_path / "resumed") == straight


@pytest.fixture
def journal(network: nn.Module, batches: list[Tensor], tmp_path: Path) -> Path:
    """The journal of a finished run."""
    slimc.compile(network, batches, PASSES, journal=tmp_path / "journal")
    return tmp_path / "journal"


def test_a_resumed_run_can_be_dumped(network: nn.Module, batches: list[Tensor], journal: Path, tmp_path: Path) -> None:
    slimc.compile(network, batches, PASSES, journal=journal, resume=True, dump_dir=tmp_path / "dump")
    assert len(list((tmp_path / "dump").iterdir())) == 5


def test_a_journal_is_never_overwritten(network: nn.Module, batches: list[Tensor], journal: Path) -> None:
    with pytest.raises(
        InputError,
        match=r"did not finish. Add --resume \(resume=True\) to go on with it, or --overwrite to start again",
    ):
        slimc.compile(network, batches, PASSES, journal=journal)
    (journal / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="exists and is not a journal. Move it away"):
        slimc.compile(network, batches, PASSES, journal=journal, resume=True)
    with pytest.raises(InputError, match="exists and is not a journal"):
        Journal(journal / "notes.txt", resume=True)
    with pytest.raises(InputError, match="nothing to resume from: pass journal="):
        slimc.compile(network, batches, PASSES, resume=True)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("weights", "the model's weights changed[.]"),
        ("buffer", "the model's code or configuration changed"),
        ("recipe", r"run: quantize.bits changed from its default to 3[.]"),
        ("passes", "the passes changed from calibrate, quantize, .* to calibrate, quantize, fuse[;.]"),
        ("calibration", "the calibration changed[.]"),
        ("threads", "the number of threads changed from 1 to 2"),
        ("home", "the device of the model changed from cuda to cpu"),
        ("exclude", r"the choice of sites changed from .*\"up\".* to "),
    ],
)
def test_another_run_is_told_what_changed(
    what: str, message: str, network: nn.Module, batches: list[Tensor], journal: Path
) -> None:
    options: dict[str, Any] = {}
    passes = list(PASSES)
    if what == "weights":
        network.down.bias.data[0] += 1e-6
    elif what == "buffer":
        network = nn.Sequential(network, nn.Softmax(-1))
        journal.joinpath("journal.json").write_text(
            journal.joinpath("journal.json").read_text().replace('"gate"', '"0.gate"').replace('"up"', '"0.up"')
        )
    elif what == "recipe":
        passes[1] = Quantize(bits=3)
    elif what == "passes":
        passes = [PASSES[0], Quantize(), Fuse()]
    elif what == "calibration":
        batches = [batches[0] + 1e-3, *batches[1:]]
    elif what == "home":
        recorded = journal / "journal.json"
        recorded.write_text(recorded.read_text().replace('model": "cpu"', 'model": "cuda"'))
    elif what == "exclude":
        options["exclude"] = "up"
    if what == "threads":
        torch.set_num_threads(2)
    try:
        with pytest.raises(ResumeError, match=f"belongs to another .*{message}") as caught:
            slimc.compile(network, batches, passes, journal=journal, resume=True, **options)
        assert "start again with --overwrite" in str(caught.value)
    finally:
        torch.set_num_threads(1)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def claim(**changes: Any) -> Callable[[Path], None]:
    """Rewrite a record's metadata, with a digest that fits."""

    def rewrite(path: Path) -> None:
        from slimc.passes import journal as module

        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
        row = json.loads(metadata["row"]) | changes
        module._save(path, tensors, {**metadata, "row": json.dumps(row)})

    return rewrite


def without_metadata(path: Path) -> None:
    save_file({"x": torch.zeros(1)}, path)


def without_fingerprint(path: Path) -> None:
    (path.parent.parent / "journal.json").unlink()


def list_as_fingerprint(path: Path) -> None:
    (path.parent.parent / "journal.json").write_text("[]")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "cannot be read"),
        (flip, "does not have the digest it was written with"),
        (without_metadata, "does not have the digest"),
        (lambda path: path.write_bytes(b""), "cannot be read"),
        (lambda path: path.write_bytes(b"\xff" * 64), "cannot be read"),
        (claim(name="other"), "is of 'other'"),
        (claim(shape=[1, 1]), "not of '"),
        (claim(bits="many"), "values of other types"),
        (claim(shape=[36.0, 32]), "values of other types"),
        (claim(unrounded=1), "values of other types"),
        (claim(extra=1), "has other fields"),
        (without_fingerprint, "journal.json is missing, so nobody knows what sites belong to"),
        (list_as_fingerprint, "is not the fingerprint of a run"),
    ],
)
def test_damaged_and_hostile_records_are_refused(
    damage: Callable[[Path], None], message: str, network: nn.Module, batches: list[Tensor], journal: Path
) -> None:
    for path in (journal / "sites").iterdir():
        damage(path)
        if not (journal / "journal.json").exists():
            break
    with pytest.raises(FormatError, match=message) as caught:
        slimc.compile(network, batches, PASSES, journal=journal, resume=True)
    assert "Delete" in str(caught.value)
    assert "start again without resuming" in str(caught.value)


@pytest.mark.parametrize("resume", [False, True])
def test_records_of_another_run_are_replaced_while_no_site_is_finished(resume: bool, tmp_path: Path) -> None:
    failed = Journal(tmp_path / "journal", resume=False)
    failed.begin({"recipe": "a"})
    failed.record_tokens([torch.zeros(1, 2, dtype=torch.int64)])
    again = Journal(tmp_path / "journal", resume=resume)
    again.begin({"recipe": "b"})
    assert again.tokens() is None
    assert json.loads((tmp_path / "journal" / "journal.json").read_text()) == {"recipe": "b"}


def test_tokens_of_the_same_run_are_kept_if_resumed(tmp_path: Path) -> None:
    for resume, kept in ((False, False), (True, True), (False, False)):
        journal = Journal(tmp_path / "journal", resume=resume)
        journal.begin({"recipe": "a"})
        assert (journal.tokens() is not None) == kept
        journal.record_tokens([torch.zeros(1, 2, dtype=torch.int64)])


def test_only_a_journal_is_discarded(journal: Path) -> None:
    precious = journal / "sites" / "precious.txt"
    precious.write_text("mine")
    with pytest.raises(InputError, match="exists and is not a journal"):
        discard(journal)
    assert precious.read_text() == "mine"
    precious.unlink()
    discard(journal)
    assert not journal.exists()
    discard(journal)


def test_what_a_dying_write_leaves_is_no_obstacle(network: nn.Module, batches: list[Tensor], tmp_path: Path) -> None:
    folder = tmp_path / "journal"
    folder.mkdir()
    (folder / ".journal.json.123.partial").write_bytes(b"{")
    slimc.compile(network, batches, PASSES, journal=folder)


SCRIPT = """
import sys, torch, slimc
from slimc.passes import Calibrate, Fuse, LowRank, Prune, Quantize
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
passes = [Calibrate(samples=4, length=24, batch=3), Quantize(), Prune(), LowRank(rounds=2), Fuse()]
print("ready", flush=True)
small = slimc.compile(model, None, passes, journal=sys.argv[2], resume=True)
slimc.save(small, sys.argv[3], overwrite=True)
"""


def test_a_killed_process_is_resumed_byte_for_byte(tiny_llama_folder: Path, tmp_path: Path) -> None:
    def start(journal: str, output: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", SCRIPT, tiny_llama_folder, tmp_path / journal, tmp_path / output]
        return subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE, text=True)

    straight = start("journal-1", "straight")
    with start("journal-2", "resumed") as victim:
        assert victim.stdout is not None
        assert victim.stdout.readline() == "ready\n"
        while victim.poll() is None and not list((tmp_path / "journal-2").glob("sites/*.safetensors")):
            time.sleep(0.01)
        time.sleep(random.random() * 0.2)
        victim.send_signal(signal.SIGKILL)
    with start("journal-2", "resumed") as again:
        again.communicate(timeout=120)
    straight.communicate(timeout=120)
    assert (straight.returncode, again.returncode) == (0, 0)
    expected = {path.name: path.read_bytes() for path in (tmp_path / "straight").glob("slimc*")}
    assert len(expected) == 2
    assert {path.name: path.read_bytes() for path in (tmp_path / "resumed").glob("slimc*")} == expected


def test_a_plan_that_changed_is_told_without_all_its_sites(tmp_path: Path) -> None:
    def recipe(chosen: str) -> dict[str, Any]:
        sites = {f"model.layers.{index}.mlp.down_proj": chosen for index in range(40)}
        return {"recipe": [{"per_site": {"expressions": {}, "sites": sites}}]}

    record = Journal(tmp_path / "journal", resume=False)
    record.begin(recipe("int3"))
    (tmp_path / "journal" / "sites" / "finished.safetensors").touch()
    with pytest.raises(ResumeError, match=r"belongs to another run: per_site.sites changed\. Resume"):
        Journal(tmp_path / "journal", resume=True).begin(recipe("int4"))
