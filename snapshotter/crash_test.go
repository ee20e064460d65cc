package snapshotter

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"

	"github.com/erofsd/erofsd/internal/api"
)

// An order is what the process of a snapshotter is to do.
type order struct {
	Do        string // pull, run, view, remove, cleanup, list, usage
	Key       string
	Parent    string
	Bootstrap string // file
}

// An answer is what came of it.
type answer struct {
	Err   string
	Names map[string]string // parents by snapshot
	Lower string            // where the image is mounted
	Size  int64
}

// crashRoot names the directory of the snapshotter in a process that TestCrashes kills, and
// crashSocket the daemon's socket.
const (
	crashRoot   = "EROFSD_CRASH_ROOT"
	crashSocket = "EROFSD_CRASH_SOCKET"
)

// crashChild is that process: it carries out what comes by its standard input, and answers by
// descriptor 3.
func crashChild() error {
	client := api.NewClient(os.Getenv(crashSocket))
	defer client.Close()
	s, err := New(os.Getenv(crashRoot), client, anywhere)
	if err != nil {
		return err
	}
	defer s.Close()
	out := json.NewEncoder(os.NewFile(3, "answers"))
	for in := bufio.NewScanner(os.Stdin); in.Scan(); {
		var o order
		if err := json.Unmarshal(in.Bytes(), &o); err != nil {
			return err
		}
		a, err := s.carryOut(context.Background(), o)
		if err != nil {
			a.Err = err.Error()
		}
		if err := out.Encode(a); err != nil {
			return err
		}
	}
	return nil
}

func (s *Snapshotter) carryOut(ctx context.Context, o order) (a answer, err error) {
	var m []mount.Mount
	switch o.Do {
	case "pull":
		return a, s.tryPull(ctx, o)
	case "run":
		m, err = s.Prepare(ctx, o.Key, o.Parent)
	case "view":
		m, err = s.View(ctx, o.Key, o.Parent)
	case "mounts":
		m, err = s.Mounts(ctx, o.Key)
	case "remove":
		return a, s.Remove(ctx, o.Key)
	case "cleanup":
		return a, s.Cleanup(ctx)
	case "usage":
		u, err := s.Usage(ctx, o.Key)
		return answer{Size: u.Size}, err
	case "list":
		a.Names = map[string]string{}
		return a, s.Walk(ctx, func(_ context.Context, info snapshots.Info) error {
			a.Names[info.Name] = info.Parent
			return nil
		})
	default:
		err = errors.New("unknown order")
	}
	for _, m := range m {
		for _, option := range m.Options {
			if dirs, ok := strings.CutPrefix(option, "lowerdir="); ok {
				a.Lower, _, _ = strings.Cut(dirs, ":")
			}
		}
	}
	return a, err
}

// tryPull pulls the image o.Key over the layer with data o.Parent.
func (s *Snapshotter) tryPull(ctx context.Context, o order) error {
	_, err := s.Prepare(ctx, "extract "+o.Parent, "", with(o.Parent, labelBlob, "true"))
	if !errdefs.IsAlreadyExists(err) {
		return fmt.Errorf("the layer with data: %w", err)
	}
	boot := with(o.Key, labelBootstrap, "true", labelReference, "registry.example/app")
	m, err := s.Prepare(ctx, "extract "+o.Key, o.Parent, boot)
	if err != nil {
		return err
	}
	p, err := os.ReadFile(o.Bootstrap)
	if err != nil {
		return err
	}
	file := filepath.Join(m[0].Source, "image", "image.boot")
	if err := errors.Join(os.Mkdir(filepath.Dir(file), 0o755), os.WriteFile(file, p, 0o600)); err != nil {
		return err
	}
	return s.Commit(ctx, o.Key, "extract "+o.Key, boot)
}

// served is a fake daemon behind the API. What it has no word for nobody asks.
type served struct {
	api.Service
	d  *fakeDaemon
	at func(call, image string) // called before and after each
}

func (s served) around(call, image string, do func() error) error {
	s.at("before "+call, image)
	err := do()
	s.at("after "+call, image)
	return err
}

func (s served) BindImage(ctx context.Context, r api.BindRequest) error {
	return s.around("bind", r.ID, func() error { return s.d.BindImage(ctx, r) })
}

func (s served) Mount(ctx context.Context, r api.MountRequest) (m api.Mount, err error) {
	err = s.around("mount", r.Image, func() error {
		m, err = s.d.Mount(ctx, r)
		return err
	})
	return m, err
}

func (s served) Unmount(ctx context.Context, r api.UnmountRequest) error {
	return s.around("unmount", "", func() error { return s.d.Unmount(ctx, r) })
}

func (s served) UnbindImage(ctx context.Context, r api.ImageRequest) error {
	return s.around("unbind", r.Image, func() error { return s.d.UnbindImage(ctx, r) })
}

func (s served) Remove(ctx context.Context, r api.RemoveRequest) error {
	return s.around("remove", r.Image, func() error { return s.d.Remove(ctx, r) })
}

func (s served) Usage(ctx context.Context, r api.ImageRequest) (api.Usage, error) {
	return s.d.Usage(ctx, r)
}

func (s served) Status(ctx context.Context) (api.Status, error) { return s.d.Status(ctx) }

// A child is the process of a snapshotter.
type child struct {
	cmd     *exec.Cmd
	orders  io.WriteCloser
	answers *os.File
	lines   *bufio.Reader
	once    sync.Once
}

func (m *model) start(t *testing.T) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	c := &child{cmd: exec.CommandContext(context.WithoutCancel(t.Context()), "/proc/self/exe"), answers: r, lines: bufio.NewReader(r)}
	c.cmd.Env = append(os.Environ(), crashRoot+"="+m.root, crashSocket+"="+filepath.Join(m.dir, "s"))
	c.cmd.ExtraFiles = []*os.File{w}
	c.cmd.Stderr = os.Stderr
	if c.orders, err = c.cmd.StdinPipe(); err == nil {
		err = c.cmd.Start()
	}
	if err = errors.Join(err, w.Close()); err != nil {
		t.Fatal(errors.Join(err, r.Close()))
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.child = c
}

// do has an order carried out. An error says that the process has ended.
func (c *child) do(o order) (a answer, err error) {
	text, err := json.Marshal(o)
	if err != nil {
		return a, err
	}
	if _, err := c.orders.Write(append(text, '\n')); err != nil {
		return a, err
	}
	line, err := c.lines.ReadBytes('\n')
	if err != nil {
		return a, err
	}
	return a, json.Unmarshal(line, &a)
}

// kill kills it and waits until it is dead, but not for its end.
func (c *child) kill() { _ = c.cmd.Process.Kill() } // it may be dead

// end kills it and waits for its end.
func (c *child) end() {
	c.once.Do(func() {
		c.kill()
		_ = c.cmd.Wait() // it was killed
		c.orders.Close()
		c.answers.Close()
	})
}
