package erofs

import (
	"bytes"
	"encoding/binary"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/erofsd/erofsd/internal/testenv"
)

func TestWriteEverythingGoErofs(t *testing.T) {
	for _, shared := range []bool{false, true} {
		for _, size := range []uint32{4096, 64 << 10} {
			m := everything(size)
			m.o.SharedXattrs = shared
			img := m.write(t)
			m.checkGoErofs(t, img)
			if again := m.write(t); !bytes.Equal(img, again) {
				t.Error("a second run gives other bytes")
			}
		}
	}
}

func TestWriteFsck(t *testing.T) {
	fsck := testenv.Tool(t, "fsck.erofs")
	m := everything(64 << 10)
	img := m.write(t)
	dir := t.TempDir()
	boot := filepath.Join(dir, "boot")
	args := []string{"--extract"}
	for k, d := range m.used(t, img) {
		p := filepath.Join(dir, "device"+string(rune('0'+k)))
		if err := os.WriteFile(p, d, 0o600); err != nil {
			t.Fatal(err)
		}
		args = append(args, "--device="+p)
	}
	if err := os.WriteFile(boot, img, 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(fsck, append(args, boot)...).CombinedOutput(); err != nil {
		t.Errorf("fsck.erofs: %v\n%s", err, out)
	}
}

func le32(p []byte) uint32 { return binary.LittleEndian.Uint32(p) }

// TestWriteBlobOrder: a blob that no file uses is left out, the others come in
// the order in which the tree uses them.
func TestWriteBlobOrder(t *testing.T) {
	m := newModel(4096)
	a, b, c := m.blob(), m.blob(), m.blob()
	m.chunk(b, []byte("unused"))
	m.put("1", m.file(c, []byte("c")))
	m.put("2", m.file(a, []byte("a")))
	img := m.write(t)
	if n := binary.LittleEndian.Uint16(img[superOffset+86:]); n != 2 {
		t.Fatalf("%d devices, want 2", n)
	}
	for slot, k := range []uint32{c, a} {
		if tag := string(img[deviceTable+slot*deviceSize:][:idSize]); tag != m.o.Blobs[k].ID {
			t.Errorf("device %d is %s, want blob %d", slot, tag, k)
		}
	}
}

// TestWriteKernelChunk: the kernel's chunk spans a file whose chunks are one run.
func TestWriteKernelChunk(t *testing.T) {
	m := newModel(8192)
	k := m.blob()
	full, tail := make([]byte, 8192), make([]byte, 10)
	c := []ChunkRef{m.chunk(k, full), m.chunk(k, full), m.chunk(k, tail), m.chunk(k, full)}
	b := &writer{o: m.o}
	for _, test := range []struct {
		size   int64
		chunks []ChunkRef
		want   int64 // bytes of a kernel chunk
	}{
		{0, nil, 8192},
		{10, c[2:3], 8192},
		{16384, c[:2], 16384},
		{16394, c[:3], 32768},
		{16384, []ChunkRef{c[1], c[0]}, 8192},
		{16384, []ChunkRef{c[0], c[3]}, 8192},
		{16384, []ChunkRef{c[0], c[0]}, 8192},
		{maxKernelChunk, c[:2], maxKernelChunk},
		{maxKernelChunk + 1, c[:2], 8192},
	} {
		got := b.chunkFormat(&Node{Mode: typeReg, Size: test.size, Chunks: test.chunks})
		if got&0x20 == 0 || int64(blockSize)<<(got&0x1f) != test.want {
			t.Errorf("size %d, chunks %v: format %#x, want kernel chunks of %d", test.size, test.chunks, got, test.want)
		}
	}
}
