"""A run, or several side by side, as one HTML page. Reads the files of run folders only."""

from megatron_opd.report.command import write_report

__all__ = ["write_report"]
