package daemon

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/erofsd/erofsd/internal/api"
)

// Upgrade replaces this worker by one from another executable, or the same again. With
// nil this worker leaves: its successor answers what it does not. No mount is touched.
func (d *Daemon) Upgrade(ctx context.Context, r api.UpgradeRequest) error {
	h := d.o.Holder
	if h == nil {
		return api.Conflict(errors.New("upgrade: this daemon has no keeper that could hand its images over; start it with --keeper"))
	}
	if err := d.upgrading.take(ctx); err != nil {
		return err
	}
	defer d.upgrading.give()
	select {
	case <-d.yielded:
		return api.Conflict(errors.New("upgrade: it is under way"))
	default:
	}
	if err := h.client.Upgrade(ctx, r.Executable); err != nil {
		return api.Conflict(fmt.Errorf("upgrade: %w; the daemon goes on as it is", err))
	}
	d.log.Info("leaving to a successor", "executable", r.Executable)
	close(d.yielded)
	return nil
}

// succeed replaces this worker by one from its own executable, whatever is installed by now,
// unless one comes anyway.
func (d *Daemon) succeed(ctx context.Context) error {
	err := d.Upgrade(ctx, api.UpgradeRequest{Executable: fmt.Sprintf("/proc/%d/exe", os.Getpid())})
	select {
	case <-d.yielded:
		return nil
	default:
		return err
	}
}

// isLost reports whether the kernel is not answered any more though nobody wanted that.
func (d *Daemon) isLost() bool {
	select {
	case <-d.lost:
		return true
	default:
		return false
	}
}

// yield ends d and leaves everything to its successor: what was asked for and not answered,
// too.
func (d *Daemon) yield() error {
	d.kernel.leave(d.stopKernel)
	<-d.lost
	return errors.Join(d.kernelErr, d.close(false), d.o.Holder.client.Yield(context.Background()))
}
