package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/erofsd/erofsd/internal/api"
	"github.com/erofsd/erofsd/kernel-tests/harness"
	"github.com/erofsd/erofsd/kernel-tests/regserver"
)

// bench is what the cases share.
type bench struct {
	bin      string
	repeat   int
	tar      string // the root file system
	native   string // as a complete native EROFS image
	local    string // as a lazy image: image.boot and blobs/
	image    harness.Image
	registry *regserver.Server
	scratch  string // of this run, on the machine's own disk
	// Of smallImages, once they are made.
	small      []api.MountRequest
	smallTable int64
	runs       int
	rows       []row
}

func (b *bench) close() error {
	return errors.Join(b.registry.Close(), os.RemoveAll(b.scratch))
}

// add prints and keeps a row.
func (b *bench) add(r row) {
	if r.Reference != 0 {
		r.Ratio = r.Value / r.Reference
	}
	r.print()
	b.rows = append(b.rows, r)
}

// dir returns the path of a new directory below scratch.
func (b *bench) dir() (string, error) {
	b.runs++
	dir := filepath.Join(b.scratch, fmt.Sprint(b.runs))
	return dir, os.Mkdir(dir, 0o755)
}

func (b *bench) convertTo(ctx context.Context, dir string) error {
	out, err := exec.CommandContext(ctx, filepath.Join(b.bin, "erofsctl"), "convert", b.tar, dir).CombinedOutput()
	if err != nil {
		return fmt.Errorf("erofsctl convert: %w: %s", err, bytes.TrimSpace(out))
	}
	return nil
}

// localImage names the lazy image whose blobs are in a directory.
func (b *bench) localImage() api.MountRequest {
	return api.MountRequest{Bootstrap: filepath.Join(b.local, "image.boot"), BlobDir: filepath.Join(b.local, "blobs")}
}

// remoteImage names the lazy image in the registry that is reached by addr.
func (b *bench) remoteImage(addr string) api.MountRequest {
	return api.MountRequest{Reference: addr + "/" + b.image.Name, PlainHTTP: true}
}

// lazily calls do with an image mounted at dir by a new daemon with an empty cache,
// and nothing of its blobs in the page cache.
func (b *bench) lazily(ctx context.Context, r api.MountRequest, args []string, do func(d *harness.Daemon, dir string) error) error {
	return b.lazilyBy(ctx, b.bin, r, args, do)
}

// lazilyBy is lazily with the daemon in the directory bin.
func (b *bench) lazilyBy(ctx context.Context, bin string, r api.MountRequest, args []string, do func(d *harness.Daemon, dir string) error) (err error) {
	top, err := b.dir()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(top)) }()
	if err := b.dropBlobs(); err != nil {
		return err
	}
	d, err := harness.StartDaemon(ctx, bin, filepath.Join(top, "root"), args...)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.Stop()) }()
	r.Mountpoint = filepath.Join(top, "image")
	if err := os.Mkdir(r.Mountpoint, 0o755); err != nil {
		return err
	}
	if _, err := d.Mount(ctx, r); err != nil {
		return err
	}
	return do(d, r.Mountpoint)
}

// dropBlobs drops the lazy image's pages, those in the registry included.
func (b *bench) dropBlobs() error {
	for _, dir := range []string{b.local, filepath.Dir(b.tar)} {
		err := filepath.WalkDir(dir, func(name string, d fs.DirEntry, err error) error {
			switch {
			case err == nil && d.IsDir() && d.Name() == "tree":
				return filepath.SkipDir
			case err == nil && d.Type().IsRegular():
				return harness.DropFile(name)
			}
			return err
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// natively calls do with the native image mounted at dir, from its file, and not in the
// page cache.
func (b *bench) natively(do func(dir string) error) error {
	return b.withNative(func(dir string) (func() error, error) { return harness.MountNative(dir, b.native) }, do)
}

// byLoop is natively with the mount of mount(8).
func (b *bench) byLoop(ctx context.Context, do func(dir string) error) error {
	return b.withNative(func(dir string) (func() error, error) { return harness.MountByLoop(ctx, dir, b.native) }, do)
}

func (b *bench) withNative(mount func(dir string) (unmount func() error, err error), do func(dir string) error) (err error) {
	dir, err := b.dir()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.Remove(dir)) }()
	if err := harness.DropFile(b.native); err != nil {
		return err
	}
	unmount, err := mount(dir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, unmount()) }()
	return do(dir)
}

// readAll reads everything below dir and appends the seconds to times.
func readAll(ctx context.Context, dir string, times *[]float64) (int64, error) {
	start := time.Now()
	n, err := harness.ReadAll(ctx, dir)
	*times = append(*times, time.Since(start).Seconds())
	return n, err
}

// command runs a program, its output to nowhere, and appends the seconds to times.
func command(cmd *exec.Cmd, times *[]float64) error {
	var stderr strings.Builder
	cmd.Stderr = &stderr
	start := time.Now()
	err := cmd.Run()
	*times = append(*times, time.Since(start).Seconds())
	if err != nil {
		return fmt.Errorf("%s: %w: %s", cmd, err, stderr.String())
	}
	return nil
}

func median(values []float64) float64 { return quantile(values, 0.5) }

// quantile returns the smallest value that at least the share q does not exceed; the
// mean of the middle ones for the median of an even number.
func quantile(values []float64, q float64) float64 {
	v := slices.Sorted(slices.Values(values))
	if n := len(v); q == 0.5 && n%2 == 0 {
		return (v[n/2-1] + v[n/2]) / 2
	}
	return v[min(len(v)-1, int(q*float64(len(v))))]
}
