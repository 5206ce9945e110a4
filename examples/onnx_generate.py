"""Let a model that was exported with its cache continue a text: onnxruntime, numpy and tokenizers, nothing else.

slimc export small -o onnx --format onnx
python examples/onnx_generate.py onnx --prompt "Once upon a time"
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer


def main() -> None:
    """Continue the prompt, word by word."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("folder", type=Path)
    arguments.add_argument("--prompt", default="Once upon a time")
    arguments.add_argument("--tokens", type=int, default=64)
    arguments.add_argument("--provider", default="CPUExecutionProvider")
    chosen = arguments.parse_args()

    if not (chosen.folder / "slim_onnx.json").is_file():
        arguments.error(f"{chosen.folder} is no folder that slimc export wrote: it has no slim_onnx.json")
    description = json.loads((chosen.folder / "slim_onnx.json").read_text())
    for name, size in description["files"].items():
        if not (chosen.folder / name).is_file() or (chosen.folder / name).stat().st_size != size:
            arguments.error(f"{chosen.folder / name} is missing or not whole; copy the folder again")
    if description["cache"] is None:
        arguments.error(f"{chosen.folder} was exported without a cache, so it cannot generate text")
    if not (chosen.folder / "tokenizer.json").is_file():
        arguments.error(f"{chosen.folder} has no tokenizer.json; export the model with its tokenizer")
    if chosen.provider not in onnxruntime.get_available_providers():
        arguments.error(f"this onnxruntime has no {chosen.provider}, only {onnxruntime.get_available_providers()}")
    config = json.loads((chosen.folder / "config.json").read_text())
    tokenizer = Tokenizer.from_file(str(chosen.folder / "tokenizer.json"))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # Errors only: it warns of inputs that may be left out.
    # Products that ONNX Runtime finds in the graph are then computed in its dtype, and not with inputs of 8 bits.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    model = chosen.folder / description["model"]
    # Merging equal scales of several layers would keep it from finding those products.
    try:
        session = onnxruntime.InferenceSession(
            str(model), options, providers=[chosen.provider], disabled_optimizers=["ConstantSharing"]
        )
    except Exception as error:
        arguments.error(f"ONNX Runtime {onnxruntime.__version__} cannot open {model}, a newer one may: {error}")

    cache = description["cache"]
    names = [f"{layer}.{part}" for layer in range(cache["layers"]) for part in ("key", "value")]
    ids = tokenizer.encode(chosen.prompt).ids
    if not ids:
        arguments.error("the prompt is empty; give at least one word")
    if description["positions"] is not None and len(ids) + chosen.tokens - 1 > description["positions"]:
        arguments.error(f"{len(ids)} + {chosen.tokens} tokens do not fit the {description['positions']} of this model")
    ends = config["eos_token_id"] if isinstance(config["eos_token_id"], list) else [config["eos_token_id"]]
    # A cache of nothing. (A longer one may be bound as input and output at once, if `shared` says so.)
    past = [np.zeros((1, cache["heads"], 0, cache["size"]), dtype=cache["dtype"]) for _ in names]
    new, tokens, read = ids, [], 0
    started = time.perf_counter()
    while len(tokens) < chosen.tokens:
        read += len(new)
        inputs = {
            "input_ids": np.array([new]),
            "attention_mask": np.ones((1, read), dtype=np.int64),
            "position_ids": np.arange(read - len(new), read)[None],
            # Of a prompt only the last token's logits are needed.
            "first_logits": np.array([len(new) - 1]),
        }
        inputs = {name: value for name, value in inputs.items() if name in description["inputs"]}
        inputs |= {f"past_key_values.{name}": value for name, value in zip(names, past, strict=True)}
        logits, *past = session.run(None, inputs)
        new = [int(logits[0, -1].argmax())]
        if new[0] in ends:
            break
        tokens += new
    seconds = time.perf_counter() - started
    print(chosen.prompt + tokenizer.decode(tokens))
    print(f"{len(tokens)} tokens, {len(tokens) / seconds:.1f} a second")


if __name__ == "__main__":
    main()
