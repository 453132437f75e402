# Everything runs in .venv, made on first use from the package index alone. PYTHON needs to be 3.11 or newer.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
SMOLLM2 ?= build/smollm2

.PHONY: install demo demo-llm test check bench clean

install: $(VENV)/installed

# torch comes first and alone: the pinned release is the one that everything was measured with.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt torch
	$(PIP) install -c constraints.txt -e '.[dev,gguf,lora,vision,tensorboard]'
	touch $@

demo: install
	$(BIN)/secateur demo

demo-llm: install
	$(BIN)/python scripts/demo_llm.py --model $(SMOLLM2)

test: install
	$(BIN)/python -m pytest -n 2

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: install
	$(BIN)/python scripts/smollm2.py $(SMOLLM2)
	$(BIN)/python benchmarks/solver.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/end_to_end.py --model $(SMOLLM2)
	$(BIN)/python benchmarks/kill.py
	$(BIN)/python benchmarks/families.py
	$(BIN)/python benchmarks/oneshot.py --model $(SMOLLM2)
	$(BIN)/python benchmarks/zoo.py
	$(BIN)/python benchmarks/latency.py
	$(BIN)/python benchmarks/structured.py --model $(SMOLLM2)
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/strategy.py resnet56
	$(BIN)/python benchmarks/strategy.py efficientnet
	$(BIN)/python benchmarks/strategy.py vit

clean:
	rm -rf $(VENV) build
