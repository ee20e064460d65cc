package torture

import (
	"errors"
	"math/rand/v2"
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
