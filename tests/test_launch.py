"""Where the ranks of a Slurm job meet."""

from __future__ import annotations

import pytest

from megatron_opd.launch import first_host
from megatron_opd.types import OpdError


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n0", "n0"),
        ("a1,b2", "a1"),
        ("gpu[007-012,040],login1", "gpu007"),
        ("rack1-gpu[3,5]-ib", "rack1-gpu3-ib"),
    ],
)
def test_the_first_host_of_slurms_short_form(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_a_list_that_cannot_be_read_is_named_with_the_way_out() -> None:
    with pytest.raises(OpdError, match=r"x\[1-2\]\[3-4\] cannot be read; set MASTER_ADDR"):
        first_host("x[1-2][3-4]")
