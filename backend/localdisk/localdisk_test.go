package localdisk

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/erofsd/erofsd/backend"
	"github.com/erofsd/erofsd/backend/backendtest"
	"github.com/erofsd/erofsd/internal/testenv"
)

func TestMain(m *testing.M) { testenv.Main(m) }

func writeDisk(t *testing.T, p []byte) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(name, p, 0o600); err != nil {
		t.Fatal(err)
	}
	return name
}

// TestConformance is with offsets: only these give exact sizes.
func TestConformance(t *testing.T) {
	backendtest.Run(t, func(t *testing.T, blobs ...[]byte) (backend.Store, []backend.Ref) {
		disk := []byte("what is before the blobs")
		o := Options{DisableGPT: true, Blobs: map[digest.Digest]Extent{}}
		var refs []backend.Ref
		for _, p := range blobs {
			d := digest.FromBytes(p)
			o.Blobs[d] = Extent{int64(len(disk)), int64(len(p))}
			refs = append(refs, backend.Ref{Digest: d, Size: int64(len(p))})
			disk = append(disk, p...)
		}
		o.Device = writeDisk(t, append(disk, "what is behind"...))
		s, err := New(o)
		if err != nil {
			t.Fatal(err)
		}
		return s, refs
	})
}

// partitioned is a disk with the blobs in partitions, with gaps between.
func partitioned(sector int64, blobs ...[]byte) (disk []byte, refs []backend.Ref) {
	var parts []part
	at := int64(40)
	for _, p := range blobs {
		d := digest.FromBytes(p)
		n := (int64(len(p)) + sector - 1) / sector
		parts = append(parts, blobPart(d.Encoded(), at, n))
		refs = append(refs, backend.Ref{Digest: d, Size: int64(len(p))})
		at += n + 3
	}
	m := newImage(sector, at+40, parts...)
	for i, p := range blobs {
		copy(m.p[parts[i].first*sector:], p)
	}
	return m.p, refs
}

// checkDisk reads all blobs of a disk with partitions.
func checkDisk(t *testing.T, device string, sector int64, refs []backend.Ref, blobs [][]byte) {
	t.Helper()
	s, err := New(Options{Device: device})
	if err != nil {
		t.Fatal(err)
	}
	for i, ref := range refs {
		padded := (ref.Size + sector - 1) / sector * sector
		for size, want := range map[int64]int64{ref.Size: ref.Size, 0: padded, padded: padded} {
			b, err := s.Open(t.Context(), backend.Ref{Digest: ref.Digest, Size: size})
			if err != nil {
				t.Fatal(err)
			}
			defer b.Close()
			p := make([]byte, ref.Size)
			if err := b.ReadAt(t.Context(), p, 0); err != nil || !bytes.Equal(p, blobs[i]) || b.Size() != want {
				t.Errorf("blob %d with size %d: error %v, size %d (want %d), or wrong bytes", i, size, err, b.Size(), want)
			}
			if err := b.ReadAt(t.Context(), make([]byte, 2), want-1); err == nil || backend.Temporary(err) {
				t.Errorf("blob %d: read past its end: %v", i, err)
			}
		}
		if _, err := s.Open(t.Context(), backend.Ref{Digest: ref.Digest, Size: padded + 1}); err == nil || !strings.Contains(err.Error(), "cut off") {
			t.Errorf("blob %d: error %v, want that it is larger than its partition", i, err)
		}
	}
	missing := backend.Ref{Digest: digest.FromString("another blob"), Size: 1}
	if _, err := s.Open(t.Context(), missing); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a blob that has no partition: error %v", err)
	}
}

func TestPartitions(t *testing.T) {
	blobs := [][]byte{backendtest.Bytes(100_000, 1), backendtest.Bytes(512, 2), backendtest.Bytes(4097, 3)}
	for _, sector := range []int64{512, 4096} {
		disk, refs := partitioned(sector, blobs...)
		name := writeDisk(t, disk)
		link := filepath.Join(t.TempDir(), "link")
		if err := os.Symlink(name, link); err != nil {
			t.Fatal(err)
		}
		checkDisk(t, name, sector, refs, blobs)
		checkDisk(t, link, sector, refs, blobs)
	}
}

// TestBlockDevice is TestPartitions on a real device, whose size stat does not tell.
func TestBlockDevice(t *testing.T) {
	testenv.Root(t)
	losetup := testenv.Tool(t, "losetup")
	blobs := [][]byte{backendtest.Bytes(100_000, 1), backendtest.Bytes(10, 2)}
	disk, refs := partitioned(512, blobs...)
	out, err := exec.Command(losetup, "--find", "--show", "--read-only", writeDisk(t, disk)).CombinedOutput()
	if err != nil {
		testenv.Need(t, "loop", "no loop device: "+strings.TrimSpace(string(out)))
	}
	loop := strings.TrimSpace(string(out))
	t.Cleanup(func() { exec.Command(losetup, "--detach", loop).Run() })
	checkDisk(t, loop, 512, refs, blobs)
}

func TestRaw(t *testing.T) {
	data := backendtest.Bytes(4096, 1)
	s, err := New(Options{Device: writeDisk(t, data), DisableGPT: true})
	if err != nil {
		t.Fatal(err)
	}
	for size, want := range map[int64]int64{0: 4096, 1000: 1000, 4096: 4096} {
		b, err := s.Open(t.Context(), backend.Ref{Digest: digest.FromString("any"), Size: size})
		if err != nil {
			t.Fatal(err)
		}
		p := make([]byte, want)
		if err := b.ReadAt(t.Context(), p, 0); err != nil || !bytes.Equal(p, data[:want]) || b.Size() != want {
			t.Errorf("size %d: error %v, size %d, or wrong bytes", size, err, b.Size())
		}
		b.Close()
	}
	for _, size := range []int64{-1, 4097} {
		if _, err := s.Open(t.Context(), backend.Ref{Digest: digest.FromString("any"), Size: size}); err == nil {
			t.Errorf("opened with size %d", size)
		}
	}
}

func TestNew(t *testing.T) {
	dir := t.TempDir()
	pipe := filepath.Join(dir, "pipe")
	if err := syscall.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	empty, plain := writeDisk(t, nil), writeDisk(t, make([]byte, 100_000))
	d := digest.FromString("blob")
	for name, c := range map[string]struct {
		o    Options
		want string
	}{
		"no path":          {Options{}, "no path"},
		"missing":          {Options{Device: dir + "/missing"}, "no such file"},
		"directory":        {Options{Device: dir}, "neither a block device"},
		"pipe":             {Options{Device: pipe}, "neither a block device"},
		"character device": {Options{Device: "/dev/zero"}, "neither a block device"},
		"empty":            {Options{Device: empty}, "no GUID partition table"},
		"no table":         {Options{Device: plain}, "no GUID partition table"},
		"both":             {Options{Device: plain, Blobs: map[digest.Digest]Extent{d: {}}}, "partitions"},
		"blob outside":     {Options{Device: plain, DisableGPT: true, Blobs: map[digest.Digest]Extent{d: {99_999, 2}}}, "outside"},
		"blob far":         {Options{Device: plain, DisableGPT: true, Blobs: map[digest.Digest]Extent{d: {1<<63 - 1, 1<<63 - 1}}}, "outside"},
	} {
		if _, err := New(c.o); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: error %v, want %q", name, err, c.want)
		}
	}
}

// TestDiskShrinks: what is no longer there is an error, never zeros.
func TestDiskShrinks(t *testing.T) {
	disk, refs := partitioned(512, backendtest.Bytes(100_000, 1))
	name := writeDisk(t, disk)
	s, err := New(Options{Device: name})
	if err != nil {
		t.Fatal(err)
	}
	b, err := s.Open(t.Context(), refs[0])
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	if err := os.Truncate(name, 50_000); err != nil {
		t.Fatal(err)
	}
	if err := b.ReadAt(t.Context(), make([]byte, 100_000), 0); err == nil || backend.Temporary(err) {
		t.Errorf("read of a disk that was cut off: %v", err)
	}
	if _, err := s.Open(t.Context(), refs[0]); err == nil {
		t.Error("opened a blob on a disk that was cut off")
	}
}
