package blobmgr

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"
)

// A disowner notes what it is asked to remove from the kernel's cache.
type disowner struct {
	t     *testing.T
	dir   string // the cache directory
	err   error  // of removing
	asked []string
}

func (d *disowner) disown(_ context.Context, domain, id string, size int64) error {
	d.t.Helper()
	if names := files(d.t, d.dir); len(names) != 0 {
		d.t.Errorf("a crash now would leave %q, and the kernel's file of %s", names, id)
	}
	if size == 0 {
		d.t.Error("no size")
	}
	d.asked = append(d.asked, domain+"/"+id)
	return d.err
}

// The kernel's file of a blob whose chunk table is lost is removed before another table is
// kept, and as often as that did not succeed.
func TestDisownBeforeTable(t *testing.T) {
	x := makeBlob(t, 1, lengths(1, 20))
	d := &disowner{t: t, dir: t.TempDir()}
	o := quietOptions()
	o.Attached, o.Dir, o.Disown = true, d.dir, d.disown
	m := newManager(t, o)
	src := x.source(&store{stored: x.stored})
	src.Domain = "team"
	want := "team/" + x.entry.ID

	d.err = errors.New("it is in use")
	for n := range 2 {
		if b, err := m.Open(t.Context(), src); !errors.Is(err, d.err) {
			t.Fatalf("opened %v, %v", b, err)
		}
		if len(d.asked) != n+1 || d.asked[n] != want {
			t.Fatalf("asked to remove %q, want %q once an open", d.asked, want)
		}
	}
	d.err, d.asked = nil, nil
	b := open(t, m, src)
	again := open(t, m, src) // shares
	closeBlob(t, again)
	closeBlob(t, b)
	closeBlob(t, open(t, m, src)) // the table is known
	if !slices.Equal(d.asked, []string{want}) {
		t.Errorf("asked to remove %q, want %q", d.asked, want)
	}
}

// Only a whole table that nobody doubts vouches for what the kernel has.
func TestKnown(t *testing.T) {
	x := makeBlob(t, 1, lengths(1, 20))
	m := attachedManager(t, "")
	id := x.entry.ID
	if m.Kept("", id) || m.Known("", id) {
		t.Error("a blob is known that nobody opened")
	}
	b := open(t, m, x.source(&store{stored: x.stored}))
	name := filepath.Join(m.opt.Dir, b.name+metaSuffix)
	b.doubtTable()
	if m.Known("", id) {
		t.Error("a table is believed that is doubted")
	}
	delete(m.doubted, b.name)
	closeBlob(t, b)
	whole, err := os.ReadFile(name)
	if err != nil || !m.Known("", id) {
		t.Fatalf("known %v, %v", m.Known("", id), err)
	}
	for what, p := range map[string][]byte{"cut": whole[:len(whole)/2], "empty": nil, "flipped": append(bytes.Clone(whole[:len(whole)-1]), whole[len(whole)-1]^1)} {
		if err := os.WriteFile(name, p, 0o600); err != nil {
			t.Fatal(err)
		}
		if !m.Kept("", id) || m.Known("", id) {
			t.Errorf("%s: kept %v, known %v", what, m.Kept("", id), m.Known("", id))
		}
	}
}
