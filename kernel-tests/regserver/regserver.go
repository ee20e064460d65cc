// Package regserver is an OCI registry on loopback for measurements: it keeps
// what is pushed in a directory and counts what is fetched, so that the figures
// come from outside of the program that is measured.
package regserver

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"strings"
	"sync"

	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// Stats counts what clients fetched. Pushes and errors do not count as fetched.
type Stats struct {
	Active       int64 // being answered; they are counted when the client has the answer, a little after
	Requests     int64 // of any kind
	BlobRequests int64 // GET of blobs and of ranges of blobs
	BlobBytes    int64 // bodies of these
	Blobs        map[string]Blob
}

// Blob counts the fetches of one blob.
type Blob struct {
	Requests, Bytes int64
}

// Server is a running registry. All methods are safe for concurrent use.
type Server struct {
	dir      string
	registry http.Handler
	http     http.Server
	addr     string
	done     chan error

	mu     sync.Mutex
	stats  Stats // without Active
	active int64
}

// New starts a registry on a new loopback port that keeps its content in dir, and
// serves what an earlier one left there.
func New(dir string) (*Server, error) {
	blobs := store(filepath.Join(dir, "blobs"))
	if err := os.MkdirAll(string(blobs), 0o755); err != nil {
		return nil, err
	}
	s := &Server{dir: dir, done: make(chan error, 1), stats: Stats{Blobs: make(map[string]Blob)}}
	s.registry = registry.New(registry.WithBlobHandler(blobs), registry.Logger(log.New(io.Discard, "", 0)))
	if err := s.restore(); err != nil {
		return nil, fmt.Errorf("registry in %s: %w", dir, err)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	s.addr = listener.Addr().String()
	s.http.Handler = s
	go func() { s.done <- s.http.Serve(listener) }()
	return s, nil
}

// Addr is the registry's host:port.
func (s *Server) Addr() string { return s.addr }

// Close ends all connections and waits for the server.
func (s *Server) Close() error {
	err := s.http.Close()
	<-s.done
	return err
}

// Stats returns what has been fetched since the last Reset.
func (s *Server) Stats() Stats {
	s.mu.Lock()
	defer s.mu.Unlock()
	copied := s.stats
	copied.Active = s.active
	copied.Blobs = make(map[string]Blob, len(s.stats.Blobs))
	for digest, b := range s.stats.Blobs {
		copied.Blobs[digest] = b
	}
	return copied
}

// Reset sets all counts to zero.
func (s *Server) Reset() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stats = Stats{Blobs: make(map[string]Blob)}
}

// ServeHTTP answers one request, counts it, and keeps a manifest that was pushed.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Method == http.MethodPut && strings.Contains(r.URL.Path, "/manifests/") {
		s.putManifest(w, r)
		return
	}
	s.begun(1)
	defer s.begun(-1) // the last: then it has been counted
	counted := &countingWriter{ResponseWriter: w, status: http.StatusOK}
	s.registry.ServeHTTP(counted, r)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stats.Requests++
	if r.Method == http.MethodGet && strings.Contains(r.URL.Path, "/blobs/sha256:") && counted.status < 300 {
		s.stats.BlobRequests++
		s.stats.BlobBytes += counted.bytes
		b := s.stats.Blobs[path.Base(r.URL.Path)]
		s.stats.Blobs[path.Base(r.URL.Path)] = Blob{b.Requests + 1, b.Bytes + counted.bytes}
	}
}

func (s *Server) begun(n int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.active += n
}

// countingWriter counts the body. It passes ReadFrom on so that files go out by
// sendfile: the registry shares the processors with what is measured.
type countingWriter struct {
	http.ResponseWriter
	status int
	bytes  int64
}

func (w *countingWriter) WriteHeader(status int) {
	w.status = status
	w.ResponseWriter.WriteHeader(status)
}

func (w *countingWriter) Write(p []byte) (int, error) {
	n, err := w.ResponseWriter.Write(p)
	w.bytes += int64(n)
	return n, err
}

func (w *countingWriter) ReadFrom(r io.Reader) (int64, error) {
	n, err := io.Copy(w.ResponseWriter, r)
	w.bytes += n
	return n, err
}

// manifestLimit is the size at which registries refuse a manifest.
const manifestLimit = 4 << 20

// putManifest passes a manifest on and, when it was accepted, keeps it in a file
// that is called like its path and begins with its media type in a line.
func (s *Server) putManifest(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, manifestLimit))
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	mediaType := r.Header.Get("Content-Type")
	if status := s.replay(r.URL.Path, mediaType, body, w); status >= 300 {
		return
	}
	name := filepath.Join(s.dir, "manifest-"+url.PathEscape(r.URL.Path))
	if err := os.WriteFile(name, append([]byte(mediaType+"\n"), body...), 0o644); err != nil {
		log.Printf("registry: %v", err)
	}
}

// replay puts a manifest into the registry and returns the status.
func (s *Server) replay(path, mediaType string, body []byte, w http.ResponseWriter) int {
	req := httptest.NewRequest(http.MethodPut, path, strings.NewReader(string(body)))
	req.Header.Set("Content-Type", mediaType)
	counted := &countingWriter{ResponseWriter: w, status: http.StatusOK}
	s.registry.ServeHTTP(counted, req)
	return counted.status
}

// restore puts back the manifests that an earlier server kept.
func (s *Server) restore() error {
	names, err := filepath.Glob(filepath.Join(s.dir, "manifest-*"))
	if err != nil {
		return err
	}
	for _, name := range names {
		text, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		path, err := url.PathUnescape(strings.TrimPrefix(filepath.Base(name), "manifest-"))
		if err != nil {
			return err
		}
		mediaType, body, _ := strings.Cut(string(text), "\n")
		answer := httptest.NewRecorder()
		if status := s.replay(path, mediaType, []byte(body), answer); status >= 300 {
			return fmt.Errorf("%s is refused: %s", name, answer.Body)
		}
	}
	return nil
}

// store keeps blobs as files named by their digest. The handler that comes with
// the registry reads the whole blob for every range.
type store string

func (s store) name(h v1.Hash) string { return filepath.Join(string(s), h.Hex) }

func (s store) Stat(_ context.Context, _ string, h v1.Hash) (int64, error) {
	info, err := os.Stat(s.name(h))
	if errors.Is(err, os.ErrNotExist) {
		return 0, registry.ErrNotFound
	}
	if err != nil {
		return 0, err
	}
	return info.Size(), nil
}

func (s store) Get(_ context.Context, _ string, h v1.Hash) (io.ReadCloser, error) {
	return os.Open(s.name(h))
}

func (s store) Put(_ context.Context, _ string, h v1.Hash, r io.ReadCloser) error {
	f, err := os.CreateTemp(string(s), "upload-*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // after the rename there is none
	_, err = io.Copy(f, r)
	if err := errors.Join(err, f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), s.name(h))
}
