# Nothing but Python and make is needed: the first command that runs anything creates .venv and installs there.
# `make` alone lists what there is.

GAME ?= Breakout
AGENT ?= twister
PRESET ?= auto
SEED ?= 0
SUITE ?= smoke

# What is typed reaches the program through the environment, so that quotes, blanks and $ are just characters.
TYPED := GAME AGENT PRESET SEED SEEDS DEVICES STEPS LOGDIR FILE SUITE GAMES
$(foreach name,$(TYPED) ARGS,$(eval override $(name) := $$(value $(name))))
export $(TYPED)

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# With an NVIDIA driver, JAX is installed with its CUDA libraries: CUDA 13 from driver 580 on, 12 before.
DRIVER := $(shell sed -n 's/.*Kernel Module[^.]*[^0-9.]\([0-9]*\)\..*/\1/p' /proc/driver/nvidia/version 2>/dev/null)
EXTRAS ?= $(if $(DRIVER),$(shell test $(DRIVER) -ge 580 && echo cuda || echo cuda12))
# An environment suite that needs packages of its own has an extra of its name: dmc:walker_walk, gym:CartPole-v1.
SUITE_EXTRA := $(filter dmc gym,$(firstword $(subst :, ,$(GAME))))
PYTHON ?= $(firstword $(foreach name,python3.12 python3.11 python3.13 python3 python,\
	$(shell $(name) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $(name))))

.DEFAULT_GOAL := help
.PHONY: help install train evaluate parity doctor bench suite test test-slow test-learning test-faults lint format types clean

help: ## this list
	@echo "make train GAME=Breakout [AGENT=twister|twm] [SEED=0 | SEEDS=0,1,2] [STEPS=100000] [PRESET=auto|paper|cpu|debug]"
	@echo "           [DEVICES=8] [LOGDIR=runs/...] [ARGS='--field value ...']   (all fields: make train ARGS=--help)"
	@echo "make suite SUITE=smoke [GAMES='Pong Breakout'] [SEEDS='0 1'] [ARGS='--launcher ray ...']"
	@echo
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | awk -F'|' '{printf "%-20s %s\n", $$1, $$2}'

comma := ,
# EXTRAS named on the command line are also added to a .venv that is there already.
install: $(STAMP) $(if $(filter command%,$(origin EXTRAS)),$(addprefix $(STAMP)-,$(subst $(comma), ,$(EXTRAS)))) ## create .venv and install there what training needs

# The tools of developers, and optional packages: .installed-dev, .installed-dmc, ...
$(STAMP)-%: $(STAMP)
	@echo "installing '$*' into $(VENV)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$*]'
	@touch $@

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: install it, or name it with PYTHON=/path/to/python" >&2; exit 2; }
	@test -x $(BIN)/python || { echo "creating $(VENV) with $$($(PYTHON) --version)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing into $(VENV)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.$(EXTRAS:%=[%])'
	@touch $@

train: $(STAMP) $(SUITE_EXTRA:%=$(STAMP)-%) ## train, or go on with the run in LOGDIR
	@test -n "$$SEEDS" && set -- --seeds "$$SEEDS" || set -- --seed "$$SEED"; \
	$(BIN)/python -m twister_jax train --game "$$GAME" --agent "$$AGENT" --preset "$$PRESET" "$$@" \
		$${DEVICES:+--parallel.data "$$DEVICES"} $${STEPS:+--train.steps "$$STEPS"} $${LOGDIR:+--logdir "$$LOGDIR"} $(ARGS)

evaluate: $(STAMP) ## full games with the newest checkpoint of LOGDIR
	@$(BIN)/python -m twister_jax evaluate --logdir "$$LOGDIR" $(ARGS)

parity: $(STAMP) ## recompute FILE=fixture.npz and compare
	@$(BIN)/python -m twister_jax parity "$$FILE"

doctor: $(STAMP) ## check that this machine can run it all
	@$(BIN)/python -m twister_jax doctor

bench: $(STAMP) ## throughput and utilisation
	@$(BIN)/python -m benchmarks $(ARGS)

suite: $(STAMP) $(addprefix $(STAMP)-,$(filter ray slurm,$(ARGS)) $(filter dmc,$(SUITE))) ## many games and seeds, SUITE=smoke; again, it goes on
	@set -f; set -- $${GAMES:+--games $$GAMES} $${SEEDS:+--seeds $$SEEDS}; set +f; \
	$(BIN)/python -m experiments run "$$SUITE" "$$@" $(ARGS)

test: $(STAMP)-dev ## all tests but the long ones, in two processes
	@$(BIN)/python -m pytest -n 2 --dist worksteal -m 'not faults and not slow and not learning' $(ARGS)

test-slow: $(STAMP)-dev ## what takes a compilation of its own: TWM killed and resumed, all benchmarks, ...
	@$(BIN)/python -m pytest -n 2 --dist worksteal -m slow $(ARGS)

test-learning: $(STAMP)-dev ## both agents learn Catch in float32 and bfloat16, TWISTER ContinuousCatch
	@$(BIN)/python -m pytest -n 2 --dist worksteal -m learning $(ARGS)

test-faults: $(STAMP)-dev ## the long campaign: kills, damaged files, full disks
	@$(BIN)/python -m pytest -m faults $(ARGS)

lint: $(STAMP)-dev ## style, and that imports point downwards
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/lint-imports

format: $(STAMP)-dev ## fix the style
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

types: $(STAMP)-dev ## static types
	@$(BIN)/mypy

clean: ## remove .venv and caches; runs are kept
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
