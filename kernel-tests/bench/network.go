package main

import (
	"context"
	"errors"

	"github.com/erofsd/erofsd/internal/api"
	"github.com/erofsd/erofsd/kernel-tests/harness"
)

// networkCPU measures what the daemon's processor time for a cold read of everything
// becomes with the blobs behind HTTP and behind TLS, in turns, beside a directory.
// Copies out of a socket may cost as much as the rest does at most; the cipher, which
// has instructions of its own, half as much again.
func networkCPU(ctx context.Context, b *bench) (err error) {
	plain, err := b.front(false)
	if err != nil {
		return err
	}
	defer plain.server.Close()
	sealed, err := b.front(true)
	if err != nil {
		return err
	}
	defer sealed.server.Close()
	var local, http, tls []float64
	for range b.repeat {
		for _, c := range []struct {
			image api.MountRequest
			cpu   *[]float64
		}{{b.localImage(), &local}, {plain.image(b), &http}, {sealed.image(b), &tls}} {
			err := b.lazily(ctx, c.image, nil, func(d *harness.Daemon, dir string) error {
				cpu, err := cpuOfRead(ctx, d, dir)
				*c.cpu = append(*c.cpu, cpu)
				return err
			})
			if err != nil {
				return err
			}
		}
	}
	b.add(row{
		Name: "daemon CPU for the cold read, HTTP", Value: median(http), Unit: "s/GiB", Limit: 2.0, LimitOn: "ratio",
		Reference: median(local), ReferenceIs: "blobs local",
	})
	b.add(row{
		Name: "daemon CPU for the cold read, TLS", Value: median(tls), Unit: "s/GiB", Limit: 1.5, LimitOn: "ratio",
		Reference: median(http), ReferenceIs: "HTTP",
	})
	return nil
}

// cpuOfRead reads everything below dir and returns the daemon's processor time in
// seconds for each GiB of it.
func cpuOfRead(ctx context.Context, d *harness.Daemon, dir string) (float64, error) {
	before, err := d.CPU()
	if err != nil {
		return 0, err
	}
	n, err := harness.ReadAll(ctx, dir)
	after, cpuErr := d.CPU()
	return (after - before).Seconds() / (float64(n) / gib), errors.Join(err, cpuErr)
}
