package backend_test

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/erofsd/erofsd/backend"
	"github.com/erofsd/erofsd/backend/backendtest"
	"github.com/erofsd/erofsd/internal/testenv"
)

// A watched store counts its calls and fails them on demand.
type watched struct {
	backendtest.Toggle
	backendtest.Counter
	store backend.Store
	pings atomic.Int64
	down  atomic.Bool // pings fail
}

func newWatched(s backend.Store) *watched {
	w := new(watched)
	w.store = backendtest.Inject(backendtest.Inject(s, w.Toggle.Fault), w.Counter.Fault)
	return w
}

func (w *watched) ping(context.Context) error {
	w.pings.Add(1)
	if w.down.Load() {
		return syscall.ECONNREFUSED
	}
	return nil
}

// TestMirrorOrder: the first that is well is asked; each read tries all before it fails.
func TestMirrorOrder(t *testing.T) {
	s, refs := mem(t, backendtest.Bytes(10, 1))
	first, second, origin := newWatched(s), newWatched(s), newWatched(s)
	m := backend.Mirror(origin.store, nil, backend.MirrorStore{Store: first.store, CheckInterval: time.Hour}, backend.MirrorStore{Store: second.store, Name: "second"})
	defer m.Close()
	reads := func() [3]int64 {
		return [3]int64{first.Reads.Swap(0), second.Reads.Swap(0), origin.Reads.Swap(0)}
	}
	read := readOne(t, m, refs[0])
	step := func(what string, ctx context.Context, want [3]int64, ok bool) {
		t.Helper()
		err := read(ctx)
		if got := reads(); got != want || (err == nil) != ok {
			t.Errorf("%s: reads %v, want %v; error %v", what, got, want, err)
		}
	}
	step("all well", t.Context(), [3]int64{1, 0, 0}, true)
	step("from the origin", backend.FromOrigin(t.Context()), [3]int64{0, 0, 1}, true)
	first.Set(io.ErrUnexpectedEOF)
	for range 5 {
		step("first fails", t.Context(), [3]int64{1, 1, 0}, true)
	}
	step("first is left alone", t.Context(), [3]int64{0, 1, 0}, true)
	second.Set(fs.ErrNotExist)
	step("second lacks the blob", t.Context(), [3]int64{0, 1, 1}, true)
	step("second is not asked again", t.Context(), [3]int64{0, 0, 1}, true)
	origin.Set(fs.ErrPermission)
	step("all fail", t.Context(), [3]int64{1, 1, 1}, false)
	if err := read(t.Context()); !backend.Temporary(err) || !errors.Is(err, fs.ErrPermission) || !strings.Contains(err.Error(), "mirror second") {
		t.Errorf("error %v", err)
	}
	reads()
	second.Set(nil)
	step("second has it after all", t.Context(), [3]int64{1, 1, 1}, true)
	first.Set(fs.ErrNotExist)
	second.Set(fs.ErrNotExist)
	if err := read(t.Context()); backend.Temporary(err) {
		t.Errorf("nobody will have it, error %v is temporary", err)
	}
	reads()

	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := read(ctx); !errors.Is(err, context.Canceled) || reads() != [3]int64{} {
		t.Errorf("cancelled: error %v", err)
	}
}

// TestMirrorHealth: a mirror that is down is noticed and taken back by pings, which end
// when nothing is read and with Close.
func TestMirrorHealth(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, refs := mem(t, backendtest.Bytes(10, 1))
		mirror := newWatched(s)
		var text testenv.Buffer
		m := backend.Mirror(s, slog.New(slog.NewTextHandler(&text, nil)), backend.MirrorStore{Store: mirror.store, Name: "m1", Ping: mirror.ping, FailureLimit: 3})
		read := readOne(t, m, refs[0])
		asked := func() bool {
			t.Helper()
			if err := read(t.Context()); err != nil {
				t.Error(err)
			}
			return mirror.Opens.Swap(0)+mirror.Reads.Swap(0) != 0
		}
		if mirror.pings.Load() != 0 {
			t.Error("pings before the first read")
		}
		mirror.Set(syscall.ECONNRESET)
		mirror.down.Store(true)
		for i := range 3 {
			if !asked() && i == 0 {
				t.Error("the mirror was not asked")
			}
		}
		for range 4 {
			time.Sleep(5 * time.Second)
			synctest.Wait()
			if asked() {
				t.Error("the mirror was asked though its pings fail")
			}
		}
		mirror.Set(nil)
		mirror.down.Store(false)
		time.Sleep(6 * time.Second)
		synctest.Wait()
		if !asked() {
			t.Error("the mirror was not asked though its pings succeed")
		}
		mirror.down.Store(true)
		time.Sleep(6 * time.Second)
		synctest.Wait()
		if asked() {
			t.Error("a ping that failed was not noticed")
		}
		for _, want := range []string{"mirror is unhealthy", "mirror recovered", "mirror=m1"} {
			if !strings.Contains(text.String(), want) {
				t.Errorf("%q is not in the log:\n%s", want, text.String())
			}
		}

		time.Sleep(310 * time.Second)
		before := mirror.pings.Load()
		time.Sleep(time.Hour)
		if n := mirror.pings.Load() - before; n != 0 {
			t.Errorf("%d pings of an idle mirror", n)
		}
		asked()
		time.Sleep(time.Minute)
		if mirror.pings.Load() == before {
			t.Error("no pings after the pause")
		}
		m.Close()
		m.Close()
	})
}

// TestMirrorParallel: reads while mirrors come and go, and the blob is closed.
func TestMirrorParallel(t *testing.T) {
	data := backendtest.Bytes(1000, 1)
	s, refs := mem(t, data)
	mirror := newWatched(s)
	m := backend.Mirror(s, nil, backend.MirrorStore{Store: mirror.store, CheckInterval: time.Microsecond, FailureLimit: 1})
	defer m.Close()
	b, err := m.Open(t.Context(), refs[0])
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	var closing, closed atomic.Bool
	for range 8 {
		wg.Go(func() {
			p := make([]byte, len(data))
			for i := range 500 {
				was := closed.Load()
				err := b.ReadAt(t.Context(), p, 0)
				if err != nil && !closing.Load() || was && err == nil {
					t.Errorf("error %v, closed %v", err, was)
				}
				if i%2 == 0 {
					mirror.Set(io.ErrUnexpectedEOF)
				} else {
					mirror.Set(nil)
				}
			}
		})
	}
	wg.Go(func() {
		time.Sleep(5 * time.Millisecond)
		closing.Store(true)
		b.Close()
		closed.Store(true)
	})
	wg.Wait()
}
