"""What is run: one frozen recipe (opd.yaml), of which an arm overrides loss terms alone and a control one thing more."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from examples.reproduction.make_models import HERE, WORK

PAIRS = (0, 1, 2)
STEPS = 120  # as opd.yaml
OPD = ("mixture.gold=0", "loss.reference_kl=0")


@dataclass(frozen=True)
class Arm:
    title: str
    overrides: tuple[str, ...]
    teacher: str = "teacher"  # a folder of the pair
    prompts: str = "train.jsonl"  # a file of the pair
    pairs: tuple[int, ...] = PAIRS


# mixture.gold_weight=1 and loss.reference_kl=0.5 are opd.yaml's: StableOPD is the recipe as it stands.
ARMS = {
    "opd": Arm("OPD", OPD),
    "reference_kl": Arm("OPD + reference KL", ("mixture.gold=0",)),
    "gold": Arm("OPD + gold", ("loss.reference_kl=0",)),
    "stableopd": Arm("StableOPD", ()),
    "gold_only": Arm("gold only, no OPD", ("mixture.student=0",)),
}
CONTROLS = {
    "response_mean": Arm("response mean in place of token mean", (*OPD, "loss.aggregation=response"), pairs=(0,)),
    "cap_96": Arm("at most 96 tokens, not 160", (*OPD, "rollout.sampling.max_new_tokens=96"), pairs=(0,)),
    "bounded_teacher": Arm("teacher without endless documents", OPD, teacher="bounded_teacher", pairs=(0,)),
    "reverse_kl": Arm("exact reverse KL", (*OPD, "loss.opd=reverse_kl"), pairs=(0,)),
    "jsd": Arm("exact JSD", (*OPD, "loss.opd=jsd"), pairs=(0,)),
    "forward_kl": Arm("exact forward KL", (*OPD, "loss.opd=forward_kl"), pairs=(0,)),
    "top_p": Arm("rollouts at top-p 0.9", (*OPD, "rollout.sampling.top_p=0.9"), pairs=(0,)),
    "lr_double": Arm("learning rate 4e-4", (*OPD, "optimizer.lr=4.0e-4"), pairs=(0,)),
    "lr_half": Arm("learning rate 1e-4", (*OPD, "optimizer.lr=1.0e-4"), pairs=(0,)),
    "student_style_gold": Arm(
        "OPD + gold in the student's style", ("loss.reference_kl=0",), prompts="train_student_style.jsonl", pairs=(0,)
    ),
}
EVERY = {**ARMS, **CONTROLS}


def run_folder(name: str, pair: int) -> Path:
    return WORK / "runs" / f"{name}-{pair}"


def command_overrides(name: str, pair: int) -> list[str]:
    """Everything that the run ``name`` of ``pair`` sets on top of opd.yaml."""
    arm, models = EVERY[name], WORK / f"pair-{pair}"
    return [
        f"run.name={name}-{pair}",
        f"run.dir={run_folder(name, pair)}",
        f"run.seed={pair + 1}",
        f"student.model={models / 'student'}",
        f"teacher.model={models / arm.teacher}",
        f"data.prompts={models / arm.prompts}",
        f"eval.prompts={WORK / 'heldout.jsonl'}",
        *arm.overrides,
    ]


CONFIG = HERE / "opd.yaml"
