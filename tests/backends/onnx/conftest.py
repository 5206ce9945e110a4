"""What the tests of ONNX share: random packed weights, and ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

Runtime = Callable[[bytes | Path, Mapping[str, Any]], list[np.ndarray]]


@pytest.fixture(scope="session")
def in_runtime() -> Runtime:
    """Return ``run(model, inputs)``: ONNX Runtime on the CPU, with products in float32 as they are written."""
    ort = pytest.importorskip("onnxruntime")

    def run(model: bytes | Path, inputs: Mapping[str, Any]) -> list[np.ndarray]:
        options = ort.SessionOptions()
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
        options.log_severity_level = 4
        session = ort.InferenceSession(
            model if isinstance(model, bytes) else str(model), options, providers=["CPUExecutionProvider"]
        )
        found: list[np.ndarray] = session.run(None, dict(inputs))
        return found

    return run
