"""From a YAML file and dotted overrides to a checked configuration.

``load_config("run.yaml", ["loss.opd=reverse_kl"])`` returns a :class:`~megatron_opd.config.Config` or raises
:class:`~megatron_opd.types.OpdError` with one line that names the key, the value and the remedy.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from megatron_opd.config import Config
from megatron_opd.config_checks import check_combinations
from megatron_opd.types import OpdError


class _Loader(yaml.SafeLoader):
    """YAML 1.2 floats: PyYAML reads 1e-6 as a string."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"),
    list("-+0123456789."),
)


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read ``path``, apply ``key.path=value`` overrides (values are YAML), resolve ``${a.b}`` and validate.

    Relative paths inside the file stay relative to the working directory. Raises OpdError.
    """
    file = Path(path)
    try:
        tree = yaml.load(file.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise OpdError(f"config {file}: cannot be read ({error.strerror}); give the path of a YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise OpdError(f"config {file}: not valid YAML ({_one_line(error)})") from error
    if not isinstance(tree, dict):
        raise OpdError(f"config {file}: must be a mapping of sections such as run, student, data")
    for override in overrides or []:
        _apply_override(tree, override)
    return validate_config(tree)


def validate_config(tree: dict[str, Any]) -> Config:
    """A plain tree → Config, with the checks that need no file and no model. Raises OpdError."""
    if isinstance(tree.get("run"), dict):
        tree = {**tree, "run": {"dir": "runs/${run.name}", **tree["run"]}}
    tree = _interpolate(tree, tree)
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        raise OpdError(_explain(error)) from error
    check_combinations(config)
    return config


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise OpdError(f"override {override!r}: must have the form key.path=value")
    node: Any = tree
    *parents, leaf = key.split(".")
    for depth, part in enumerate(parents):
        if node.get(part) is None:
            node[part] = {}
        node = node[part]
        if not isinstance(node, dict):
            raise OpdError(f"override {override!r}: {'.'.join(parents[: depth + 1])} is a value, not a section")
    try:
        node[leaf] = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise OpdError(f"override {override!r}: the value is not valid YAML ({_one_line(error)})") from error


def _interpolate(node: Any, root: dict[str, Any]) -> Any:
    if isinstance(node, dict):
        return {key: _interpolate(value, root) for key, value in node.items()}
    if isinstance(node, list):
        return [_interpolate(value, root) for value in node]
    if isinstance(node, str):
        return re.sub(r"\$\{([^}]+)\}", lambda match: str(_lookup(match.group(1), root)), node)
    return node


def _lookup(key: str, root: dict[str, Any]) -> Any:
    node: Any = root
    for part in key.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    if node is None or isinstance(node, dict | list):
        raise OpdError(f"${{{key}}}: no such value in the config; name a key that is set")
    return node


def _explain(error: ValidationError) -> str:
    """The first finding as one line: key, value, remedy."""
    first = error.errors(include_url=False)[0]
    path = [str(part) for part in first["loc"]]
    key = ".".join(path)
    if first["type"] == "extra_forbidden":
        known = _known_keys(path[:-1])
        close = difflib.get_close_matches(path[-1], known, n=1)
        remedy = f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(known)}"
        return f"{key}: unknown key; {remedy}"
    if first["type"] == "missing":
        return f"{key}: required, but not set; add it to the config or give {key}=VALUE"
    message = first["msg"][0].lower() + first["msg"][1:]
    return f"{key}: {message}, got {first['input']!r}"


def _known_keys(path: list[str]) -> list[str]:
    section: Any = Config
    for part in path:
        if part not in section.model_fields:  # a key of a mapping, a number in a list
            continue
        annotation = section.model_fields[part].annotation
        options = [annotation, *getattr(annotation, "__args__", ())]
        section = next(option for option in options if isinstance(option, type) and issubclass(option, BaseModel))
    return list(section.model_fields)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
