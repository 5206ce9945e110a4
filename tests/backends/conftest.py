"""What tests of several backends share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import fx

from slimc.backends import dynamo


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[fx.Graph]:
    """Collects the graphs that Inductor would be given, and runs them as they are."""
    seen: list[fx.Graph] = []

    def interpret(graph: fx.GraphModule, inputs: Any, settings: Any) -> Callable[..., Any]:
        seen.append(graph.graph)
        return graph.forward

    monkeypatch.setattr(dynamo, "_inductor", interpret)
    return seen
