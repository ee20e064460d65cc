package api

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// fake answers with what it is told.
type fake struct {
	mount  Mount
	status Status
	err    error
	got    any
}

func (f *fake) Mount(_ context.Context, r MountRequest) (Mount, error) {
	f.got = r
	return f.mount, f.err
}

func (f *fake) Unmount(_ context.Context, r UnmountRequest) error {
	f.got = r
	return f.err
}

func (f *fake) Remove(_ context.Context, r RemoveRequest) error {
	f.got = r
	return f.err
}

func (f *fake) BindImage(_ context.Context, r BindRequest) error { return f.take(r) }

func (f *fake) UnbindImage(_ context.Context, r ImageRequest) error { return f.take(r) }

func (f *fake) Pin(_ context.Context, r PinRequest) error { return f.take(r) }

func (f *fake) Prefetch(_ context.Context, r PrefetchRequest) error { return f.take(r) }

func (f *fake) Usage(_ context.Context, r ImageRequest) (Usage, error) {
	return Usage{Disk: 5, Blobs: []BlobUsage{}}, f.take(r)
}

func (f *fake) Cache(context.Context) (Cache, error) { return Cache{Bytes: 6}, f.err }

func (f *fake) Evict(_ context.Context, r EvictRequest) (Cache, error) {
	return Cache{Bytes: r.Target}, f.take(r)
}

func (f *fake) Upgrade(_ context.Context, r UpgradeRequest) error { return f.take(r) }

func (f *fake) Scrub(_ context.Context, r ScrubRequest) (Scrub, error) {
	return Scrub{Bytes: r.Rate}, f.take(r)
}

func (f *fake) Version(context.Context) (VersionInfo, error) { return VersionInfo{PID: 7}, f.err }

func (f *fake) Health(context.Context) error { return f.err }

// take remembers a request.
func (f *fake) take(r any) error {
	f.got = r
	return f.err
}

func (f *fake) Status(context.Context) (Status, error) { return f.status, f.err }

// serve starts a handler of s at a socket and returns its path.
func serve(t *testing.T, s Service) string {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: Handler(s)}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = srv.Serve(l) // ends with ErrServerClosed
	}()
	t.Cleanup(func() {
		srv.Close()
		<-done
	})
	return socket
}

func client(t *testing.T, socket string) *Client {
	t.Helper()
	c := NewClient(socket)
	t.Cleanup(func() { c.Close() })
	return c
}

func TestRoundTrip(t *testing.T) {
	f := &fake{
		mount:  Mount{Mountpoint: "/m", ID: "id", BytesTotal: 7, Blobs: []Blob{{ID: "b"}}},
		status: Status{Version: "v", Images: []Mount{{Mountpoint: "/m", Blobs: []Blob{}}}},
	}
	c := client(t, serve(t, f))
	req := MountRequest{Mountpoint: "/m", Bootstrap: "/b", BlobDir: "/d"}
	m, err := c.Mount(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(f.mount, m); d != "" {
		t.Error(d)
	}
	if d := cmp.Diff(any(req), f.got); d != "" {
		t.Error(d)
	}
	st, err := c.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(f.status, st); d != "" {
		t.Error(d)
	}
	if err := c.Unmount(t.Context(), UnmountRequest{Mountpoint: "/m"}); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(any(UnmountRequest{Mountpoint: "/m"}), f.got); d != "" {
		t.Error(d)
	}
}

// Every call brings its request to the service and the answer back.
func TestCalls(t *testing.T) {
	f := &fake{}
	c, ctx := client(t, serve(t, f)), t.Context()
	for name, tc := range map[string]struct {
		want any // request
		call func() error
	}{
		"bind": {BindRequest{ID: "i", Bootstrap: "/b", Config: []byte(`{"a":1}`)}, func() error {
			return c.BindImage(ctx, BindRequest{ID: "i", Bootstrap: "/b", Config: []byte(`{"a":1}`)})
		}},
		"unbind":   {ImageRequest{Image: "i"}, func() error { return c.UnbindImage(ctx, ImageRequest{Image: "i"}) }},
		"remove":   {RemoveRequest{Image: "i"}, func() error { return c.Remove(ctx, RemoveRequest{Image: "i"}) }},
		"pin":      {PinRequest{Image: "i", Pinned: true}, func() error { return c.Pin(ctx, PinRequest{Image: "i", Pinned: true}) }},
		"prefetch": {PrefetchRequest{Image: "i", Files: []string{"/"}}, func() error { return c.Prefetch(ctx, PrefetchRequest{Image: "i", Files: []string{"/"}}) }},
		"usage": {ImageRequest{Image: "i"}, func() error {
			u, err := c.Usage(ctx, ImageRequest{Image: "i"})
			return errors.Join(err, want(u.Disk, 5))
		}},
		"cache": {nil, func() error {
			a, err := c.Cache(ctx)
			return errors.Join(err, want(a.Bytes, 6))
		}},
		"evict": {EvictRequest{Target: 9}, func() error {
			a, err := c.Evict(ctx, EvictRequest{Target: 9})
			return errors.Join(err, want(a.Bytes, 9))
		}},
		"upgrade": {UpgradeRequest{Executable: "/e"}, func() error { return c.Upgrade(ctx, UpgradeRequest{Executable: "/e"}) }},
		"scrub": {ScrubRequest{Images: []string{"i"}, Rate: 8}, func() error {
			a, err := c.Scrub(ctx, ScrubRequest{Images: []string{"i"}, Rate: 8})
			return errors.Join(err, want(a.Bytes, 8))
		}},
		"version": {nil, func() error {
			v, err := c.Version(ctx)
			return errors.Join(err, want(int64(v.PID), 7))
		}},
		"health": {nil, func() error { return c.Health(ctx) }},
	} {
		t.Run(name, func(t *testing.T) {
			f.got = nil
			if err := tc.call(); err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(tc.want, f.got); d != "" {
				t.Error(d)
			}
		})
	}
	f.err = Unavailable(errors.New("not now"))
	if e := (*Error)(nil); !errors.As(c.Health(ctx), &e) || e.Status != http.StatusServiceUnavailable {
		t.Errorf("health: %v", e)
	}
}

func want(got, want int64) error {
	if got != want {
		return fmt.Errorf("got %d, want %d", got, want)
	}
	return nil
}

func TestErrorsCrossTheSocket(t *testing.T) {
	for name, tc := range map[string]struct {
		err    error
		status int
	}{
		"bad request": {BadRequest(errors.New("mend it")), http.StatusBadRequest},
		"conflict":    {Conflict(errors.New("busy")), http.StatusConflict},
		"not found":   {NotFound(errors.New("gone")), http.StatusNotFound},
		"other":       {errors.New("broken"), http.StatusInternalServerError},
	} {
		t.Run(name, func(t *testing.T) {
			c := client(t, serve(t, &fake{err: tc.err}))
			err := c.Unmount(t.Context(), UnmountRequest{})
			e := (*Error)(nil)
			if !errors.As(err, &e) || e.Status != tc.status || e.Message != tc.err.Error() {
				t.Errorf("got %v (%+v), want %v with status %d", err, e, tc.err, tc.status)
			}
		})
	}
}

func TestBadRequests(t *testing.T) {
	socket := serve(t, &fake{})
	c := client(t, socket)
	for name, body := range map[string]string{
		"not JSON":      "{",
		"unknown field": `{"mountpoint":"/m","colour":"red"}`,
		"too large":     `{"mountpoint":"` + strings.Repeat("a", maxBody) + `"}`,
	} {
		t.Run(name, func(t *testing.T) {
			resp, err := c.http.Post("http://erofsd"+Prefix+"/images/mount", "application/json", strings.NewReader(body))
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			if resp.StatusCode != http.StatusBadRequest {
				t.Errorf("got %s", resp.Status)
			}
		})
	}
}

func TestNoDaemon(t *testing.T) {
	c := client(t, filepath.Join(t.TempDir(), "none"))
	if _, err := c.Status(t.Context()); err == nil || !strings.Contains(err.Error(), "ask daemon at") {
		t.Errorf("got %v", err)
	}
}
