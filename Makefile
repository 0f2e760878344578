# make demo   trains the demo and says where its report is      make test   runs all tests
# make setup  makes .venv (both do it on their own)             make lint   style, format, types
.PHONY: demo demo-compare setup test test-slurm test-next soak lint

export PATH := $(CURDIR)/.venv/bin:$(PATH)

demo: setup
	a3po train configs/demo.yaml

demo-compare: setup
	@set -e; runs=runs/compare-$$(date +%Y%m%d-%H%M%S); \
	a3po train configs/demo.yaml --run-dir $$runs/a3po; \
	a3po train configs/demo-dapo.yaml --run-dir $$runs/dapo; \
	a3po report $$runs/a3po $$runs/dapo --out $$runs/report.html

setup:
	@tools/setup.sh

# Two at once; then those that have the machine to themselves, also where some of the first have failed. The long files
# come first (tests/conftest.py), not those of many tests.
test: setup
	@python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not alone and not soak and not slurm"; first=$$?; \
	[ $$first -le 1 ] || exit $$first; \
	python -m pytest -m "alone and not soak and not slurm" && exit $$first

# As root, with slurm-wlm and munge: a throw-away Slurm of two nodes on this machine.
test-slurm: setup
	python -m pytest -m "slurm and not soak" tests/slurm

# Python 3.12 and a newer Megatron-Core, in an environment of its own: what holds there.
test-next:
	tools/setup_next.sh
	.venv-next/bin/python -m tests.harness.next_versions

soak: setup
	python -m pytest -m "soak or interruption"

lint: setup
	ruff check .
	ruff format --check .
	mypy a3po_megatron
