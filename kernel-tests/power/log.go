package power

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
)

// Flags say what an entry of a log is (drivers/md/dm-log-writes.c).
type Flags uint64

const (
	Flush   Flags = 1 << iota // what was written before is durable
	FUA                       // this write is durable as soon as it has ended
	Discard                   // has no data
	Mark                      // a text for people
	Metadata

	allFlags = Flush | FUA | Discard | Mark | Metadata
)

const (
	magic   = 0x6a736677736872
	version = 1

	superSize = 8 + 8 + 8 + 4 // magic, version, entries, bytes of a sector
	entrySize = 4 * 8         // sector, sectors, flags, length of a mark's text
	// tearSize is the unit that a disk writes whole or not at all.
	tearSize = 512
)

// ErrLog is what every error of Parse is that is not one of reading.
var ErrLog = errors.New("no log of a disk's writes")

// An Entry is one request that the disk got.
type Entry struct {
	Off, N int64 // the bytes of the disk
	Flags  Flags

	at int64 // where the data lie in the log
}

// data says whether the log has the entry's bytes.
func (e *Entry) data() bool { return e.Flags&(Discard|Mark) == 0 && e.N > 0 }

// A Log is all that a disk was asked to write, in the order in which that ended. It is not
// changed after [Parse] and may be used concurrently.
type Log struct {
	Entries []Entry

	r io.ReaderAt
}

// Parse reads the entries of a log of size bytes in the format of dm-log-writes, as QEMU's
// blklogwrites makes it. The log keeps r and reads the data from it. Its memory is a
// fraction of size.
func Parse(r io.ReaderAt, size int64) (*Log, error) {
	var super [superSize]byte
	if size < superSize {
		return nil, fmt.Errorf("%w: %d bytes", ErrLog, size)
	}
	if _, err := r.ReadAt(super[:], 0); err != nil {
		return nil, fmt.Errorf("read the log's superblock: %w", err)
	}
	count, sector := binary.LittleEndian.Uint64(super[16:]), int64(binary.LittleEndian.Uint32(super[24:]))
	switch {
	case binary.LittleEndian.Uint64(super[:]) != magic || binary.LittleEndian.Uint64(super[8:]) != version:
		return nil, fmt.Errorf("%w: it does not start like one", ErrLog)
	case sector < tearSize || sector > 1<<20 || sector&(sector-1) != 0:
		return nil, fmt.Errorf("%w: sectors of %d bytes", ErrLog, sector)
	case count > uint64(size/sector): // an entry takes a sector
		return nil, fmt.Errorf("%w: %d entries in %d bytes", ErrLog, count, size)
	}
	l := &Log{r: r, Entries: make([]Entry, count)}
	at := sector
	for i := range l.Entries {
		e, err := readEntry(r, at, size, sector)
		if err != nil {
			return nil, fmt.Errorf("entry %d of %d: %w", i, count, err)
		}
		l.Entries[i] = e
		if at = e.at; e.data() {
			at += e.N
		}
	}
	return l, nil
}

// readEntry reads the entry at an offset of the log; its data must be there, too.
func readEntry(r io.ReaderAt, at, size, sector int64) (e Entry, err error) {
	if at > size-sector {
		return e, fmt.Errorf("%w: it ends at byte %d", ErrLog, size)
	}
	var head [entrySize]byte
	if _, err := r.ReadAt(head[:], at); err != nil {
		return e, fmt.Errorf("read the log at %d: %w", at, err)
	}
	first, n := binary.LittleEndian.Uint64(head[:]), binary.LittleEndian.Uint64(head[8:])
	if most := uint64(math.MaxInt64 / sector); first > most || n > most-first {
		return e, fmt.Errorf("%w: %d sectors at sector %d", ErrLog, n, first)
	}
	e = Entry{Off: int64(first) * sector, N: int64(n) * sector, Flags: Flags(binary.LittleEndian.Uint64(head[16:])), at: at + sector}
	if e.Flags&^allFlags != 0 {
		return e, fmt.Errorf("%w: flags %#x", ErrLog, uint64(e.Flags))
	}
	if e.data() && e.N > size-e.at {
		return e, fmt.Errorf("%w: %d bytes of data at %d of %d", ErrLog, e.N, e.at, size)
	}
	return e, nil
}

// Replay writes the entries from, up to but without to, whole. Discarded bytes stay as they
// were: a disk may keep them.
func (l *Log) Replay(disk io.WriterAt, from, to int) error {
	for i := from; i < to; i++ {
		e := &l.Entries[i]
		if !e.data() {
			continue
		}
		if err := l.write(disk, e, 0, e.N); err != nil {
			return fmt.Errorf("replay entry %d: %w", i, err)
		}
	}
	return nil
}

// write writes n bytes of an entry, from its byte off on.
func (l *Log) write(disk io.WriterAt, e *Entry, off, n int64) error {
	to := io.NewOffsetWriter(disk, e.Off+off)
	_, err := io.CopyN(to, io.NewSectionReader(l.r, e.at+off, n), n)
	return err
}

// Labels returns for each entry the last text that [Label] gave before it, at offset off of
// the disk; "" before the first.
func (l *Log) Labels(off int64) ([]string, error) {
	list, label := make([]string, len(l.Entries)), ""
	for i := range l.Entries {
		if e := &l.Entries[i]; e.data() && e.Off == off {
			text := make([]byte, min(e.N, labelSize))
			if _, err := l.r.ReadAt(text, e.at); err != nil {
				return nil, fmt.Errorf("read the label of entry %d: %w", i, err)
			}
			text, _, _ = bytes.Cut(text, []byte{0})
			label = string(text)
		}
		list[i] = label
	}
	return list, nil
}

// labelSize is how many bytes of the disk a label takes.
const labelSize = 4096

// Label makes the bytes that, written at the label's place of the disk, name what comes
// after it in the log. The place is one that no file system uses.
func Label(text string) []byte {
	p := make([]byte, labelSize)
	copy(p[:labelSize-1], text)
	return p
}
