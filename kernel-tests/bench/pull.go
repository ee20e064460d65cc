package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/erofsd/erofsd/kernel-tests/debian"
	"github.com/erofsd/erofsd/kernel-tests/harness"
	"github.com/erofsd/erofsd/kernel-tests/link"
)

// What nydusd took for the same program over the same link, with the metadata local and
// without containerd (measured elsewhere: FUSE, zstd, chunks of 1 MiB).
const (
	nydusdNumpy         = 5.83
	nydusdNumpyRequests = 45
	nydusdNumpyFetched  = 32.8
)

// A way is a snapshotter with an image that it starts, and what that took.
type way struct {
	snapshotter, image                         string
	pulled, made, firstLine, fetched, requests []float64
}

// pull measures what a person waits for: from the pull of an image that the node has nothing of,
// over the slow link, to the first line of a program in a container. Beside it the ordinary way
// with the same files: containerd's overlayfs snapshotter and a gzip layer.
func pull(ctx context.Context, b *bench) error {
	if err := debian.Ensure(ctx, step, debian.Containerd, debian.Runc); err != nil {
		return err
	}
	plain, err := harness.PublishPlain(ctx, b.registry, b.tar, step)
	if err != nil {
		return err
	}
	ours := &way{snapshotter: "erofsd", image: b.image.Name}
	theirs := &way{snapshotter: "overlayfs", image: plain.Name}
	for range b.repeat {
		for _, w := range []*way{ours, theirs} {
			if err := b.fromNothing(ctx, w); err != nil {
				return fmt.Errorf("by %s: %w", w.snapshotter, err)
			}
		}
	}
	const is, nydusd = "overlayfs, the same files as gzip", "nydusd, metadata local, measured elsewhere"
	took, ordinary := median(ours.firstLine), median(theirs.firstLine)
	for _, r := range []row{
		{Name: "pull to first line, import numpy, slow link", Value: took, Unit: "s", Reference: ordinary, ReferenceIs: is, Limit: 0.2, LimitOn: "ratio"},
		{Name: "  beside a start without the pull", Value: took, Unit: "s", Reference: nydusdNumpy, ReferenceIs: nydusd, Limit: 1, LimitOn: "ratio"},
		{Name: "  pulled after", Value: median(ours.pulled), Unit: "s", Reference: median(theirs.pulled), ReferenceIs: is},
		{Name: "  container made after", Value: median(ours.made), Unit: "s", Reference: median(theirs.made), ReferenceIs: is},
		{Name: "  fetched", Value: median(ours.fetched), Unit: "MB", Reference: median(theirs.fetched), ReferenceIs: is},
		{Name: "  fetched", Value: median(ours.fetched), Unit: "MB", Reference: nydusdNumpyFetched, ReferenceIs: nydusd, Limit: 1, LimitOn: "ratio"},
		{Name: "  requests", Value: median(ours.requests), Unit: "", Reference: nydusdNumpyRequests, ReferenceIs: nydusd},
	} {
		b.add(r)
	}
	return nil
}

// fromNothing starts a container the way w on a new node.
func (b *bench) fromNothing(ctx context.Context, w *way) (err error) {
	dir, err := b.dir()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	if err := b.dropBlobs(); err != nil {
		return err
	}
	relay, err := link.New(b.registry.Addr(), link.Slow)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, relay.Close()) }()
	d, err := harness.StartDaemon(ctx, b.bin, filepath.Join(dir, "cache"))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.Stop()) }()
	n, err := harness.StartNode(ctx, b.bin, dir, d, relay.Addr())
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, n.Stop()) }()
	b.registry.Reset()
	fetched := func() {
		s := b.registry.Stats()
		w.fetched, w.requests = append(w.fetched, float64(s.BlobBytes)/1e6), append(w.requests, float64(s.Requests))
	}
	s, err := n.PullAndRun(ctx, w.snapshotter, relay.Addr()+"/"+w.image, fetched, importNumpy...)
	w.pulled, w.made, w.firstLine = append(w.pulled, s.Pulled.Seconds()), append(w.made, s.Made.Seconds()), append(w.firstLine, s.FirstLine.Seconds())
	return err
}
