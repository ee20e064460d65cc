package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"time"

	"golang.org/x/sys/unix"

	"github.com/erofsd/erofsd/kernel-tests/harness"
)

const page = 4096

// A spot is a page of a file.
type spot struct {
	name string
	off  int64
}

// demandCost bounds the processor time of a demand read in milliseconds, on all sides
// together: the kernel's event, two or three requests (the page's own, and what the
// daemon reads around it), decompression and digest, the write into the cache.
const demandCost = 2.0

// demand measures how long a program waits for a page of a chunk that the cache lacks,
// beside a plain client that asks the same registry for the same ranges. (Of the reads a
// few in a hundred find what those before brought along.)
//
// On loopback nobody waits for a network: what comes on top of the request is work, and
// with more readers than processors a read waits while the others' is done. So the
// bound is the request and each reader's share of demandCost; twice that for the
// slowest.
func demand(ctx context.Context, b *bench) (err error) {
	f, err := b.front(false)
	if err != nil {
		return err
	}
	defer f.server.Close()
	for _, c := range []struct{ readers, reads int }{{1, 150}, {16, 320}, {64, 640}} {
		var times []float64
		var list []asked
		err := b.lazily(ctx, f.image(b), []string{"--no-completion"}, func(_ *harness.Daemon, dir string) error {
			spots, err := absentSpots(dir, c.reads)
			if err != nil {
				return err
			}
			f.reset()
			times, err = inParallel(len(spots), c.readers, func(i int) (time.Duration, error) { return spots[i].read() })
			list = f.reset()
			return err
		})
		if err != nil {
			return err
		}
		bare, err := f.get(ctx, list, c.readers)
		if err != nil {
			return err
		}
		share := demandCost * max(1, float64(c.readers)/float64(runtime.NumCPU()))
		name := fmt.Sprintf("demand read of 4 KiB, %d readers", c.readers)
		if c.readers == 1 {
			name = "demand read of 4 KiB, 1 reader"
		}
		for _, q := range []struct {
			name string
			of   float64
			cost float64
		}{{", p50", 0.5, share}, {", p99", 0.99, 2 * share}} {
			reference := quantile(bare, q.of)
			b.add(row{
				Name: name + q.name, Value: quantile(times, q.of), Unit: "ms", Limit: reference + q.cost, LimitOn: "value",
				Reference: reference, ReferenceIs: "the same ranges by a plain client",
			})
		}
	}
	return nil
}

// absentSpots returns n pages of files below dir, in no order, the same ones each time.
func absentSpots(dir string, n int) ([]spot, error) {
	var all []spot
	err := filepath.WalkDir(dir, func(name string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		info, err := e.Info()
		if err != nil {
			return err
		}
		if pages := info.Size() / page; pages > 0 {
			all = append(all, spot{name, info.Size() / 2 / page * page})
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	if len(all) < n {
		return nil, fmt.Errorf("the image has only %d files of a page or more, not %d", len(all), n)
	}
	order := rand.New(rand.NewPCG(1, 2))
	order.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	return all[:n], nil
}

// read reads the page alone and returns how long that took, without the open.
func (s spot) read() (took time.Duration, err error) {
	f, err := os.Open(s.name)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_RANDOM); err != nil {
		return 0, err
	}
	start := time.Now()
	_, err = f.ReadAt(make([]byte, page), s.off)
	return time.Since(start), err
}
