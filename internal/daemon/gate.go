package daemon

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// A helper does what it was asked for to its end, also when its worker dies meanwhile. Files
// that EROFS opens while they are not marked never raise events, so a successor must not take
// a mark away, nor look at what is mounted, before the last of them has ended: that is what
// the gate is for. It is a lock on the directory of bootstraps, shared by all who have to do
// with a helper: who calls it, the mounter, and the helper itself.

// gateTime is how long a successor waits for helpers that its predecessor has left.
const gateTime = 10 * time.Second

// enterGate returns what holds the gate until its last descriptor is closed, in whatever
// process. It must be held before a helper is asked for, and by the helper until its end.
func enterGate(images string) (*os.File, error) {
	f, err := os.Open(images)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB); err != nil {
		return nil, errors.Join(fmt.Errorf("lock %s: %w: another daemon begins there", images, err), f.Close())
	}
	return f, nil
}

// passGate waits until no helper of an earlier worker is at work.
func (d *Daemon) passGate(ctx context.Context) error {
	images := filepath.Join(d.o.Root, "images")
	f, err := os.Open(images)
	if err != nil {
		return err
	}
	defer f.Close()
	ctx, cancel := context.WithTimeout(ctx, gateTime)
	defer cancel()
	for told := false; ; told = true {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return err
		}
		if !told {
			d.log.Warn("a process that mounts for the worker before this one is still at work, and is waited for")
		}
		select {
		case <-time.After(time.Millisecond):
		case <-ctx.Done():
			return fmt.Errorf("a process that mounts (%s) for the worker before this one does not end; see whether it waits for a disk, and kill it (fuser %s shows it)", helperName, images)
		}
	}
}
