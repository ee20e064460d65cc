package daemon

import (
	"context"
	"maps"
	"slices"
	"time"
)

// live gives signs of life until ctx is done or the keeper is dead.
func (h *Holder) live(ctx context.Context, try func()) {
	t := time.NewTicker(h.client.AliveEvery())
	defer t.Stop()
	for {
		select {
		case <-t.C:
		case <-ctx.Done():
			return
		case <-h.client.Gone():
			return
		}
		try()
		if err := h.done("know that the daemon is alive", h.client.Alive(ctx)); err != nil && ctx.Err() == nil {
			h.log.Warn("the keeper may take the daemon for one that hangs", "err", err)
		}
	}
}

// tryLocks takes and gives back what everything here needs now and then: where one of
// these is held for ever, readers wait for ever.
func (c *Control) tryLocks() {
	c.mu.Lock()
	d := c.daemon
	c.mu.Unlock()
	if d != nil {
		d.tryLocks()
	}
}

func (d *Daemon) tryLocks() {
	d.mu.Lock()
	blobs := slices.Collect(maps.Keys(d.devices))
	d.mu.Unlock()
	d.kernel.live(imageKey{}, "")
	for _, b := range blobs {
		b.Done()
	}
}
