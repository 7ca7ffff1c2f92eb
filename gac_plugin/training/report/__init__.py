"""The report of a run: one HTML file that holds everything and asks nobody for anything."""

from gac_plugin.training.report.page import LiveReport, train_command, write_reports

__all__ = ["LiveReport", "train_command", "write_reports"]
