package torture

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/erofsd/erofsd/internal/api"
	"github.com/erofsd/erofsd/internal/daemon"
)

// TestUpgrade replaces the worker again and again below readers and mounts.
func TestUpgrade(t *testing.T) {
	way := transport(t)
	seed := newSeed(t)
	one, two := newImage(t, seed, 120, "zstd"), newImage(t, seed+1, 20, "zstd")
	m := start(t, daemon.Options{Transport: way, FillTimeout: patience, NoCompletion: true})
	keeper := m.cmd.Process.Pid
	point := m.mount(one, "one")
	s := &score{}
	end := s.load(one, point, readersAtOnce, seed)
	n := rounds(t, 10)
	for k := range n {
		before := m.worker()
		m.retry("upgrade", func() error { return m.Upgrade(context.Background(), api.UpgradeRequest{}) })
		again := m.mount(two, fmt.Sprintf("two-%d", k)) // meets the end of one or the beginning of the other
		m.await("the successor", func() bool { return m.worker() != before })
		s.readers(two, again, 2, seed+uint64(k))(t, m)
		m.unmount(again)
	}
	end(t, m)
	m.unmount(point)
	if m.deaths() > 0 || m.cmd.Process.Pid != keeper {
		t.Errorf("%d workers died\n%s", m.deaths(), m.log.String())
	}
	m.stop()
	t.Logf("upgrades %d, %s", n, s)
}

// TestUpgradeRefused: a successor that does not start is dropped, and nobody notices.
func TestUpgradeRefused(t *testing.T) {
	way := transport(t)
	seed := newSeed(t)
	one := newImage(t, seed, 60, "zstd")
	m := start(t, daemon.Options{Transport: way, FillTimeout: patience, NoCompletion: true})
	point := m.mount(one, "one")
	s := &score{}
	end := s.load(one, point, readersAtOnce, seed)
	script := filepath.Join(m.dir, "crashes")
	if err := os.WriteFile(script, []byte("#!/bin/sh\nkill -SEGV $$\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	before := m.worker()
	for _, exe := range []string{"/bin/false", script, filepath.Join(m.dir, "none"), m.dir} {
		err := m.Upgrade(context.Background(), api.UpgradeRequest{Executable: exe})
		if e := (*api.Error)(nil); !errors.As(err, &e) || m.worker() != before {
			t.Errorf("upgrade to %s: %v", exe, err)
		}
	}
	end(t, m)
	m.unmount(point)
	m.stop()
}
