# Everything starts here and needs only make and Python >= 3.11. `make` alone lists the targets.
# Works with GNU make 3.81 (macOS) and newer.

PYTHON = python3
DATASET = planted
DATASETS = $(wildcard ../shared/data/amazon-*)
PRESET = quick
METHODS = padded unpadded recent random rastp rastp-visible map stamp sasrec
SEEDS = 3
SIDS =
ARCH = t5
PROTOCOL =
CLUSTER =
STUDY =
ONLY = 0
KEEP =
QUICK =
MINUTES = 60
OUTPUT_DIR = runs/$(shell basename "$(DATASET)")-$(PRESET)$(patsubst %,-%,$(filter-out t5,$(ARCH)) $(PROTOCOL))

# The build of torch: the CPU's, unless another index is named or was named before (.venv remembers it).
LAST_INDEX := $(shell cat .venv/torch-index 2>/dev/null)
TORCH_INDEX = $(or $(LAST_INDEX),https://download.pytorch.org/whl/cpu)
OTHER_INDEX = $(filter-out $(TORCH_INDEX),$(LAST_INDEX))

# What was given on the command line, or else the second: `make paper` has other defaults.
given = $(if $(filter command,$(origin $1)),$($1),$2)

READY = .venv/ready
BIN = .venv/bin
VARIABLES = PYTHON TORCH_INDEX DATASET DATASETS PRESET METHODS SEEDS SIDS ARCH PROTOCOL CLUSTER STUDY ONLY KEEP QUICK MINUTES OUTPUT_DIR
UNKNOWN := $(filter-out $(VARIABLES),$(foreach v,$(.VARIABLES),$(if $(filter command,$(origin $(v))),$(v))))
ifneq ($(UNKNOWN),)
$(error unknown variable: $(UNKNOWN). Valid ones are: $(VARIABLES))
endif

.PHONY: help setup lab reproduce paper study evidence test notebooks site demo-model bench bench-gpu clean FORCE
help:
	@echo "make setup      install everything into .venv; on a GPU: TORCH_INDEX=https://download.pytorch.org/whl/cu130"
	@echo "make lab        open the notebooks in JupyterLab"
	@echo "make reproduce  run the reproduction: DATASET=planted (or a name or folder) PRESET=quick (smoke, long, gpu, paper)"
	@echo "                METHODS=\"unpadded rastp\" SEEDS=3 (seeds 0, 1, 2) OUTPUT_DIR=runs/<dataset>-<preset>"
	@echo "                SIDS=a published SID file, or behaviour (text and training histories) ARCH=t5 (or qwen, decoder-only) PROTOCOL=continue (one trained model"
	@echo "                goes on with each method; scratch: each method trains from nothing, as the papers did)"
	@echo "                CLUSTER=tcp://… (a Dask scheduler, whose workers do the runs side by side; with paper, too)"
	@echo "make paper      both papers' methods on DATASETS=\"folder …\" (default: what stands in ../shared/data), SEEDS=3, PRESET=paper, ARCH=\"t5 qwen\","
	@echo "                METHODS=, SIDS= and OUTPUT_DIR= as above, and the claims page: what both papers claim, and what came out here; DATASETS= writes the page from what is there"
	@echo "make study      run one of the sweeps that the papers plot: STUDY=map (without a name: which there are) and DATASET=, PRESET=,"
	@echo "                SEEDS=, ARCH=, SIDS= as above, ONLY=2 (the first settings); KEEP=1 keeps its summary in results/studies and,"
	@echo "                where the course shows it, in sidlab/course/data"
	@echo "make evidence   do the next of the runs that results/ stands on, as many as end in MINUTES=60 (0: say how far it is)"
	@echo "make test       run all tests; the browser test needs Chromium (apt-get install chromium, or .venv/bin/playwright install chromium)"
	@echo "make notebooks  run all notebooks, small (after a change of notebooks/source: .venv/bin/python tools/build.py)"
	@echo "make site       run all notebooks and render them to build/site/, which opens from disk"
	@echo "make demo-model train the bundled demo model again"
	@echo "make bench      measure this machine: a table of targets, runs/bench/ with page and JSON; a short form: QUICK=--quick"
	@echo "make bench-gpu  the same on a CUDA device, after the tests of its kernels"
	@echo "make clean      remove .venv, build products and caches; runs/ stays"

setup: $(READY)

# Torch first and alone: with the extra index in every step, pip would ask it for each of the other packages too.
# Few retries, so that a machine which cannot reach that index goes on with what its other indexes have.
# The stamp is the last thing written, so that a broken install is tried again.
# As in binder/postBuild, JupyterLab does not ask for its news, and the kernel leaves a notebook as it was; both are settings of .venv,
# what is the user's in ~/.jupyter and ~/.ipython stays.
$(READY): pyproject.toml constraints.txt binder/ipython_kernel_config.py $(if $(OTHER_INDEX),FORCE)
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || \
	    { echo "sidlab needs Python >= 3.11; name one: make setup PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	@rm -f $@
	$(if $(OTHER_INDEX),$(BIN)/pip uninstall --yes torch)
	@echo "$(TORCH_INDEX)" > .venv/torch-index
	$(BIN)/pip install --retries 1 --timeout 15 --extra-index-url "$(TORCH_INDEX)" -c constraints.txt torch
	$(BIN)/pip install -c constraints.txt -e '.[course,research,dev]'
	$(BIN)/jupyter labextension disable --level=sys_prefix "@jupyterlab/apputils-extension:announcements"
	@mkdir -p .venv/etc/ipython && cp binder/ipython_kernel_config.py .venv/etc/ipython/
	@touch $@

lab: $(READY)
	$(BIN)/jupyter-lab --LabApp.default_url=/lab/tree/notebooks/00_start_here.ipynb

# The kernel runs in this folder, so that relative paths mean what they mean on the command line.
reproduce: $(READY)
	@mkdir -p "$(OUTPUT_DIR)"
	exec $(BIN)/papermill notebooks/reproduce.ipynb "$(OUTPUT_DIR)/reproduce.ipynb" -k python3 --cwd . \
	    --log-output --no-progress-bar -r dataset "$(DATASET)" -r preset "$(PRESET)" -r methods "$(METHODS)" \
	    -p seeds "$(SEEDS)" -r output_dir "$(OUTPUT_DIR)" -r sids "$(SIDS)" -r arch "$(ARCH)" -r protocol "$(PROTOCOL)" \
	    -r cluster "$(CLUSTER)"

paper: $(READY)
	exec $(BIN)/python -m sidlab.research.claims $(DATASETS) --preset $(call given,PRESET,paper) --seeds $(SEEDS) --arch $(ARCH) --output $(call given,OUTPUT_DIR,runs/paper) \
	    $(if $(call given,METHODS),--methods "$(METHODS)") $(if $(SIDS),--sids "$(SIDS)") $(if $(CLUSTER),--cluster "$(CLUSTER)")

# An unknown study is refused by the notebook, which lists the names.
study: $(READY)
	@mkdir -p runs/studies
	exec $(BIN)/papermill notebooks/study.ipynb "runs/studies/$(or $(STUDY),unnamed).ipynb" -k python3 --cwd . \
	    --log-output --no-progress-bar -r study "$(STUDY)" -r dataset "$(DATASET)" -r preset "$(PRESET)" -p seeds "$(SEEDS)" \
	    -r arch "$(ARCH)" -r sids "$(SIDS)" -r output_dir "$(call given,OUTPUT_DIR)" -p only "$(ONLY)" $(if $(KEEP),-p keep True) $(if $(CLUSTER),-r cluster "$(CLUSTER)")

evidence: $(READY)
	exec $(BIN)/python results/evidence.py --minutes $(MINUTES)

test: $(READY)
	$(BIN)/python -m pytest -q

notebooks: $(READY)
	$(BIN)/python tools/run.py --settings tiny

site: $(READY)
	$(BIN)/python tools/site.py

demo-model: $(READY)
	$(BIN)/python -m sidlab.course.demo

bench: $(READY)
	$(BIN)/python -m sidlab.research.bench $(QUICK) --json runs/bench/bench.json --page runs/bench/index.html

# Asks for the device first, so that a machine without one says so at once.
bench-gpu: $(READY)
	@$(BIN)/python -m sidlab.research.bench --gpu --check
	$(BIN)/python -m pytest -q tests/test_kernels.py tests/test_graphs.py
	$(BIN)/python -m sidlab.research.bench --gpu --json runs/bench-gpu/bench.json --page runs/bench-gpu/index.html

clean:
	rm -rf .venv build *.egg-info .pytest_cache .hypothesis .ruff_cache
	find sidlab tests notebooks tools -type d \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +
