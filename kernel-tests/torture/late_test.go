package torture

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/erofsd/erofsd/internal/api"
	"github.com/erofsd/erofsd/internal/daemon"
)

// TestLateMount: a worker is killed while the process that mounts for it is at work, and
// that goes on after the next worker has come. What it mounts reads right, or is not there.
func TestLateMount(t *testing.T) {
	if transport(t) != daemon.Fanotify {
		t.Skip("cachefiles' files are known to the kernel by name, whoever mounts: it fails closed")
	}
	seed := newSeed(t)
	one := newImage(t, seed, 60, "zstd")
	for n := range rounds(t, 3) {
		m := start(t, daemon.Options{Transport: daemon.Fanotify, FillTimeout: patience, NoCompletion: true})
		helper, mounter := m.stopHelper(one, "one")
		m.kill(syscall.SIGKILL)
		time.Sleep(300 * time.Millisecond) // for the next worker to do what it should not
		for _, pid := range []int{helper, mounter} {
			if err := syscall.Kill(pid, syscall.SIGCONT); err != nil {
				t.Fatal(err)
			}
			for deadline := time.Now().Add(patience); !isDead(pid); time.Sleep(time.Millisecond) {
				if time.Now().After(deadline) {
					t.Fatal("a process that mounts does not end")
				}
			}
		}
		for range 2 {
			point := m.mount(one, "one")
			(&score{}).readers(one, point, 2, seed+uint64(n))(t, m)
			m.unmount(point)
		}
		m.stop()
	}
}

// stopHelper asks for an image to be mounted, and stops the process that is about to do so,
// and the one that started it.
func (m *machine) stopHelper(i *image, name string) (helper, mounter int) {
	m.t.Helper()
	point := filepath.Join(m.dir, name)
	if err := os.MkdirAll(point, 0o755); err != nil {
		m.t.Fatal(err)
	}
	mounter = childCalled(m.worker(), "erofsd-mounter")
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); {
		ctx, cancel := context.WithCancel(m.t.Context())
		m.t.Cleanup(cancel)
		ended := make(chan error, 1)
		go func() {
			_, err := m.Mount(ctx, api.MountRequest{Mountpoint: point, Bootstrap: i.boot, BlobDir: i.blobs})
			ended <- err
		}()
		for len(ended) == 0 {
			helper = childCalled(mounter, "erofsd-mount")
			if helper == 0 {
				continue
			}
			err := errors.Join(syscall.Kill(helper, syscall.SIGSTOP), syscall.Kill(mounter, syscall.SIGSTOP))
			if err == nil && !mounted(point) && !isDead(helper) {
				return helper, mounter
			}
			_ = errors.Join(syscall.Kill(helper, syscall.SIGCONT), syscall.Kill(mounter, syscall.SIGCONT)) // it was too fast
			break
		}
		if err := <-ended; err != nil {
			m.t.Fatal(err)
		}
		m.unmount(point)
	}
	m.t.Fatal("the process that mounts is always too fast")
	return 0, 0
}

// childCalled returns a child of a process by its first argument, 0 if there is none.
func childCalled(parent int, name string) int {
	lists, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", parent))
	for _, list := range lists {
		text, _ := os.ReadFile(list)
		for child := range strings.FieldsSeq(string(text)) {
			line, _ := os.ReadFile(filepath.Join("/proc", child, "cmdline"))
			if called, _, _ := strings.Cut(string(line), "\x00"); called == name {
				pid, _ := strconv.Atoi(child)
				return pid
			}
		}
	}
	return 0
}

// isDead reports whether a process has ended, also when nobody has waited for it.
func isDead(pid int) bool {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	_, state, _ := strings.Cut(string(text), ") ") // no name of ours has a bracket
	return err != nil || strings.HasPrefix(state, "Z") || strings.HasPrefix(state, "X")
}
