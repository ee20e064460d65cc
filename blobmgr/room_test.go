package blobmgr

import (
	"testing"
	"time"
)

// TestRoomInVain: when nothing goes, one read has waited and the others do not; once
// something went they wait again.
func TestRoomInVain(t *testing.T) {
	r := newRoom(time.Millisecond)
	r.limited, r.Room = true, Room{}
	r.take(10)
	for _, c := range []struct {
		what  string
		do    func()
		waits int64
	}{
		{"the first", func() {}, 1},
		{"the second", func() {}, 1},
		{"after something went", func() { r.punched(5) }, 2},
		{"when all fits", func() { r.punched(5) }, 2},
	} {
		c.do()
		r.wait(t.Context())
		if r.waits != c.waits {
			t.Errorf("%s: %d reads have waited, want %d", c.what, r.waits, c.waits)
		}
	}
}
