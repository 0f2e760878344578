#!/usr/bin/env bash
# Makes .venv from constraints/cpu.txt; does nothing where it is up to date. Called by `make setup`.
#
#   PYTHON           the interpreter to build it with (3.11, or 3.12); default python3
#   TORCH_CPU_INDEX  where the CPU build of torch comes from if pip's own configuration does not have it
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
index=${TORCH_CPU_INDEX:-https://download.pytorch.org/whl/cpu}
wanted=$(cat constraints/cpu.txt pyproject.toml tools/setup.sh | cksum)
[ -f .venv/.gpu ] && exit 0 # tools/setup_gpu.sh's, for CUDA: that script keeps it up to date
[ -f .venv/.installed ] && [ "$(cat .venv/.installed)" = "$wanted" ] && exit 0

fail() { echo "setup: $*" >&2; exit 2; }
"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null ||
  fail "$python is not Python 3.11 or 3.12; name another one with PYTHON=..."

# Warnings about indexes that do not answer are left out, errors are not; nothing waits longer than this.
pip_install() { .venv/bin/pip --disable-pip-version-check install -qq --no-deps --timeout 30 --retries 2 "$@"; }

rm -f .venv/.installed
echo "setup: making .venv (about $(grep -vc '^#' constraints/cpu.txt) packages, 4 GB on disk; takes one to five minutes)"
"$python" -m venv .venv || fail "the venv module is missing (on Debian: apt-get install python3-venv)"

torch=$(grep '^torch==' constraints/cpu.txt) # ends in +cpu: no build for CUDA can match it
if ! .venv/bin/python -c "import importlib.metadata as m; assert 'torch==' + m.version('torch') == '$torch'" 2>/dev/null; then
  echo "setup: $torch"
  pip_install "$torch" 2>/dev/null ||
    pip_install --index-url "$index" "$torch" ||
    fail "cannot get $torch, neither with pip's own configuration nor from $index: set TORCH_CPU_INDEX to an index that has it"
fi
echo "setup: everything else"
pip_install -r constraints/cpu.txt || fail "a package of constraints/cpu.txt cannot be installed (see above)"
pip_install --no-build-isolation --editable . 2>/dev/null || pip_install --no-build-isolation --editable .
# Transformer Engine's Python, for the tests, where no import finds it: tests/harness/te_on_cpu puts it on a CPU.
pip_install --target .venv/transformer-engine --upgrade "$(grep '^transformer-engine==' constraints/h200.txt)" ||
  fail "cannot get the wheel of Transformer Engine's Python"
.venv/bin/python -c 'import torch; assert torch.version.cuda is None' || fail "the torch in .venv is a build for CUDA: remove .venv"
echo "$wanted" > .venv/.installed
echo "setup: done; \`. .venv/bin/activate\` gives you the command a3po"
