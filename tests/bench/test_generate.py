"""The benchmark of whole models, in its parts: what it builds, the loop it times, and the table it prints."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

import pytest
import torch

from slimc.bench import generate
from slimc.bench.generate import VARIANTS, Measurement, build, table
from slimc.runtime.modules import SlimLinear

TINY = {
    "hidden_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "intermediate_size": 256,
}


@pytest.mark.parametrize("variant", ["dense", "slimc", "slimc, int4 head"])
def test_models_are_whole_and_on_their_device(variant: str) -> None:
    model: Any = build(TINY, VARIANTS[variant], torch.device("cpu"))
    assert not [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    compressed = {name for name, module in model.named_modules() if isinstance(module, SlimLinear)}
    assert len(compressed) == {"dense": 0, "slimc": 7, "slimc, int4 head": 8}[variant]
    with torch.no_grad():
        logits = model(torch.randint(256, (2, 5))).logits
    assert logits.shape == (2, 5, 256)
    assert logits.isfinite().all()


def test_no_dense_layer_is_made_for_a_compressed_model(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[int, ...]] = []
    empty_like = torch.empty_like

    def noted(tensor: torch.Tensor, **options: Any) -> torch.Tensor:
        made.append(tuple(tensor.shape))
        return empty_like(tensor, **options)

    monkeypatch.setattr(torch, "empty_like", noted)
    build(TINY, VARIANTS["slimc, int4 head"], torch.device("cpu"))
    assert sorted(made) == [(128,), (128,), (128,), (256, 128)]


@pytest.mark.filterwarnings("ignore")  # what Dynamo and Inductor say about themselves
def test_the_loop_reads_a_prompt_and_goes_on_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    model: Any = build(TINY, VARIANTS["slimc"], torch.device("cpu"))
    loop = generate._Loop(model, {"backend": "eager"}, batch=2, prompt=6, tokens=8)
    assert loop.read_prompt(compiled=True) > 0
    assert loop.read_prompt() > 0
    assert loop.run(3) > 0
    assert int(loop._cache.get_seq_length()) == 9


def test_models_that_are_built_together_have_processes_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    groups: list[list[list[str]]] = []

    def take_turns(commands: Iterable[list[str]]) -> Iterator[dict[str, Any]]:
        groups.append(list(commands))
        for command in groups[-1]:
            options = dict(zip(command[3:-1:2], command[4:-1:2], strict=True))
            about = options["--models"], options["--variants"], int(options["--batches"])
            for compiled in (None, 4.0):
                row = Measurement(*about, 100, 10, 5, 30, 20, 20, compiled_prompt_milliseconds=compiled)
                yield asdict(row)

    monkeypatch.setattr(generate, "take_turns", take_turns)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    saved: list[dict[str, Any]] = []
    found = generate.run(["llama-3-8b"], ["dense", "tinygemm"], [1, 16], layers=2, together=3, save=saved.append)
    assert [len(group) for group in groups] == [3, 1]
    assert groups[0][0][1:3] == ["-m", "slimc.bench.generate"]
    assert groups[1][0][-1] == "--one-of-several"
    assert [(row["variant"], row["batch"]) for row in found["rows"]] == [
        ("dense", 1), ("dense", 16), ("tinygemm", 1), ("tinygemm", 16),
    ]  # fmt: skip
    assert [row["compiled_prompt_milliseconds"] for row in found["rows"]] == [4.0] * 4
    assert saved[0]["rows"][0]["compiled_prompt_milliseconds"] is None


def test_kernels_are_counted_by_kind() -> None:
    kinds = {
        "attend": "attention",
        "add_norm": "everything between",
        "gate": "everything between",
        "decode_linear": "compressed layers",
        "void at::native::tinygemm_m16n8k16_chunk_kernel": "compressed layers",
        "fmha_cutlassF_bf16_aligned_64x64_rf_sm80": "attention",
        "nvjet_tst_64x8_64x16_4x1_v_bz_TNT": "dense products",
        "triton_red_fused__to_copy_mm_mul_0": "dense products",
        "triton_poi_fused_prepared_linear_silu_0": "everything between",
        "Memcpy DtoD (Device -> Device)": "copies",
        "triton_red_fused__to_copy_mean_mul_pow_rsqrt_0": "everything between",
        "void at::native::reduce_kernel": "other kernels",
    }
    assert {name: generate._kind(name) for name in kinds} == kinds


def test_the_table_compares_with_the_fastest_dense_model() -> None:
    def one(variant: str, batch: int, speed: float, memory: float) -> Measurement:
        return Measurement(
            "m", variant, batch, speed, 1e3 * batch / speed, 5.0, 30.0, memory, memory, {"attention": (0.25, 2)}
        )

    found = [one("dense", 1, 100, 20), one("dense, tuned", 1, 125, 20), one("slimc", 1, 250, 5), one("slimc", 16, 9, 5)]
    lines = table(found).splitlines()
    assert len(lines) == 1 + 2 * len(found)
    assert "2.00x" in lines[5]
    assert "0.25x" in lines[5]
    assert lines[6] == "    of a step: attention 0.250 ms (2), idle 3.750 ms"
    assert found[2].to_json()["idle"] == 3.75
    assert "x" not in lines[7].removeprefix("m").split("slimc")[1]
