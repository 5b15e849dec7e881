#!/usr/bin/env bash
# All that the CPU image installs beside make. CI runs it too, so that it is tested where there is no Docker engine.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

make setup
# A package that is there and does not load, as for want of a system library, should fail here and not in the first run.
"${VENV:-.venv}/bin/python" -c 'import megatron.core, torch, transformers; print("torch", torch.__version__)'
