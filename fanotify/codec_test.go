package fanotify

import (
	"encoding/hex"
	"errors"
	"math"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/erofsd/erofsd/fanotify/fanotifytest"
)

// captured is an event of a read of 100 bytes at 5000, as Linux 6.18 sent it on
// a little-endian machine: descriptor 11, process 16136.
const captured = "30000000" + "03" + "00" + "1800" + "0000100000000000" + "0b000000" + "083f0000" +
	"06" + "00" + "1800" + "00000000" + "0010000000000000" + "0010000000000000"

func unhex(t testing.TB, s string) []byte {
	t.Helper()
	p, err := hex.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// record is an info record of the given kind whose body is zeros.
func record(kind byte, length uint16, size int) []byte {
	return append([]byte{kind, 0, byte(length), byte(length >> 8)}, make([]byte, size-recordHeaderLen)...)
}

func TestParseEvent(t *testing.T) {
	const mask = 0x100000
	meta := fanotifytest.Metadata
	ok := fanotifytest.Event(9, 28657, 4096, 4096)
	rangeRecord := ok[metadataLen:]
	next := []byte("next")
	for _, c := range []struct {
		name string
		p    []byte
		want event
		rest int // bytes left; -1: unknown
		err  error
	}{
		{"captured", unhex(t, captured), event{mask, 11, 16136, 4096, 4096}, 0, nil},
		{"built", ok, event{mask, 9, 28657, 4096, 4096}, 0, nil},
		{"followed", slices.Concat(ok, next), event{mask, 9, 28657, 4096, 4096}, 4, nil},
		{"count 0", fanotifytest.Event(0, 1, 4096, 0), event{mask, 0, 1, 4096, 0}, 0, nil},
		{"last byte", fanotifytest.Event(9, 1, math.MaxInt64-1, 1), event{mask, 9, 1, math.MaxInt64 - 1, 1}, 0, nil},
		{"unknown record before", slices.Concat(meta(56, 3, 24, mask, 9, 1), record(4, 8, 8), rangeRecord, next), event{mask, 9, 1, 4096, 4096}, 4, nil},
		{"unknown record behind", slices.Concat(meta(56, 3, 24, mask, 9, 1), rangeRecord, record(99, 8, 8)), event{mask, 9, 1, 4096, 4096}, 0, nil},
		{"longer metadata", slices.Concat(meta(56, 3, 32, mask, 9, 1), make([]byte, 8), rangeRecord), event{mask, 9, 1, 4096, 4096}, 0, nil},
		{"overflow", meta(24, 3, 24, unix.FAN_Q_OVERFLOW, noFD, 0), event{unix.FAN_Q_OVERFLOW, noFD, 0, 0, 0}, 0, nil},
		{"no descriptor", fanotifytest.Event(-int32(unix.EMFILE), 1, 0, 4096), event{mask, -int32(unix.EMFILE), 1, 0, 0}, 0, nil},

		{"nothing", nil, event{fd: noFD}, -1, errTruncated},
		{"short metadata", ok[:23], event{fd: noFD}, -1, errTruncated},
		{"longer than the buffer", ok[:47], event{mask, 9, 28657, 0, 0}, -1, errLength},
		{"length 0", slices.Concat(meta(0, 3, 24, mask, 9, 1), rangeRecord), event{mask, 9, 1, 0, 0}, -1, errLength},
		{"length 23", slices.Concat(meta(23, 3, 24, mask, 9, 1), rangeRecord), event{mask, 9, 1, 0, 0}, -1, errLength},
		{"length huge", slices.Concat(meta(math.MaxUint32, 3, 24, mask, 9, 1), rangeRecord), event{mask, 9, 1, 0, 0}, -1, errLength},
		{"version", slices.Concat(meta(48, 4, 24, mask, 9, 1), rangeRecord, next), event{mask, 9, 1, 0, 0}, 4, errVersion},
		{"metadata length small", slices.Concat(meta(48, 3, 20, mask, 9, 1), rangeRecord, next), event{mask, 9, 1, 0, 0}, 4, errLength},
		{"metadata length large", slices.Concat(meta(48, 3, 49, mask, 9, 1), rangeRecord), event{mask, 9, 1, 0, 0}, 0, errLength},
		{"mask", slices.Concat(meta(48, 3, 24, unix.FAN_OPEN_PERM, 9, 1), rangeRecord), event{unix.FAN_OPEN_PERM, 9, 1, 0, 0}, 0, errMask},
		{"no range", meta(24, 3, 24, mask, 9, 1), event{mask, 9, 1, 0, 0}, 0, errNoRange},
		{"other record only", slices.Concat(meta(32, 3, 24, mask, 9, 1), record(4, 8, 8)), event{mask, 9, 1, 0, 0}, 0, errNoRange},
		{"two ranges", slices.Concat(meta(72, 3, 24, mask, 9, 1), rangeRecord, rangeRecord), event{mask, 9, 1, 0, 0}, 0, errRange},
		{"range record short", slices.Concat(meta(40, 3, 24, mask, 9, 1), record(6, 16, 16)), event{mask, 9, 1, 0, 0}, 0, errRange},
		{"record length 0", slices.Concat(meta(48, 3, 24, mask, 9, 1), record(6, 0, 24)), event{mask, 9, 1, 0, 0}, 0, errLength},
		{"record longer than the event", slices.Concat(meta(48, 3, 24, mask, 9, 1), record(6, 25, 24), next), event{mask, 9, 1, 0, 0}, 4, errLength},
		{"record header cut", slices.Concat(meta(50, 3, 24, mask, 9, 1), rangeRecord, make([]byte, 2)), event{mask, 9, 1, 0, 0}, 0, errLength},
		{"offset negative", fanotifytest.Event(9, 1, 1<<63, 1), event{mask, 9, 1, 0, 0}, 0, errRange},
		{"end too far", fanotifytest.Event(9, 1, math.MaxInt64, 1), event{mask, 9, 1, 0, 0}, 0, errRange},
		{"count wraps", fanotifytest.Event(9, 1, 4096, math.MaxUint64-4095), event{mask, 9, 1, 0, 0}, 0, errRange},
	} {
		got, rest, err := parseEvent(c.p)
		left := len(rest)
		if rest == nil {
			left = -1
		}
		if got != c.want || !errors.Is(err, c.err) || left != c.rest {
			t.Errorf("%s: got %+v, %d left, %v; want %+v, %d left, %v", c.name, got, left, err, c.want, c.rest, c.err)
		}
	}
}

func TestEncodeResponse(t *testing.T) {
	if got := encodeResponse(9, allow); hex.EncodeToString(got[:]) != "0900000001000000" {
		t.Errorf("allow: %x", got)
	}
	if got := encodeResponse(0x102, deny); hex.EncodeToString(got[:]) != "0201000002000005" {
		t.Errorf("deny: %x", got)
	}
}

func TestParseDoesNotAllocate(t *testing.T) {
	p := slices.Concat(unhex(t, captured), fanotifytest.Metadata(24, 3, 24, 0x100000, 9, 1))
	if n := testing.AllocsPerRun(100, func() {
		for rest := p; len(rest) > 0; {
			_, rest, _ = parseEvent(rest)
		}
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func FuzzEvents(f *testing.F) {
	one := unhex(f, captured)
	f.Add(one)
	f.Add(slices.Concat(one, one, one))
	f.Add(one[:40])
	f.Add(fanotifytest.Event(-24, 1, 0, 4096))
	f.Add(fanotifytest.Metadata(24, 3, 24, unix.FAN_Q_OVERFLOW, noFD, 0))
	f.Add(slices.Concat(fanotifytest.Metadata(56, 3, 24, 0x100000, 9, 1), record(4, 8, 8), one[metadataLen:]))
	f.Add(slices.Concat(fanotifytest.Metadata(48, 3, 24, 0x100000, 9, 1), record(6, 0, 24)))
	f.Fuzz(func(t *testing.T, p []byte) {
		for rest := p; len(rest) > 0; {
			e, after, err := parseEvent(rest)
			if len(after) > len(rest)-metadataLen && after != nil {
				t.Fatalf("an event of %d bytes", len(rest)-len(after))
			}
			if err == nil && (e.off < 0 || e.n < 0 || e.off+e.n < 0) {
				t.Fatalf("range %d+%d", e.off, e.n)
			}
			if err != nil && (e.off != 0 || e.n != 0) {
				t.Fatalf("range %d+%d of an event that is refused: %v", e.off, e.n, err)
			}
			rest = after
		}
	})
}
