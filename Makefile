# From labelled images to a measured Triton endpoint. `make help` lists the targets.
#
#   RECIPE=name or file   SET="section.key=value ..."   NAME=folder of the run (default: the recipe's name)
#   ARGS="--force ..."    IMAGES="a.jpg b.jpg"          PYTHON=python3.12
#   LAUNCH="torchrun --nproc-per-node=8"  trains in several processes

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
RECIPE ?= embedded
SET ?=
NAME ?=
ARGS ?=
IMAGES ?=
LAUNCH ?=

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
PIP := $(BIN)/python -m pip install --quiet --no-input --disable-pip-version-check --require-hashes
RUN := $(BIN)/python -m pipeline run $(RECIPE) $(SET) $(if $(NAME),--name $(NAME)) \
	$(if $(LAUNCH),--launch '$(LAUNCH)')
STAGES := data train strip export precision engine validate deploy benchmark
# NVIDIA ModelOpt, which makes these precisions, is installed when SET asks for one.
MODELOPT := .modelopt
CONVERTED := $(if $(filter $(addprefix export.precision=,fp16 bf16 int8 fp8),$(SET)),$(MODELOPT)/installed)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup setup-precision train-export-deploy $(STAGES) bisect report status serve detect test conformance lint golden lock clean

help: ## List the targets.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-21s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(INSTALLED) ## Create .venv and install the pinned dependencies; every target that needs it does so.

$(INSTALLED): requirements/check_system.py $(filter-out requirements/precision.txt,$(wildcard requirements/*.txt))
	@$(PYTHON) requirements/check_system.py
	@echo "installing the pinned dependencies into $(VENV): about 6 GB, some minutes"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) -r requirements/lock.txt
	@$(PIP) --no-deps -r requirements/without-dependencies.txt
	@$(PIP) --no-deps --upgrade --only-binary=:all: --python-version 3.10 \
		--target "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
		-r requirements/detectron2.txt
	@touch $@

setup-precision: $(MODELOPT)/installed ## Install NVIDIA ModelOpt (0.2 GB), for fp16, bf16, int8 and fp8; a SET that asks for one does so.

$(MODELOPT)/installed: requirements/precision.txt | $(INSTALLED)
	@echo "installing NVIDIA ModelOpt into $(MODELOPT): 0.2 GB"
	@rm -rf $(MODELOPT)
	@$(PIP) --no-deps --target $(MODELOPT) -r requirements/precision.txt
	@touch $@

train-export-deploy: $(INSTALLED) $(CONVERTED) ## Everything: train, strip, export, prove, deploy, benchmark, report. Only what changed runs.
	@$(RUN) $(ARGS)

data: $(INSTALLED) ## Generate the embedded data set, or check your own.
train: $(INSTALLED) ## Train the student with its distiller; goes on from the last checkpoint.
strip: $(INSTALLED) ## Drop the teacher and prove that nothing of it is left.
export: $(INSTALLED) ## Write the ONNX model and its signature.
precision: $(INSTALLED) ## Convert the ONNX model to export.precision, where that is not float32.
engine: $(INSTALLED) ## Build the TensorRT engine.
validate: $(INSTALLED) ## Measure AP in every format, match detections, check batch invariance.
deploy: $(INSTALLED) ## Publish a model version and measure AP through the live endpoint.
benchmark: $(INSTALLED) ## Measure latency and throughput of the endpoint.
$(STAGES): $(CONVERTED)
	@$(RUN) --until $@ $(ARGS)

bisect: $(INSTALLED) $(CONVERTED) ## Validate, and name the first graph node that departs from detectron2.
	@$(BIN)/python -m pipeline validate $(RECIPE) $(SET) $(if $(NAME),--name $(NAME)) --bisect $(ARGS)

report: $(INSTALLED) ## Write report.json, report.md and report.html anew.
	@$(BIN)/python -m pipeline report $(RECIPE) $(SET) $(if $(NAME),--name $(NAME))

status: $(INSTALLED) ## Show how the stages of the recipe's run stand.
	@$(BIN)/python -m pipeline status $(RECIPE) $(SET) $(if $(NAME),--name $(NAME))

serve: $(INSTALLED) ## Serve the deployed model in the foreground; Ctrl-C ends it.
	@$(BIN)/python -m pipeline serve --name $(or $(NAME),$(basename $(notdir $(RECIPE)))) $(ARGS)

detect: $(INSTALLED) ## Send IMAGES="a.jpg b.jpg" to the server that `make serve` runs.
	@$(BIN)/python -m pipeline detect $(IMAGES) $(ARGS)

test: $(INSTALLED) lint ## Run the linters, the type checker and the test suite, in as many processes as there are cores, up to 4.
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile $(ARGS)

conformance: $(INSTALLED) ## Train, strip and load every recipe at its full size (12 minutes on two cores); export every family on every backbone (11).
	@$(BIN)/python bench/conformance.py $(ARGS)

lint: $(INSTALLED) ## Run the linters and the type checker alone.
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

golden: $(INSTALLED) ## Write the golden files anew; read the diff before committing it.
	@$(BIN)/python tests/golden/make_lgd.py
	@$(BIN)/python tests/golden/make_model_repository.py

lock: ## Pin the dependencies of pyproject.toml anew (needs uv).
	@uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
		--no-annotate --quiet --custom-compile-command "make lock" --output-file requirements/lock.txt
	@uv pip compile requirements/precision.in --no-deps --universal --python-version 3.11 --generate-hashes \
		--no-emit-index-url --no-annotate --quiet --custom-compile-command "make lock" \
		--output-file requirements/precision.txt

clean: ## Remove the run of RECIPE (its artifacts and its model repository); .venv stays.
	@rm -rf runs/$(or $(NAME),$(basename $(notdir $(RECIPE))))
