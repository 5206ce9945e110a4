"""The menu: the expressions among which a plan chooses, one for each site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from slimc.errors import RecipeError
from slimc.passes import Calibrate, PerSite, SitePass, from_config
from slimc.passes.pipeline import check_order

DENSE = "dense"
"""The choice of leaving a site as it is; every menu has it."""

CALIBRATION = Calibrate(samples=64, length=512, held_out=0.25)
"""How the menu is measured: fitted to three quarters of the text, judged by the rest."""

MENU: Mapping[str, Sequence[Any]] = {
    "int2/64": [{"quantize": {"bits": 2, "group": 64}}],
    "int2/32": [{"quantize": {"bits": 2, "group": 32}}],
    "int3/128": [{"quantize": {"bits": 3, "group": 128}}],
    "int3/64": [{"quantize": {"bits": 3, "group": 64}}],
    "int3/32": [{"quantize": {"bits": 3, "group": 32}}],
    "int4/128": [{"quantize": {"bits": 4, "group": 128}}],
    "int4/64": [{"quantize": {"bits": 4, "group": 64}}],
    "int4/32": [{"quantize": {"bits": 4, "group": 32}}],
    "int5/64": [{"quantize": {"bits": 5, "group": 64}}],
    "int6/64": [{"quantize": {"bits": 6, "group": 64}}],
    "int8": [{"quantize": {"bits": 8, "group": "channel"}}],
}
"""What a plan chooses from by default: passes by the name of the expression, as recipe lines."""


def build(menu: Mapping[str, Sequence[Any]]) -> dict[str, list[SitePass]]:
    """Return the passes of each expression of ``menu``, given as recipe lines or as passes.

    Raises:
        RecipeError: the menu is empty, has an entry of its own for leaving sites dense, or has passes that no site
            could be expressed by.
    """
    if DENSE in menu:
        raise RecipeError(f"'{DENSE}' stands on every menu already, as the choice to leave a site as it is.")
    # The pass that will carry the plan knows what an expression may be.
    carrier = PerSite(expressions=menu, default=next(iter(menu), None))
    check_order([CALIBRATION, carrier])
    expressions = {name: from_config(lines) for name, lines in carrier.expressions.items()}
    return {name: [one for one in passes if isinstance(one, SitePass)] for name, passes in expressions.items()}
