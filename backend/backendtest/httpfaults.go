package backendtest

import (
	"bytes"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"
)

// HTTPFaults is a handler before another one, such as a registry, that answers
// chosen requests wrongly. Without rules it only counts. Make one with
// [NewHTTPFaults]; it is safe for concurrent use.
type HTTPFaults struct {
	next http.Handler

	// mu guards the fields below.
	mu       sync.Mutex
	rules    []*rule
	requests int
	blobs    int
}

type rule struct {
	match  func(*http.Request) bool
	times  int // how often more; < 0: for ever
	action Action
}

// An Action answers a request, with or without asking next, the real server.
type Action func(w http.ResponseWriter, r *http.Request, next http.Handler)

// NewHTTPFaults returns a handler that passes everything to next.
func NewHTTPFaults(next http.Handler) *HTTPFaults { return &HTTPFaults{next: next} }

// Add makes the next times requests that match be answered by action; times < 0
// means all. Of several rules the one added first is used up first.
func (f *HTTPFaults) Add(match func(*http.Request) bool, times int, action Action) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.rules = append(f.rules, &rule{match, times, action})
}

// Clear removes all rules; requests in flight keep theirs.
func (f *HTTPFaults) Clear() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.rules = nil
}

// Requests is how many requests there were, and how many of them read blobs.
func (f *HTTPFaults) Requests() (all, blobs int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.requests, f.blobs
}

// ServeHTTP answers r by the first rule that matches, or by the real server.
func (f *HTTPFaults) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if action := f.pick(r); action != nil {
		action(w, r, f.next)
		return
	}
	f.next.ServeHTTP(w, r)
}

func (f *HTTPFaults) pick(r *http.Request) Action {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.requests++
	if BlobReads(r) {
		f.blobs++
	}
	for _, rule := range f.rules {
		if rule.times != 0 && rule.match(r) {
			rule.times = max(rule.times-1, -1)
			return rule.action
		}
	}
	return nil
}

// All matches every request.
func All(*http.Request) bool { return true }

// BlobReads matches reads of blobs through the distribution API.
func BlobReads(r *http.Request) bool {
	return r.Method == http.MethodGet && strings.Contains(r.URL.Path, "/blobs/")
}

// Path matches requests whose path contains part.
func Path(part string) func(*http.Request) bool {
	return func(r *http.Request) bool { return strings.Contains(r.URL.Path, part) }
}

// Status answers with a code and the given header fields, name after value.
func Status(code int, header ...string) Action {
	return func(w http.ResponseWriter, _ *http.Request, _ http.Handler) {
		for i := 0; i+1 < len(header); i += 2 {
			w.Header().Set(header[i], header[i+1])
		}
		http.Error(w, http.StatusText(code), code)
	}
}

// TooMany answers 429 with Retry-After in whole seconds.
func TooMany(retryAfter int) Action {
	return Status(http.StatusTooManyRequests, "Retry-After", strconv.Itoa(retryAfter))
}

// Reset sends the headers and the first n bytes and breaks the connection.
func Reset(n int) Action {
	return func(w http.ResponseWriter, r *http.Request, next http.Handler) {
		a := answer(r, next)
		a.send(w, a.body.Bytes()[:min(n, a.body.Len())])
		panic(http.ErrAbortHandler)
	}
}

// Stall sends the headers and the first n bytes, but never the last one, and then nothing
// until the client goes away. n < 0 holds back the headers too.
func Stall(n int) Action {
	return func(w http.ResponseWriter, r *http.Request, next http.Handler) {
		if n >= 0 {
			a := answer(r, next)
			a.send(w, a.body.Bytes()[:max(0, min(n, a.body.Len()-1))])
		}
		<-r.Context().Done()
		panic(http.ErrAbortHandler)
	}
}

// Drip sends n bytes per pause.
func Drip(n int, pause time.Duration) Action {
	return func(w http.ResponseWriter, r *http.Request, next http.Handler) {
		a := answer(r, next)
		for a.send(w, a.body.Next(n)); a.body.Len() > 0; a.flush(w, a.body.Next(n)) {
			select {
			case <-r.Context().Done():
				panic(http.ErrAbortHandler)
			case <-time.After(pause):
			}
		}
	}
}

// Short answers properly but says and sends n bytes less.
func Short(n int) Action {
	return func(w http.ResponseWriter, r *http.Request, next http.Handler) {
		a := answer(r, next)
		p := a.body.Bytes()[:max(0, a.body.Len()-n)]
		a.header.Set("Content-Length", strconv.Itoa(len(p)))
		a.send(w, p)
	}
}

// Whole ignores the range: 200 with everything.
func Whole(w http.ResponseWriter, r *http.Request, next http.Handler) {
	r = r.Clone(r.Context())
	r.Header.Del("Range")
	next.ServeHTTP(w, r)
}

// WrongRange sends the right bytes and the Content-Range value.
func WrongRange(value string) Action {
	return func(w http.ResponseWriter, r *http.Request, next http.Handler) {
		a := answer(r, next)
		a.header.Set("Content-Range", value)
		a.send(w, a.body.Bytes())
	}
}

// WrongBytes turns one bit of the body's byte in the middle.
func WrongBytes(w http.ResponseWriter, r *http.Request, next http.Handler) {
	a := answer(r, next)
	if p := a.body.Bytes(); len(p) > 0 {
		p[len(p)/2] ^= 1
	}
	a.send(w, a.body.Bytes())
}

// recorded is an answer of the real server, held back.
type recorded struct {
	header http.Header
	code   int
	body   bytes.Buffer
}

func answer(r *http.Request, next http.Handler) *recorded {
	a := &recorded{header: make(http.Header), code: http.StatusOK}
	next.ServeHTTP(a, r)
	return a
}

func (a *recorded) Header() http.Header         { return a.header }
func (a *recorded) WriteHeader(code int)        { a.code = code }
func (a *recorded) Write(p []byte) (int, error) { return a.body.Write(p) }

// send sends the headers and p.
func (a *recorded) send(w http.ResponseWriter, p []byte) {
	for k, v := range a.header {
		w.Header()[k] = v
	}
	w.WriteHeader(a.code)
	a.flush(w, p)
}

func (a *recorded) flush(w http.ResponseWriter, p []byte) {
	w.Write(p)
	http.NewResponseController(w).Flush()
}

// Storage plays the object store behind a registry: the registry side redirects
// blob reads to it with a signed URL, and it serves only URLs whose signature is
// good. It refuses requests that carry a credential, which must never get here.
type Storage struct {
	next http.Handler

	// mu guards the fields below.
	mu      sync.Mutex
	epoch   int
	refusal int
	leaked  int
}

// Signature is in every signed URL of a [Storage] and must be in no error or log.
const Signature = "signature-not-for-logs"

// NewStorage returns the handler of the storage host, which takes blobs from
// next: the registry's own handler.
func NewStorage(next http.Handler) *Storage { return &Storage{next: next} }

// Redirect is the registry's Action for blob reads; url is where s is served.
func (s *Storage) Redirect(url string) Action {
	return func(w http.ResponseWriter, r *http.Request, _ http.Handler) {
		s.mu.Lock()
		epoch := s.epoch
		s.mu.Unlock()
		to := fmt.Sprintf("%s%s?X-Sig=%s&epoch=%d", url, r.URL.Path, Signature, epoch)
		http.Redirect(w, r, to, http.StatusTemporaryRedirect)
	}
}

// Expire makes all URLs signed so far be answered with code.
func (s *Storage) Expire(code int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.epoch++
	s.refusal = code
}

// Leaked is how many requests carried a credential or a signed referrer.
func (s *Storage) Leaked() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.leaked
}

// ServeHTTP serves blob reads with a good signature.
func (s *Storage) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	q := r.URL.Query()
	s.mu.Lock()
	if r.Header.Get("Authorization") != "" || r.Header.Get("Referer") != "" {
		s.leaked++
	}
	good := q.Get("X-Sig") == Signature && q.Get("epoch") == strconv.Itoa(s.epoch)
	code := s.refusal
	s.mu.Unlock()
	if !good {
		Status(max(code, http.StatusForbidden))(w, r, nil)
		return
	}
	s.next.ServeHTTP(w, r)
}
