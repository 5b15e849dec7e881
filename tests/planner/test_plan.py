"""``megatron-opd plan``: its figures are those of the parts that it is made of, and what it refuses."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.distributed.distributed_c10d import GroupName

from megatron_opd import cli
from megatron_opd.advisor.planner import NoRoom, Planner
from megatron_opd.advisor.render import table, wrapped
from megatron_opd.config import Config, ParallelConfig
from megatron_opd.config_file import load_config
from megatron_opd.mcore.collectives import Kind, group_names
from megatron_opd.mcore.fake_world import fake_rank
from megatron_opd.mcore.parallel import group_ranks, init_layout
from megatron_opd.planner.alternatives import alternatives
from megatron_opd.planner.links import Span
from megatron_opd.workers import Interrupted
from tests.advisor.configs import LLAMA_70B, write_config_json
from tests.conftest import Table

HEADER = ["rank class", "ranks", "params", "grads", "optimizer", "activations", "work", "loss", "frozen", "engine"]
DOCS = Path(__file__).parents[2] / "docs/plan.md"
SMALL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": 1000,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}


def write(folder: Path) -> Path:
    model = write_config_json(folder / "model", SMALL)
    tree: dict[str, Any] = {
        "run": {"name": "planned", "steps": 20},
        "student": {"model": model, "parallel": {"tp": 2, "pp": 2, "sequence_parallel": True}},
        "teacher": {"model": model},
        "rollout": {
            "backend": "sglang",
            "placement": "colocated",
            "engines": 4,
            "tp": 2,
            "host": "ib0",
            "sglang": {"mem_fraction_static": 0.5},
            "sampling": {"max_new_tokens": 128},
        },
        "data": {"prompts": "none.jsonl", "prompts_per_step": 8},
        "packing": {"max_tokens_per_microbatch": 1024},
    }
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


@pytest.mark.parametrize(
    ("parallel", "world_size"), [({"tp": 2, "pp": 2}, 8), ({"tp": 2, "cp": 2, "ep": 4}, 8), ({"pp": 2, "ep": 2}, 8)], ids=str
)
def test_groups_are_megatrons(parallel: dict[str, Any], world_size: int) -> None:
    layout = ParallelConfig(**parallel)
    for number in range(world_size):
        ours = group_ranks(layout, world_size, number)
        with fake_rank(number, world_size):
            for torch_name, name in group_names(init_layout(layout, 1)).items():
                group = torch.distributed.distributed_c10d._resolve_process_group(GroupName(torch_name))
                assert tuple(torch.distributed.get_process_group_ranks(group)) == ours[name], (number, name)


def test_memory_is_the_advisors_and_parts_add_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = write(tmp_path), tmp_path / "plan.json"
    assert cli.main(["plan", str(file), "--nodes", "2", "--gpus-per-node", "4", "--gpu", "h100", "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 110 and "assumed, never validated" in printed
    for formula in ("optimizer: its state is moved 2 times", "pipeline bubble: ", "SGLang's parameters: "):
        assert formula in printed
    found = json.loads(out.read_text())
    documented = DOCS.read_text().split("The JSON's keys: ")[1].split("\n\n")[0]
    assert list(found) == re.findall(r"`(\w+)`", re.sub(r"\([^)]*\)", "", documented))
    memory = Planner(torch.device("cuda"), "fused", 80 * 10**9).plan(load_config(file), 8)
    assert [each["peak"] for each in found["memory"]["ranks"]] == [each.peak for each in memory.classes]
    first, last = memory.classes  # of four ranks each, a node of four for either
    assert found["memory"]["host"] == 4 * last.host and last.host == last.waiting > first.host == 0
    phases = {name: sum(parts.values()) for name, parts in found["seconds"]["phases"].items()}
    assert sum(phases.values()) == pytest.approx(found["seconds"]["step"])
    crossing = {(row["phase"], row["group"]): row["span"]["crosses"] for row in found["traffic"]}
    assert crossing["train", "pp"] and not crossing["train", "tp"]  # two nodes of four: a stage on each
    elements = 2 * 1000 * 256 + 256 + 4 * (4 * 256 * 256 + 3 * 256 * 512 + 2 * 256)
    assert sum(each["bytes"] for each in found["weights"]) == 2 * elements
    norms = 2 * 9 * 256
    received = [sum(each["engine_ranks"][rank]["bytes"] for each in found["weights"]) for rank in range(2)]
    assert sum(received) == 2 * elements + norms  # every rank has the norms; the rest is split
    assert all(piece["target"] for each in found["weights"] for piece in each["engine_ranks"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--nodes", "3", "--gpus-per-node", "3", "rollout.engines=9", "rollout.tp=1"], "does not fit 9 ranks"),
        (["--nodes", "1", "--gpus-per-node", "4"], "set them equal"),
        (["--nodes", "0"], "--nodes: 0 is below 1"),
        (["--nodes", "1", "student.parallel.tp=16"], "student"),
        (["--nodes", "1", "--response-tokens", "1000"], "--response-tokens: 1000"),
        (["--nodes", "1", "--against", "nothing"], "--against: nothing, but there is no --calibrate"),
        (["--nodes", "1", "--timeline", "step.gif"], "--timeline: step.gif ends in neither"),
        (
            ["--nodes", "1", "--timeline", "none/step.svg"],
            "--timeline: none/step.svg cannot be written, there is no such folder",
        ),
        (["--nodes", "1", "--json", "none/plan.json"], "--json: none/plan.json cannot be written, there is no such folder"),
        (["--nodes", "1", "--host-memory", "much"], "--host-memory: 'much' is not an amount of memory"),
        (["--nodes", "2", "rollout.placement=disaggregated"], "rollout.sglang.base_gpu_id: not set"),
        (
            ["--nodes", "1", "student.fp8=mxfp8", "student.dtype=bfloat16"],
            "student.fp8: mxfp8 needs Blackwell (compute capability 10.0 or more below 12.0), but this one has 9.0",
        ),
        (
            ["--nodes", "2", "--gpus-per-node", "4", "rollout.tp=8", "rollout.engines=1"],
            "rollout.tp: 8 GPUs of a server would not all be on one node of 4; lower it to a divisor of that",
        ),
        (
            ["--nodes", "2", "--gpus-per-node", "4", "rollout.host=127.0.0.1"],
            "rollout.host: 127.0.0.1, where the servers on each node are reached from no other machine, but the run has 2",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_would_fail_on_the_cluster_fails_here(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", str(write(tmp_path)), "--gpu", "h100", *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_window_that_sglang_leaves_out_fails_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path)
    window = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 64}
    (tmp_path / "model" / "config.json").write_text(json.dumps({**SMALL, **window}))
    assert cli.main(["plan", str(file), "--nodes", "1", "--gpu", "h100"]) == 2
    error = capsys.readouterr().err
    assert "has a sliding window of 64 tokens, which SGLang leaves out" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (("--reserve", "74GiB"), "GiB too much; `megatron-opd check`"),
        (("--host-memory", "1MB"), "wait in a node's host memory, beside the processes, but --host-memory has 0.00"),
    ],
    ids=str,
)
def test_too_little_memory_is_exit_code_one(
    option: tuple[str, str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", str(write(tmp_path)), "--nodes", "1", "--gpu", "h100", *option]) == 1
    printed = capsys.readouterr().out
    assert said in " ".join(printed.split()) and "does not fit: " in printed
    assert max(map(len, printed.splitlines())) <= 110


def test_long_lines_are_broken() -> None:
    name, figures = "pp 10/16, teachers.mathematics pp 3/8, reference pp 1/4", [f"{number:.2f}" for number in range(9)]
    lines = table(HEADER, [[name, *figures], ["pp 0/16", *figures]])
    assert max(map(len, lines)) <= 110
    assert [line.split()[-9:] for line in (lines[1], lines[-1])] == [figures, figures]
    assert "".join(line[: lines[0].index("ranks")].strip() + " " for line in lines[1:-1]).split() == name.split()
    assert wrapped("word " * 30, hang=7) == ["word " * 21 + "word", " " * 7 + "word " * 7 + "word"]


@pytest.mark.parametrize("end", [Interrupted, MemoryError, None], ids=["refused", "out of memory", "killed"])
def test_other_settings_are_planned_here_where_the_processes_fail(tmp_path: Path, end: type[Exception] | None) -> None:
    file, parent = write(tmp_path), os.getpid()
    config = load_config(str(file), [])
    here: list[Config] = []

    def timed(changed: Config) -> Any:
        if os.getpid() != parent:
            if end is None:
                os.kill(os.getpid(), signal.SIGKILL)
            assert end is not None
            raise end("of this process")
        here.append(changed)
        raise NoRoom("for none of them")

    found = alternatives(config, lambda lines: load_config(str(file), list(lines)), timed, processes=2)
    # A refusal says that the setting does not fit; with anything else all are planned here, each once.
    assert len(found) > 4 and not any(each.fits for each in found)
    assert len(here) == (0 if end is Interrupted else len(found))


def test_an_error_that_nobody_foresaw_is_raised_here_with_its_traceback(tmp_path: Path) -> None:
    def timed(changed: Config) -> Any:
        raise ZeroDivisionError(changed.run.name)

    config = load_config(str(write(tmp_path)), [])
    with pytest.raises(ZeroDivisionError, match="planned"):
        alternatives(config, lambda lines: config, timed, processes=2)


@pytest.mark.parametrize("offload", [False, True])
def test_weights_of_colocated_servers_are_back_at_a_push(tmp_path: Path, offload: bool) -> None:
    """Beside the student's state, of which the optimizer and the gradients can wait in host memory."""
    file = write(tmp_path)
    plan = Planner(torch.device("cuda"), "fused", 80 * 10**9).plan(load_config(str(file), [f"student.offload={offload}"]), 8)
    weights = 2 * (2 * 1000 * 256 + 4 * (4 * 256 * 256 + 3 * 256 * 512 + 2 * 256) + 256)  # bytes, bf16
    for each in plan.classes:
        assert each.engine.pushed == weights // 2  # tp 2
        beside = each.state.parameters if offload else each.state.total
        pushed = each.resident + beside + each.engine.pushed + each.export
        written_out = each.resident + each.state.total + each.export  # the model, when the run ends
        assert each.phases["export"] == max(pushed, written_out)


@pytest.mark.exhaustive  # a processor second is longer on a machine with other work
@pytest.mark.parametrize("nodes", [8, 32, 128])
def test_70b_takes_less_than_a_minute(nodes: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], table: Table) -> None:
    """Of two cores: CPU seconds, of which the two processes that plan other settings share theirs."""
    file = write(tmp_path)
    model = write_config_json(tmp_path / "70b", LLAMA_70B)
    layout = "{tp: 8, pp: 4, sequence_parallel: true}"
    overrides = [
        *(f"student.model={model}", f"student.parallel={layout}", "student.offload=true", f"teacher.model={model}"),
        *(f"teacher.parallel={layout}", "teacher.offload=true", f"reference={{parallel: {layout}, offload: true}}"),
        *(f"rollout.engines={nodes}", "rollout.tp=8", "rollout.sglang.mem_fraction_static=0.6"),
        *("rollout.sampling.max_new_tokens=4096", "data.max_context=8192", "data.prompts_per_step=128"),
        *("packing.max_tokens_per_microbatch=16384", "student.megatron.recompute_granularity=full"),
        *("student.megatron.recompute_method=uniform", "student.megatron.recompute_num_layers=1"),
    ]
    before = os.times()
    assert cli.main(["plan", str(file), *overrides, "--nodes", str(nodes), "--gpu", "h100", "--processes", "2"]) == 0
    own, own_system, shared, shared_system = (now - then for now, then in zip(os.times()[:4], before[:4], strict=True))
    assert shared > 0
    seconds = own + own_system + (shared + shared_system) / 2
    assert seconds < 60
    table.add("Planner", f"70B, {8 * nodes} GPUs", f"{seconds:.0f} s")


@pytest.mark.exhaustive  # minutes of one core
def test_the_disaggregated_recipe_trains_on_what_its_servers_leave_of_twelve_nodes(tmp_path: Path) -> None:
    recipe = Path(__file__).parents[2] / "examples" / "slurm" / "opd_70b_disaggregated.yaml"
    model, out = write_config_json(tmp_path / "70b", LLAMA_70B), tmp_path / "plan.json"
    models = [f"student.model={model}", f"teacher.model={model}"]
    assert cli.main(["plan", str(recipe), *models, "--nodes", "12", "--gpu", "h100", "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert (found["training_gpus"], found["gpus"], found["fits"]) == (64, 96, True)
    assert found["layout"].startswith("tp=8 cp=1 pp=2 ep=1 dp=4")
    assert cli.main(["plan", str(recipe), *models, "--nodes", "4", "--gpu", "h100"]) == 2


def test_rings() -> None:
    assert Kind.ALL_REDUCE.sent(80, 4) == 120 and Kind.ALL_GATHER.sent(80, 4) == 60 and Kind.BROADCAST.sent(80, 1) == 0
    assert Span.of([0, 1, 8, 9], 8) == Span(4, 2) and Span.of([0, 1, 8, 9], 8).crosses and not Span.of([0, 7], 8).crosses
