package daemon

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/erofsd/erofsd/fanotify"
)

// guardName is argv[0] of the guard: a process that holds a duplicate of the
// fanotify group and does nothing while the daemon lives. When the daemon dies
// the kernel would let every waiting and later read through, into holes: zeros.
// With the guard the group lives on, and the guard answers EIO until nobody
// has an incomplete file open any more. It also keeps the daemon's lock on
// root, so that no new daemon trusts files that are read through an old mount.
const guardName = "erofsd-guard"

// Descriptors of the guard.
const (
	guardGroupFD = 3
	guardPipeFD  = 4 // its other end closes when the daemon is gone
	guardLockFD  = 5
	guardReadyFD = 6 // gets a byte when the guard is there
)

// IsGuard says that this process was started as a guard; main calls [Guard]
// then and nothing else.
func IsGuard(args []string) bool {
	return len(args) == 2 && args[0] == guardName || len(args) == 3 && args[1] == guardName // systemd-run chooses args[0]
}

// A guard is the daemon's end of the guard process. It may have been started by a
// predecessor of this process.
type guard struct {
	pipe    *os.File  // closing the last of it tells the guard that nobody serves any more
	process *os.File  // pidfd
	cmd     *exec.Cmd // nil when a predecessor started it
}

// dismissTime is how long a guard may take to end.
const dismissTime = 5 * time.Second

// dismiss ends the guard: the daemon ends in order and nobody needs it.
func (g *guard) dismiss() error {
	_, err := g.pipe.Write([]byte{0})
	return errors.Join(err, g.pipe.Close(), g.wait(), g.process.Close())
}

// wait waits for the end of the guard, which still has the lock on the root.
func (g *guard) wait() error {
	if g.cmd != nil {
		return g.cmd.Wait()
	}
	err := g.process.SetReadDeadline(time.Now().Add(dismissTime))
	if err == nil {
		err = awaitEnd(g.process)
	}
	if err != nil {
		return fmt.Errorf("wait for the end of %s: %w", guardName, err)
	}
	return nil
}

// awaitEnd waits until the process of a pidfd has ended: then it is readable.
func awaitEnd(process *os.File) error {
	raw, err := process.SyscallConn()
	if err != nil {
		return err
	}
	return raw.Read(func(fd uintptr) bool {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
		return n > 0 || err != nil && err != unix.EINTR
	})
}

// lives reports whether the guard has not ended.
func (g *guard) lives() bool {
	lives := false
	raw, err := g.process.SyscallConn()
	if err == nil {
		err = raw.Control(func(fd uintptr) {
			n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
			lives = n == 0 && err == nil
		})
	}
	return lives && err == nil
}

// release leaves the guard to whoever else holds its pipe.
func (g *guard) release() error { return errors.Join(g.pipe.Close(), g.process.Close()) }

// Guard runs the guard process and returns its exit code.
func Guard(args []string) int {
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	cache := args[len(args)-1]
	_ = os.WriteFile("/proc/self/comm", []byte(guardName), 0) // only shown
	// It ends when its work does: not with the signals that end the daemon's
	// group, nor when the reader of its log is gone.
	signal.Ignore(syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, syscall.SIGPIPE)
	// The last process to be killed for memory; without the right it stays as it is.
	_ = os.WriteFile("/proc/self/oom_score_adj", []byte("-999"), 0)
	ready := os.NewFile(guardReadyFD, "ready")
	_, err := ready.Write([]byte{0})
	if err := errors.Join(err, ready.Close()); err != nil {
		log.Error("guard: nobody waits for it", "err", err)
		return 1
	}
	var told [1]byte
	if n, _ := os.NewFile(guardPipeFD, "pipe").Read(told[:]); n > 0 {
		return 0
	}
	log.Error("the daemon died; reads of data that are not in the cache fail with EIO until their images are unmounted")
	if err := guardDeny(cache, log); err != nil {
		log.Error("guard", "err", err)
		return 1
	}
	return 0
}

// guardDeny answers EIO to everything until no marked file of cache is in use.
func guardDeny(cache string, log *slog.Logger) error {
	f := os.NewFile(guardGroupFD, "fanotify")
	g, err := fanotify.NewGroupFromFile(f, fanotify.Options{Logger: log})
	if err != nil {
		return err
	}
	if err := g.DenyPending(); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	served := make(chan error, 1)
	go func() { served <- g.Serve(ctx) }() // it knows no file, so it denies every event
	t := time.NewTicker(lingerEvery)
	defer t.Stop()
	for {
		select {
		case err := <-served:
			return err
		case <-t.C:
		}
		used, err := markedInUse(cache)
		if err != nil {
			log.Error("guard: look at the marked files", "err", err)
		}
		if err == nil && !used {
			cancel()
			return errors.Join(<-served, g.Close())
		}
	}
}

// markedInUse says whether a file that the group has marked is open anywhere.
// The marks are those of incomplete blobs. A marked file that is not in cache
// has been deleted there; the kernel drops the mark of such a file with its
// last user (fs/dcache.c dentry_unlink_inode, 6.18).
func markedInUse(cache string) (bool, error) {
	f, err := os.Open("/proc/self/fdinfo/" + strconv.Itoa(guardGroupFD))
	if err != nil {
		return true, err
	}
	defer f.Close()
	marked, err := markedInodes(f)
	if err != nil {
		return true, err
	}
	entries, err := os.ReadDir(cache)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return true, err
	}
	for _, e := range entries {
		info, err := e.Info()
		if err != nil {
			continue // deleted meanwhile
		}
		ino := info.Sys().(*syscall.Stat_t).Ino
		if !marked[ino] {
			continue
		}
		delete(marked, ino)
		if used, err := fileInUse(filepath.Join(cache, e.Name())); used || err != nil {
			return true, err
		}
	}
	return len(marked) > 0, nil
}

func fileInUse(name string) (bool, error) {
	f, err := os.OpenFile(name, os.O_RDWR|syscall.O_NOFOLLOW, 0)
	if err != nil {
		return true, err
	}
	defer f.Close()
	return inUse(f)
}

// markedInodes reads the inode numbers of a group's marks from its fdinfo
// ("fanotify ino:4f969 sdev:800013 …", fs/notify/fdinfo.c, 6.18).
func markedInodes(r io.Reader) (map[uint64]bool, error) {
	out := map[uint64]bool{}
	s := bufio.NewScanner(r)
	for s.Scan() {
		rest, ok := strings.CutPrefix(s.Text(), "fanotify ino:")
		if !ok {
			continue
		}
		hex, _, _ := strings.Cut(rest, " ")
		ino, err := strconv.ParseUint(hex, 16, 64)
		if err != nil {
			return nil, fmt.Errorf("parse fdinfo: %w", err)
		}
		out[ino] = true
	}
	return out, s.Err()
}

// errLocked says that somebody else has the root.
var errLocked = errors.New("lock")

// lockRoot takes root for this daemon, and its guard after it.
func lockRoot(root string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(root, "lock"), os.O_CREATE|os.O_RDWR|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock %s: %w", root, err)
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		f.Close()
		return nil, fmt.Errorf("%w %s: it is in use: another erofsd runs there, or one died and its images are still mounted "+
			"(their missing data read as EIO). Unmount the images whose source is below it (findmnt -t erofs), then start again: %w", errLocked, root, err)
	}
	return f, nil
}
