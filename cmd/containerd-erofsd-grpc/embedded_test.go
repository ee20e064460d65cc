package main

import (
	"bytes"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/erofsd/erofsd/backend/backendtest"
	"github.com/erofsd/erofsd/internal/erofsd"
)

// embed leaves the rig one program, which is erofsd too.
func (r *rig) embed(t *testing.T) *rig {
	t.Helper()
	if err := os.Remove(filepath.Join(r.bin, "erofsd")); err != nil {
		t.Fatal(err)
	}
	r.configure(t, `mode = "embedded"`)
	return r
}

// program is the one that is installed.
func (r *rig) program() string { return filepath.Join(r.bin, "containerd-erofsd-grpc") }

// replace installs it anew, as another version would be.
func (r *rig) replace(t *testing.T) {
	t.Helper()
	p, err := os.ReadFile(r.program())
	if err == nil {
		err = os.WriteFile(r.program()+".new", p, 0o755)
	}
	if err == nil {
		err = os.Rename(r.program()+".new", r.program())
	}
	if err != nil {
		t.Fatal(err)
	}
}

// runs reports whether a process runs what is installed.
func (r *rig) runs(t *testing.T, pid int) bool {
	t.Helper()
	installed, err := os.Stat(r.program())
	if err != nil {
		t.Fatal(err)
	}
	running, err := os.Stat(fmt.Sprintf("/proc/%d/exe", pid))
	return err == nil && os.SameFile(installed, running)
}

// runsAll waits until each of erofsd's processes is there, by its name, and runs what is
// installed. An upgrade leaves the guard alone.
func (r *rig) runsAll(t *testing.T) {
	t.Helper()
	const guard = "erofsd-guard"
	want := map[string]int{"erofsd": 2, guard: 1, "erofsd-mounter": 1} // keeper and worker, and its helpers
	eventually(t, r, "erofsd runs what is installed", func() bool {
		count := map[string]int{}
		for name, pids := range r.processes(t) {
			for _, pid := range pids {
				comm, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
				if err == nil && strings.HasPrefix(name, erofsd.Name) && name == string(bytes.TrimSpace(comm)) && (r.runs(t, pid) || name == guard) {
					count[name]++
				}
			}
		}
		return reflect.DeepEqual(count, want)
	})
}

// held has the registry hold each request for data of the bad image back until release is
// called, or for two seconds, and tells of the first.
func (w *badWorld) held() (asked <-chan struct{}, release func()) {
	first, released := make(chan struct{}, 1), make(chan struct{})
	w.faults.Add(backendtest.Path("/team/bad/"), -1, func(rw http.ResponseWriter, r *http.Request, next http.Handler) {
		select {
		case first <- struct{}{}:
		default:
		}
		select {
		case <-released:
		case <-time.After(2 * time.Second):
		case <-r.Context().Done():
		}
		next.ServeHTTP(rw, r)
	})
	return first, func() { close(released); w.faults.Clear() }
}

// during runs event below a container that reads what is not in the cache: it gets the right
// bytes.
func (w *badWorld) during(t *testing.T, event func()) {
	t.Helper()
	top, err := w.pull(t.Context(), "bad", w.host+"/team/bad:1", fixture(t, badImage))
	if err != nil {
		t.Fatal(err)
	}
	defer w.clean(t)
	defer w.forget(t, top)
	w.run(t, "container", top, func(root string) {
		asked, release := w.held()
		ended := make(chan error, 1)
		go func() { ended <- w.read(t, root, "big/rand-2m") }()
		<-asked
		event()
		release()
		if err := <-ended; err != nil {
			t.Errorf("a container that read meanwhile: %v", err)
		}
	})
}

// TestEmbedded has one program on the node, whose processes are erofsd's too: that outlives the
// snapshotter, goes on after any death, and is upgraded with it. Readers never notice.
func TestEmbedded(t *testing.T) {
	w := newBadWorldOn(t, newRig(t).embed(t))
	w.others(t)
	w.runsAll(t)
	worker, keeper := w.rig.daemon(t)
	for _, s := range []os.Signal{syscall.SIGTERM, syscall.SIGKILL} {
		w.during(t, func() {
			w.stop(t, s)
			w.start(t)
		})
		if same, _ := w.rig.daemon(t); same != worker {
			t.Errorf("erofsd was process %d and is %d after the snapshotter's end by %v", worker, same, s)
		}
	}
	w.during(t, func() { killAll(t, syscall.SIGKILL, worker) })
	worker, keeper = w.other(t, worker)
	w.during(t, func() { killAll(t, syscall.SIGKILL, keeper, worker) })
	worker, _ = w.other(t, worker)
	w.took(t, 1)
	w.runsAll(t)

	w.during(t, func() {
		w.replace(t)
		w.stop(t, syscall.SIGTERM)
		w.start(t)
		worker, _ = w.other(t, worker)
	})
	w.runsAll(t)
	if !w.runs(t, w.cmd.Process.Pid) {
		t.Error("the snapshotter is the old program")
	}

	w.during(t, func() {
		w.replace(t)
		if status, body := request(t, "unix", filepath.Join(w.dir, "run", "system.sock"), http.MethodPut, "/api/v1/daemons/upgrade", "{}"); status != http.StatusOK {
			t.Errorf("upgrade by the system API: %d %s", status, body)
		}
		worker, keeper = w.other(t, worker)
	})
	w.runsAll(t)
	w.during(t, func() { killAll(t, syscall.SIGKILL, keeper, worker) })
	worker, _ = w.other(t, worker)
	if !strings.Contains(w.log.String(), "erofsd becomes this program") || w.runs(t, worker) {
		t.Errorf("the snapshotter, which was not replaced, has not started itself; the log:\n%s", w.log.String())
	}
}
