package daemon

import (
	"bytes"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"testing"
	"time"

	"github.com/erofsd/erofsd/backend/backendtest"
	"github.com/erofsd/erofsd/internal/testenv"
)

// starve has a processor busy with work that goes before everything of SCHED_IDLE, until
// the function that it returns is called.
func starve(t *testing.T, cpu string) (stop func()) {
	t.Helper()
	var hogs []*exec.Cmd
	for range 4 {
		hog := exec.Command("nice", "-n", "-20", "taskset", "-c", cpu, "sh", "-c", "while :; do :; done")
		if err := hog.Start(); err != nil {
			t.Fatal(err)
		}
		hogs = append(hogs, hog)
	}
	return func() {
		for _, hog := range hogs {
			_ = hog.Process.Kill() // a second call does nothing
			_ = hog.Wait()
		}
	}
}

// running reports whether a process of one thread is runnable.
func running(t *testing.T, pid int) bool {
	t.Helper()
	q := quiescence{proc: "/proc"}
	s, err := q.sample(task{pid, pid})
	if err != nil {
		t.Fatal(err)
	}
	return s.state == 'R'
}

// TestStarvedReader: a reader was told that its data are there, and is not run then for
// longer than graces. As long as it may go on that is true.
func TestStarvedReader(t *testing.T) {
	needFanotify(t)
	testenv.Root(t)
	if runtime.NumCPU() < 2 {
		t.Skip("one processor: the daemon would starve too")
	}
	cpu := strconv.Itoa(runtime.NumCPU() - 1)
	r := rand.New(rand.NewPCG(7, 8))
	other := newRandomImage(t, r, 12<<20)
	tree, data := t.TempDir(), other.data[:1<<20]
	if err := os.WriteFile(filepath.Join(tree, "data"), data, 0o644); err != nil {
		t.Fatal(err)
	}
	reg := newRegistry(t)
	image := reg.push(t, tree, "starved:1")
	d := startDaemon(t, daemonOptions{high: 8 << 20, low: 1 << 20, grace: evictGrace / 4})
	m := d.mount(t, image)
	answer := make(chan struct{})
	reg.Add(backendtest.BlobReads, 1<<30, func(w http.ResponseWriter, r *http.Request, next http.Handler) {
		<-answer
		next.ServeHTTP(w, r)
	})

	var got bytes.Buffer
	reader := exec.Command("chrt", "-i", "0", "taskset", "-c", cpu, "dd", "bs=4096", "count=1", "status=none", "if="+filepath.Join(m, "data"))
	reader.Stdout = &got
	if err := reader.Start(); err != nil {
		t.Fatal(err)
	}
	waiting := func(n int64) func() bool {
		return func() bool {
			st, err := d.Status(t.Context())
			return err == nil && st.Kernel.InFlight == n
		}
	}
	await(t, "the read", waiting(1))
	stop := starve(t, cpu)
	defer stop()
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
	starved := false
	for begun := time.Now(); time.Since(begun) < 4*evictGrace; time.Sleep(evictGrace / 20) {
		gone := evicted()
		if running(t, reader.Process.Pid) {
			starved = starved || time.Since(begun) > evictGrace // four graces
			if gone {
				t.Fatal("data went while a reader was on its way")
			}
		}
	}
	if !starved {
		t.Log("the reader was run: this shows nothing today")
	}
	stop()
	if err := reader.Wait(); err != nil || !bytes.Equal(got.Bytes(), data[:4096]) {
		t.Errorf("the starved reader: %v, %d bytes, zeros: %v", err, got.Len(), bytes.Equal(got.Bytes(), make([]byte, 4096)))
	}
	await(t, "eviction", evicted)
}
