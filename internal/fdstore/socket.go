package fdstore

import (
	"errors"
	"net"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Bounds of a message: sd_notify(3)'s states, and as many descriptors as SCM_RIGHTS can have.
const (
	maxText  = 8 << 10
	maxInOne = 253
)

// read takes what the service says until the socket is closed.
func (s *Store) read() {
	defer close(s.done)
	raw, err := s.conn.SyscallConn()
	if err != nil {
		s.log.Error("nobody hears erofsd", "err", err)
		return
	}
	text, oob := make([]byte, maxText), make([]byte, unix.CmsgSpace(4*maxInOne))
	_ = raw.Read(func(fd uintptr) bool { // it returns when the socket is closed
		for {
			n, oobn, flags, _, err := unix.Recvmsg(int(fd), text, oob, unix.MSG_DONTWAIT|unix.MSG_CMSG_CLOEXEC)
			switch {
			case errors.Is(err, unix.EINTR):
			case err != nil:
				return !errors.Is(err, unix.EAGAIN)
			default:
				fds := rights(oob[:oobn])
				if flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0 {
					s.log.Error("a message of the service was cut off: raise LimitNOFILE= if it had descriptors", "descriptors", len(fds))
				}
				s.take(string(text[:n]), fds)
			}
		}
	})
}

// rights returns the descriptors of a message.
func rights(oob []byte) (fds []int) {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil // the kernel made it
	}
	for i := range messages {
		some, err := unix.ParseUnixRights(&messages[i])
		if err == nil {
			fds = append(fds, some...)
		}
	}
	return fds
}

// take does what a message says. Its descriptors are the store's.
func (s *Store) take(text string, fds []int) {
	said := map[string]string{}
	for line := range strings.SplitSeq(text, "\n") {
		key, value, _ := strings.Cut(line, "=")
		said[key] = value
	}
	name := said["FDNAME"]
	if !isService(name) {
		name = ""
	}
	switch {
	case said["WATCHDOG"] == "1":
		s.mu.Lock()
		s.beat = time.Now()
		s.mu.Unlock()
	case said["FDSTOREREMOVE"] == "1":
		s.drop(name)
	case said["FDSTORE"] == "1":
		for _, fd := range fds {
			s.store(name, fd)
		}
		return
	}
	for _, fd := range fds { // BARRIER=1 waits for this
		unix.Close(fd)
	}
}

// barrier sends f to the socket at path.
func barrier(path string, f *os.File) error {
	c, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		return err
	}
	defer c.Close()
	return sendFile(c, "BARRIER=1", f)
}
