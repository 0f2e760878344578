#!/usr/bin/env bash
# Makes .venv for CUDA 13 from constraints/h200.txt. Needs no GPU, but a C++ compiler and Python's headers.
#
#   PYTHON       the interpreter to build it with, 3.12; default python3.12
#   A3PO_WHEELS  where Transformer Engine's compiled part is kept; default ~/.cache/a3po-megatron/wheels
#   MAX_JOBS     compilers at once; default one for every core, at most 16 (each takes about 2 GB)
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3.12}
wheels=${A3PO_WHEELS:-$HOME/.cache/a3po-megatron/wheels}
cores=$(nproc)
wanted=$(cat constraints/h200.txt pyproject.toml tools/setup_gpu.sh | cksum)
fail() { echo "setup: $*" >&2; exit 2; }
pinned() { sed -n "s/^$1==//p" constraints/h200.txt; }
pip_install() { .venv/bin/pip --disable-pip-version-check install -q --no-deps --timeout 30 --retries 2 "$@"; }

"$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null ||
  fail "$python is not Python 3.12, which constraints/h200.txt is for; name another one with PYTHON=..."
[ ! -d .venv ] || [ -f .venv/.gpu ] || fail "the .venv here is the one for CPUs (make setup): remove it first"

if [ ! -f .venv/.installed ] || [ "$(cat .venv/.installed)" != "$wanted" ]; then
  [ -f "$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" ] ||
    fail "Python's headers are missing (on Debian and Ubuntu: apt-get install python3.12-dev)"
  command -v c++ > /dev/null || fail "there is no C++ compiler: Transformer Engine's torch part is compiled here"
  rm -f .venv/.installed
  echo "setup: making .venv ($(grep -c '^[A-Za-z].*==' constraints/h200.txt) packages, 4 GB to download)"
  "$python" -m venv .venv || fail "the venv module is missing (on Debian and Ubuntu: apt-get install python3.12-venv)"
  touch .venv/.gpu # tools/setup.sh leaves such a .venv alone
  grep -v '^transformer-engine-torch==' constraints/h200.txt > .venv/wheels.txt
  pip_install -r .venv/wheels.txt || fail "a package of constraints/h200.txt cannot be installed (see above)"
  .venv/bin/python -c 'import torch; assert torch.version.cuda' ||
    fail "this torch is a build for CPUs: pip's configuration (pip config list) names an index that has those"

  # An extension fits the torch and the Python that it was built beside, and no other: undefined symbols at import.
  engine=$(pinned transformer-engine-torch)
  kept=$wheels/te$engine-torch$(pinned torch)-cp312
  if ! compgen -G "$kept/*.whl" > /dev/null; then
    echo "setup: compiling transformer-engine-torch $engine for $kept (28 files of C++)"
    site=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    mkdir -p "$wheels"
    built=$(mktemp -d "$wheels/.building-XXXXXX")
    trap 'rm -rf "$built"' EXIT
    # The compiler's version and all headers come from the packages just installed, whatever CUDA the machine has.
    # FORCE_BUILD: without it the build first tries to download a wheel, which hangs where nothing answers.
    # NO_LOCAL_VERSION: where TMPDIR lies in a git checkout, the version would get that one's commit, and TE's import
    # wants three equal versions.
    env PATH="$PWD/.venv/bin:$PATH" CUDA_HOME="$site/nvidia/cu13" \
      CUDNN_PATH="$site/nvidia/cudnn" CUDNN_HOME="$site/nvidia/cudnn" \
      CPATH="$site/nvidia/cudnn/include:$site/nvidia/nccl/include${CPATH:+:$CPATH}" \
      NVTE_NO_LOCAL_VERSION=1 NVTE_FRAMEWORK=pytorch NVTE_PYTORCH_FORCE_BUILD=TRUE MAX_JOBS="${MAX_JOBS:-$((cores < 16 ? cores : 16))}" \
      .venv/bin/pip --disable-pip-version-check wheel --no-deps --no-build-isolation \
      --no-binary transformer-engine-torch -w "$built" "transformer-engine-torch==$engine" ||
      fail "transformer-engine-torch $engine does not compile (see above)"
    chmod 755 "$built"
    # Whole or not at all; where another set-up was faster, its wheel is as good.
    mv -T "$built" "$kept" 2>/dev/null || compgen -G "$kept/*.whl" > /dev/null || fail "cannot write $kept"
  fi
  pip_install "$kept"/*.whl
  pip_install --no-build-isolation --editable .
  .venv/bin/pip --disable-pip-version-check check || fail "these packages do not fit each other (see above)"
  echo "$wanted" > .venv/.installed
fi
.venv/bin/a3po doctor --gpu ||
  echo "setup: installed, but a run cannot start here (see above; that a login node has no GPU is no fault)"
