package daemon

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/erofsd/erofsd/internal/api"
	"github.com/erofsd/erofsd/internal/testenv"
)

// TestKilledDaemon: after kill -9 no reader ever gets zeros. What is missing is
// EIO while the guard lives, what is in memory reads on; when the image is
// unmounted the guard goes, and a new daemon serves it again.
func TestKilledDaemon(t *testing.T) {
	d := startDaemon(t, daemonOptions{})
	r := localRequest(t, "none")
	m := d.mount(t, r)
	tree, files := fixtureList(t), regularFiles(t, m)
	entry := func(f string) testenv.TreeEntry { return tree[strings.TrimPrefix(f, m+"/")] }
	// Little is read: readahead must not bring the whole image, however late the kill is.
	read := int64(0)
	for _, f := range files {
		size := entry(f).Size
		if size > 64<<10 || read+size > 256<<10 {
			continue
		}
		if _, err := readAll(f); err != nil {
			t.Fatal(err)
		}
		read += size
	}
	d.kill()
	failed := 0
	for _, f := range files {
		p, err := readAll(f)
		sum := sha256.Sum256(p)
		switch want := entry(f).SHA256; {
		case isEIO(err): // also of what was read, if the kernel has dropped its pages
			failed++
		case err != nil:
			t.Errorf("%s: %v", f, err)
		case hex.EncodeToString(sum[:]) != want:
			t.Errorf("%s: wrong bytes", f)
		}
	}
	if failed == 0 {
		t.Errorf("no read failed: nobody denied them\n%s", d.log)
	}
	if _, err := New(Options{Root: d.root}); err == nil || !strings.Contains(err.Error(), "in use") {
		t.Fatalf("a second daemon started beside a guard: %v", err)
	}
	if err := syscall.Unmount(m, 0); err != nil {
		t.Fatal(err)
	}
	await(t, "the guard to end", func() bool {
		f, err := lockRoot(d.root)
		if err == nil {
			f.Close()
		}
		return err == nil
	})
	d = startDaemon(t, daemonOptions{root: d.root})
	compareTree(t, fixtureList(t), d.mount(t, r))
}

// TestKilledWhileReading kills the daemon while a read waits for it.
func TestKilledWhileReading(t *testing.T) {
	d := startDaemon(t, daemonOptions{})
	r := localRequest(t, "none")
	m := d.mount(t, r)
	if err := d.cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	await(t, "the daemon to stop", func() bool { return stopped(t, d.cmd.Process.Pid) })
	name := filepath.Join(m, "big", "rand-2m")
	type result struct {
		p   []byte
		err error
	}
	got := make(chan result, 1)
	go func() {
		p, err := readAll(name)
		got <- result{p, err}
	}()
	time.Sleep(200 * time.Millisecond) // until it waits; when it does not yet, the test is only weaker
	d.kill()
	select {
	case res := <-got:
		if !isEIO(res.err) || len(res.p) > 0 {
			t.Errorf("got %d bytes, %v", len(res.p), res.err)
		}
	case <-time.After(patience):
		t.Error("the reader hangs")
	}
}

// stopped reports whether every thread of a process has been stopped by a signal.
func stopped(t testing.TB, pid int) bool {
	t.Helper()
	stats, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid))
	if err != nil || len(stats) == 0 {
		t.Fatalf("no threads of process %d: %v", pid, err)
	}
	for _, name := range stats {
		p, err := os.ReadFile(name)
		if _, state, ok := strings.Cut(string(p), ") "); err != nil || !ok || !strings.HasPrefix(state, "T") {
			return false
		}
	}
	return true
}

// TestDetached: an image that was unmounted while an overlay uses it is served
// until the overlay goes.
func TestDetached(t *testing.T) {
	d := startDaemon(t, daemonOptions{})
	r := localRequest(t, "zstd")
	lower := d.mount(t, r)
	merged, upper := newMountpoint(t), newRoot(t)
	up, work := filepath.Join(upper, "up"), filepath.Join(upper, "work")
	for _, dir := range []string{up, work} {
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := syscall.Mount("overlay", merged, "overlay", 0, "lowerdir="+lower+",upperdir="+up+",workdir="+work); err != nil {
		t.Fatal(err)
	}
	d.umount(t, lower)
	if s := d.image(t, ""); !s.Detached {
		t.Fatalf("not detached: %+v", s)
	}
	tree := fixtureList(t)
	root := tree["."] // the overlay shows its upper directory's
	root.Mode, root.Mtime = syscall.S_IFDIR|0o700, fileMtime(t, merged)
	tree["."] = root
	compareTree(t, tree, merged)
	if err := syscall.Unmount(merged, 0); err != nil {
		t.Fatal(err)
	}
	await(t, "the image to be closed", func() bool {
		st, err := d.Status(t.Context())
		return err == nil && len(st.Images) == 0
	})
}

// TestBusyUmount: an image in which somebody works is not unmounted, and stays served.
func TestBusyUmount(t *testing.T) {
	d := startDaemon(t, daemonOptions{})
	m := d.mount(t, localRequest(t, "zstd"))
	f, err := os.Open(filepath.Join(m, "big", "text-3m"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := d.Unmount(t.Context(), api.UnmountRequest{Mountpoint: m}); err == nil || !strings.Contains(err.Error(), "busy") {
		t.Fatalf("got %v", err)
	}
	if _, err := f.Read(make([]byte, 4096)); err != nil {
		t.Fatal(err)
	}
	f.Close()
	d.umount(t, m)
}

// TestAdopt: a complete image survives its daemon, and the next one knows it.
func TestAdopt(t *testing.T) {
	d := startDaemon(t, daemonOptions{completion: true})
	m := d.mount(t, localRequest(t, "zstd"))
	tree := fixtureList(t)
	compareTree(t, tree, m)
	await(t, "completion", func() bool { return d.image(t, m).Complete })
	d.kill()
	compareTree(t, tree, m)
	await(t, "the guard to end", func() bool {
		f, err := lockRoot(d.root)
		if err == nil {
			f.Close()
		}
		return err == nil
	})
	d = startDaemon(t, daemonOptions{root: d.root})
	if s := d.image(t, m); !s.Complete {
		t.Errorf("%+v", s)
	}
	d.umount(t, m)
}

// TestManyMounts mounts one image 200 times and many images at once.
func TestManyMounts(t *testing.T) {
	d := startDaemon(t, daemonOptions{})
	r := localRequest(t, "lz4")
	var points []string
	for range 200 {
		points = append(points, d.mount(t, r))
	}
	for _, m := range points {
		if _, err := os.Stat(filepath.Join(m, "big", "text-3m")); err != nil {
			t.Fatal(err)
		}
	}
	for _, m := range points {
		d.umount(t, m)
	}
	await(t, "the image to be closed", func() bool {
		st, err := d.Status(t.Context())
		return err == nil && len(st.Images) == 0
	})
}

func fileMtime(t testing.TB, name string) int64 {
	t.Helper()
	st, err := os.Stat(name)
	if err != nil {
		t.Fatal(err)
	}
	return st.ModTime().UnixNano()
}
