package fanotify

import (
	"encoding/binary"
	"errors"
	"math"

	"golang.org/x/sys/unix"
)

// Sizes of the wire format in bytes (include/uapi/linux/fanotify.h, 6.18). All
// numbers are in the byte order of the host.
const (
	metadataLen     = 24
	recordHeaderLen = 4
	rangeLen        = 24
	eventLen        = metadataLen + rangeLen // of every event of a group with our flags
	responseLen     = 8
)

// noFD stands for "no descriptor" (FAN_NOFD); smaller numbers are errnos
// (FAN_REPORT_FD_ERROR).
const noFD = -1

// Answers. A denial carries its errno in bits 24 to 31; the kernel refuses all
// but a few, and a refused answer leaves the reader waiting. EIO is one of them
// (fs/notify/fanotify/fanotify_user.c, process_access_response, 6.18).
const (
	allow = uint32(unix.FAN_ALLOW)
	deny  = uint32(unix.FAN_DENY) | uint32(unix.EIO)<<24
)

var (
	errTruncated = errors.New("shorter than its metadata")
	errLength    = errors.New("impossible length")
	errVersion   = errors.New("unknown metadata version")
	errMask      = errors.New("not a pre-access event")
	errNoRange   = errors.New("no range record")
	errRange     = errors.New("impossible range")
)

// An event is one decoded message.
type event struct {
	mask   uint64
	fd     int32 // of the file, ours to close; negative: none
	pid    int32 // process that waits; 0: outside our pid namespace
	off, n int64 // range, page aligned outward; may reach past the file's end, n may be 0
}

// overflow says that the queue lost events. A group with FAN_UNLIMITED_QUEUE
// never does.
func (e *event) overflow() bool { return e.mask&unix.FAN_Q_OVERFLOW != 0 }

// parseEvent decodes the first event of p and returns what follows it. It takes
// any input. With an error, e.fd is still the descriptor that has to be
// answered, or noFD; rest is nil when the end of the event is unknown.
func parseEvent(p []byte) (e event, rest []byte, err error) {
	if len(p) < metadataLen {
		return event{fd: noFD}, nil, errTruncated
	}
	order := binary.NativeEndian
	length := order.Uint32(p)
	metadata := int(order.Uint16(p[6:]))
	e = event{
		mask: order.Uint64(p[8:]),
		fd:   int32(order.Uint32(p[16:])),
		pid:  int32(order.Uint32(p[20:])),
	}
	if length < metadataLen || uint64(length) > uint64(len(p)) {
		return e, nil, errLength
	}
	p, rest = p[:length], p[length:]
	switch {
	case p[4] != unix.FANOTIFY_METADATA_VERSION:
		return e, rest, errVersion
	case metadata < metadataLen || metadata > len(p):
		return e, rest, errLength
	case e.overflow() || e.fd < 0:
		return e, rest, nil // nobody waits for an answer, so the range does not matter
	case e.mask != unix.FAN_PRE_ACCESS:
		return e, rest, errMask
	}
	e.off, e.n, err = parseRange(p[metadata:])
	return e, rest, err
}

// parseRange finds the one range record among p, an event's records.
func parseRange(p []byte) (off, n int64, err error) {
	order := binary.NativeEndian
	found := false
	for len(p) > 0 {
		if len(p) < recordHeaderLen {
			return 0, 0, errLength
		}
		kind, length := p[0], int(order.Uint16(p[2:]))
		if length < recordHeaderLen || length > len(p) {
			return 0, 0, errLength
		}
		if kind == unix.FAN_EVENT_INFO_TYPE_RANGE {
			if found || length < rangeLen {
				return 0, 0, errRange
			}
			found = true
			from, count := order.Uint64(p[8:]), order.Uint64(p[16:])
			if from > math.MaxInt64 || count > math.MaxInt64-from {
				return 0, 0, errRange
			}
			off, n = int64(from), int64(count)
		}
		p = p[length:]
	}
	if !found {
		return 0, 0, errNoRange
	}
	return off, n, nil
}

// encodeResponse is the answer to the event with descriptor fd. The kernel takes
// one answer a write and ignores what follows it.
func encodeResponse(fd int32, answer uint32) (p [responseLen]byte) {
	binary.NativeEndian.PutUint32(p[:], uint32(fd))
	binary.NativeEndian.PutUint32(p[4:], answer)
	return p
}
