package daemon

import (
	"context"
	"os"

	"golang.org/x/sys/unix"
)

// watchGuard has another guard started when this one dies before ctx is done.
func (c *Control) watchGuard(ctx context.Context) {
	d, err := c.running()
	if err != nil {
		return
	}
	t, ok := d.kernel.(*fanotifyTransport)
	if !ok || t.guard == nil {
		return
	}
	process, err := t.guard.second()
	if err != nil {
		c.log.Warn("the guard is not watched; if it dies the next worker starts another", "err", err)
		return
	}
	stop := context.AfterFunc(ctx, func() { process.Close() }) // ends the wait
	go func() {
		ended := awaitEnd(process) == nil
		if stop() {
			process.Close() // nothing was written to it
		}
		if ended && ctx.Err() == nil {
			c.replaceGuard(ctx, d)
		}
	}()
}

// second returns another descriptor of the guard's process, which the caller closes.
func (g *guard) second() (*os.File, error) {
	raw, err := g.process.SyscallConn()
	if err != nil {
		return nil, err
	}
	var fd int
	var derr error
	if err := raw.Control(func(of uintptr) { fd, derr = unix.FcntlInt(of, unix.F_DUPFD_CLOEXEC, 0) }); err != nil {
		return nil, err
	}
	if derr != nil {
		return nil, derr
	}
	return os.NewFile(uintptr(fd), guardName), nil
}

// replaceGuard has a successor of this worker go on: it starts a guard, which from inside
// the sandbox would be one with fewer rights and no scope of its own.
func (c *Control) replaceGuard(ctx context.Context, d *Daemon) {
	c.log.Error("the guard died; images are served on, and the next worker starts another one")
	if err := d.succeed(ctx); err != nil && ctx.Err() == nil {
		c.log.Error("there is no guard until the daemon is restarted: if it dies too, what is not in the cache reads as zeros", "err", err)
	}
}
