package fanotify

import "sync/atomic"

// Stats counts since the group was made.
type Stats struct {
	Events    int64 // messages taken from the queue, malformed ones included
	Allowed   int64 // answers that let the reader go on: Ready + Filled + Own
	Ready     int64 // allowed at once
	Filled    int64 // allowed after Fill
	Own       int64 // allowed because this very process read; see the package comment, Order
	Denied    int64 // answers that gave the reader EIO
	InFlight  int64 // events that wait for Fill now
	Malformed int64 // messages that could not be decoded; denied where they had a descriptor
	Refused   int64 // events that the kernel denied itself (no descriptor left) and reads of the queue that failed
	Overflows int64 // queue overflows: readers saw holes. Cannot happen, and is logged as an error
	Lost      int64 // answers that the kernel did not take
	Adopted   int64 // events that another process left unanswered, and that the journal knew
	Swept     int64 // such events that it did not know; denied. Cannot happen, and is logged as an error
}

type counters struct {
	events, ready, filled, own, denied, inFlight, malformed, refused, overflows, lost, adopted, swept atomic.Int64
}

// Stats returns the counters. They are read one by one.
func (g *Group) Stats() Stats {
	c := &g.count
	s := Stats{
		Events: c.events.Load(), Ready: c.ready.Load(), Filled: c.filled.Load(), Own: c.own.Load(),
		Denied: c.denied.Load(), InFlight: c.inFlight.Load(), Malformed: c.malformed.Load(),
		Refused: c.refused.Load(), Overflows: c.overflows.Load(), Lost: c.lost.Load(),
		Adopted: c.adopted.Load(), Swept: c.swept.Load(),
	}
	s.Allowed = s.Ready + s.Filled + s.Own
	return s
}
