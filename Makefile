# Two commands on a fresh machine: `make demo` and `make test`. Each makes .venv when it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ENV := $(VENV)/.installed
PEERS := .venv-oracles
PEERS_ENV := $(PEERS)/.installed
THREADS ?= 2
MINUTES ?= 15
CASES ?= 2000

.PHONY: demo test lint golden mutants forms test-slow test-oracles bench bench-power bench-symmetries bench-gpt2 bench-products bench-catalogue bench-device catalogue results-page clean

demo: $(ENV)  ## train small nets with small and large batches, measure them, attack one, write a report
	$(BIN)/isoflat demo

test: $(ENV) lint  ## everything that must hold before a change lands
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal --maxfail 20 -m "not slow"
	ISOFLAT_PRETEND=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 tests/device

lint: $(ENV)
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/pyrefly check
	$(BIN)/lint-imports --no-logo

golden: $(ENV)  ## about seventy measurements on a base commit and here, compared to the last bit: make golden BASE=main [ONLY=sampled]
	@test -n "$(BASE)" || { echo "name the commit to compare with, such as: make golden BASE=main" >&2; exit 2; }
	$(BIN)/python tests/golden/compare.py --base "$(BASE)" --only "$(ONLY)"

mutants: $(ENV)  ## one-line faults in a copy of the source, each of which some test must notice; writes docs/mutants.md
	$(BIN)/python tests/mutants/run.py --jobs $(THREADS) --markdown docs/mutants.md

forms: $(ENV)  ## combinations of losses, batches and precisions as people bring them, beside torch's own numbers: make forms CASES=2000
	ISOFLAT_CASES=$(CASES) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -s tests/laws/test_what_people_bring.py

test-slow: $(ENV)  ## with real MNIST and CIFAR-10 in the folder ISOFLAT_DATA (skipped, and said so, where absent)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(THREADS) --dist worksteal -m slow -rs

bench: $(PEERS_ENV)  ## beside PyHessian, curvlinops and hessian-eigenthings, on MNIST where ISOFLAT_DATA holds it
	$(PEERS)/bin/python benchmarks/peers.py --threads $(THREADS) --minutes $(MINUTES)

bench-power: $(PEERS_ENV)  ## the paper's number by its own power method until it stops by its own rule, beside ours
	$(PEERS)/bin/python benchmarks/peers.py --threads $(THREADS) --only mlp --task paper --cap 240

bench-symmetries: $(ENV)  ## what finding, proving and canonicalising cost, as a table
	$(BIN)/python benchmarks/symmetries.py

bench-gpt2: $(ENV)  ## the same for GPT-2 small (124 M weights), and one number measured on it
	$(BIN)/python benchmarks/gpt2.py

bench-products: $(ENV)  ## what a Hessian-vector product costs in gradient passes, on MNIST where ISOFLAT_DATA holds it
	$(BIN)/python benchmarks/products.py

bench-catalogue: $(ENV)  ## what ten measures cost alone and together
	$(BIN)/python benchmarks/catalogue.py --threads $(THREADS)

bench-device: $(ENV)  ## networks of the size of GPT-2 small and ResNet-50, on a GPU where there is one
	$(BIN)/python benchmarks/device.py

test-oracles: $(PEERS_ENV)  ## against curvlinops, installed in an environment of its own
	$(PEERS)/bin/python -m pytest tests/oracles -m slow -rs -s

$(ENV): pyproject.toml constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# curvlinops asks for backpack, which asks for torchvision; neither is needed for what we compare with.
$(PEERS_ENV): pyproject.toml constraints.txt benchmarks/requirements.txt
	test -d $(PEERS) || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(PEERS)/bin/python -m pip install -q --disable-pip-version-check --no-deps -r benchmarks/requirements.txt
	touch $@

catalogue: $(ENV)  ## docs/catalogue.md: every measure, and every claim of invariance attacked
	$(BIN)/isoflat measures --table --markdown > docs/catalogue.md

results-page: $(ENV)  ## docs/results/README.md, from the results beside it
	$(BIN)/python benchmarks/results_page.py

clean:
	rm -rf $(VENV) $(PEERS)
