"""What is run: one frozen recipe (opd.yaml), of which an arm overrides loss terms alone and a control one thing more."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from examples.reproduction.make_models import HERE, WORK

CONFIG = HERE / "opd.yaml"
PAIRS = (0, 1, 2)
OPD = ("mixture.gold=0", "loss.reference_kl=0")
GOLD_ONLY = ("mixture.student=0",)


@dataclass(frozen=True)
class Arm:
    title: str
    overrides: tuple[str, ...]
    student: str = "student"  # a model of the pair, as the next
    teacher: str = "teacher"
    prompts: str = "train.jsonl"  # a file of the pair
    pairs: tuple[int, ...] = PAIRS
    own_heldout: bool = False  # evaluated at the end on problems of the pair's own, by which nothing was chosen
    baseline: str = "opd"  # what its accuracy is compared with


def control(title: str, *overrides: str, teacher: str = "teacher") -> Arm:
    """Plain OPD on one pair, but for one thing."""
    return Arm(title, (*OPD, *overrides), teacher=teacher, pairs=(0,))


# mixture.gold_weight=1 and loss.reference_kl=0.5 are opd.yaml's: StableOPD is the recipe as it stands.
ARMS = {
    "opd": Arm("OPD", OPD),
    "reference_kl": Arm("OPD + reference KL", ("mixture.gold=0",)),
    "gold": Arm("OPD + gold", ("loss.reference_kl=0",)),
    "stableopd": Arm("StableOPD", ()),
    "gold_only": Arm("gold only, no OPD", GOLD_ONLY),
}
CONTROLS = {
    "response_mean": control("response mean, not token mean", "loss.aggregation=response"),
    "cap_96": control("at most 96 tokens, not 160", "rollout.sampling.max_new_tokens=96"),
    "reverse_kl": control("exact reverse KL", "loss.opd=reverse_kl"),
    "jsd": control("exact JSD", "loss.opd=jsd"),
    "forward_kl": control("exact forward KL", "loss.opd=forward_kl"),
    "top_p": control("rollouts at top-p 0.9", "rollout.sampling.top_p=0.9"),
    "lr_double": control("learning rate 4e-4", "optimizer.lr=4.0e-4"),
    "lr_half": control("learning rate 1e-4", "optimizer.lr=1.0e-4"),
    "student_style_gold": Arm(
        "OPD + gold in the student's style", ("loss.reference_kl=0",), prompts="train_student_style.jsonl", pairs=(0,)
    ),
}
# A teacher that makes no loop; then the same one, but that it ends with another token than the student.
END_TOKENS = {
    "bounded_teacher": control("teacher without endless documents", teacher="bounded_teacher"),
    "ends_apart": control("it ends with another token, stop_class: none", "loss.stop_class=none", teacher="other_end_teacher"),
    "ends_merged": control("it ends with another token, stop_class: auto", teacher="other_end_teacher"),
}
# The same with a student and teachers that are not certain that a response ends after its answer.
UNSURE = {
    "unsure": Arm("one end token", OPD, "unsure_student", "unsure_teacher", pairs=(0,), baseline="unsure"),
    "unsure_apart": Arm(
        "another end token, stop_class: none",
        (*OPD, "loss.stop_class=none"),
        "unsure_student",
        "unsure_other_end_teacher",
        pairs=(0,),
        baseline="unsure",
    ),
    "unsure_merged": Arm(
        "another end token, stop_class: auto", OPD, "unsure_student", "unsure_other_end_teacher", pairs=(0,), baseline="unsure"
    ),
}
# Students that check more and begin with more truncation.
EAGER = {
    name: Arm(title, terms, "eager_student", baseline="eager_opd")
    for name, title, terms in (
        ("eager_opd", "OPD", OPD),
        ("eager_stableopd", "StableOPD", ()),
        ("eager_gold_only", "gold only, no OPD", GOLD_ONLY),
    )
}
# Students and gold solutions that slip, which the teacher does not; the students have learnt what such solutions teach.
# Chosen on pair 0 and frozen; then run on the others. The last pair has been in no other run.
SEASONED_RECIPE = ("loss.reference_kl=0.05", "optimizer.decay=cosine")
SEASONED = {
    name: Arm(
        title,
        (*SEASONED_RECIPE, *terms),
        "seasoned_student",
        prompts="train_slipping.jsonl",
        pairs=(*PAIRS, 3),
        baseline="seasoned_gold_only",
        own_heldout=True,
    )
    for name, title, terms in (
        ("seasoned_gold_only", "gold only, no OPD", GOLD_ONLY),
        ("seasoned_opd", "OPD", OPD),
        ("seasoned_stableopd", "StableOPD", ()),
    )
}
# Tried before with students that still learn from gold. Chosen on pair 0 and frozen; then run on pair 1.
SLIPS_RECIPE = ("loss.opd=reverse_kl", "loss.reference_kl=0.05", "optimizer.lr=6.0e-4", "optimizer.decay=cosine")
SLIPS = {
    name: Arm(
        title,
        (*SLIPS_RECIPE, *terms),
        "slipping_student",
        prompts="train_slipping.jsonl",
        pairs=(0, 1),
        baseline="slips_gold_only",
    )
    for name, title, terms in (
        ("slips_gold_only", "gold only, no OPD", GOLD_ONLY),
        ("slips_opd", "OPD", OPD),
        ("slips_stableopd", "StableOPD", ()),
    )
}
# What was tried before, each as gold only and as StableOPD.
TRIALS = {
    f"{name}_{arm}": Arm(f"{title}: {what}", terms, student, prompts=prompts, pairs=(0,), baseline=f"{name}_gold_only")
    for name, title, student, prompts in (
        ("few", "64 gold solutions, none slips", "eager_student", "train_few.jsonl"),
        ("plain", "student and gold slip", "slipping_student", "train_slipping.jsonl"),
    )
    for arm, what, terms in (("gold_only", "gold only", GOLD_ONLY), ("stableopd", "StableOPD", ()))
}
# What is offered beyond the paper, token by token.
OPTIONS = {
    "truncated_left_out": control("truncated responses left out", "loss.truncated_weight=0"),
    "tails_left_out": control("repeated tails left out", "loss.repeated_tail_weight=0"),
    "truncated_quarter": control("truncated responses at a quarter", "loss.truncated_weight=0.25"),
    "tails_quarter": control("repeated tails at a quarter", "loss.repeated_tail_weight=0.25"),
    "length_budget": control("budget grows from 60 to 160 in 100 steps", "rollout.length_budget={start: 60, steps: 100}"),
}
# Terms too weak to hold by themselves, and what alarms make of them.
WEAK = ("mixture.gold_weight=0.02", "loss.reference_kl=0.02")
ACTIONS = {
    "weak": Arm("StableOPD, λ_gold 0.02, β_KL 0.02", WEAK, pairs=(0,), baseline="weak"),
    "rollback": Arm(
        "with rollback on the early warning",
        (
            *WEAK,
            "monitors.collapse.rollback=1.0",
            "monitors.rollback.gold_weight_factor=10",
            "monitors.rollback.reference_kl_factor=5",
            "monitors.repetition.warn=null",
            "checkpoint.every=5",
            "checkpoint.keep=3",
        ),
        pairs=(0,),
        baseline="weak",
    ),
    "control": Arm(
        "with control",
        (
            *WEAK,
            "monitors.control.truncation_target=0.05",
            "monitors.control.reference_kl_target=0.05",
            "monitors.control.rate=0.5",
        ),
        pairs=(0,),
        baseline="weak",
    ),
}
GROUPS = {
    "arms": ARMS,
    "controls": CONTROLS,
    "end_tokens": END_TOKENS,
    "unsure_ends": UNSURE,
    "eager": EAGER,
    "seasoned": SEASONED,
    "slips": SLIPS,
    "trials": TRIALS,
    "options": OPTIONS,
    "actions": ACTIONS,
}
EVERY = {name: arm for group in GROUPS.values() for name, arm in group.items()}


def run_folder(name: str, pair: int) -> Path:
    return WORK / "runs" / f"{name}-{pair}"


def heldout_file(name: str, pair: int) -> Path:
    """What the run ``name`` of ``pair`` is evaluated on when it is over."""
    return (WORK / f"pair-{pair}" if EVERY[name].own_heldout else WORK) / "heldout.jsonl"


def command_overrides(name: str, pair: int) -> list[str]:
    """Everything that the run ``name`` of ``pair`` sets on top of opd.yaml."""
    arm, models = EVERY[name], WORK / f"pair-{pair}"
    return [
        f"run.name={name}-{pair}",
        f"run.dir={run_folder(name, pair)}",
        f"run.seed={pair + 1}",
        f"student.model={models / arm.student}",
        f"teacher.model={models / arm.teacher}",
        f"data.prompts={models / arm.prompts}",
        f"eval.prompts={WORK / 'heldout.jsonl'}",
        *arm.overrides,
    ]
