package keeper

import (
	"bufio"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// A table is what the keeper holds. Names and data are in a log in a memory file, which
// the next keeper reads when this one becomes it or dies: it is right after each write,
// and a record that was cut off does not count. A table is for one goroutine.
type table struct {
	log   *os.File
	logID uint64
	size  int64 // of the log
	live  int64 // bytes of it that a new log would have
	bytes int   // names and data
	last  uint64
	items map[string]item
	store *manager
}

// An item is an entry in the table.
type item struct {
	name string
	seq  uint64 // order
	id   uint64 // of its descriptor, 0: none
	fd   int    // -1: none
	at   int64  // where its data is in the log
	n    int
}

// A record of the log: checksum of what follows (4), length of the whole (4), put or drop,
// 0, length of the name (2), seq (8), id (8); the name, the data.
const (
	recordSize = 28
	recordPut  = 1
	recordDrop = 2
)

// slack is how much of a log may be garbage beside what is live.
const slack = 4 << 20

// prefix begins the names of our descriptors with the service manager; the log's goes on
// with logPrefix, and all end with a number.
const (
	prefix    = "k-"
	logPrefix = prefix + "log-"
	digits    = 36 // base: the shorter the names, the more there may be
)

func fdName(id uint64) string  { return prefix + strconv.FormatUint(id, digits) }
func logName(id uint64) string { return logPrefix + strconv.FormatUint(id, digits) }

// newTable returns an empty one.
func newTable(store *manager) (*table, error) {
	t := &table{items: make(map[string]item), store: store, last: 1, logID: 1}
	var err error
	if t.log, err = memoryFile("keeper's table"); err != nil {
		return nil, err
	}
	store.storeFile(logName(t.logID), t.log)
	return t, nil
}

func memoryFile(name string) (*os.File, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("make the memory file %q: %w", name, err)
	}
	return os.NewFile(uintptr(fd), name), nil
}

// put holds an entry; the descriptor is the table's from now on, also with an error.
func (t *table) put(name string, data []byte, fd int) error {
	old, replaces := t.items[name]
	i := item{name: name, fd: fd, n: len(data), seq: old.seq}
	size := t.bytes + len(name) + len(data)
	if replaces {
		size -= len(name) + old.n
	} else {
		old.fd = -1
		t.last++
		i.seq = t.last
	}
	if fd >= 0 && replaces && sameFile(fd, old.fd) {
		// The service manager would not take the same file a second time.
		closeAll([]int{fd})
		i.fd, i.id = old.fd, old.id
	} else if fd >= 0 {
		t.last++
		i.id = t.last
	}
	var err error
	switch {
	case !replaces && len(t.items) >= MaxEntries:
		err = fmt.Errorf("the keeper holds %d entries, its limit", len(t.items))
	case size > MaxBytes:
		err = fmt.Errorf("the keeper would hold %d bytes, its limit is %d", size, MaxBytes)
	case i.id != old.id && fd >= 0:
		t.store.storeFD(fdName(i.id), fd)
		fallthrough
	default:
		i.at, err = t.append(recordPut, i, data)
	}
	if err != nil {
		if i.fd >= 0 && i.fd != old.fd {
			t.release(i)
		}
		return err
	}
	t.items[name] = i
	t.bytes = size
	t.live += recordSize + int64(len(name)+i.n)
	if replaces {
		t.live -= recordSize + int64(len(name)+old.n)
	}
	if replaces && old.fd >= 0 && old.id != i.id {
		t.release(old)
	}
	return t.compact()
}

// storeAll has a service manager that has nothing keep all.
func (t *table) storeAll() {
	t.store.storeFile(logName(t.logID), t.log)
	for _, i := range t.items {
		if i.fd >= 0 {
			t.store.storeFD(fdName(i.id), i.fd)
		}
	}
}

// drop lets go of an entry.
func (t *table) drop(name string) error {
	i, found := t.items[name]
	if !found {
		return nil
	}
	if _, err := t.append(recordDrop, i, nil); err != nil {
		return err
	}
	delete(t.items, name)
	t.bytes -= len(name) + i.n
	t.live -= recordSize + int64(len(name)+i.n)
	t.release(i)
	return t.compact()
}

// release lets go of i's descriptor, here and in the service manager.
func (t *table) release(i item) {
	if i.fd < 0 {
		return
	}
	t.store.remove(fdName(i.id))
	closeAll([]int{i.fd})
}

// list returns everything in order.
func (t *table) list() []item {
	return slices.SortedFunc(maps.Values(t.items), func(a, b item) int { return cmp.Compare(a.seq, b.seq) })
}

// data reads the data of i.
func (t *table) data(i item) ([]byte, error) {
	p := make([]byte, i.n)
	if _, err := t.log.ReadAt(p, i.at); err != nil {
		return nil, fmt.Errorf("read %q in the table: %w", i.name, err)
	}
	return p, nil
}

// append adds a record, whole or not at all, and says where its data is.
func (t *table) append(kind byte, i item, data []byte) (int64, error) {
	p := make([]byte, recordSize, recordSize+len(i.name)+len(data))
	p[8] = kind
	binary.LittleEndian.PutUint16(p[10:], uint16(len(i.name)))
	binary.LittleEndian.PutUint64(p[12:], i.seq)
	binary.LittleEndian.PutUint64(p[20:], i.id)
	p = append(append(p, i.name...), data...)
	binary.LittleEndian.PutUint32(p[4:], uint32(len(p)))
	binary.LittleEndian.PutUint32(p, crc32.ChecksumIEEE(p[4:]))
	if _, err := t.log.WriteAt(p, t.size); err != nil {
		return 0, errors.Join(fmt.Errorf("write the table: %w", err), t.log.Truncate(t.size))
	}
	t.size += int64(len(p))
	return t.size - int64(len(data)), nil
}

// compact begins a new log when much of the old one is of no use. The old one goes when
// the new one is complete.
func (t *table) compact() error {
	if t.size <= 2*t.live+slack {
		return nil
	}
	log, err := memoryFile("keeper's table")
	if err != nil {
		return err
	}
	n := &table{log: log, last: t.last + 1, logID: t.last + 1, items: make(map[string]item, len(t.items))}
	for _, i := range t.list() {
		data, err := t.data(i)
		if err == nil {
			i.at, err = n.append(recordPut, i, data)
		}
		if err != nil {
			return errors.Join(err, log.Close())
		}
		n.items[i.name] = i
	}
	t.store.storeFile(logName(n.logID), log)
	t.store.remove(logName(t.logID))
	err = t.log.Close()
	t.log, t.logID, t.size, t.last, t.items = n.log, n.logID, n.size, n.last, n.items
	return err
}

// close ends the table; with release the service manager lets go of it, too.
func (t *table) close(release bool) error {
	for _, i := range t.items {
		if release {
			t.store.remove(fdName(i.id))
		}
		if i.fd >= 0 {
			closeAll([]int{i.fd})
		}
	}
	if release {
		t.store.remove(logName(t.logID))
	}
	return t.log.Close()
}

// loadTable reads a log. The descriptors are by id, and the table takes what it needs out
// of fds. lost are the names whose descriptor is not there: they are not in the table.
func loadTable(store *manager, log *os.File, logID uint64, fds map[uint64]int) (t *table, lost []string, err error) {
	t = &table{log: log, logID: logID, last: logID, items: make(map[string]item), store: store}
	info, err := log.Stat()
	if err != nil {
		return nil, nil, fmt.Errorf("read the table: %w", err)
	}
	for r := bufio.NewReader(io.NewSectionReader(log, 0, info.Size())); ; {
		kind, i, size, err := readRecord(r)
		if err != nil {
			break // where the last keeper was interrupted
		}
		t.last = max(t.last, i.seq, i.id)
		i.at = t.size + size - int64(i.n)
		t.size += size
		delete(t.items, i.name)
		if kind == recordPut {
			t.items[i.name] = i
		}
	}
	if err := log.Truncate(t.size); err != nil {
		return nil, nil, fmt.Errorf("read the table: %w", err)
	}
	for name, i := range t.items {
		fd, found := fds[i.id]
		switch {
		case i.id == 0:
		case found:
			delete(fds, i.id)
			i.fd = fd
			t.items[name] = i
		default:
			delete(t.items, name)
			lost = append(lost, name)
			continue
		}
		t.bytes += len(name) + i.n
		t.live += recordSize + int64(len(name)+i.n)
	}
	slices.Sort(lost)
	return t, lost, nil
}

var errRecord = errors.New("no record")

// readRecord reads one record; its item has no descriptor and no place yet.
func readRecord(r io.Reader) (kind byte, i item, size int64, err error) {
	head := make([]byte, recordSize)
	if _, err := io.ReadFull(r, head); err != nil {
		return 0, i, 0, err
	}
	size = int64(binary.LittleEndian.Uint32(head[4:]))
	name := int64(binary.LittleEndian.Uint16(head[10:]))
	kind = head[8]
	if rest := size - recordSize; name < 1 || name > MaxName || rest < name || rest-name > MaxData || kind < recordPut || kind > recordDrop {
		return 0, i, 0, errRecord
	}
	p := append(head, make([]byte, size-recordSize)...)
	if _, err := io.ReadFull(r, p[recordSize:]); err != nil {
		return 0, i, 0, err
	}
	if binary.LittleEndian.Uint32(p) != crc32.ChecksumIEEE(p[4:]) {
		return 0, i, 0, errRecord
	}
	return kind, item{
		name: string(p[recordSize : recordSize+name]), fd: -1, n: int(size - recordSize - name),
		seq: binary.LittleEndian.Uint64(p[12:]), id: binary.LittleEndian.Uint64(p[20:]),
	}, size, nil
}

// sameFile reports whether two descriptors are of one open file.
func sameFile(a, b int) bool {
	if a < 0 || b < 0 {
		return false
	}
	const kcmpFile = 0 // KCMP_FILE
	pid := uintptr(os.Getpid())
	different, _, errno := unix.Syscall6(unix.SYS_KCMP, pid, pid, kcmpFile, uintptr(a), uintptr(b), 0)
	return errno == 0 && different == 0
}

// number returns the number at the end of a name.
func number(name, prefix string) (uint64, bool) {
	s, found := strings.CutPrefix(name, prefix)
	n, err := strconv.ParseUint(s, digits, 64)
	return n, found && err == nil
}
