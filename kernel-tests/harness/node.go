package harness

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/pkg/cio"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/oci"
	"github.com/containerd/containerd/v2/pkg/snapshotters"
)

// A Node is a machine with containerd and the snapshotter, and nothing on it.
type Node struct {
	*client.Client
	dir       string
	processes []*process
}

const nodeContainerd = `
version = 2
root = "DIR/c-root"
state = "DIR/c-state"
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.aufs"]
[grpc]
address = "DIR/c.sock"
[proxy_plugins.erofsd]
type = "snapshot"
address = "DIR/s.sock"
`

const nodeSnapshotter = `
root = "DIR/snapshots"
address = "DIR/s.sock"
[system]
address = "DIR/y.sock"
[daemon]
mode = "connect"
socket = "SOCKET"
[containerd]
address = "DIR/c.sock"
[backend]
plain_http = ["REGISTRY"]
`

// StartNode starts containerd (the first in PATH) and the snapshotter of the directory bin in the
// empty directory dir, which must have a short path. Lazy images are mounted by d, and come from
// the registry at addr.
func StartNode(ctx context.Context, bin, dir string, d *Daemon, addr string) (n *Node, err error) {
	n = &Node{dir: dir}
	defer func() {
		if err != nil {
			err = errors.Join(err, n.Stop())
		}
	}()
	replace := strings.NewReplacer("DIR", dir, "REGISTRY", addr, "SOCKET", filepath.Join(d.Root, "sock"))
	for _, p := range []struct{ program, name, text, socket string }{
		{filepath.Join(bin, "containerd-erofsd-grpc"), "snapshotter.toml", nodeSnapshotter, "s.sock"},
		{"containerd", "containerd.toml", nodeContainerd, "c.sock"},
	} {
		config := filepath.Join(dir, p.name)
		if err := os.WriteFile(config, []byte(replace.Replace(p.text)), 0o600); err != nil {
			return n, err
		}
		started, err := startProcess(ctx, filepath.Join(dir, p.socket), p.program, "--config", config)
		if err != nil {
			return n, err
		}
		n.processes = append(n.processes, started)
	}
	n.Client, err = client.New(filepath.Join(dir, "c.sock"))
	return n, err
}

// Stop ends both. It does so although the caller's context has ended.
func (n *Node) Stop() error {
	var errs []error
	if n.Client != nil {
		errs = append(errs, n.Close())
	}
	for i := len(n.processes) - 1; i >= 0; i-- {
		errs = append(errs, n.processes[i].stop())
	}
	return errors.Join(errs...)
}

// A Start is how long a container took that began with the pull of its image.
type Start struct {
	Pulled, Made, FirstLine time.Duration // from the beginning
}

// PullAndRun pulls an image by a snapshotter, runs argv in a container of it and calls first when
// that prints something. It removes both again.
func (n *Node) PullAndRun(ctx context.Context, snapshotter, reference string, first func(), argv ...string) (s Start, err error) {
	ctx = namespaces.WithNamespace(ctx, "bench")
	began := time.Now()
	image, err := n.Pull(ctx, reference,
		client.WithPullUnpack, client.WithPullSnapshotter(snapshotter),
		client.WithResolver(docker.NewResolver(docker.ResolverOptions{Hosts: docker.ConfigureDefaultRegistries(docker.WithPlainHTTP(docker.MatchAllHosts))})),
		client.WithImageHandlerWrapper(snapshotters.AppendInfoHandlerWrapper(reference)))
	if err != nil {
		return s, fmt.Errorf("pull %s by %s: %w", reference, snapshotter, err)
	}
	s.Pulled = time.Since(began)
	clean := context.WithoutCancel(ctx)
	defer func() {
		err = errors.Join(err, n.ImageService().Delete(clean, reference, images.SynchronousDelete()))
	}()
	c, err := n.NewContainer(ctx, "bench", client.WithSnapshotter(snapshotter), client.WithNewSnapshot("bench", image),
		client.WithRuntime("io.containerd.runc.v2", &options.Options{Root: filepath.Join(n.dir, "runc")}),
		client.WithNewSpec(oci.WithDefaultPathEnv, oci.WithProcessArgs(argv...)))
	if err != nil {
		return s, fmt.Errorf("make a container by %s: %w", snapshotter, err)
	}
	defer func() { err = errors.Join(err, c.Delete(clean, client.WithSnapshotCleanup)) }()
	line, said := newFirstWrite(), new(bytes.Buffer)
	task, err := c.NewTask(ctx, cio.NewCreator(cio.WithStreams(nil, line, said), cio.WithFIFODir(n.dir)))
	if err != nil {
		return s, fmt.Errorf("make the task: %w", err)
	}
	s.Made = time.Since(began)
	defer func() {
		_, deleteErr := task.Delete(clean, client.WithProcessKill)
		err = errors.Join(err, deleteErr)
	}()
	exit, err := task.Wait(ctx)
	if err == nil {
		err = task.Start(ctx)
	}
	if err != nil {
		return s, fmt.Errorf("start the task: %w", err)
	}
	select {
	case <-line.there:
		s.FirstLine = time.Since(began)
		first()
	case <-ctx.Done():
		return s, ctx.Err()
	case <-exit:
		task.IO().Wait()
		return s, fmt.Errorf("the program ended without a word: %s", said)
	}
	select {
	case status := <-exit:
		if status.ExitCode() != 0 || status.Error() != nil {
			return s, errors.Join(fmt.Errorf("the program ended with %d", status.ExitCode()), status.Error())
		}
	case <-ctx.Done():
		return s, ctx.Err()
	}
	return s, nil
}

// A firstWrite tells when something is written.
type firstWrite struct{ there chan struct{} }

func newFirstWrite() firstWrite { return firstWrite{make(chan struct{}, 1)} }

// Write throws p away.
func (w firstWrite) Write(p []byte) (int, error) {
	select {
	case w.there <- struct{}{}:
	default:
	}
	return len(p), nil
}

var _ io.Writer = firstWrite{}

// A process is a server.
type process struct {
	cmd    *exec.Cmd
	exited chan struct{}
	log    *bytes.Buffer // until exited: written by the process
}

// startProcess starts a server and returns when it takes connections at its socket.
func startProcess(ctx context.Context, socket string, argv ...string) (*process, error) {
	p := &process{cmd: exec.Command(argv[0], argv[1:]...), exited: make(chan struct{}), log: new(bytes.Buffer)}
	p.cmd.Stdout, p.cmd.Stderr = p.log, p.log
	p.cmd.WaitDelay = time.Second                           // a child of it may hold the pipe
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // Ctrl-C is for us
	if err := p.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", argv[0], err)
	}
	go func() {
		defer close(p.exited)
		p.cmd.Wait() // its log says more than its exit status
	}()
	ctx, cancel := context.WithTimeout(ctx, stopTimeout)
	defer cancel()
	for {
		c, err := new(net.Dialer).DialContext(ctx, "unix", socket)
		if err == nil {
			return p, c.Close()
		}
		select {
		case <-p.exited:
			return nil, fmt.Errorf("%s does not start:\n%s", argv[0], p.log)
		case <-ctx.Done():
			return nil, errors.Join(fmt.Errorf("%s does not answer: %w", argv[0], err), p.stop())
		case <-time.After(5 * time.Millisecond):
		}
	}
}

func (p *process) stop() error {
	p.cmd.Process.Signal(syscall.SIGTERM) // it may have ended by itself
	select {
	case <-p.exited:
		return nil
	case <-time.After(stopTimeout):
	}
	p.cmd.Process.Kill()
	<-p.exited
	return fmt.Errorf("%s did not end in %s and was killed; its log:\n%s", p.cmd.Path, stopTimeout, p.log)
}
