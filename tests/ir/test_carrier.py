"""The module carrier: the user's own model with SlimLinear in the places of its linears."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from slimc.ir.capture import capture
from slimc.ir.carrier import install
from slimc.ir.express import express
from slimc.ir.program import Program
from slimc.ir.verify import verify
from slimc.runtime.modules import SlimLinear

Packer = Callable[..., Any]


def compressed(model: nn.Module, pack: Packer) -> tuple[Program, torch.Tensor]:
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    program = capture(model, [((x,), {})])
    for site in program.sites.values():
        express(program, site, pack(program.dense_weight(site), "int4 2:4 rank4"))
    program.module.recompile()
    return program, x


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Dropout(), nn.Linear(8, 8, bias=False)).eval()


def test_the_original_is_left_as_it_was(pack: Packer) -> None:
    model = mlp()
    before, modules = copy.deepcopy(model.state_dict()), list(model)
    program, x = compressed(model, pack)
    small = install(model, program, inplace=False)
    assert small is not model
    assert type(small) is nn.Sequential
    assert list(model) == modules
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [type(module) for module in small] == [SlimLinear, nn.Dropout, SlimLinear]
    assert torch.equal(small(x), program.run(x))
    assert small[0].bias.data_ptr() != model[0].bias.data_ptr()


def test_in_place_the_model_itself_is_changed(pack: Packer) -> None:
    model = mlp()
    dropout = model[1]
    program, x = compressed(model, pack)
    assert install(model, program, inplace=True) is model
    assert [type(module) for module in model] == [SlimLinear, nn.Dropout, SlimLinear]
    assert model[1] is dropout
    assert torch.equal(model(x), program.run(x))


def test_a_model_that_is_one_linear_is_replaced(pack: Packer) -> None:
    model = nn.Linear(8, 4)
    program, x = compressed(model, pack)
    small = install(model, program, inplace=False)
    assert isinstance(small, SlimLinear)
    assert isinstance(model, nn.Linear)
    assert torch.equal(small(x), program.run(x))


def test_a_shared_module_stays_shared(pack: Packer) -> None:
    torch.manual_seed(0)
    shared = nn.Linear(8, 8)
    model = nn.Sequential(shared, nn.Tanh(), shared)
    for inplace in (False, True):
        program, x = compressed(model, pack)
        small = install(model, program, inplace=inplace)
        assert small[0] is small[2]
        assert isinstance(small[0], SlimLinear)
        assert torch.equal(small(x), program.run(x))


def test_modules_that_share_a_weight_keep_their_own_biases(pack: Packer) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8, bias=False))
    model[2].weight = model[4].weight = model[0].weight
    program, x = compressed(model, pack)
    small = install(model, program, inplace=False)
    assert small[0].values.data_ptr() == small[2].values.data_ptr() == small[4].values.data_ptr()
    assert not torch.equal(small[0].bias, small[2].bias)
    assert small[4].bias is None
    assert torch.equal(small(x), program.run(x))


def test_the_training_flag_of_each_module_is_kept(pack: Packer) -> None:
    model = mlp().train()
    model[2].eval()
    program, _ = compressed(model, pack)
    small = install(model, program, inplace=False)
    assert [module.training for module in small] == [True, True, False]


def test_the_result_can_be_copied(pack: Packer) -> None:
    model = mlp()
    program, x = compressed(model, pack)
    small = install(model, program, inplace=False)
    again = copy.deepcopy(small)
    assert torch.equal(again(x), small(x))
    assert again[0].values.data_ptr() != small[0].values.data_ptr()


def test_what_was_not_compressed_is_not_replaced(pack: Packer) -> None:
    model = mlp()
    program, _ = compressed(model, pack)
    program.sites["2"].packed = None
    assert [type(module) for module in install(model, program, inplace=False)] == [SlimLinear, nn.Dropout, nn.Linear]


class Tied(nn.Module):
    """A language model in miniature; its head is the embedding's matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.head = nn.Linear(8, 16, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(ids))


def test_a_tied_head_that_is_included_leaves_the_embedding_dense(pack: Packer) -> None:
    model = Tied()
    ids = torch.arange(10).reshape(2, 5)
    program = capture(model, [((ids,), {})], include=["head"])
    site = program.sites["head"]
    express(program, site, pack(program.dense_weight(site), "int4"))
    program.module.recompile()
    verify(program)
    small = install(model, program, inplace=False)
    assert isinstance(small.head, SlimLinear)
    assert torch.equal(small.embed.weight, model.embed.weight)
    assert torch.equal(small(ids), program.run(ids))
