"""What a plan, a run and a comparison look like: figures for files, tables for the terminal."""

from smtune.report.figures import accuracy_bars, block_map, loss_curve, projection_shares
from smtune.report.tables import plan_table

__all__ = ["accuracy_bars", "block_map", "loss_curve", "plan_table", "projection_shares"]
