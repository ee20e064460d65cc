package smoke

import (
	"context"
	"net/http"
	"os"
	"path/filepath"
	"testing"

	"github.com/erofsd/erofsd/cachefiles/cachefilestest"
	"github.com/erofsd/erofsd/internal/api/nydus/nydustest"
	"github.com/erofsd/erofsd/internal/daemon"
	"github.com/erofsd/erofsd/internal/logging"
)

// TestConformance runs the golden requests and answers of nydusd's API against the daemon:
// TestConformance/TRANSPORT/SEQUENCE.
func TestConformance(t *testing.T) {
	images := newImages(t)
	for _, name := range []string{daemon.Fanotify, daemon.Cachefiles} {
		r := row{name, images}
		t.Run(name, func(t *testing.T) {
			r.need(t)
			nydustest.Run(t, func(t *testing.T, s nydustest.Setup) nydustest.Target {
				if why := r.lacks(s); why != "" {
					t.Skip(why)
				}
				m := newMachine(t, r)
				return nydustest.Target{Socket: m.setUp(t, s).socket, Vars: m.variables(t)}
			})
		})
	}
	t.Run("fake-cachefiles", func(t *testing.T) {
		r := row{daemon.Cachefiles, images}
		nydustest.Run(t, func(t *testing.T, s nydustest.Setup) nydustest.Target {
			switch {
			case s.Supervisor:
				t.Skip("not here: a fake device cannot be handed over; the real one's row does")
			case s.Broken, s.Mounts:
				t.Skip("not here: the fake kernel has no directories")
			}
			if why := r.lacks(s); why != "" {
				t.Skip(why)
			}
			m := newMachine(t, r)
			return nydustest.Target{Socket: m.inProcess(t, s), Vars: m.variables(t)}
		})
	})
}

// lacks says why a row cannot make a setup, "" if it can.
func (r row) lacks(s nydustest.Setup) string {
	switch {
	case s.Name == "mount-none":
		return "does not apply: erofsd mounts by itself with every transport"
	case s.NoFscache:
		return "does not apply: erofsd has a cache with every transport, and removes blobs from it"
	case r.name == daemon.Fanotify && s.Broken:
		return "does not apply: fanotify has no cache of the kernel's"
	case r.name == daemon.Fanotify && s.Supervisor && !s.Empty:
		return "not yet: it is issue 6 that hands over a fanotify group"
	}
	return ""
}

// setUp starts a daemon in the state that s wants.
func (m *machine) setUp(t *testing.T, s nydustest.Setup) *process {
	j := m.job()
	n := &j.Options.Nydusd
	n.Upgrade = s.State != "RUNNING"
	if s.Supervisor {
		sup := newSupervisor(t, m)
		n.ID, n.Supervisor = "smoke", sup.socket
		if !s.Empty {
			m.supply(t, sup)
		}
		sup.attend(t)
	}
	p := m.start(t, j)
	p.wantState(s.State)
	if s.Broken {
		// The kernel does not let go of the directories inside.
		if err := os.Rename(m.fscache, m.fscache+".away"); err != nil {
			t.Fatal(err)
		}
	}
	return p
}

// supply gives sup the state of a daemon that ended.
func (m *machine) supply(t *testing.T, sup *supervisor) {
	t.Helper()
	old := m.job()
	old.Options.Nydusd.ID, old.Options.Nydusd.Supervisor = "old", sup.socket
	p := m.start(t, old)
	err := sup.fetch(t, func() { p.want(http.StatusNoContent, "PUT", "/api/v1/daemon/fuse/sendfd", nil) })
	if err != nil {
		t.Fatal(err)
	}
	p.stop()
}

// inProcess starts a daemon over a fake kernel and returns its socket.
func (m *machine) inProcess(t *testing.T, s nydustest.Setup) string {
	t.Helper()
	k := cachefilestest.New(t)
	log, err := logging.New(logging.Options{Level: "debug", Out: t.Output()})
	if err != nil {
		t.Fatal(err)
	}
	j := m.job()
	o := j.Options
	o.Logger, o.Nydusd.SetLevel, o.Nydusd.Upgrade = log.Logger, log.SetLevel, s.State != "RUNNING"
	if !o.Nydusd.Upgrade {
		o.Kernel = daemon.FakeKernel{Device: k.Device(), Mounter: noMounts{}}
	}
	c, err := daemon.NewControl(o, j.Socket)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- c.Run(ctx, ctx, j.Socket) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("the daemon: %v", err)
		}
		if err := log.Close(context.WithoutCancel(t.Context())); err != nil {
			t.Error(err)
		}
	})
	cl := newClient(t, j.Socket)
	await(t, "the API to answer", func() bool {
		_, _, err := cl.do("GET", "/api/v1/daemon", nil)
		return err == nil
	})
	return j.Socket
}

// variables are what the sequences name.
func (m *machine) variables(t *testing.T) map[string]string {
	t.Helper()
	one, two := m.row.images.get(t, "one", "one"), m.row.images.get(t, "two", "two")
	all, point := filepath.Join(m.dir, "blobs"), filepath.Join(m.dir, "mnt")
	for _, dir := range []string{all, point} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, i := range []*image{one, two} {
		if err := os.Link(filepath.Join(i.dir, i.blobs[0]), filepath.Join(all, i.blobs[0])); err != nil {
			t.Fatal(err)
		}
	}
	return map[string]string{
		"BOOT1": one.boot, "BOOT2": two.boot, "BLOB1": one.blobs[0], "BLOB2": two.blobs[0], "BLOBDIR": all, "MOUNT": point,
	}
}

// noMounts is a kernel in which nothing is mounted.
type noMounts struct{}

// Mount refuses.
func (noMounts) Mount(context.Context, daemon.MountSpec) error { return os.ErrPermission }

// Unmount refuses.
func (noMounts) Unmount(context.Context, string, bool) error { return os.ErrPermission }

// Mounted has nothing to list.
func (noMounts) Mounted() ([]daemon.Mounted, error) { return nil, nil }
