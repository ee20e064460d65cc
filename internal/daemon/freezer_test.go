package daemon

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"github.com/erofsd/erofsd/backend/backendtest"
	"github.com/erofsd/erofsd/internal/kernel"
	"github.com/erofsd/erofsd/internal/testenv"
)

// A freezer is a group of the kernel's cgroup-v1 freezer.
type freezer string

func newFreezer(t testing.TB) freezer {
	t.Helper()
	testenv.Root(t)
	g := freezer("/sys/fs/cgroup/freezer/erofsd-test-" + strconv.Itoa(os.Getpid()))
	if err := os.Mkdir(string(g), 0o700); errors.Is(err, os.ErrNotExist) {
		testenv.Kernel(t, "cgroup-v1 freezer", fmt.Errorf("%w: %w", kernel.ErrNotSupported, err))
	} else if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		g.set(t, "THAWED")
		await(t, "the end of the frozen", func() bool { return os.Remove(string(g)) == nil })
	})
	return g
}

func (g freezer) set(t testing.TB, state string) {
	t.Helper()
	name := filepath.Join(string(g), "freezer.state")
	if err := os.WriteFile(name, []byte(state), 0o600); err != nil {
		t.Fatal(err)
	}
	await(t, state, func() bool {
		p, err := os.ReadFile(name)
		return err == nil && string(p) == state+"\n"
	})
}

// TestFrozenReader: a reader is frozen before it could see the answer to its read, which
// was "it is there". As long as it may go on that is true.
func TestFrozenReader(t *testing.T) {
	needFanotify(t)
	group := newFreezer(t)
	r := rand.New(rand.NewPCG(5, 6))
	other := newRandomImage(t, r, 12<<20)
	tree, data := t.TempDir(), other.data[:1<<20]
	if err := os.WriteFile(filepath.Join(tree, "data"), data, 0o644); err != nil {
		t.Fatal(err)
	}
	reg := newRegistry(t)
	image := reg.push(t, tree, "frozen:1")
	d := startDaemon(t, daemonOptions{high: 8 << 20, low: 1 << 20, grace: evictGrace / 2})
	m := d.mount(t, image)
	answer := make(chan struct{})
	reg.Add(backendtest.BlobReads, 1<<30, func(w http.ResponseWriter, r *http.Request, next http.Handler) {
		<-answer
		next.ServeHTTP(w, r)
	})

	reader := exec.Command("sh", "-c", `read go; exec dd bs=4096 count=1 status=none if="$0"`, filepath.Join(m, "data"))
	stdin, err := reader.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	var got bytes.Buffer
	reader.Stdout = &got
	if err := reader.Start(); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(string(group), "cgroup.procs"), []byte(strconv.Itoa(reader.Process.Pid)), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := stdin.Write([]byte("\n")); err != nil {
		t.Fatal(err)
	}
	waiting := func(n int64) func() bool {
		return func() bool {
			st, err := d.Status(t.Context())
			return err == nil && st.Kernel.InFlight == n
		}
	}
	await(t, "the read", waiting(1))
	group.set(t, "FROZEN")
	close(answer)
	await(t, "the answer", waiting(0))

	n := d.mount(t, other.MountRequest)
	if p, err := os.ReadFile(filepath.Join(n, "data")); err != nil || !bytes.Equal(p, other.data) {
		t.Fatalf("the other image: %v", err)
	}
	evicted := func() bool {
		st, err := d.Status(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return st.CacheEvicted > 0
	}
	time.Sleep(4 * evictGrace) // of graces that would be enough
	if evicted() {
		t.Error("data went while a reader was frozen")
	}
	group.set(t, "THAWED")
	if err := reader.Wait(); err != nil || !bytes.Equal(got.Bytes(), data[:4096]) {
		t.Errorf("the frozen reader: %v, %d bytes, zeros: %v", err, got.Len(), bytes.Equal(got.Bytes(), make([]byte, 4096)))
	}
	await(t, "eviction", evicted)
}

// TestFreezer: what the cgroup-v1 freezer has frozen is seen, and for a grace after.
func TestFreezer(t *testing.T) {
	root := t.TempDir()
	group := filepath.Join(root, "pod", "container")
	if err := os.MkdirAll(group, 0o700); err != nil {
		t.Fatal(err)
	}
	for state, want := range map[string]bool{"THAWED\n": false, "FREEZING\n": true, "FROZEN\n": true} {
		if err := os.WriteFile(filepath.Join(group, "freezer.state"), []byte(state), 0o600); err != nil {
			t.Fatal(err)
		}
		if got, err := frozenBelow(root); got != want || err != nil {
			t.Errorf("%q: frozen %v, %v", state, got, err)
		}
	}
	if got, err := frozenBelow(filepath.Join(root, "gone")); got || err != nil {
		t.Errorf("a group that is gone: %v, %v", got, err)
	}
	const cgroups = "#subsys_name\thierarchy\tnum_cgroups\tenabled\ncpu\t3\t1\t1\nfreezer\t%d\t1\t1\n"
	if hasFreezer(fmt.Sprintf(cgroups, 0)) || !hasFreezer(fmt.Sprintf(cgroups, 7)) || hasFreezer("") {
		t.Error("cannot tell whether there is a freezer")
	}
}

// TestFreezerOfKernel does the same with the kernel's, where it is mounted.
func TestFreezerOfKernel(t *testing.T) {
	group := newFreezer(t)
	var now thaw
	look := func() {
		t.Helper()
		if err := now.tick(); err != nil {
			t.Fatal(err)
		}
	}
	for range graceTicks + 1 {
		look()
	}
	if !now.over() {
		t.Skip("somebody else has frozen something")
	}
	group.set(t, "FROZEN")
	look()
	if now.over() {
		t.Error("something frozen is not seen")
	}
	group.set(t, "THAWED")
	for range graceTicks {
		look()
	}
	if now.over() {
		t.Error("it is over within the grace")
	}
	look()
	if !now.over() {
		t.Error("it is never over")
	}
}
