package daemon

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/erofsd/erofsd/internal/api"
	"github.com/erofsd/erofsd/internal/testenv"
)

// localRequest is a fixture's image with blobs that the test may change.
func localRequest(t testing.TB, name string) api.MountRequest {
	t.Helper()
	dir := filepath.Join(testenv.Fixtures(t), name)
	return api.MountRequest{Bootstrap: filepath.Join(dir, "image.boot"), BlobDir: copyBlobs(t, dir)}
}

// onlyBlob returns the path of the one blob of r.
func onlyBlob(t testing.TB, r api.MountRequest) string {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(r.BlobDir, "*"))
	if err != nil || len(names) != 1 {
		t.Fatalf("want one blob in %s, got %v, %v", r.BlobDir, names, err)
	}
	return names[0]
}

// regularFiles lists the regular files below dir.
func regularFiles(t testing.TB, dir string) []string {
	t.Helper()
	var names []string
	err := filepath.WalkDir(dir, func(p string, e fs.DirEntry, err error) error {
		if err == nil && e.Type().IsRegular() {
			names = append(names, p)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return names
}

// TestParallelReaders has 64 readers of a cold image; each chunk is fetched once.
func TestParallelReaders(t *testing.T) {
	d := startDaemon(t, daemonOptions{})
	r := localRequest(t, "zstd")
	m := d.mount(t, r)
	tree := fixtureList(t)
	files := regularFiles(t, m)
	var wg sync.WaitGroup
	errs := make([]error, 64)
	for i := range errs {
		wg.Go(func() {
			for k := range files {
				if _, err := os.ReadFile(files[(k+i*len(files)/len(errs))%len(files)]); err != nil {
					errs[i] = err
					return
				}
			}
		})
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		t.Fatalf("%v\n%s", err, d.log)
	}
	compareTree(t, tree, m)
	st, err := os.Stat(onlyBlob(t, r))
	if err != nil {
		t.Fatal(err)
	}
	if s := d.image(t, m); s.BytesFetched > st.Size() {
		t.Errorf("fetched %d bytes of a blob of %d: a chunk was fetched twice", s.BytesFetched, st.Size())
	}
}

// TestColdMmapAndExec reads by page fault and by execve.
func TestColdMmapAndExec(t *testing.T) {
	tree := t.TempDir()
	program, err := os.ReadFile("/bin/true")
	if err != nil {
		t.Fatal(err)
	}
	data := bytes.Repeat([]byte("page fault\n"), 100_000)
	if err := errors.Join(os.WriteFile(filepath.Join(tree, "true"), program, 0o755), os.WriteFile(filepath.Join(tree, "data"), data, 0o644)); err != nil {
		t.Fatal(err)
	}
	d := startDaemon(t, daemonOptions{})
	m := d.mount(t, converted(t, tree))
	if out, err := exec.Command(filepath.Join(m, "true")).CombinedOutput(); err != nil {
		t.Fatalf("execve: %v: %s\n%s", err, out, d.log)
	}
	f, err := os.Open(filepath.Join(m, "data"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	p, err := syscall.Mmap(int(f.Fd()), 0, len(data), syscall.PROT_READ, syscall.MAP_PRIVATE)
	if err != nil {
		t.Fatal(err)
	}
	same := bytes.Equal(p, data)
	if err := syscall.Munmap(p); err != nil {
		t.Fatal(err)
	}
	if !same {
		t.Error("wrong bytes by page fault")
	}
}

// TestWrongBytes: what the backend garbles never reaches a reader, and the next
// read succeeds when the backend is right again.
func TestWrongBytes(t *testing.T) {
	for _, name := range []string{"zstd", "none", "batch"} {
		t.Run(name, func(t *testing.T) {
			d := startDaemon(t, daemonOptions{})
			r := localRequest(t, name)
			blob := onlyBlob(t, r)
			right, err := os.ReadFile(blob)
			if err != nil {
				t.Fatal(err)
			}
			m := d.mount(t, r) // the metadata are read now; garble only after that
			wrong := bytes.Clone(right)
			for i := range wrong {
				wrong[i] ^= 0x55
			}
			overwrite(t, blob, wrong)
			files, failed := regularFiles(t, m), 0
			for _, f := range files {
				p, err := readAll(f)
				if len(p) > 0 {
					t.Fatalf("%s: %d bytes of a garbled blob reached the reader", f, len(p))
				}
				if isEIO(err) {
					failed++
				} else if err != nil {
					t.Fatal(err)
				}
			}
			if s := d.image(t, m); failed == 0 || s.CorruptChunks == 0 || s.Blobs[0].LastError == "" {
				t.Fatalf("%d reads failed, status %+v", failed, s)
			}
			overwrite(t, blob, right)
			compareTree(t, fixtureList(t), m)
		})
	}
}

// overwrite changes a file's bytes in place, as a blob that is already open sees it.
func overwrite(t testing.TB, name string, p []byte) {
	t.Helper()
	if err := os.Chmod(name, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(name, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.WriteAt(p, 0)
	if err := errors.Join(err, f.Close()); err != nil {
		t.Fatal(err)
	}
}

// TestBadBlobs: an image whose blob is not what the bootstrap says is refused
// with one error, and another image is served on.
func TestBadBlobs(t *testing.T) {
	d := startDaemon(t, daemonOptions{})
	tree := fixtureList(t)
	good := d.mount(t, localRequest(t, "lz4"))
	other := onlyBlob(t, localRequest(t, "sha256-64k"))
	for name, tc := range map[string]struct {
		spoil func(blob string) error
	}{
		"missing":          {os.Remove},
		"empty":            {func(b string) error { return os.Truncate(b, 0) }},
		"short":            {func(b string) error { return os.Truncate(b, 100_000) }},
		"of another image": {func(b string) error { return errors.Join(os.Remove(b), os.Rename(other, b)) }},
	} {
		t.Run(name, func(t *testing.T) {
			r := localRequest(t, "zstd")
			if err := tc.spoil(onlyBlob(t, r)); err != nil {
				t.Fatal(err)
			}
			r.Mountpoint = newMountpoint(t)
			_, err := d.Mount(t.Context(), r)
			if err == nil {
				t.Fatal("it was mounted")
			}
			t.Log(err)
			if names, _ := filepath.Glob(filepath.Join(d.root, "cache", filepath.Base(onlyName(r))+"*")); len(names) > 0 {
				t.Errorf("left behind: %v", names)
			}
		})
	}
	compareTree(t, tree, good)
}

// TestLongerBlob: bytes behind a blob's end change nothing.
func TestLongerBlob(t *testing.T) {
	d := startDaemon(t, daemonOptions{})
	r := localRequest(t, "zstd")
	appendTo(t, onlyBlob(t, r), "more")
	compareTree(t, fixtureList(t), d.mount(t, r))
}

func appendTo(t testing.TB, name, text string) {
	t.Helper()
	if err := os.Chmod(name, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.WriteString(text)
	if err := errors.Join(err, f.Close()); err != nil {
		t.Fatal(err)
	}
}

// onlyName is the id of the zstd fixture's blob, also when the file is gone.
func onlyName(r api.MountRequest) string {
	names, _ := filepath.Glob(filepath.Join(filepath.Dir(r.Bootstrap), "blobs", "*"))
	return names[0]
}

// TestBadBootstraps: a truncated or foreign bootstrap is refused, nothing is left.
func TestBadBootstraps(t *testing.T) {
	d := startDaemon(t, daemonOptions{})
	r := localRequest(t, "zstd")
	boot, err := os.ReadFile(r.Bootstrap)
	if err != nil {
		t.Fatal(err)
	}
	bad := filepath.Join(t.TempDir(), "boot")
	for _, n := range []int{0, 1, 1024, 1152, 4096, 8192, len(boot) / 2, len(boot) - 4096, len(boot) - 1} {
		if err := os.WriteFile(bad, boot[:n], 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := d.Mount(t.Context(), api.MountRequest{Bootstrap: bad, BlobDir: r.BlobDir, Mountpoint: newMountpoint(t)}); err == nil {
			t.Errorf("a bootstrap cut at %d of %d bytes was mounted", n, len(boot))
		}
	}
	st, err := d.Status(t.Context())
	if err != nil || len(st.Images) != 0 {
		t.Errorf("left behind: %+v, %v", st, err)
	}
}

// TestMountPoints: each place where nothing can be mounted has its own error.
func TestMountPoints(t *testing.T) {
	d := startDaemon(t, daemonOptions{})
	r := localRequest(t, "zstd")
	m := d.mount(t, r)
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct{ point, want string }{
		"busy with ours":  {m, "busy"},
		"busy":            {"/proc", "busy"},
		"missing":         {filepath.Join(t.TempDir(), "none"), "missing"},
		"not a directory": {file, "not a directory"},
		"inside an image": {filepath.Join(m, "big"), "inside the image"},
		"relative":        {"mnt", "absolute"},
		"root":            {"/", "below /"},
	} {
		t.Run(name, func(t *testing.T) {
			bad := r
			bad.Mountpoint = tc.point
			if _, err := d.Mount(t.Context(), bad); err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %v, want %q in it", err, tc.want)
			}
		})
	}
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(filepath.Dir(m), link); err != nil {
		t.Fatal(err)
	}
	d.umount(t, filepath.Join(link, filepath.Base(m)))
	r.Mountpoint = filepath.Join(link, filepath.Base(m))
	if got, err := d.Mount(t.Context(), r); err != nil || got.Mountpoint != m {
		t.Errorf("by way of a symbolic link: %+v, %v", got, err)
	}
	if s := d.image(t, m); s.Detached {
		t.Errorf("%+v", s)
	}
	if err := d.Unmount(t.Context(), api.UnmountRequest{Mountpoint: "/nowhere"}); err == nil {
		t.Error("unmounted what was not mounted")
	}
}

// TestDiskFull: a full disk fails the reads that need it, and only while it is full.
func TestDiskFull(t *testing.T) {
	testenv.Root(t)
	root := smallDisk(t, 32<<20)
	ballast := filepath.Join(root, "ballast")
	d := startDaemon(t, daemonOptions{root: root})
	m := d.mount(t, localRequest(t, "none")) // 14 MB
	if err := fillDisk(ballast); err != nil {
		t.Fatal(err)
	}
	failed := 0
	for _, f := range regularFiles(t, m) {
		if _, err := readAll(f); isEIO(err) {
			failed++
		} else if err != nil {
			t.Fatal(err)
		}
	}
	if failed == 0 {
		t.Fatal("no read failed on a full disk")
	}
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	compareTree(t, fixtureList(t), m)
}

// smallDisk mounts a new ext4 of n bytes and returns a directory on it.
func smallDisk(t testing.TB, n int64) string {
	t.Helper()
	mkfs := testenv.Tool(t, "mkfs.ext4")
	dir := newRoot(t)
	img, mnt := filepath.Join(dir, "disk"), filepath.Join(dir, "mnt")
	err := errors.Join(os.WriteFile(img, nil, 0o600), os.Truncate(img, n), os.Mkdir(mnt, 0o700))
	if err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{mkfs, "-q", "-m", "0", "-F", img}, {"mount", "-o", "loop", img, mnt}} {
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v: %s", args, err, out)
		}
	}
	t.Cleanup(func() {
		if out, err := exec.Command("umount", mnt).CombinedOutput(); err != nil {
			t.Errorf("umount: %v: %s", err, out)
		}
	})
	root := filepath.Join(mnt, "root")
	if err := os.Mkdir(root, 0o700); err != nil {
		t.Fatal(err)
	}
	return root
}

// fillDisk writes a file until there is no space.
func fillDisk(name string) error {
	f, err := os.Create(name)
	if err != nil {
		return err
	}
	defer f.Close()
	for _, n := range []int{1 << 20, 4096} {
		p := bytes.Repeat([]byte{1}, n)
		for err == nil {
			_, err = f.Write(p)
		}
		if !errors.Is(err, syscall.ENOSPC) {
			return fmt.Errorf("fill disk: %w", err)
		}
		err = nil
	}
	return f.Sync()
}
