# The few verbs of the project. Each brings what it needs into .venv first; python3 (3.11 or later) is all that must be there.

PYTHON = .venv/bin/python
# How many tests run at once, most of which wait for servers; and more words for pytest, such as ARGS='-k restore'
WORKERS = 4
# How often the kill test destroys everything but the bucket
ROUNDS = 10
ARGS =

# Hundreds of processes load the same modules: compile each once, even where the machine's settings forbid to keep it.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL = help
.PHONY: help demo test check format kill-test soak bench bench-stream bench-scrape bench-repository drill-sample image-test lock clean bootstrap

help: ## show these words
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1:\2/p' Makefile | while IFS=: read -r verb text; do printf '%-18s %s\n' "  $$verb" "$$text"; done

demo: bootstrap ## the whole job on an embedded PostgreSQL and S3 server, in about a minute
	@.venv/bin/walship demo $(ARGS)

test: bootstrap ## every test
	$(PYTHON) -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

check: bootstrap ## format, lint, types and walls
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy
	.venv/bin/lint-imports --no-logo

format: bootstrap ## put the code into shape
	$(PYTHON) -m ruff check --fix-only .
	$(PYTHON) -m ruff format .

kill-test: bootstrap ## kill server and service at random moments and count what S3 lacks: ROUNDS=50
	@$(PYTHON) -m tests.killtest --rounds $(ROUNDS) $(ARGS)

soak: bootstrap ## restart the server 20 times, cut its connections, answer 503 for it, under load
	@$(PYTHON) -m tests.killtest.soak $(ARGS)

bench: bootstrap ## time and memory, beside pgBackRest where it is installed
	$(PYTHON) -m tests.benchmarks $(ARGS)

bench-stream: bootstrap ## what the stream costs commits, how far it lags, how fast it catches up
	$(PYTHON) -m tests.benchmarks.near_zero $(ARGS)

bench-scrape: bootstrap ## what it costs to be watched, with 30 days of WAL and 60 backups
	$(PYTHON) -m tests.benchmarks.scrape $(ARGS)

bench-repository: bootstrap ## what it costs to keep a large repository in order: 10,000 WAL objects, and up to a million
	$(PYTHON) -m tests.benchmarks.repository $(ARGS)

drill-sample: bootstrap ## write docs/drill-sample.md anew, from a real drill
	$(PYTHON) -m tests.drill_sample docs/drill-sample.md

image-test: bootstrap ## build the Dockerfile without a registry and run it: root, and Debian's buildah and mmdebstrap
	IMAGE_TEST=1 $(PYTHON) -m pytest -s tests/image $(ARGS)

lock: bootstrap ## pin the newest versions that fit together, in constraints.lock
	sh .ci/lock

clean: ## remove what the other verbs have made
	rm -rf .venv .cache .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

bootstrap:
	@sh .ci/bootstrap
