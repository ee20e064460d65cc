package blobmgr

import "testing"

// readOfEach reads a unit of each region that is in doubt, and returns which.
func readOfEach(t *testing.T, b *Blob, x *fixture) (units []int) {
	t.Helper()
	for i := range b.heat {
		for u := range b.unitsOf(i) {
			fill(t, b, x, b.table.Unit(u).Off, 1)
			units = append(units, u)
			break
		}
	}
	return units
}

// TestPunchRead: where every region is read, what nobody reads of them can go, and nothing
// else.
func TestPunchRead(t *testing.T) {
	m, b, x, s := evicting(t, quietOptions())
	doubt(t, b)
	m.Tick()
	units := readOfEach(t, b, x)
	if len(b.Regions(nil)) > 0 {
		t.Error("what is in doubt could be put in doubt again, for another grace")
	}
	m.Tick()
	if n := punch(t, b, 1); n != 0 {
		t.Errorf("punched %d bytes in regions that are read", n)
	}
	all, unread := b.Doubtful()
	if all == 0 || unread != 0 {
		t.Fatalf("%d bytes are in doubt, %d of these unread", all, unread)
	}
	if n, err := b.PunchRead(t.Context(), before(b, 2), all); n != 0 || err != nil {
		t.Errorf("punched %d bytes within the grace, %v", n, err)
	}
	had := disk(t, b)
	n, err := b.PunchRead(t.Context(), before(b, 1), all)
	if err != nil || n != all {
		t.Errorf("punched %d bytes of %d, %v", n, all, err)
	}
	if gone := had - disk(t, b); gone < n*9/10 {
		t.Errorf("the disk has %d bytes back, want %d or nearly so", gone, n)
	}
	s.requests()
	for _, u := range units {
		x := b.table.Unit(u)
		if !b.Ready(x.Off, x.Len) {
			t.Errorf("unit %d is gone, which was read", u)
		}
	}
	fill(t, b, x, 0, b.Size())
	if log, _ := s.requests(); len(log) == 0 {
		t.Error("what was punched was not fetched again")
	}
}

// TestSecondChance: what is not wanted of regions that were read is in doubt no more, and
// can be put in doubt again.
func TestSecondChance(t *testing.T) {
	m, b, x, _ := evicting(t, quietOptions())
	regions := len(b.Regions(nil))
	doubt(t, b)
	m.Tick()
	readOfEach(t, b, x)
	m.Tick()
	if n, err := b.PunchRead(t.Context(), before(b, 1), 0); n != 0 || err != nil {
		t.Errorf("punched %d bytes, %v", n, err)
	}
	if n := doubtful(b); n != 0 || len(b.Regions(nil)) != regions {
		t.Errorf("%d bytes are in doubt, and %d regions of %d are not", n, len(b.Regions(nil)), regions)
	}
	fill(t, b, x, 0, b.Size())
}
