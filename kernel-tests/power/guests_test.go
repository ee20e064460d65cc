package power

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/erofsd/erofsd/internal/daemon"
	"github.com/erofsd/erofsd/internal/testenv"
	"github.com/erofsd/erofsd/kernel-tests/guestkernel"
)

// What a guest is to do, in $POWER_GUEST: disks are those of /dev/vdc and on.
const (
	guestWork  = "work"  // on the first disk, whose writes the host logs
	guestCheck = "check" // cuts of the second disk, a log, on what the first is
)

// TestGuests cuts the power of guests, where the cache is cachefiles'. A guest works with
// a daemon on a disk that QEMU logs; another one, which gets the disk as it was before and the log,
// makes the disk of each cut itself. The test runs on the host and in the guests.
func TestGuests(t *testing.T) {
	if step := os.Getenv("POWER_GUEST"); step != "" {
		inGuest(t, step)
		return
	}
	for _, tool := range []string{"mkfs.ext4", "qemu-system-x86_64"} {
		testenv.Tool(t, tool)
	}
	testenv.Fixtures(t)
	programs := t.TempDir()
	vm, self := filepath.Join(programs, "vm"), filepath.Join(programs, "power.test")
	build(t, "build", "-o", vm, "../vm")
	build(t, "test", "-c", "-o", self, ".")
	s := newSettings(t, 2, 2, time.Second)
	for _, row := range guestkernel.Rows {
		t.Run(row, func(t *testing.T) {
			_, err := guestkernel.Find(t.Context(), row)
			if errors.Is(err, fs.ErrNotExist) {
				testenv.Need(t, "kernel-"+row, "needs the guest kernel "+row+": make kernel builds it")
			}
			if err != nil {
				t.Fatal(err)
			}
			g := &guest{vm: vm, self: self, row: row, test: "TestGuests", while: s.while}
			var sum tally
			s.logs(func(seed uint64, options string, cuts int) {
				if t.Failed() {
					return
				}
				t.Run(fmt.Sprintf("log-%d", seed), func(t *testing.T) { sum.add(g.cut(t, seed, options, cuts)) })
			})
			sum.report(t, "cachefiles on Linux "+row)
		})
	}
}

// A guest is one kernel's.
type guest struct {
	vm, self string // programs
	row      string
	test     string // that runs in it
	while    time.Duration
}

// cut makes a log and cuts it, in a guest each.
func (g *guest) cut(t *testing.T, seed uint64, options string, cuts int) (sum tally) {
	t.Helper()
	d := newLoggedDisk(workspace(t))
	makeDisk(t, d.base)
	if err := copySparse(d.disk, d.base); err != nil {
		t.Fatal(err)
	}
	t.Logf("mounted with %s", options)
	g.run(t, seed, cuts, guestWork, "-env", "POWER_OPTIONS="+options, "-disk", d.disk, "-log-writes", d.writes)
	d.verify(t)
	out := g.run(t, seed, cuts, guestCheck, "-disk", d.base, "-disk", d.writes)
	_, line, found := strings.Cut(out, tallyMark)
	if _, err := fmt.Sscan(line, &sum.cuts, &sum.sent, &sum.lost, &sum.total, &sum.present, &sum.fetched, &sum.wrong, &sum.failed); !found || err != nil {
		t.Fatalf("the guest says no counts: %v\n%s", err, out)
	}
	return sum
}

// tallyMark is before the counts of a guest, in the order of tally's fields.
const tallyMark = "tally: "

// run has a guest do a step and returns what it prints.
func (g *guest) run(t *testing.T, seed uint64, cuts int, step string, flags ...string) string {
	t.Helper()
	args := append([]string{"-kernel", g.row, "-timeout", "60m"}, flags...)
	for name, value := range map[string]any{"POWER_GUEST": step, "SEED": seed, "CUTS": cuts, "SECONDS": int(g.while / time.Second)} {
		args = append(args, "-env", fmt.Sprintf("%s=%v", name, value))
	}
	cmd := exec.CommandContext(t.Context(), g.vm, append(args, g.self, "-test.v", "-test.timeout=55m", "-test.run=^"+g.test+"$")...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Run(); err != nil {
		t.Fatalf("the guest, for %q: %v\n%s", step, err, &out)
	}
	for line := range strings.Lines(out.String()) {
		if strings.Contains(line, "cut at entry") {
			t.Log(strings.TrimSpace(line))
		}
	}
	return out.String()
}

// inGuest does a step.
func inGuest(t *testing.T, step string) {
	s := newSettings(t, 0, 0, 0)
	k := kernel{"cachefiles", daemon.Cachefiles, []string{"zstd"}}
	const first, second = "/dev/vdc", "/dev/vdd"
	switch step {
	case guestWork:
		disk := mountDevice(t, first, os.Getenv("POWER_OPTIONS"))
		work(t, disk, k, rand.New(rand.NewPCG(s.seed, 2)), s.while)
	case guestCheck:
		a := check(t, first, second, k, rand.New(rand.NewPCG(s.seed, 3)), s.cuts)
		fmt.Println(tallyMark, a.cuts, a.sent, a.lost, a.total, a.present, a.fetched, a.wrong, a.failed)
	default:
		t.Fatalf("a guest cannot %s", step)
	}
}

// build runs the go command for programs that run in a guest.
func build(t *testing.T, args ...string) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "go", args...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("go %s: %v\n%s", strings.Join(args, " "), err, out)
	}
}
