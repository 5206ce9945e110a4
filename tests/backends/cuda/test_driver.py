"""What of the driver can be seen without a GPU: how arguments are laid out, and what is said where nothing runs."""

from __future__ import annotations

import ctypes

import pytest
import torch

from slimc.backends.cuda import driver
from slimc.backends.cuda.stream import _Arguments
from slimc.errors import KernelError


@pytest.mark.parametrize(
    ("capability", "target"), [((8, 0), "sm_80"), ((8, 9), "sm_80"), ((9, 0), "sm_90a"), ((10, 0), "sm_100")]
)
def test_each_generation_has_its_target(capability: tuple[int, int], target: str) -> None:
    assert driver.target_arch(*capability) == target


def test_a_part_older_than_ampere_is_refused_with_the_reason() -> None:
    with pytest.raises(KernelError, match=r"8\.0 or newer.*this device has 7\.5"):
        driver.target_arch(7, 5)


def test_arguments_lie_as_a_kernel_expects_them() -> None:
    packing, offsets = driver._layout("k", [ctypes.c_int, ctypes.c_void_p, ctypes.c_short, ctypes.c_double])
    assert offsets == [0, 8, 16, 24]
    assert packing.size == 32
    packed = packing.pack(-1, 1 << 40, 7, 0.5)
    assert packed[:4] == b"\xff" * 4
    assert int.from_bytes(packed[8:16], "little") == 1 << 40


def test_a_structure_with_tensor_maps_keeps_their_alignment() -> None:
    # The kernel's own structure is aligned to 64 bytes, and so its size is a multiple of that.
    assert ctypes.sizeof(_Arguments) % 64 == 0
    assert _Arguments.t_map.offset == 128


def test_what_is_no_argument_type_is_refused() -> None:
    with pytest.raises(KernelError, match="no type of an argument"):
        driver._layout("k", [str])


def test_attributes_of_a_launch_are_made_once() -> None:
    assert driver._launch_attributes(False, False, 1, False) == (0, 0)
    # There is no cluster whose blocks could be spread.
    assert driver._launch_attributes(False, False, 1, True) == (0, 0)
    address, count = driver._launch_attributes(True, True, 4, False)
    assert count == 3
    assert driver._launch_attributes(True, True, 4, False) == (address, count)
    assert driver._launch_attributes(True, True, 4, True)[1] == 4


def test_without_a_gpu_the_error_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    driver._library.cache_clear()
    with pytest.raises(KernelError, match="CUDA build of PyTorch|finds no CUDA device"):
        driver.load("", "k", 0)
