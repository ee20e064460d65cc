package keeper

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// What the keeper holds is limited; a Put beyond a limit fails.
const (
	MaxName    = 255       // bytes of a name
	MaxData    = 128 << 10 // bytes of one entry's data
	MaxEntries = 65536
	MaxBytes   = 64 << 20 // bytes of all names and data
)

// format is what a keeper and a worker of another version must have in common to talk to
// each other, and a keeper to become another one (replace.go).
const format = 1

// maxPath is PATH_MAX, the longest path that the kernel opens.
const maxPath = 4096

// An op says what a message is.
type op byte

const (
	// From the worker. Each is answered with opDone or opFailed.
	opHello   op = iota + 1 // name: the state's version; data: format
	opPut                   // name, data, perhaps a descriptor
	opDrop                  // name
	opReady                 //
	opUpgrade               // data: path
	opAbort                 // gives up the Upgrade that waits
	opYield                 //
	opEnd                   //
	// From the keeper, with the id of what they answer.
	opEntry  // name, data, perhaps a descriptor: before the opDone of opHello
	opDone   //
	opFailed // data: why
	// From the worker again, answered too. Older ones end here.
	opAlive
)

// A message is one packet between worker and keeper: a header, the name, the data.
type message struct {
	op   op
	id   uint32
	name string
	data []byte
	fd   int // -1: none
}

// headerSize: op, 1 when a descriptor comes with it, length of the name (2), id (4).
const headerSize = 8

// maxFDs is for how many descriptors there is room; more than one is an error, and more
// than there is room for are closed by the kernel.
const maxFDs = 4

// A badMessage is a packet that is no message. The connection goes on.
type badMessage struct {
	id  uint32 // 0: it has none
	why string
}

func (e *badMessage) Error() string { return "not understood: " + e.why }

func (m *message) encode() []byte {
	p := make([]byte, headerSize, headerSize+len(m.name)+len(m.data))
	p[0] = byte(m.op)
	if m.fd >= 0 {
		p[1] = 1
	}
	binary.LittleEndian.PutUint16(p[2:], uint16(len(m.name)))
	binary.LittleEndian.PutUint32(p[4:], m.id)
	return append(append(p, m.name...), m.data...)
}

// decode reads p, with which the descriptors came. The message's data is part of p.
func decode(p []byte, fds []int) (message, error) {
	if len(p) < headerSize {
		return message{}, &badMessage{why: fmt.Sprintf("%d bytes are no header", len(p))}
	}
	m := message{op: op(p[0]), id: binary.LittleEndian.Uint32(p[4:]), fd: -1}
	bad := func(why string) (message, error) { return message{}, &badMessage{id: m.id, why: why} }
	n := int(binary.LittleEndian.Uint16(p[2:]))
	switch rest := p[headerSize:]; {
	case m.op == 0 || m.op > opAlive:
		return bad(fmt.Sprintf("operation %d is unknown", m.op))
	case n > MaxName || n > len(rest):
		return bad(fmt.Sprintf("a name of %d bytes in %d", n, len(rest)))
	case len(rest)-n > MaxData:
		return bad(fmt.Sprintf("%d bytes of data, the limit is %d", len(rest)-n, MaxData))
	case p[1] > 1 || len(fds) != int(p[1]):
		return bad(fmt.Sprintf("%d descriptors came, want %d", len(fds), p[1]))
	default:
		m.name, m.data = string(rest[:n]), rest[n:]
	}
	if len(fds) == 1 {
		m.fd = fds[0]
	}
	if why := m.check(); why != "" {
		return bad(why)
	}
	return m, nil
}

// check says what a message of its op must not be.
func (m *message) check() string {
	name, data, file := len(m.name) > 0, len(m.data) > 0, m.fd >= 0
	switch m.op {
	case opPut, opEntry:
		if !name {
			return "an entry without a name"
		}
	case opHello:
		if len(m.data) != 1 || file {
			return "no hello of this protocol"
		}
	case opDrop:
		if !name || data || file {
			return "a name and nothing else is dropped"
		}
	case opUpgrade:
		if name || file || len(m.data) > maxPath || !data || m.data[0] != '/' {
			return "an absolute path and nothing else is upgraded to"
		}
	case opFailed:
		if name || file {
			return "a reason and nothing else"
		}
	default:
		if name || data || file {
			return "nothing comes with it"
		}
	}
	return ""
}

// send writes m as one packet; the descriptor stays the caller's.
func send(c *net.UnixConn, m message) error {
	var oob []byte
	if m.fd >= 0 {
		oob = unix.UnixRights(m.fd)
	}
	_, _, err := c.WriteMsgUnix(m.encode(), oob, nil)
	return err
}

// A receiver reads messages. It is for one goroutine.
type receiver struct {
	conn   *net.UnixConn
	p, oob []byte
}

func newReceiver(c *net.UnixConn) *receiver {
	return &receiver{conn: c, p: make([]byte, headerSize+MaxName+MaxData), oob: make([]byte, unix.CmsgSpace(4*maxFDs))}
}

// next waits for a message. Its data is good until the next call, its descriptor is the
// caller's. After a *badMessage the connection goes on; any other error is its end.
func (r *receiver) next() (message, error) {
	n, oobn, flags, _, err := r.conn.ReadMsgUnix(r.p, r.oob)
	fds, rerr := rights(r.oob[:oobn])
	if err != nil {
		closeAll(fds)
		return message{}, err
	}
	m, err := decode(r.p[:n], fds)
	switch {
	case flags&unix.MSG_TRUNC != 0:
		err = cut(r.p[:n], "it is longer than any message")
	case flags&unix.MSG_CTRUNC != 0:
		err = cut(r.p[:n], "its descriptor did not arrive: too many, or no number is free (RLIMIT_NOFILE)")
	case rerr != nil:
		err = cut(r.p[:n], rerr.Error())
	}
	if err != nil {
		closeAll(fds)
	}
	return m, err
}

// cut is the error of a message that did not arrive as it was sent.
func cut(p []byte, why string) error {
	e := &badMessage{why: why}
	if len(p) >= headerSize {
		e.id = binary.LittleEndian.Uint32(p[4:])
	}
	return e
}

// rights returns every descriptor in oob, also together with an error.
func rights(oob []byte) ([]int, error) {
	list, err := unix.ParseSocketControlMessage(oob)
	var fds []int
	for i := range list {
		some, rerr := unix.ParseUnixRights(&list[i])
		fds, err = append(fds, some...), errors.Join(err, rerr)
	}
	return fds, err
}

func closeAll(fds []int) {
	for _, fd := range fds {
		unix.Close(fd) // nothing was written through it
	}
}

// socketPair returns both ends of a connection.
func socketPair() (ours *net.UnixConn, theirs *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("connect keeper and worker: %w", err)
	}
	theirs = os.NewFile(uintptr(fds[1]), "keeper's socket")
	if ours, err = connOf(os.NewFile(uintptr(fds[0]), "worker's socket")); err != nil {
		theirs.Close()
		return nil, nil, err
	}
	return ours, theirs, nil
}

// connOf makes f, which it closes, a connection.
func connOf(f *os.File) (*net.UnixConn, error) {
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		return nil, fmt.Errorf("use descriptor %s: %w", f.Name(), err)
	}
	u, ok := c.(*net.UnixConn)
	if !ok || u.LocalAddr().Network() != "unixpacket" {
		c.Close()
		return nil, fmt.Errorf("use descriptor %s: it is no unix socket of packets", f.Name())
	}
	return u, nil
}

// withFD runs f with the descriptor of file, -1 for nil.
func withFD(file *os.File, f func(fd int) error) error {
	if file == nil {
		return f(-1)
	}
	raw, err := file.SyscallConn() // Fd would make it blocking, for all that share it
	if err != nil {
		return err
	}
	var ferr error
	err = raw.Control(func(fd uintptr) { ferr = f(int(fd)) })
	return errors.Join(err, ferr)
}

// past is a deadline that ends what waits.
func past() time.Time { return time.Unix(1, 0) }

// ended reports whether err of next is the other side's end.
func ended(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, net.ErrClosed) || errors.Is(err, unix.ECONNRESET)
}
