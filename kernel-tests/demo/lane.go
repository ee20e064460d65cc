package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/erofsd/erofsd/internal/api"
	"github.com/erofsd/erofsd/kernel-tests/harness"
	"github.com/erofsd/erofsd/kernel-tests/link"
	"github.com/erofsd/erofsd/kernel-tests/regserver"
	"github.com/erofsd/erofsd/kernel-tests/rootfs"
)

// program is what runs in the image.
const program = `
import sys, numpy
print(f"Python {sys.version.split()[0]} with numpy {numpy.__version__} runs from the lazy image", flush=True)
a = numpy.random.default_rng(1).random((200, 200))
print(f"the determinant of a random 200 x 200 matrix is {numpy.linalg.det(a):.4g}")
`

// lane is one way to the registry.
type lane struct {
	name    string
	profile link.Profile
}

// result is what a lane took. Counts are of the registry at the first line.
type result struct {
	lane                         lane
	mounted, firstLine, download time.Duration
	fetched, requests, size      int64
}

// run starts with an empty cache, mounts the image, runs the program and downloads
// everything for comparison. It leaves nothing behind.
func (l lane) run(ctx context.Context, bin string, registry *regserver.Server, image harness.Image) (r result, err error) {
	relay, err := link.New(registry.Addr(), l.profile)
	if err != nil {
		return r, err
	}
	defer closing(relay, &err)
	scratch, err := os.MkdirTemp(rootfs.CacheDir(), "demo-run-")
	if err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(scratch)) }()

	r = result{lane: l, size: image.Size}
	step("starting from nothing: " + l.name)
	if err := l.lazy(ctx, bin, scratch, relay.Addr()+"/"+image.Name, registry, &r); err != nil {
		return r, err
	}
	step(fmt.Sprintf("downloading all %.1f MB for comparison", mb(image.Size)))
	r.download, err = harness.Download(ctx, relay.Addr(), image)
	return r, err
}

// lazy mounts reference with a new daemon and runs the program in it.
func (l lane) lazy(ctx context.Context, bin, scratch, reference string, registry *regserver.Server, r *result) (err error) {
	d, err := harness.StartDaemon(ctx, bin, filepath.Join(scratch, "root"))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.Stop()) }()
	mountpoint, upper := filepath.Join(scratch, "image"), filepath.Join(scratch, "upper")
	if err := errors.Join(os.Mkdir(mountpoint, 0o755), os.Mkdir(upper, 0o755)); err != nil {
		return err
	}
	registry.Reset()
	start := time.Now()
	if _, err := d.Mount(ctx, api.MountRequest{Reference: reference, PlainHTTP: true, Mountpoint: mountpoint}); err != nil {
		return fmt.Errorf("mount %s: %w", reference, err)
	}
	r.mounted = time.Since(start)

	cmd := harness.Command(ctx, mountpoint, upper, "/usr/bin/python3", "-c", program)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	stop := ticker(registry, r.size)
	defer stop()
	if err := cmd.Start(); err != nil {
		return err
	}
	for lines := bufio.NewScanner(out); lines.Scan(); {
		if r.firstLine == 0 {
			r.firstLine = time.Since(start)
			stats := registry.Stats()
			r.fetched, r.requests = stats.BlobBytes, stats.Requests
			stop()
		}
		fmt.Println("   ", lines.Text())
	}
	if err := cmd.Wait(); err != nil {
		return fmt.Errorf("the program in the image: %w", err)
	}
	return nil
}

// ticker shows on a terminal what has been fetched so far, until stop is called.
func ticker(registry *regserver.Server, size int64) (stop func()) {
	info, err := os.Stdout.Stat()
	if err != nil || info.Mode()&os.ModeCharDevice == 0 {
		return func() {}
	}
	return harness.Every(100*time.Millisecond, func() {
		s := registry.Stats()
		fmt.Printf("\r    %.1f of %.1f MB in %d requests ", mb(s.BlobBytes), mb(size), s.Requests)
	}, func() { fmt.Print("\r\033[K") })
}
