package scenario

import (
	"bytes"
	"context"
	"encoding/json"
	"maps"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/erofsd/erofsd/erofs"
	"github.com/erofsd/erofsd/internal/testenv"
)

// TestBesideNydusd prints how long a whole-tree read of an uncompressed image takes,
// cold and then warm by a new mount; with nydusd beside it where that is installed.
func TestBesideNydusd(t *testing.T) {
	r := Row{Name: "cachefiles", Transport: cachefilesTransport}
	r.need(t)
	q, want := fixture(t, "none")
	t.Run("erofsd", func(t *testing.T) {
		m := r.start(t, config{})
		for _, what := range []string{"cold", "warm"} {
			point, fs := m.mount(t, q)
			timeTree(t, what, want, fs)
			m.umountAll(t, point)
		}
	})
	t.Run("nydusd", func(t *testing.T) {
		program := testenv.Tool(t, "nydusd")
		dir := scratch(t)
		startNydusd(t, program, dir, q.Bootstrap, q.BlobDir)
		for _, what := range []string{"cold", "warm"} {
			point := t.TempDir()
			if err := erofs.Mount(erofs.MountOptions{Target: point, FSID: "none", Domain: "beside"}); err != nil {
				t.Fatal(err)
			}
			timeTree(t, what, want, mounted(point))
			if err := erofs.Unmount(point, false); err != nil {
				t.Fatal(err)
			}
		}
	})
}

// timeTree reads every file once and prints the time; only then it compares.
func timeTree(t *testing.T, what string, want testenv.Tree, fs fileSystem) {
	t.Helper()
	var size int64
	start := time.Now()
	for _, name := range slices.Sorted(maps.Keys(want)) {
		e := want[name]
		if e.Mode&unix.S_IFMT != unix.S_IFREG {
			continue
		}
		if _, err := readFile(fs, name, int(e.Size)); err != nil {
			t.Fatal(err)
		}
		size += e.Size
	}
	took := time.Since(start)
	t.Logf("%s: %d bytes in %v, %.1f MB/s", what, size, took.Round(time.Millisecond), float64(size)/1e6/took.Seconds())
	compare(t, want, fs)
}

// startNydusd starts nydusd with a cache in dir and makes an image known to it
// (nydusd-surface 1.3, 2.5). It ends with the test.
func startNydusd(t *testing.T, program, dir, bootstrap, blobs string) {
	t.Helper()
	socket := filepath.Join(dir, "api.sock")
	for _, name := range []string{"fscache", "work"} {
		if err := os.Mkdir(filepath.Join(dir, name), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	var log testenv.Buffer
	cmd := exec.Command(program, "singleton", "--fscache", filepath.Join(dir, "fscache"), "--apisock", socket)
	cmd.Stdout, cmd.Stderr = &log, &log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM) // it may have ended
		_ = cmd.Wait()                          // a signal ends it
	})
	type object = map[string]any
	entry, err := json.Marshal(object{"type": "bootstrap", "id": "none", "domain_id": "beside", "config": object{
		"id": "none", "backend_type": "localfs", "backend_config": object{"dir": blobs},
		"cache_type": "fscache", "cache_config": object{"work_dir": filepath.Join(dir, "work")}, "metadata_path": bootstrap,
	}})
	if err != nil {
		t.Fatal(err)
	}
	client := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", socket)
	}}}
	defer client.CloseIdleConnections()
	await(t, "nydusd to take the image", func() bool {
		q, err := http.NewRequestWithContext(t.Context(), http.MethodPut, "http://nydusd/api/v2/blobs", bytes.NewReader(entry))
		if err != nil {
			t.Fatal(err)
		}
		answer, err := client.Do(q)
		if err != nil {
			return false // it does not listen yet
		}
		defer answer.Body.Close()
		if answer.StatusCode != http.StatusNoContent {
			t.Fatalf("nydusd: %s\n%s", answer.Status, strings.TrimSpace(log.String()))
		}
		return true
	})
}
