package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/erofsd/erofsd/internal/config"
)

// A supervisor keeps one descriptor and some bytes for us: who connects and sends gives
// them, who connects and receives gets them back (nydus-snapshotter, pkg/supervisor).
const (
	supervisorTime = 10 * time.Second // for a whole exchange
	maxState       = 64 << 20         // bytes
	stateVersion   = 1
)

// savedState is what a supervisor keeps, beside the device. It has credentials.
type savedState struct {
	Version int          `json:"version"`
	Fscache string       `json:"fscache"` // the kernel's cache directory
	Images  []savedImage `json:"images"`
}

// A savedImage is an image that was bound or mounted.
type savedImage struct {
	Bound  bool            `json:"bound"` // by a name of its own
	Pinned bool            `json:"pinned,omitempty"`
	Entry  json.RawMessage `json:"entry,omitempty"` // config.BlobEntry; empty: its record says all
}

// A saved is what came back.
type saved struct {
	state  savedState
	device *os.File
}

// state returns what a later daemon needs to go on.
func (d *Daemon) state() (savedState, error) {
	s := savedState{Version: stateVersion, Fscache: d.o.cacheDir()}
	d.mu.Lock()
	defer d.mu.Unlock()
	add := func(k imageKey, src *source, c config.Image, bound bool) error {
		saved, err := saveImage(k, src, &c, bound)
		s.Images = append(s.Images, saved)
		return err
	}
	for k, b := range d.bindings {
		if b.left {
			continue
		}
		if err := add(k, b.src, b.config, true); err != nil {
			return s, err
		}
	}
	for k, img := range d.images {
		if img.src == nil || img.src.config == nil || d.bindings[k] != nil {
			continue // its record says all
		}
		if err := add(k, img.src, *img.src.config, false); err != nil {
			return s, err
		}
	}
	return s, nil
}

// saveImage is what a later daemon needs to know of an image; c is nil if its record says all.
func saveImage(k imageKey, src *source, c *config.Image, bound bool) (savedImage, error) {
	s := savedImage{Bound: bound, Pinned: src.record.Pinned}
	if c == nil {
		return s, nil
	}
	var err error
	s.Entry, err = config.BlobEntry{Type: "bootstrap", ID: k.id, DomainID: k.domain, Image: *c, Bootstrap: src.boot}.MarshalState()
	return s, err
}

// sendState gives the state and the device to the supervisor.
func sendState(ctx context.Context, socket string, s savedState, device *os.File) error {
	text, err := json.Marshal(s)
	if err != nil {
		return err
	}
	c, done, err := dialSupervisor(ctx, socket)
	if err != nil {
		return err
	}
	defer done()
	raw, err := device.SyscallConn()
	if err != nil {
		return err
	}
	var n int
	var werr error
	// The descriptor goes with the first bytes.
	err = raw.Control(func(fd uintptr) {
		n, _, werr = c.WriteMsgUnix(text[:min(len(text), 4096)], unix.UnixRights(int(fd)), nil)
	})
	if err = errors.Join(err, werr); err == nil {
		_, err = c.Write(text[n:])
	}
	if err != nil {
		return fmt.Errorf("send state to supervisor at %s: %w", socket, err)
	}
	return c.CloseWrite()
}

// dialSupervisor connects for one exchange; done ends it.
func dialSupervisor(ctx context.Context, socket string) (c *net.UnixConn, done func(), err error) {
	ctx, cancel := context.WithTimeout(ctx, supervisorTime)
	var dialer net.Dialer
	conn, err := dialer.DialContext(ctx, "unix", socket)
	if err != nil {
		cancel()
		return nil, nil, fmt.Errorf("connect to supervisor: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	return conn.(*net.UnixConn), func() {
		stop()
		cancel()
		_ = conn.Close() // it has all, or there was an error already
	}, nil
}

// receiveState gets back what sendState gave. The caller closes the device.
func receiveState(ctx context.Context, socket string) (_ *saved, err error) {
	c, done, err := dialSupervisor(ctx, socket)
	if err != nil {
		return nil, err
	}
	defer done()
	p, oob := make([]byte, 32<<10), make([]byte, unix.CmsgSpace(16*4))
	n, oobn, flags, _, err := c.ReadMsgUnix(p, oob)
	var fds []int
	if err == nil {
		fds, err = rights(oob[:oobn])
	}
	if err == nil && flags&unix.MSG_CTRUNC != 0 {
		err = errors.New("more descriptors came than fit")
	}
	if err != nil || len(fds) == 0 {
		closeAll(fds)
		return nil, errors.Join(errors.New("no control file descriptor came from the supervisor"), err)
	}
	closeAll(fds[1:])
	s := &saved{device: os.NewFile(uintptr(fds[0]), deviceName)}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.device.Close())
		}
	}()
	rest, err := io.ReadAll(io.LimitReader(c, maxState+1))
	if err != nil {
		return nil, fmt.Errorf("receive state: %w", err)
	}
	text := append(p[:n:n], rest...)
	if len(text) > maxState {
		return nil, fmt.Errorf("receive state: it is larger than %d bytes", maxState)
	}
	if err := json.Unmarshal(text, &s.state); err != nil {
		return nil, errors.New("receive state: it is not of erofsd (another daemon's cannot be taken over)")
	}
	if s.state.Version != stateVersion {
		return nil, fmt.Errorf("receive state: it has version %d, this daemon knows %d", s.state.Version, stateVersion)
	}
	return s, isDevice(s.device)
}

// isDevice refuses a descriptor that cannot be /dev/cachefiles.
func isDevice(f *os.File) error {
	st, err := f.Stat()
	if err != nil {
		return err
	}
	if st.Mode()&os.ModeCharDevice == 0 && st.Mode()&os.ModeSocket == 0 { // a socket is the fake one
		return fmt.Errorf("the supervisor sent a descriptor of something else than /dev/cachefiles: %v", st.Mode())
	}
	return nil
}

func rights(oob []byte) (fds []int, err error) {
	messages, err := unix.ParseSocketControlMessage(oob)
	for _, m := range messages {
		some, rerr := unix.ParseUnixRights(&m)
		err = errors.Join(err, rerr)
		fds = append(fds, some...)
	}
	for _, fd := range fds {
		unix.CloseOnExec(fd)
	}
	return fds, err
}

func closeAll(fds []int) {
	for _, fd := range fds {
		unix.Close(fd)
	}
}
