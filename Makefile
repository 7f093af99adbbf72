# `make demo` and `make test` set up everything that they need, in .venv, and nothing outside this folder.
PYTHON ?= python3
VENV = .venv
BIN = $(VENV)/bin
# Errors only: neither warnings nor the advice to update pip.
INSTALL = $(BIN)/python -m pip install -qq --disable-pip-version-check

.PHONY: demo test torture lint guide experiments clean

demo: $(VENV)/demo
	$(BIN)/python train.py --dataset glyphs --budget 2m --sample_interval 0 --output_dir outputs/demo
	$(BIN)/python sample.py --checkpoint outputs/demo/model_final.pt --label 0-9 --num_images 80 \
	    --output outputs/demo/generated_samples.png
	$(BIN)/python export.py --checkpoint outputs/demo/model_final.pt
	@echo
	@echo "Look at outputs/demo/generated_samples.png: a row for each digit, as this machine learnt to draw it."
	@echo "Open outputs/demo/page.html in a browser: the same model draws there, and shows how."

test: $(VENV)/dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

torture: $(VENV)/dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal tests/torture.py $(ARGS)

lint: $(VENV)/dev
	$(BIN)/ruff check .

guide: $(VENV)/dev
	$(BIN)/python -m guide.figures

experiments: $(VENV)/dev
	$(BIN)/python -m guide.experiments

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo: requirements.txt | $(BIN)/python
	@echo "Installing PyTorch and what else is needed into $(VENV); this takes some minutes, once ..."
	$(INSTALL) -r requirements.txt
	touch $@

$(VENV)/dev: requirements.txt requirements-dev.txt requirements-eval.txt requirements-export.txt \
    requirements-web.txt | $(BIN)/python
	$(INSTALL) -r requirements-dev.txt
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
