package containerd

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

// crowd starts containers that read when they are let.
func (n *node) crowd(ctx context.Context, t *testing.T, count int) (list []*container) {
	t.Helper()
	image := n.pull(ctx, t, n.w.lazy, false)
	for i := range count {
		list = append(list, n.waiting(ctx, t, image, fmt.Sprint("waits-", i)))
	}
	return list
}

// reading lets containers read; the function that it returns waits until they have, and
// looks at what they read.
func (n *node) reading(ctx context.Context, t *testing.T, list []*container) (wait func()) {
	var all sync.WaitGroup
	for _, c := range list {
		all.Go(func() { n.finished(ctx, t, c) })
	}
	return all.Wait
}

// failover kills keeper and worker at once, below containers that have read nothing and
// below others that read: nobody notices.
func (w *world) failover(t *testing.T) {
	n := w.start(t)
	ctx := in(t, "default")
	list := n.crowd(ctx, t, 6)
	n.killDaemon(ctx, t)
	wait := n.reading(ctx, t, list[:3])
	n.killDaemon(ctx, t)
	wait()
	n.killDaemon(ctx, t)
	n.reading(ctx, t, list[3:])()
	if log := n.snapshotter.Log(); !strings.Contains(log, "took over the images of a daemon that died") {
		t.Error("no daemon went on with what another one held")
	}
	n.remove(ctx, t, w.lazy)
	n.empty(ctx, t)
}

// upgrade replaces the daemon again and again by the system API, and restarts the
// snapshotter, below containers that read.
func (w *world) upgrade(t *testing.T) {
	n := w.start(t)
	ctx := in(t, "default")
	list := n.crowd(ctx, t, 6)
	worker := n.worker(ctx, t)
	for i := 0; i < len(list); i += 2 {
		wait := n.reading(ctx, t, list[i:i+2])
		n.upgradeDaemon(ctx, t)
		if i == 2 {
			n.snapshotter.Stop()
			n.snapshotter.Start(t)
			n.reconnected(ctx, t)
		}
		wait()
	}
	if n.worker(ctx, t) == worker {
		t.Error("the worker is the old one")
	}
	n.remove(ctx, t, w.lazy)
	n.empty(ctx, t)
}

// upgradeDaemon asks for what is installed, again while another upgrade is under way.
func (n *node) upgradeDaemon(ctx context.Context, t *testing.T) {
	t.Helper()
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", filepath.Join(n.dir, "y.sock"))
	}}
	defer transport.CloseIdleConnections()
	n.await(t, "an upgrade", func() error {
		r, err := http.NewRequestWithContext(ctx, http.MethodPut, "http://system/api/v1/daemons/upgrade", strings.NewReader("{}"))
		if err != nil {
			return err
		}
		answer, err := transport.RoundTrip(r)
		if err != nil {
			return err
		}
		if answer.Body.Close(); answer.StatusCode != http.StatusOK {
			return errors.New(answer.Status)
		}
		return nil
	})
}
