package daemon

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"time"
)

// answered reports whether somebody answers at the unix socket; stale says that there is
// one nobody answers at, left by a daemon that died.
func answered(socket string) (live, stale bool) {
	c, err := net.DialTimeout("unix", socket, time.Second)
	if err == nil {
		c.Close()
		return true, false
	}
	st, err := os.Lstat(socket)
	return false, err == nil && st.Mode()&os.ModeSocket != 0
}

// listen opens the API's socket, for root only. A socket that nobody answers at is
// left over from a dead daemon and is replaced.
func listen(socket string) (net.Listener, error) {
	dir := filepath.Dir(socket)
	if _, err := os.Stat(dir); errors.Is(err, os.ErrNotExist) {
		if err := privateDir(dir); err != nil {
			return nil, err
		}
	}
	switch live, stale := answered(socket); {
	case live:
		return nil, fmt.Errorf("listen at %s: another daemon answers there; stop it or choose another socket", socket)
	case stale:
		if err := os.Remove(socket); err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, fmt.Errorf("listen at %s: remove stale socket: %w", socket, err)
		}
	}
	l, err := net.Listen("unix", socket)
	if err != nil {
		return nil, fmt.Errorf("listen at %s: %w", socket, err)
	}
	if err := os.Chmod(socket, 0o600); err != nil {
		return nil, errors.Join(fmt.Errorf("listen at %s: %w", socket, err), l.Close())
	}
	return l, nil
}

// listen opens the API's socket, a predecessor's if there is one: who connects meanwhile
// waits and is not refused.
func (h *Holder) listen(ctx context.Context, socket string) (net.Listener, error) {
	if h == nil {
		return listen(socket)
	}
	h.socket = socket
	if e := h.take(heldListener); e.File != nil {
		defer e.File.Close()
		if string(e.Data) == socket {
			return net.FileListener(e.File)
		}
	}
	l, err := listen(socket)
	if err != nil {
		return nil, err
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false) // a successor listens there
	f, err := l.(*net.UnixListener).File()
	if err == nil {
		err = errors.Join(h.put(ctx, heldListener, []byte(socket), f), f.Close())
	}
	if err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}
