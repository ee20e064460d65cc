package smoke

import (
	"bytes"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// testDamagedTable damages the chunk table that the daemon keeps of a blob, while there is
// no daemon: it is fetched again, and every byte is right.
func testDamagedTable(t *testing.T, r row) {
	m := newMachine(t, r)
	s := m.snapshot(t, r.images.get(t, "one", "one"), "7", "")
	for n, damage := range []func(p []byte) []byte{
		func(p []byte) []byte { return p[:len(p)/2] },
		func([]byte) []byte { return nil },
		func(p []byte) []byte { return bytes.Repeat([]byte{0xa5}, len(p)) },
		func(p []byte) []byte { p[len(p)/3] ^= 0x40; return p },
	} {
		p := m.restart(t, m.job())
		p.bind(s)
		p.mount(s)
		s.image.compare(t, s.point)
		if n%2 == 0 {
			p.forget(s)
			p.umount(s)
			p.stop()
		} else {
			p.signal(syscall.SIGKILL)
			if err := unix.Unmount(s.point, unix.MNT_DETACH); err != nil {
				t.Error(err)
			}
		}
		tables, err := filepath.Glob(filepath.Join(m.root, "cache", "*.meta"))
		if err != nil || len(tables) != 1 {
			t.Fatalf("want the table of one blob, got %q, %v", tables, err)
		}
		text, err := os.ReadFile(tables[0])
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(tables[0], damage(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	p := m.restart(t, m.job())
	p.bind(s)
	p.mount(s)
	s.image.compare(t, s.point)
	p.remove(s)
	p.cullBlobs(s.image)
	m.awaitEmpty(t)
}
