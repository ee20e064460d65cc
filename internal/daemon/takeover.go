package daemon

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/erofsd/erofsd/internal/api/nydus"
	"github.com/erofsd/erofsd/internal/config"
)

// SendFD gives the supervisor what a later daemon needs. From then on images stay
// mounted at the end.
func (c *Control) SendFD(ctx context.Context) error {
	socket := c.o.Nydusd.Supervisor
	if socket == "" {
		return nil
	}
	d, err := c.running()
	if err != nil {
		return nydus.NoFDs()
	}
	device := d.kernel.fd()
	if device == nil {
		return nydus.NoFDs()
	}
	state, err := d.state()
	if err == nil {
		err = sendState(ctx, socket, state, device)
	}
	if err != nil {
		return nydus.UpgradeFailed("SendFd", err)
	}
	c.mu.Lock()
	c.sent = true
	c.mu.Unlock()
	return nil
}

// TakeOver gets from the supervisor what an earlier daemon gave it, for Start. If it
// fails the state stays INIT, and it can be tried again.
func (c *Control) TakeOver(ctx context.Context) error {
	if err := c.turn.take(ctx); err != nil {
		return err
	}
	defer c.turn.give()
	if c.Info().State != nydus.Init {
		return nydus.UnexpectedEvent("Takeover")
	}
	if c.o.Nydusd.Supervisor == "" {
		return nydus.MissingSupervisor()
	}
	s, err := receiveState(ctx, c.o.Nydusd.Supervisor)
	if err != nil {
		return nydus.UpgradeFailed("RecvFd", err)
	}
	c.mu.Lock()
	c.taken = s
	c.mu.Unlock()
	c.changed(nydus.Init, nydus.Ready, "Takeover")
	return nil
}

// lockTime is how long Start waits for a predecessor to end.
const lockTime = 10 * time.Second

// Start serves what TakeOver got. If it fails it can be tried again.
func (c *Control) Start(ctx context.Context) error {
	if err := c.turn.take(ctx); err != nil {
		return err
	}
	defer c.turn.give()
	if c.Info().State != nydus.Ready {
		return nydus.UnexpectedEvent("Start")
	}
	d, err := c.restore(ctx)
	if err != nil {
		return fmt.Errorf("start: %w", err)
	}
	c.mu.Lock()
	c.daemon, c.taken, c.sent = d, nil, true // the supervisor has the device
	c.mu.Unlock()
	if err := c.serveKernel(context.WithoutCancel(ctx), d); err != nil {
		c.quit()
		return fmt.Errorf("start: %w", err)
	}
	c.changed(nydus.Ready, nydus.Running, "Start")
	return nil
}

// restore makes a daemon of what was taken over. Images that cannot be had are left out:
// one missing file must not strand the others.
func (c *Control) restore(ctx context.Context) (*Daemon, error) {
	c.mu.Lock()
	taken := c.taken
	c.mu.Unlock()
	device, err := duplicate(taken.device)
	if err != nil {
		return nil, err
	}
	o := c.o
	o.Transport, o.Fscache, o.Device = Cachefiles, taken.state.Fscache, device
	o.Kernel.Inherited = true
	d, err := newWhenFree(ctx, o)
	if err != nil {
		return nil, errors.Join(err, device.Close())
	}
	for _, s := range taken.state.Images {
		e, _, err := config.ParseBlobEntry(s.Entry)
		switch {
		case err != nil:
		case s.Bound:
			err = c.bindSaved(ctx, d, s)
		default:
			d.remembered[imageKey{e.DomainID, e.ID}] = e.Image
		}
		if err != nil {
			c.log.Error("an image of an earlier daemon cannot be restored; what it lacks reads as EIO", "image", e.ID, "err", err)
		}
	}
	if err := taken.device.Close(); err != nil {
		c.log.Warn("close device", "err", err)
	}
	return d, nil
}

// newWhenFree is New that waits for the predecessor's end.
func newWhenFree(ctx context.Context, o Options) (*Daemon, error) {
	ctx, cancel := context.WithTimeout(ctx, lockTime)
	defer cancel()
	for {
		d, err := New(o)
		if !errors.Is(err, errLocked) {
			return d, err
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
			return nil, err
		}
	}
}
