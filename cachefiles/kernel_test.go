package cachefiles_test

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	. "github.com/erofsd/erofsd/cachefiles"
	"github.com/erofsd/erofsd/erofs"
	"github.com/erofsd/erofsd/internal/kernel"
	"github.com/erofsd/erofsd/internal/testenv"
)

// cacheRoot makes a cache root on a file system that the kernel takes, and skips t
// where there is no such kernel.
func cacheRoot(t *testing.T) string {
	t.Helper()
	testenv.Root(t)
	dir := t.TempDir()
	if base := os.Getenv("EROFSD_TEST_DIR"); base != "" {
		var err error
		if dir, err = os.MkdirTemp(base, "cache-*"); err != nil {
			t.Fatal(err)
		}
	}
	testenv.Kernel(t, "cachefiles", Supported("", dir))
	return dir
}

func kernelDevice(t *testing.T, dir string) *Device {
	t.Helper()
	d, err := Open("")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	if err := d.Bind(BindOptions{Dir: dir}); err != nil {
		t.Fatal(err)
	}
	return d
}

// An image is a bootstrap with one file, data, in one blob.
type image struct {
	fsid, domain string
	boot, blob   *blob
}

const chunkSize = 64 << 10

func newImage(t *testing.T, domain, fsid, id string, n int) *image {
	t.Helper()
	volume := VolumeKey(domain, fsid)
	img := &image{fsid: fsid, domain: domain, blob: newBlob(Key{volume, id}, n)}
	b := erofs.Blob{ID: id, Size: int64(n)}
	file := &erofs.Node{Mode: unix.S_IFREG | 0o644, Size: int64(n)}
	for i := range n / chunkSize {
		c := erofs.ChunkInfo{Index: uint32(i), Off: int64(i) * chunkSize, COff: int64(i) * chunkSize, CLen: chunkSize, Len: chunkSize, FileOff: int64(i) * chunkSize}
		binary.BigEndian.PutUint32(c.Digest[:], uint32(i))
		b.Chunks = append(b.Chunks, c)
		file.Chunks = append(file.Chunks, erofs.ChunkRef{Chunk: uint32(i)})
	}
	binary.LittleEndian.PutUint32(b.Entry[68:], chunkSize)
	binary.LittleEndian.PutUint32(b.Entry[72:], uint32(n/chunkSize))
	binary.LittleEndian.PutUint64(b.Entry[96:], uint64(n))
	root := &erofs.Node{Mode: unix.S_IFDIR | 0o755, Children: map[string]*erofs.Node{"data": file}}
	var boot bytes.Buffer
	if err := erofs.Write(&boot, root, erofs.WriteOptions{Blobs: []erofs.Blob{b}, ChunkSize: chunkSize, Digester: 1}); err != nil {
		t.Fatal(err)
	}
	img.boot = newBlob(Key{volume, fsid}, 0)
	img.boot.data = boot.Bytes()
	return img
}

// run runs the test binary as a child and returns what it says on failure.
func run(t *testing.T, job string, o erofs.MountOptions) (*exec.Cmd, <-chan error) {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	in, err := json.Marshal(o)
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	cmd := exec.Command(exe)
	cmd.Env = append(os.Environ(), childEnv+"="+job)
	cmd.Stdin, cmd.Stderr = bytes.NewReader(in), &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return cmd, later(func() error {
		err := cmd.Wait()
		if err != nil {
			err = errors.Join(err, errors.New(out.String()))
		}
		return err
	})
}

// A mounted image.
type mounted struct {
	*image
	t   *testing.T
	dir string
}

func tryMount(t *testing.T, img *image) (*mounted, error) {
	t.Helper()
	m := &mounted{image: img, t: t, dir: t.TempDir()}
	_, done := run(t, "mount", erofs.MountOptions{Source: "erofsd", FSID: img.fsid, Domain: img.domain, Target: m.dir})
	if err := get(t, done); err != nil {
		return nil, err
	}
	t.Cleanup(func() { _ = unix.Unmount(m.dir, unix.MNT_DETACH) })
	return m, nil
}

func mount(t *testing.T, img *image) *mounted {
	t.Helper()
	m, err := tryMount(t, img)
	if err != nil {
		t.Fatalf("mount %s: %v", img.fsid, err)
	}
	return m
}

func (m *mounted) unmount() {
	m.t.Helper()
	if err := unix.Unmount(m.dir, 0); err != nil {
		m.t.Fatalf("unmount: %v", err)
	}
}

func (m *mounted) read(off, n int) ([]byte, error) {
	f, err := os.Open(filepath.Join(m.dir, "data"))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	p := make([]byte, n)
	_, err = f.ReadAt(p, int64(off))
	return p, err
}

func (m *mounted) check(off, n int) {
	m.t.Helper()
	p, err := m.read(off, n)
	if err != nil {
		m.t.Fatalf("read %d bytes at %d: %v", n, off, err)
	}
	if !bytes.Equal(p, m.blob.data[off:off+n]) {
		m.t.Fatalf("%d bytes at %d are not the blob's", n, off)
	}
}

func closedAll(t *testing.T, s *daemon) {
	t.Helper()
	until(t, "every object is closed", func() bool { return s.Stats().Objects == 0 })
}

// cullVolume deletes an image that was unmounted, as soon as the kernel lets it go.
func cullVolume(t *testing.T, d *Device, img *image) {
	t.Helper()
	until(t, "the volume can be culled", func() bool {
		err := d.CullVolume(img.blob.key.Volume)
		if err != nil && !errors.Is(err, ErrInUse) {
			t.Fatal(err)
		}
		return err == nil
	})
}

// The kernel's own errors, and ours before it.
func TestKernelSetup(t *testing.T) {
	dir := cacheRoot(t)
	d := kernelDevice(t, dir)
	if err := d.Bind(BindOptions{Dir: dir}); err == nil {
		t.Error("bound twice")
	}
	if _, err := Open(""); !errors.Is(err, unix.EBUSY) || !strings.Contains(err.Error(), "process "+strconv.Itoa(os.Getpid())) {
		t.Errorf("open twice: %v", err)
	}
	if err := Supported("", dir); !errors.Is(err, unix.EBUSY) || errors.Is(err, kernel.ErrNotSupported) {
		t.Errorf("probe a device in use: %v", err)
	}
	if err := d.Restore(); err != nil {
		t.Error(err)
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}

	for name, c := range map[string]struct {
		dir  string
		want error
	}{
		"missing":  {filepath.Join(dir, "missing"), fs.ErrNotExist},
		"file":     {"/proc/version", unix.ENOTDIR},
		"tmpfs":    {"/run", kernel.ErrNotSupported},
		"sysfs":    {"/sys", kernel.ErrNotSupported},
		"devtmpfs": {"/dev", kernel.ErrNotSupported},
	} {
		d, err := Open("")
		if err != nil {
			t.Fatal(err)
		}
		err = d.Bind(BindOptions{Dir: c.dir})
		if !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	}
	if left, err := filepath.Glob(filepath.Join(dir, ".erofsd-probe-*")); err != nil || len(left) > 0 {
		t.Errorf("the probe left %v, %v", left, err)
	}
}

// The whole way of an image, alone and in a domain: cold, warm, where its objects
// lie, and how they go away.
func TestKernelMount(t *testing.T) {
	for _, domain := range []string{"", "dom.1"} {
		t.Run("domain "+domain, func(t *testing.T) {
			dir := cacheRoot(t)
			d := kernelDevice(t, dir)
			img := newImage(t, domain, "img1", "blob0123456789abcdef", 4<<20)
			s := start(t, d, handle(img.boot, img.blob), Options{})
			m := mount(t, img)
			readers(m)
			if got := s.Stats(); got.Opens != 2 || got.Failed+got.Lost+got.Unknown+got.Malformed != 0 {
				t.Errorf("%+v", got)
			}
			for _, k := range []Key{img.boot.key, img.blob.key} {
				if used, err := d.InUse(k); used || !errors.Is(err, fs.ErrNotExist) {
					t.Errorf("a new object is on disk before it is closed: %v, %v", used, err)
				}
			}
			m.unmount()
			closedAll(t, s)
			for _, k := range []Key{img.boot.key, img.blob.key} {
				until(t, k.Cookie+" is on disk and not in use", func() bool { // it is put there after CLOSE
					used, err := d.InUse(k)
					if err != nil && !errors.Is(err, fs.ErrNotExist) {
						t.Fatal(err)
					}
					return err == nil && !used
				})
				if _, err := os.Lstat(filepath.Join(dir, k.Path())); err != nil {
					t.Errorf("where the kernel keeps it: %v", err)
				}
			}

			before := s.Stats().Reads
			m = mount(t, img) // hangs while something keeps a file
			m.check(0, len(img.blob.data))
			if reads := s.Stats().Reads - before; reads != 0 {
				t.Errorf("%d READs of an image that is there", reads)
			}
			if used, err := d.InUse(img.blob.key); !used || err != nil {
				t.Errorf("a live object is not in use: %v, %v", used, err)
			}
			if err := d.Cull(img.blob.key); !errors.Is(err, ErrInUse) {
				t.Errorf("cull a live object: %v", err)
			}
			if err := d.CullVolume(img.blob.key.Volume); !errors.Is(err, ErrInUse) {
				t.Errorf("cull a live volume: %v", err)
			}
			m.unmount()
			closedAll(t, s)

			until(t, "the blob can be culled", func() bool {
				err := d.Cull(img.blob.key)
				if err != nil && !errors.Is(err, ErrInUse) {
					t.Fatal(err)
				}
				return err == nil
			})
			if _, err := os.Lstat(filepath.Join(dir, img.blob.key.Path())); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("after cull: %v", err)
			}
			if err := d.Cull(img.blob.key); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("cull again: %v", err)
			}
			cullVolume(t, d, img)
			if _, err := os.Lstat(filepath.Join(dir, VolumePath(img.blob.key.Volume))); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("the volume is still there: %v", err)
			}
			if left, err := os.ReadDir(filepath.Join(dir, "graveyard")); err != nil || len(left) != 0 {
				t.Errorf("graveyard: %v, %v", left, err)
			}
			m = mount(t, img) // and it all begins anew
			m.check(0, len(img.blob.data))
			m.unmount()
			closedAll(t, s)
			if err := s.stop(); err != nil {
				t.Error(err)
			}
		})
	}
}

// readers read all of an image, several at a time, in different orders.
func readers(m *mounted) {
	var wg sync.WaitGroup
	for i := range 4 {
		rng := rand.New(rand.NewPCG(1, uint64(i)))
		wg.Go(func() {
			for range 100 {
				n := 1 + rng.IntN(100<<10)
				off := rng.IntN(len(m.blob.data) - n)
				p, err := m.read(off, n)
				if err != nil || !bytes.Equal(p, m.blob.data[off:off+n]) {
					m.t.Errorf("%d bytes at %d: %v", n, off, err)
					return
				}
			}
		})
	}
	wg.Wait()
	m.check(0, len(m.blob.data))
}
