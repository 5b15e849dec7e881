"""What no prompt could measure of a teacher's server is not taken for granted."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from megatron_opd.scoring.sglang import SGLangScorer
from megatron_opd.sglang.client import Endpoint
from megatron_opd.sglang.roster import Roster
from megatron_opd.types import Objective


def test_rows_that_the_student_lacks_are_asked_for_where_no_prompt_could_show_their_mass() -> None:
    objective = Objective("sampled", 0.2, 0.5, 1.0, 1.0, 1.0, 1.0, 0.0)
    alone: Any = SimpleNamespace(run=lambda action: action())
    nowhere: Any = None
    scorer = SGLangScorer(
        alone,
        Roster("teacher", [Endpoint("http://127.0.0.1:1")]),
        nowhere,
        objective,
        stop_ids=(1,),
        vocab_size=53,
        teacher_vocab_size=59,
        in_flight=1,
        timeout=5.0,
    )
    scorer.verify([])
    assert scorer._ask([5, 6], 1).body["token_ids_logprob"] == [1, *range(53, 59)]
