package fanotify

import (
	"testing"
	"time"

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
		h.restore()
		if got, age := h.pages(), time.Since(h.made); got != headroomPages || age > headroomAge {
			t.Errorf("%d pages of %d, made %v ago", got, headroomPages, age)
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
