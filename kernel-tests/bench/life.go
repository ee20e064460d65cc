package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/plugins/snapshots/overlay"

	"github.com/erofsd/erofsd/kernel-tests/harness"
	"github.com/erofsd/erofsd/snapshotter"
)

// lifeRounds is how many containers are prepared and removed.
const lifeRounds = 1000

// A lane is a snapshotter with images, and the times of its containers in milliseconds.
type lane struct {
	snapshots.Snapshotter
	tops            []string // of the images
	prepare, remove []float64
}

// life measures how long it takes to prepare and remove containers of as many lazy images as
// mountCount, which are mounted, beside containerd's own overlayfs snapshotter (as it is by
// default: files stay until garbage is collected) with as many ordinary ones, in turns.
func life(ctx context.Context, b *bench) error {
	made, _, err := b.smallImages(ctx)
	if err != nil {
		return err
	}
	return b.lazily(ctx, b.localImage(), []string{"--no-completion"}, func(d *harness.Daemon, dir string) (err error) {
		sn, err := snapshotter.New(filepath.Join(filepath.Dir(dir), "ours"), d.Client, harness.Locally)
		if err != nil {
			return err
		}
		ours := &lane{Snapshotter: sn}
		defer func() { err = errors.Join(err, ours.empty(ctx)) }()
		other, err := overlay.NewSnapshotter(filepath.Join(filepath.Dir(dir), "overlay"), overlay.AsynchronousRemove)
		if err != nil {
			return err
		}
		theirs := &lane{Snapshotter: other}
		defer func() { err = errors.Join(err, other.Close()) }()
		for i, r := range made {
			name := fmt.Sprint("image-", i)
			names, err := harness.PullLocal(ctx, ours, name, r)
			if err != nil {
				return err
			}
			ours.tops = append(ours.tops, names[0])
			if _, err := theirs.Prepare(ctx, "extract", ""); err != nil {
				return err
			}
			if err := theirs.Commit(ctx, name, "extract"); err != nil {
				return err
			}
			theirs.tops = append(theirs.tops, name)
		}
		pair := []*lane{ours, theirs}
		for _, l := range pair { // the first container of an image has it mounted
			for i := range l.tops {
				if err := l.round(ctx, i); err != nil {
					return err
				}
			}
			l.prepare, l.remove = nil, nil
		}
		for i := range lifeRounds {
			slices.Reverse(pair)
			for _, l := range pair {
				if err := l.round(ctx, i%len(l.tops)); err != nil {
					return err
				}
			}
		}
		b.addLife("prepare a container, 200 images", ours.prepare, theirs.prepare, 0)
		b.addLife("remove a container, 200 images", ours.remove, theirs.remove, 10)
		return nil
	})
}

func (b *bench) addLife(name string, ours, theirs []float64, limit float64) {
	const is = "containerd's overlayfs"
	p99 := row{Name: name + ", p99", Value: quantile(ours, 0.99), Unit: "ms", Reference: quantile(theirs, 0.99), ReferenceIs: is}
	if limit > 0 {
		p99.Limit, p99.LimitOn = limit, "value"
	}
	b.add(p99)
	b.add(row{Name: "  median", Value: median(ours), Unit: "ms", Reference: median(theirs), ReferenceIs: is})
}

// round prepares and removes a container of an image.
func (l *lane) round(ctx context.Context, i int) error {
	start := time.Now()
	if _, err := l.Prepare(ctx, "container", l.tops[i]); err != nil {
		return err
	}
	middle := time.Now()
	err := l.Remove(ctx, "container")
	l.prepare = append(l.prepare, float64(middle.Sub(start).Microseconds())/1e3)
	l.remove = append(l.remove, float64(time.Since(middle).Microseconds())/1e3)
	return err
}

// empty removes all snapshots, what is mounted of them included, and closes the snapshotter.
func (l *lane) empty(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
	defer cancel()
	var names []string
	err := l.Walk(ctx, func(_ context.Context, info snapshots.Info) error {
		names = append(names, info.Name)
		return nil
	})
	for len(names) > 0 && err == nil { // parents cannot go before their children
		left := slices.DeleteFunc(slices.Clone(names), func(name string) bool { return l.Remove(ctx, name) == nil })
		if len(left) == len(names) {
			err = fmt.Errorf("%d snapshots cannot be removed", len(left))
		}
		names = left
	}
	for err == nil {
		if err = l.Snapshotter.(snapshots.Cleaner).Cleanup(ctx); err == nil {
			break
		}
		select {
		case <-time.After(100 * time.Millisecond):
			err = nil // an image that was unmounted this moment is in use for another
		case <-ctx.Done():
		}
	}
	return errors.Join(err, l.Close())
}
