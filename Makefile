# make demo   environment, demo data, two models, tables and figures
# make app    a page to drop images on, with the demo's GLASS model, which is trained if there is none yet
# make test   environment, tests, ruff
# make test-all   also the slow tests

PYTHON ?= $(shell command -v python3.11 || echo python3)
BIN := .venv/bin
# pip would compile on one core. Some libraries hold files that are not for this Python.
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet --no-compile
compile = $(BIN)/python -m compileall -qq -j 0 $(1) || true
unexport PYTHONDONTWRITEBYTECODE  # else each command compiles again what it imports
PARALLEL := -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
DEMO_WEIGHTS := results/demo/glass_resnet/seed_100/model.safetensors
EXTRAS := $(filter-out requirements-app.txt,$(wildcard requirements-*.txt))

.PHONY: demo app test test-all lint gpu-test clean

demo: .venv/installed
	$(BIN)/python -m model_training.reproduce --preset demo

app: .venv/app $(DEMO_WEIGHTS)
	$(BIN)/python -m model_training.app --weights $(DEMO_WEIGHTS)

$(DEMO_WEIGHTS): | .venv/installed
	$(BIN)/python -m model_training.reproduce --preset demo --prepare
	$(BIN)/python -m model_training.glass_resnet_training --preset demo --seeds 100

test: .venv/extras lint
	$(BIN)/python -m pytest $(PARALLEL)

test-all: .venv/extras lint
	$(BIN)/python -m pytest $(PARALLEL) -m "slow or not slow"

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

gpu-test: .venv/installed
	$(BIN)/python -m pytest -m gpu

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) -r requirements.txt
	$(call compile,.venv/lib)
	touch $@

# gradio asks for an older Pillow than requirements.txt brings: what it brings itself is looked for after all else.
.venv/app: .venv/installed requirements-app.txt
	$(INSTALL) --upgrade --target .venv/after -r requirements-app.txt
	$(BIN)/python -c "import sysconfig; print('$(CURDIR)/.venv/after', file=open(sysconfig.get_path('purelib') + '/after.pth', 'w'))"
	$(call compile,.venv/after)
	touch $@

.venv/extras: .venv/installed .venv/app $(EXTRAS)
	$(INSTALL) $(addprefix -r ,$(EXTRAS))
	touch $@

clean:
	rm -rf .venv
