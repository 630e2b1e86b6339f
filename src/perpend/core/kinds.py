"""The names of the choices: kept apart so that reading a configuration loads no tensors."""

from __future__ import annotations

from typing import Literal

Method = Literal["mean", "projected", "biprojected"]
"""How a direction is made from mean residuals; see `perpend.core.directions.fit_directions`."""

Basis = tuple[Method, int]
"""What tells the directions of one fit apart: the method, and how many per module (k)."""

Mode = Literal["plain", "column", "row"]
"""How a direction is taken out of a matrix; see `perpend.core.edits`."""
