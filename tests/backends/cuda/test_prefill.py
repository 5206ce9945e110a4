"""How the launches for many tokens are divided, in the parts that need no GPU."""

from __future__ import annotations

import pytest

from slimc.backends.cuda import prefill
from slimc.backends.cuda.layer import FACTOR_GROUP
from slimc.backends.cuda.prefill import Form, LaunchShape
from slimc.backends.cuda.rounding import kept_for

PROCESSORS = 132


def test_a_launch_beside_another_has_one_block_on_each_multiprocessor() -> None:
    alone = LaunchShape(64, 2, 1, blocks=2)
    beside = LaunchShape(64, 2, 1, blocks=2, beside=True)
    assert alone.divide(1000, 10, PROCESSORS, cost=1)[0] == 2 * PROCESSORS
    assert beside.divide(1000, 10, PROCESSORS, cost=1)[0] == PROCESSORS


def test_tiles_are_shared_only_where_enough_would_be_idle() -> None:
    shape = LaunchShape(128, 2, 2)
    assert shape.divide(2 * PROCESSORS, 39, PROCESSORS, cost=16) == (PROCESSORS, 0)
    clusters, shared = shape.divide(PROCESSORS + 40, 39, PROCESSORS, cost=16)
    assert (clusters, shared) == (PROCESSORS, PROCESSORS + 40)


@pytest.mark.parametrize("activation", [None, "int8"])
@pytest.mark.parametrize("tokens", [129, 256, 1024, 2048])
@pytest.mark.parametrize(("rows", "columns"), [(1024, 8192), (4096, 4096), (4096, 11008), (22016, 4096), (57344, 8192)])
def test_chosen_shapes_leave_room_for_a_pipeline(
    rows: int, columns: int, tokens: int, activation: prefill.Activation | None
) -> None:
    shape, right = prefill._shapes(rows, columns, tokens, activation, PROCESSORS)
    assert Form(True, 0, True, activation).stages(shape) >= 4
    assert Form(False, FACTOR_GROUP, False, activation).stages(right) >= 4


def test_few_tiles_run_side_by_side_and_many_do_not() -> None:
    shape, right = prefill._shapes(4096, 4096, 256, None, PROCESSORS)
    assert shape.beside
    assert right.beside
    shape, right = prefill._shapes(22016, 4096, 2048, None, PROCESSORS)
    assert not shape.beside
    assert not right.beside


def test_a_thread_keeps_no_more_of_a_token_than_it_has_registers_for() -> None:
    assert [kept_for(columns, 128) for columns in (8, 1024, 1032, 4096, 8192, 8200)] == [1, 1, 2, 4, 8, 8]
