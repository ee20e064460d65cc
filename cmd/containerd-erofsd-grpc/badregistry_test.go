package main

import (
	"context"
	"errors"
	"net/http"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/erofsd/erofsd/backend/backendtest"
)

// callTime is what a caller of the snapshotter waits that knows the answer will not come.
const callTime = 2 * time.Second

// TestBadRegistry has a registry fail in each way, when a container wants the image and when it
// reads: containerd is told what failed, the container gets an error and never a wrong byte,
// other images of the same registry are read meanwhile, and when the registry has recovered
// so has the image.
func TestBadRegistry(t *testing.T) {
	t.Parallel() // it waits
	w := newBadWorld(t)
	for _, c := range []struct {
		name   string
		action backendtest.Action
		told   string // in the error at the start
		hangs  bool   // the caller leaves first
	}{
		{"401", backendtest.Status(http.StatusUnauthorized), "401", false},
		{"403", backendtest.Status(http.StatusForbidden), "403", false},
		{"404: missing blob", backendtest.Status(http.StatusNotFound), "404", false},
		{"416", backendtest.Status(http.StatusRequestedRangeNotSatisfiable), "the object has 0 bytes", false},
		{"429", backendtest.TooMany(1), "429", false},
		{"500", backendtest.Status(http.StatusInternalServerError), "500", false},
		{"503", backendtest.Status(http.StatusServiceUnavailable), "503", false},
		{"nothing is sent", backendtest.Stall(-1), "", true},
		{"slow-loris", backendtest.Drip(1, 100*time.Millisecond), "", true},
		{"gone in the middle", backendtest.Reset(1000), "", false},
		{"short body", backendtest.Short(1000), "", false},
		{"wrong bytes", backendtest.WrongBytes, "", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			top, err := w.pull(t.Context(), "bad", w.host+"/team/bad:1", fixture(t, badImage))
			if err != nil {
				t.Fatal(err)
			}
			defer w.clean(t)
			defer w.forget(t, top)
			w.faults.Add(backendtest.Path("/team/bad/"), -1, c.action)
			defer w.faults.Clear()
			w.refused(t, top, c.told, c.hangs)
			w.recovered()
			w.run(t, "container", top, func(root string) {
				w.reads(t, root, "dup/a")
				w.faults.Add(backendtest.Path("/team/bad/"), -1, c.action)
				ended := make(chan error, 1)
				go func() { ended <- w.read(t, root, "big/rand-2m") }()
				w.others(t)
				if err := <-ended; !errors.Is(err, syscall.EIO) {
					t.Errorf("a read of the bad image: %v, want EIO", err)
				}
				if last := w.lastError(t); last == "" {
					t.Error("nobody is told what failed")
				}
				w.recovered()
				w.reads(t, root, "big/rand-2m")
			})
		})
	}
}

// refused wants a container of the bad image and checks what it is told.
func (w *badWorld) refused(t *testing.T, top, told string, hangs bool) {
	t.Helper()
	ctx := t.Context()
	if hangs {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, callTime)
		defer cancel()
	}
	ended := make(chan error, 1)
	go func() {
		_, err := w.sn.Prepare(ctx, "refused", top)
		ended <- err
	}()
	w.others(t)
	err := <-ended
	switch {
	case err == nil:
		t.Fatal("a container of the bad image could be made")
	case hangs && !errdefs.IsDeadlineExceeded(err):
		t.Errorf("the caller left and is told: %v", err)
	case !hangs && !(strings.Contains(err.Error(), "/team/bad:1") && strings.Contains(err.Error(), told)):
		t.Errorf("containerd is told: %v; want the image and %q in it", err, told)
	}
	t.Log(err)
	w.gone(t, "refused")
	w.others(t)
}

// recovered ends all faults, and the connections on which requests hang.
func (w *badWorld) recovered() {
	w.faults.Clear()
	w.server.CloseClientConnections()
}

// lastError is what failed last of a blob.
func (w *badWorld) lastError(t *testing.T) (last string) {
	t.Helper()
	st, err := w.daemon.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range st.Images {
		for _, b := range m.Blobs {
			if b.LastError != "" {
				last = b.LastError
			}
		}
	}
	return last
}
