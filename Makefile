# SPDX-License-Identifier: MIT
.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
LAB ?= inventory/lab.py
FAULTS ?= tests/faults tests/api
GUEST_MARK ?= faults
LAB_TESTS ?= tests/lab
GUEST_FAULTS := tests/faults/test_guest.py tests/faults/test_services.py tests/faults/test_jobs.py
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help setup test test-faults test-lab test-kernel test-slow lint rehearse rehearse-full lab-up lab-down lab-status lab-shell bootstrap plan deploy verify report test-verify bench kernels molecule lock clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

$(BIN)/pyinfra: pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "gpulab needs Python 3.11 or newer, found " + sys.version.split()[0])'
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo "Python's venv module is missing. hint: apt-get install python3-venv"; exit 1; }
	@echo "Installing the Python packages of requirements.lock into $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install -qq --disable-pip-version-check --constraint requirements.lock --editable '.[dev]'
	@touch $@

setup: $(BIN)/pyinfra ## install gpulab and its tools into .venv

lint: setup ## ruff, mypy, import arrows
	ruff check .
	ruff format --check .
	mypy
	lint-imports

test: lint ## lint, types and all fast tests
	@python -m rehearsal packages
	pytest -q -n auto

test-verify: setup ## break what each check of verify reads, and print which of them saw it (on a lab: docs/verify.md)
	pytest -q tests/verify --breakages

test-faults: setup ## break the API, its tasks and its guests one at a time, and print what became of each
	@rm -f reports/faults.txt
	@pytest -q -n auto -m faults $(GUEST_FAULTS:%=--ignore %) $(FAULTS)
	$(if $(GUEST_FAULTS),@pytest -q -m '$(GUEST_MARK)' $(GUEST_FAULTS))

test-lab: setup ## break a rehearsal lab by hand, see verify fail and a deploy heal it (root)
	pytest -q -m lab $(LAB_TESTS)

test-kernel: setup ## passthrough on a real kernel under QEMU: real GRUB, initramfs, reboots and races
	@python -m rehearsal packages --kernel
	pytest -q -m kernel tests/kernel

test-slow: setup ## what takes minutes: Debian's own NVIDIA module built, Milvus measured, backed up and upgraded (root)
	pytest -q -m slow tests/slow tests/benchmarks

rehearse: setup ## the whole job on a lab in this machine (KEEP=1 leaves it up)
	@python -m rehearsal rehearse $(if $(KEEP),--keep)

rehearse-full: setup ## make rehearse, then rebuilds (one failing), a destroy with the data kept, a restore
	@python -m rehearsal rehearse --full $(if $(KEEP),--keep)

lab-up: setup ## bring the rehearsal lab up, for hand work
	@python -m rehearsal up

lab-down: setup ## end everything that the lab started
	@python -m rehearsal down

lab-status: setup ## what of the lab is running
	@python -m rehearsal status

lab-shell: setup ## a root shell on a lab host: make lab-shell HOST=pve1
	@python -m rehearsal shell $(or $(HOST),$(error say which host: make lab-shell HOST=pve1))

bootstrap: setup ## role, user and token on the nodes of LAB, once
	@python -m operations.proxmox.trust $(LAB)
	@pyinfra $(LAB) --limit nodes -y operations.proxmox.access.bootstrap name="Make role, user and API token"

plan: setup ## what a deploy of LAB would change
	@pyinfra $(LAB) deploy.py --dry

deploy: setup ## make LAB as declared
	@pyinfra $(LAB) deploy.py

verify: setup ## check every promise of LAB from outside
	@pytest verify --lab $(LAB)

report: setup ## list the verify runs kept of LAB and compare the last two (RUNS="BEFORE NOW": these)
	@python -m verify.report reports/$(basename $(notdir $(LAB))) $(RUNS)

bench: setup ## the budget table, from the runs recorded last
	@python -m rehearsal bench

kernels: setup ## compile the benchmarks' CUDA C to PTX anew, with the pinned NVRTC 12.2
	@$(BIN)/pip install -qq --disable-pip-version-check --constraint requirements.lock --editable '.[kernels]'
	@python -m verify.benchmarks.nvrtc

molecule: setup ## the thin molecule scenario, on a lab host
	cd tests && molecule test

lock: ## write requirements.lock anew from the ranges of pyproject.toml
	rm -rf build/lock && $(PYTHON) -m venv build/lock
	build/lock/bin/pip install --quiet --editable '.[dev]'
	build/lock/bin/pip freeze --exclude-editable --exclude gpulab > requirements.lock

clean: ## remove what was built here; the lab's cache stays
	rm -rf $(VENV) build reports runs .mypy_cache .ruff_cache .pytest_cache *.egg-info
