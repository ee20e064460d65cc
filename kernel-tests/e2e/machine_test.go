package e2e

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/erofsd/erofsd/backend/backendtest"
	"github.com/erofsd/erofsd/internal/api"
	"github.com/erofsd/erofsd/kernel-tests/harness"
	"github.com/erofsd/erofsd/kernel-tests/services"
)

// bound is how long anything may take that may fail or succeed.
const bound = 30 * time.Second

type object = map[string]any

// A machine is a daemon with an empty cache, which ends with its test.
type machine struct {
	*harness.Daemon
	w       *world
	logFile string
	ended   bool
}

// start starts one. It has to fetch what is read: nothing comes unasked.
func (w *world) start(t *testing.T) *machine {
	t.Helper()
	root, err := os.MkdirTemp("", "erofsd-e2e-*")
	if err != nil {
		t.Fatal(err)
	}
	m := &machine{w: w, logFile: filepath.Join(root, "daemon.log")}
	m.begin(t, root)
	t.Cleanup(func() { m.end(t) })
	return m
}

func (m *machine) begin(t *testing.T, root string) {
	t.Helper()
	var err error
	m.Daemon, err = harness.StartDaemon(t.Context(), m.w.bin, root,
		"--transport", "fanotify", "--no-completion", "--log-level", "debug", "--log-file", m.logFile, "--rlimit-nofile", "0",
		"--unix-sockets") // of a backend that only the API names
	if err != nil {
		t.Fatal(err)
	}
}

// again ends the daemon with all mounts, looks at its cache, and starts another over it.
func (m *machine) again(t *testing.T) {
	t.Helper()
	m.stop(t)
	m.checkCache(t)
	m.begin(t, m.Root)
}

// stop unmounts everything and ends the daemon. A place may be busy for a moment: what
// another test starts has our open files until it is another program.
func (m *machine) stop(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), bound)
	defer cancel()
	st, err := m.Status(ctx)
	if err != nil {
		t.Error(err)
	}
	for _, i := range st.Images {
		if i.Detached {
			continue
		}
		err := m.Unmount(ctx, api.UnmountRequest{Mountpoint: i.Mountpoint})
		for end := time.Now().Add(5 * time.Second); err != nil && time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
			err = m.Unmount(ctx, api.UnmountRequest{Mountpoint: i.Mountpoint})
		}
		if err != nil {
			t.Error(err)
		}
	}
	if err := m.Stop(); err != nil {
		t.Error(err)
	}
}

// end unmounts everything and ends the daemon, in order. Whatever has happened, its cache
// has nothing wrong, and its log no secrets.
func (m *machine) end(t *testing.T) {
	t.Helper()
	if m.ended {
		return
	}
	m.ended = true
	m.stop(t)
	m.checkCache(t)
	log := m.log(t)
	for _, secret := range []string{services.Password, services.Secret, services.Auth(), backendtest.Signature, "eyJ", "panic:"} {
		if strings.Contains(log, secret) {
			t.Errorf("%q is in the daemon's log", secret)
		}
	}
	if t.Failed() {
		t.Logf("the daemon's log:\n%s", log[max(0, len(log)-6000):])
	}
	if err := os.RemoveAll(m.Root); err != nil {
		t.Error(err)
	}
}

// log is what the daemon has logged so far.
func (m *machine) log(t *testing.T) string {
	t.Helper()
	p, err := os.ReadFile(m.logFile)
	if err != nil {
		t.Error(err)
	}
	return string(p)
}

// awaitLog waits until text has been logged after the first so many bytes.
func (m *machine) awaitLog(t *testing.T, from int, text string, most time.Duration) {
	t.Helper()
	for deadline := time.Now().Add(most); !strings.Contains(m.log(t)[from:], text); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%q is not logged in %v", text, most)
		}
	}
}

// point makes a place to mount at.
func (m *machine) point(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp(m.Root, "mnt-*")
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// mount mounts the image by POST /api/v1/mount with nydus's first form of the
// configuration and returns the place.
func (m *machine) mount(t *testing.T, kind string, keys object) string {
	t.Helper()
	return m.mountConfig(t, legacy(kind, keys, m.Root))
}

// legacy is nydus's first form.
func legacy(kind string, keys object, dir string) object {
	return object{
		"device": object{
			"backend": object{"type": kind, "config": keys},
			"cache":   object{"type": "blobcache", "config": object{"work_dir": dir}},
		},
		"mode": "direct",
	}
}

// mount2 does so with the second form.
func (m *machine) mount2(t *testing.T, kind string, keys object) string {
	t.Helper()
	return m.mountConfig(t, object{
		"version": 2, "backend": object{"type": kind, kind: keys},
		"cache": object{"type": "filecache", "filecache": object{"work_dir": m.Root}},
	})
}

func (m *machine) mountConfig(t *testing.T, config object) string {
	t.Helper()
	point := m.point(t)
	if status, said := m.tryMount(t, point, config); status != http.StatusNoContent {
		t.Fatalf("mount: %d %s", status, said)
	}
	return point
}

// refused mounts as [machine.mount] does, which must fail with text in the answer.
func (m *machine) refused(t *testing.T, kind string, keys object, text string) {
	t.Helper()
	status, said := m.tryMount(t, m.point(t), legacy(kind, keys, m.Root))
	if status != http.StatusInternalServerError || !strings.Contains(said, text) {
		t.Errorf("mount: %d %s, want one that fails and says %q", status, said, text)
	}
}

func (m *machine) tryMount(t *testing.T, point string, config object) (status int, said string) {
	t.Helper()
	text, err := json.Marshal(config)
	if err != nil {
		t.Fatal(err)
	}
	return m.call(t, http.MethodPost, "/api/v1/mount?mountpoint="+url.QueryEscape(point), object{
		"source": m.w.bootstrap, "fs_type": "rafs", "config": string(text),
	})
}

// bind binds the image in a domain by PUT /api/v2/blobs, mounts it by our own API and
// returns the place.
func (m *machine) bind(t *testing.T, domain, kind string, keys object) string {
	t.Helper()
	status, said := m.call(t, http.MethodPut, "/api/v2/blobs", object{
		"type": "bootstrap", "id": "image-" + domain, "domain_id": domain, "config": object{
			"id": "image-" + domain, "backend_type": kind, "backend_config": keys, "cache_type": "fscache",
			"cache_config": object{"work_dir": m.Root}, "metadata_path": m.w.bootstrap,
		},
	})
	if status != http.StatusNoContent {
		t.Fatalf("bind: %d %s", status, said)
	}
	point := m.point(t)
	// Without a domain the kernel takes the image's own name for it.
	r := api.MountRequest{Mountpoint: point, Image: "image-" + domain, DomainID: cmp.Or(domain, "image-"+domain)}
	if _, err := m.Mount(t.Context(), r); err != nil {
		t.Fatal(err)
	}
	return point
}

// call makes a request of nydusd's API.
func (m *machine) call(t *testing.T, method, target string, body any) (status int, said string) {
	t.Helper()
	text, err := json.Marshal(body)
	if err != nil {
		t.Fatal(err)
	}
	client := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", filepath.Join(m.Root, "sock"))
	}}}
	defer client.CloseIdleConnections()
	r, err := http.NewRequestWithContext(t.Context(), method, "http://nydusd"+target, bytes.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	resp, err := client.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	p, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(p)
}

// cacheFiles are the blob's files in the cache, one for each domain.
func (m *machine) cacheFiles(t *testing.T) []string {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(m.Root, "cache", "*"+m.w.id))
	if err != nil {
		t.Fatal(err)
	}
	return names
}

// checkCache compares what the cache has, which may be a part. No daemon may run: it would
// fetch what is read.
func (m *machine) checkCache(t *testing.T) {
	t.Helper()
	for _, name := range m.cacheFiles(t) {
		got, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if len(m.w.cache) > 0 && len(got) != len(m.w.cache) {
			t.Errorf("the cache file has %d bytes, want %d", len(got), len(m.w.cache))
			continue
		}
		wrong := 0
		for i := 0; i < len(m.w.cache); i += page {
			p := got[i:min(i+page, len(got))]
			if !bytes.Equal(p, m.w.cache[i:][:len(p)]) && bytes.Count(p, []byte{0}) < len(p) {
				wrong++
			}
		}
		if wrong > 0 {
			t.Errorf("%d pages of %s are wrong", wrong, filepath.Base(name))
		}
	}
}

const page = 4096

// whole reads everything, and the cache file, of which then nothing is missing.
func (m *machine) whole(t *testing.T, point string) {
	t.Helper()
	m.w.compare(t, point)
	names := m.cacheFiles(t)
	if len(names) != 1 {
		t.Fatalf("want one cache file, got %v", names)
	}
	if got, err := os.ReadFile(names[0]); err != nil || !bytes.Equal(got, m.w.cache) {
		t.Errorf("the cache is not as it should be: %v", err)
	}
}

// mustRead reads files, which must be right and not take long.
func (m *machine) mustRead(t *testing.T, point string, names ...string) {
	t.Helper()
	for _, name := range names {
		if took, err := m.w.read(point, name); err != nil || took > bound {
			t.Errorf("after %v: %v", took, err)
		}
	}
}

// mustFail reads a file, which must fail in time.
func (m *machine) mustFail(t *testing.T, point, name string) time.Duration {
	t.Helper()
	took, err := m.w.read(point, name)
	if !errors.Is(err, unix.EIO) || took > bound {
		t.Errorf("after %v: %v, want EIO", took, err)
	}
	return took
}

// recovers waits until a file that could not be read can be.
func (m *machine) recovers(t *testing.T, point, name string) {
	t.Helper()
	var err error
	for deadline := time.Now().Add(bound); time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
		if _, err = m.w.read(point, name); err == nil {
			return
		}
	}
	t.Errorf("after %v it cannot be read yet: %v", bound, err)
}
