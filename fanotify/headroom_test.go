package fanotify

import (
	"testing"

	"golang.org/x/sys/unix"
)

// A headroom that was taken, and one that has become old, is made again.
func TestHeadroom(t *testing.T) {
	h, err := newHeadroom()
	if err != nil {
		t.Fatal(err)
	}
	defer h.release()
	for _, spoil := range []func() error{
		func() error { return nil },
		func() error { return unix.Madvise(h.mem[:len(h.mem)/4], unix.MADV_DONTNEED) }, // as if taken
		func() error { h.made = h.made.Add(-2 * headroomAge); return nil },
	} {
		if err := spoil(); err != nil {
			t.Fatal(err)
		}
		made := h.made
		h.restore()
		if got := h.pages(); got != headroomPages || h.made.Before(made) {
			t.Errorf("%d pages of %d", got, headroomPages)
		}
	}
}

func BenchmarkHeadroom(b *testing.B) {
	h, err := newHeadroom()
	if err != nil {
		b.Fatal(err)
	}
	defer h.release()
	for b.Loop() {
		h.restore()
	}
}
