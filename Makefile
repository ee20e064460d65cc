# make demo and make test install missing Debian packages when they run as root.
GO ?= go
PREFIX ?= /usr/local
FUZZTIME ?= 1m
KERNEL ?= 6.1,6.12
ROUNDS ?= 100
MINUTES ?= 10
CUTS ?= 1000

.PHONY: build test race lint fuzz kernel bench torture soak demo install clean

build: # the binaries, static, into bin/
	CGO_ENABLED=0 $(GO) build -trimpath -o bin/ ./cmd/...

test: # every test, those for root, the kernel and guest kernels included, and the fuzz targets for 30 s each
	$(GO) run ./kernel-tests/testrun

race: # every test with the race detector; needs a C compiler
	CGO_ENABLED=1 GORACE=atexit_sleep_ms=0 $(GO) test -race ./...

lint: # import rules, vet, staticcheck, gofumpt
	$(GO) test -count=1 ./internal/lint

fuzz: # every fuzz target for FUZZTIME
	$(GO) run ./kernel-tests/testrun -tests=false -kernels "" -fuzz $(FUZZTIME)

kernel: # the kernel tests in guests with kernels of their own, which it builds once
	$(GO) run ./kernel-tests/testrun -tests=false -fuzz 0 -kernels "$(KERNEL)"

bench: build # every figure beside its reference, also as build/bench.json
	$(GO) run ./kernel-tests/bench

torture: # the long forms, see there: ROUNDS=, MINUTES=, CUTS=, KERNELS=, SEED=; ends with a line of counts
	ROUNDS=$(ROUNDS) MINUTES=$(MINUTES) CUTS=$(CUTS) kernel-tests/torture/long.sh

soak: # mounts, kills, upgrades, a lying registry and a full cache for MINUTES, then a line of counts
	bash -o pipefail -c "MINUTES=$(MINUTES) CGO_ENABLED=0 $(GO) test -tags failpoint -count=1 -timeout 0 -v -run 'TestSoak' ./kernel-tests/torture | grep -E 'SEED|---|_test.go|^FAIL|^total'"

demo: build # a Python program from a lazy image, behind a slow link
	$(GO) run ./kernel-tests/demo

install: build
	install -D -t $(DESTDIR)$(PREFIX)/bin bin/*

clean: # guest kernels, and the root file system and images of demo and bench stay in /var/cache/erofsd
	rm -rf bin build
