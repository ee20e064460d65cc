package main

import (
	"context"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/erofsd/erofsd/internal/api"
)

// A front is the registry at an address of its own, perhaps behind TLS. It remembers
// what was asked for.
type front struct {
	server *httptest.Server
	caFile string // with TLS, else ""

	mu    sync.Mutex
	asked []asked // since reset
}

// asked is one GET of a range of a blob.
type asked struct{ path, bytes string }

// front starts a front; its owner closes it.
func (b *bench) front(tls bool) (*front, error) {
	f := &front{}
	f.server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodGet && strings.Contains(r.URL.Path, "/blobs/") {
			f.mu.Lock()
			f.asked = append(f.asked, asked{r.URL.Path, r.Header.Get("Range")})
			f.mu.Unlock()
		}
		b.registry.ServeHTTP(w, r)
	}))
	if !tls {
		f.server.Start()
		return f, nil
	}
	f.server.StartTLS()
	f.caFile = filepath.Join(b.scratch, "ca.pem")
	text := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: f.server.Certificate().Raw})
	if err := os.WriteFile(f.caFile, text, 0o644); err != nil {
		f.server.Close()
		return nil, err
	}
	return f, nil
}

// image names the lazy image at the front.
func (f *front) image(b *bench) api.MountRequest {
	return api.MountRequest{
		Reference: f.server.Listener.Addr().String() + "/" + b.image.Name, PlainHTTP: f.caFile == "", CAFile: f.caFile,
	}
}

// reset forgets what was asked for, and returns it.
func (f *front) reset() []asked {
	f.mu.Lock()
	defer f.mu.Unlock()
	all := f.asked
	f.asked = nil
	return all
}

// get asks for all of list again with a plain client that has readers requests under
// way, and returns how long each took, in milliseconds.
func (f *front) get(ctx context.Context, list []asked, readers int) ([]float64, error) {
	transport := &http.Transport{MaxIdleConnsPerHost: readers}
	defer transport.CloseIdleConnections()
	return inParallel(len(list), readers, func(i int) (time.Duration, error) {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, f.server.URL+list[i].path, nil)
		if err != nil {
			return 0, err
		}
		req.Header.Set("Range", list[i].bytes)
		start := time.Now()
		resp, err := transport.RoundTrip(req)
		if err != nil {
			return 0, err
		}
		defer resp.Body.Close()
		if resp.StatusCode != http.StatusPartialContent {
			return 0, fmt.Errorf("GET %s: %s", list[i].path, resp.Status)
		}
		_, err = io.Copy(io.Discard, resp.Body)
		return time.Since(start), err
	})
}

// inParallel calls do for each of n, so many workers at a time, and returns what they
// say that it took, in milliseconds.
func inParallel(n, workers int, do func(i int) (time.Duration, error)) ([]float64, error) {
	var next atomic.Int64
	times, errs := make([]float64, n), make([]error, workers)
	var all sync.WaitGroup
	for w := range workers {
		all.Go(func() {
			for errs[w] == nil {
				i := int(next.Add(1) - 1)
				if i >= n {
					return
				}
				var took time.Duration
				took, errs[w] = do(i)
				times[i] = float64(took.Microseconds()) / 1e3
			}
		})
	}
	all.Wait()
	return times, errors.Join(errs...)
}
