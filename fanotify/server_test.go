package fanotify

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/erofsd/erofsd/fanotify/fanotifytest"
	"github.com/erofsd/erofsd/internal/kernel"
)

// An object is an Object made of functions.
type object struct {
	ready func(off, n int64) bool
	fill  func(ctx context.Context, off, n int64) error
}

func (o *object) Ready(off, n int64) bool { return o.ready != nil && o.ready(off, n) }

func (o *object) Fill(ctx context.Context, off, n int64) error { return o.fill(ctx, off, n) }

var (
	always  = &object{ready: func(int64, int64) bool { return true }}
	filled  = &object{fill: func(context.Context, int64, int64) error { return nil }}
	failing = &object{fill: func(context.Context, int64, int64) error { return errors.New("backend down") }}
	waiting = &object{fill: func(ctx context.Context, _, _ int64) error { <-ctx.Done(); return ctx.Err() }}
)

func fake(t testing.TB, o Options) (*Group, *fanotifytest.Kernel) {
	t.Helper()
	k, f := fanotifytest.New(t)
	g, err := NewFakeGroup(f, k.Mark, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := g.Close(); err != nil {
			t.Error(err)
		}
	})
	return g, k
}

func newFile(t testing.TB) *os.File {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "blob"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func watchNew(t testing.TB, g *Group, o Object) *os.File {
	t.Helper()
	f := newFile(t)
	if err := g.Watch(f, o); err != nil {
		t.Fatal(err)
	}
	return f
}

// Every way through the server, with the answer that the reader gets. The fake
// kernel sees to it that there is exactly one.
func TestAnsweredOnceOnEveryPath(t *testing.T) {
	const mask = 0x100000
	files := func(t *testing.T, g *Group) map[string]*os.File {
		return map[string]*os.File{
			"ready": watchNew(t, g, always), "filled": watchNew(t, g, filled), "failing": watchNew(t, g, failing),
			"waiting": watchNew(t, g, waiting),
			"panics in Fill": watchNew(t, g, &object{fill: func(context.Context, int64, int64) error {
				panic("in Fill")
			}}),
			"panics in Ready": watchNew(t, g, &object{ready: func(int64, int64) bool { panic("in Ready") }}),
			"unknown":         newFile(t),
		}
	}
	for _, c := range []struct {
		file string
		send func(fd int32) []byte // nil: an event of 4096 bytes
		want fanotifytest.Answer
		stat Stats // but for Events and Denied
	}{
		{"ready", nil, fanotifytest.Allow, Stats{Ready: 1, Allowed: 1}},
		{"filled", nil, fanotifytest.Allow, Stats{Filled: 1, Allowed: 1}},
		{"failing", nil, fanotifytest.DenyEIO, Stats{}},
		{"waiting", nil, fanotifytest.DenyEIO, Stats{}},
		{"panics in Fill", nil, fanotifytest.DenyEIO, Stats{}},
		{"panics in Ready", nil, fanotifytest.DenyEIO, Stats{}},
		{"unknown", nil, fanotifytest.DenyEIO, Stats{}},
		{"ready", func(fd int32) []byte { return fanotifytest.Event(fd, fanotifytest.Pid, 4096, 0) }, fanotifytest.DenyEIO, Stats{}},
		{"ready", func(fd int32) []byte { return fanotifytest.Event(fd, fanotifytest.Pid, 1<<63, 1) }, fanotifytest.DenyEIO, Stats{Malformed: 1}},
		{"ready", func(fd int32) []byte { return fanotifytest.Metadata(24, 3, 24, mask, fd, 1) }, fanotifytest.DenyEIO, Stats{Malformed: 1}},
		{"ready", func(fd int32) []byte { return fanotifytest.Metadata(24, 9, 24, mask, fd, 1) }, fanotifytest.DenyEIO, Stats{Malformed: 1}},
		{"ready", func(fd int32) []byte { return fanotifytest.Metadata(0, 3, 24, mask, fd, 1) }, fanotifytest.DenyEIO, Stats{Malformed: 1}},
		{"ready", func(fd int32) []byte { return fanotifytest.Metadata(1<<31, 3, 24, mask, fd, 1) }, fanotifytest.DenyEIO, Stats{Malformed: 1}},
		{"ready", func(fd int32) []byte { return fanotifytest.Metadata(24, 3, 24, unix.FAN_OPEN_PERM, fd, 1) }, fanotifytest.DenyEIO, Stats{Malformed: 1}},
		{"ready", func(fd int32) []byte { return fanotifytest.Metadata(24, 3, 24, unix.FAN_Q_OVERFLOW, fd, 1) }, fanotifytest.DenyEIO, Stats{Overflows: 1}},
		{"filled", func(fd int32) []byte { return fanotifytest.Event(fd, int32(os.Getpid()), 0, 4096) }, fanotifytest.Allow, Stats{Own: 1, Allowed: 1}},
	} {
		var log lockedBuffer
		g, k := fake(t, Options{Deadline: 20 * time.Millisecond, Logger: slog.New(slog.NewTextHandler(&log, nil))})
		f := files(t, g)[c.file]
		stop := serve(t, g)
		r := k.Open(f)
		if c.send == nil {
			k.Send(fanotifytest.Event(r.FD, fanotifytest.Pid, 8192, 4096))
		} else {
			k.Send(c.send(r.FD))
		}
		if got := r.Answer(t); got != c.want {
			t.Errorf("%s: answer %#x, want %#x", c.file, got, c.want)
		}
		if err := stop(); err != nil {
			t.Errorf("%s: %v", c.file, err)
		}
		c.stat.Events = 1
		if c.want != fanotifytest.Allow {
			c.stat.Denied = 1
			if !strings.Contains(log.String(), "read denied") {
				t.Errorf("%s: the denial is not logged: %s", c.file, log.String())
			}
		}
		if got := g.Stats(); got != c.stat {
			t.Errorf("%s: %+v, want %+v", c.file, got, c.stat)
		}
	}
}

type lockedBuffer struct {
	mu sync.Mutex // guards b
	b  bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// Messages that nobody waits for are counted, and the loop goes on.
func TestEventsWithoutDescriptor(t *testing.T) {
	g, k := fake(t, Options{})
	f := watchNew(t, g, always)
	serve(t, g)
	k.Send(fanotifytest.Event(-int32(unix.EMFILE), fanotifytest.Pid, 0, 4096))
	k.Send(fanotifytest.Metadata(24, 3, 24, unix.FAN_Q_OVERFLOW, noFD, 0))
	k.Send([]byte("garbage"))
	k.Send(fanotifytest.Event(noFD, fanotifytest.Pid, 0, 4096)[:40])
	if got := k.Raise(f, 0, 4096).Answer(t); got != fanotifytest.Allow {
		t.Errorf("answer %#x", got)
	}
	want := Stats{Events: 5, Ready: 1, Allowed: 1, Refused: 1, Overflows: 1, Malformed: 2}
	if got := g.Stats(); got != want {
		t.Errorf("%+v, want %+v", got, want)
	}
}

// Many events in one read, a wrong one among them, identical ones too.
func TestBatch(t *testing.T) {
	g, k := fake(t, Options{})
	ready, fill, unknown := watchNew(t, g, always), watchNew(t, g, filled), newFile(t)
	serve(t, g)
	reads := make(map[*fanotifytest.Read]fanotifytest.Answer)
	var p []byte
	for i := range 60 {
		f, want := ready, fanotifytest.Allow
		switch i % 4 {
		case 1:
			f = fill
		case 2:
			f, want = unknown, fanotifytest.DenyEIO
		}
		r := k.Open(f)
		e := fanotifytest.Event(r.FD, fanotifytest.Pid, 4096, 4096)
		if i%4 == 3 {
			e, want = fanotifytest.Metadata(24, 3, 24, 0x100000, r.FD, 1), fanotifytest.DenyEIO
		}
		p, reads[r] = append(p, e...), want
	}
	k.Send(p)
	for r, want := range reads {
		if got := r.Answer(t); got != want {
			t.Errorf("answer %#x, want %#x", got, want)
		}
	}
}

// A Fill that ignores the end of its time holds its slot, but not its reader.
func TestDeadlineDoesNotWaitForFill(t *testing.T) {
	g, k := fake(t, Options{Deadline: 10 * time.Millisecond})
	release := make(chan struct{})
	f := watchNew(t, g, &object{fill: func(context.Context, int64, int64) error { <-release; return nil }})
	serve(t, g)
	if got := k.Raise(f, 0, 4096).Answer(t); got != fanotifytest.DenyEIO {
		t.Errorf("answer %#x", got)
	}
	if n := g.Stats().InFlight; n != 1 {
		t.Errorf("%d in flight, want 1: its goroutine lives", n)
	}
	close(release)
	eventually(t, "the fill ends", func() bool { return g.Stats().InFlight == 0 })
	if st := g.Stats(); st.Filled != 0 || st.Denied != 1 {
		t.Errorf("%+v", st)
	}
}

func TestReaderNeverFetches(t *testing.T) {
	g, k := fake(t, Options{})
	slow, ready := watchNew(t, g, waiting), watchNew(t, g, always)
	stop := serve(t, g)
	var reads []*fanotifytest.Read
	for range 50 {
		reads = append(reads, k.Raise(slow, 0, 4096))
		if got := k.Raise(ready, 0, 4096).Answer(t); got != fanotifytest.Allow {
			t.Fatalf("answer %#x", got)
		}
	}
	if st := g.Stats(); st.InFlight != 50 || st.Ready != 50 {
		t.Errorf("%+v", st)
	}
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	for _, r := range reads {
		if got := r.Answer(t); got != fanotifytest.DenyEIO {
			t.Errorf("answer %#x", got)
		}
	}
}

// At the limit the rest stays in the queue, and comes when there is room.
func TestBounded(t *testing.T) {
	const limit, all = 4, 30
	g, k := fake(t, Options{MaxInFlight: limit})
	var now, most atomic.Int64
	tokens := make(chan struct{})
	f := watchNew(t, g, &object{fill: func(ctx context.Context, _, _ int64) error {
		n := now.Add(1)
		defer now.Add(-1)
		for m := most.Load(); n > m && !most.CompareAndSwap(m, n); m = most.Load() {
		}
		<-tokens
		return nil
	}})
	serve(t, g)
	var reads []*fanotifytest.Read
	for i := range int64(all) {
		reads = append(reads, k.Raise(f, i*4096, 4096))
	}
	eventually(t, "the limit is reached", func() bool { return now.Load() == limit })
	time.Sleep(20 * time.Millisecond)
	if st := g.Stats(); st.Events != limit || st.InFlight != limit {
		t.Errorf("%+v, want %d events taken", st, limit)
	}
	for range all {
		tokens <- struct{}{}
	}
	for _, r := range reads {
		if got := r.Answer(t); got != fanotifytest.Allow {
			t.Errorf("answer %#x", got)
		}
	}
	if n := most.Load(); n != limit {
		t.Errorf("%d fills at a time, want %d", n, limit)
	}
}

// What is in flight and what is queued gets EIO when the context ends, what is
// ready is allowed, and the group can be served again.
func TestServeEndsWithContext(t *testing.T) {
	g, k := fake(t, Options{MaxInFlight: 2})
	slow, ready := watchNew(t, g, waiting), watchNew(t, g, always)
	stop := serve(t, g)
	var denied []*fanotifytest.Read
	for range 10 {
		denied = append(denied, k.Raise(slow, 0, 4096))
	}
	allowed := k.Raise(ready, 0, 4096)
	eventually(t, "the limit is reached", func() bool { return g.Stats().InFlight == 2 })
	if err := g.Serve(context.Background()); err == nil {
		t.Error("served twice at a time")
	}
	if err := g.DenyPending(); err == nil {
		t.Error("swept while served")
	}
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	for _, r := range denied {
		if got, ok := r.Answered(); ok && got != fanotifytest.DenyEIO {
			t.Errorf("answer %#x", got)
		} else if !ok && r.Answer(t) != fanotifytest.DenyEIO {
			t.Error("allowed")
		}
	}
	if got := allowed.Answer(t); got != fanotifytest.Allow {
		t.Errorf("answer %#x to what was ready", got)
	}
	if st := g.Stats(); st.InFlight != 0 || st.Denied != 10 {
		t.Errorf("%+v", st)
	}
	serve(t, g)
	if got := k.Raise(ready, 0, 4096).Answer(t); got != fanotifytest.Allow {
		t.Errorf("answer %#x", got)
	}
}

// A failed read is tried again at once, as EROFS does: that event must not be
// left behind, for Close would let it through. A Fill that hangs holds up Serve,
// but nobody else.
func TestServeAnswersWhatComesAtItsEnd(t *testing.T) {
	g, k := fake(t, Options{})
	release := make(chan struct{})
	hung := &object{fill: func(context.Context, int64, int64) error { <-release; return nil }}
	slow, stuck := watchNew(t, g, waiting), watchNew(t, g, hung)
	stop := serve(t, g)
	first, behind := k.Raise(slow, 0, 4096), k.Raise(stuck, 0, 4096)
	eventually(t, "the fills begin", func() bool { return g.Stats().InFlight == 2 })
	stopped := make(chan error, 1)
	go func() { stopped <- stop() }()
	for _, r := range []*fanotifytest.Read{first, behind, k.Raise(slow, 0, 4096), k.Raise(stuck, 0, 4096)} {
		if got := r.Answer(t); got != fanotifytest.DenyEIO {
			t.Errorf("answer %#x", got)
		}
	}
	select {
	case err := <-stopped:
		t.Errorf("Serve returned before its last Fill: %v", err)
	case <-time.After(2 * drainQuiet):
	}
	close(release)
	if err := <-stopped; err != nil {
		t.Fatal(err)
	}
}

// An already cancelled context still answers the queue.
func TestServeWithDoneContext(t *testing.T) {
	g, k := fake(t, Options{})
	r := k.Raise(watchNew(t, g, filled), 0, 4096)
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := g.Serve(ctx); err != nil {
		t.Fatal(err)
	}
	if got := r.Answer(t); got != fanotifytest.DenyEIO {
		t.Errorf("answer %#x", got)
	}
}

func TestServeEndsWithTheDescriptor(t *testing.T) {
	k, f := fanotifytest.New(t)
	g := newGroup(f, Options{})
	g.mark = k.Mark
	done := make(chan error, 1)
	go func() { done <- g.Serve(context.Background()) }()
	eventually(t, "served", g.serving.Load)
	if err := g.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-done; !errors.Is(err, os.ErrClosed) {
		t.Errorf("Serve of a closed group: %v", err)
	}
	if err := g.Close(); err != nil {
		t.Errorf("second Close: %v", err)
	}
	if err := g.Serve(context.Background()); !errors.Is(err, os.ErrClosed) {
		t.Errorf("Serve after Close: %v", err)
	}
}

func TestServeEndsAtEndOfFile(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	g, err := NewGroupFromFile(r, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer g.Close()
	w.Close()
	if err := g.Serve(context.Background()); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("%v", err)
	}
}

func TestNewGroupFromFileWantsNonBlocking(t *testing.T) {
	f := newFile(t)
	if _, err := NewGroupFromFile(f, Options{}); !errors.Is(err, os.ErrNoDeadline) {
		t.Errorf("%v", err)
	}
	if err := f.Close(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("the file was left open: %v", err)
	}
}

func TestWatchAndUnwatch(t *testing.T) {
	g, k := fake(t, Options{})
	f := newFile(t)
	for range 2 {
		if err := g.Watch(f, always); err != nil {
			t.Fatal(err)
		}
	}
	if err := g.Watch(f, filled); err == nil {
		t.Error("two objects for one file")
	}
	if k.Marks() != 1 {
		t.Errorf("%d marks", k.Marks())
	}
	for range 2 {
		if err := g.Unwatch(f); err != nil {
			t.Fatal(err)
		}
	}
	if k.Marks() != 0 {
		t.Errorf("%d marks after Unwatch", k.Marks())
	}
	late := k.Raise(f, 0, 4096) // was being raised when the mark went
	stop := serve(t, g)
	if got := late.Answer(t); got != fanotifytest.Allow {
		t.Errorf("answer %#x to an event under way at Unwatch", got)
	}
	if err := g.Watch(f, failing); err != nil {
		t.Errorf("another object after Unwatch: %v", err)
	}
	if got := k.Raise(f, 0, 4096).Answer(t); got != fanotifytest.DenyEIO {
		t.Errorf("answer %#x of the second object", got)
	}
	if err := stop(); err != nil {
		t.Fatal(err)
	}

	k.FailMark(unix.EOPNOTSUPP)
	if err := g.Watch(newFile(t), always); !errors.Is(err, kernel.ErrNotSupported) || !strings.Contains(err.Error(), "ext4, xfs or btrfs") {
		t.Errorf("%v", err)
	}
	k.FailMark(unix.EINVAL)
	if err := g.Watch(newFile(t), always); !errors.Is(err, kernel.ErrNotSupported) || !strings.Contains(err.Error(), "CONFIG_FANOTIFY_ACCESS_PERMISSIONS") {
		t.Errorf("%v", err)
	}
	k.FailMark(unix.ENOSPC)
	if err := g.Watch(f, failing); !errors.Is(err, unix.ENOSPC) || errors.Is(err, kernel.ErrNotSupported) {
		t.Errorf("%v", err)
	}
	if err := g.Unwatch(f); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("%v", err)
	}
	if len(g.files) != 1 {
		t.Errorf("%d files are known after refused marks, want the first one", len(g.files))
	}
	k.FailMark(nil)

	dir, err := os.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	if err := g.Watch(dir, always); err == nil {
		t.Error("watched a directory")
	}
	dir.Close()
	if err := g.Watch(dir, always); !errors.Is(err, os.ErrClosed) {
		t.Errorf("a closed file: %v", err)
	}
	if err := g.Unwatch(dir); !errors.Is(err, os.ErrClosed) {
		t.Errorf("a closed file: %v", err)
	}
}

func TestUnwatchedFilesAreForgotten(t *testing.T) {
	g, _ := fake(t, Options{})
	f := watchNew(t, g, always)
	if err := g.Unwatch(f); err != nil {
		t.Fatal(err)
	}
	for id, w := range g.files {
		w.retired = w.retired.Add(-unwatchGrace)
		g.files[id] = w
	}
	watchNew(t, g, always)
	if len(g.files) != 1 {
		t.Errorf("%d files are known, want 1", len(g.files))
	}
}

func TestObserver(t *testing.T) {
	type seen struct {
		op     Op
		failed bool
	}
	got := make(chan seen, 10)
	g, k := fake(t, Options{Observer: func(op Op, d time.Duration, err error) {
		if d < 0 || d > time.Minute {
			t.Errorf("took %v", d)
		}
		got <- seen{op, err != nil}
	}})
	serve(t, g)
	for o, want := range map[*object]seen{always: {OpReady, false}, filled: {OpFill, false}, failing: {OpFill, true}} {
		k.Raise(watchNew(t, g, o), 0, 4096).Answer(t)
		if s := <-got; s != want {
			t.Errorf("observed %v, want %v", s, want)
		}
	}
}

// 10 000 events of random kinds, up to 64 at a time, over files whose
// descriptors get the same numbers again and again. With a journal nothing is left in
// it.
func TestRandomRounds(t *testing.T) {
	t.Run("without a journal", func(t *testing.T) { randomRounds(t, nil) })
	t.Run("with a journal", func(t *testing.T) {
		f := newJournal(t)
		randomRounds(t, f)
		j, err := openJournal(f)
		if err != nil {
			t.Fatal(err)
		}
		defer j.release()
		for e := range j.events() {
			t.Errorf("event %+v is left", e)
		}
		if left := j.left(); len(left) != 0 || j.numbers() == 0 {
			t.Errorf("%d numbers, left %v", j.numbers(), left)
		}
	})
}

func randomRounds(t *testing.T, journal *os.File) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	g, k := fake(t, Options{MaxInFlight: 8, Deadline: 2 * time.Millisecond, Journal: journal})
	either := func(deny fanotifytest.Answer) []fanotifytest.Answer {
		return []fanotifytest.Answer{fanotifytest.Allow, deny}
	}
	kinds := []struct {
		f    *os.File
		want []fanotifytest.Answer
	}{
		{watchNew(t, g, always), either(fanotifytest.Allow)},
		{watchNew(t, g, filled), either(fanotifytest.DenyEIO)}, // the deadline may pass on a busy machine
		{watchNew(t, g, failing), []fanotifytest.Answer{fanotifytest.DenyEIO}},
		{watchNew(t, g, waiting), []fanotifytest.Answer{fanotifytest.DenyEIO}},
		{watchNew(t, g, &object{fill: func(context.Context, int64, int64) error { panic("in Fill") }}), []fanotifytest.Answer{fanotifytest.DenyEIO}},
		{watchNew(t, g, &object{fill: func(ctx context.Context, off, _ int64) error {
			time.Sleep(time.Duration(off%4) * time.Millisecond)
			return nil
		}}), either(fanotifytest.DenyEIO)},
		{newFile(t), []fanotifytest.Answer{fanotifytest.DenyEIO}},
	}
	before := openFDs(t)
	stop := serve(t, g)
	const rounds = 10000
	weights := []int{0, 0, 0, 0, 1, 1, 1, 2, 2, 3, 4, 5, 6}
	var wg sync.WaitGroup
	tokens := make(chan struct{}, 64)
	for range rounds {
		tokens <- struct{}{}
		kind := kinds[weights[rng.IntN(len(weights))]]
		r := k.Raise(kind.f, rng.Int64N(1<<40), 1+rng.Int64N(1<<20))
		wg.Go(func() {
			defer func() { <-tokens }()
			if got := r.Answer(t); got != kind.want[0] && got != kind.want[len(kind.want)-1] {
				t.Errorf("answer %#x, want one of %#x", got, kind.want)
			}
		})
	}
	wg.Wait()
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	st := g.Stats()
	if st.Events != rounds || st.Allowed+st.Denied != rounds || st.Lost+st.Malformed+st.InFlight != 0 || st.Ready == 0 || st.Filled == 0 {
		t.Errorf("%+v", st)
	}
	if now := openFDs(t); now != before {
		t.Errorf("%d descriptors, %d before", now, before)
	}
}

// A ready is a server with a file of which everything is ready, and that answers
// nobody.
type ready struct {
	*server
	fd      int
	message []byte
}

func newReady(t testing.TB, journal *os.File) *ready {
	t.Helper()
	sink, err := os.OpenFile("/dev/null", os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	g := newGroup(sink, Options{Journal: journal, Observer: func(Op, time.Duration, error) {}})
	t.Cleanup(func() { g.Close() })
	g.mark = func(*os.File, uint) error { return nil }
	if journal != nil {
		if g.journal, err = openJournal(journal); err != nil {
			t.Fatal(err)
		}
	}
	r := &ready{fd: int(watchNew(t, g, always).Fd())}
	if r.server, err = newServer(g); err != nil {
		t.Fatal(err)
	}
	r.message = fanotifytest.Event(0, fanotifytest.Pid, 0, 4096)
	return r
}

// take is one event, as one read brings it.
func (r *ready) take(ctx context.Context, now time.Time) {
	dup, err := unix.Dup(r.fd)
	if err != nil {
		panic(err)
	}
	binary.NativeEndian.PutUint32(r.message[16:], uint32(dup))
	r.dispatchAll(ctx, r.buf[:copy(r.buf, r.message)], now)
}

// The hot path: an event whose range is ready.
func TestReadyDoesNotAllocate(t *testing.T) {
	want := 0.0
	if info, ok := debug.ReadBuildInfo(); ok && slices.Contains(info.Settings, debug.BuildSetting{Key: "-race", Value: "true"}) {
		want = 1 // the race detector moves the answer to the heap
	}
	for name, journal := range map[string]*os.File{"without": nil, "with": newJournal(t)} {
		r := newReady(t, journal)
		ctx, now := context.Background(), time.Now()
		if n := testing.AllocsPerRun(100, func() { r.take(ctx, now) }); n > want {
			t.Errorf("%s a journal: %v allocations", name, n)
		}
		if r.Stats().Ready != 101 {
			t.Errorf("%s a journal: %+v", name, r.Stats())
		}
	}
}

// What the journal adds to an event: nothing is read and nobody is answered, so the
// rest is dup(2), fstat(2), write(2) to /dev/null and close(2).
func BenchmarkDispatch(b *testing.B) {
	for _, c := range []struct {
		name    string
		journal *os.File
	}{{"journal=false", nil}, {"journal=true", newJournal(b)}} {
		b.Run(c.name, func(b *testing.B) {
			r := newReady(b, c.journal)
			ctx, now := context.Background(), time.Now()
			b.ReportAllocs()
			for b.Loop() {
				r.take(ctx, now)
			}
		})
	}
}

// The journal alone: an event that is ready, and one that waits for Fill.
func BenchmarkJournal(b *testing.B) {
	j, err := openJournal(newJournal(b))
	if err != nil {
		b.Fatal(err)
	}
	defer j.release()
	message := fanotifytest.Event(20, fanotifytest.Pid, 0, 4096)
	b.Run("ready", func(b *testing.B) {
		for b.Loop() {
			j.use(20)
			j.clear(20)
			j.strike(message)
			clear(j.buffer()[:eventLen])
		}
	})
	b.Run("fill", func(b *testing.B) {
		for b.Loop() {
			j.use(20)
			j.set(20, slotFile, inode{1, 2}, 0, 4096)
			j.strike(message)
			j.clear(20)
			clear(j.buffer()[:eventLen])
		}
	})
}
