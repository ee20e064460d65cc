package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"time"

	"github.com/erofsd/erofsd/kernel-tests/harness"
	"github.com/erofsd/erofsd/kernel-tests/link"
)

const (
	mib = 1 << 20
	gib = 1 << 30
)

// convert measures erofsctl convert of the root file system into a directory.
func convert(ctx context.Context, b *bench) error {
	var times []float64
	for range b.repeat {
		dir, err := b.dir()
		if err != nil {
			return err
		}
		start := time.Now()
		err = b.convertTo(ctx, dir)
		times = append(times, time.Since(start).Seconds())
		if err := errors.Join(err, os.RemoveAll(dir)); err != nil {
			return err
		}
	}
	b.add(row{
		Name: "convert, zstd", Value: median(times), Unit: "s", Limit: 2.2, LimitOn: "value",
		Reference: 2.17, ReferenceIs: "nydus-image 2.4, measured elsewhere",
	})
	return nil
}

// cold reads the whole tree with nothing cached: native, blobs in a directory, blobs
// in the registry, in turns.
func cold(ctx context.Context, b *bench) error {
	var native, loop, local, remote, cpu, peak []float64
	for range b.repeat {
		err := b.natively(func(dir string) error {
			_, err := readAll(ctx, dir, &native)
			return err
		})
		if err != nil {
			return err
		}
		err = b.byLoop(ctx, func(dir string) error {
			_, err := readAll(ctx, dir, &loop)
			return err
		})
		if err != nil {
			return err
		}
		err = b.lazily(ctx, b.localImage(), nil, func(d *harness.Daemon, dir string) error {
			before, err := d.CPU()
			if err != nil {
				return err
			}
			n, err := readAll(ctx, dir, &local)
			if err != nil {
				return err
			}
			after, err := d.CPU()
			if err != nil {
				return err
			}
			rss, err := d.Memory("VmHWM")
			cpu = append(cpu, (after-before).Seconds()/(float64(n)/gib))
			peak = append(peak, float64(rss)/mib)
			return err
		})
		if err != nil {
			return err
		}
		err = b.lazily(ctx, b.remoteImage(b.registry.Addr()), nil, func(_ *harness.Daemon, dir string) error {
			_, err := readAll(ctx, dir, &remote)
			return err
		})
		if err != nil {
			return err
		}
	}
	b.add(row{
		Name: "read everything cold, blobs local", Value: median(local), Unit: "s", Limit: 1.15, LimitOn: "ratio",
		Reference: median(loop), ReferenceIs: "page-cold native EROFS, mount(8)",
	})
	b.add(row{
		Name: "  the same, beside a file-backed mount", Value: median(local), Unit: "s",
		Reference: median(native), ReferenceIs: "page-cold native EROFS, no loop",
	})
	b.add(row{
		Name: "read everything cold, registry", Value: median(remote), Unit: "s", Limit: 1.3, LimitOn: "ratio",
		Reference: median(local), ReferenceIs: "blobs local",
	})
	b.add(row{Name: "daemon CPU for the cold read, blobs local", Value: median(cpu), Unit: "s/GiB", Limit: 2.0, LimitOn: "value"})
	b.add(row{Name: "daemon peak RSS, cold read, blobs local", Value: median(peak), Unit: "MiB", Limit: 64, LimitOn: "value"})
	return nil
}

// importNumpy is the program whose start is measured.
var importNumpy = []string{"/usr/bin/python3", "-c", "import numpy; print(numpy.__version__)"}

// numpy starts a Python program behind the slow link with nothing cached but the
// metadata. The floor is what the link needs for the pages that it touches, two
// round trips, and its own time from a cached native image.
func numpy(ctx context.Context, b *bench) error {
	needed, own, err := b.neededBy(ctx, importNumpy)
	if err != nil {
		return err
	}
	floor := needed/float64(link.Slow.Rate) + 2*link.Slow.RTT.Seconds() + own
	for _, mode := range []struct {
		name  string
		args  []string
		limit bool
	}{{"import numpy, slow link", []string{"--no-completion"}, true}, {"the same, background completion", nil, false}} {
		var times, fetched, requests []float64
		for range b.repeat {
			err := b.behindLink(ctx, mode.args, func(_ *harness.Daemon, dir, _ string) error {
				scratch, err := b.dir()
				if err != nil {
					return err
				}
				b.registry.Reset()
				err = command(harness.Command(ctx, dir, scratch, importNumpy...), &times)
				s := b.registry.Stats()
				fetched = append(fetched, float64(s.BlobBytes)/1e6)
				requests = append(requests, float64(s.Requests))
				return err
			})
			if err != nil {
				return err
			}
		}
		rows := []row{
			{Name: mode.name, Value: median(times), Unit: "s", Reference: floor, ReferenceIs: "floor"},
			{Name: "  fetched for it", Value: median(fetched), Unit: "MB", Reference: needed / 1e6, ReferenceIs: "touched, compressed"},
			{Name: "  requests", Value: median(requests), Unit: ""},
		}
		if mode.limit {
			rows[0].Limit, rows[0].LimitOn = 3.0, "value"
			rows[1].Limit, rows[1].LimitOn = 16, "value"
		}
		for _, r := range rows {
			b.add(r)
		}
	}
	return nil
}

// neededBy returns how many bytes argv needs at least, compressed as the image is on
// average, and the seconds that it takes when all of them are cached.
func (b *bench) neededBy(ctx context.Context, argv []string) (needed, seconds float64, err error) {
	dir, err := b.dir()
	if err != nil {
		return 0, 0, err
	}
	scratch, err := b.dir()
	if err != nil {
		return 0, 0, err
	}
	unmount, err := harness.MountWithoutReadahead(ctx, dir, b.native)
	if err != nil {
		return 0, 0, err
	}
	defer func() { err = errors.Join(err, unmount()) }()
	var times []float64
	for range 1 + b.repeat {
		if err := command(harness.Command(ctx, dir, scratch, argv...), &times); err != nil {
			return 0, 0, err
		}
	}
	touched, err := harness.ResidentBytes(dir)
	if err != nil {
		return 0, 0, err
	}
	info, err := os.Stat(b.native)
	if err != nil {
		return 0, 0, err
	}
	return float64(touched) * float64(b.image.Size) / float64(info.Size()), median(times[1:]), nil
}

// behindLink calls do with the image mounted from the registry behind the slow link.
func (b *bench) behindLink(ctx context.Context, args []string, do func(d *harness.Daemon, dir, addr string) error) (err error) {
	relay, err := link.New(b.registry.Addr(), link.Slow)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, relay.Close()) }()
	return b.lazily(ctx, b.remoteImage(relay.Addr()), args, func(d *harness.Daemon, dir string) error {
		return do(d, dir, relay.Addr())
	})
}

// wholeTree reads everything behind the slow link, once: it takes as long as the
// link does.
func wholeTree(ctx context.Context, b *bench) error {
	var times []float64
	var raw time.Duration
	err := b.behindLink(ctx, nil, func(_ *harness.Daemon, dir, addr string) error {
		if _, err := readAll(ctx, dir, &times); err != nil {
			return err
		}
		var err error
		raw, err = harness.Download(ctx, addr, b.image)
		return err
	})
	if err != nil {
		return err
	}
	b.add(row{
		Name: "read everything, slow link", Value: median(times), Unit: "s", Limit: 1.2, LimitOn: "ratio",
		Reference: raw.Seconds(), ReferenceIs: "raw transfer of the blobs",
	})
	return nil
}

// completely calls do with a complete lazy image mounted at dir, and its cache file.
func (b *bench) completely(ctx context.Context, do func(dir, cacheFile string) error) error {
	return b.lazily(ctx, b.localImage(), nil, func(d *harness.Daemon, dir string) error {
		if _, err := harness.ReadAll(ctx, dir); err != nil {
			return err
		}
		if err := d.AwaitComplete(ctx, dir); err != nil {
			return err
		}
		m, err := d.Image(ctx, dir)
		if err != nil {
			return err
		}
		if len(m.Blobs) != 1 {
			return fmt.Errorf("the image has %d blobs, not one", len(m.Blobs))
		}
		return do(dir, filepath.Join(d.Root, "cache", m.Blobs[0].ID))
	})
}

// warm compares reads from the page cache and metadata reads with a native image.
func warm(ctx context.Context, b *bench) error {
	var read, find, nativeRead, nativeFind []float64
	err := b.completely(ctx, func(dir, _ string) error {
		return b.natively(func(native string) error {
			type mount struct {
				dir        string
				read, find *[]float64
			}
			pair := []mount{{native, &nativeRead, &nativeFind}, {dir, &read, &find}}
			for i := range 1 + 4*b.repeat {
				slices.Reverse(pair)
				for _, m := range pair {
					if _, err := readAll(ctx, m.dir, m.read); err != nil {
						return err
					}
					if err := command(exec.CommandContext(ctx, "find", m.dir, "-size", "+1"), m.find); err != nil {
						return err
					}
				}
				if i == 0 { // it has warmed the caches
					read, find, nativeRead, nativeFind = nil, nil, nil, nil
				}
			}
			return nil
		})
	})
	if err != nil {
		return err
	}
	const is = "native EROFS"
	b.add(row{Name: "read everything, page-warm", Value: median(read), Unit: "s", Reference: median(nativeRead), ReferenceIs: is, Limit: 1.03, LimitOn: "ratio"})
	b.add(row{Name: "find -size +1, warm", Value: median(find), Unit: "s", Reference: median(nativeFind), ReferenceIs: is, Limit: 1.03, LimitOn: "ratio"})
	return nil
}

// pageCold compares a complete image, which was marked while it was not, with a mount
// of the same files that never was.
func pageCold(ctx context.Context, b *bench) error {
	var ours, never []float64
	err := b.completely(ctx, func(dir, cacheFile string) error {
		other, err := b.dir()
		if err != nil {
			return err
		}
		boot := b.localImage().Bootstrap
		unmount, err := harness.MountNative(other, boot, cacheFile)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, unmount()) }()
		type mount struct {
			dir   string
			times *[]float64
		}
		pair := []mount{{other, &never}, {dir, &ours}}
		for range 2 * b.repeat {
			slices.Reverse(pair) // whatever the first leaves warm helps both
			for _, m := range pair {
				err := errors.Join(harness.DropTree(m.dir), harness.DropFile(cacheFile))
				if err != nil {
					return err
				}
				if _, err := readAll(ctx, m.dir, m.times); err != nil {
					return err
				}
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	b.add(row{
		Name: "read everything page-cold, after completion", Value: median(ours), Unit: "s", Limit: 1.05, LimitOn: "ratio",
		Reference: median(never), ReferenceIs: "a mount that never was marked",
	})
	return nil
}

// mountCount is how many mounts of one image are made in a row.
const mountCount = 200

// mounts measures mounts of an image that is open already.
func mounts(ctx context.Context, b *bench) error {
	var times []float64
	var before, after int64
	err := b.lazily(ctx, b.localImage(), []string{"--no-completion"}, func(d *harness.Daemon, dir string) (err error) {
		if before, err = d.Memory("VmRSS"); err != nil {
			return err
		}
		for i := range mountCount {
			r := b.localImage()
			r.Mountpoint = filepath.Join(filepath.Dir(dir), fmt.Sprint("mount", i))
			if err := os.Mkdir(r.Mountpoint, 0o755); err != nil {
				return err
			}
			start := time.Now()
			if _, err := d.Mount(ctx, r); err != nil {
				return err
			}
			times = append(times, float64(time.Since(start).Microseconds())/1e3)
		}
		after, err = d.Memory("VmRSS")
		return err
	})
	if err != nil {
		return err
	}
	b.add(row{Name: "mount, local metadata, p99 of 200", Value: quantile(times, 0.99), Unit: "ms", Limit: 20, LimitOn: "value"})
	b.add(row{Name: "  median", Value: median(times), Unit: "ms"})
	b.add(row{
		Name: "daemon RSS per further mount", Value: float64(after-before) / mountCount / 1024,
		Unit: "KiB", Limit: 64, LimitOn: "value",
	})
	return nil
}
