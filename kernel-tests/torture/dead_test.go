package torture

import (
	"errors"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/erofsd/erofsd/internal/api"
	"github.com/erofsd/erofsd/internal/daemon"
)

// TestKilledTogether kills keeper and worker at once below readers: what is not there
// reads as EIO, nothing as zeros, and once the image is unmounted all is as new.
func TestKilledTogether(t *testing.T) {
	way := transport(t)
	seed := newSeed(t)
	one := newImage(t, seed, 120, "zstd")
	r := rand.New(rand.NewPCG(seed, 0))
	for range rounds(t, 3) {
		m := start(t, daemon.Options{Transport: way, FillTimeout: patience, NoCompletion: true})
		point := m.mount(one, "one")
		s := &score{mayFail: true}
		wait := s.start(one, point, readersAtOnce, r.Uint64())
		time.Sleep(time.Duration(r.IntN(20)) * time.Millisecond) // any moment will do
		m.killTogether()
		wait(t, m)
		if s.wrong.Load() > 0 {
			t.Errorf("%s; the first: %s", s, s.first)
		}
		if err := syscall.Unmount(point, 0); err != nil {
			t.Error(err)
		}
		m.nothingLeft()
		again := startIn(t, m.dir, daemon.Options{Transport: way, FillTimeout: patience})
		point = again.mount(one, "one")
		(&score{}).readers(one, point, 2, r.Uint64())(t, again)
		again.unmount(point)
		again.stop()
		t.Log(s)
	}
}

// killTogether stops keeper and worker, so that neither can do anything for the other, and
// kills both.
func (m *machine) killTogether() {
	m.t.Helper()
	worker := m.worker()
	for _, s := range []syscall.Signal{syscall.SIGSTOP, syscall.SIGKILL} {
		for _, pid := range []int{m.cmd.Process.Pid, worker} {
			if err := syscall.Kill(pid, s); err != nil {
				m.t.Fatal(err)
			}
		}
	}
	<-m.ended
}

// TestKeeperKilled: a worker serves on without its keeper.
func TestKeeperKilled(t *testing.T) {
	way := transport(t)
	seed := newSeed(t)
	one := newImage(t, seed, 120, "zstd")
	m := start(t, daemon.Options{Transport: way, FillTimeout: patience, NoCompletion: true})
	point := m.mount(one, "one")
	s := &score{}
	wait := s.readers(one, point, readersAtOnce, seed)
	worker := m.worker()
	if err := m.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	<-m.ended
	wait(t, m)
	two := newImage(t, seed+1, 20, "zstd")
	again := filepath.Join(m.dir, "one") // busy: it still answers
	if _, err := m.Mount(t.Context(), api.MountRequest{Mountpoint: again, Bootstrap: two.boot, BlobDir: two.blobs}); !errors.As(err, new(*api.Error)) {
		t.Errorf("mount: %v", err)
	}
	if err := m.Unmount(t.Context(), api.UnmountRequest{Mountpoint: point}); err != nil {
		t.Error(err)
	}
	if err := syscall.Kill(worker, syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	m.nothingLeft()
}

// TestNoSuccessor: where a service manager keeps what a keeper holds, and starts no other one
// when that dies, the worker serves new images too, and says in the meantime that there is
// somebody to wait for.
func TestNoSuccessor(t *testing.T) {
	way := transport(t)
	seed := newSeed(t)
	one, two := newImage(t, seed, 120, "zstd"), newImage(t, seed+1, 20, "zstd")
	manager := newServiceManager(t)
	m, _ := manager.start(scratch(t), daemon.Options{Transport: way, FillTimeout: patience, NoCompletion: true})
	s := &score{}
	point := m.mount(one, "one")
	wait := s.readers(one, point, readersAtOnce, seed)
	worker := m.worker()
	if err := m.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	<-m.ended
	wait(t, m)
	fresh := filepath.Join(m.dir, "two")
	if err := os.Mkdir(fresh, 0o755); err != nil {
		t.Fatal(err)
	}
	refused := 0
	for deadline := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
		_, err := m.Mount(t.Context(), api.MountRequest{Mountpoint: fresh, Bootstrap: two.boot, BlobDir: two.blobs})
		if err == nil {
			break
		}
		if e := (*api.Error)(nil); !errors.As(err, &e) || e.Status != http.StatusServiceUnavailable || time.Now().After(deadline) {
			t.Fatalf("mount: %v\n%s", err, m.log.String())
		}
		refused++
	}
	if refused == 0 {
		t.Error("an image was taken on while another keeper might have come, which would not have known of it")
	}
	s.readers(two, fresh, 2, seed)(t, m)
	for _, p := range []string{point, fresh} {
		if err := m.Unmount(t.Context(), api.UnmountRequest{Mountpoint: p}); err != nil {
			t.Error(err)
		}
	}
	if err := syscall.Kill(worker, syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	manager.drop()
	m.nothingLeft()
}
