package cachefiles

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math"
	"strconv"
)

// The wire format (include/uapi/linux/cachefiles.h, 6.1): a header of four
// 32-bit words (id, opcode, length, object), then what the opcode asks for. All
// numbers are in the byte order of the host.
const (
	headerLen = 16
	openLen   = 32 // without the keys
	readLen   = 32

	// largestMessage is CACHEFILES_MSG_MAX_SIZE; no message has more than 539.
	largestMessage = 1024
)

const (
	opOpen  = 0 // CACHEFILES_OP_OPEN
	opClose = 1 // CACHEFILES_OP_CLOSE
	opRead  = 2 // CACHEFILES_OP_READ
)

// iocReadComplete is CACHEFILES_IOC_READ_COMPLETE, _IOW(0x98, 1, int).
const iocReadComplete = 0x40049801

var (
	errTruncated = errors.New("shorter than its header")
	errLength    = errors.New("impossible length")
	errOpcode    = errors.New("unknown opcode")
	errKeys      = errors.New("impossible keys")
	errFD        = errors.New("no file descriptor")
	errRange     = errors.New("impossible range")
)

// A message is one decoded request.
type message struct {
	id     uint32 // 0 is an id as any other
	op     uint32
	object uint32
	key    Key   // OPEN
	fd     int   // OPEN: ours to close; -1: none
	off, n int64 // READ
}

// parse decodes one message. It takes any input. With an error, the header is
// what was found, or zero when it is missing (errTruncated), and fd is still the
// descriptor to close, or -1.
func parse(p []byte) (m message, err error) {
	m.fd = -1
	if len(p) < headerLen {
		return m, errTruncated
	}
	order := binary.NativeEndian
	m.id, m.op, m.object = order.Uint32(p), order.Uint32(p[4:]), order.Uint32(p[12:])
	if m.op == opOpen {
		m.fd = openFD(p)
	}
	if uint64(order.Uint32(p[8:])) != uint64(len(p)) {
		return m, errLength
	}
	switch m.op {
	case opOpen:
		m.key, err = parseKeys(p)
		if err == nil && m.fd < 0 {
			err = errFD
		}
	case opClose:
		if len(p) != headerLen {
			err = errLength
		}
	case opRead:
		m.off, m.n, err = parseRange(p)
	default:
		err = errOpcode
	}
	return m, err
}

// openFD is the descriptor that came with p, or -1 when p carries none: no
// OPEN, too short, or not a number of a descriptor.
func openFD(p []byte) int {
	if len(p) < openLen || binary.NativeEndian.Uint32(p[4:]) != opOpen {
		return -1
	}
	return max(-1, int(int32(binary.NativeEndian.Uint32(p[24:]))))
}

// parseKeys decodes the keys of an OPEN: the volume's with its NUL, the cookie's
// without one.
func parseKeys(p []byte) (Key, error) {
	if len(p) < openLen {
		return Key{}, errLength
	}
	volume, cookie := binary.NativeEndian.Uint32(p[16:]), binary.NativeEndian.Uint32(p[20:])
	p = p[openLen:]
	if uint64(volume)+uint64(cookie) != uint64(len(p)) {
		return Key{}, errKeys
	}
	if volume == 0 || bytes.IndexByte(p[:volume], 0) != int(volume)-1 {
		return Key{}, errKeys
	}
	return Key{Volume: string(p[:volume-1]), Cookie: string(p[volume:])}, nil
}

func parseRange(p []byte) (off, n int64, err error) {
	if len(p) != readLen {
		return 0, 0, errLength
	}
	from, count := binary.NativeEndian.Uint64(p[16:]), binary.NativeEndian.Uint64(p[24:])
	if from > math.MaxInt64 || count > math.MaxInt64-from || count == 0 {
		return 0, 0, errRange
	}
	return int64(from), int64(count), nil
}

// encodeCopen is the answer to an OPEN: a size in bytes, or a negative errno.
func encodeCopen(id uint32, size int64) string {
	return "copen " + strconv.FormatUint(uint64(id), 10) + "," + strconv.FormatInt(size, 10)
}
