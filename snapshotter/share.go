package snapshotter

import (
	"cmp"
	"errors"
	"io/fs"
	"os"
	"slices"
	"sync"
)

// shares knows which snapshots have which images, and which images have which blobs. What
// several have counts for the oldest of them: for the same one whoever asks first, and after a
// restart too. The records on the disk and the daemon's are the truth; nothing else is stored.
type shares struct {
	mu      sync.Mutex          // guards what follows
	records map[string]record   // by snapshot: of those that exist
	blobs   map[string][]string // by record.key: as the daemon calls them; none: never asked
	stale   map[string]bool     // by record.key: mounted since it was asked
}

func newShares() *shares {
	return &shares{records: map[string]record{}, blobs: map[string][]string{}, stale: map[string]bool{}}
}

// readShares reads the records of all snapshots. Those that are damaged count nothing: who wants
// such an image is told.
func (s *Snapshotter) readShares() error {
	entries, err := os.ReadDir(s.path(snapshotsDir))
	if err != nil {
		return err
	}
	for _, e := range entries {
		r, err := readRecord(s.path(snapshotsDir, e.Name()))
		if err == nil {
			s.shares.put(e.Name(), r)
		} else if !errors.Is(err, fs.ErrNotExist) {
			s.log.Warn("usage of an image is not known", "snapshot", e.Name(), "err", err)
		}
	}
	return nil
}

// put says that a snapshot has an image.
func (h *shares) put(id string, r record) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.records[id] = r
}

// mounted says that an image is mounted: its blobs may have other names now. Until that has been
// asked the old ones count.
func (h *shares) mounted(r record) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.stale[r.key()] = true
}

// drop forgets a snapshot: what counted for it counts for others now.
func (h *shares) drop(id string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	r, ok := h.records[id]
	if !ok {
		return
	}
	delete(h.records, id)
	for _, other := range h.records {
		if other.key() == r.key() {
			return
		}
	}
	delete(h.blobs, r.key())
	delete(h.stale, r.key())
}

// setBlobs says what the blobs of an image are that a snapshot has.
func (h *shares) setBlobs(key string, ids []string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, r := range h.records {
		if r.key() == key {
			h.blobs[key] = ids
			delete(h.stale, key)
			return
		}
	}
}

// unasked returns an image for each whose blobs are not known.
func (h *shares) unasked() (list []record) {
	h.mu.Lock()
	defer h.mu.Unlock()
	seen := map[string]bool{}
	for _, r := range h.records {
		if _, known := h.blobs[r.key()]; (!known || h.stale[r.key()]) && !seen[r.key()] {
			seen[r.key()] = true
			list = append(list, r)
		}
	}
	return list
}

// hasImage reports whether what an image has for itself counts for the snapshot id.
func (h *shares) hasImage(id string) bool {
	return h.oldest(id, func(mine, r record) bool { return r.key() == mine.key() })
}

// hasBlob reports whether a blob of its image counts for the snapshot id.
func (h *shares) hasBlob(id, blob string) bool {
	return h.oldest(id, func(mine, r record) bool {
		return r.key() == mine.key() || r.Domain == mine.Domain && slices.Contains(h.blobs[r.key()], blob)
	})
}

// oldest reports whether id exists and no older snapshot has the same.
func (h *shares) oldest(id string, same func(mine, other record) bool) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	mine, ok := h.records[id]
	if !ok {
		return false
	}
	for other, r := range h.records {
		if older(other, id) && same(mine, r) {
			return false
		}
	}
	return true
}

// older reports whether the snapshot a was made before b: numbers go up.
func older(a, b string) bool {
	return cmp.Or(cmp.Compare(len(a), len(b)), cmp.Compare(a, b)) < 0
}
