"""Text from an ONNX folder: ONNX Runtime and numpy, no PyTorch.

The cache never leaves the device: outputs of one call are bound as inputs of the next. Where the graph holds
GroupQueryAttention, one buffer is input and output at once, and a call writes its own tokens only.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from slimc.backends.onnx.description import FIRST_LOGITS, Description, check_files, read_description
from slimc.backends.onnx.replay import Replays
from slimc.errors import FormatError, InputError, NumericsError, SlimError
from slimc.runtime.files import file_inside, read_json

__all__ = ["OnnxDecoder", "Tokens", "best_device", "end_tokens", "import_runtime", "why_not_opened"]

Array = npt.NDArray[Any]
Tokens = Sequence[int]

OLDEST_RUNTIME = (1, 22)
"""The first ONNX Runtime that computes blocks of 4 bits and their products as exports need them."""

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def best_device() -> str:
    """Return ``cuda`` where ONNX Runtime has a provider for it, else ``cpu``."""
    return "cuda" if PROVIDERS["cuda"] in import_runtime().get_available_providers() else "cpu"


def end_tokens(folder: Path) -> frozenset[int]:
    """Return the tokens that end a text, as ``generation_config.json`` or ``config.json`` of a folder says."""
    for name in ("generation_config.json", "config.json"):
        if (folder / name).exists():
            settings = read_json(file_inside(folder, name))
            found = settings.get("eos_token_id") if isinstance(settings, dict) else None
            if found is not None:
                return frozenset(found if isinstance(found, list) else [found])
    return frozenset()


@dataclass
class _Pick:
    """Chooses each row's next token from its logits [batch, vocabulary]."""

    temperature: float
    random: np.random.Generator

    def __call__(self, logits: Array) -> Array:
        """Return a token for each row."""
        logits = logits.astype(np.float32, copy=False)
        tokens = _likeliest(logits)
        # NaN counts as the largest, and so does Inf.
        if not np.isfinite(logits[np.arange(len(tokens)), tokens]).all():
            raise NumericsError("the model's logits hold NaN or Inf: its file is damaged or its activations overflow")
        if self.temperature == 0:
            return tokens
        # The largest of logits with Gumbel noise is a sample of their softmax.
        return _likeliest(logits / self.temperature + self.random.gumbel(size=logits.shape))


def _likeliest(scores: Array) -> Array:
    tokens: Array = scores.argmax(axis=-1)
    return tokens


class OnnxDecoder:
    """A causal language model in ONNX Runtime.

    Args:
        folder: what ``slimc export --format onnx`` wrote.
        device: ``cpu`` or ``cuda``.
        threads: of the CPU; all cores by default.
        accuracy_level: how exactly ONNX Runtime computes what it fuses from DequantizeLinear: 0 in the dtype of the
            graph, 4 with inputs rounded to 8 bits, which is faster. (Nodes that say it themselves are not changed.)
        kernels: a library that ``slimc kernels`` built, whose kernels run the graph's ``slim::linear`` on ``cuda``.
        replay: capture decoding steps as CUDA graphs, where the cache is one buffer and all of a step runs on the GPU.

    Raises:
        InputError: onnxruntime is not installed, too old, or lacks the provider; or the folder has nothing for kernels.
        FormatError: the folder is damaged.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        device: str = "cpu",
        threads: int | None = None,
        accuracy_level: int = 0,
        kernels: str | Path | None = None,
        replay: bool = False,
    ) -> None:
        self.folder = Path(folder)
        self.description: Description = read_description(self.folder)
        if self.description.cache is None:
            raise InputError(f"{folder}: was exported without a cache, so it cannot generate text; export it with one")
        self.cache = self.description.cache
        if device == "cuda" and self.cache.shared and self.cache.dtype == "float32":
            raise InputError(
                f"{folder}: its fused attention is in float32, for which ONNX Runtime has no CUDA kernel; "
                "export it with --dtype float16, or with --target portable"
            )
        self._device = device
        self._runtime = _runtime(device)
        check_files(self.folder)
        self._kernels = None if kernels is None else self._checked(Path(kernels))
        self._session, self._replays = self._opened(threads, accuracy_level, replay and device == "cuda")
        self._dtype = np.dtype(self.cache.dtype)
        self.vocabulary = int(self._session.get_outputs()[0].shape[-1])

    @property
    def replays(self) -> bool:
        """Whether decoding steps are captured as CUDA graphs."""
        return self._replays is not None

    def _checked(self, kernels: Path) -> Path:
        """Return the path of a kernel library after checking that this decoder can use one."""
        if self._device != "cuda":
            raise InputError(f"{kernels}: its kernels run on cuda, not on {self._device}; leave it out")
        if self.description.target not in ("portable", "cuda") or self.cache.dtype != "float16":
            raise InputError(
                f"{self.folder}: is of target '{self.description.target}' in {self.cache.dtype}, and kernels run in a "
                "graph of target cuda in float16; export the model again with --target cuda --dtype float16"
            )
        if not kernels.is_file():
            raise InputError(
                f"{kernels}: there is no such file; build it with: slimc kernels {self.folder} -o {kernels}"
            )
        return kernels.absolute()

    def _opened(self, threads: int | None, accuracy_level: int, replay: bool) -> tuple[Any, Replays | None]:
        """Open a session, and one that captures graphs if it is wanted and can be."""
        if replay and self.cache.shared:
            try:
                session = self._open(threads, accuracy_level, {"enable_cuda_graph": "1"})
            except FormatError as error:
                # It refuses where a part of a step runs on the processor.
                if "graph capture" not in str(error):
                    raise
            else:
                return session, Replays(self._runtime, session, self.cache, self._device)
        return self._open(threads, accuracy_level, {}), None

    def _open(self, threads: int | None, accuracy_level: int, settings: dict[str, str]) -> Any:
        options = self._runtime.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", str(accuracy_level))
        if threads is not None:
            options.intra_op_num_threads = threads
        if self._kernels is not None:
            options.register_custom_ops_library(str(self._kernels))
        path = file_inside(self.folder, self.description.model)
        try:
            # Equal scales of several layers would become one constant, and those layers then no fused products.
            session = self._runtime.InferenceSession(
                str(path),
                options,
                providers=_providers(self._device, settings),
                disabled_optimizers=["ConstantSharing"],
            )
        except Exception as error:
            raise why_not_opened(path, self._runtime, error) from error
        if PROVIDERS[self._device] not in session.get_providers():
            raise InputError(
                f"ONNX Runtime {self._runtime.__version__} could not start its {PROVIDERS[self._device]}, and says why "
                "above; install the CUDA and cuDNN libraries that it was built for, or use the cpu"
            )
        return session

    def logits(self, ids: Array) -> Array:
        """Return the logits [batch, length, vocabulary] of token ids [batch, length], with nothing before them."""
        state = _State(self, ids.shape[0], ids.shape[1], capacity=ids.shape[1])
        return state.run(ids.astype(np.int64))

    def generate(
        self,
        prompts: Sequence[Tokens],
        max_new_tokens: int,
        *,
        stop: Iterable[int] = (),
        temperature: float = 0.0,
        seed: int = 0,
        on_tokens: Callable[[Sequence[int]], None] | None = None,
    ) -> list[list[int]]:
        """Continue each prompt.

        Args:
            prompts: token ids, of any lengths; all are continued together.
            max_new_tokens: how many tokens each prompt gets at most.
            stop: tokens that end a text. They are part of the result.
            temperature: 0 takes the likeliest token each time; otherwise tokens are sampled.
            seed: of the sampling.
            on_tokens: called with the newest token of every prompt.

        Returns:
            The new tokens of each prompt.

        Raises:
            InputError: a prompt is empty, or too long for the model.
            NumericsError: NaN or Inf in the logits.
        """
        if not prompts or not all(len(prompt) for prompt in prompts):
            raise InputError("a prompt is empty; give at least one token")
        lengths = np.array([len(prompt) for prompt in prompts])
        longest = int(lengths.max())
        self._check_length(longest + max_new_tokens - 1)
        stopping = frozenset(stop)
        pick = _Pick(temperature, np.random.default_rng(seed))
        ids = np.zeros((len(prompts), longest), dtype=np.int64)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = prompt
        state = _State(self, len(prompts), longest, capacity=longest + max_new_tokens, lengths=lengths)
        # Of a prompt only the last token's logits are needed; those of shorter ones lie before the end.
        first = int(lengths.min()) - 1 if FIRST_LOGITS in self.description.inputs else 0
        tokens = pick(state.run(ids, first)[np.arange(len(prompts)), lengths - 1 - first])
        made: list[list[int]] = [[] for _ in prompts]
        done = np.zeros(len(prompts), dtype=bool)
        for step in range(max_new_tokens):
            for row in np.flatnonzero(~done).tolist():
                made[row].append(int(tokens[row]))
            done |= [int(token) in stopping for token in tokens]
            if on_tokens is not None:
                on_tokens([int(token) for token in tokens])
            if done.all() or step == max_new_tokens - 1:
                break
            tokens = pick(state.run(tokens[:, None])[:, -1])
        return made

    def _check_length(self, length: int) -> None:
        limit = self.description.positions
        if limit is not None and length > limit:
            raise InputError(f"{length} tokens do not fit this model, which has {limit} positions; ask for fewer")


class _State:
    """The cache of one batch of texts, and what the next call needs besides."""

    def __init__(
        self, decoder: OnnxDecoder, batch: int, longest: int, *, capacity: int, lengths: Array | None = None
    ) -> None:
        self._decoder = decoder
        self._lengths = np.full(batch, longest) if lengths is None else lengths
        self._binding = decoder._session.io_binding()
        # On a processor a bound value is the memory of an array, which older versions of ONNX Runtime do not keep.
        self._bound: dict[str, Any] = {}
        # Padding follows a prompt: its tokens are masked, and what is generated comes after it in the mask.
        self._mask = (np.arange(longest)[None] < self._lengths[:, None]).astype(np.int64)
        self._positions = np.minimum(np.arange(longest)[None], self._lengths[:, None] - 1).astype(np.int64)
        cache = decoder.cache
        self._inputs, self._outputs = cache.names("past_key_values"), cache.names("present")
        self._shared = cache.shared
        shape = (batch, cache.heads, capacity if cache.shared else 0, cache.size)
        self._replay = None if decoder._replays is None else decoder._replays.of(batch, capacity)
        self._past = (
            [self._to_device(np.zeros(shape, dtype=decoder._dtype)) for _ in self._inputs]
            if self._replay is None
            else self._replay.past
        )
        self._begun = False
        self._first: int | None = None
        self._logits: Array = np.empty(0, dtype=decoder._dtype)
        if self._shared:
            self._bind_cache()

    def run(self, ids: Array, first: int = 0) -> Array:
        """Read tokens [batch, new]; return the logits [batch, new - first, vocabulary] from token ``first`` on.

        They are valid until the next call.
        """
        if self._replay is not None and self._begun:
            logits = self._replay.step(ids, self._positions)
        else:
            logits = self._run(ids, first)
            self._mask = np.concatenate((self._mask, np.ones((len(ids), 1), dtype=np.int64)), axis=1)
        self._begun = True
        self._positions = self._lengths[:, None].astype(np.int64)
        self._lengths = self._lengths + 1
        return logits

    def _run(self, ids: Array, first: int) -> Array:
        decoder, binding = self._decoder, self._binding
        values = {"input_ids": ids, "attention_mask": self._mask, "position_ids": self._positions}
        for name in decoder.description.inputs:
            if name in values:
                self._bind_input(name, self._to_device(np.ascontiguousarray(values[name])))
        if first != self._first and FIRST_LOGITS in decoder.description.inputs:
            self._bind_input(FIRST_LOGITS, self._on_cpu(np.array([first], dtype=np.int64)))
            self._first = first
        shape = (len(ids), ids.shape[1] - first, decoder.vocabulary)
        if self._logits.shape != shape:
            self._logits = np.empty(shape, dtype=decoder._dtype)
            binding.bind_ortvalue_output("logits", self._on_cpu(self._logits))
        if not self._shared:
            self._bind_cache()
        decoder._session.run_with_iobinding(
            binding, None if decoder._replays is None else decoder._replays.not_captured
        )
        if not self._shared:
            # The logits were bound before the cache.
            self._past = binding.get_outputs()[1:]
        return self._logits

    def _bind_input(self, name: str, value: Any) -> None:
        self._binding.bind_ortvalue_input(name, value)
        self._bound[name] = value

    def _bind_cache(self) -> None:
        """Bind the cache; one that is input and output at once stays bound for all calls."""
        for name, past in zip(self._inputs, self._past, strict=True):
            self._binding.bind_ortvalue_input(name, past)
        for name, past in zip(self._outputs, self._past, strict=True):
            if self._shared:
                self._binding.bind_ortvalue_output(name, past)
            else:
                self._binding.bind_output(name, self._decoder._device)

    def _on_cpu(self, array: Array) -> Any:
        return self._decoder._runtime.OrtValue.ortvalue_from_numpy(array)

    def _to_device(self, array: Array) -> Any:
        return self._decoder._runtime.OrtValue.ortvalue_from_numpy(array, self._decoder._device, 0)


def _providers(device: str, settings: dict[str, str]) -> list[Any]:
    """Return the execution providers of a session; on CUDA products in float32 are not rounded to TF32."""
    if device == "cpu":
        return [PROVIDERS["cpu"]]
    return [(PROVIDERS[device], {"use_tf32": "0"} | settings), PROVIDERS["cpu"]]


def why_not_opened(path: Path, runtime: Any, error: Exception) -> SlimError:
    """Return what to raise when ONNX Runtime refuses a file: it is too old for it, or the file is damaged."""
    reason = " ".join(str(error).split())[:400]
    unknown = (
        *("Unsupported model IR version", "only *guarantees* support for models stamped"),
        *("is not a registered", "Unrecognized attribute"),
    )
    if any(words in reason for words in unknown):
        return InputError(
            f"{path}: ONNX Runtime {runtime.__version__} is too old for it: {reason}; pip install -U onnxruntime, or "
            "export the model again with a lower opset, or without --embedding-bits"
        )
    return FormatError(
        f"{path}: ONNX Runtime {runtime.__version__} cannot open it: {reason}; the file is damaged, or this ONNX "
        "Runtime is too old for it"
    )


def import_runtime() -> Any:
    """Import and return ONNX Runtime.

    Raises:
        InputError: it is missing, or older than `OLDEST_RUNTIME`.
    """
    try:
        import onnxruntime
    except ImportError:
        raise InputError("running an ONNX folder needs the package onnxruntime: pip install 'slimc[onnx]'") from None
    found = tuple(int(part) for part in re.findall(r"\d+", onnxruntime.__version__)[:2])
    if found < OLDEST_RUNTIME:
        oldest = ".".join(map(str, OLDEST_RUNTIME))
        raise InputError(
            f"onnxruntime {onnxruntime.__version__} is too old for what slimc exports: pip install -U "
            f"'onnxruntime>={oldest}'"
        )
    return onnxruntime


def _runtime(device: str) -> Any:
    """Return ONNX Runtime after checking that it has the provider for a device."""
    runtime = import_runtime()
    if device not in PROVIDERS:
        raise InputError(f"an ONNX folder runs on {' or '.join(PROVIDERS)}, not on {device!r}")
    if PROVIDERS[device] not in runtime.get_available_providers():
        raise InputError(f"this onnxruntime has no {PROVIDERS[device]}: pip install onnxruntime-gpu, or use the cpu")
    if device == "cuda" and hasattr(runtime, "preload_dlls"):
        # Finds the CUDA libraries of PyTorch or of NVIDIA's wheels, where the loader would not look.
        runtime.preload_dlls()
    return runtime
