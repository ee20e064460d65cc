package blobmgr

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestJoin(t *testing.T) {
	for name, tc := range map[string]struct{ in, want []units }{
		"none":      {nil, nil},
		"empty":     {[]units{{3, 3}, {5, 4}}, nil},
		"touching":  {[]units{{4, 6}, {1, 4}}, []units{{1, 6}}},
		"inside":    {[]units{{1, 9}, {2, 3}}, []units{{1, 9}}},
		"separated": {[]units{{7, 8}, {1, 2}}, []units{{1, 2}, {7, 8}}},
	} {
		t.Run(name, func(t *testing.T) {
			got := join(tc.in)
			if len(got) == 0 {
				got = nil
			}
			if d := cmp.Diff(tc.want, got, cmp.AllowUnexported(units{})); d != "" {
				t.Error(d)
			}
		})
	}
}

func TestFind(t *testing.T) {
	l := &locality{files: []fileRun{{first: 2, last: 4}, {first: 4, last: 5}, {first: 9, last: 12}}}
	for u, want := range map[int]int{0: -1, 1: -1, 2: 0, 3: 0, 4: 1, 5: -1, 8: -1, 9: 2, 11: 2, 12: -1} {
		if got := l.find(u); got != want {
			t.Errorf("unit %d: got file %d, want %d", u, got, want)
		}
	}
}
