# Everything from a bare machine with Python 3.11: `make demo` and `make test` do all the set-up.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help demo demo-features demo-mil test faults lint train-demo clean

help:  ## say what can be made
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

demo: .venv/.installed  ## make .venv, sample a picture with the embedded demo model, say where it is
	$(BIN)/python generate_large.py --config configs/demo.yaml

demo-features: .venv/.installed  ## make .venv, write six phantom slides, extract their features with the demo model
	$(BIN)/python -m engine.phantom_slides --out runs/phantom_slides
	$(BIN)/python -m engine.extract_features --config configs/demo_features.yaml

demo-mil: .venv/.installed  ## make .venv, write 60 phantom patients, learn their label from 20x, 5x and both, compare
	$(BIN)/python -m engine.phantom_cohort --out runs/demo_mil/cohort
	$(BIN)/python -m engine.extract_features --config configs/demo_mil_features.yaml
	$(BIN)/python -m mil.train --config configs/demo_mil.yaml --scales 20,5 --output.folder runs/demo_mil/20x+5x
	$(BIN)/python -m mil.train --config configs/demo_mil.yaml --scales 20 --output.folder runs/demo_mil/20x
	$(BIN)/python -m mil.train --config configs/demo_mil.yaml --scales 5 --output.folder runs/demo_mil/5x
	$(BIN)/python -m mil.compare runs/demo_mil/20x+5x runs/demo_mil/20x runs/demo_mil/5x --out runs/demo_mil/comparison
	@echo 'Reports: runs/demo_mil/20x+5x/report.html, .../20x/report.html, .../5x/report.html; all together:'
	@echo 'runs/demo_mil/comparison.txt and .png'

test: lint  ## make .venv, check style and types, run the tests
	$(BIN)/python -m pytest

faults: .venv/.installed-dev  ## try every fault there is on a tiny run, write docs/reliability.md (a quarter of an hour)
	$(BIN)/python -m pytest tests/faults -m 'faults or not faults' --faults-record runs/faults.json
	$(BIN)/python -m benchmarks.reliability --record runs/faults.json --out docs/reliability.md

lint: .venv/.installed-dev  ## check formatting, style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

PHANTOMS := --width 8192 --height 8192 --varied true --pen_every 0
EMBEDDED := engine/model/demo

train-demo: .venv/.installed-dev  ## train the embedded demo model again, from phantom slides (two CPU cores, three hours)
	$(BIN)/python -m engine.train --config configs/train_demo.yaml
	$(BIN)/python -m engine.phantom_slides --out runs/train_slides --count 20 $(PHANTOMS)
	$(BIN)/python -m engine.phantom_slides --out runs/heldout_slides --count 4 --seed 10000 $(PHANTOMS)
	$(BIN)/python -m engine.prepare --config configs/prepare_demo.yaml
	$(BIN)/python -m engine.prepare --config configs/prepare_demo.yaml --slides runs/heldout_slides --out runs/prepared_heldout
	$(BIN)/python -m engine.train --config configs/train_demo_denoiser.yaml
	$(BIN)/python -m engine.train --config configs/train_demo_refine.yaml
	$(BIN)/python -m engine.train --config configs/train_demo_cdm.yaml
	cp -R runs/train_demo_refine/model/. runs/train_demo/model/reference.* runs/train_demo_cdm/cdm $(EMBEDDED)/
	cp runs/train_demo/model/training.json $(EMBEDDED)/training_autoencoder.json
	cp runs/train_demo_denoiser/training.json $(EMBEDDED)/training_denoiser.json
	cp runs/train_demo_refine/training.json $(EMBEDDED)/training_refine.json

clean:  ## remove the virtual environment and caches; runs/ stays
	rm -rf .venv .pytest_cache .ruff_cache build ./*.egg-info

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; got " + sys.version)'
	$(PYTHON) -m venv .venv

# The stamps make later calls fast; editing the pins installs again.
.venv/.installed: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet 'pip>=25.1'
	$(BIN)/python -m pip install --constraint constraints.txt --editable .
	touch $@

.venv/.installed-dev: .venv/.installed
	$(BIN)/python -m pip install --constraint constraints.txt --group dev --editable '.[cluster,cloud,train]'
	touch $@
