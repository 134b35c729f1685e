"""The method's entry points: rotate, train the block's transforms and clips, then round on inputs as the quantised model sees them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from calibration.methods.qqq import Qqq

if TYPE_CHECKING:
    pass

__all__ = ["METHOD"]


METHOD = Qqq()
