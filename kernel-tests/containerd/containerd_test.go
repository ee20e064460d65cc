package containerd

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/leases"

	"github.com/erofsd/erofsd/internal/testenv"
	"github.com/erofsd/erofsd/kernel-tests/services"
)

func TestMain(m *testing.M) { testenv.Main(m) }

// TestContainerd runs every case below Debian's containerd and below containerd 2, over one
// set of images, and those in which erofsd dies or is replaced also where it is the
// snapshotter's own program.
func TestContainerd(t *testing.T) {
	w := newWorld(t)
	t.Run("debian", func(t *testing.T) { w.all(t) })
	t.Run("embedded", func(t *testing.T) {
		one := w.embedded(t)
		for _, c := range alone {
			if c.daemon {
				t.Run(c.name, func(t *testing.T) { c.run(one, t) })
			}
		}
	})
	t.Run("two", func(t *testing.T) { w.below(services.Containerd2(t)).all(t) })
}

// all runs every case below one containerd.
func (w *world) all(t *testing.T) {
	t.Logf("containerd %s", w.runtime.Version)
	for _, c := range alone {
		t.Run(c.name, func(t *testing.T) { c.run(w, t) })
	}
	n := w.start(t)
	for _, c := range together {
		if c.two && !w.runtime.Two() {
			continue
		}
		t.Run(c.name, func(t *testing.T) {
			t.Cleanup(func() { n.clean(t) })
			c.run(n, t)
		})
	}
	t.Run("pods", func(t *testing.T) { w.pods(t, nodeOptions{}) })
	if w.runtime.Two() {
		t.Run("pods-by-handler", func(t *testing.T) { w.pods(t, nodeOptions{handler: "erofsd"}) })
		t.Run("pods-by-transfer", func(t *testing.T) { w.pods(t, nodeOptions{transfer: true}) })
	}
}

// alone are the cases that have a node for themselves, because they kill parts of it.
var alone = []struct {
	name   string
	daemon bool // it is about erofsd
	run    func(*world, *testing.T)
}{
	{"unlabelled", false, (*world).unlabelled},
	{"killed", true, (*world).killed},
	{"dead", true, (*world).dead},
	{"failover", true, (*world).failover},
	{"upgrade", true, (*world).upgrade},
	{"churn", false, (*world).churn},
}

// together are the cases that share a node and leave nothing on it.
var together = []struct {
	name string
	two  bool // containerd 2 alone has it
	run  func(*node, *testing.T)
}{
	{"life", false, (*node).wholeLife},
	{"many", false, (*node).many},
	{"sharing", false, (*node).sharing},
	{"removed", false, (*node).removed},
	{"namespaces", false, (*node).namespaces},
	{"references", false, (*node).references},
	{"race", false, (*node).race},
	{"commit", false, (*node).commit},
	{"usage", false, (*node).usageByCtr},
	{"view", false, (*node).view},
	{"ordinary", false, (*node).ordinary},
	{"deep", false, (*node).deep},
	{"mounted", true, (*node).mounted},
	{"transfer", true, (*node).transfer},
	{"ctr", true, (*node).pullByCtr},
	{"shifted", true, (*node).shifted},
}

// unlabelled pulls as clients do that tell the snapshotter nothing but what the image says:
// containerd is asked.
func (w *world) unlabelled(t *testing.T) {
	n := w.start(t)
	ctx := in(t, "default")
	n.check(ctx, t, n.pull(ctx, t, w.lazy, true), "unlabelled")
	n.remove(ctx, t, w.lazy)
	n.empty(ctx, t)
}

// killed kills snapshotter, containerd and daemon while a container runs that has read
// nothing yet, and starts them again.
func (w *world) killed(t *testing.T) {
	n := w.start(t)
	ctx := in(t, "default")
	image := n.pull(ctx, t, w.lazy, false)
	c, err := n.run(ctx, image, "survives", true)
	if err != nil {
		t.Fatal(err)
	}
	<-c.output.lines
	n.snapshotter.Kill()
	n.snapshotter.Start(t)
	n.reconnected(ctx, t)
	n.check(ctx, t, image, "after-snapshotter")
	if err := syscall.Kill(n.worker(ctx, t), syscall.SIGKILL); err != nil { // its keeper starts another
		t.Fatal(err)
	}
	n.check(ctx, t, image, "after-daemon")
	n.snapshotter.Kill()
	if got, err := c.finish(ctx); err != nil || got != "waits\n"+w.want {
		t.Errorf("the container printed %q, %v", got, err)
	}
	n.snapshotter.Start(t)
	n.containerd.Kill()
	n.containerd.Start(t)
	n.reconnected(ctx, t)
	n.killDaemon(ctx, t)
	n.check(ctx, t, image, "after-all-of-the-daemon")
	n.remove(ctx, t, w.lazy)
	n.collect(ctx, t)
	n.empty(ctx, t)
}

// dead kills the daemon with its keeper while an image is mounted of which nothing has been
// read, and nobody uses it.
func (w *world) dead(t *testing.T) {
	n := w.start(t)
	ctx := in(t, "default")
	image := n.pull(ctx, t, w.lazy, false)
	c, err := n.run(ctx, image, "reads-nothing", true)
	if err != nil {
		t.Fatal(err)
	}
	<-c.output.lines
	if _, err := c.task.Delete(ctx, client.WithProcessKill); err != nil {
		t.Error(err)
	}
	c.input.Close()
	if err := c.Delete(ctx, client.WithSnapshotCleanup); err != nil {
		t.Error(err)
	}
	worker := n.worker(ctx, t)
	n.killDaemon(ctx, t)
	n.await(t, "another daemon is started", func() error {
		if n.worker(ctx, t) == worker {
			return errors.New("it is the old one")
		}
		return nil
	})
	n.check(ctx, t, image, "after-the-daemon")
	n.remove(ctx, t, w.lazy)
	n.empty(ctx, t)
}

// churn pulls, runs and removes images while the snapshotter is killed at random moments, again
// and again; what fails is tried again, and nothing is left in the end.
func (w *world) churn(t *testing.T) {
	const rounds = 6
	n := w.start(t)
	ctx := in(t, "default")
	seed := rand.Uint64()
	if s, err := strconv.ParseUint(os.Getenv("SEED"), 10, 64); err == nil {
		seed = s
	}
	t.Logf("SEED=%d", seed)
	rnd := rand.New(rand.NewPCG(seed, 0))
	for i := range rounds {
		after := time.Duration(rnd.IntN(600)) * time.Millisecond
		reference := []string{w.lazy, w.other, w.plain}[i%3]
		ended := make(chan error, 1)
		go func() { ended <- n.life(ctx, reference, fmt.Sprint("churn-", i)) }()
		select {
		case err := <-ended:
			ended <- err
		case <-time.After(after):
		}
		n.snapshotter.Kill()
		n.snapshotter.Start(t)
		if err := <-ended; errors.Is(err, errWrong) {
			t.Errorf("round %d: %v", i, err)
		} else if err != nil {
			t.Logf("round %d, killed after %v: %v", i, after, err)
		}
		n.reconnected(ctx, t)
		n.clear(t)
		n.remove(ctx, t, reference)
	}
	if err := n.life(ctx, w.lazy, "last"); err != nil {
		t.Error(err)
	}
	n.collect(ctx, t)
	n.empty(ctx, t)
}

// life pulls an image, runs a container of it and removes both.
func (n *node) life(ctx context.Context, reference, id string) error {
	image, err := n.tryPull(ctx, reference, false)
	if err != nil {
		return fmt.Errorf("pull: %w", err)
	}
	c, err := n.run(ctx, image, id, false)
	if err != nil {
		return err
	}
	got, err := c.finish(ctx)
	switch {
	case err != nil:
		err = fmt.Errorf("it printed %q: %w", got, err)
	case got != n.w.want:
		err = fmt.Errorf("it printed %q: %w", got, errWrong)
	}
	return errors.Join(err, n.ImageService().Delete(ctx, reference, images.SynchronousDelete()))
}

// errWrong is the worst that can happen.
var errWrong = errors.New("wrong bytes")

// collect has containerd collect its garbage: it does so when something is removed.
func (n *node) collect(ctx context.Context, t *testing.T) {
	t.Helper()
	l, err := n.LeasesService().Create(ctx)
	if err == nil {
		err = n.LeasesService().Delete(ctx, l, leases.SynchronousDelete)
	}
	if err != nil {
		t.Errorf("collect garbage: %v", err)
	}
}

// worker is the daemon's process that does the work, when there is one.
func (n *node) worker(ctx context.Context, t *testing.T) (pid int) {
	t.Helper()
	n.await(t, "the daemon answers", func() error {
		v, err := n.daemon.Version(ctx)
		pid = v.PID
		return err
	})
	return pid
}

// killDaemon kills the daemon with its keeper.
func (n *node) killDaemon(ctx context.Context, t *testing.T) {
	t.Helper()
	worker := n.worker(ctx, t)
	keeper, err := parentOf(worker)
	if err != nil {
		t.Fatal(err)
	}
	for _, pid := range []int{keeper, worker} {
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) { // a new keeper was faster
			t.Fatal(err)
		}
	}
}

// stopDaemon ends the daemon with its keeper.
func (n *node) stopDaemon() error {
	defer n.daemon.Close()
	ctx, cancel := context.WithTimeout(context.Background(), bound)
	defer cancel()
	v, err := n.daemon.Version(ctx)
	if err != nil {
		return nil // there is none
	}
	keeper, err := parentOf(v.PID)
	if err != nil {
		return err
	}
	if !isErofsd(keeper) {
		keeper = v.PID // which has lost its own
	}
	if err := syscall.Kill(keeper, syscall.SIGTERM); err != nil {
		return err
	}
	for syscall.Kill(keeper, 0) == nil {
		select {
		case <-ctx.Done():
			return fmt.Errorf("erofsd (process %d) does not end", keeper)
		case <-time.After(10 * time.Millisecond):
		}
	}
	return nil
}

// parentOf is the parent of a process.
func parentOf(pid int) (parent int, err error) {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	var name string
	var state byte
	_, err = fmt.Sscanf(string(stat), "%d %s %c %d", &pid, &name, &state, &parent)
	return parent, err
}

// isErofsd reports whether a process runs erofsd.
func isErofsd(pid int) bool {
	line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	program, _, _ := strings.Cut(string(line), "\x00")
	return err == nil && filepath.Base(program) == "erofsd"
}
