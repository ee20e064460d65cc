package containerd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/pkg/cio"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/oci"
	"github.com/containerd/containerd/v2/pkg/snapshotters"
	"github.com/containerd/errdefs"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/erofsd/erofsd/internal/api"
	"github.com/erofsd/erofsd/kernel-tests/services"
)

// bound is how long anything may take.
const bound = 2 * time.Minute

const snapshotterName = "erofsd"

// snapshotterProgram is its program.
const snapshotterProgram = "containerd-erofsd-grpc"

// A node is a machine with containerd, the snapshotter and the daemon.
type node struct {
	*client.Client
	w           *world
	dir         string
	containerd  *services.Process
	snapshotter *services.Process
	daemon      *api.Client
}

// nodeOptions say what a node is for.
type nodeOptions struct {
	pods     bool   // Kubernetes' way: containerd's CRI, and logins by the snapshotter's socket
	transfer bool   // the CRI pulls by containerd's transfer service
	handler  string // of the pods that use the snapshotter; "": all use it
}

// start starts a node with nothing on it, which ends with t and must then have nothing left.
func (w *world) start(t *testing.T) *node {
	t.Helper()
	return w.startNode(t, nodeOptions{})
}

func (w *world) startNode(t *testing.T, o nodeOptions) *node {
	t.Helper()
	dir, err := os.MkdirTemp(w.dir, "n-*")
	if err == nil {
		err = os.Chmod(dir, 0o711)
	}
	if err != nil {
		t.Fatal(err)
	}
	n := &node{w: w, dir: dir, daemon: api.NewClient(filepath.Join(dir, "e.sock"))}
	n.configure(t, o)
	t.Cleanup(func() { n.endDaemon(t) })
	n.snapshotter = services.SnapshotterProcess(t, filepath.Join(w.bin, snapshotterProgram),
		filepath.Join(dir, "snapshotter.toml"), filepath.Join(dir, "s.sock"))
	n.containerd = w.runtime.Start(t, filepath.Join(dir, "containerd.toml"), n.socket())
	if n.Client, err = client.New(n.socket()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { n.end(t) })
	return n
}

// socket is containerd's.
func (n *node) socket() string { return filepath.Join(n.dir, "c.sock") }

// end ends containerd and the snapshotter, in order.
func (n *node) end(t *testing.T) {
	if t.Failed() {
		n.clear(t)
	}
	if err := n.Client.Close(); err != nil {
		t.Error(err)
	}
	for _, p := range []*services.Process{n.containerd, n.snapshotter} {
		p.Stop()
		if t.Failed() {
			t.Logf("the log:\n%s", tail(p.Log()))
		}
	}
}

// endDaemon ends the daemon, which outlives the snapshotter; then nothing is mounted.
func (n *node) endDaemon(t *testing.T) {
	if err := n.stopDaemon(); err != nil {
		t.Error(err)
	}
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(n.dir))
	if err != nil || len(mounts) > 0 {
		t.Errorf("%d mounts are left: %v", len(mounts), err)
	}
	for _, m := range slices.Backward(mounts) {
		t.Logf("%s at %s: unmounted, %v", m.FSType, m.Mountpoint, unix.Unmount(m.Mountpoint, unix.MNT_DETACH))
	}
}

// clear removes the containers that are left, which nobody waits for.
func (n *node) clear(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), bound)
	defer cancel()
	for _, name := range spaces {
		ctx := namespaces.WithNamespace(ctx, name)
		list, err := n.Containers(ctx)
		if err != nil {
			t.Log(err)
		}
		for _, c := range list {
			if task, err := c.Task(ctx, nil); err == nil {
				if _, err := task.Delete(ctx, client.WithProcessKill); err != nil {
					t.Log(err)
				}
			}
			if err := c.Delete(ctx, client.WithSnapshotCleanup); err != nil {
				t.Log(err)
			}
		}
	}
}

// reconnected waits until containerd talks to the snapshotter again: its client waits up to
// some seconds before it tries a connection again.
func (n *node) reconnected(ctx context.Context, t *testing.T) {
	t.Helper()
	n.await(t, "containerd reaches the snapshotter", func() error {
		if _, err := n.SnapshotService(snapshotterName).Prepare(ctx, "probe", ""); err != nil {
			return err
		}
		return n.SnapshotService(snapshotterName).Remove(ctx, "probe")
	})
}

// pull pulls an image as nerdctl and Kubernetes do; with plain as ctr, whose labels say
// nothing of it.
func (n *node) pull(ctx context.Context, t *testing.T, reference string, plain bool) client.Image {
	t.Helper()
	image, err := n.tryPull(ctx, reference, plain)
	if err != nil {
		t.Fatalf("pull %s: %v", reference, err)
	}
	return image
}

func (n *node) tryPull(ctx context.Context, reference string, plain bool) (client.Image, error) {
	opts := []client.RemoteOpt{
		client.WithPullUnpack, client.WithPullSnapshotter(snapshotterName),
		client.WithResolver(resolver()),
	}
	if !plain {
		opts = append(opts, client.WithImageHandlerWrapper(snapshotters.AppendInfoHandlerWrapper(reference)))
	}
	return n.Pull(ctx, reference, opts...)
}

// resolver finds images in registries that speak HTTP.
func resolver() remotes.Resolver {
	return docker.NewResolver(docker.ResolverOptions{Hosts: docker.ConfigureDefaultRegistries(docker.WithPlainHTTP(docker.MatchAllHosts))})
}

// A container runs check.
type container struct {
	client.Container
	fifos  string // directory
	task   client.Task
	exit   <-chan client.ExitStatus
	input  *io.PipeWriter
	output *output
}

// run starts a container of an image; with wait it reads when finish is called.
func (n *node) run(ctx context.Context, image client.Image, id string, wait bool) (*container, error) {
	if wait {
		return n.runArgs(ctx, image, id, "wait")
	}
	return n.runArgs(ctx, image, id)
}

// runArgs starts a container of an image that runs check with arguments.
func (n *node) runArgs(ctx context.Context, image client.Image, id string, args ...string) (*container, error) {
	return n.runNew(ctx, id, client.WithNewSnapshot(id, image), oci.WithProcessArgs(append([]string{"/bin/check"}, args...)...))
}

// runNew starts a container with a snapshot.
func (n *node) runNew(ctx context.Context, id string, snapshot client.NewContainerOpts, spec ...oci.SpecOpts) (c *container, err error) {
	c = &container{fifos: n.dir, output: newOutput()}
	c.Container, err = n.NewContainer(ctx, id, client.WithSnapshotter(snapshotterName), snapshot,
		client.WithRuntime("io.containerd.runc.v2", &options.Options{Root: filepath.Join(n.dir, "runc")}),
		client.WithNewSpec(append([]oci.SpecOpts{oci.WithDefaultPathEnv}, spec...)...))
	if err != nil {
		return nil, fmt.Errorf("make container %s: %w", id, err)
	}
	stdin, input := io.Pipe()
	c.input = input
	defer func() {
		if err != nil {
			input.Close()
		}
	}()
	if c.task, err = c.NewTask(ctx, cio.NewCreator(cio.WithStreams(stdin, c.output, c.output), cio.WithFIFODir(n.dir))); err != nil {
		return nil, fmt.Errorf("make the task of %s: %w", id, err)
	}
	if c.exit, err = c.task.Wait(ctx); err == nil {
		err = c.task.Start(ctx)
	}
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", id, err)
	}
	return c, nil
}

// finish lets the container read, waits for its end, removes it and returns what it printed.
func (c *container) finish(ctx context.Context) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, bound)
	defer cancel()
	err := errors.Join(c.input.Close(), c.task.CloseIO(ctx, client.WithStdinCloser))
	select {
	case s := <-c.exit:
		if s.ExitCode() != 0 || s.Error() != nil {
			err = errors.Join(err, fmt.Errorf("container %s ended with %d", c.ID(), s.ExitCode()), s.Error())
		}
	case <-ctx.Done():
		err = errors.Join(err, ctx.Err(), c.task.Kill(context.WithoutCancel(ctx), 9))
	}
	err = errors.Join(err, allRead(ctx, c.task))
	if _, derr := c.task.Delete(ctx); derr != nil {
		err = errors.Join(err, derr)
	}
	err = errors.Join(err, c.Delete(ctx, client.WithSnapshotCleanup))
	return c.output.String(), err
}

// allRead waits until what p, which has ended, printed has been read: to delete it closes its
// pipes first, and what is in them on a busy machine is lost.
func allRead(ctx context.Context, p client.Process) error {
	read := make(chan struct{})
	go func() { // ends when p is deleted, if not before
		defer close(read)
		p.IO().Wait()
	}()
	select {
	case <-read:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("read what %s printed: %w", p.ID(), ctx.Err())
	}
}

// remove removes images, if they are there, and waits until containerd has collected what they
// had.
func (n *node) remove(ctx context.Context, t *testing.T, references ...string) {
	t.Helper()
	for _, r := range references {
		if err := n.ImageService().Delete(ctx, r, images.SynchronousDelete()); err != nil && !errdefs.IsNotFound(err) {
			t.Errorf("remove %s: %v", r, err)
		}
	}
}

// empty waits until neither snapshotter nor daemon have anything.
func (n *node) empty(ctx context.Context, t *testing.T) {
	t.Helper()
	n.await(t, "everything of the images goes", func() error {
		for _, name := range []string{"snapshots", "trash", "new"} {
			if entries, err := os.ReadDir(filepath.Join(n.dir, "snapshots", name)); err != nil || len(entries) > 0 {
				return fmt.Errorf("%d in %s, %w", len(entries), name, err)
			}
		}
		st, err := n.daemon.Status(ctx)
		if err == nil && len(st.Images)+len(st.Kept) > 0 {
			err = fmt.Errorf("the daemon has %d mounted and keeps %+v", len(st.Images), st.Kept)
		}
		if err != nil {
			return err
		}
		return cacheEmpty(filepath.Join(n.dir, "cache"))
	})
}

// cacheEmpty says what a daemon's directory has besides small files of its own.
func cacheEmpty(dir string) error {
	return filepath.WalkDir(dir, func(name string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		st, err := d.Info()
		if err == nil && st.Size() > 16<<10 {
			err = fmt.Errorf("%s is left of an image, with %d bytes", name, st.Size())
		}
		return err
	})
}

// await waits until done returns nil.
func (n *node) await(t *testing.T, what string, done func() error) {
	t.Helper()
	for end := time.Now().Add(bound); ; time.Sleep(20 * time.Millisecond) {
		err := done()
		if err == nil {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("%s: not after %v: %v", what, bound, err)
		}
	}
}

// spaces are the namespaces that tests use.
var spaces = []string{"a", "b", "default", "k8s.io"}

// in is a namespace of containerd's.
func in(t *testing.T, namespace string) context.Context {
	return namespaces.WithNamespace(t.Context(), namespace)
}

// output is what a container prints.
type output struct {
	lines chan struct{}
	mu    chan struct{} // guards b; capacity 1
	b     bytes.Buffer
}

func newOutput() *output { return &output{lines: make(chan struct{}, 100), mu: make(chan struct{}, 1)} }

// Write appends p.
func (o *output) Write(p []byte) (int, error) {
	o.mu <- struct{}{}
	defer func() { <-o.mu }()
	select {
	case o.lines <- struct{}{}:
	default: // nobody waits for so many
	}
	return o.b.Write(p)
}

// String is what was printed so far.
func (o *output) String() string {
	o.mu <- struct{}{}
	defer func() { <-o.mu }()
	return o.b.String()
}
