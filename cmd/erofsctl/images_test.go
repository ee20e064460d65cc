package main

import (
	"bytes"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/erofsd/erofsd/internal/api"
)

// A recorder stands in for the daemon: it keeps the last request.
type recorder struct {
	mu   sync.Mutex // guards what follows
	path string
	body map[string]any

	answer string // to everything; "": as below
}

func (r *recorder) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	p, _ := io.ReadAll(req.Body) // a short one fails the comparison
	r.mu.Lock()
	defer r.mu.Unlock()
	r.path, r.body = strings.TrimPrefix(req.URL.Path, api.Prefix), nil
	_ = json.Unmarshal(p, &r.body)
	answers := map[string]string{
		"/images/usage": `{"disk":2048,"present":1024,"total":4096,"blobs":[{"id":"b","disk":2048}]}`,
		"/cache/evict":  `{"bytes":1024,"images":3}`,
		"/cache/scrub":  `{"blobs":2,"chunks":9,"bytes":1024,"wrong":1,"repaired":1}`,
	}
	answer, ok := answers[r.path]
	if !ok {
		answer = "{}"
	}
	if r.answer != "" {
		answer = r.answer
	}
	_, _ = io.WriteString(w, answer)
}

func record(t *testing.T) (*recorder, string) {
	t.Helper()
	r, socket := &recorder{}, filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: r}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = srv.Serve(l) // ends with ErrServerClosed
	}()
	t.Cleanup(func() {
		srv.Close()
		<-done
	})
	return r, socket
}

func TestImageCommands(t *testing.T) {
	r, socket := record(t)
	dir := t.TempDir()
	for name, text := range map[string]string{"c.json": `{"version":2}`, "c.toml": "version = 2\n"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	boot := filepath.Join(dir, "app.boot")
	for name, tc := range map[string]struct {
		args, input, path string
		body              map[string]any
		out               string
	}{
		"bind": {
			args: "bind --bootstrap " + boot + " --config " + dir + "/c.json --domain d --pin app", path: "/images/bind",
			body: map[string]any{"id": "app", "domain_id": "d", "bootstrap": boot, "config": map[string]any{"version": 2.0}, "pinned": true},
		},
		"bind with TOML": {
			args: "bind --bootstrap " + boot + " --config " + dir + "/c.toml app", path: "/images/bind",
			body: map[string]any{"id": "app", "bootstrap": boot, "config": "version = 2\n"},
		},
		"unbind": {args: "unbind --domain d app", path: "/images/unbind", body: map[string]any{"image": "app", "domain_id": "d"}},
		"prefetch": {
			args: "prefetch app /usr/bin /etc", path: "/images/prefetch",
			body: map[string]any{"image": "app", "files": []any{"/usr/bin", "/etc"}},
		},
		"prefetch from a list": {
			args: "prefetch app", input: "/a\n\n /b \n", path: "/images/prefetch",
			body: map[string]any{"image": "app", "files": []any{"/a", "/b"}},
		},
		"pin":   {args: "pin app", path: "/images/pin", body: map[string]any{"image": "app", "pinned": true}},
		"unpin": {args: "pin --off app", path: "/images/pin", body: map[string]any{"image": "app", "pinned": false}},
		"usage": {
			args: "usage app", path: "/images/usage", body: map[string]any{"image": "app"},
			out: "2.0 KiB on disk, 1.0 KiB of 4.0 KiB present\n  blob b  2.0 KiB\n",
		},
		"evict": {
			args: "evict --to 4096", path: "/cache/evict", body: map[string]any{"target": 4096.0},
			out: "3 images are left, 1.0 KiB\n",
		},
		"scrub": {
			args: "scrub --rate 1MiB --domain d app", path: "/cache/scrub",
			body: map[string]any{"images": []any{"app"}, "domain_id": "d", "rate": 1048576.0},
			out:  "2 blobs, 9 chunks, 1.0 KiB verified: 1 wrong, 1 repaired, 0 not repaired\n",
		},
	} {
		t.Run(name, func(t *testing.T) {
			var out bytes.Buffer
			c := command()
			c.Writer, c.Reader = &out, strings.NewReader(tc.input)
			if err := c.Run(t.Context(), append([]string{"erofsctl", "--daemon", socket}, strings.Fields(tc.args)...)); err != nil {
				t.Fatal(err)
			}
			r.mu.Lock()
			defer r.mu.Unlock()
			if r.path != tc.path {
				t.Errorf("asked %s, want %s", r.path, tc.path)
			}
			if d := cmp.Diff(tc.body, r.body); d != "" {
				t.Error(d)
			}
			if out.String() != tc.out {
				t.Errorf("printed %q, want %q", out.String(), tc.out)
			}
		})
	}
}

// What could not be repaired is in the exit code.
func TestScrubUnrepaired(t *testing.T) {
	r, socket := record(t)
	r.answer = `{"blobs":1,"chunks":2,"bytes":1024,"wrong":1,"unrepaired":1,"errors":["blob b at 0: no backend"]}`
	var out bytes.Buffer
	c := command()
	c.Writer = &out
	err := c.Run(t.Context(), []string{"erofsctl", "--daemon", socket, "scrub"})
	if err == nil || !strings.Contains(out.String(), "0 repaired, 1 not repaired\n  blob b at 0: no backend\n") {
		t.Errorf("%v, printed %q", err, out.String())
	}
}

func TestImageCommandsRefused(t *testing.T) {
	_, socket := record(t)
	for _, args := range []string{
		"bind", "bind app", "bind --bootstrap b --config /no/such/file app", "unbind", "unbind a b", "prefetch", "pin", "usage", "scrub --rate 0", "scrub --rate x",
		"mount --bound app", "mount --bound app --bootstrap b /mnt", "mount ref --bound app /mnt",
	} {
		c := command()
		c.Writer, c.ErrWriter = io.Discard, io.Discard
		if err := c.Run(t.Context(), append([]string{"erofsctl", "--daemon", socket}, strings.Fields(args)...)); err == nil {
			t.Errorf("%q: no error", args)
		}
	}
}
