"""Bad input gives one line that names the key or file, the value and the remedy, exit code 2, before any model is built."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from megatron_opd import cli, preflight
from megatron_opd.types import OpdError
from tests import runs
from tests.tiny_models import make_model, make_tokenizer

Change = Callable[[Path, dict[str, Any]], None]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("good")
    return folder, runs.make_inputs(folder)


def check(folder: Path, config: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    capsys.readouterr()
    code = cli.main(["check", str(file)])
    return code, capsys.readouterr().err


def put(key: str, value: Any) -> Change:
    """A change of one config value."""

    def change(_folder: Path, config: dict[str, Any]) -> None:
        *parents, leaf = key.split(".")
        for parent in parents:
            config = config.setdefault(parent, {})
        config[leaf] = value

    return change


def both(*changes: Change) -> Change:
    def change(folder: Path, config: dict[str, Any]) -> None:
        for each in changes:
            each(folder, config)

    return change


def several_teachers(_folder: Path, config: dict[str, Any]) -> None:
    config["teachers"] = {"maths": config.pop("teacher")}


def rewrite(name: str, edit: Callable[[str], str]) -> Change:
    """A change of one text file."""

    def change(folder: Path, _config: dict[str, Any]) -> None:
        (folder / name).write_text(edit((folder / name).read_text()))

    return change


def edit_json(name: str, **values: Any) -> Change:
    return rewrite(name, lambda text: json.dumps({**json.loads(text), **values}))


def truncate_weights(folder: Path, _config: dict[str, Any]) -> None:
    file = folder / "teacher" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def remove_weights(folder: Path, _config: dict[str, Any]) -> None:
    (folder / "teacher" / "model.safetensors").unlink()


def wrong_shape(folder: Path, _config: dict[str, Any]) -> None:
    file = folder / "teacher" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 5)
    save_file(tensors, file)


def missing_tensor(folder: Path, _config: dict[str, Any]) -> None:
    file = folder / "teacher" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file)


def other_tokenizer(folder: Path, _config: dict[str, Any]) -> None:
    make_tokenizer(folder / "teacher", [*[str(number) for number in reversed(range(40))], "+", "=", "."])


def without_solutions(folder: Path, config: dict[str, Any]) -> None:
    (folder / "train.jsonl").write_text('{"prompt": "1 + 2 =", "answer": "3"}\n' * 1)
    config["data"]["prompts_per_step"] = 1


def heldout_is_trained_on(folder: Path, _config: dict[str, Any]) -> None:
    (folder / "heldout.jsonl").write_text((folder / "train.jsonl").read_text())


def teacher_is_the_student(folder: Path, config: dict[str, Any]) -> None:
    """The same tensors in another folder, in several files."""
    tensors = load_file(folder / "student" / "model.safetensors")
    shutil.copytree(folder / "student", folder / "copy", ignore=shutil.ignore_patterns("*.safetensors"))
    for number, name in enumerate(tensors):
        save_file({name: tensors[name]}, folder / "copy" / f"part-{number}.safetensors")
    weight_map = {name: f"part-{number}.safetensors" for number, name in enumerate(tensors)}
    (folder / "copy" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config["teacher"]["model"] = str(folder / "copy")


def add_line(**line: Any) -> Change:
    return rewrite("train.jsonl", lambda text: text + json.dumps({"prompt": "1 + 39 =", **line}) + "\n")


def checkpoint_of_another_model(folder: Path, _config: dict[str, Any]) -> None:
    saved = folder / "run" / "checkpoints" / "iter_0000002"
    saved.mkdir(parents=True)
    model = {"architecture": "Qwen3ForCausalLM", "num_hidden_layers": 9}
    (saved / "state.json").write_text(json.dumps({"model": model, "seed": 17, "state": {"step": 2}}))


def run_dir_is_a_file(folder: Path, config: dict[str, Any]) -> None:
    (folder / "occupied").write_text("")
    config["run"]["dir"] = str(folder / "occupied")


def damaged_checkpoint(folder: Path, _config: dict[str, Any]) -> None:
    saved = folder / "run" / "checkpoints" / "iter_0000002"
    saved.mkdir(parents=True)
    (saved / "state.json").write_text(json.dumps({"files": {"common.pt": [100, "0" * 64]}}))


def load_from(section: str) -> Change:
    return lambda folder, config: config[section].update(load=str(folder / "student"))


def attached(*urls: str) -> Change:
    """To servers for the student alone."""
    teacher = both(put("mixture.teacher", 0), put("eval.teacher", False))
    return both(teacher, put("rollout.backend", "sglang"), put("rollout.urls", list(urls)))


def smaller_teacher(folder: Path, config: dict[str, Any]) -> None:
    words = [str(number) for number in range(40)] + ["+", "=", "."]
    make_model(folder / "smaller", "llama", vocab_size=50, vocab_words=words, seed=2)
    config["teacher"]["model"] = str(folder / "smaller")


def latent_student(folder: Path, config: dict[str, Any]) -> None:
    make_model(folder / "latent", "deepseek_v3", vocab_size=53)
    config["student"] |= {"model": str(folder / "latent"), "parallel": {}}


WINDOW = edit_json(
    "student/config.json", use_sliding_window=True, sliding_window=8, layer_types=["full_attention", "sliding_attention"]
)


def fp8(recipe: str) -> Change:
    """In the dtype that it needs."""
    return both(put("student.fp8", recipe), put("student.dtype", "bfloat16"))


CASES: dict[str, tuple[Change, list[str]]] = {
    "misspelt key": (put("loss.refrence_kl", 0.1), ["loss.refrence_kl", "unknown key", "reference_kl"]),
    "unknown section": (put("rolout", {}), ["rolout", "unknown key", "rollout"]),
    "wrong type": (put("run.steps", "many"), ["run.steps", "integer", "'many'"]),
    "out of range": (put("loss.clip", 1.5), ["loss.clip", "less than 1", "1.5"]),
    "missing key": (lambda _, config: config.pop("data"), ["data", "required"]),
    "clip of 0": (put("loss.clip", 0), ["loss.clip", "greater than 0", "0"]),
    "unknown divergence": (put("loss.opd", "skew"), ["loss.opd", "'skew_reverse_kl'", "'skew'"]),
    "jsd without mixing": (put("loss.beta", 1.0), ["loss.beta", "less than 1"]),
    "skew of 0": (put("loss.alpha", 0), ["loss.alpha", "greater than 0"]),
    "k beyond the vocabulary": (both(put("loss.opd", "topk_reverse_kl"), put("loss.k", 60)), ["loss.k", "60", "53"]),
    "option of another term": (
        both(put("loss.opd", "jsd"), put("loss.extrapolation", 1.25)),
        ["loss.extrapolation", "loss.opd is jsd", "loss.opd=sampled"],
    ),
    "GKD without a divergence": (put("loss.off_policy", "divergence"), ["loss.off_policy", "sampled", "loss.opd=jsd"]),
    "extrapolation without a reference": (
        both(put("loss.extrapolation", 1.25), put("reference", None), put("loss.reference_kl", 0)),
        ["loss.extrapolation", "reference is null"],
    ),
    "bounds that leave out ratio 1": (put("loss.ratio_bounds", [1.2, 2.0]), ["loss.ratio_bounds", "low < 1 < high"]),
    "one teacher and several": (put("teachers", {"maths": {"model": "x"}}), ["teachers", "maths", "remove one"]),
    "prompt without its teacher": (
        several_teachers,
        ["train.jsonl:1", "'teacher' is None", "maths"],
    ),
    "heads by tp": (put("student.parallel.tp", 4), ["student.model", "num_key_value_heads=2", "tp=4", "divides"]),
    "layers by pp": (put("student.parallel.pp", 4), ["student.model", "num_hidden_layers=2", "pp=4"]),
    "teacher layers by pp": (put("student.parallel.pp", 2), ["teacher.model", "num_hidden_layers=3", "pp=2"]),
    "teacher's own layers by pp": (
        put("teacher.parallel", {"pp": 2}),
        ["teacher.model", "num_hidden_layers=3", "pp=2", "divides"],
    ),
    "teacher's own layout beyond the world": (
        put("teacher.parallel", {"tp": 2, "cp": 2}),
        ["teacher.parallel", "tp=2 x pp=1 x cp=2", "2 ranks", "multiple of 4"],
    ),
    "virtual stages of a frozen model": (put("reference.parallel", {"pp": 2, "vpp": 2}), ["reference.parallel.vpp", "vpp=1"]),
    "virtual stages without stages": (put("student.parallel.vpp", 2), ["student.parallel.vpp", "pp > 1", "vpp=1"]),
    "layers by virtual stages": (
        both(put("student.parallel.pp", 2), put("student.parallel.vpp", 2)),
        ["student.model", "num_hidden_layers=2", "pp x vpp=4"],
    ),
    "sequence parallelism of one rank": (
        put("teacher.parallel", {"sequence_parallel": True}),
        ["teacher.parallel.sequence_parallel", "tp > 1"],
    ),
    "overlapped gather alone": (
        put("optimizer.overlap_param_gather", True),
        ["optimizer.overlap_param_gather", "overlap_grad_reduce=true"],
    ),
    "recomputed only by Transformer Engine": (
        put("student.megatron", {"recompute_granularity": "selective", "recompute_modules": ["layernorm"]}),
        ["student.megatron.recompute_modules", "layernorm", "core_attn"],
    ),
    "full vocabulary of a scores-only teacher": (
        lambda _, config: config.update(teacher={**config["teacher"], "backend": "sglang"}, loss={"opd": "reverse_kl"}),
        ["loss.opd", "reverse_kl", "full vocabulary", "teacher.backend"],
    ),
    "temperature of a served teacher": (
        both(put("teacher.backend", "sglang"), put("rollout.sampling.temperature", 0.7)),
        ["rollout.sampling.temperature", "0.7", "teacher.backend=megatron", "temperature=1"],
    ),
    "entropy gate of a served teacher": (
        both(put("teacher.backend", "sglang"), put("loss.gated_forward_kl", 0.5)),
        ["loss.gated_forward_kl", "0.5", "full vocabulary", "gated_forward_kl=0"],
    ),
    "pipeline of a served teacher": (
        both(put("teacher.backend", "sglang"), put("teacher.parallel", {"tp": 2, "pp": 2})),
        ["teacher.parallel", "only tp", "remove the rest"],
    ),
    "offloaded served teacher": (
        both(put("teacher.backend", "sglang"), put("teacher.offload", True)),
        ["teacher.offload", "teacher.backend=sglang", "remove it"],
    ),
    "quantised served teacher": (
        both(put("teacher.backend", "sglang"), put("teacher.quantize", "fp8")),
        ["teacher.quantize", "teacher.backend=sglang", "remove it"],
    ),
    "loaded served teacher": (
        both(put("teacher.backend", "sglang"), load_from("teacher")),
        ["teacher.load", "teacher.backend=sglang", "remove it"],
    ),
    "served teacher without SGLang": (
        put("teacher.backend", "sglang"),
        ["rollout.python", "no package sglang", "install sglang==0.5.21"],
    ),
    "served teacher without weights": (
        both(put("teacher.backend", "sglang"), remove_weights),
        ["teacher", "neither model.safetensors", "safetensors weights"],
    ),
    "served teacher with other tokens": (
        both(put("teacher.backend", "sglang"), put("teacher.urls", ["http://h:1"]), other_tokenizer),
        ["teacher", "token"],
    ),
    "URLs of a Megatron teacher": (
        put("teacher.urls", ["http://10.0.0.7:30000"]),
        ["teacher.urls", "http://10.0.0.7:30000", "teacher.backend=sglang"],
    ),
    "URL without a scheme": (
        both(put("teacher.backend", "sglang"), put("teacher.urls", ["10.0.0.7:30000"])),
        ["teacher.urls", "'10.0.0.7:30000'", "http://"],
    ),
    "a teacher's URL with a path": (
        both(put("teacher.backend", "sglang"), put("teacher.urls", ["http://10.0.0.7:30000/v1"])),
        ["teacher.urls", "/v1", "http://10.0.0.7:30000"],
    ),
    "a teacher's server twice": (
        both(put("teacher.backend", "sglang"), put("teacher.urls", ["http://h:1", "http://h:1/"])),
        ["teacher.urls", "http://h:1", "twice"],
    ),
    "key without URLs": (put("teacher.api_key_file", "key"), ["teacher.api_key_file", "teacher.urls is empty"]),
    "no such key file": (
        both(
            put("teacher.backend", "sglang"), put("teacher.urls", ["http://h:1"]), put("teacher.api_key_file", "/nowhere/key")
        ),
        ["teacher.api_key_file", "/nowhere/key", "cannot be read"],
    ),
    "context that the served teacher needs for itself": (
        both(
            put("teacher.backend", "sglang"), put("teacher.urls", ["http://h:1"]), put("rollout.sampling.max_new_tokens", 121)
        ),
        ["max_new_tokens", "121", "121 positions"],
    ),
    "gold without solutions": (without_solutions, ["train.jsonl:1", "solution", "mixture.gold"]),
    "solution that ends itself": (
        add_line(answer="40", solution="1 + 39 = 40 <eos>"),
        ["train.jsonl:61", "'solution'", "end token 1 ('<eos>')", "remove it"],
    ),
    "solution that goes on behind its end": (
        add_line(answer="40", solution="40 <eos> 41"),
        ["train.jsonl:61", "'solution'", "end token 1 ('<eos>')"],
    ),
    "solution with the teacher's end": (
        both(
            edit_json("teacher/generation_config.json", eos_token_id=[1, 47]), add_line(answer="40", solution="1 + 39 = . 40")
        ),
        ["train.jsonl:61", "end token 47 ('.')"],
    ),
    "empty answer": (add_line(answer=" ", solution="40"), ["train.jsonl:61", "'answer' is empty", "drop the key"]),
    "held-out prompts without answers": (
        rewrite("heldout.jsonl", lambda text: text.replace('"answer"', '"result"', 1)),
        ["eval.prompts", "1 of 8 prompts", "line 1, id '10+0'", "heldout.jsonl", "add it"],
    ),
    "teacher that is the student": (
        lambda folder, config: config["teacher"].update(model=str(folder / "student" / ".." / "student")),
        ["teacher.model", "student's own weights", "teacher.self_distillation=true"],
    ),
    "teacher with the student's tensors": (teacher_is_the_student, ["teacher.model", "/copy", "student's own weights"]),
    "served teacher that is the student": (
        lambda folder, config: config["teacher"].update(backend="sglang", urls=["http://h:1"], model=str(folder / "student")),
        ["teacher.model", "student's own weights"],
    ),
    "one of several teachers is the student": (
        lambda folder, config: config.update(
            teachers={"maths": config.pop("teacher"), "code": {"model": str(folder / "student")}}
        ),
        ["teachers.code.model", "student's own weights", "teachers.code.self_distillation=true"],
    ),
    "nothing to train on": (put("mixture", {"student": 0, "teacher": 0, "gold": 0}), ["mixture", "at least one"]),
    "weight of a source is 0": (put("mixture.gold_weight", 0), ["mixture.gold_weight", "mixture.gold"]),
    "reference KL without a reference": (put("reference", None), ["loss.reference_kl", "reference"]),
    "missing weights": (remove_weights, ["teacher", "model.safetensors"]),
    "truncated weights": (truncate_weights, ["teacher/model.safetensors", "truncated", "download"]),
    "tensor of the wrong shape": (wrong_shape, ["model.layers.1.mlp.up_proj.weight", "[3, 5]", "[144, 48]"]),
    "missing tensor": (missing_tensor, ["model.layers.1.mlp.up_proj.weight", "missing"]),
    "unsupported architecture": (
        edit_json("teacher/config.json", architectures=["MambaForCausalLM"]),
        ["teacher.model", "MambaForCausalLM", "LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"],
    ),
    "unsupported RoPE scaling": (
        edit_json("student/config.json", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}),
        ["student.model", "dynamic", "llama3"],
    ),
    "no such model": (put("student.model", "/nowhere/model"), ["/nowhere/model", "no such folder"]),
    "tokenizers disagree": (other_tokenizer, ["teacher", "token"]),
    "broken JSONL line": (rewrite("train.jsonl", lambda text: text + '{"prompt": \n'), ["train.jsonl:61", "JSON"]),
    "empty JSONL": (rewrite("train.jsonl", lambda _: ""), ["train.jsonl", "empty"]),
    "prompt longer than the context": (
        rewrite("train.jsonl", lambda text: text + json.dumps({"prompt": "1 + " * 60, "solution": "1"}) + "\n"),
        ["train.jsonl:61", "120 tokens", "116"],
    ),
    "no room for a prompt": (put("rollout.sampling.max_new_tokens", 128), ["max_new_tokens", "128"]),
    "micro-batch below a sequence": (
        put("packing.max_tokens_per_microbatch", 10),
        ["packing.max_tokens_per_microbatch", "10", "raise"],
    ),
    "fewer prompts than a step takes": (put("data.prompts_per_step", 100), ["data.prompts_per_step", "100", "60"]),
    "held-out prompts are trained on": (heldout_is_trained_on, ["eval.prompts", "trained on"]),
    "SGLang's arguments without SGLang": (put("rollout.sglang", {"tp_size": 2}), ["rollout.sglang", "rollout.backend=sglang"]),
    "colocated without SGLang": (put("rollout.placement", "colocated"), ["rollout.placement", "backend=sglang"]),
    "way of the weights without SGLang": (put("rollout.weight_sync", "disk"), ["rollout.weight_sync", "backend=sglang"]),
    "collective on shared devices": (
        put("rollout", {"backend": "sglang", "placement": "colocated", "weight_sync": "collective"}),
        ["rollout.weight_sync", "colocated", "weight_sync=auto"],
    ),
    "ipc between devices": (
        put("rollout", {"backend": "sglang", "weight_sync": "ipc"}),
        ["rollout.weight_sync: ipc", "disaggregated", "placement=colocated"],
    ),
    "no SGLang in the environment": (
        put("rollout.backend", "sglang"),
        ["rollout.python", "no package sglang", "install sglang==0.5.21"],
    ),
    "attached to no SGLang": (put("rollout.urls", ["http://127.0.0.1:1"]), ["rollout.urls", "rollout.backend=sglang"]),
    "attached to no URL": (attached("10.0.0.7:30000"), ["rollout.urls", "'10.0.0.7:30000'", "http://10.0.0.7:30000"]),
    "attached to a path": (attached("http://10.0.0.7:30000/v1"), ["rollout.urls", "/v1", "http://10.0.0.7:30000"]),
    "attached twice": (attached("http://127.0.0.1:1", "http://127.0.0.1:1/"), ["rollout.urls", "twice"]),
    "attached and started": (
        both(attached("http://127.0.0.1:1"), put("rollout.engines", 2)),
        ["rollout.engines", "rollout.urls", "remove"],
    ),
    "attached on the training's devices": (
        both(attached("http://127.0.0.1:1"), put("rollout.placement", "colocated")),
        ["rollout.placement", "colocated", "placement=disaggregated"],
    ),
    "attached elsewhere": (
        attached("http://10.0.0.7:30000"),
        ["rollout.host", "127.0.0.1", "http://10.0.0.7:30000", "address"],
    ),
    "key without servers": (put("rollout.api_key_file", "key"), ["rollout.api_key_file", "key", "rollout.urls"]),
    "key file is missing": (
        both(attached("http://127.0.0.1:1"), put("rollout.api_key_file", "/nowhere/key")),
        ["rollout.api_key_file", "/nowhere/key", "text file"],
    ),
    "router to no SGLang": (put("rollout.router", "http://127.0.0.1:1"), ["rollout.router", "rollout.backend=sglang"]),
    "router at no URL": (both(attached(), put("rollout.router", "h:1")), ["rollout.router", "'h:1'", "http://10.0.0.7:30000"]),
    "router that is an engine": (
        both(attached("http://127.0.0.1:1"), put("rollout.router", "http://127.0.0.1:1/")),
        ["rollout.router", "http://127.0.0.1:1/", "rollout.urls", "own URL"],
    ),
    "router that reaches no server": (
        both(attached(), put("rollout.router", "http://10.0.0.7:3000")),
        ["rollout.host", "127.0.0.1", "http://10.0.0.7:3000", "address"],
    ),
    "router for a student with ids of its own": (
        both(attached("http://127.0.0.1:1"), put("rollout.router", "http://127.0.0.1:2"), smaller_teacher),
        ["rollout.router", "http://127.0.0.1:2", "vocabulary rows more", "logit_bias", "remove rollout.router"],
    ),
    "rollouts ahead of training by the embedded engine": (put("rollout.lag", 1), ["rollout.lag", "embedded", "rollout.lag=0"]),
    "rollouts ahead on the training's devices": (
        both(attached(), put("rollout.lag", 1), put("rollout.placement", "colocated")),
        ["rollout.lag", "colocated", "rollout.lag=0"],
    ),
    "nothing to write ahead": (
        both(attached(), put("rollout.lag", 1), put("mixture.student", 0)),
        ["rollout.lag", "mixture.student", "rollout.lag=0"],
    ),
    "a teacher that writes ahead alone": (
        both(attached(), put("rollout.lag", 1), put("mixture.student", 0), put("mixture.teacher", 1)),
        ["rollout.lag", "mixture.student", "rollout.lag=0"],
    ),
    "more than a step ahead": (put("rollout.lag", 2), ["rollout.lag", "2", "1"]),
    "restarts below 0": (put("rollout.max_restarts", -1), ["rollout.max_restarts", "-1"]),
    "damaged checkpoint": (damaged_checkpoint, ["checkpoint.resume", "iter_0000002, common.pt is missing", "delete them"]),
    "load without a checkpoint": (load_from("student"), ["student.load", "not a torch_dist checkpoint", "iter_"]),
    "random and loaded": (both(put("student.init", "random"), load_from("student")), ["student.load", "student.init=random"]),
    "loaded teacher that writes": (load_from("teacher"), ["teacher.load", "mixture.teacher=0", "eval.teacher=false"]),
    "checkpoint of another model": (checkpoint_of_another_model, ["iter_0000002", "num_hidden_layers", "9", "run.dir"]),
    "run folder is a file": (run_dir_is_a_file, ["run.dir", "occupied"]),
    "held-out responses beyond a micro-batch": (
        put("eval.max_new_tokens", 90),
        ["packing.max_tokens_per_microbatch: 64", "held-out", "eval.max_new_tokens", "eval.score=false"],
    ),
    "unknown Megatron field": (put("student.megatron", {"recompute_granularty": "full"}), ["recompute_granularty"]),
    "FP8 on CPU": (fp8("current"), ["student.fp8: current needs a GPU", "no GPU is visible", "student.fp8=null"]),
    "FP8 of float32": (put("student.fp8", "current"), ["student.fp8: current", "student.dtype=bfloat16"]),
    "unknown FP8 recipe": (put("student.fp8", "e4m3"), ["student.fp8", "delayed"]),
    "delayed scaling of a frozen model": (put("teacher.fp8", "delayed"), ["teacher.fp8", "current"]),
    "FP8 weights and FP8 products": (
        both(put("teacher.fp8", "current"), put("teacher.quantize", "fp8")),
        ["teacher.fp8: current", "teacher.quantize"],
    ),
    "FP8 of a served teacher": (
        both(put("teacher.backend", "sglang"), put("teacher.fp8", "current")),
        ["teacher.fp8: set", "remove it"],
    ),
    "FP8 by Megatron's own field": (put("student.megatron", {"fp8": "hybrid"}), ["student.megatron.fp8", "set student.fp8"]),
    "derived Megatron field": (put("student.megatron", {"hidden_size": 8}), ["student.megatron.hidden_size"]),
    "Megatron field that changes the model": (
        put("student.megatron", {"softmax_scale": 1.0}),
        ["student.megatron.softmax_scale", "follows from the model", "remove"],
    ),
    "window in the embedded engine": (WINDOW, ["sliding_window: 8", "embedded engine", "rollout.backend=sglang"]),
    "window that SGLang leaves out": (
        both(WINDOW, attached("http://127.0.0.1:1")),
        ["student.model", "window of 8 tokens", "Qwen3ForCausalLM", "data.max_context=8"],
    ),
    "latent attention in SGLang": (
        both(latent_student, attached("http://127.0.0.1:1")),
        ["rollout.weight_sync: auto", "latent attention", "native or disk"],
    ),
    "warm-up longer than the run": (put("optimizer.warmup_steps", 6), ["optimizer.warmup_steps", "run.steps=6"]),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_line_with_key_value_and_remedy(
    name: str, good: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, config = good
    shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    config = yaml.safe_load(yaml.safe_dump(config).replace(str(source), str(tmp_path)))
    change, expected = CASES[name]
    change(tmp_path, config)
    code, stderr = check(tmp_path, config, capsys)
    assert code == 2
    assert stderr.count("\n") == 1, stderr
    assert not [fragment for fragment in expected if fragment not in stderr], stderr


def test_good_input_passes(good: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    folder, config = good
    assert check(folder, copy.deepcopy(config), capsys) == (0, "")


def test_world_size_must_fit_the_layout(
    good: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, config = good
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    code, stderr = check(folder, config, capsys)
    assert code == 2
    assert "tp=2" in stderr and "3 ranks" in stderr


def test_config_that_is_no_yaml_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "broken.yaml"
    file.write_text("run: {name: [")
    assert cli.main(["check", str(file)]) == 2
    assert cli.main(["check", str(tmp_path / "absent.yaml")]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert "broken.yaml" in first and "absent.yaml" in second


def test_train_refuses_before_it_starts_a_process(
    good: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, config = good
    file = folder / "train.yaml"
    file.write_text(yaml.safe_dump(config))
    monkeypatch.setattr("megatron_opd.launch.run_ranks", lambda *_: pytest.fail("processes were started"))
    assert cli.main(["train", str(file), "teacher.model=/nowhere"]) == 2
    assert "/nowhere" in capsys.readouterr().err


def test_override_without_a_value_is_refused(good: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    folder, config = good
    file = folder / "override.yaml"
    file.write_text(yaml.safe_dump(config))
    assert cli.main(["check", str(file), "loss.clip"]) == 2
    assert "loss.clip" in capsys.readouterr().err


def test_the_checked_vocabulary_is_the_shared_one(good: tuple[Path, dict[str, Any]]) -> None:
    """53 rows in the student and 59 in the teacher: the loss and the engines know 53 ids."""
    from megatron_opd.config_file import validate_config
    from megatron_opd.mcore.platform import Platform

    inputs = preflight.prepare(validate_config(copy.deepcopy(good[1])), Platform.detect(), world_size=2)
    assert inputs.loss_vocab_size == 53
    with pytest.raises(OpdError):
        preflight.prepare(validate_config(copy.deepcopy(good[1])), Platform.detect(), world_size=3)
