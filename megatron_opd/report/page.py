"""One HTML file of everything: styles, scripts, data. It loads nothing, and runs no script but its own."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from megatron_opd.report.payload import payload, samples_payload
from megatron_opd.report.runs import Run
from megatron_opd.report.samples import RunSamples

_STYLES = ("vendor/uPlot.min.css", "style.css")
_SCRIPTS = (
    "vendor/uPlot.iife.min.js",
    "dom.js",
    "format.js",
    "theme.js",
    "data.js",
    "marks.js",
    "plots.js",
    "charts.js",
    "heat.js",
    "tables.js",
    "tokens.js",
    "rollouts.js",
    "main.js",
)


def render(runs: Sequence[Run], samples: Sequence[RunSamples], written: str) -> str:
    """The page; ``written`` says when, for the reader."""
    styles = [_asset(name) for name in _STYLES]
    scripts = [_asset(name) for name in _SCRIPTS]
    data = [_data("report", payload(runs, samples, written))]
    for i, of_run in enumerate(samples):
        data += [_data(f"samples-{i}-{step}", samples_payload(responses)) for step, responses in sorted(of_run.by_step.items())]
    # No network, and scripts by their digest only: text of a model that got into the markup could still do nothing.
    policy = f"default-src 'none'; img-src data:; script-src {_digests(scripts)}; style-src {_digests(styles)}"
    title = html.escape(", ".join(run.name for run in runs))
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>{title}: megatron-opd report</title>",
            *(f"<style>{style}</style>" for style in styles),
            "</head>",
            "<body>",
            "<noscript>This report draws its figures with JavaScript, which is switched off here.</noscript>",
            '<main id="page"></main>',
            *data,
            f'<script type="text/plain" id="licence-of-uplot">{_asset("vendor/uPlot.LICENSE")}</script>',
            *(f"<script>{script}</script>" for script in scripts),
            "</body>",
            "</html>",
            "",
        ]
    )


def _asset(name: str) -> str:
    return (files("megatron_opd.report") / "assets" / name).read_text(encoding="utf-8")


def _data(name: str, value: Any) -> str:
    """As a block that no text in it can end: without ``<``, ``>`` and ``&``, and in ASCII, so lone surrogates pass too."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return f'<script type="application/json" id="{name}">{text}</script>'


def _digests(blocks: Sequence[str]) -> str:
    digests = (hashlib.sha256(block.encode()).digest() for block in blocks)
    return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
