"""The names of the choices: kept apart so that reading a configuration loads no tensors."""

from __future__ import annotations

from typing import Literal

Method = Literal["mean", "projected", "biprojected"]
"""How a direction is made from mean residuals; see `perpend.core.directions.fit_directions`."""

Mode = Literal["plain", "column", "row"]
"""How a direction is taken out of a matrix; see `perpend.core.edits`."""
