#!/usr/bin/env bash
# Makes .venv-next: Python 3.12 with a newer Megatron-Core and Transformer Engine's Python, for `make test-next`.
#
#   PYTHON    a Python 3.12; default python3.12
#   MEGATRON  the version of megatron-core; default 0.19.2, the newest for 3.12
#   TE        the version of transformer-engine; default that of constraints/h200.txt
#
# torch is PyPI's build for CUDA, which serves without a device too: 5 GB. No vLLM: the cells that run need none.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3.12}
megatron=megatron-core==${MEGATRON:-0.19.2}
te=transformer-engine==${TE:-$(sed -n 's/^transformer-engine==//p' constraints/h200.txt)}
wanted=$(echo "$megatron $te" | cat - constraints/cpu.txt tools/setup_next.sh | cksum)
[ -f .venv-next/.installed ] && [ "$(cat .venv-next/.installed)" = "$wanted" ] && exit 0

fail() { echo "setup: $*" >&2; exit 2; }
"$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null ||
  fail "$python is not Python 3.12; name one with PYTHON=..."
pip_install() { .venv-next/bin/pip --disable-pip-version-check install -qq --timeout 30 --retries 2 "$@"; }

echo "setup: making .venv-next with $megatron and $te (9 GB on disk; five minutes and more)"
rm -rf .venv-next
"$python" -m venv .venv-next
pip_install "$(sed -n 's/^\(torch==[0-9.]*\).*/\1/p' constraints/cpu.txt)" || fail "cannot get torch"
pip_install --no-deps "$megatron" || fail "cannot get $megatron"
grep -v '^#\|^torch==\|^vllm\|^megatron-core\|^triton\|+cpu' constraints/cpu.txt > .venv-next/rest.txt
pip_install --no-deps -r .venv-next/rest.txt || fail "a package of constraints/cpu.txt cannot be installed (see above)"
pip_install --no-deps --target .venv-next/transformer-engine "$te" || fail "cannot get $te"
echo "$wanted" > .venv-next/.installed
