// Command testrun is make test: it installs the Debian packages that tests use,
// runs every test, the packages full of concurrency once more with the race
// detector, the kernel tests in guests with kernels of their own, and every fuzz
// target for a while. It prints a line for each package,
// the whole output of what failed, and at the end how many tests passed and what was
// skipped and why.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/erofsd/erofsd/kernel-tests/debian"
	"github.com/erofsd/erofsd/kernel-tests/guestkernel"
)

// racy are the packages whose tests are worth another run with the race detector.
var racy = []string{"./backend/...", "./blobmgr/...", "./cachefiles/...", "./fanotify/...", "./convert/...", "./internal/api/...", "./internal/daemon/...", "./internal/keeper", "./internal/logging/...", "./snapshotter", "./kernel-tests/link"}

// asReleased builds without cgo: with it the daemon has no sandbox.
var asReleased = []string{"CGO_ENABLED=0"}

func main() {
	fuzzTime := flag.Duration("fuzz", 30*time.Second, "`time` for every fuzz target; 0: none")
	tests := flag.Bool("tests", true, "run the tests, and the concurrent packages with the race detector, too")
	kernels := flag.String("kernels", strings.Join(guestkernel.Rows, ","), "`rows` of the guest kernels to test with; without -tests one that cannot be built is a failure")
	packages := flag.String("packages", "./...", "`pattern` of the packages to test")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	rows := strings.FieldsFunc(*kernels, func(r rune) bool { return r == ',' || r == ' ' })
	if err := run(ctx, *packages, rows, *tests, *fuzzTime); err != nil {
		fmt.Fprintln(os.Stderr, "testrun:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, packages string, rows []string, tests bool, fuzzTime time.Duration) (err error) {
	ctx, stop := context.WithCancel(ctx)
	s := newSummary(os.Stdout)
	err = debian.Ensure(ctx, s.note, debian.MkfsErofs, debian.FsckErofs, debian.MkfsExt4, debian.Tar, debian.Zstd, debian.Cpio, debian.Mmdebstrap,
		debian.DockerRegistry, debian.Squid, debian.Sgdisk, debian.Systemd, debian.QemuDisks, debian.Containerd, debian.Runc)
	if err != nil {
		s.note(err.Error() + "; tests that need them are skipped")
	}
	g := buildGuests(ctx, rows, s.note)
	defer func() {
		stop()
		err = errors.Join(err, g.remove())
	}()
	if tests {
		if err := s.goTest(ctx, asReleased, "-timeout", "20m", "-skip", bootTests+"|"+killTests, packages); err != nil {
			return err
		}
		if err := s.race(ctx); err != nil {
			return err
		}
		s.note("killed at named places:")
		if err := s.goTest(ctx, asReleased, "-count=1", "-tags", "failpoint", "-timeout", "15m", "-run", killTests, "./kernel-tests/torture"); err != nil {
			return err
		}
		// It builds what it kills with that tag itself.
		if err := s.goTest(ctx, asReleased, "-count=1", "-timeout", "30m", "-run", killTests, "./kernel-tests/containerd"); err != nil {
			return err
		}
	}
	if err := s.guests(ctx, g, !tests); err != nil {
		return err
	}
	if fuzzTime > 0 {
		if err := s.fuzz(ctx, packages, fuzzTime); err != nil {
			return err
		}
	}
	s.print()
	if s.failed > 0 {
		return fmt.Errorf("%d failed", s.failed)
	}
	return ctx.Err()
}

// race runs the concurrent packages with the race detector. It needs a C compiler,
// which a machine with only Go has not.
func (s *summary) race(ctx context.Context) error {
	if _, err := exec.LookPath("gcc"); err != nil {
		s.skip("the race detector: needs gcc")
		return nil
	}
	s.note("with the race detector:")
	// A process with the race detector waits a second before it ends, and those that
	// the daemon starts do so whatever GORACE says: hundreds of them are left out.
	return s.goTest(ctx, []string{"CGO_ENABLED=1", "GORACE=atexit_sleep_ms=0"}, append([]string{"-race", "-short", "-skip", "^TestManyMounts$", "-timeout", "20m"}, racy...)...)
}

// fuzz runs every fuzz target by itself: go test takes only one at a time.
func (s *summary) fuzz(ctx context.Context, packages string, each time.Duration) error {
	out, err := exec.CommandContext(ctx, "go", "test", "-list", "^Fuzz", packages).Output()
	if err != nil {
		s.note("no fuzzing: the packages do not build")
		return nil // the failure has been counted where they were tested
	}
	s.note(fmt.Sprintf("fuzzing, %s each:", each))
	defer func() { s.label = "" }()
	var targets []string
	for line := range strings.Lines(string(out)) {
		fields := strings.Fields(line)
		if strings.HasPrefix(line, "Fuzz") {
			targets = append(targets, fields[0])
			continue
		}
		if len(fields) < 2 || fields[0] != "ok" { // "ok  PACKAGE  0.01s" ends the list of a package
			continue
		}
		for _, target := range targets {
			s.label = " " + target
			if err := s.goTest(ctx, asReleased, "-run", "^$", "-fuzz", "^"+target+"$", "-fuzztime", each.String(), fields[1]); err != nil {
				return err
			}
		}
		targets = nil
	}
	return nil
}
