# make demo    real cells in, trained model and report out (SIMULATE=1: simulated cells, needs no data from the network)
# make test    lint, types, import contracts, all tests
# make lint    the first three of these
# make system  as root on Debian: Slurm, sshd and what else the tests of clusters start; they are skipped without.
#              `make test` does it where nothing but root runs: in containers and in CI
# Each sets up .venv first: pinned by constraints.txt, again when that or pyproject.toml changes.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.PHONY: demo test lint system

VENV := .venv
READY := $(VENV)/.installed
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

RANKS ?= 2
DATA := data/$(if $(SIMULATE),simulated,pbmc)
RUN := runs/demo$(if $(SIMULATE),-simulated)

demo: $(READY)
	@set -x
	python -m data_prep fetch --out $(DATA) $(if $(SIMULATE),--simulate)
	[ -e $(DATA)/train.zarr ] || python -m data_prep convert $(DATA)/train.h5mu --out $(DATA)/train.zarr
	[ -e $(DATA)/test.zarr ] || \
	  python -m data_prep convert $(DATA)/test.h5mu --out $(DATA)/test.zarr --features-from $(DATA)/train.zarr
	deepspeed --num_accelerators $(RANKS) launch/train.py --config configs/demo.json --set store=$(DATA)/train.zarr run=$(RUN)
	python launch/embed.py --run $(RUN) --store $(DATA)/test.zarr --out $(RUN)/test.h5mu --per-modality
	python launch/evaluate.py --run $(RUN) --store $(DATA)/test.zarr --out $(RUN)/scores.json
	python launch/report.py --run $(RUN) --embedding $(RUN)/test.h5mu --scores $(RUN)/scores.json

test: lint $(if $(shell [ "$$(id -u)" = 0 ] && [ ! -d /run/systemd/system ] && command -v apt-get),system)
	@python -m pytest --numprocesses 2

system:
	@absent=$$(while read -r name; do dpkg -s "$$name" >/dev/null 2>&1 || echo "$$name"; done < tests/debian.txt)
	[ -z "$$absent" ] || { apt-get update --quiet=2 && DEBIAN_FRONTEND=noninteractive apt-get install --quiet=2 --yes \
	  --no-install-recommends $$absent >/dev/null; } || echo "could not install $$absent: some tests will be skipped"

lint: $(READY)
	@set -x
	ruff check
	ruff format --check
	mypy
	lint-imports

# .installing marks a set-up under way: one that was broken off may have left half a package, so it starts anew.
$(READY): pyproject.toml constraints.txt
	@[ ! -e $(VENV)/.installing ] || rm -rf $(VENV)
	python=
	for p in python3.11 python3 python; do
	  if command -v "$$p" >/dev/null && "$$p" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null
	  then python=$$(command -v "$$p"); break; fi
	done
	if [ ! -x $(VENV)/bin/python ]; then
	  if [ -z "$$python" ]; then
	    echo "error: Python 3.11 is needed; neither python3.11, python3 nor python is one" >&2
	    echo "  fix: install it (Debian, Ubuntu: apt-get install python3.11 python3.11-venv)" >&2
	    exit 1
	  fi
	  mkdir -p $(VENV)
	  touch $(VENV)/.installing
	  "$$python" -m venv $(VENV)
	fi
	touch $(VENV)/.installing
	echo "installing into $(VENV): the first time takes minutes"
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	export PYTHONWARNINGS=ignore PIP_CONSTRAINT=constraints.txt # by a variable: that of which our package is built, too
	$(VENV)/bin/python -m pip install --quiet --editable '.[dev]'
	mv $(VENV)/.installing $(READY)
