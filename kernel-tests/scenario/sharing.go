package scenario

import (
	"testing"

	"golang.org/x/sys/unix"

	"github.com/erofsd/erofsd/internal/testenv"
)

func sharing() []Scenario {
	return []Scenario{{"shared-blob", sharedBlob}}
}

// sharedBlob mounts two images whose data are the same blob. In one domain the second
// costs only its bootstrap; in another one it shares nothing.
func sharedBlob(t *testing.T, r Row) {
	const name, otherName = "shared", "shared-too"
	one := r.images.get(t, name, sharedTree)
	other := r.images.get(t, otherName, func() *tree {
		tr := sharedTree()
		tr.add("one more", unix.S_IFLNK, 0o777, testenv.TreeEntry{Target: "nowhere"})
		return tr
	})
	s := r.images.serve(t)
	m := r.start(t, config{})
	point, fs := m.mount(t, s.request(name))
	compare(t, one.list, fs)
	first := m.image(t, point)
	before := s.blob(t, first)

	point, fs = m.mount(t, s.request(otherName))
	compare(t, other.list, fs)
	second := m.image(t, point)
	if second.ID == first.ID || second.Blobs[0].ID != first.Blobs[0].ID {
		t.Fatalf("want two images with the same blob, got %+v and %+v", first, second)
	}
	if after := s.blob(t, second); after != before {
		t.Errorf("in the same domain: %+v, before the second image %+v", after, before)
	}

	q := s.request(otherName)
	q.DomainID = "elsewhere"
	point, fs = m.mount(t, q)
	compare(t, other.list, fs)
	if i := m.image(t, point); i.BytesFetched != first.BytesFetched || s.blob(t, i).Bytes <= before.Bytes {
		t.Errorf("in another domain: %+v, before it %+v, fetched %d bytes", s.blob(t, i), before, i.BytesFetched)
	}
}

func sharedTree() *tree {
	tr := newTree(seed)
	tr.file("random", tr.random(3*chunkSize/2), 0o644, nil)
	tr.file("text", tr.text(chunkSize+1), 0o644, nil)
	return tr
}
