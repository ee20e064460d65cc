package snapshotter

import (
	"fmt"
	"slices"
	"testing"

	"github.com/erofsd/erofsd/internal/api"
)

// TestSharedUsage counts blobs that images have in common once, for the oldest, whoever is asked
// for first, also after a restart, and when that goes for the next.
func TestSharedUsage(t *testing.T) {
	r := newLazy(t)
	r.daemon.usages = map[string]api.Usage{}
	var tops []string
	base := map[string]int64{}
	for i, blobs := range [][]string{{"a", "b"}, {"b", "c"}, {"c", "a"}} {
		boot := bootstrapOf(t, fmt.Sprint("image ", i))
		top := pull(t.Context(), t, r, fmt.Sprint(i), boot)
		u, err := r.Usage(t.Context(), top)
		if err != nil {
			t.Fatal(err)
		}
		tops, base[top] = append(tops, top), u.Size
		prepare(t, r.Snapshotter, fmt.Sprint("c", i), top)
		images, err := r.Images(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, image := range images {
			if image.Name == top {
				r.daemon.usages[keyOf("", image.ID)] = usageOf(blobs...)
			}
		}
	}
	check := func(when string, want map[string]int64) {
		t.Helper()
		order := slices.Clone(tops)
		for range 2 {
			slices.Reverse(order)
			for _, top := range order {
				u, err := r.Usage(t.Context(), top)
				if err != nil || u.Size-base[top] != want[top] {
					t.Errorf("%s: %s counts %d, %v; want %d", when, top, u.Size-base[top], err, want[top])
				}
			}
		}
	}
	all := map[string]int64{tops[0]: 1110, tops[1]: 10000 + 10, tops[2]: 10}
	check("asked at once", all)
	r.restart(t)
	check("after a restart", all)
	for _, key := range []string{"c0", tops[0]} {
		if err := r.Remove(t.Context(), key); err != nil {
			t.Fatal(err)
		}
	}
	tops = tops[1:]
	check("without the oldest", map[string]int64{tops[0]: 11010, tops[1]: 110})
}

// usageOf is that of an image with blobs of 100, 1 000 and 10 000 bytes, and 10 for itself.
func usageOf(blobs ...string) api.Usage {
	u := api.Usage{Disk: 10}
	for _, b := range blobs {
		size := map[string]int64{"a": 100, "b": 1000, "c": 10000}[b]
		u.Disk += size
		u.Blobs = append(u.Blobs, api.BlobUsage{ID: b, Disk: size})
	}
	return u
}
