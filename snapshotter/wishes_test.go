package snapshotter

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/erofsd/erofsd/internal/api"
)

// TestPrefetch has files fetched once: of an image that is mounted now, of another when it is.
func TestPrefetch(t *testing.T) {
	r := newLazy(t)
	const reference = "registry.example/app:1"
	top := pull(t.Context(), t, r, "1", bootstrapOf(t, "x"), labelReference, reference)
	for reference, files := range map[string][]string{"": {"/a"}, reference: nil, "registry.example/b:1": {strings.Repeat("x", maxWishBytes+1)}} {
		if err := r.Prefetch(t.Context(), reference, files); !errdefs.IsInvalidArgument(err) {
			t.Errorf("of %q: %v", reference, err)
		}
	}
	if err := r.Prefetch(t.Context(), reference, []string{"/early"}); err != nil {
		t.Fatal(err)
	}
	if n := r.daemon.count("prefetch"); n != 0 {
		t.Errorf("%d calls before the image is mounted", n)
	}
	for _, key := range []string{"a", "b"} {
		if _, err := r.Prepare(t.Context(), key, top); err != nil {
			t.Fatal(err)
		}
	}
	if err := r.Prefetch(t.Context(), reference, []string{"/late"}); err != nil {
		t.Fatal(err)
	}
	images, err := r.Images(t.Context())
	if err != nil || len(images) != 1 || !images[0].Mounted || images[0].Reference != reference {
		t.Fatalf("images %+v, %v", images, err)
	}
	want := fmt.Sprint([]api.PrefetchRequest{{Image: images[0].ID, Files: []string{"/early"}}, {Image: images[0].ID, Files: []string{"/late"}}})
	if got := fmt.Sprint(r.daemon.wanted); got != want {
		t.Errorf("the daemon was asked for %s, want %s", got, want)
	}
	r.daemon.setDown(errors.New("it is gone"))
	if err := r.Prefetch(t.Context(), reference, []string{"/x"}); !errdefs.IsUnavailable(err) {
		t.Errorf("without a daemon: %v", err)
	}
	r.daemon.setDown(nil)
}

// TestWishesBounded keeps the last wishes only.
func TestWishesBounded(t *testing.T) {
	var w wishes
	for i := range maxWishes + 10 {
		w.put(fmt.Sprint(i), []string{fmt.Sprint("/", i)})
	}
	w.put("10", []string{"/again"})
	if len(w.files) != maxWishes || len(w.order) != maxWishes {
		t.Errorf("%d and %d wishes, want %d", len(w.files), len(w.order), maxWishes)
	}
	for reference, want := range map[string]string{"9": "[]", "10": "[/again]", "265": "[/265]"} {
		if got := fmt.Sprint(w.take(reference)); got != want {
			t.Errorf("of %s: %s, want %s", reference, got, want)
		}
		if got := w.take(reference); got != nil {
			t.Errorf("of %s again: %s", reference, got)
		}
	}
}

// TestFailureKnown keeps why an image could not be mounted, until it can.
func TestFailureKnown(t *testing.T) {
	r := newLazy(t)
	top := pull(t.Context(), t, r, "1", bootstrapOf(t, "x"), labelReference, "registry.example/app:1")
	r.daemon.setDown(errors.New("it has a cold"))
	if _, err := r.Prepare(t.Context(), "a", top); err == nil {
		t.Fatal("a container without a daemon")
	}
	if images, err := r.Images(t.Context()); err != nil || len(images) != 1 || images[0].Mounted || !strings.Contains(images[0].Failure, "it has a cold") {
		t.Errorf("images %+v, %v", images, err)
	}
	r.daemon.setDown(nil)
	if _, err := r.Prepare(t.Context(), "a", top); err != nil {
		t.Fatal(err)
	}
	if images, err := r.Images(t.Context()); err != nil || !images[0].Mounted || images[0].Failure != "" {
		t.Errorf("images %+v, %v", images, err)
	}
}
