package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/erofsd/erofsd/kernel-tests/debian"
	"github.com/erofsd/erofsd/kernel-tests/guestkernel"
)

// guestTests are the tests that run in a guest with every kernel: those of a package
// whose name matches the pattern.
var guestTests = []struct{ folder, run string }{ // every one with the build tag failpoint
	{"./internal/kernel", "."},
	{"./cachefiles", "^TestKernel"},
	{"./internal/erofsd", "^TestSingletonRefused$"},
	{"./internal/daemon", "^(TestHandover|TestRemove|TestCacheLimit|TestBind|TestBindAnother|TestPrefetch)$"},
	{"./kernel-tests/scenario", "^(TestScenarios|TestBesideNydusd)$/^(cachefiles|erofsd|nydusd)$"},
	{"./kernel-tests/smoke", "^(TestSmoke|TestConformance)$/^cachefiles$"},
	{"./kernel-tests/torture", "^(TestKillMatrix|TestKilledTogether|TestKeeperKilled|TestNoSuccessor|TestSignals|TestOutOfMemory|TestUpgrade|TestLostTable)$"},
}

// killTests kill at named places: programs that have the build tag failpoint.
const killTests = "^TestKillMatrix$"

// bootTests are those that boot guests themselves, which they can once the kernels have
// been built, and bootFolders the packages that have them.
const bootTests = "^(TestBootsGuests|TestGuests)$"

var bootFolders = []string{"./kernel-tests/vm", "./kernel-tests/power", "./kernel-tests/systemd", "./kernel-tests/containerd"}

// guests are the kernels that are being made while other tests run.
type guests struct {
	rows   []string
	vm     string           // the program that runs tests in a guest
	err    error            // why there is none
	failed map[string]error // by row
	work   sync.WaitGroup   // the fields above are final when it has ended
}

// buildGuests starts to make what tests in guests need. remove must be called.
func buildGuests(ctx context.Context, rows []string, progress func(string)) *guests {
	g := &guests{rows: rows, failed: make(map[string]error)}
	g.work.Go(func() {
		if len(rows) == 0 {
			return
		}
		if g.vm, g.err = buildVM(ctx, progress); g.err != nil {
			return
		}
		for _, row := range rows {
			_, g.failed[row] = guestkernel.Build(ctx, row, progress)
		}
	})
	return g
}

// buildVM returns the path of kernel-tests/vm in a folder of its own.
func buildVM(ctx context.Context, progress func(string)) (string, error) {
	if err := debian.Ensure(ctx, progress, debian.Qemu, debian.MkfsExt4); err != nil {
		return "", err
	}
	dir, err := os.MkdirTemp("", "erofsd-testrun-*")
	if err != nil {
		return "", err
	}
	vm := filepath.Join(dir, "vm")
	cmd := exec.CommandContext(ctx, "go", "build", "-o", vm, "./kernel-tests/vm")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", errors.Join(fmt.Errorf("build kernel-tests/vm: %w\n%s", err, out), os.RemoveAll(dir))
	}
	return vm, nil
}

// remove waits for the work under way and removes what it left outside of the cache.
func (g *guests) remove() error {
	g.work.Wait()
	if g.vm == "" {
		return nil
	}
	return os.RemoveAll(filepath.Dir(g.vm))
}

// guests runs the kernel tests with every kernel. One that this machine has not got
// the means to make is skipped, unless it is required or TEST_MUST_RUN lists it as kernel-ROW.
func (s *summary) guests(ctx context.Context, g *guests, required bool) error {
	g.work.Wait()
	built := 0
	for _, row := range g.rows {
		switch err := cmp.Or(g.err, g.failed[row]); {
		case ctx.Err() != nil:
			return ctx.Err()
		case err == nil:
			built++
			if err := s.guest(ctx, g.vm, row); err != nil {
				return err
			}
		case lacking(err) && !required && !mustRun("kernel-"+row):
			reason, _, _ := strings.Cut(err.Error(), "\n")
			s.skip(fmt.Sprintf("kernel %s: %s", row, reason))
		default:
			s.failed++
			s.note(fmt.Sprintf("FAIL  kernel %s: %v", row, err))
		}
	}
	if built == 0 {
		return nil
	}
	s.note("booting guests:")
	// One package after the other: each guest has as many processors as a small machine.
	return s.goTest(ctx, asReleased, append([]string{"-count=1", "-p=1", "-timeout=15m", "-run", bootTests}, bootFolders...)...)
}

// guest runs the kernel tests in guests with the row's kernel, one after the other:
// each has as many processors as a small machine.
func (s *summary) guest(ctx context.Context, vm, row string) error {
	s.note("in guests with Linux " + row + ":")
	for _, t := range guestTests {
		before := s.passed + s.failed + s.skipped
		// Go's own timeout comes first: it knows which test was running.
		err := s.goTest(ctx, []string{"CGO_ENABLED=0"}, "-count=1", "-tags", "failpoint", "-timeout", "10m",
			"-exec", vm+" -timeout 10m30s -kernel "+row, "-run", t.run, t.folder)
		if err != nil {
			return err
		}
		if s.passed+s.failed+s.skipped == before {
			s.failed++
			s.note(fmt.Sprintf("FAIL  %s has no test %s, and was to be tested with Linux %s", t.folder, t.run, row))
		}
	}
	return nil
}

// lacking reports whether err is about the machine, and not about what is built.
func lacking(err error) bool {
	return errors.Is(err, debian.ErrMissing) || errors.Is(err, errors.ErrUnsupported)
}

// mustRun reports whether TEST_MUST_RUN lists the gate, as internal/testenv does.
func mustRun(gate string) bool {
	list := strings.Split(os.Getenv("TEST_MUST_RUN"), ",")
	return slices.Contains(list, gate) || slices.Contains(list, "all")
}
