package power

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
)

// A logWriter makes logs by hand.
type logWriter struct {
	sector  int
	entries int
	body    []byte
}

func (w *logWriter) add(sector, sectors uint64, flags Flags, data []byte) {
	head := make([]byte, w.sector)
	binary.LittleEndian.PutUint64(head, sector)
	binary.LittleEndian.PutUint64(head[8:], sectors)
	binary.LittleEndian.PutUint64(head[16:], uint64(flags))
	w.body = append(append(w.body, head...), data...)
	w.entries++
}

// write adds a write of whole sectors that are full of b.
func (w *logWriter) write(sector, sectors int, flags Flags, b byte) {
	w.add(uint64(sector), uint64(sectors), flags, bytes.Repeat([]byte{b}, sectors*w.sector))
}

func (w *logWriter) flush() { w.add(0, 0, Flush, nil) }

func (w *logWriter) bytes() []byte {
	super := make([]byte, w.sector)
	binary.LittleEndian.PutUint64(super, magic)
	binary.LittleEndian.PutUint64(super[8:], version)
	binary.LittleEndian.PutUint64(super[16:], uint64(w.entries))
	binary.LittleEndian.PutUint32(super[24:], uint32(w.sector))
	return append(super, w.body...)
}

func (w *logWriter) log(t *testing.T) *Log {
	t.Helper()
	p := w.bytes()
	l, err := Parse(bytes.NewReader(p), int64(len(p)))
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// A memory is a disk. It fails beyond its end.
type memory []byte

func (m memory) WriteAt(p []byte, off int64) (int, error) {
	if off < 0 || off+int64(len(p)) > int64(len(m)) {
		return 0, io.ErrShortWrite
	}
	return copy(m[off:], p), nil
}

// String is a letter for each sector; ? is one that is not full of one byte.
func (m memory) String() string {
	var s strings.Builder
	for p := range slices.Chunk(m, tearSize) {
		switch {
		case len(bytes.Trim(p, string(p[:1]))) > 0:
			s.WriteByte('?')
		case p[0] == 0:
			s.WriteByte('.')
		default:
			s.WriteByte(p[0])
		}
	}
	return s.String()
}

func TestReplay(t *testing.T) {
	for _, sector := range []int{512, 1024} {
		w := &logWriter{sector: sector}
		w.write(1, 2, 0, 'a')
		w.add(1, 1, Discard, nil) // keeps the bytes
		w.flush()
		w.add(0, 0, Mark, nil)
		w.write(2, 1, FUA, 'b')
		l := w.log(t)
		if len(l.Entries) != 5 || l.Entries[4].Flags != FUA || l.Entries[4].Off != int64(2*sector) {
			t.Fatalf("entries %+v", l.Entries)
		}
		disk := make(memory, 4*512)
		if sector == 512 {
			if err := l.Replay(disk, 0, 5); err != nil || disk.String() != ".ab." {
				t.Errorf("%v, %v, want .ab.", disk, err)
			}
			if err := l.Replay(disk, 0, 1); err != nil || disk.String() != ".aa." {
				t.Errorf("the first entry again: %v, %v, want .aa.", disk, err)
			}
		}
		if err := l.Replay(disk[:sector], 0, 5); err == nil {
			t.Error("a disk that is too small takes everything")
		}
	}
}

func TestParseRefuses(t *testing.T) {
	good := &logWriter{sector: 512}
	good.write(1, 2, 0, 'a')
	change := func(off int, value uint64) []byte {
		p := good.bytes()
		binary.LittleEndian.PutUint64(p[off:], value)
		return p
	}
	whole := good.bytes()
	for name, p := range map[string][]byte{
		"nothing": nil, "half a superblock": whole[:20], "magic": change(0, 1), "version": change(8, 2),
		"many entries": change(16, 1<<62), "one entry more": change(16, 2), "sectors of a byte": change(24, 1), "sectors of no power": change(24, 513),
		"huge sectors": change(24, 1<<31), "beyond every disk": change(512, 1<<63), "more data than there are": change(520, 3),
		"sectors that overflow": change(520, 1<<55), "flags": change(528, 1<<40), "cut off": whole[:len(whole)-1], "without data": whole[:1024],
	} {
		if _, err := Parse(bytes.NewReader(p), int64(len(p))); !errors.Is(err, ErrLog) {
			t.Errorf("%s: %v", name, err)
		}
	}
	// What changes while it is read is no panic either.
	if _, err := Parse(bytes.NewReader(whole[:520]), int64(len(whole))); err == nil || errors.Is(err, ErrLog) {
		t.Errorf("a log that shrinks: %v", err)
	}
}

// unflushed is a log whose last flush is its third entry.
func unflushed() *logWriter {
	w := &logWriter{sector: 512}
	w.write(16, 1, 0, 'a')
	w.write(17, 1, 0, 'a')
	w.flush()
	w.write(17, 4, 0, 'b')
	w.write(21, 1, FUA, 'c')
	w.write(16, 1, 0, 'd')
	w.write(0, 8, 0, 'e')
	return w
}

func TestLose(t *testing.T) {
	l := unflushed().log(t)
	after := func(c Cut) string {
		disk := make(memory, 22*512)
		if err := l.Replay(disk, 0, c.Durable); err != nil {
			t.Fatal(err)
		}
		there, lost, err := l.Lose(disk, c)
		var all int64
		for i := c.Durable; i < c.At; i++ {
			all += l.Entries[i].N
		}
		if err != nil || there+lost != all {
			t.Fatalf("%d bytes are there and %d lost of %d, %v", there, lost, all, err)
		}
		return disk.String()
	}
	if c := l.Cut(2, LoseNone, 1); c.Durable != 0 {
		t.Errorf("before any flush %d entries are durable", c.Durable)
	}
	if c := l.Cut(3, LoseAll, 1); after(c) != "................aa...." {
		t.Errorf("cut at the flush: %s", after(c))
	}
	const empty = "........"
	if got := after(l.Cut(7, LoseAll, 1)); got != empty+empty+"aa...c" {
		t.Errorf("all are lost, and it is %s", got)
	}
	if got := after(l.Cut(7, LoseNone, 1)); got != "eeeeeeee"+empty+"dbbbbc" {
		t.Errorf("none is lost, and it is %s", got)
	}
	for loss, want := range map[Loss]int{LoseSome: 8, Tear: 64} { // each subset that there is
		seen := map[string]bool{}
		for seed := range uint64(2000) {
			c := l.Cut(7, loss, seed)
			got := after(c)
			if seen[got] = true; got != after(c) {
				t.Fatal("a seed does not say all")
			}
			if got[21] != 'c' || strings.Contains(got, "?") || got[:8] != empty && got[:8] != "eeeeeeee" {
				t.Fatalf("%v: %s", c, got)
			}
		}
		if len(seen) != want {
			t.Errorf("%v: %d disks, want %d: %v", loss, len(seen), want, seen)
		}
	}
}

func TestWaiting(t *testing.T) {
	if got, want := unflushed().log(t).waiting(), []int64{0, 512, 1024, 0, 2048, 2560, 3072, 7168}; !slices.Equal(got, want) {
		t.Errorf("not flushed: %v, want %v", got, want)
	}
}

func TestPick(t *testing.T) {
	const place = 100
	w := &logWriter{sector: 512}
	label := func(text string) { w.add(place, labelSize/512, 0, Label(text)) }
	w.write(1, 1, 0, 'a')
	label("long")
	for range 50 {
		w.write(2, 1, 0, 'b')
	}
	label("short")
	w.flush()
	l := w.log(t)
	labels, err := l.Labels(place * 512)
	if err != nil || labels[0] != "" || labels[1] != "long" || labels[51] != "long" || labels[52] != "short" || labels[53] != "short" {
		t.Fatalf("labels %q, %v", labels, err)
	}
	cuts := l.Pick(rand.New(rand.NewPCG(1, 2)), 40, labels)
	count, losses := map[string]int{}, map[Loss]int{}
	for i, c := range cuts {
		count[c.Label]++
		losses[c.Loss]++
		if c.At < 2 || labels[c.At-1] != c.Label || i > 0 && c.At < cuts[i-1].At {
			t.Errorf("cut %d: %v", i, c)
		}
	}
	if count["long"] != 20 || count["short"] != 20 || len(losses) != 4 {
		t.Errorf("%v, %v", count, losses)
	}
	if cuts := l.Pick(rand.New(rand.NewPCG(1, 2)), 3, make([]string, len(labels))); cuts != nil {
		t.Errorf("cuts without a label: %v", cuts)
	}
}

func FuzzParse(f *testing.F) {
	f.Add(unflushed().bytes())
	f.Add((&logWriter{sector: 1024}).bytes())
	f.Fuzz(func(t *testing.T, p []byte) {
		l, err := Parse(bytes.NewReader(p), int64(len(p)))
		if err != nil {
			return
		}
		if len(l.Entries) > len(p)/tearSize {
			t.Fatalf("%d entries of %d bytes", len(l.Entries), len(p))
		}
		var data int64
		for i := range l.Entries {
			if e := &l.Entries[i]; e.data() {
				data += e.N
			}
		}
		if data > int64(len(p)) {
			t.Fatalf("%d bytes to write out of %d", data, len(p))
		}
		there, lost, err := l.Lose(make(memory, 1<<16), l.Cut(len(l.Entries), Tear, 1))
		if there+lost > data || there < 0 || lost < 0 {
			t.Fatalf("%d bytes there, %d lost of %d, %v", there, lost, data, err)
		}
		if _, err := l.Labels(0); err != nil {
			t.Fatal(err)
		}
	})
}
