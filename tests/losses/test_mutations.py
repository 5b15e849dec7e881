"""The tests can fail: each mutation of the code, one plausible mistake, is caught by the tests that it names."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]


class Mutation(NamedTuple):
    file: str  # below megatron_opd/losses
    before: str
    after: str
    caught_by: str  # pytest arguments; at least one of the selected tests must fail


ORACLE = "tests/losses/test_oracle.py -k"
SCORES = "tests/losses/test_scores.py -k"
MUTATIONS = {
    "reverse KL's mean is forgotten": Mutation(
        "divergence.py", "constant=-mean, field=1.0", "constant=0.0, field=1.0", f"{ORACLE} 1-reverse_kl-fp32"
    ),
    "forward KL without the teacher": Mutation(
        "divergence.py", "constant=1.0, teacher_probs=1.0", "constant=1.0", f"{ORACLE} 1-forward_kl-fp32"
    ),
    "beta on the wrong side": Mutation(
        "divergence.py",
        "student_mean, student_weight = sums[0] / student_total, 1 - self.beta",
        "student_mean, student_weight = sums[0] / student_total, self.beta",
        f"{ORACLE} 1-jsd-fp32",
    ),
    "skew's slope through the mixture is forgotten": Mutation(
        "divergence.py", "(sums[0] + self.alpha * sums[1])", "sums[0]", f"{ORACLE} 1-skew_reverse_kl-fp32"
    ),
    "skew forward without its share": Mutation(
        "divergence.py", "slope = 1 - self.alpha", "slope = 1.0", f"{ORACLE} 1-skew_forward_kl-fp32"
    ),
    "top-k without its bucket": Mutation(
        "top_k.py", "(cross + tail_s * tail_ratio)", "cross", f"{ORACLE} 1-topk_reverse_kl-fp32"
    ),
    "top-k's bucket has no gradient": Mutation(
        "top_k.py", "constant=1 - teacher_tail_share", "constant=0.0", f"{ORACLE} 1-topk_forward_kl-fp32"
    ),
    "local support is not renormalised": Mutation(
        "top_k.py", "mean = cross / head_s", "mean = cross / student_total", f"{ORACLE} 1-local_support-fp32"
    ),
    "top-k with no more than one of each rank": Mutation(
        "top_k.py",
        "(winners // self.k == shard.rank)",
        "((winners // self.k == shard.rank) & (winners % self.k == 0))",
        f"{ORACLE} 2-topk_reverse_kl-fp32",
    ),
    "the clip has no gradient mask": Mutation(
        "policy_gradient.py", "slope.where(slope >= clipped, 0.0)", "slope", f"{ORACLE} 1-sampled-fp32"
    ),
    "the advantage has the other sign": Mutation(
        "policy_gradient.py",
        "value = slope = -ratio * advantage",
        "value = slope = ratio * advantage",
        f"{ORACLE} 1-sampled-fp32",
    ),
    "the temperature's own gradient is forgotten": Mutation(
        "chunk.py",
        "(each / self.temperature for each in tokens.weights)",
        "(each for each in tokens.weights)",
        f"{ORACLE} 1-reverse_kl-fp32",
    ),
    "the reference term pulls the wrong way": Mutation(
        "chunk.py",
        "reference = reference_weights / student_total",
        "reference = -reference_weights / student_total",
        f"{ORACLE} 1-forward_kl-fp32",
    ),
    "the stop class pushes its members alike": Mutation(
        "stop_class.py",
        "members.softmax(0)[self._owned(shard)]",
        "members.softmax(0)[self._owned(shard)] * 0 + 0.5",
        "tests/losses/test_variants.py -k 'count_as_one and 1-sampled'",
    ),
    "the stop class ignores what the engine reported": Mutation(
        "policy_gradient.py",
        "old = old_log_probs + (rows.student.class_log_prob - rows.student.log_prob)",
        "old = old_log_probs",
        "tests/losses/test_variants.py -k 'count_as_one and 1-sampled'",
    ),
    "the totals stay local": Mutation(
        "shard.py",
        "return self._reduce(packed, dist.ReduceOp.SUM)",
        "return Pending(packed, None)",
        f"{ORACLE} 2-reverse_kl-fp32",
    ),
    "the maxima stay local": Mutation(
        "shard.py",
        "return self._reduce(packed, dist.ReduceOp.MAX)",
        "return Pending(packed, None)",
        f"{ORACLE} 2-reverse_kl-fp32",
    ),
    "the hidden gradient is not reduced": Mutation(
        "fused_linear.py", "if self._shard.group is not None and len(self._rows):", "if False:", f"{ORACLE} 2-reverse_kl-fp32"
    ),
    "padding rows get probability": Mutation(
        "shard.py", "min(max(true_rows - start, 0), rows)", "rows", f"{ORACLE} 1-reverse_kl-fp32"
    ),
    "chunks overwrite each other's gradient rows": Mutation(
        "fused_linear.py",
        "gradients.add(first + chunk.start, logit_gradient)",
        "gradients.add(first, logit_gradient)",
        f"{ORACLE} 1-reverse_kl-fp32",
    ),
    "statistics in bf16": Mutation(
        "vocab_parallel.py",
        "return torch.float64 if dtype == torch.float64 else torch.float32",
        "return dtype",
        f"{ORACLE} 1-reverse_kl-bf16",
    ),
    "gold shares the rollouts' weights": Mutation(
        "objective.py",
        "+ objective.gold_weight * self.gold\n        if",
        "+ objective.gold_weight * self.rollout\n        if",
        "tests/losses/test_objective.py -k 'fp64 and 1-sampled'",
    ),
    "position weights count the token itself": Mutation(
        "objective.py",
        "before = magnitudes.cumsum(0) - magnitudes",
        "before = magnitudes.cumsum(0)",
        "tests/losses/test_variants.py -k '1-IW-OPD'",
    ),
    "EOPD's gate is always open": Mutation(
        "policy_gradient.py",
        "(rows.teacher_entropy > self.entropy_gate)",
        "(rows.teacher_entropy > -1)",
        "tests/losses/test_variants.py -k '1-EOPD'",
    ),
    "a served teacher's tail is left out": Mutation(
        "chunk.py", "sums[3] = served.tail()", "pass", f"{SCORES} '1-topk_forward_kl'"
    ),
    "every rank owns all of a served teacher's ids": Mutation(
        "top_k.py", "owned & self.log_probs.isfinite()", "self.log_probs.isfinite()", f"{SCORES} '2-topk_forward_kl-one'"
    ),
    "a served teacher's stop class does not count as one of the k": Mutation(
        "top_k.py",
        "log_probs[:, -1:].masked_fill(class_wins, -torch.inf)",
        "log_probs[:, -1:]",
        f"{SCORES} '1-local_support-one'",
    ),
    "a stop class among the student's k is forgotten": Mutation(
        "top_k.py", "log_probs[:, -1:].isneginf()", "log_probs[:, -1:].isnan()", f"{SCORES} '1-topk_reverse_kl-one'"
    ),
    "the student's k are those of the teacher's likeliest entries": Mutation(
        "top_k.py",
        'if self.kind == "topk_reverse_kl":\n            class_wins',
        "if False:\n            class_wins",
        f"{SCORES} '1-topk_reverse_kl-one'",
    ),
    "a served teacher's end token counts by itself": Mutation(
        "chunk.py",
        "scores.stop_log_probs.where(in_class, scores.log_probs)",
        "scores.log_probs",
        f"{SCORES} '1-sampled-one'",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_is_caught(name: str, tmp_path: Path) -> None:
    mutation = MUTATIONS[name]
    for folder in ("megatron_opd", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    source = tmp_path / "megatron_opd" / "losses" / mutation.file
    text = source.read_text(encoding="utf-8")
    assert text.count(mutation.before) == 1, "the mutation no longer fits the code"
    source.write_text(text.replace(mutation.before, mutation.after), encoding="utf-8")
    command = f"{sys.executable} -m pytest -q -x -p no:cacheprovider {mutation.caught_by}"
    run = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, env={**os.environ}, timeout=600)
    assert run.returncode == 1, run.stdout[-3000:]  # 1: a test failed; 5 would be that none was selected
    assert "1 failed" in run.stdout and "Error: " in run.stdout
