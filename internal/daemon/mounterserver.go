package daemon

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/moby/sys/mountinfo"

	"github.com/erofsd/erofsd/erofs"
)

// mounterSocketFD is the mounter's connection to its worker.
const mounterSocketFD = 3

// askTime is how long a call may take to arrive.
const askTime = 10 * time.Second

// A mountServer runs helpers for a worker that it does not trust.
type mountServer struct {
	images string   // the directory of bootstraps that may be mounted
	below  []string // the directories where; none: anywhere
}

// runMounter is the mounter's process. It ends with its worker; what helpers are doing then
// they do to their end.
func runMounter(args []string) int {
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	signal.Ignore(syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, syscall.SIGPIPE)
	control, err := connOf(mounterSocketFD)
	if err != nil || len(args) == 0 {
		log.Error(mounterName+" is started by erofsd alone, with the directory of images", "err", err)
		return 1
	}
	s := mountServer{images: args[0], below: args[1:]}
	turns := make(chan struct{}, maxHelpers)
	for {
		turns <- struct{}{}
		conn, gate, err := receiveConn(control)
		if err != nil {
			if !errors.Is(err, io.EOF) && !errors.Is(err, syscall.ECONNRESET) {
				log.Error(mounterName+" ends", "err", err)
			}
			return 0
		}
		go func() {
			defer func() { <-turns }()
			defer gate.Close()
			s.serve(conn, gate)
		}()
	}
}

// receiveConn returns the connection of the next call, and what holds the gate for it.
func receiveConn(control *net.UnixConn) (*net.UnixConn, *os.File, error) {
	files, err := receiveFiles(control)
	if err != nil {
		return nil, nil, err
	}
	if len(files) != 2 {
		closeFiles(files)
		return nil, nil, fmt.Errorf("%d descriptors came, want a connection and the gate", len(files))
	}
	defer files[0].Close()
	c, err := net.FileConn(files[0])
	if err != nil {
		return nil, nil, errors.Join(err, files[1].Close())
	}
	u, ok := c.(*net.UnixConn)
	if !ok {
		return nil, nil, errors.Join(errors.New("it is no unix socket"), c.Close(), files[1].Close())
	}
	return u, files[1], nil
}

// serve answers the one call that comes by conn. When conn ends before the answer, the
// helper is killed.
func (s mountServer) serve(conn *net.UnixConn, gate *os.File) {
	defer conn.Close()
	call, files, err := receiveCall(conn)
	if err == nil {
		err = s.check(call, files)
	}
	if err == nil {
		ctx, cancel := context.WithCancel(context.Background())
		defer cancel()
		go func() {
			defer cancel()
			_, _ = conn.Read(make([]byte, 1)) // nothing more comes, but the end
		}()
		err = runHelper(ctx, gate, files, call.Args...)
	}
	closeFiles(files) // before the answer: who gets it may ask whether they are in use
	var res helperResult
	if err != nil {
		res.Error = err.Error()
		errors.As(err, &res.Errno)
	}
	_ = json.NewEncoder(conn).Encode(res) // who does not wait for it does not need it
}

// receiveCall reads a call and its files. The files are to be closed, also after an error.
func receiveCall(conn *net.UnixConn) (call mountCall, files []*os.File, err error) {
	if err := conn.SetDeadline(time.Now().Add(askTime)); err != nil {
		return call, nil, err
	}
	var length [4]byte
	if _, err := io.ReadFull(conn, length[:]); err != nil {
		return call, nil, err
	}
	n := binary.LittleEndian.Uint32(length[:])
	if n > maxMountCall {
		return call, nil, fmt.Errorf("a call of %d bytes, at most %d are allowed", n, maxMountCall)
	}
	text := make([]byte, n)
	if _, err := io.ReadFull(conn, text); err != nil {
		return call, nil, err
	}
	if err := json.Unmarshal(text, &call); err != nil {
		return call, nil, err
	}
	if call.Files < 0 || call.Files > maxMountFiles {
		return call, nil, fmt.Errorf("a call with %d descriptors, at most %d are allowed", call.Files, maxMountFiles)
	}
	for len(files) < call.Files {
		more, err := receiveFiles(conn)
		files = append(files, more...)
		if err != nil {
			return call, files, err
		}
	}
	return call, files, conn.SetDeadline(time.Time{})
}

// receiveFiles receives what sendFiles sent.
func receiveFiles(conn *net.UnixConn) ([]*os.File, error) {
	p, oob := make([]byte, 1), make([]byte, syscall.CmsgSpace(batchFiles*4))
	_, n, flags, _, err := conn.ReadMsgUnix(p, oob)
	if err != nil {
		return nil, err
	}
	fds, err := rights(oob[:n])
	var files []*os.File
	for _, fd := range fds {
		files = append(files, os.NewFile(uintptr(fd), "descriptor of a worker"))
	}
	if flags&syscall.MSG_CTRUNC != 0 || len(fds) == 0 {
		err = errors.Join(err, errors.New("descriptors are missing"))
	}
	return files, err
}

func closeFiles(files []*os.File) {
	for _, f := range files {
		f.Close() // nothing was written through it
	}
}

// check refuses what a worker never asks for: a mount of something else than a bootstrap of
// its own, or a change of a mount that is not of its images.
func (s mountServer) check(c mountCall, files []*os.File) error {
	if len(c.Args) < 2 {
		return fmt.Errorf("a call of %q", c.Args)
	}
	operation, args, want := c.Args[0], c.Args[1:], 0
	var err error
	switch operation {
	case "mount-files":
		if len(args) != 2 || len(files) < 2 || args[1] != strconv.Itoa(len(files)-2) {
			return fmt.Errorf("%s %q with %d descriptors", operation, args, len(files))
		}
		want = len(files)
		err = errors.Join(s.isBootstrap(args[0], files[1]), areRegular(files[1:]), s.isPlace(files[0]))
	case "mount-fscache":
		want = 1
		err = errors.Join(s.isBootstrap(args[0], nil), s.isPlace(files...))
	case "clone":
		want = 1
		err = errors.Join(s.isMounted(args[0]), s.isPlace(files...))
	case "unmount", "detach":
		err = s.isMounted(args[0])
	default:
		return fmt.Errorf("unknown operation %q", operation)
	}
	if err == nil && len(files) != want {
		err = fmt.Errorf("%d descriptors, want %d", len(files), want)
	}
	if err != nil {
		return fmt.Errorf("%s refuses to %s %s: %w", mounterName, operation, args[0], err)
	}
	return nil
}

// isBootstrap refuses a name that is not directly in the directory of images, and one that
// is not the file's.
func (s mountServer) isBootstrap(name string, file *os.File) error {
	if filepath.Dir(name) != s.images || !strings.HasSuffix(name, bootSuffix) {
		return fmt.Errorf("it is no bootstrap in %s", s.images)
	}
	if file == nil {
		return nil
	}
	root, err := os.OpenRoot(s.images)
	if err != nil {
		return err
	}
	defer root.Close()
	named, err := root.Lstat(filepath.Base(name))
	if err != nil {
		return err
	}
	opened, err := file.Stat()
	if err == nil && !os.SameFile(named, opened) {
		err = errors.New("another file was opened")
	}
	return err
}

func areRegular(files []*os.File) error {
	for i, f := range files {
		if st, err := f.Stat(); err != nil || !st.Mode().IsRegular() {
			return errors.Join(fmt.Errorf("file %d is no regular file", i), err)
		}
	}
	return nil
}

// isPlace refuses what is not one directory, where mounting is allowed.
func (s mountServer) isPlace(files ...*os.File) error {
	if len(files) != 1 {
		return errors.New("there is no mount point")
	}
	if st, err := files[0].Stat(); err != nil || !st.IsDir() {
		return errors.Join(errors.New("the mount point is no directory"), err)
	}
	if len(s.below) == 0 {
		return nil
	}
	place, err := os.Readlink(fdPath(int(files[0].Fd()))) // as the kernel knows it
	if err != nil {
		return err
	}
	for _, dir := range s.below {
		if dir, err := filepath.EvalSymlinks(dir); err == nil && strings.HasPrefix(place+"/", strings.TrimSuffix(dir, "/")+"/") {
			return nil
		}
	}
	return fmt.Errorf("mount point %s is not below %s (daemon.mount_below of the configuration)", place, strings.Join(s.below, " or "))
}

// isMounted refuses a place where no image of the worker is mounted, as the table of mounts
// has it.
func (s mountServer) isMounted(point string) error {
	var last *mountinfo.Info
	_, err := mountinfo.GetMounts(func(i *mountinfo.Info) (skip, stop bool) {
		if i.Mountpoint == point {
			last = i
		}
		return true, false
	})
	switch {
	case err != nil:
		return fmt.Errorf("read the table of mounts: %w", err)
	case last == nil:
		return &os.PathError{Op: "find mount", Path: point, Err: syscall.EINVAL} // as umount(2) says it
	case last.FSType != "erofs" || !s.isSource(last.Source):
		return fmt.Errorf("%s of %s is mounted there, not an image of %s", last.FSType, last.Source, s.images)
	}
	return nil
}

// isSource reports whether source can be what the table of mounts shows of our mounts.
func (s mountServer) isSource(source string) bool {
	if filepath.Dir(source) == s.images || source == fdPath(helperBootFD) {
		return true
	}
	// A name is shown only where it is short enough (helperRun).
	return len(s.images)+len("/")+maxDomain+len(",")+maxDomain+len(bootSuffix) > erofs.MaxMountValue && !strings.Contains(source, "/")
}
