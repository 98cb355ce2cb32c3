# make demo       real cells in, trained model and report out (SIMULATE=1: simulated cells, needs no data from the network)
# make test       lint and all tests
# make test-fast  lint and the fast tests, in two minutes
# make lint       style, types, import contracts, links of the pages
# make docs       the pages as a site, in site/
# make tutorial   runs docs/tutorial.py on real cells, and writes what it shows into docs/tutorial.md
# make wheelhouse the wheels of all that is installed, in wheelhouse/, for a cluster without internet.
#                 GLIBC=2.28 names the glibc of the cluster, where it is older than this machine's
# make system     as root on Debian: Slurm, sshd and what else the tests of clusters start; they are skipped without.
#                 `make test` does it where nothing but root runs: in containers and in CI
# Each sets up .venv first: pinned by constraints.txt, again when that or pyproject.toml changes.
# PYTHON=python3.12 (a command or a path) chooses the Python; a .venv of another version is made anew. Without it, .venv
# is of the first supported Python found. TORCH_INDEX=URL takes torch from there, as builds for CPU or another CUDA.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.PHONY: demo test test-fast lint docs tutorial wheelhouse system

VENV := .venv
WHEELHOUSE := wheelhouse
# Of equal versions pip takes the one with a local part, as 2.13.0+cpu. Such a build brings CUDA of its own or none.
CONSTRAINTS := constraints.txt $(if $(TORCH_INDEX),,constraints-cuda.txt)
TORCH := $(TORCH_INDEX:%=--extra-index-url %) $(shell grep '^torch==' constraints.txt)
READY := $(VENV)/.installed
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

RANKS ?= 2
# --strict: a broken link is an error, which --quiet would hide. The variable silences an advertisement.
MKDOCS := NO_MKDOCS_2_WARNING=1 mkdocs build --strict
DATA := data/$(if $(SIMULATE),simulated,pbmc)
RUN := runs/demo$(if $(SIMULATE),-simulated)

demo: $(READY)
	@set -x
	python -m data_prep fetch --out $(DATA) $(if $(SIMULATE),--simulate)
	[ -e $(DATA)/train.zarr ] || python -m data_prep convert $(DATA)/train.h5mu --out $(DATA)/train.zarr
	[ -e $(DATA)/test.zarr ] || \
	  python -m data_prep convert $(DATA)/test.h5mu --out $(DATA)/test.zarr --features-from $(DATA)/train.zarr
	deepspeed -q --num_accelerators $(RANKS) launch/train.py --config configs/demo.json --set store=$(DATA)/train.zarr run=$(RUN)
	python launch/embed.py --run $(RUN) --store $(DATA)/test.zarr --out $(RUN)/test.h5mu --per-modality
	python launch/evaluate.py --run $(RUN) --store $(DATA)/test.zarr --out $(RUN)/scores.json
	python launch/impute.py --run $(RUN) --store $(DATA)/test.zarr --out $(RUN)/adt.h5ad --modality adt --from rna \
	  --log1p --interval 0.9
	python launch/report.py --run $(RUN) --embedding $(RUN)/test.h5mu --scores $(RUN)/scores.json \
	  --imputed $(RUN)/adt.h5ad --truth $(DATA)/test.zarr

test: lint $(if $(shell [ "$$(id -u)" = 0 ] && [ ! -d /run/systemd/system ] && command -v apt-get),system)
	@python -m pytest --numprocesses 3 # tests of clusters wait a lot

test-fast: lint
	@python -m pytest --numprocesses 2 -m "not slow"

system:
	@absent=$$(while read -r name; do dpkg -s "$$name" >/dev/null 2>&1 || echo "$$name"; done < tests/debian.txt)
	[ -z "$$absent" ] || apt-get update --quiet=2 || true
	for name in $$absent; do # one by one: other systems lack some of them
	  DEBIAN_FRONTEND=noninteractive apt-get install --quiet=2 --yes --no-install-recommends "$$name" >/dev/null \
	    || echo "could not install $$name: some tests will be skipped"
	done

lint: $(READY)
	@set -x
	ruff check
	ruff format --check
	mypy
	lint-imports
	python -m tests.style
	$(MKDOCS)

docs: $(READY)
	$(MKDOCS)

tutorial: $(READY)
	python -m data_prep fetch --out data/pbmc
	python -m tests.notebook

SUPPORTED := 3.11 3.12 3.13
# pyenv's shim of a Python that is not switched on does not start: pyenv's own folders count too.
PYENV := $(or $(PYENV_ROOT),$(HOME)/.pyenv)/versions/*/bin
CANDIDATES := $(if $(PYTHON),$(PYTHON) $(wildcard $(PYENV)/$(PYTHON)),$(SUPPORTED:%=python%) python3 python)
PRINT_VERSION := -c 'import sys; print("%d.%d" % sys.version_info[:2])'

# Sets $python to the first candidate of a supported version.
define choose_python
for python in $(CANDIDATES) ''; do
  case ' $(SUPPORTED) ' in *" $$("$$python" $(PRINT_VERSION) 2>/dev/null) "*) break ;; esac
done
if [ -z "$$python" ]; then
  echo "error: Python 3.11, 3.12 or 3.13 is needed; none of these is one: $(CANDIDATES)" >&2
  echo "  fix: install one (Debian, Ubuntu: apt-get install python3 python3-venv), or give its path:" \
    "make PYTHON=PATH" >&2
  exit 1
fi
endef

# A .venv of another version than PYTHON has is made anew, whatever the age of its mark.
ifdef PYTHON
VENV_VERSION := $(shell $(VENV)/bin/python $(PRINT_VERSION) 2>/dev/null)
ifneq ($(VENV_VERSION),$(shell exec 2>/dev/null; $(choose_python); "$$python" $(PRINT_VERSION)))
ANOTHER_PYTHON := yes
.PHONY: $(READY)
endif
endif

# .installing marks a set-up under way: one that was broken off may have left half a package, so it
# starts anew. Of a variable, PIP_CONSTRAINT, the pins hold for what our package is built with too.
$(READY): pyproject.toml $(CONSTRAINTS)
	@if [ -n "$(ANOTHER_PYTHON)" ] || [ -e $(VENV)/.installing ] || [ ! -x $(VENV)/bin/python ]; then
	  $(choose_python)
	  if [ -n "$(ANOTHER_PYTHON)" ] && [ -e $(READY) ]; then
	    echo "$(VENV) is of Python $(VENV_VERSION), not $(PYTHON): it is made anew"
	  fi
	  rm -rf $(VENV)
	  mkdir -p $(VENV)
	  touch $(VENV)/.installing
	  "$$python" -m venv $(VENV)
	fi
	touch $(VENV)/.installing
	echo "installing into $(VENV): the first time takes minutes"
	export PYTHONWARNINGS=ignore PIP_CONSTRAINT='$(CONSTRAINTS)'
	$(VENV)/bin/python -m pip install --quiet $(TORCH)
	$(VENV)/bin/python -m pip install --quiet --editable '.[dev]'
	mv $(VENV)/.installing $(READY)

# pip takes the tag of a platform literally, so each glibc up to the cluster's is named.
tags = $(foreach minor,$(shell seq $(GLIBC:2.%=%) -1 5),manylinux_2_$(minor)) manylinux2014
PLATFORMS := $(if $(GLIBC),$(patsubst %,--platform %_$(shell uname -m),$(tags)))

# DeepSpeed is published as source alone: its wheel, which fits every platform, is built first.
wheelhouse:
	@$(choose_python)
	scratch=$$(mktemp -d)
	trap 'rm -rf "$$scratch"' EXIT
	"$$python" -m venv "$$scratch"
	pip="$$scratch/bin/python -m pip --quiet"
	echo "collecting wheels into $(WHEELHOUSE): several GB where torch is of CUDA"
	export PYTHONWARNINGS=ignore PIP_CONSTRAINT='$(CONSTRAINTS)'
	$$pip wheel --no-deps --wheel-dir $(WHEELHOUSE) deepspeed
	$$pip download --dest $(WHEELHOUSE) --find-links $(WHEELHOUSE) --only-binary :all: $(PLATFORMS) \
	  $(TORCH) setuptools '.[dev]'
	echo "where there is no network: pip install --no-index --find-links $(WHEELHOUSE)" \
	  "--constraint constraints.txt --editable ."
