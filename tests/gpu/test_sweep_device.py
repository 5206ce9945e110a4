"""The sweep on a GPU while the model stays in main memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import slimc
from slimc.passes import Calibrate, Fuse, LowRank, Prune, Quantize

PASSES = [Calibrate(), Quantize(), Prune("2:4"), LowRank(bits=4), Fuse()]


class Layered(nn.Module):
    """Layers that are much larger than the activations."""

    def __init__(self, layers: int = 12, width: int = 1024) -> None:
        super().__init__()
        self.position = nn.Embedding(16, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.position(torch.arange(x.shape[1], device=x.device))
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


def test_the_result_is_that_of_a_model_on_the_gpu_and_memory_holds_one_layer() -> None:
    torch.manual_seed(0)
    model = Layered().eval()
    batches = [torch.randn(4, 16, 1024) for _ in range(2)]
    there = slimc.compile(Layered().eval().cuda().requires_grad_(False), batches, PASSES)  # warms the libraries up
    there = slimc.compile(_on_gpu(model), batches, PASSES)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    here = slimc.compile(model, batches, PASSES, device="cuda")
    used = torch.cuda.max_memory_allocated() - before
    assert {tensor.device.type for tensor in here.state_dict().values()} == {"cpu"}
    for name, tensor in there.state_dict().items():
        assert torch.equal(tensor.cpu(), here.state_dict()[name]), name
    # Solving one site takes some float32 and float64 copies of it; the whole model is 12 layers.
    one_layer = 4 * 1024 * 1024
    assert used < 12 * one_layer + sum(batch.nbytes for batch in batches) * 4


def _on_gpu(model: nn.Module) -> nn.Module:
    other = Layered().eval()
    other.load_state_dict(model.state_dict())
    return other.cuda()
