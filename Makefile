# The two commands of the README are `make demo` and `make test`; both make .venv by themselves.
PYTEST = .venv/bin/python -m pytest -q --numprocesses=2 --durations=15

.PHONY: demo demo-svg test lint docs format clean help
help: ## say what each target does
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo demo-svg: export GOMP_SPINCOUNT = 30000 # waiting threads soon sleep: spinning ones take busy cores from those that work
demo: ## train a hybrid model, generate with it, prove it against references (under 3 minutes without a GPU)
	@.ci/venv demo
	@.venv/bin/hybrid-ops demo

demo-svg: ## run the demo again and draw the README's picture from it
	@.ci/venv demo
	@.venv/bin/hybrid-ops demo --svg docs/demo.svg

test: export OMP_NUM_THREADS = 1
test: ## every test: ops, model, packaging; then the Triton kernels in Triton's interpreter
	@.ci/venv test
	$(PYTEST) tests
	TRITON_INTERPRET=1 $(PYTEST) -m interpreter tests

lint: ## ruff, mypy and clang-format, without changing anything
	@.ci/venv test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/clang-format --dry-run --Werror $(wildcard csrc/*.cpp csrc/*.cu csrc/*.cuh csrc/common/*)

docs: ## the pages of docs/ as a site, site/index.html; a broken link fails
	@.ci/venv test
	@NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict

format: ## let ruff and clang-format rewrite the sources
	@.ci/venv test
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .
	.venv/bin/clang-format -i $(wildcard csrc/*.cpp csrc/*.cu csrc/*.cuh csrc/common/*)

clean: ## remove .venv and everything that was built
	rm -rf .venv build dist site *.egg-info hybrid_ops/_cuda*.so demo.html
