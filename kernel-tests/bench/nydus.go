package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/erofsd/erofsd/internal/api"
	"github.com/erofsd/erofsd/kernel-tests/harness"
)

// A caller calls an HTTP server at a unix socket, by as many connections as it may keep.
type caller struct{ transport *http.Transport }

func newCaller(socket string, connections int) *caller {
	return &caller{&http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", socket)
		},
		MaxConnsPerHost: connections, MaxIdleConnsPerHost: connections,
	}}
}

func (c *caller) close() { c.transport.CloseIdleConnections() }

// call makes a request and returns how long it took.
func (c *caller) call(ctx context.Context, method, target string, body []byte) (time.Duration, error) {
	req, err := http.NewRequestWithContext(ctx, method, "http://daemon"+target, bytes.NewReader(body))
	if err != nil {
		return 0, err
	}
	start := time.Now()
	resp, err := c.transport.RoundTrip(req)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode >= 300 {
		err = fmt.Errorf("%s %s: %s: %s", method, target, resp.Status, text)
	}
	return time.Since(start), err
}

// rate returns how many calls a second there are when so many connections make n.
func rate(ctx context.Context, socket string, connections, n int, method, target string, body []byte) (float64, error) {
	c := newCaller(socket, connections)
	defer c.close()
	do := func(int) (time.Duration, error) { return c.call(ctx, method, target, body) }
	if _, err := inParallel(2*connections, connections, do); err != nil { // connects
		return 0, err
	}
	start := time.Now()
	_, err := inParallel(n, connections, do)
	return float64(n) / time.Since(start).Seconds(), err
}

// entry is nydusd's registration of the bootstrap of r as id.
func entry(r api.MountRequest, id, dir string) ([]byte, error) {
	type object = map[string]any
	return json.Marshal(object{
		"type": "bootstrap", "id": id, "domain_id": "bench", "config": object{
			"id": id, "backend_type": "localfs", "backend_config": object{"dir": r.BlobDir},
			"cache_type": "fscache", "cache_config": object{"work_dir": dir}, "metadata_path": r.Bootstrap,
		},
	})
}

// apiCalls measures calls of nydusd's API beside a plain server at a unix socket that
// answers 204. A GET makes and sends half a KiB of JSON: a quarter of the plain rate is
// asked for. A PUT of what is bound already reads and digests the whole bootstrap, and
// stands for a snapshotter that comes back and binds all its images again: 1 000 in two
// seconds is fast enough for that.
func apiCalls(ctx context.Context, b *bench) error {
	made, _, err := b.smallImages(ctx)
	if err != nil {
		return err
	}
	return b.lazily(ctx, b.localImage(), []string{"--no-completion"}, func(d *harness.Daemon, dir string) error {
		body, err := entry(made[0], "image", filepath.Dir(dir))
		if err != nil {
			return err
		}
		socket := filepath.Join(filepath.Dir(dir), "plain")
		stop, err := plainServer(ctx, socket)
		if err != nil {
			return err
		}
		defer stop()
		for _, connections := range []int{1, 16} {
			reference, err := rate(ctx, socket, connections, 10000, http.MethodGet, "/", nil)
			if err != nil {
				return err
			}
			get, err := rate(ctx, filepath.Join(d.Root, "sock"), connections, 10000, http.MethodGet, "/api/v1/daemon", nil)
			if err != nil {
				return err
			}
			put, err := rate(ctx, filepath.Join(d.Root, "sock"), connections, 1000, http.MethodPut, "/api/v2/blobs", body)
			if err != nil {
				return err
			}
			over := fmt.Sprintf(", %d connections", connections)
			if connections == 1 {
				over = ", 1 connection"
			}
			const is = "a plain server's 204"
			b.add(row{
				Name: "GET /api/v1/daemon" + over, Value: get, Unit: "1/s", Limit: 0.25, LimitOn: "ratio", AtLeast: true,
				Reference: reference, ReferenceIs: is,
			})
			b.add(row{
				Name: "PUT /api/v2/blobs" + over, Value: put, Unit: "1/s", Limit: 500, LimitOn: "value", AtLeast: true,
				Reference: reference, ReferenceIs: is,
			})
		}
		return nil
	})
}

// plainName is argv[0] of a plain server. It is a process of its own, as the daemon is.
const plainName = "bench-plain-server"

// plainServer answers 204 at socket until stop is called.
func plainServer(ctx context.Context, socket string) (stop func(), err error) {
	cmd := exec.CommandContext(ctx, "/proc/self/exe", socket)
	cmd.Args[0] = plainName
	cmd.Stderr = os.Stderr
	if _, err := cmd.StdinPipe(); err != nil { // it ends with this process
		return nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	stop = func() {
		cmd.Process.Kill() // it may have ended
		cmd.Wait()         // it was killed
	}
	if _, err := out.Read(make([]byte, 1)); err != nil { // it listens
		stop()
		return nil, fmt.Errorf("start the plain server: %w", err)
	}
	return stop, nil
}

// servePlain is the process of plainServer.
func servePlain(socket string) error {
	l, err := net.Listen("unix", socket)
	if err != nil {
		return err
	}
	fmt.Println("listening")
	go func() {
		io.Copy(io.Discard, os.Stdin)
		l.Close()
	}()
	return http.Serve(l, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body) // a client that leaves is no matter
		w.WriteHeader(http.StatusNoContent)
	}))
}

// binds measures how long it takes to bind an image with as many bound as mountCount,
// and with none. It is on the way of every start of a container, as a mount is, and may
// take as long. Tables that are searched from end to end would show in the median.
func binds(ctx context.Context, b *bench) error {
	made, _, err := b.smallImages(ctx)
	if err != nil {
		return err
	}
	return b.lazily(ctx, b.localImage(), []string{"--no-completion"}, func(d *harness.Daemon, dir string) error {
		c := newCaller(filepath.Join(d.Root, "sock"), 1)
		defer c.close()
		put := func(r api.MountRequest, id string) (time.Duration, error) {
			body, err := entry(r, id, filepath.Dir(dir))
			if err != nil {
				return 0, err
			}
			return c.call(ctx, http.MethodPut, "/api/v2/blobs", body)
		}
		// One more is bound, and unbound again, for each of made.
		more := func() ([]float64, error) {
			return inParallel(len(made), 1, func(i int) (time.Duration, error) {
				id := fmt.Sprint("more-", i)
				took, err := put(made[i], id)
				if err == nil {
					_, err = c.call(ctx, http.MethodDelete, "/api/v2/blobs?domain_id=bench&blob_id="+id, nil)
				}
				return took, err
			})
		}
		alone, err := more()
		if err != nil {
			return err
		}
		for i, r := range made {
			if _, err := put(r, fmt.Sprint("image-", i)); err != nil {
				return err
			}
		}
		among, err := more()
		if err != nil {
			return err
		}
		b.add(row{
			Name: "bind, 200 images bound, p99", Value: quantile(among, 0.99), Unit: "ms", Limit: 20, LimitOn: "value",
			Reference: quantile(alone, 0.99), ReferenceIs: "none bound",
		})
		b.add(row{
			Name: "  median", Value: median(among), Unit: "ms", Limit: 2, LimitOn: "ratio",
			Reference: median(alone), ReferenceIs: "none bound",
		})
		return nil
	})
}
