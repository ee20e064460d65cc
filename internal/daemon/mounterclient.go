package daemon

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// mounterName is argv[0] of the mounter: the process that runs helpers for a worker which
// is in its sandbox, from where nothing can be mounted. The worker starts it while it still
// can, and the mounter ends with it. It parses nothing but a worker's calls, all of which
// may be hostile, and holds none of the kernel's fds. mounterserver.go is its other half.
const mounterName = "erofsd-mounter"

// Bounds of what a mounter is asked.
const (
	maxHelpers    = 64      // at a time
	maxMountCall  = 1 << 20 // bytes
	maxMountFiles = 4096    // descriptors
	batchFiles    = 128     // descriptors of one message; the kernel takes 253
)

// A mountCall is what a mounter is asked: its length in four bytes goes before it, and the
// files come after it.
type mountCall struct {
	Args  []string `json:"args"` // of the helper
	Files int      `json:"files"`
}

// A mounterProcess is the worker's end of a mounter.
type mounterProcess struct {
	images  string
	control *net.UnixConn
	turns   chan struct{} // one for each call under way
	gone    chan struct{} // closed when it has ended
	cmd     *exec.Cmd
}

// startMounter starts a mounter for images whose bootstraps are in the directory images. It
// mounts at or below the given places only, if there are any.
func startMounter(images string, below ...string) (*mounterProcess, error) {
	ours, theirs, err := socketPair(unix.SOCK_SEQPACKET)
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", mounterName, err)
	}
	defer theirs.Close()
	cmd := exec.Command("/proc/self/exe")
	cmd.Args = append([]string{mounterName, images}, below...)
	cmd.ExtraFiles = []*os.File{theirs}
	cmd.Env = []string{"GOMAXPROCS=1"}
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // a signal to the daemon's group is not for it
	if err := cmd.Start(); err != nil {
		return nil, errors.Join(fmt.Errorf("start %s: %w", mounterName, err), ours.Close())
	}
	m := &mounterProcess{
		images: images, control: ours, cmd: cmd, turns: make(chan struct{}, maxHelpers), gone: make(chan struct{}),
	}
	go func() {
		defer close(m.gone)
		_ = cmd.Wait() // that it ended says it all
	}()
	return m, nil
}

// close ends the mounter.
func (m *mounterProcess) close() error {
	err := m.control.Close()
	<-m.gone
	return err
}

// run has the mounter run a helper, as runHelper does. The gate goes with the call.
func (m *mounterProcess) run(ctx context.Context, files []*os.File, args ...string) error {
	select {
	case m.turns <- struct{}{}:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	defer func() { <-m.turns }()
	res, err := m.call(ctx, files, args)
	switch {
	case (err != nil || res.Error != "") && ctx.Err() != nil:
		return context.Cause(ctx)
	case err != nil:
		select {
		case <-m.gone:
			err = errors.Join(err, errMounterGone)
		default:
		}
		return fmt.Errorf("ask %s to %s: %w", mounterName, args[0], err)
	case res.Error != "":
		return &helperError{res}
	}
	return nil
}

var errMounterGone = errors.New("that process died: restart the daemon (erofsctl upgrade does it with all images mounted)")

// call returns when the helper has ended, or the mounter has.
func (m *mounterProcess) call(ctx context.Context, files []*os.File, args []string) (res helperResult, err error) {
	gate, err := enterGate(m.images)
	if err != nil {
		return res, err
	}
	defer gate.Close()
	conn, theirs, err := socketPair(unix.SOCK_STREAM)
	if err != nil {
		return res, err
	}
	defer conn.Close()
	err = sendFiles(m.control, []*os.File{theirs, gate})
	theirs.Close() // it went, or nothing did
	if err != nil {
		return res, err
	}
	stop := context.AfterFunc(ctx, func() {
		_ = conn.SetWriteDeadline(time.Unix(1, 0)) // what waits ends
		_ = conn.CloseWrite()                      // the mounter kills the helper, and answers
	})
	defer stop()
	text, err := json.Marshal(mountCall{Args: args, Files: len(files)})
	if err != nil {
		return res, err
	}
	if _, err := conn.Write(append(binary.LittleEndian.AppendUint32(nil, uint32(len(text))), text...)); err != nil {
		return res, err
	}
	for len(files) > 0 {
		n := min(len(files), batchFiles)
		if err := sendFiles(conn, files[:n]); err != nil {
			return res, err
		}
		files = files[n:]
	}
	err = json.NewDecoder(io.LimitReader(conn, maxMountCall)).Decode(&res)
	return res, err
}

// sendFiles sends descriptors, with one byte.
func sendFiles(to *net.UnixConn, files []*os.File) error {
	var fds []int
	var send func(rest []*os.File) error
	send = func(rest []*os.File) error { // Control keeps each open meanwhile
		if len(rest) == 0 {
			_, _, err := to.WriteMsgUnix([]byte{0}, unix.UnixRights(fds...), nil)
			return err
		}
		raw, err := rest[0].SyscallConn()
		if err != nil {
			return err
		}
		var serr error
		err = raw.Control(func(fd uintptr) {
			fds = append(fds, int(fd))
			serr = send(rest[1:])
		})
		return errors.Join(err, serr)
	}
	return send(files)
}

// socketPair returns both ends of a connection.
func socketPair(kind int) (ours *net.UnixConn, theirs *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, kind|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, err
	}
	theirs = os.NewFile(uintptr(fds[1]), "socket")
	if ours, err = connOf(fds[0]); err != nil {
		return nil, nil, errors.Join(err, theirs.Close())
	}
	return ours, theirs, nil
}

// connOf makes the socket fd, which it closes, a connection.
func connOf(fd int) (*net.UnixConn, error) {
	f := os.NewFile(uintptr(fd), strconv.Itoa(fd))
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		return nil, err
	}
	u, ok := c.(*net.UnixConn)
	if !ok {
		return nil, errors.Join(errors.New("it is no unix socket"), c.Close())
	}
	return u, nil
}
