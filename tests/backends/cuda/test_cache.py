"""Cubins kept on disk: read again by the next process, and never trusted when something is odd."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from slimc.backends.cuda import cache, compiler

DRIVER = "13.0"


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replaces the compiler by one that remembers what it was asked for."""
    asked: list[str] = []

    def compile_source(source: str, **_: object) -> bytes:
        asked.append(source)
        return b"cubin of " + source.encode()

    monkeypatch.setattr(compiler, "compile_source", compile_source)
    monkeypatch.setattr(compiler, "version", lambda: "13.0")
    return asked


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("SLIMC_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "cubins"


@pytest.fixture
def get(monkeypatch: pytest.MonkeyPatch) -> Callable[..., bytes]:
    """Asks as a new process would."""

    def ask(source: str = "a", **defines: int) -> bytes:
        monkeypatch.setattr(cache, "_in_memory", {})
        return cache.cached_cubin(source, name="k", arch="sm_80", defines=defines, driver=DRIVER)

    return ask


def test_the_next_process_reads_what_this_one_compiled(
    folder: Path, compiled: list[str], get: Callable[..., bytes]
) -> None:
    assert get() == get() == b"cubin of a"
    assert compiled == ["a"]
    assert len(list(folder.iterdir())) == 1


def test_one_process_asks_the_disk_once(folder: Path, compiled: list[str], get: Callable[..., bytes]) -> None:
    get()
    for file in folder.iterdir():
        file.unlink()
    assert cache.cached_cubin("a", name="k", arch="sm_80", defines={}, driver=DRIVER) == b"cubin of a"
    assert compiled == ["a"]


def test_the_key_is_all_that_decides_the_code(folder: Path, compiled: list[str]) -> None:
    base = {"name": "k", "arch": "sm_80", "defines": {"A": 1, "B": 2}, "driver": DRIVER}
    key = cache.cubin_key("a", **base)  # type: ignore[arg-type]
    assert key == cache.cubin_key("a", **(base | {"defines": {"B": 2, "A": 1}}))  # type: ignore[arg-type]
    for change in ({"arch": "sm_90a"}, {"defines": {"A": 1}}, {"driver": "12.8"}, {"name": "l"}):
        assert key != cache.cubin_key("a", **(base | change))  # type: ignore[arg-type]
    assert key != cache.cubin_key("b", **base)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-1], lambda data: data[:10], lambda data: b"x" + data[1:], lambda _: b""]
)
def test_a_damaged_file_is_compiled_again_and_replaced(
    folder: Path, compiled: list[str], get: Callable[..., bytes], damage: Callable[[bytes], bytes]
) -> None:
    get()
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert get() == b"cubin of a"
    assert compiled == ["a", "a"]
    assert file.read_bytes() == whole


def test_a_file_under_another_name_is_not_taken(folder: Path, compiled: list[str], get: Callable[..., bytes]) -> None:
    get("a")
    (first,) = folder.iterdir()
    get("b")
    (second,) = set(folder.iterdir()) - {first}
    second.write_bytes(first.read_bytes())
    assert get("b") == b"cubin of b"


def test_a_file_that_others_may_write_is_not_loaded(
    folder: Path, compiled: list[str], get: Callable[..., bytes]
) -> None:
    get()
    (file,) = folder.iterdir()
    file.chmod(0o666)
    assert get() == b"cubin of a"
    assert compiled == ["a", "a"]


def test_a_link_is_not_followed(folder: Path, compiled: list[str], get: Callable[..., bytes], tmp_path: Path) -> None:
    get()
    (file,) = folder.iterdir()
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    assert get() == b"cubin of a"
    assert compiled == ["a", "a"]


@pytest.mark.parametrize("obstacle", ["a file in the folder's place", "a folder that others may write to"])
def test_a_folder_that_cannot_be_used_costs_only_time(
    folder: Path, compiled: list[str], get: Callable[..., bytes], obstacle: str
) -> None:
    if obstacle.startswith("a file"):
        folder.parent.write_text("not a folder")
    else:
        folder.mkdir(parents=True)
        folder.chmod(0o777)
    assert get() == get() == b"cubin of a"
    assert compiled == ["a", "a"]


def test_many_at_once_leave_one_whole_file(folder: Path, compiled: list[str], get: Callable[..., bytes]) -> None:
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(lambda _: get(), range(32))) == {b"cubin of a"}
    assert len(list(folder.iterdir())) == 1
    compiled.clear()
    assert get() == b"cubin of a"
    assert compiled == []


PROCESSES = """
import logging, multiprocessing, random, sys
from pathlib import Path

from slimc.backends.cuda import cache, compiler

folder, form = Path(sys.argv[1]), {"name": "k", "arch": "sm_80", "defines": {}, "driver": "13.0"}
wholes = {source: 100_000 * source.encode() for source in "abc"}
compiler.version = lambda: "13.0"
compiler.compile_source = lambda source, **_: wholes[source]
# A file that is damaged or cannot be used is compiled again, and only the log says so.
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
fork = multiprocessing.get_context("fork")
start = fork.Barrier(6)


def fill_and_read(seed):
    chance = random.Random(seed)
    start.wait(30)
    for source in chance.choices("abc", k=100):
        if chance.random() < 0.3:
            (folder / (cache.cubin_key(source, **form) + ".cubin")).unlink(missing_ok=True)
        cache._in_memory.clear()
        assert cache.cached_cubin(source, **form) == wholes[source]


processes = [fork.Process(target=fill_and_read, args=(seed,)) for seed in range(6)]
for process in processes:
    process.start()
for process in processes:
    process.join()
print([process.exitcode for process in processes])
"""
"""Six processes ask for three entries, a hundred times each; now and then one removes what it is about to ask for."""


def test_processes_that_fill_and_read_the_same_entries_find_whole_ones(folder: Path) -> None:
    done = subprocess.run([sys.executable, "-c", PROCESSES, str(folder)], capture_output=True, text=True, timeout=60)
    assert done.stdout == "[0, 0, 0, 0, 0, 0]\n", done.stderr
    kept = [cache._FOLDER.read(file.name.removesuffix(".cubin")) for file in folder.iterdir()]
    assert sorted(map(len, filter(None, kept))) == [100_000] * 3
    assert len(kept) == 3
