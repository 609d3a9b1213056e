# The front door: each target is one line that calls a script or cargo. PROFILE=quick builds faster.
.DEFAULT_GOAL := help
.PHONY: help run up down env k8s k8s-down build bundle installer image kernel parts test test-k8s test-matrix lint critest k8s-e2e bench fuzz node node-run node-down bench-kvm bench-node bench-k8s

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' Makefile

run: ## from a fresh clone to a container in its own VM; leaves a private containerd up
	@scripts/run

up: ## start the private containerd of this checkout (socket .run/containerd.sock)
	@scripts/up

down: ## end it and everything that runs in it; images stay in .run/root
	@scripts/down

env: ## settings for a shell: eval "$(make -s env)", then plain ctr and bulkhead
	@scripts/env

k8s: ## start a private Kubernetes of two nodes on this machine; prints how to reach it
	@scripts/k8s

k8s-down: ## end it and everything that runs in it
	@scripts/k8s-down

build: ## the programs and the guest's root image
	@scripts/build

bundle: ## what `bulkhead install` puts onto a node, in one folder; prints its path
	@scripts/bundle

installer: ## the image that brings bulkhead onto a cluster's nodes (docs/install.md), as an OCI archive; prints its path
	@configs/kubernetes/image/build

image: ## the guest's root image alone; prints its path
	@scripts/build image

kernel: ## the guest kernel, from Debian's source and guest-image/kernel; prints its path
	@guest-image/build-kernel

parts: ## the real clients and servers of the tests, pinned and cached; prints their paths
	@CONTAINERD_VERSIONS="2.4.2 1.7.35" tests/parts/all

test: ## every group of tests; the functional one a second time in a VM with KVM (tests/run GROUP… for some)
	@tests/run

test-k8s: ## what a user of kubectl sees, in a Kubernetes of its own
	@tests/run k8s

test-matrix: ## a pod's whole life through every containerd that is supported, by each way of making pods
	@tests/run matrix

lint: ## rustfmt, clippy, shellcheck
	@scripts/lint

critest: ## CRI's conformance suite beside runc, as a table [RUNTIME=bulkhead|bulkhead-podsandbox|runc] [BACKEND=kvm|emulation]
	@RUNTIME="$(RUNTIME)" BACKEND="$(BACKEND)" FOCUS="$(FOCUS)" tests/critest/run

k8s-e2e: ## Kubernetes' own end-to-end suite with every pod a machine, beside runc [FOCUS=…] [RUNTIME=bulkhead|bulkhead-podsandbox|runc]
	@RUNTIME="$(RUNTIME)" BACKEND="$(BACKEND)" FOCUS="$(FOCUS)" tests/e2e/run

bench: ## times and memory beside runc, as a table and JSON
	@tests/perf/run

fuzz: ## search for inputs that break a device: make fuzz [TARGET=net] [SECONDS=600 for each]
	@SECONDS_EACH=$(or $(SECONDS),600) tests/fuzz/run $(TARGET)

bench-kvm: ## what a machine on KVM costs, as counts that repeat; in a node VM
	@tests/perf/kvm

bench-node: ## times and memory of pods on KVM beside runc, as ratios; in a node VM
	@tests/perf/node

bench-k8s: ## times and memory of pods of Kubernetes beside runc, as a table and JSON
	@tests/perf/k8s

node: ## a shell in a VM whose /dev/kvm is real (emulated SVM); it stays up
	@tests/node/shell

# As it was typed: make would take the $ of a shell for its own.
export NODE_COMMAND := $(value CMD)
node-run: ## run one command there: make node-run CMD='…' (tests/node/run '…' keeps its exit status)
	@tests/node/run "$$NODE_COMMAND"

node-down: ## end that VM
	@tests/node/down
