package keeper

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// firstListenFD is the first descriptor that a service manager passes (sd_listen_fds(3)).
const firstListenFD = 3

// managerTime is how long a message may wait for a service manager that is busy: the
// keeper itself waits.
const managerTime = time.Second

// managerPause is how long a service manager that was too busy is left alone, so that what
// the keeper has to say does not hold it up again and again.
const managerPause = 10 * time.Second

// managerEnv is what a service manager says to the keeper and to nobody else.
func managerEnv() []string {
	return []string{"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"}
}

// maxPing is the longest time between two signs of life, also where the service manager
// would wait longer: they are how one that was started anew is noticed.
const maxPing = 10 * time.Second

// A manager is the service manager that started the keeper (sd_notify(3)). The nil one
// does nothing. What cannot be told is logged: the keeper goes on without.
type manager struct {
	conn *net.UnixConn // nil: it was away from the beginning
	ping time.Duration // between two signs of life, 0: none are wanted
	log  *slog.Logger

	failing bool      // the last message was not heard
	gone    bool      // nobody has the socket any more
	busy    time.Time // until then nothing is sent
	kept    map[string]bool
	names   int  // bytes that the names of what is kept take
	full    bool // it was said that no name more can be kept
}

// maxNames bounds the names of what is kept: they come back in one variable, which the
// kernel limits to 32 pages (execve(2)). Beyond it the service could not be started.
const maxNames = 120 << 10

// dialManager connects to the service manager, nil if there is none. One that is away just
// when a keeper goes on after its exec is waited for like one that goes away later.
func dialManager(log *slog.Logger) (*manager, error) {
	if os.Getenv("NOTIFY_SOCKET") == "" {
		return nil, nil
	}
	conn, err := dialSocket()
	if _, resumes := os.LookupEnv(envState); err != nil && !resumes {
		return nil, fmt.Errorf("connect to the service manager at NOTIFY_SOCKET: %w", err)
	}
	m := &manager{conn: conn, log: log, kept: make(map[string]bool), failing: err != nil, gone: err != nil}
	pid := os.Getenv("WATCHDOG_PID")
	usec, err := strconv.ParseUint(os.Getenv("WATCHDOG_USEC"), 10, 40)
	if err == nil && usec > 0 && (pid == "" || pid == strconv.Itoa(os.Getpid())) {
		m.ping = min(max(time.Duration(usec)*time.Microsecond/2, time.Millisecond), maxPing)
	}
	return m, nil
}

func dialSocket() (*net.UnixConn, error) {
	socket := os.Getenv("NOTIFY_SOCKET")
	if rest, abstract := strings.CutPrefix(socket, "@"); abstract {
		socket = "\x00" + rest
	}
	return net.DialUnix("unixgram", nil, &net.UnixAddr{Name: socket, Net: "unixgram"})
}

// returned reports whether another service manager is at the socket of one that has gone. It
// has nothing of what was kept.
func (m *manager) returned() bool {
	if m == nil || !m.gone {
		return false
	}
	conn, err := dialSocket()
	if err != nil {
		return false
	}
	m.close()
	m.conn, m.gone = conn, false
	m.kept, m.names, m.full = make(map[string]bool), 0, false
	m.log.Info("there is another service manager; it is given what is held")
	return true
}

// say sends a state.
func (m *manager) say(state string) { m.send(state, -1) }

// storeFD has a descriptor kept. It is not watched for its end: that is not ours to judge.
func (m *manager) storeFD(name string, fd int) {
	if !m.note(name) {
		return
	}
	m.send("FDSTORE=1\nFDNAME="+name+"\nFDPOLL=0\n", fd)
}

// storeFile has f kept.
func (m *manager) storeFile(name string, f *os.File) {
	if m == nil {
		return
	}
	if err := withFD(f, func(fd int) error { m.storeFD(name, fd); return nil }); err != nil {
		m.log.Warn("the service manager does not keep "+name, "err", err)
	}
}

// note counts a name of what is kept. Without one there is no room for it.
func (m *manager) note(name string) bool {
	switch {
	case m == nil:
		return false
	case m.kept[name]:
		return true
	case m.names+len(name)+1 > maxNames:
		if !m.full {
			m.log.Error("the service manager has no room for the names of more files; those of further images are lost if keeper and worker die together", "files", len(m.kept))
		}
		m.full = true
		return false
	}
	m.kept[name] = true
	m.names += len(name) + 1
	return true
}

func (m *manager) remove(name string) {
	if m == nil || !m.kept[name] {
		return
	}
	delete(m.kept, name)
	m.names -= len(name) + 1
	m.send("FDSTOREREMOVE=1\nFDNAME="+name+"\n", -1)
}

func (m *manager) send(text string, fd int) {
	if m == nil {
		return
	}
	var oob []byte
	if fd >= 0 {
		oob = unix.UnixRights(fd)
	}
	err := m.write([]byte(text), oob)
	if err != nil && !m.failing {
		what, _, _ := strings.Cut(text, "\n")
		m.log.Warn("the service manager does not hear "+what, "err", err)
	}
	m.failing = err != nil
	m.gone = m.gone || errors.Is(err, unix.ECONNREFUSED) // it is ENOTCONN from then on
}

// write sends a message; net has nothing that does so on a connected socket.
func (m *manager) write(p, oob []byte) error {
	now := time.Now()
	switch {
	case m.conn == nil:
		return unix.ENOTCONN
	case now.Before(m.busy):
		return errBusy
	}
	if err := m.conn.SetWriteDeadline(now.Add(managerTime)); err != nil {
		return err
	}
	raw, err := m.conn.SyscallConn()
	if err != nil {
		return err
	}
	var serr error
	err = raw.Write(func(fd uintptr) bool {
		serr = unix.Sendmsg(int(fd), p, oob, nil, unix.MSG_NOSIGNAL)
		return !errors.Is(serr, unix.EAGAIN)
	})
	if err != nil { // the deadline: it never was sent
		m.busy = time.Now().Add(managerPause)
		return err
	}
	return serr
}

var errBusy = errors.New("the service manager is busy")

func (m *manager) close() {
	if m != nil && m.conn != nil {
		m.conn.Close() // every message was sent
	}
}

// A left is what a dead keeper left with the service manager: descriptors by number.
type left struct {
	logs, fds map[uint64]int
	newest    uint64 // of logs
	worker    int    // pidfd, -1: none
}

// inherited returns the table that a dead keeper left with the service manager, nil if
// there is none, when its worker has ended. Descriptors of other names are left alone, but
// for their close-on-exec.
func inherited(ctx context.Context, m *manager, log *slog.Logger) (t *table, err error) {
	l, err := m.left()
	if l == nil || err != nil {
		return nil, err
	}
	if fd, found := l.logs[l.newest]; found {
		delete(l.logs, l.newest)
		file := os.NewFile(uintptr(fd), logName(l.newest))
		var lost []string
		if t, lost, err = loadTable(m, file, l.newest, l.fds); err == nil && l.worker >= 0 {
			err = endOrphan(ctx, l.worker, log)
			l.worker = -1
		}
		if err != nil {
			return nil, errors.Join(err, file.Close()) // the service manager keeps it all
		}
		for _, name := range lost {
			log.Error("the service manager did not keep the descriptor of an entry, which is lost; raise FileDescriptorStoreMax=", "object", name)
		}
	}
	if l.worker >= 0 {
		closeAll([]int{l.worker})
	}
	m.forget(l.logs, logName) // a log is complete before an older one is removed
	m.forget(l.fds, fdName)   // they belong to what was never put or already dropped
	return t, nil
}

// left reads what the service manager passed, nil if nothing.
func (m *manager) left() (*left, error) {
	if os.Getenv("LISTEN_PID") != strconv.Itoa(os.Getpid()) {
		return nil, nil
	}
	count, err := strconv.Atoi(os.Getenv("LISTEN_FDS"))
	if err != nil || count < 0 || count > 2*MaxEntries {
		return nil, fmt.Errorf("take over descriptors: LISTEN_FDS is %q, want their number; unset it to start anew", os.Getenv("LISTEN_FDS"))
	}
	names := strings.Split(os.Getenv("LISTEN_FDNAMES"), ":")
	names = append(names, make([]string, max(0, count-len(names)))...)
	l := &left{logs: make(map[uint64]int), fds: make(map[uint64]int), worker: -1}
	for i, name := range names[:count] {
		fd := firstListenFD + i
		unix.CloseOnExec(fd)
		m.note(name)
		if id, ok := number(name, logPrefix); ok {
			l.logs[id] = fd
			l.newest = max(l.newest, id)
		} else if id, ok := number(name, prefix); ok {
			l.fds[id] = fd
		} else if name == workerName {
			l.worker = fd
		}
	}
	return l, nil
}

// forget closes descriptors, here and in the service manager.
func (m *manager) forget(fds map[uint64]int, name func(uint64) string) {
	for id, fd := range fds {
		m.remove(name(id))
		closeAll([]int{fd})
	}
}
