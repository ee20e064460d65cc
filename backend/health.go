package backend

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"sync"
	"time"
)

// health decides whether a proxy or mirror is worth asking. It becomes sick by a ping
// that fails or by limit failures in a row, and well by a ping or, when it has none, by a
// success of the one request per interval that it lets through. Pings are made by one
// goroutine, which lives from a use until pause after the last.
type health struct {
	ping            func(ctx context.Context) error // nil: none
	interval, pause time.Duration
	limit           int
	changed         func(well bool, why error) // nothing is locked when it is called

	// mu guards the fields below.
	mu       sync.Mutex
	failures int
	sick     bool
	used     time.Time          // last
	next     time.Time          // when the next trial is let through; without ping only
	stop     context.CancelFunc // ends the goroutine; nil: there is none
	done     chan struct{}      // closed when it has ended
}

// newHealth fills in the defaults: 5 s, 300 s, 5 failures.
func newHealth(ping func(ctx context.Context) error, interval, pause time.Duration, limit int, changed func(bool, error)) *health {
	set(&interval, 5*time.Second)
	set(&pause, 300*time.Second)
	set(&limit, 5)
	return &health{ping: ping, interval: interval, pause: pause, limit: limit, changed: changed}
}

// use notes that a request is to be made and reports whether it is worth it.
func (h *health) use() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	now := time.Now()
	h.used = now
	if h.ping != nil && h.stop == nil {
		ctx, stop := context.WithCancel(context.Background()) // ended by close or the pause
		h.stop, h.done = stop, make(chan struct{})
		go h.watch(ctx, h.done)
	}
	if h.sick && h.ping == nil && !now.Before(h.next) {
		h.next = now.Add(h.interval)
		return true
	}
	return !h.sick
}

// well notes that a request succeeded, or at least was answered.
func (h *health) well() { h.note(nil, 1) }

// failed notes that a request failed because of what is watched.
func (h *health) failed(why error) { h.note(why, 1) }

// note counts n failures, or none.
func (h *health) note(why error, n int) {
	h.mu.Lock()
	was := h.sick
	switch {
	case why != nil:
		h.failures = min(h.failures+n, h.limit)
		if h.sick = h.sick || h.failures >= h.limit; h.sick && !was {
			h.next = time.Now().Add(h.interval)
		}
	case !h.sick || h.ping == nil || n == h.limit:
		h.failures, h.sick = 0, false
	}
	is := h.sick
	h.mu.Unlock()
	if is != was {
		h.changed(!is, why)
	}
}

// watch pings until ctx ends or nothing was used for the pause.
func (h *health) watch(ctx context.Context, done chan struct{}) {
	defer close(done)
	tick := time.NewTicker(h.interval)
	defer tick.Stop()
	for {
		if err := h.check(ctx); ctx.Err() == nil {
			h.note(err, h.limit) // one ping decides
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if h.idle() {
			return
		}
	}
}

// check pings once, with a bound on the wait.
func (h *health) check(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, max(h.interval, time.Second))
	defer cancel()
	return h.ping(ctx)
}

// idle ends the goroutine that calls it when there was no use for the pause.
func (h *health) idle() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if time.Since(h.used) < h.pause {
		return false
	}
	if h.stop != nil {
		h.stop()
		h.stop = nil
	}
	return true
}

// close ends the pings until the next use.
func (h *health) close() {
	h.mu.Lock()
	stop, done := h.stop, h.done
	h.stop = nil
	h.mu.Unlock()
	if stop != nil {
		stop()
		<-done
	}
}

// Ping returns a ping that gets url with c. Every answer below 500 means that somebody
// is there; a login may be missing.
func Ping(c *http.Client, url string, header http.Header) func(ctx context.Context) error {
	return func(ctx context.Context) error {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
		if err != nil {
			return RedactError(err)
		}
		for k, v := range header {
			req.Header[http.CanonicalHeaderKey(k)] = v
		}
		resp, err := c.Do(req)
		if err != nil {
			return fmt.Errorf("ping: %w", RedactError(err))
		}
		defer resp.Body.Close()
		_, err = io.CopyN(io.Discard, resp.Body, minProgress)
		switch {
		case resp.StatusCode >= 500:
			return fmt.Errorf("ping: %w", NewStatusError(resp))
		case err != nil && !errors.Is(err, io.EOF):
			return fmt.Errorf("ping: %w", RedactError(err))
		}
		return nil
	}
}
