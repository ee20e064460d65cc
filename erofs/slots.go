package erofs

// slots is a set of the image's 32-byte slots.
type slots struct {
	groups map[int64]*slotGroup
}

// A slotGroup stands for 1 MiB of the image.
type slotGroup [512]uint64

const groupSlots = 512 * 64

func (s *slots) has(slot int64) bool {
	_, ok := s.first(slot, slot+1)
	return ok
}

// first returns the first slot of [from, end) that is in the set.
func (s *slots) first(from, end int64) (int64, bool) {
	for slot := from; slot < end; {
		g, ok := s.groups[slot/groupSlots]
		stop := min(end, (slot/groupSlots+1)*groupSlots)
		for ; ok && slot < stop; slot++ {
			if g[slot%groupSlots/64]&(1<<(slot%64)) != 0 {
				return slot, true
			}
		}
		slot = stop
	}
	return 0, false
}

// add puts [from, end) into the set and returns the bytes that this took.
func (s *slots) add(from, end int64) (grown int64) {
	if s.groups == nil {
		s.groups = map[int64]*slotGroup{}
	}
	for slot := from; slot < end; {
		g := s.groups[slot/groupSlots]
		if g == nil {
			g = new(slotGroup)
			s.groups[slot/groupSlots] = g
			grown += 8*512 + 64
		}
		for stop := min(end, (slot/groupSlots+1)*groupSlots); slot < stop; slot++ {
			g[slot%groupSlots/64] |= 1 << (slot % 64)
		}
	}
	return grown
}
