package snapshotter

import (
	"context"
	"fmt"
	"sync"

	"github.com/containerd/errdefs"

	"github.com/erofsd/erofsd/internal/api"
)

// wishes are files that somebody wants fetched of images that are not mounted yet, by the
// references of the images.
type wishes struct {
	mu    sync.Mutex // guards what follows
	files map[string][]string
	order []string // the oldest first
}

const (
	maxWishes    = 256     // images; the oldest wish goes
	maxWishBytes = 1 << 16 // of paths for one image
)

// put replaces what was wished of an image.
func (w *wishes) put(reference string, files []string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.files == nil {
		w.files = map[string][]string{}
	}
	if _, ok := w.files[reference]; !ok {
		w.order = append(w.order, reference)
	}
	w.files[reference] = files
	if len(w.order) > maxWishes {
		w.drop(w.order[0])
	}
}

// take returns what was wished of an image, once.
func (w *wishes) take(reference string) []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	files := w.files[reference]
	w.drop(reference)
	return files
}

// drop forgets a wish; the caller has the mutex.
func (w *wishes) drop(reference string) {
	delete(w.files, reference)
	for i, r := range w.order {
		if r == reference {
			w.order = append(w.order[:i:i], w.order[i+1:]...)
			return
		}
	}
}

// Prefetch has files of an image fetched in the background: now if it is mounted, else once
// when it is. A directory is all that is below. The reference is that which the image is
// pulled by. Of many images that are never mounted only the last are remembered.
func (s *Snapshotter) Prefetch(ctx context.Context, reference string, files []string) error {
	bytes := 0
	for _, f := range files {
		bytes += len(f)
	}
	if reference == "" || len(reference) > maxReference || len(files) == 0 || bytes > maxWishBytes {
		return fmt.Errorf("prefetch files of image %.200q: want its reference and paths of 1 to %d bytes in all: %w", reference, maxWishBytes, errdefs.ErrInvalidArgument)
	}
	images, err := s.Images(ctx)
	if err != nil {
		return fmt.Errorf("prefetch files of image %s: %w", reference, err)
	}
	found := false
	for _, i := range images {
		if i.Reference != reference || !i.Mounted {
			continue
		}
		found = true
		r := api.PrefetchRequest{Image: i.ID, DomainID: i.DomainID, Files: files}
		if err := s.mounter.Prefetch(ctx, r); err != nil {
			return fmt.Errorf("prefetch files of image %s: %w", reference, classified(err))
		}
	}
	if !found {
		s.wishes.put(reference, files)
	}
	return nil
}

// grant has fetched what was wished of an image that was mounted this moment.
func (s *Snapshotter) grant(ctx context.Context, r record) {
	files := s.wishes.take(r.Reference)
	if len(files) == 0 {
		return
	}
	if err := s.mounter.Prefetch(ctx, api.PrefetchRequest{Image: r.Image, DomainID: r.Domain, Files: files}); err != nil {
		s.log.Warn("prefetch files that were wished", "image", r.name(), "err", err)
	}
}
