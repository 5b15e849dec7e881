"""Length, truncation and repetition of rollouts; alarms; metrics sinks; what the user sees."""

from megatron_opd.monitoring.console import TrainingConsole, summary_table
from megatron_opd.monitoring.length import LengthStats, length_stats, truncation_rate
from megatron_opd.monitoring.metrics import JsonlSink, TensorBoardSink, WandbSink, open_sinks
from megatron_opd.monitoring.monitors import Monitors
from megatron_opd.monitoring.repetition import repeated_ngram_share, repetition_rate
from megatron_opd.monitoring.samples import write_samples

__all__ = [
    "JsonlSink",
    "LengthStats",
    "Monitors",
    "TensorBoardSink",
    "TrainingConsole",
    "WandbSink",
    "length_stats",
    "open_sinks",
    "repeated_ngram_share",
    "repetition_rate",
    "summary_table",
    "truncation_rate",
    "write_samples",
]
