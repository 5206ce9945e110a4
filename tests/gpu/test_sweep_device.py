"""The sweep on a GPU while the model stays in main memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import slimc
from slimc.passes import Calibrate, Fuse, LowRank, Prune, Quantize

PASSES = [Calibrate(), Quantize(), Prune("2:4"), LowRank(bits=4), Fuse()]
WIDTH = 1024


class Layered(nn.Module):
    """Layers that are much larger than the activations."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.position = nn.Embedding(16, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.position(torch.arange(x.shape[1], device=x.device))
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


def model_of(layers: int) -> Layered:
    torch.manual_seed(0)
    return Layered(layers).eval()


def batches() -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(4, 16, WIDTH) for _ in range(2)]


def test_the_result_is_that_of_a_model_on_the_gpu() -> None:
    there = slimc.compile(model_of(3).cuda(), batches(), PASSES)
    here = slimc.compile(model_of(3), batches(), PASSES, device="cuda")
    assert {tensor.device.type for tensor in here.state_dict().values()} == {"cpu"}
    for name, tensor in there.state_dict().items():
        assert torch.equal(tensor.cpu(), here.state_dict()[name]), name


def test_memory_on_the_gpu_does_not_grow_with_the_layers() -> None:
    def peak(layers: int) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        slimc.compile(model_of(layers), batches(), PASSES, device="cuda")
        return torch.cuda.max_memory_allocated() - before

    # Libraries take workspaces at first, and recorded loops theirs once a kind of problem has come up a few times.
    peak(20)
    one_layer = 4 * WIDTH * WIDTH
    assert peak(20) - peak(10) < one_layer
