"""Answer verification, benchmarks, accuracy."""

from megatron_opd.evaluation.evaluate import EvalResult, correctness, evaluate, rollout_figures
from megatron_opd.evaluation.tasks import Task, load_tasks
from megatron_opd.evaluation.verify import Verdict, extract_answer, is_correct, judge

__all__ = [
    "EvalResult",
    "Task",
    "Verdict",
    "correctness",
    "evaluate",
    "extract_answer",
    "is_correct",
    "judge",
    "load_tasks",
    "rollout_figures",
]
