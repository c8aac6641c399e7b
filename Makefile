# Everything from a bare machine with Python 3.11: `make demo` and `make test` do all the set-up.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help demo demo-view demo-text demo-cohort demo-features demo-mil demo-augment test test-browser faults \
	interruptions lint docs train-demo clean

help:  ## say what can be made
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

demo: .venv/.installed  ## make .venv, sample a picture with the embedded demo model, say where it is
	$(BIN)/python generate_large.py --config configs/demo.yaml

demo-view: .venv/.installed  ## make .venv, sample the demo picture and show it in a browser while it is made
	@$(BIN)/python generate_large.py --config configs/demo.yaml --output.folder runs/demo_view & run=$$!; \
	trap 'kill $$run 2>/dev/null; wait $$run 2>/dev/null' EXIT; trap 'exit 130' INT TERM; \
	until [ -e runs/demo_view/state.json ]; do kill -0 $$run 2>/dev/null || exit 1; sleep 0.2; done; \
	$(BIN)/python -m engine.view runs/demo_view

demo-text: .venv/.installed  ## make .venv, draw three texts and a map of texts with the demo's text prior
	$(BIN)/python generate_large.py --config configs/demo.yaml --canvas.height 512 --canvas.width 512 \
	  --text 'mostly fat' --output.folder runs/demo_text/fat
	$(BIN)/python generate_large.py --config configs/demo.yaml --canvas.height 512 --canvas.width 512 \
	  --text 'only stroma, no fat' --output.folder runs/demo_text/stroma
	$(BIN)/python generate_large.py --config configs/demo.yaml --canvas.height 512 --canvas.width 512 \
	  --text '60 % nests of tumour, no fat' --output.folder runs/demo_text/nests
	$(BIN)/python generate_large.py --config configs/demo.yaml --text_map configs/maps/demo.yaml \
	  --output.folder runs/demo_text/map

demo-cohort: .venv/.installed  ## make .venv, write two phantom slides, draw four small pictures after them as one job
	$(BIN)/python -m engine.phantom_cohort --out runs/demo_cohort --patients 1 --width 2048 --height 2048
	$(BIN)/python -m engine.generate_cohort --config configs/cohort_demo.yaml

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

demo-augment: .venv/.installed  ## make .venv, write 60 phantom patients, learn from real and from synthetic bags, compare
	$(BIN)/python -m engine.phantom_cohort --out runs/demo_augment/cohort --width 2048 --height 2048 --seed 1
	$(BIN)/python -m engine.extract_features --slides runs/demo_augment/cohort/slides \
	  --out runs/demo_augment/extraction --encoders '[texture]'
	$(BIN)/python -m mil.augment --config configs/augment_demo.yaml --wanted runs/demo_augment/wanted.csv
	$(BIN)/python -m engine.generate_cohort --config configs/cohort_demo_augment.yaml
	$(BIN)/python -m mil.augment --config configs/augment_demo.yaml

test: lint .cache/archives/.fetched  ## make .venv, fetch real slide files, check all, run the tests on up to four cores
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadgroup

test-browser: .venv/.installed-dev  ## try the viewer's page in Chromium (apt-get install chromium); screenshots in runs/
	VIEWER_SCREENSHOTS=runs/view_screenshots $(BIN)/python -m pytest tests/viewer/browser

faults: .venv/.installed-dev  ## try every fault there is on a tiny run, write docs/results/reliability.md (half an hour)
	$(BIN)/python -m pytest tests/faults -m 'faults or not faults' --ignore tests/faults/test_interrupted.py \
	--faults-record runs/faults.json
	$(BIN)/python -m benchmarks.reliability --record runs/faults.json --out docs/results/reliability.md

# Source archives of packages that hold real slide files. Without a network the tests that read them are skipped.
.cache/archives/.fetched: tests/slides/archives.txt | .venv/.installed-dev
	mkdir -p $(@D)
	if $(BIN)/python -m pip download --quiet --no-deps --no-binary :all: --no-build-isolation --require-hashes \
		--requirement $< --dest $(@D); then touch $@; else echo 'Real slide files are not there; their tests are skipped.'; fi

interruptions: .venv/.installed-dev  ## interrupt commands at twenty random moments of each phase (two hours)
	$(BIN)/python -m pytest tests/faults/test_interrupted.py -m 'faults or not faults'

lint: .venv/.installed-dev  ## check formatting, style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

docs: .venv-docs/.installed  ## make .venv-docs, build the site of docs/ into site/ (open site/index.html)
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict

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

clean:  ## remove the virtual environments and caches; runs/ stays
	rm -rf .venv .venv-docs site .cache .pytest_cache .ruff_cache build ./*.egg-info

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

# The site needs none of the engine, so it has an environment of its own.
.venv-docs/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet 'pip>=25.1'
	.venv-docs/bin/python -m pip install --quiet --constraint constraints.txt --group docs
	touch $@
