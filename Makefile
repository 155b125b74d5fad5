# make demo   set-up, then a voice from recordings to a checked export (DATA=folder for your own)
# make test   set-up, then the test suite; test-serve adds a real vLLM-Omni server on the CPU,
#             test-oldest the oldest versions that pyproject.toml allows
# Nothing is assumed installed but git, make and Python 3.11 or newer with pip.

PYTHON ?= python3
DATA ?=
OUT ?= $(if $(DATA),demo-data,demo)
PYTEST ?=
MODEL ?= nano
VALIDATION ?= validation
RECORDINGS ?=
OPTIONS ?=
NANO ?= runs/nano
NANO_OPTIONS = --out $(NANO) $(if $(DATA),--data $(DATA))
ENGINES := vllm-omni==0.30.0 sglang-omni==0.1.9
# What leans most on torch and the libraries around it, in minutes.
OLDEST := decoding prefill fused generate talker attention codec_fast codec_batches adapter speaker
# Of these a new Python has no wheel as old as pyproject.toml allows: then the oldest there is.
WHEELS := numpy scipy matplotlib opencc

BIN := .venv/bin
UV := $(BIN)/uv
PY := $(BIN)/python
SERVE_PY := .venv-serve/bin/python
OLDEST_PY := .venv-oldest/bin/python

.DEFAULT_GOAL := help
.PHONY: help setup engines serve-env oldest-env demo notebooks \
  test test-serve test-oldest validate nano lint clean

help:
	@sed -n 's/^# //p' Makefile | head -4
	@echo "targets: setup engines serve-env oldest-env demo notebooks"
	@echo "         test test-serve test-oldest validate nano lint clean"

setup: .venv/.ready
engines: .engines/.ready
serve-env: .venv-serve/.ready
oldest-env: .venv-oldest/.ready

# uv, not pip: torchaudio's wheels load beside the CUDA build of torch alone, and uv fetches it in
# seconds. uv itself comes through pip, into the project's own environment.
.venv/.ready: pyproject.toml Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; name one with make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "Python's venv module is missing: apt-get install python3-venv"; exit 1; }
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check 'uv>=0.9,<1'
	$(UV) pip install --quiet --python $(PY) --editable '.[dev]'
	@touch $@

# The engines' own code, to test against: unpacked, without what they depend on.
.engines/.ready: .venv/.ready
	@for package in $(ENGINES); do \
	  folder=.engines/$$(echo $${package%%==*} | tr - _); rm -rf $$folder; \
	  $(UV) pip install --quiet --python $(PY) --no-deps --target $$folder $$package || exit 1; \
	done
	@touch $@

# A second environment: the server's CPU build pins transformers 5.14 and torch 2.13 by overrides.
.venv-serve/.ready: .venv/.ready serve/cpu/requirements.txt serve/cpu/overrides.txt \
    serve/cpu/pyproject.toml $(wildcard serve/cpu/higgs_lab_vllm_cpu/*.py) \
    serve/lora/pyproject.toml $(wildcard serve/lora/higgs_lab_vllm_lora/*.py)
	@test "$$(uname -sm)" = "Linux x86_64" || { echo "serving is supported on Linux x86-64 only"; exit 1; }
	@ldconfig -p 2>/dev/null | grep -q libnuma.so.1 || ls /usr/lib/*/libnuma.so.1 >/dev/null 2>&1 || \
	  { echo "libnuma is missing, the server's CPU kernels need it: apt-get install libnuma1"; exit 1; }
	test -x $(SERVE_PY) || $(PYTHON) -m venv .venv-serve
	$(UV) pip install --quiet --python $(SERVE_PY) --override serve/cpu/overrides.txt \
	  --reinstall-package higgs_lab_vllm_cpu --reinstall-package higgs_lab_vllm_lora \
	  --requirement serve/cpu/requirements.txt ./serve/cpu ./serve/lora
	@touch $@

# A third: everything pyproject.toml names at its lower bound. Made anew, since what is installed
# already and still allowed would stay.
.venv-oldest/.ready: .venv/.ready
	$(UV) venv --quiet --clear --python $(PY) .venv-oldest
	$(UV) pip install --quiet --python $(OLDEST_PY) --resolution lowest-direct \
	  $(WHEELS:%=--only-binary %) --editable '.[dev]'
	@touch $@

demo: setup
	$(PY) -m recipes.demo --out $(OUT) $(if $(DATA),--data $(DATA)) $(OPTIONS)

# Two processes of up to 6 GB; a file's tests share one. PYTEST="-n 4" takes more, "-n 0" none.
test: setup engines
	$(PY) -m pytest -n 2 --dist loadfile -m "not serve and not gpu" $(PYTEST)

test-serve: setup engines serve-env
	$(PY) -m pytest -m serve $(PYTEST)

# The newest versions that pyproject.toml allows are those of .venv: `make test` runs with them.
test-oldest: setup oldest-env
	@$(UV) pip freeze --quiet --python $(OLDEST_PY) | grep -E '^(torch|transformers|accelerate|peft)='
	$(OLDEST_PY) -m pytest -n 2 --dist loadfile -m "not slow and not gpu" \
	  $(OLDEST:%=tests/test_%.py) $(PYTEST)

# Rebuilds the nano family: three trainings of nine minutes on a GPU, while 16 cores make 43 hours of
# speech. NANO=folder for the logs, DATA=folder for the speech (8 GB; a RAM disk if there is one).
nano: setup
	$(PY) -m recipes.nano.build --parts codec $(NANO_OPTIONS)
	$(PY) -m recipes.nano.build --parts decoder $(NANO_OPTIONS)
	$(PY) -m recipes.nano.build --parts talker whisper ecapa $(NANO_OPTIONS)
	$(PY) -m recipes.nano.pack --trained $(NANO)/ship --out higgs_lab/nano/assets
	$(PY) -m recipes.nano.evaluate

# Executes the notebooks on the demo's output (OUT=folder), without changing them.
notebooks: setup
	HIGGS_LAB_DEMO=$(abspath $(OUT)) $(BIN)/jupyter execute notebooks/*.ipynb

# For those who have the weights: MODEL=bosonai/higgs-tts-3-4b, RECORDINGS=a manifest of one voice.
validate: setup
	$(PY) -m serve.validate --model $(MODEL) --out $(VALIDATION) \
	  $(if $(RECORDINGS),--recordings $(RECORDINGS)) $(OPTIONS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf .venv .venv-serve .venv-oldest .engines
