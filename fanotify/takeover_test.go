package fanotify

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"math"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/erofsd/erofsd/fanotify/fanotifytest"
)

// A keeper holds what outlives the owner of a group.
type keeper struct {
	t       testing.TB
	k       *fanotifytest.Kernel
	group   *os.File
	journal *os.File
	j       *journal // its memory, for tests that write what a dead process left
}

func newKeeper(t testing.TB) *keeper {
	t.Helper()
	k, group := fanotifytest.New(t)
	journal := newJournal(t)
	j, err := openJournal(journal)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		j.release()
		group.Close()
	})
	return &keeper{t, k, group, journal, j}
}

func newJournal(t testing.TB) *os.File {
	t.Helper()
	f, err := NewJournal()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// successor makes a group of what is held. die makes it unable to answer, and
// closes it, as the death of its process does.
func (h *keeper) successor(o Options) (g *Group, die func()) {
	h.t.Helper()
	fd, err := unix.FcntlInt(h.group.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		h.t.Fatal(err)
	}
	if err := unix.SetNonblock(fd, true); err != nil { // Fd may have changed it
		h.t.Fatal(err)
	}
	o.Journal = h.journal
	var dead atomic.Bool
	g = newGroup(os.NewFile(uintptr(fd), "group"), o)
	g.mark = h.k.Mark
	g.respond = func(fd int32, answer uint32) error {
		if dead.Load() {
			return os.ErrClosed
		}
		return h.k.Respond(fd, answer)
	}
	g, err = g.begin((*Group).takeOver)
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { g.Close() })
	return g, func() {
		dead.Store(true)
		if err := g.Close(); err != nil {
			h.t.Error(err)
		}
	}
}

// fileID is what a slot says of f's file.
func fileID(t testing.TB, f *os.File) inode {
	t.Helper()
	w, err := fileOf(f, nil)
	if err != nil {
		t.Fatal(err)
	}
	return w.id
}

// The orders in which a process can have died, for one event.
const (
	deadAfterRead   = iota // in the read buffer
	deadAfterSlot          // in the buffer and in its slot
	deadAfterStrike        // in its slot
	deadAfterFillAnswer
	deadAfterClear       // answered, not in the journal
	deadAfterReadyAnswer // answered, still in the buffer
	orders
)

// leave writes what a process left that died with an event on f's file.
func (h *keeper) leave(f *os.File, order int, off, n int64) *fanotifytest.Read {
	h.t.Helper()
	r := h.k.Open(f)
	message := fanotifytest.Event(r.FD, fanotifytest.Pid, uint64(off), uint64(n))
	at := 0
	for p := h.j.buffer(); p[at] != 0; at += len(message) {
	}
	if order == deadAfterRead || order == deadAfterSlot || order == deadAfterReadyAnswer {
		copy(h.j.buffer()[at:], message)
	} else {
		h.j.use(r.FD)
	}
	if order == deadAfterSlot || order == deadAfterStrike || order == deadAfterFillAnswer {
		h.j.set(r.FD, slotFile, fileID(h.t, f), off, n)
	}
	if order >= deadAfterFillAnswer {
		if err := h.k.Respond(r.FD, allow); err != nil {
			h.t.Fatal(err)
		}
	}
	return r
}

// empty says whether the journal knows no event.
func (h *keeper) empty() bool {
	for range h.j.events() {
		return false
	}
	return len(h.j.left()) == 0
}

// Every order, many events, over several generations of processes that die at once:
// each event is answered once, and is allowed only after Fill of its range.
func TestTakeoverAfterEveryOrderOfDeath(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	h := newKeeper(t)
	before := openFDs(t)
	const files, size = 3, 1 << 20
	var list []*os.File
	type extent struct {
		file   int
		off, n int64
	}
	var mu sync.Mutex // guards done
	done := make(map[extent]bool)
	objects := make([]*object, files)
	for i := range objects {
		f := newFile(t)
		if err := f.Truncate(size); err != nil {
			t.Fatal(err)
		}
		list = append(list, f)
		objects[i] = &object{fill: func(_ context.Context, off, n int64) error {
			mu.Lock()
			defer mu.Unlock()
			done[extent{i, off, n}] = true
			return nil
		}}
	}
	for round := range 30 {
		type left struct {
			extent
			order int
			r     *fanotifytest.Read
		}
		var events []left
		for i := range 20 {
			e := left{extent: extent{rng.IntN(files), int64(round*20+i) * 1024, 1 + rng.Int64N(1024)}, order: rng.IntN(orders)}
			if round == 0 && i < orders {
				e.order = i
			}
			e.r = h.leave(list[e.file], e.order, e.off, e.n)
			events = append(events, e)
		}
		for _, e := range events {
			h.k.Orphan(e.r)
		}
		for range rng.IntN(3) { // they die before they serve
			_, die := h.successor(Options{})
			die()
		}
		g, _ := h.successor(Options{MaxInFlight: 1 + rng.IntN(4)})
		for i, f := range list {
			if err := g.Expect(f, objects[i]); err != nil {
				t.Fatal(err)
			}
		}
		stop := serve(t, g)
		if got := h.k.Raise(list[0], 0, 4096).Answer(t); got != fanotifytest.Allow {
			t.Errorf("answer %#x to a new event", got)
		}
		for _, e := range events {
			if got := e.r.Answer(t); got != fanotifytest.Allow {
				t.Errorf("order %d: answer %#x", e.order, got)
			}
			mu.Lock()
			if e.order < deadAfterFillAnswer && !done[e.extent] {
				t.Errorf("order %d: allowed without a Fill of its range in its file", e.order)
			}
			for i := range files {
				if e.order == deadAfterRead && !done[extent{i, e.off, e.n}] {
					t.Errorf("an event of an unknown file was allowed without a Fill of its range in file %d", i)
				}
			}
			mu.Unlock()
		}
		eventually(t, "nothing is left", h.empty)
		if err := stop(); err != nil {
			t.Fatal(err)
		}
		if st := g.Stats(); st.Swept+st.Denied+st.Lost+st.Malformed+st.InFlight != 0 || st.Adopted == 0 {
			t.Fatalf("%+v", st)
		}
		g.Close()
	}
	for _, f := range list {
		f.Close()
	}
	if now := openFDs(t); now != before {
		t.Errorf("%d descriptors, %d before", now, before)
	}
}

// A process that dies with fills under way, and one that dies with those: the third
// answers, and nobody else does.
func TestTakeoverOfAServedGroup(t *testing.T) {
	h := newKeeper(t)
	f := newFile(t)
	var reads []*fanotifytest.Read
	for generation := range 2 {
		g, die := h.successor(Options{})
		hold := make(chan struct{})
		if err := g.Watch(f, &object{fill: func(context.Context, int64, int64) error { <-hold; return nil }}); err != nil {
			t.Fatal(err)
		}
		served := make(chan error, 1)
		go func() { served <- g.Serve(context.Background()) }()
		for i := range int64(10) {
			reads = append(reads, h.k.Raise(f, i*4096, 4096))
		}
		eventually(t, "the fills begin", func() bool { return g.Stats().InFlight == int64(10*(generation+1)) })
		die()
		close(hold)
		if err := <-served; !errors.Is(err, os.ErrClosed) {
			t.Errorf("%v", err)
		}
	}
	for _, r := range reads {
		if got, ok := r.Answered(); ok {
			t.Errorf("answered %#x by a dead process", got)
		}
	}
	g, _ := h.successor(Options{MaxInFlight: 3})
	var fills atomic.Int64
	if err := g.Expect(f, &object{fill: func(context.Context, int64, int64) error { fills.Add(1); return nil }}); err != nil {
		t.Fatal(err)
	}
	serve(t, g)
	for _, r := range reads {
		if got := r.Answer(t); got != fanotifytest.Allow {
			t.Errorf("answer %#x", got)
		}
	}
	if n := fills.Load(); n != 20 {
		t.Errorf("%d fills, want 20", n)
	}
	if st := g.Stats(); st.Adopted != 20 || st.Swept != 0 || st.Denied != 0 {
		t.Errorf("%+v", st)
	}
	eventually(t, "nothing is left", h.empty)
}

// The number of an unanswered event is given to no other; new events are served
// while it is being filled.
func TestTakeoverReservesNumbers(t *testing.T) {
	h := newKeeper(t)
	f, g := newFile(t), newFile(t)
	r := h.leave(f, deadAfterStrike, 0, 4096)
	h.k.Orphan(r)
	reservation, err := Reserve(h.journal)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := unix.FcntlInt(uintptr(r.FD), unix.F_GETFD, 0); err != nil {
		t.Fatalf("number %d is free: %v", r.FD, err)
	}
	group, _ := h.successor(Options{Reservation: reservation})
	hold := make(chan struct{})
	if err := group.Expect(f, &object{fill: func(context.Context, int64, int64) error { <-hold; return nil }}); err != nil {
		t.Fatal(err)
	}
	if err := group.Watch(g, always); err != nil {
		t.Fatal(err)
	}
	stop := serve(t, group)
	for range 20 { // the fake kernel fails the test when one gets a number that waits
		if got := h.k.Raise(g, 0, 4096).Answer(t); got != fanotifytest.Allow {
			t.Errorf("answer %#x", got)
		}
	}
	close(hold)
	if got := r.Answer(t); got != fanotifytest.Allow {
		t.Errorf("answer %#x", got)
	}
	eventually(t, "the number is free", func() bool { return !reservation.holds(r.FD) })
	if err := stop(); err != nil {
		t.Fatal(err)
	}
}

func TestReservationClose(t *testing.T) {
	h := newKeeper(t)
	f := newFile(t)
	before := openFDs(t)
	for _, order := range []int{deadAfterRead, deadAfterSlot} {
		r := h.leave(f, order, 0, 4096)
		h.k.Orphan(r)
		if err := h.k.Respond(r.FD, deny); err != nil {
			t.Fatal(err)
		}
		for range 2 {
			reservation, err := Reserve(h.journal)
			if err != nil {
				t.Fatal(err)
			}
			if !reservation.holds(r.FD) {
				t.Errorf("order %d: %d is not reserved", order, r.FD)
			}
			for range 2 {
				if err := reservation.Close(); err != nil {
					t.Error(err)
				}
			}
		}
		h.j.reset()
	}
	if now := openFDs(t); now != before {
		t.Errorf("%d descriptors, %d before", now, before)
	}
	if _, err := Reserve(f); err == nil {
		t.Error("reserved by a file that is no journal")
	}
}

// What has a number that is in use cannot be kept from new events: they wait, and
// who uses the number is not disturbed.
func TestTakeoverOfANumberInUse(t *testing.T) {
	h := newKeeper(t)
	f, g := newFile(t), newFile(t)
	r := h.leave(f, deadAfterSlot, 0, 4096)
	h.k.Orphan(r)
	null, err := unix.Open("/dev/null", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(null)
	if null != int(r.FD) {
		t.Fatalf("got number %d, want %d", null, r.FD)
	}
	group, _ := h.successor(Options{})
	hold, filling := make(chan struct{}), make(chan struct{})
	if err := group.Expect(f, &object{fill: func(context.Context, int64, int64) error { close(filling); <-hold; return nil }}); err != nil {
		t.Fatal(err)
	}
	if err := group.Watch(g, always); err != nil {
		t.Fatal(err)
	}
	serve(t, group)
	fresh := h.k.Raise(g, 0, 4096)
	<-filling
	time.Sleep(50 * time.Millisecond)
	if st := group.Stats(); st.Events != 0 {
		t.Errorf("read the queue while number %d waits: %+v", r.FD, st)
	}
	close(hold)
	if got := r.Answer(t); got != fanotifytest.Allow {
		t.Errorf("answer %#x", got)
	}
	if got := fresh.Answer(t); got != fanotifytest.Allow {
		t.Errorf("answer %#x", got)
	}
	if _, err := unix.FcntlInt(uintptr(null), unix.F_GETFD, 0); err != nil {
		t.Errorf("somebody else's descriptor was closed: %v", err)
	}
}

// An event of an unknown file needs its range in every file, as far as it has it.
func TestTakeoverOfAnUnknownFile(t *testing.T) {
	type call struct{ off, n int64 }
	for _, c := range []struct {
		name    string
		off, n  int64
		sizes   []int64
		failing int // index of a file, or -1
		why     error
		want    fanotifytest.Answer
		calls   [][]call
	}{
		{"in both", 4096, 8192, []int64{1 << 20, 1 << 20}, -1, nil, fanotifytest.Allow, [][]call{{{4096, 8192}}, {{4096, 8192}}}},
		{"past the end of one", 4096, 8192, []int64{1 << 20, 4096}, -1, nil, fanotifytest.Allow, [][]call{{{4096, 8192}}, nil}},
		{"at the end of one", 4096, 8192, []int64{1 << 20, 4097}, -1, nil, fanotifytest.Allow, [][]call{{{4096, 8192}}, {{4096, 1}}}},
		{"failing in one", 4096, 8192, []int64{1 << 20, 1 << 20}, 1, errors.New("backend down"), fanotifytest.DenyEIO, nil},
		{"one is not open", 4096, 8192, []int64{1 << 20, 1 << 20}, 1, ErrNotOpen, fanotifytest.Allow, [][]call{{{4096, 8192}}, nil}},
		{"none is open", 4096, 8192, []int64{1 << 20}, 0, ErrNotOpen, fanotifytest.DenyEIO, nil},
		{"past all ends", 4096, 8192, []int64{4096, 4096}, -1, nil, fanotifytest.DenyEIO, [][]call{nil, nil}},
		{"no files", 4096, 8192, nil, -1, nil, fanotifytest.DenyEIO, nil},
	} {
		h := newKeeper(t)
		r := h.leave(newFile(t), deadAfterRead, c.off, c.n)
		h.k.Orphan(r)
		g, _ := h.successor(Options{})
		var mu sync.Mutex // guards calls
		calls := make([][]call, len(c.sizes))
		for i, size := range c.sizes {
			f := newFile(t)
			if err := f.Truncate(size); err != nil {
				t.Fatal(err)
			}
			o := &object{fill: func(_ context.Context, off, n int64) error {
				if i == c.failing {
					return c.why
				}
				mu.Lock()
				defer mu.Unlock()
				calls[i] = append(calls[i], call{off, n})
				return nil
			}}
			var err error
			if i == 0 {
				err = g.Watch(f, o)
			} else {
				err = g.Expect(f, o)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		stop := serve(t, g)
		if got := r.Answer(t); got != c.want {
			t.Errorf("%s: answer %#x, want %#x", c.name, got, c.want)
		}
		if err := stop(); err != nil {
			t.Fatal(err)
		}
		if c.calls != nil && !slices.EqualFunc(calls, c.calls, slices.Equal) {
			t.Errorf("%s: fills %v, want %v", c.name, calls, c.calls)
		}
	}
}

// What the journal cannot vouch for is denied, and all else goes on.
func TestTakeoverDeniesWhatItCannotTell(t *testing.T) {
	h := newKeeper(t)
	var log lockedBuffer
	f := newFile(t)
	id := fileID(t, f)
	denied := make(map[string]*fanotifytest.Read)
	buffered := 0
	buffer := func(p []byte) { buffered += copy(h.j.buffer()[buffered:], p) }
	open := func(what string) int32 {
		denied[what] = h.k.Open(f)
		h.j.use(denied[what].FD)
		return denied[what].FD
	}
	good := h.leave(f, deadAfterStrike, 0, 4096)
	open("not in the journal")
	h.j.set(open("negative offset"), slotFile, id, -1, 4096)
	h.j.set(open("no length"), slotFile, id, 0, 0)
	h.j.set(open("too long"), slotUnknown, id, 1, math.MaxInt64)
	h.j.set(open("no state"), 3, id, 0, 4096)
	h.j.set(open("another file"), slotFile, inode{id.dev, id.ino + 1}, 0, 4096)
	two := open("two ranges")
	h.j.set(two, slotFile, id, 0, 4096)
	buffer(fanotifytest.Event(two, fanotifytest.Pid, 0, 8192))
	buffer(fanotifytest.Event(open("truncate"), fanotifytest.Pid, 0, 0))
	buffer(fanotifytest.Metadata(24, 3, 24, 0x100000, open("no range"), 1))
	buffer(fanotifytest.Metadata(1<<30, 3, 24, 0x100000, open("wrong length"), 1))
	for _, r := range denied {
		h.k.Orphan(r)
	}
	h.k.Orphan(good)
	g, _ := h.successor(Options{Logger: slog.New(slog.NewTextHandler(&log, nil))})
	if err := g.Expect(f, filled); err != nil {
		t.Fatal(err)
	}
	stop := serve(t, g)
	for what, r := range denied {
		if got := r.Answer(t); got != fanotifytest.DenyEIO {
			t.Errorf("%s: answer %#x", what, got)
		}
	}
	if got := good.Answer(t); got != fanotifytest.Allow {
		t.Errorf("answer %#x", got)
	}
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	if st := g.Stats(); st.Swept != 1 || st.Adopted != int64(len(denied)) || st.Denied != int64(len(denied)) || st.Filled != 1 || st.Lost != 0 {
		t.Errorf("%+v", st)
	}
	if !strings.Contains(log.String(), "did not know") {
		t.Errorf("the sweep is not logged:\n%s", log.String())
	}
	if !h.empty() {
		t.Error("the journal is not empty")
	}
}

// At the end of Serve what was left gets EIO, like all else.
func TestTakeoverEndsWithContext(t *testing.T) {
	h := newKeeper(t)
	f := newFile(t)
	var reads []*fanotifytest.Read
	for range 5 {
		reads = append(reads, h.leave(f, deadAfterStrike, 0, 4096))
	}
	for _, r := range reads {
		h.k.Orphan(r)
	}
	reservation, err := Reserve(h.journal)
	if err != nil {
		t.Fatal(err)
	}
	g, _ := h.successor(Options{MaxInFlight: 2, Reservation: reservation})
	if err := g.Expect(f, waiting); err != nil {
		t.Fatal(err)
	}
	stop := serve(t, g)
	eventually(t, "the fills begin", func() bool { return g.Stats().InFlight == 2 })
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	for _, r := range reads {
		if got := r.Answer(t); got != fanotifytest.DenyEIO {
			t.Errorf("answer %#x", got)
		}
	}
}

func TestExpect(t *testing.T) {
	g, k := fake(t, Options{})
	f := newFile(t)
	if err := g.Expect(f, failing); err != nil {
		t.Fatal(err)
	}
	if err := g.Expect(f, always); err != nil {
		t.Errorf("another object: %v", err)
	}
	if k.Marks() != 0 {
		t.Error("Expect made a mark")
	}
	stop := serve(t, g)
	if got := k.Raise(f, 0, 4096).Answer(t); got != fanotifytest.Allow {
		t.Errorf("answer %#x", got)
	}
	if err := g.Watch(f, failing); err != nil {
		t.Errorf("Watch of an expected file: %v", err)
	}
	if got := k.Raise(f, 0, 4096).Answer(t); got != fanotifytest.DenyEIO {
		t.Errorf("answer %#x after Watch with another object", got)
	}
	if err := g.Expect(f, always); err == nil {
		t.Error("expected a file that is watched for another object")
	}
	if err := g.Unwatch(f); err != nil {
		t.Error(err)
	}
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	f.Close()
	if err := g.Expect(f, always); !errors.Is(err, os.ErrClosed) {
		t.Errorf("a closed file: %v", err)
	}
}

// A new group has nothing of an old journal.
func TestNewGroupEmptiesTheJournal(t *testing.T) {
	h := newKeeper(t)
	f := newFile(t)
	for order := range orders {
		r := h.leave(f, order, 0, 4096)
		_ = h.k.Respond(r.FD, deny)
		h.k.Orphan(r)
	}
	k, group := fanotifytest.New(t)
	g := newGroup(group, Options{Journal: h.journal})
	g.mark = k.Mark
	g, err := g.begin((*Group).startAfresh)
	if err != nil {
		t.Fatal(err)
	}
	defer g.Close()
	if len(g.left) != 0 || !h.empty() || h.j.numbers() != 0 {
		t.Errorf("left %v, %d numbers", g.left, h.j.numbers())
	}
}

func TestGroupRefusesOtherFilesAsJournal(t *testing.T) {
	memfd := func(size int64) *os.File {
		fd, err := unix.MemfdCreate("other", unix.MFD_CLOEXEC)
		if err != nil {
			t.Fatal(err)
		}
		f := os.NewFile(uintptr(fd), "other")
		t.Cleanup(func() { f.Close() })
		if err := f.Truncate(size); err != nil {
			t.Fatal(err)
		}
		return f
	}
	version := newJournal(t)
	if _, err := version.WriteAt([]byte{journalVersion + 1}, 8); err != nil {
		t.Fatal(err)
	}
	closed := newJournal(t)
	closed.Close()
	for name, c := range map[string]struct {
		f    *os.File
		want string
	}{
		"not a memfd":     {newFile(t), "NewJournal"},
		"too short":       {memfd(1 << 20), "NewJournal"},
		"not sealed":      {memfd(int64(journalLen)), "NewJournal"},
		"another version": {version, "version 2, want 1"},
		"closed":          {closed, "closed"},
	} {
		_, group := fanotifytest.New(t)
		_, err := NewGroupFromFile(group, Options{Journal: c.f})
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", name, err)
		}
		if err := group.Close(); !errors.Is(err, os.ErrClosed) {
			t.Errorf("%s: the group was left open", name)
		}
	}
	j := newJournal(t)
	if err := j.Truncate(0); err == nil {
		t.Error("a journal can be truncated: whoever uses it would die")
	}
}

// What has been answered, or has a slot, is not in the buffer as well: an event that
// is there only would be filled in every file.
func TestDispatchedEventsAreStruckOut(t *testing.T) {
	h := newKeeper(t)
	g, _ := h.successor(Options{})
	var inBuffer, inSlots []int32
	last := &object{ready: func(int64, int64) bool {
		for e := range h.j.events() {
			inBuffer = append(inBuffer, e.fd)
		}
		for _, l := range h.j.left() {
			inSlots = append(inSlots, l.fd)
		}
		return true
	}}
	var reads []*fanotifytest.Read
	var p []byte
	for _, f := range []*os.File{watchNew(t, g, always), watchNew(t, g, waiting), watchNew(t, g, last)} {
		r := h.k.Open(f)
		reads = append(reads, r)
		p = append(p, fanotifytest.Event(r.FD, fanotifytest.Pid, 0, 4096)...)
	}
	h.k.Send(p)
	stop := serve(t, g)
	reads[2].Answer(t)
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	if want := []int32{reads[2].FD}; !slices.Equal(inBuffer, want) {
		t.Errorf("events %v are in the buffer, want %v", inBuffer, want)
	}
	if want := []int32{reads[1].FD}; !slices.Equal(inSlots, want) {
		t.Errorf("events %v have slots, want %v", inSlots, want)
	}
}

// A successor reads the buffer until the first zero: what follows the last event of
// a read is zeros, also after a longer one, and after another Serve.
func TestBufferIsWiped(t *testing.T) {
	h := newKeeper(t)
	g, _ := h.successor(Options{})
	f := watchNew(t, g, always)
	for range 2 {
		stop := serve(t, g)
		for _, events := range []int{5, 1} {
			var p []byte
			var reads []*fanotifytest.Read
			for range events {
				r := h.k.Open(f)
				reads = append(reads, r)
				p = append(p, fanotifytest.Event(r.FD, fanotifytest.Pid, 0, 4096)...)
			}
			h.k.Send(p)
			for _, r := range reads {
				r.Answer(t)
			}
			if p := h.j.buffer()[events*eventLen:]; !bytes.Equal(p, make([]byte, len(p))) {
				t.Errorf("after a read of %d events there is something behind them", events)
			}
		}
		if err := stop(); err != nil {
			t.Fatal(err)
		}
	}
	if !h.empty() {
		t.Error("answered events are left in the journal")
	}
}

// Close while Serve runs: its memory stays until Serve has ended.
func TestJournalIsUnmappedAtTheEnd(t *testing.T) {
	h := newKeeper(t)
	g, die := h.successor(Options{})
	hold := make(chan struct{})
	f := watchNew(t, g, &object{fill: func(context.Context, int64, int64) error { <-hold; return nil }})
	served := make(chan error, 1)
	go func() { served <- g.Serve(context.Background()) }()
	r := h.k.Raise(f, 0, 4096)
	eventually(t, "the fill begins", func() bool { return g.Stats().InFlight == 1 })
	maps := func() int {
		p, err := os.ReadFile("/proc/self/maps")
		if err != nil {
			t.Fatal(err)
		}
		return bytes.Count(p, []byte("erofsd-journal"))
	}
	before := maps()
	die()
	close(hold)
	if err := <-served; !errors.Is(err, os.ErrClosed) {
		t.Errorf("%v", err)
	}
	if now := maps(); now >= before {
		t.Errorf("the journal is mapped %d times, %d before Close", now, before)
	}
	if err := g.Serve(context.Background()); !errors.Is(err, os.ErrClosed) {
		t.Errorf("Serve after Close: %v", err)
	}
	if err := h.k.Respond(r.FD, deny); err != nil {
		t.Error(err)
	}
}

// Any content: no panic, and nothing is allowed that was not filled.
func FuzzJournal(f *testing.F) {
	id := uint64(7)
	f.Add(uint32(40), fanotifytest.Event(30, fanotifytest.Pid, 0, 4096), uint32(slotFile), id, int64(0), int64(4096), true)
	f.Add(uint32(1<<31), fanotifytest.Event(30, fanotifytest.Pid, 4096, 4096)[:40], uint32(slotUnknown), id, int64(-1), int64(4096), true)
	f.Add(uint32(0), bytes.Repeat([]byte{0xff}, 100), uint32(99), uint64(0), int64(math.MaxInt64), int64(1), false)
	f.Fuzz(func(t *testing.T, used uint32, buffer []byte, state uint32, dev uint64, off, n int64, works bool) {
		const number = 30
		used %= 1 << 12 // else each run touches 64 MiB
		file := newJournal(t)
		j, err := openJournal(file)
		if err != nil {
			t.Fatal(err)
		}
		defer j.release()
		j.header.used.Store(used)
		copy(j.buffer(), buffer)
		j.set(number, state, inode{dev, 1}, off, n)
		sink, err := os.OpenFile("/dev/null", os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		g := newGroup(sink, Options{Journal: file})
		defer g.Close()
		if g.journal, err = openJournal(file); err != nil {
			t.Fatal(err)
		}
		type extent struct{ off, n int64 }
		var mu sync.Mutex // guards what follows
		done, answers := make(map[extent]bool), make(map[int32]int)
		ranges := make(map[int32][]extent)
		for e, err := range j.events() {
			if e.fd >= 1<<12 && e.fd < journalSlots {
				t.Skip("slow: a million numbers are swept")
			}
			if err == nil {
				ranges[e.fd] = append(ranges[e.fd], extent{e.off, e.n})
			}
		}
		switch {
		case state == slotUnknown, state == slotFile && dev == 7:
			ranges[number] = append(ranges[number], extent{off, n})
		case state != slotEmpty: // nonsense, or of another file
			ranges[number] = nil
		}
		g.respond = func(fd int32, answer uint32) error {
			mu.Lock()
			defer mu.Unlock()
			if answers[fd]++; answers[fd] > 1 {
				return unix.ENOENT
			}
			if answer != deny && !slices.ContainsFunc(ranges[fd], func(e extent) bool { return done[e] }) {
				t.Errorf("event %d was allowed: filled %v, it may want %v", fd, done, ranges[fd])
			}
			return nil
		}
		g.files[inode{7, 1}] = watched{id: inode{7, 1}, size: math.MaxInt64, object: &object{fill: func(_ context.Context, off, n int64) error {
			if !works {
				return errors.New("backend down")
			}
			mu.Lock()
			defer mu.Unlock()
			done[extent{off, n}] = true
			return nil
		}}}
		if err := g.takeOver(); err != nil {
			t.Fatal(err)
		}
		s, err := newServer(g)
		if err != nil {
			t.Fatal(err)
		}
		first, rest := g.split()
		s.resume(context.Background(), slices.Concat(first, rest))
		s.fills.Wait()
		if left := g.journal.left(); len(left) != 0 {
			t.Errorf("left %v", left)
		}
	})
}
