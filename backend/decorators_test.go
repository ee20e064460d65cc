package backend_test

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/erofsd/erofsd/backend"
	"github.com/erofsd/erofsd/backend/backendtest"
)

func mem(t *testing.T, blobs ...[]byte) (backend.Store, []backend.Ref) {
	t.Helper()
	s := new(backendtest.Mem)
	var refs []backend.Ref
	for _, p := range blobs {
		refs = append(refs, s.Add(p))
	}
	return s, refs
}

// TestConformance runs the suite over the store in memory and every decorator.
func TestConformance(t *testing.T) {
	for name, decorate := range map[string]func(backend.Store) backend.Store{
		"mem":     func(s backend.Store) backend.Store { return s },
		"retry":   func(s backend.Store) backend.Store { return backend.Retry(s, backend.RetryPolicy{}) },
		"limit":   func(s backend.Store) backend.Store { return backend.Limit(s, backend.Limits{Requests: 3, Bytes: 5000}) },
		"rate":    func(s backend.Store) backend.Store { return backend.Limit(s, backend.Limits{Rate: 1 << 40}) },
		"metrics": func(s backend.Store) backend.Store { return backend.Metrics(s, prometheus.NewRegistry(), "mem") },
		"mirror": func(s backend.Store) backend.Store {
			return backend.Mirror(s, nil, backend.MirrorStore{Store: s})
		},
		"empty mirror": func(s backend.Store) backend.Store {
			return backend.Mirror(s, nil, backend.MirrorStore{Store: new(backendtest.Mem)})
		},
		"empty origin": func(s backend.Store) backend.Store {
			return backend.Mirror(new(backendtest.Mem), nil, backend.MirrorStore{Store: s})
		},
		"faulty mirror": func(s backend.Store) backend.Store {
			return backend.Mirror(s, nil, backend.MirrorStore{Store: backendtest.Inject(s, backendtest.Randomly(0.5, 1, io.ErrUnexpectedEOF))})
		},
		"all": func(s backend.Store) backend.Store {
			return backend.Metrics(backend.Limit(backend.Retry(s, backend.RetryPolicy{}), backend.Limits{}), nil, "mem")
		},
		"retry over faults": func(s backend.Store) backend.Store {
			faulty := backendtest.Inject(s, backendtest.Randomly(0.2, 1, io.ErrUnexpectedEOF))
			// The suite's readers whose deadlines leave no time for a second attempt must not open the
			// breaker.
			return backend.Retry(faulty, backend.RetryPolicy{Attempts: 40, Wait: time.Microsecond, BreakAfter: 1000})
		},
	} {
		t.Run(name, func(t *testing.T) {
			backendtest.Run(t, func(t *testing.T, blobs ...[]byte) (backend.Store, []backend.Ref) {
				s, refs := mem(t, blobs...)
				return decorate(s), refs
			})
		})
	}
}

func TestTemporary(t *testing.T) {
	status := func(code int) error { return &backend.StatusError{Code: code} }
	for _, c := range []struct {
		err  error
		want bool
	}{
		{nil, false},
		{errors.New("something else"), false},
		{context.Canceled, false},
		{context.DeadlineExceeded, true},
		{fs.ErrNotExist, false},
		{fs.ErrPermission, false},
		{io.ErrUnexpectedEOF, true},
		{syscall.ECONNRESET, true},
		{&net.OpError{Op: "dial", Err: syscall.ECONNREFUSED}, true},
		{&net.DNSError{IsNotFound: true}, false},
		{&net.DNSError{IsTemporary: true}, true},
		{status(400), false},
		{status(401), false},
		{status(404), false},
		{status(408), true},
		{status(416), false},
		{status(429), true},
		{status(500), true},
		{status(501), false},
		{status(503), true},
	} {
		if got := backend.Temporary(c.err); got != c.want {
			t.Errorf("Temporary(%v) is %v, want %v", c.err, got, c.want)
		}
		if c.err != nil && backend.Temporary(errors.Join(errors.New("around"), c.err)) != c.want {
			t.Errorf("Temporary of a wrapped %v is not %v", c.err, c.want)
		}
	}
}

func TestStatusError(t *testing.T) {
	for header, want := range map[string]time.Duration{"": 0, "7": 7 * time.Second, "-1": 0, "soon": 0, "99999999999999": 0, "Mon, 02 Jan 2006 15:04:05 GMT": 0} {
		req, err := http.NewRequest("GET", "https://user:secret@host/v2/a?sig=secret#secret", nil)
		if err != nil {
			t.Fatal(err)
		}
		e := backend.NewStatusError(&http.Response{StatusCode: 429, Header: http.Header{"Retry-After": {header}}, Request: req})
		if e.RetryAfter != want {
			t.Errorf("Retry-After %q gives %v, want %v", header, e.RetryAfter, want)
		}
		if got := e.Error(); got != "https://host/v2/a: 429 Too Many Requests" {
			t.Errorf("text %q", got)
		}
	}
	if e := (&backend.StatusError{Code: 404}); !errors.Is(e, fs.ErrNotExist) || errors.Is(e, fs.ErrPermission) {
		t.Error("404 is not just fs.ErrNotExist")
	}
	if e := (&backend.StatusError{Code: 403}); !errors.Is(e, fs.ErrPermission) || errors.Is(e, fs.ErrNotExist) {
		t.Error("403 is not just fs.ErrPermission")
	}
}

func TestRedact(t *testing.T) {
	for in, want := range map[string]string{
		"https://h/p":                              "https://h/p",
		"https://u:SECRET@h:1/p?SECRET=SECRET":     "https://h:1/p",
		"https://u:S@CRET@h/p":                     "https://h/p",
		"http://h/p#SECRET":                        "http://h/p",
		"/p?SECRET":                                "/p",
		"https://h?x=http://u:SECRET@other/SECRET": "https://h",
		"https://us%40er:SECRET@h/%":               "https://h/%",
	} {
		if got := backend.RedactURL(in); got != want {
			t.Errorf("RedactURL(%q) is %q, want %q", in, got, want)
		}
	}
	inner := errors.New(`Get "https://u:SECRET@h/p?sig=SECRET&x=SECRET": redirect to '/q?token=SECRET' failed: eh? no`)
	err := backend.RedactError(inner)
	if strings.Contains(err.Error(), "SECRET") || !errors.Is(err, inner) || !strings.Contains(err.Error(), "https://h/p") || !strings.HasSuffix(err.Error(), "eh? no") {
		t.Errorf("RedactError gives %q", err)
	}
	if backend.RedactError(nil) != nil {
		t.Error("RedactError(nil) is not nil")
	}
}

// readOne opens the first blob of s and returns a function that reads it.
func readOne(t *testing.T, s backend.Store, ref backend.Ref) func(context.Context) error {
	t.Helper()
	b, err := s.Open(t.Context(), ref)
	if err != nil {
		t.Fatal(err)
	}
	return func(ctx context.Context) error { return b.ReadAt(ctx, make([]byte, ref.Size), 0) }
}

func TestRetryWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, refs := mem(t, backendtest.Bytes(10, 1))
		var calls atomic.Int64
		var fault error = syscall.ECONNRESET
		policy := backend.RetryPolicy{Attempts: 4, Wait: time.Second, MaxWait: 8 * time.Second, BreakAfter: 100}
		read := readOne(t, backend.Retry(backendtest.Inject(s, func(_ context.Context, op backendtest.Op) error {
			if op == backendtest.OpOpen {
				return nil
			}
			calls.Add(1)
			return fault
		}), policy), refs[0])
		try := func(ctx context.Context) (n int64, took time.Duration, err error) {
			before, start := calls.Load(), time.Now()
			err = read(ctx)
			return calls.Load() - before, time.Since(start), err
		}

		// 1 + 2 + 4 seconds, each shortened by up to a half.
		n, took, err := try(t.Context())
		if n != 4 || took < 3500*time.Millisecond || took > 7*time.Second || !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("%d attempts in %v, error %v", n, took, err)
		}
		fault = &backend.StatusError{Code: 429, RetryAfter: 6 * time.Second}
		if n, took, err := try(t.Context()); n != 4 || took != 18*time.Second || err == nil {
			t.Errorf("Retry-After of 6 s: %d attempts in %v, error %v", n, took, err)
		}
		early, cancelEarly := context.WithTimeout(t.Context(), time.Second)
		defer cancelEarly()
		if n, took, err := try(early); n != 0 || took != 0 || !backend.Temporary(err) {
			t.Errorf("read during the rest with an early deadline: %d attempts in %v, error %v", n, took, err)
		}
		fault = nil
		if n, took, err := try(t.Context()); n != 1 || took < 6*time.Second || took > 7*time.Second || err != nil {
			t.Errorf("read during the rest: %d attempts in %v, error %v", n, took, err)
		}
		fault = syscall.ECONNRESET
		if n, _, _ := try(backend.WithPriority(t.Context(), backend.Prefetch)); n != 2 {
			t.Errorf("%d attempts of a prefetch, want 2", n)
		}
		fault = &backend.StatusError{Code: 429, RetryAfter: time.Hour}
		if n, took, err := try(t.Context()); n != 1 || took != 0 || err == nil {
			t.Errorf("Retry-After of an hour: %d attempts in %v, error %v", n, took, err)
		}
		fault = fs.ErrNotExist
		if n, took, err := try(t.Context()); n != 1 || took != 0 || !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("permanent error: %d attempts in %v, error %v", n, took, err)
		}
		fault = syscall.ECONNRESET
		deadline, cancel := context.WithTimeout(t.Context(), 400*time.Millisecond)
		defer cancel()
		if n, took, err := try(deadline); n != 1 || took != 0 || !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("deadline before the next attempt: %d attempts in %v, error %v", n, took, err)
		}
		gone, leave := context.WithCancel(t.Context())
		time.AfterFunc(100*time.Millisecond, leave)
		if n, took, err := try(gone); n != 1 || took != 100*time.Millisecond || !errors.Is(err, context.Canceled) {
			t.Errorf("caller that leaves: %d attempts in %v, error %v", n, took, err)
		}
	})
}

func TestRetryRecovers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, refs := mem(t, backendtest.Bytes(10, 1))
		for n := range int64(3) {
			read := readOne(t, backend.Retry(backendtest.Inject(s, backendtest.OnIndex(n, io.ErrUnexpectedEOF)), backend.RetryPolicy{}), refs[0])
			for i := range 4 {
				if err := read(t.Context()); err != nil {
					t.Fatalf("fault in read %d: read %d: %v", n, i, err)
				}
			}
		}
		var toggle backendtest.Toggle
		toggle.Set(syscall.ECONNREFUSED)
		time.AfterFunc(time.Second, func() { toggle.Set(nil) })
		if _, err := backend.Retry(backendtest.Inject(s, toggle.Fault), backend.RetryPolicy{}).Open(t.Context(), refs[0]); err != nil {
			t.Errorf("open while the server restarts: %v", err)
		}
	})
}

func TestBreaker(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, refs := mem(t, backendtest.Bytes(10, 1), backendtest.Bytes(10, 2))
		var toggle backendtest.Toggle
		var counter backendtest.Counter
		store := backend.Retry(backendtest.Inject(backendtest.Inject(s, toggle.Fault), counter.Fault),
			backend.RetryPolicy{Attempts: 2, BreakAfter: 3, BreakFor: time.Second})
		read, other := readOne(t, store, refs[0]), readOne(t, store, refs[1])
		reads := func(want int64, what string) {
			t.Helper()
			if got := counter.Reads.Swap(0); got != want {
				t.Errorf("%s: %d requests, want %d", what, got, want)
			}
		}
		cancelled, cancel := context.WithCancel(t.Context())
		cancel()
		toggle.Set(syscall.ECONNRESET)
		for range 10 {
			read(cancelled)
		}
		reads(10, "reads that callers left, which do not count")
		for range 4 {
			read(backend.WithPriority(t.Context(), backend.Prefetch))
		}
		reads(8, "reads that nobody waits for, which do not count either")
		for range 3 {
			if read(t.Context()) == nil {
				t.Fatal("read of a broken store succeeded")
			}
		}
		reads(6, "3 reads before the breaker opens")
		for range 5 {
			if err := read(t.Context()); !errors.Is(err, syscall.ECONNRESET) {
				t.Fatalf("error %v, want the last one of the server", err)
			}
		}
		reads(0, "reads while it is open")
		if other(t.Context()) == nil {
			t.Fatal("read of a broken store succeeded")
		}
		reads(2, "read of another blob")
		time.Sleep(time.Second)
		for range 3 {
			read(t.Context())
		}
		reads(1, "reads after the pause, the server still broken")
		time.Sleep(time.Second)
		toggle.Set(nil)
		for range 3 {
			if err := read(t.Context()); err != nil {
				t.Fatalf("read of a server that works again: %v", err)
			}
		}
		reads(3, "reads after the pause, the server well")
		toggle.Set(syscall.ECONNRESET)
		read(t.Context())
		reads(2, "first failure after that")
	})
}

func TestLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, refs := mem(t, backendtest.Bytes(100, 1))
		var now, most atomic.Int64
		slow := func(ctx context.Context, op backendtest.Op) error {
			if op == backendtest.OpOpen {
				return nil
			}
			n := now.Add(1)
			defer now.Add(-1)
			for m := most.Load(); n > m && !most.CompareAndSwap(m, n); m = most.Load() {
			}
			select {
			case <-time.After(time.Second):
				return nil
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		for _, c := range []struct {
			name   string
			limits backend.Limits
			most   int64
			took   time.Duration
		}{
			{"requests", backend.Limits{Requests: 3}, 3, 4 * time.Second},
			{"bytes", backend.Limits{Bytes: 250}, 2, 6 * time.Second},
			{"reads larger than the limit", backend.Limits{Bytes: 10}, 1, 12 * time.Second},
			{"default", backend.Limits{}, 12, time.Second},
		} {
			most.Store(0)
			read := readOne(t, backend.Limit(backendtest.Inject(s, slow), c.limits), refs[0])
			start := time.Now()
			var wg sync.WaitGroup
			for range 12 {
				wg.Go(func() {
					if err := read(t.Context()); err != nil {
						t.Error(err)
					}
				})
			}
			gone, cancel := context.WithTimeout(t.Context(), time.Millisecond)
			synctest.Wait()
			if err := read(gone); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("%s: error %v for a caller that leaves the queue", c.name, err)
			}
			cancel()
			wg.Wait()
			if took := time.Since(start); most.Load() != c.most && c.most < 12 || took != c.took {
				t.Errorf("%s: %d in flight and %v, want %d and %v", c.name, most.Load(), took, c.most, c.took)
			}
		}
	})
}

func TestLimitRate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, refs := mem(t, backendtest.Bytes(1<<20, 1))
		read := readOne(t, backend.Limit(s, backend.Limits{Rate: 1 << 20}), refs[0])
		start := time.Now()
		for range 10 {
			if err := read(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		if took := time.Since(start); took < 9800*time.Millisecond || took > 10*time.Second {
			t.Errorf("10 MiB at 1 MiB/s took %v", took)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		if err := read(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("error %v, want context.DeadlineExceeded", err)
		}
	})
}

func TestMetrics(t *testing.T) {
	reg := prometheus.NewRegistry()
	s, refs := mem(t, backendtest.Bytes(100, 1))
	first := backend.Metrics(s, reg, "mem")
	second := backend.Metrics(backendtest.Inject(s, backendtest.OnIndex(1, syscall.ECONNRESET)), reg, "mem")
	for _, store := range []*backend.Metered{first, second} {
		read := readOne(t, store, refs[0])
		for range 3 {
			read(t.Context())
		}
	}
	if got, want := first.Totals(), (backend.Totals{Requests: 3, Bytes: 300}); got != want {
		t.Errorf("totals %+v, want %+v", got, want)
	}
	if got, want := second.Totals(), (backend.Totals{Requests: 3, Bytes: 200}); got != want {
		t.Errorf("totals with a fault %+v, want %+v", got, want)
	}
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]float64{}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			key := f.GetName()
			for _, l := range m.GetLabel() {
				key += " " + l.GetValue()
			}
			got[key] = m.GetCounter().GetValue() + float64(m.GetHistogram().GetSampleCount())
		}
	}
	for key, want := range map[string]float64{
		"erofsd_backend_read_bytes_total mem":              500,
		"erofsd_backend_requests_total mem open ok":        2,
		"erofsd_backend_requests_total mem read ok":        5,
		"erofsd_backend_requests_total mem read temporary": 1,
		"erofsd_backend_request_duration_seconds mem read": 6,
	} {
		if got[key] != want {
			t.Errorf("%s is %v, want %v (have %v)", key, got[key], want, got)
		}
	}
}
