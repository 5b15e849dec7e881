"""What student, teacher and engine say of the responses, from the loss's own terms."""

from __future__ import annotations

from megatron_opd.types import LossTerms

_OF_THE_TEACHER = (
    *("advantage", "advantage_repeated", "advantage_regular", "teacher_log_prob", "teacher_stop_log_prob"),
    *("teacher_entropy", "top1_agreement", "top_k_overlap"),
)
_OF_ITS_LOGITS = ("teacher_entropy", "top1_agreement")  # the overlap counts its own positions


def policy_figures(
    terms: LossTerms[float], engine_gap_max: float, prefix: str, *, teacher: bool = True, logits: bool = True
) -> dict[str, float | None]:
    """Means over the responses' tokens, in nats or shares, as metrics.jsonl has them under ``prefix``.

    Args:
        engine_gap_max: nats, over all of the tokens.
        teacher: there is one; else its figures are None.
        logits: it gives them; else those that log-probabilities of some tokens do not tell are None.
    """
    share, repeated = terms.repeated_weight, terms.repeated_advantage
    figures: dict[str, float | None] = {
        "entropy": terms.entropy,
        "teacher_entropy": terms.teacher_entropy,
        "advantage": terms.advantage,
        "top1_agreement": terms.top1_agreement,
        "advantage_repeated": repeated / share if share > 0 else None,
        "advantage_regular": (terms.advantage - repeated) / (1 - share) if share < 1 else None,
        "repeated_weight": share,
        "log_prob": terms.log_prob,
        "teacher_log_prob": terms.teacher_log_prob,
        "engine_log_prob": terms.engine_log_prob,
        "top_k_overlap": terms.overlap / terms.overlap_positions if terms.overlap_positions else None,
        "stop_log_prob": terms.stop_log_prob,
        "teacher_stop_log_prob": terms.teacher_stop_log_prob,
        "engine_gap_mean": terms.engine_gap,
        "engine_gap_max": engine_gap_max,
    }
    unknown = _OF_THE_TEACHER if not teacher else () if logits else _OF_ITS_LOGITS
    return {f"{prefix}/{name}": None if name in unknown else value for name, value in figures.items()}
