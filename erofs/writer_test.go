package erofs

import (
	"bytes"
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
