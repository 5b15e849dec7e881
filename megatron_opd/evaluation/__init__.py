"""Answer verification and accuracy."""

from megatron_opd.evaluation.evaluate import EvalResult, accuracy, correctness, evaluate
from megatron_opd.evaluation.verify import extract_answer, is_correct

__all__ = ["EvalResult", "accuracy", "correctness", "evaluate", "extract_answer", "is_correct"]
