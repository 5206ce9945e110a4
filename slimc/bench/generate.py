"""Whole models on one GPU: tokens a second and memory of a compressed Llama, of the dense one, and of int4.

The weights are random, which changes nothing of the time. All models run the same loop: a prompt in one call, then one
token after another through a static cache, compiled, with CUDA graphs, the next token chosen on the device.

``slimc`` is 2:4 sparse int4 with one scale a tensor and 4-bit adapters of rank 0.1, under ``backend="slim"``;
``slimc, int4 head`` has its output embedding in 4 bits with a scale every 128 columns too. ``dense`` is bf16 under
Inductor, with its own settings and with tuned ones; ``tinygemm`` is torch's int4 with a scale every 128 columns,
without adapters.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimc.backends import KERNELS
from slimc.backends.dynamo import slim
from slimc.backends.hf_library import transformers
from slimc.bench import check_words, no_gpu
from slimc.bench.turns import serve, take_turns
from slimc.runtime.formats import NM, LinearFormat, WeightFormat
from slimc.runtime.modules import SlimLinear
from slimc.runtime.packing import PackedLinear

__all__ = ["MODELS", "VARIANTS", "Measurement", "main", "measure", "run", "table"]

RANK = 0.1
GROUP = 128
COMPILED_WARM_UP_PROMPTS = 3
"""The first compiles, the second is captured."""

PROMPTS = 3
WARM_UP_TOKENS = 8
PROFILED_TOKENS = 8

_LLAMA: dict[str, Any] = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}

MODELS: dict[str, dict[str, Any]] = {
    "llama-2-7b": _LLAMA | {"vocab_size": 32000, "intermediate_size": 11008, "num_key_value_heads": 32},
    "llama-3-8b": _LLAMA | {"vocab_size": 128256, "intermediate_size": 14336, "num_key_value_heads": 8},
}
"""The configurations, as ``LlamaConfig`` takes them."""

_Maker = Callable[[int, int], nn.Module]


@dataclass(frozen=True)
class Variant:
    """A way to store and run a model.

    Attributes:
        layer: makes a linear layer of a decoder from its rows and columns.
        head: makes the output embedding.
        settings: for ``torch.compile``.
    """

    layer: _Maker
    head: _Maker
    settings: dict[str, Any]


@dataclass
class Measurement:
    """One model at one batch size.

    Attributes:
        model: name in `MODELS`.
        variant: name in `VARIANTS`.
        batch: sequences at once.
        tokens_per_second: of all sequences together, while new tokens are made.
        milliseconds: for one step, by the clock.
        prompt_milliseconds: for the prompt, in one call that is not compiled, as ``generate`` of transformers makes it.
        compile_seconds: until the first tokens are made.
        memory: gigabytes of the device while the model runs, at most, the prompt not compiled.
        weights: gigabytes of the device before it runs.
        kernels: for each kind of kernel, the milliseconds of a step that the device spends on it, and its launches.
        compiled_prompt_milliseconds: for the prompt in a compiled call, with CUDA graphs, once that is measured.
    """

    model: str
    variant: str
    batch: int
    tokens_per_second: float
    milliseconds: float
    prompt_milliseconds: float
    compile_seconds: float
    memory: float
    weights: float
    kernels: dict[str, tuple[float, float]] = field(default_factory=dict)
    compiled_prompt_milliseconds: float | None = None

    @property
    def idle(self) -> float:
        """Milliseconds of a step in which no kernel runs; below zero if kernels run side by side."""
        return self.milliseconds - sum(spent for spent, _ in self.kernels.values())

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return asdict(self) | {"idle": self.idle}


def measure(
    name: str, variant: str, batches: Sequence[int], *, prompt: int = 512, tokens: int = 128, layers: int | None = None
) -> Iterator[Measurement]:
    """Build a model and measure it at each batch size; fewer ``layers`` than the model has make it a trial."""
    model, weights = _build_on_gpu(name, variant, layers)
    for batch in batches:
        steps = _steps(model, weights, name, variant, batch, prompt, tokens)
        yield [found for found in steps if found is not None][-1]
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()


def _build_on_gpu(name: str, variant: str, layers: int | None) -> tuple[nn.Module, float]:
    """Return a model and the gigabytes that it takes."""
    config = MODELS[name] | ({} if layers is None else {"num_hidden_layers": layers})
    model = build(config, VARIANTS[variant], torch.device("cuda"))
    torch.cuda.synchronize()
    return model, torch.cuda.memory_allocated() / 1e9


def _steps(
    model: nn.Module, weights: float, name: str, variant: str, batch: int, prompt: int, tokens: int
) -> Iterator[Measurement | None]:
    """Yield ``None`` ahead of what must have the device for itself, and then what was measured so far; both twice."""
    torch.cuda.reset_peak_memory_stats()
    loop = _Loop(model, VARIANTS[variant].settings, batch, prompt, tokens)
    compiling, memory = loop.warm_up()
    yield None
    prompt_seconds = loop.read_prompt()
    seconds = loop.run(tokens - WARM_UP_TOKENS - PROFILED_TOKENS)
    found = Measurement(
        model=name,
        variant=variant,
        batch=batch,
        tokens_per_second=batch / seconds,
        milliseconds=1e3 * seconds,
        prompt_milliseconds=1e3 * prompt_seconds,
        compile_seconds=compiling,
        memory=memory,
        weights=weights,
        kernels=loop.profile(PROFILED_TOKENS),
    )
    yield found
    loop.read_prompt(compiled=True)
    yield None
    found.compiled_prompt_milliseconds = 1e3 * loop.read_prompt(compiled=True)
    yield found


def _serve(name: str, variant: str, batch: int, prompt: int, tokens: int, layers: int | None) -> None:
    """Measure in the steps of a process among others."""

    def steps() -> Iterator[dict[str, Any] | None]:
        model, weights = _build_on_gpu(name, variant, layers)
        for found in _steps(model, weights, name, variant, batch, prompt, tokens):
            yield None if found is None else asdict(found)

    serve(steps())


class _Loop:
    """Greedy generation through a static cache, one compiled step a token."""

    def __init__(self, model: Any, settings: dict[str, Any], batch: int, prompt: int, tokens: int) -> None:
        self._model = model
        self._batch, self._prompt = batch, prompt
        self._cache = transformers().StaticCache(config=self._model.config, max_cache_len=prompt + tokens)
        self._device = torch.device(self._model.device)
        self._token = torch.zeros(batch, 1, dtype=torch.int64, device=self._device)
        self._step = torch.compile(self._next, fullgraph=True, dynamic=False, **settings)

    def _next(self, ids: Tensor) -> Tensor:
        # The keyword was renamed between releases of transformers; the place was not.
        logits: Tensor = self._model(ids, None, None, self._cache, logits_to_keep=1).logits
        return logits[:, -1].argmax(-1, keepdim=True)

    def warm_up(self) -> tuple[float, float]:
        """Compile what makes tokens; return the seconds until the first are made, and gigabytes in use at most."""
        self.read_prompt()
        seconds = WARM_UP_TOKENS * self.run(WARM_UP_TOKENS)
        return seconds, torch.cuda.max_memory_allocated() / 1e9

    @torch.no_grad()
    def read_prompt(self, *, compiled: bool = False) -> float:
        """Read a random prompt, again and again, and return the seconds that it takes once all is prepared."""
        limit = self._model.config.vocab_size
        ids = torch.randint(limit, (self._batch, self._prompt), device=self._device)
        read, ahead = (self._step, COMPILED_WARM_UP_PROMPTS) if compiled else (self._next, 1)
        seconds = []
        for _ in range(ahead + PROMPTS):
            self._cache.reset()
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()
            begun = time.perf_counter()
            self._token = read(ids).clone()
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begun)
        return statistics.median(seconds[ahead:])

    @torch.no_grad()
    def run(self, tokens: int) -> float:
        """Make tokens and return the seconds for each."""
        torch.cuda.synchronize()
        begun = time.perf_counter()
        for _ in range(tokens):
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
            self._token = self._step(self._token).clone()
        torch.cuda.synchronize()
        return (time.perf_counter() - begun) / tokens

    def profile(self, tokens: int) -> dict[str, tuple[float, float]]:
        """Make tokens and return what each kind of kernel takes of one: milliseconds of the device, and launches."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            self.run(tokens)
        found: dict[str, tuple[float, float]] = {}
        for event in profile.key_averages():
            if event.self_device_time_total:
                spent, launches = found.get(_kind(event.key), (0.0, 0.0))
                spent += event.self_device_time_total / tokens / 1e3
                found[_kind(event.key)] = spent, launches + event.count / tokens
        return dict(sorted(found.items(), key=lambda entry: -entry[1][0]))


_KINDS: tuple[tuple[str, str], ...] = (
    ("compressed layers", r"tinygemm|^(?!triton).*_linear"),
    ("dense products", r"triton_tem|triton\w*_mm_"),
    ("everything between", r"triton_|^add_norm|^gate"),
    ("attention", r"fmha|flash|attention|attend|sdpa"),
    ("dense products", r"gemm|gemv|cutlass|nvjet|splitk|cublas"),
    ("copies", r"memcpy|memset"),
)
"""Kinds of kernels, each with a pattern of their names; the first that fits counts."""


def _kind(kernel: str) -> str:
    found = (kind for kind, pattern in _KINDS if re.search(pattern, kernel, re.IGNORECASE))
    return next(found, "other kernels")


def build(config: dict[str, Any], variant: Variant, device: torch.device) -> nn.Module:
    """Make a model of random weights layer by layer, so that no more of it is ever on the device than what stays."""
    settings = transformers().LlamaConfig(**config, tie_word_embeddings=False)
    with torch.device("meta"):
        model: Any = transformers().LlamaForCausalLM(settings).to(torch.bfloat16).eval()
    # Linear layers among them are replaced by their parents, and must not be made for nothing.
    for parent in [module for module in model.modules() if not isinstance(module, nn.Linear)]:
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                make = variant.head if child is model.lm_head else variant.layer
                with device:
                    setattr(parent, name, make(child.out_features, child.in_features))
        for name, parameter in list(parent.named_parameters(recurse=False)):
            if parameter.is_meta:
                made = torch.empty_like(parameter, device=device)
                nn.init.ones_(made) if made.dim() == 1 else nn.init.normal_(made, std=0.02)
                setattr(parent, name, nn.Parameter(made, requires_grad=False))
    # Its tables are computed, not loaded.
    model.model.rotary_emb = type(model.model.rotary_emb)(settings).to(device)
    return model  # type: ignore[no-any-return]


def random_packed(rows: int, columns: int, rank: int, *, sparse: bool = True, group: int | None = None) -> PackedLinear:
    """Return a layer of random 4-bit codes; ``group`` None is one scale for all of it."""
    dtype = torch.bfloat16
    sparsity = NM(2, 4) if sparse else None
    weight = WeightFormat(rows, columns, bits=4, group=group, per_tensor=group is None, sparsity=sparsity, dtype=dtype)
    left, right = (
        WeightFormat(*shape, bits=4, group=64, dtype=dtype) if rank else None
        for shape in ((rows, rank), (rank, columns))
    )
    spec = LinearFormat(weight, left, right)
    tensors: dict[str, Tensor] = {}
    for name, (shape, kind) in spec.tensor_specs().items():
        if kind == torch.uint8:
            tensors[name] = torch.randint(0, 256, shape, dtype=torch.uint8)
        else:
            tensors[name] = ((torch.rand(shape) + 0.5) * 0.005).to(kind)
    if sparse:
        # The six masks that keep two of four.
        masks = torch.tensor([3, 5, 9, 6, 10, 12], dtype=torch.uint8)
        nibbles = masks[torch.randint(6, (rows, columns // 8, 2))]
        tensors["pattern"] = nibbles[..., 0] | (nibbles[..., 1] << 4)
    return PackedLinear.assemble(spec, tensors)


def _slim_layer(rows: int, columns: int) -> nn.Module:
    return SlimLinear(random_packed(rows, columns, int(RANK * min(rows, columns))), kernels=KERNELS)


def _slim_head(rows: int, columns: int) -> nn.Module:
    return SlimLinear(random_packed(rows, columns, 0, sparse=False, group=GROUP), kernels=KERNELS)


def _dense_layer(rows: int, columns: int) -> nn.Module:
    layer = nn.Linear(columns, rows, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    nn.init.normal_(layer.weight, std=0.02)
    return layer


class TinygemmLinear(nn.Module):
    """torch's own int4 product, with a scale and an offset every 128 columns."""

    weight: Tensor
    scales: Tensor

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.rows = rows
        codes = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8)
        self.register_buffer("weight", torch.ops.aten._convert_weight_to_int4pack(codes, 8))
        scales = torch.rand(columns // GROUP, rows, 2) * 0.005
        self.register_buffer("scales", scales.bfloat16())

    def forward(self, x: Tensor) -> Tensor:
        """Return y [..., rows] of x [..., columns]."""
        flat = x.reshape(-1, x.shape[-1])
        y: Tensor = torch.ops.aten._weight_int4pack_mm(flat, self.weight, GROUP, self.scales)
        return y.view(*x.shape[:-1], self.rows)


_GRAPHS: dict[str, Any] = {"mode": "reduce-overhead"}
_TUNED: dict[str, Any] = {"options": {"triton.cudagraphs": True, "coordinate_descent_tuning": True}}

VARIANTS: dict[str, Variant] = {
    "dense": Variant(_dense_layer, _dense_layer, _GRAPHS),
    "dense, tuned": Variant(_dense_layer, _dense_layer, _TUNED),
    "slimc": Variant(_slim_layer, _dense_layer, _GRAPHS | {"backend": slim}),
    "slimc, int4 head": Variant(_slim_layer, _slim_head, _GRAPHS | {"backend": slim}),
    "tinygemm": Variant(TinygemmLinear, _dense_layer, _GRAPHS),
}
"""What can be measured."""


_HEADER = (
    f"{'model':12} {'variant':17} {'batch':>5} {'tokens/s':>9} {'over dense':>10} {'ms/step':>8} {'prompt ms':>10} "
    f"{'compiled':>10} {'compile s':>10} {'memory GB':>10} {'of dense':>8}"
)


def table(found: Sequence[Measurement]) -> str:
    """Return the measurements as text: two lines each, with ratios to the fastest dense one of the same batch."""
    return "\n".join([_HEADER, *(line for one in found for line in _lines(one, found))])


def _lines(one: Measurement, found: Sequence[Measurement]) -> list[str]:
    dense = [m for m in found if (m.model, m.batch) == (one.model, one.batch) and m.variant.startswith("dense")]
    best = max(dense, key=lambda each: each.tokens_per_second) if dense else None
    speed = f"{one.tokens_per_second / best.tokens_per_second:.2f}x" if best else ""
    memory = f"{one.memory / best.memory:.2f}x" if best else ""
    compiled = "" if one.compiled_prompt_milliseconds is None else f"{one.compiled_prompt_milliseconds:.1f}"
    first = (
        f"{one.model:12} {one.variant:17} {one.batch:5} {one.tokens_per_second:9.1f} {speed:>10} "
        f"{one.milliseconds:8.3f} {one.prompt_milliseconds:10.1f} {compiled:>10} "
        f"{one.compile_seconds:10.1f} {one.memory:10.2f} {memory:>8}"
    )
    spent = [f"{kind} {spent:.3f} ms ({launches:.0f})" for kind, (spent, launches) in one.kernels.items()]
    return [first, f"    of a step: {', '.join(spent)}, idle {one.idle:.3f} ms"]


def run(
    models: Sequence[str],
    variants: Sequence[str] = tuple(VARIANTS),
    batches: Sequence[int] = (1, 16),
    *,
    prompt: int = 512,
    tokens: int = 128,
    layers: int | None = None,
    together: int = 1,
    save: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """Measure models, print as it goes, and return every figure; ``save`` is given what there is after each.

    ``together`` models are built and compiled at the same time, in processes of their own, if that is more than one;
    each has the device for itself while it is measured. Their memory must be there for all of them.
    """
    about = {"card": torch.cuda.get_device_name(), "torch": torch.__version__}
    found: dict[tuple[str, str, int], Measurement] = {}
    figures = (
        _measure_together(models, variants, batches, prompt, tokens, layers, together)
        if together > 1
        else (
            one
            for model in models
            for variant in variants
            for one in measure(model, variant, batches, prompt=prompt, tokens=tokens, layers=layers)
        )
    )
    for one in figures:
        found[one.model, one.variant, one.batch] = one
        print(*_lines(one, list(found.values())), sep="\n", flush=True)
        save(about | {"rows": [each.to_json() for each in found.values()]})
    print(table(list(found.values())))
    return about | {"rows": [one.to_json() for one in found.values()]}


def _measure_together(
    models: Sequence[str],
    variants: Sequence[str],
    batches: Sequence[int],
    prompt: int,
    tokens: int,
    layers: int | None,
    together: int,
) -> Iterator[Measurement]:
    sizes = ["--prompt", str(prompt), "--tokens", str(tokens), *([] if layers is None else ["--layers", str(layers)])]
    commands = [
        [sys.executable, "-m", __spec__.name, "--models", model, "--variants", variant, "--batches", str(batch), *sizes]
        for model in models
        for variant in variants
        for batch in batches
    ]
    for first in range(0, len(commands), together):
        for found in take_turns([*command, "--one-of-several"] for command in commands[first : first + together]):
            yield Measurement(**found)


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), help=f"of {', '.join(MODELS)}")
    parser.add_argument(
        "--variants", default=";".join(VARIANTS), help=f"separated by semicolons, of {'; '.join(VARIANTS)}"
    )
    parser.add_argument("--batches", default="1,16")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--layers", type=int, help="fewer layers than the models have, to try things out")
    parser.add_argument("--together", type=int, default=1, help="models to build and compile at the same time")
    parser.add_argument("--one-of-several", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="write all figures here")
    options = parser.parse_args()
    check_words(parser, "--models", options.models.split(","), MODELS)
    check_words(parser, "--variants", options.variants.split(";"), VARIANTS)
    if reason := no_gpu():
        parser.exit(2, f"error: {reason}\n")
    if options.one_of_several:
        _serve(options.models, options.variants, int(options.batches), options.prompt, options.tokens, options.layers)
        return
    run(
        options.models.split(","),
        options.variants.split(";"),
        [int(batch) for batch in options.batches.split(",")],
        prompt=options.prompt,
        tokens=options.tokens,
        layers=options.layers,
        together=options.together,
        save=lambda found: options.json and options.json.write_text(json.dumps(found, indent=1) + "\n"),
    )


if __name__ == "__main__":
    main()
