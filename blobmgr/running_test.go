package blobmgr

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// use makes a cache with all of x, of which the process ends orderly, or is killed.
func use(t *testing.T, dir, boot string, x *fixture, orderly bool) {
	t.Helper()
	o := quietOptions()
	o.Dir, o.boot = dir, boot
	m, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	b := open(t, m, x.source(&store{stored: x.stored}))
	fill(t, b, x, 0, b.Size())
	closeBlob(t, b)
	if !orderly {
		(&history{t: t, m: m}).kill()
		return
	}
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
}

// What a clean mark lists is believed, unless the machine went down while the cache was
// in use: then a changed byte is found.
func TestMachineWentDown(t *testing.T) {
	x := makeBlob(t, 60, lengths(60, 20))
	for _, c := range []struct {
		name     string
		orderly  bool
		boot     string
		believed bool
	}{
		{"orderly, later boot", true, "two", true},
		{"killed, same boot", false, "one", true},
		{"killed, later boot", false, "two", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "cache")
			use(t, dir, "one", x, c.orderly)
			o := quietOptions()
			o.Dir, o.boot = dir, c.boot
			if !c.believed {
				damage(t, filepath.Join(dir, x.entry.ID))
			}
			b := open(t, newManager(t, o), x.source(&store{stored: x.stored}))
			defer closeBlob(t, b)
			if got := b.Ready(0, b.Size()); got != c.believed {
				t.Errorf("ready: %v", got)
			}
			fill(t, b, x, 0, b.Size())
		})
	}
}

// A blob that nobody opened in between is verified all the same.
func TestDoubtLastsUntilVerified(t *testing.T) {
	x, y := makeBlob(t, 61, lengths(61, 5)), makeBlob(t, 62, lengths(62, 5))
	dir := filepath.Join(t.TempDir(), "cache")
	use(t, dir, "one", x, false)
	use(t, dir, "two", y, true)
	damage(t, filepath.Join(dir, x.entry.ID))
	use(t, dir, "three", x, true) // compares every byte
}

// The files of another version, older or newer, are as good as none.
func TestOtherVersions(t *testing.T) {
	x := makeBlob(t, 63, lengths(63, 20))
	for _, c := range []struct{ name, magic string }{
		{metaSuffix, metaMagic}, {cleanSuffix, cleanMagic}, {runningName, runningMagic},
	} {
		for _, version := range []string{"0", "2", "10"} {
			t.Run(c.name+" "+version, func(t *testing.T) {
				dir := filepath.Join(t.TempDir(), "cache")
				use(t, dir, "one", x, c.name != runningName)
				path := filepath.Join(dir, c.name)
				if c.name != runningName {
					path = filepath.Join(dir, x.entry.ID+c.name)
				}
				p, err := os.ReadFile(path)
				if err != nil {
					t.Fatal(err)
				}
				content, err := unseal(p, c.magic)
				if err != nil {
					t.Fatal(err)
				}
				other := strings.Replace(c.magic, " 1\n", " "+version+"\n", 1)
				if err := os.WriteFile(path, seal(append([]byte(other), content...)), 0o600); err != nil {
					t.Fatal(err)
				}
				damage(t, filepath.Join(dir, x.entry.ID))
				use(t, dir, "one", x, true)
				use(t, dir, "one", x, true)
			})
		}
	}
}

// An id that is the name of another blob's file is refused: it would be written over.
func TestIDOfAnotherBlobsFile(t *testing.T) {
	x := makeBlob(t, 64, lengths(64, 5))
	m := newManager(t, quietOptions())
	for _, suffix := range []string{metaSuffix, cleanSuffix, metaSuffix + tmpSuffix} {
		s := x.source(&store{stored: x.stored})
		s.Entry.ID += suffix
		if b, err := m.Open(t.Context(), s); err == nil {
			t.Errorf("%s: opened", s.Entry.ID)
			b.Close()
		}
	}
}
