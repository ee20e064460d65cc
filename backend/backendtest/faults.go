package backendtest

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/erofsd/erofsd/backend"
)

// Faulty is a store over one server that can be made to answer wrongly.
type Faulty struct {
	Store   backend.Store // makes one attempt per call
	Refs    []backend.Ref // of the blobs, with their sizes
	Faults  *HTTPFaults   // before the server; without rules
	Secrets []string      // what must be in no error and go to no other host
	// Reads matches the requests that read blobs. Nil: all with the method GET.
	Reads func(*http.Request) bool
}

// NewFaulty makes a server that holds blobs and a store over it that gives up on a
// request after stall without progress. It registers what must be cleaned up.
type NewFaulty func(t *testing.T, stall time.Duration, blobs ...[]byte) Faulty

// answers of the fault table: what an error must be.
const (
	either    = iota
	temporary // trying again helps
	permanent // it does not
)

type faultRow struct {
	name  string
	fault Action
	kind  int   // of the error
	is    error // nil: not said
}

// faultRows is what servers and networks do.
func faultRows(other string) []faultRow {
	return []faultRow{
		{"403", Status(403), permanent, fs.ErrPermission},
		{"404", Status(404), permanent, fs.ErrNotExist},
		{"429", TooMany(1), temporary, nil},
		{"500", Status(500), temporary, nil},
		{"502", Status(502), temporary, nil},
		{"503", Status(503, "Retry-After", "1"), temporary, nil},
		{"reset before the head", func(http.ResponseWriter, *http.Request, http.Handler) { panic(http.ErrAbortHandler) }, temporary, nil},
		{"reset in the body", Reset(10), temporary, nil},
		{"stall before the head", Stall(-1), temporary, nil},
		{"stall in the body", Stall(10), temporary, nil},
		{"drip", Drip(10, 10*time.Millisecond), temporary, nil},
		{"truncated", Short(10), temporary, nil},
		{"other range", WrongRange("bytes 0-4999/100000"), either, nil},
		{"other size", WrongRange("bytes 1000-5999/6000"), either, nil},
		{"no range", WrongRange(""), either, nil},
		{"whole blob", Whole, either, nil},
		{"redirect for ever", func(w http.ResponseWriter, r *http.Request, _ http.Handler) {
			http.Redirect(w, r, r.URL.String(), http.StatusTemporaryRedirect)
		}, either, nil},
		{"redirect to another host", func(w http.ResponseWriter, r *http.Request, _ http.Handler) {
			http.Redirect(w, r, other+r.URL.Path, http.StatusTemporaryRedirect)
		}, either, nil},
		{"redirect to a dead host", Status(http.StatusTemporaryRedirect, "Location", "http://127.0.0.1:1/"), either, nil},
	}
}

// The read of the table, and bounds on the wait.
const (
	faultOff, faultLen = 1000, 5000
	faultStall         = 100 * time.Millisecond
	faultBound         = 10 * time.Second
)

// Faults checks what reads give while a server answers wrongly: never wrong bytes, the
// right kind of error, success by trying again where that helps and wherever another
// source is right, all within a bound; and that logins stay where they belong.
func Faults(t *testing.T, newFaulty NewFaulty) {
	for _, row := range faultRows("") {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			runFault(t, newFaulty, row.name)
		})
	}
	t.Run("flapping mirror", func(t *testing.T) {
		t.Parallel()
		flapping(t, newFaulty)
	})
}

func runFault(t *testing.T, newFaulty NewFaulty, name string) {
	data := Bytes(100_000, 1)
	f := newFaulty(t, faultStall, data)
	if f.Reads == nil {
		f.Reads = func(r *http.Request) bool { return r.Method == http.MethodGet }
	}
	other := otherHost(t, f.Secrets)
	var row faultRow
	for _, r := range faultRows(other) {
		if r.name == name {
			row = r
		}
	}
	var healthy Mem
	healthy.Add(data)
	policy := backend.RetryPolicy{Attempts: 3, Wait: time.Millisecond, MaxWait: 2 * time.Second}
	read := func(s backend.Store) error {
		t.Helper()
		err := readFault(t, s, f.Refs[0], data)
		for _, secret := range f.Secrets {
			if err != nil && strings.Contains(err.Error(), secret) {
				t.Errorf("a secret is in the error: %v", err)
			}
		}
		return err
	}

	f.Faults.Add(f.Reads, -1, row.fault)
	err := read(f.Store)
	tolerated := name == "whole blob" && err == nil // the right bytes are in it
	switch {
	case err == nil && !tolerated:
		t.Error("the read succeeded")
	case row.is != nil && !errors.Is(err, row.is):
		t.Errorf("error %v, want one that is %v", err, row.is)
	case row.kind != either && backend.Temporary(err) != (row.kind == temporary):
		t.Errorf("Temporary is %v for %v", backend.Temporary(err), err)
	}
	if err := read(backend.Retry(f.Store, policy)); err == nil && !tolerated {
		t.Error("the read succeeded by trying again, though the fault was still there")
	}
	for where, s := range map[string]*backend.Mirrored{
		"mirror": backend.Mirror(&healthy, nil, backend.MirrorStore{Store: f.Store, Name: "faulty"}),
		"origin": backend.Mirror(f.Store, nil, backend.MirrorStore{Store: &healthy, Name: "healthy"}),
	} {
		if err := read(s); err != nil {
			t.Errorf("fault at the %s, the other source is right: %v", where, err)
		}
		s.Close()
	}

	f.Faults.Clear()
	f.Faults.Add(f.Reads, 1, row.fault)
	if err := read(backend.Retry(f.Store, policy)); row.kind == temporary && err != nil {
		t.Errorf("a fault that happens once is not overcome: %v", err)
	}
	f.Faults.Clear()
	if err := read(f.Store); err != nil {
		t.Errorf("after the fault: %v", err)
	}
}

// readFault opens and reads within the bound.
func readFault(t *testing.T, s backend.Store, ref backend.Ref, data []byte) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 3*faultBound)
	defer cancel()
	start := time.Now()
	b, err := s.Open(ctx, ref)
	if err == nil {
		defer b.Close()
		p := make([]byte, faultLen)
		if err = b.ReadAt(ctx, p, faultOff); err == nil && !bytes.Equal(p, data[faultOff:faultOff+faultLen]) {
			t.Error("wrong bytes were delivered")
		}
	}
	if took := time.Since(start); took > faultBound {
		t.Errorf("the read took %v: error %v", took, err)
	}
	return err
}

// otherHost is a server that must get no login. It refuses everything.
func otherHost(t *testing.T, secrets []string) string {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var all strings.Builder
		r.Write(&all)
		for _, secret := range append([]string{"Authorization:", "Cookie:", "Referer:", "X-Amz-Security-Token"}, secrets...) {
			if strings.Contains(all.String(), secret) {
				t.Errorf("%q went to another host", secret)
			}
		}
		http.Error(w, "no", http.StatusForbidden)
	}))
	t.Cleanup(server.Close)
	return server.URL
}

// flapping reads through a mirror that answers every other request wrongly.
func flapping(t *testing.T, newFaulty NewFaulty) {
	data := Bytes(100_000, 1)
	f := newFaulty(t, faultStall, data)
	var mu sync.Mutex // guards r and n
	r, n := rand.New(rand.NewPCG(1, 1)), 0
	rows := faultRows("http://127.0.0.1:1")
	f.Faults.Add(All, -1, func(w http.ResponseWriter, req *http.Request, next http.Handler) {
		mu.Lock()
		fault := rows[r.IntN(len(rows))].fault
		n++
		well := n%2 == 0
		mu.Unlock()
		if well {
			next.ServeHTTP(w, req)
			return
		}
		fault(w, req, next)
	})
	var healthy Mem
	healthy.Add(data)
	s := backend.Mirror(&healthy, nil, backend.MirrorStore{Store: f.Store, Name: "flapping", CheckInterval: time.Millisecond, FailureLimit: 2})
	defer s.Close()
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 8 {
				if err := readFault(t, s, f.Refs[0], data); err != nil {
					t.Errorf("the origin is well: %v", err)
				}
			}
		})
	}
	wg.Wait()
	mu.Lock()
	defer mu.Unlock()
	if n == 0 {
		t.Error("the mirror was never asked")
	}
}
