package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/erofsd/erofsd/internal/api"
	"github.com/erofsd/erofsd/internal/testenv"
	"github.com/erofsd/erofsd/snapshotter"
)

// A fakeNode is the snapshotter and the daemon.
type fakeNode struct {
	down   error // of the daemon
	images []snapshotter.Image
	calls  []string
}

func (f *fakeNode) Images(context.Context) ([]snapshotter.Image, error) { return f.images, nil }

func (f *fakeNode) Prefetch(_ context.Context, reference string, files []string) error {
	f.calls = append(f.calls, fmt.Sprint("prefetch ", reference, files))
	if reference == "" {
		return fmt.Errorf("no reference: %w", errdefs.ErrInvalidArgument)
	}
	return nil
}

func (f *fakeNode) Version(context.Context) (api.VersionInfo, error) {
	return api.VersionInfo{Version: "v9", PID: os.Getpid()}, f.down
}

func (f *fakeNode) Cache(context.Context) (api.Cache, error) { return api.Cache{Bytes: 4096}, f.down }

func (f *fakeNode) Status(context.Context) (api.Status, error) {
	m := api.Mount{ID: "i", BytesFetched: 2048}
	return api.Status{PID: os.Getpid(), Images: []api.Mount{m, m}}, f.down
}

func (f *fakeNode) Upgrade(_ context.Context, r api.UpgradeRequest) error {
	f.calls = append(f.calls, "upgrade "+r.Executable)
	return f.down
}

func newNode() *fakeNode {
	return &fakeNode{images: []snapshotter.Image{
		{Snapshot: "7", Dir: "/s/7", Mountpoint: "/s/7/mnt", Mounted: true, ID: "i", Reference: "registry.example/app:1"},
		{Snapshot: "8", Failure: "no"},
		{Snapshot: "9"},
	}}
}

func (f *fakeNode) Explain(_ context.Context, reference string, chainIDs []string) ([]api.Explanation, error) {
	if reference == "unknown" {
		return []api.Explanation{}, nil
	}
	return []api.Explanation{{Reference: reference, Name: fmt.Sprint(chainIDs), Why: "so"}}, nil
}

func (f *fakeNode) tops(context.Context, string) ([]string, error) {
	return []string{"sha256:top"}, f.down
}

// ask makes a request and returns the status and the body.
func ask(h http.Handler, method, path, body string) (int, string) {
	w := httptest.NewRecorder()
	h.ServeHTTP(w, httptest.NewRequest(method, path, strings.NewReader(body)))
	return w.Code, strings.TrimSpace(w.Body.String())
}

// TestSystem asks as nydus-snapshotter's clients do.
func TestSystem(t *testing.T) {
	node := newNode()
	c := defaultConfig()
	c.Backend.Template = filepath.Join(t.TempDir(), "t.json")
	template := `{"type":"bootstrap","config":{"backend_type":"registry","backend_config":{"scheme":"http","auth":"c2VjcmV0","registry_token":"secret","anything":"secret"}}}`
	if err := os.WriteFile(c.Backend.Template, []byte(template), 0o600); err != nil {
		t.Fatal(err)
	}
	h := (&system{c: c, images: node, daemon: node, tops: node.tops}).handler()
	status, body := ask(h, "GET", "/api/v1/daemons", "")
	var list []map[string]any
	if err := json.Unmarshal([]byte(body), &list); err != nil || status != 200 || len(list) != 1 {
		t.Fatalf("daemons: %d %s", status, body)
	}
	d := list[0]
	if rss, _ := d["memory_rss_kb"].(float64); rss <= 0 {
		t.Errorf("memory %v", d["memory_rss_kb"])
	}
	for key, want := range map[string]any{
		"id": "erofsd", "pid": float64(os.Getpid()), "api_socket": c.Daemon.Socket, "supervisor_path": "", "reference": 1.0, "mountpoint": "", "startup_cpu_utilization": 0.0,
		"read_data_kb": 2.0,
	} {
		if d[key] != want {
			t.Errorf("%s is %v, want %v", key, d[key], want)
		}
	}
	want := "map[7:map[image_id:registry.example/app:1 mountpoint:/s/7/mnt snapshot_dir:/s/7 snapshot_id:7]]"
	if got := fmt.Sprint(d["instances"]); got != want {
		t.Errorf("instances %s, want %s", got, want)
	}
	for _, c := range []struct {
		method, path, body string
		status             int
		answer             string // a part
	}{
		{"GET", "/api/v1/daemons/records", "", 501, `"code":"Unknown"`},
		{"PUT", "/api/v1/daemons/upgrade", `{"nydusd_path":"/opt/erofsd","version":"v2","policy":"rolling"}`, 200, ""},
		{"PUT", "/api/v1/daemons/upgrade", `{"nydusd_path":"erofsd"}`, 400, "no absolute path"},
		{"PUT", "/api/v1/daemons/upgrade", `{`, 400, `"code":"Unknown"`},
		{"PUT", "/api/v1/prefetch", `[{"image":"registry.example/app:1","prefetch":"/a, /b/,"},{"image":"x","prefetch":"/c"}]`, 200, ""},
		{"PUT", "/api/v1/prefetch", `[{"image":"","prefetch":"/a"}]`, 400, "no reference"},
		{"PUT", "/api/v1/prefetch", `nonsense`, 400, `"message":"decode request`},
		{"GET", "/api/v1/daemons/erofsd/backend", "", 200, `{"type":"registry","config":{"scheme":"http"}}`},
		{"GET", "/api/v1/daemons/other/backend", "", 404, "called erofsd"},
		{"GET", "/api/erofsd/v1/explain?image=registry.example/app:1", "", 200, `"name":"[sha256:top]"`},
		{"GET", "/api/erofsd/v1/explain", "", 200, `"name":"[]"`},
		{"GET", "/api/erofsd/v1/explain?image=unknown", "", 200, `[]`},
		{"POST", "/api/v1/prefetch", "[]", 405, ""},
	} {
		status, body := ask(h, c.method, c.path, c.body)
		if status != c.status || !strings.Contains(body, c.answer) || strings.Contains(body, "secret") {
			t.Errorf("%s %s %s: %d %s, want %d with %s", c.method, c.path, c.body, status, body, c.status, c.answer)
		}
	}
	calls := "[upgrade /opt/erofsd prefetch registry.example/app:1[/a /b/] prefetch x[/c] prefetch [/a]]"
	if got := fmt.Sprint(node.calls); got != calls {
		t.Errorf("calls %s, want %s", got, calls)
	}
	node.down = errors.New("down")
	if status, body := ask(h, "GET", "/api/v1/daemons", ""); status != 200 || body != "[]" {
		t.Errorf("without a daemon: %d %s", status, body)
	}
	if status, body := ask(h, "GET", "/api/erofsd/v1/explain?image=unknown", ""); status != 500 || !strings.Contains(body, `{"error":"no image is known`) {
		t.Errorf("of nothing known, and containerd gone: %d %s", status, body)
	}
}

// TestMetrics has upstream's names and ours, and goes on without a daemon.
func TestMetrics(t *testing.T) {
	testenv.Root(t)
	node, m := newNode(), newMetrics()
	m.registry.MustRegister(reader{images: node, daemon: node})
	m.event("RUNNING")
	sn, err := snapshotter.New(t.TempDir(), nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer sn.Close()
	s := measured{sn, sn, m}
	if _, err := s.Prepare(t.Context(), "a", ""); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Mounts(t.Context(), "none"); !errdefs.IsNotFound(err) {
		t.Fatal(err)
	}
	if err := s.Commit(t.Context(), "b", "a"); err != nil {
		t.Fatal(err)
	}
	if _, err := s.View(t.Context(), "v", "b"); err != nil {
		t.Fatal(err)
	}
	if err := s.Remove(t.Context(), "b"); !errdefs.IsFailedPrecondition(err) {
		t.Fatal(err)
	}
	if err := s.Cleanup(t.Context()); err != nil {
		t.Fatal(err)
	}
	status, body := ask(m.handler(), "GET", "/v1/metrics", "")
	if status != 200 {
		t.Fatalf("%d %s", status, body)
	}
	wants := []string{
		`erofsd_snapshotter_images{state="mounted"} 1`, `erofsd_snapshotter_images{state="failed"} 1`, `erofsd_snapshotter_images{state="idle"} 1`,
		`erofsd_snapshotter_daemon_up 1`, `nydusd_counts{version="v9"} 1`, `nydusd_rss_kilobytes{daemon_id="erofsd"}`, `snapshotter_cache_usage_kilobytes 4`,
		`nydusd_lifetime_event_counts{nydusd_event="RUNNING"} 1`, `erofsd_snapshotter_operation_errors_total{snapshot_operation="REMOVE"} 1`,
		"snapshotter_cpu_user_time_seconds", "snapshotter_cpu_system_time_seconds", "snapshotter_memory_usage_kilobytes", "snapshotter_run_time_seconds",
		"snapshotter_fd_counts", "snapshotter_thread_counts", "go_goroutines", "process_open_fds",
	}
	for _, op := range []string{"PREPARE", "MOUNTS", "COMMIT", "VIEW", "REMOVE", "CLEANUP"} {
		wants = append(wants, `snapshotter_snapshot_operation_elapsed_milliseconds_count{snapshot_operation="`+op+`"} 1`)
	}
	for _, want := range wants {
		if !strings.Contains(body, "\n"+want) {
			t.Errorf("no %s", want)
		}
	}
	if strings.Contains(body, "registry.example") || strings.Contains(body, `errors_total{snapshot_operation="MOUNTS"}`) {
		t.Errorf("it names an image, or counts what was not found as an error:\n%s", body)
	}
	node.down = errors.New("down")
	status, body = ask(m.handler(), "GET", "/metrics", "")
	if status != 200 || !strings.Contains(body, "erofsd_snapshotter_daemon_up 0") || strings.Contains(body, "\nnydusd_counts") {
		t.Errorf("without a daemon: %d\n%s", status, body)
	}
}

// get asks a web at an address.
func get(t *testing.T, network, address, path string) (int, string) {
	t.Helper()
	return request(t, network, address, http.MethodGet, path, "")
}

// request asks a web at an address with a method and a body.
func request(t *testing.T, network, address, method, path, body string) (int, string) {
	t.Helper()
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, network, address)
	}}
	defer transport.CloseIdleConnections()
	req, err := http.NewRequestWithContext(t.Context(), method, "http://snapshotter"+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	resp, err := transport.RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(answer)
}

// TestWebs opens each where it was asked for, sockets for their owner alone, and nothing of
// one at another.
func TestWebs(t *testing.T) {
	testenv.Root(t)
	dir := t.TempDir()
	c := defaultConfig()
	c.System.Address = filepath.Join(dir, "run", "system.sock")
	c.System.Pprof = "unix:" + filepath.Join(dir, "run", "pprof.sock")
	c.Metrics.Address = "127.0.0.1:0"
	node, m := newNode(), newMetrics()
	all, err := openWebs(c, (&system{c: c, images: node, daemon: node, tops: node.tops}).handler(), m.handler())
	if err != nil {
		t.Fatal(err)
	}
	ctx, end := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() { defer close(ended); all.serve(ctx, slog.New(slog.DiscardHandler)) }()
	defer func() { end(); <-ended }()
	for name, want := range map[string]os.FileMode{"run": 0o700, "run/system.sock": 0o600, "run/pprof.sock": 0o600} {
		if st, err := os.Stat(filepath.Join(dir, name)); err != nil || st.Mode().Perm() != want {
			t.Errorf("%s: %v, %v; want %o", name, st, err, want)
		}
	}
	tcp := all[1].listener.Addr().String()
	for _, c := range []struct {
		network, address, path string
		status                 int
	}{
		{"unix", c.System.Address, "/api/v1/daemons", 200},
		{"unix", c.System.Address, "/debug/pprof/", 404},
		{"unix", c.System.Address, "/v1/metrics", 404},
		{"tcp", tcp, "/v1/metrics", 200},
		{"tcp", tcp, "/debug/pprof/heap", 404},
		{"tcp", tcp, "/api/v1/daemons", 404},
		{"unix", filepath.Join(dir, "run", "pprof.sock"), "/debug/pprof/heap", 200},
		{"unix", filepath.Join(dir, "run", "pprof.sock"), "/v1/metrics", 404},
	} {
		if status, body := get(t, c.network, c.address, c.path); status != c.status {
			t.Errorf("%s%s: %d, want %d\n%.200s", c.address, c.path, status, c.status, body)
		}
	}
	if _, err := openWebs(c, nil, nil); err == nil || !strings.Contains(err.Error(), "system API") {
		t.Errorf("a second one at the same socket: %v", err)
	}
	c.System, c.Metrics.Address = systemConfig{}, ""
	if none, err := openWebs(c, nil, nil); err != nil || len(none) != 0 {
		t.Errorf("nothing was asked for: %v, %v", none, err)
	}
}

// TestPprofAddress refuses what other machines reach.
func TestPprofAddress(t *testing.T) {
	for address, good := range map[string]bool{
		"unix:/run/x.sock": true, "127.0.0.1:6060": true, "[::1]:6060": true, "localhost:6060": true,
		":6060": false, "0.0.0.0:6060": false, "10.0.0.1:6060": false, "example.com:6060": false, "unix:x": false, "6060": false,
	} {
		if err := checkPprof(address); (err == nil) != good {
			t.Errorf("%s: %v", address, err)
		}
	}
}
