package nydusd

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"

	"github.com/erofsd/erofsd/internal/api"
)

// An image is one that nydusd was told of. It is a record in a directory of its own, where
// nydusd keeps its files for it too.
type image struct {
	ID       string `json:"id"`
	DomainID string `json:"domain_id,omitempty"`
	FSID     string `json:"fsid"` // nydusd's name of it
	// Domain is the kernel's name of what it has of the image: FSID, or another one while
	// what an earlier nydusd served is still used.
	Domain string   `json:"domain"`
	Blobs  []string `json:"blobs"`

	// Alive: the nydusd that answers now serves what is mounted of it. It is known once the
	// image is bound.
	Alive bool     `json:"-"`
	bound *binding // to the nydusd that answers now, by this process; nil: it is not
	life  int      // of images, when this was known
}

// mount describes a mount of the image.
func (i image) mount(point string, w way) api.Mount {
	return api.Mount{Mountpoint: point, ID: i.ID, DomainID: i.DomainID, Source: i.FSID, Transport: w.name()}
}

// secrets are what of the image nobody is told.
func (i image) secrets() []string {
	if i.bound == nil {
		return nil
	}
	return i.bound.origin.secrets()
}

type imageKey struct{ domainID, id string }

// fsidOf is nydusd's name of an image: the digest of its bootstrap, unless the image is kept
// apart from others with that.
func fsidOf(k imageKey) string {
	if k.domainID == "" {
		return k.id
	}
	sum := sha256.Sum256([]byte(k.domainID + "/" + k.id))
	return hex.EncodeToString(sum[:])
}

// images are all that nydusd was told of and that were not removed.
type images struct {
	dir string

	mu    sync.Mutex // guards what follows
	known map[imageKey]image
	life  int // how many nydusds were found
}

const recordName = "image.json"

// openImages reads the records in dir. What is no record any more is one of a removal or a
// beginning that was cut short, and goes.
func openImages(dir string) (*images, error) {
	s := &images{dir: dir, known: map[imageKey]image{}}
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return s, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read what nydusd was told of: %w", err)
	}
	for _, e := range entries {
		var i image
		text, err := os.ReadFile(filepath.Join(dir, e.Name(), recordName))
		if err == nil && json.Unmarshal(text, &i) == nil && i.FSID == e.Name() {
			s.known[imageKey{i.DomainID, i.ID}] = i
			continue
		}
		if err := os.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
			return nil, fmt.Errorf("remove what is left of an image: %w", err)
		}
	}
	return s, nil
}

// get returns an image. One that is not known is api.NotFound.
func (s *images) get(k imageKey) (image, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	i, ok := s.known[k]
	if !ok {
		return i, api.NotFound(fmt.Errorf("image %s is not bound", k.id))
	}
	return i, nil
}

// obtain returns an image, a new one if it is not known.
func (s *images) obtain(k imageKey) image {
	s.mu.Lock()
	defer s.mu.Unlock()
	if i, ok := s.known[k]; ok {
		return i
	}
	return image{ID: k.id, DomainID: k.domainID, FSID: fsidOf(k), Domain: fsidOf(k), life: s.life}
}

// all returns all images.
func (s *images) all() (list []image) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, i := range s.known {
		list = append(list, i)
	}
	return list
}

// put writes the record of an image, and remembers it.
func (s *images) put(i image) error {
	dir := filepath.Join(s.dir, i.FSID)
	text, err := json.Marshal(i)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(s.work(i), 0o700); err != nil {
		return fmt.Errorf("remember image %s: %w", i.ID, err)
	}
	name := filepath.Join(dir, recordName)
	if err := errors.Join(os.WriteFile(name+".new", text, 0o600), os.Rename(name+".new", name)); err != nil {
		return fmt.Errorf("remember image %s: %w", i.ID, err)
	}
	s.set(i)
	return nil
}

// set remembers an image whose record is as it was. What was found out about it is not true
// of another nydusd than that which answered when it was got.
func (s *images) set(i image) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if i.life != s.life {
		i.Alive, i.bound, i.life = false, nil, s.life
	}
	s.known[imageKey{i.DomainID, i.ID}] = i
}

// remove forgets an image, with all that nydusd keeps for it in its directory.
func (s *images) remove(i image) error {
	if err := os.RemoveAll(filepath.Join(s.dir, i.FSID)); err != nil {
		return fmt.Errorf("forget image %s: %w", i.ID, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.known, imageKey{i.DomainID, i.ID})
	return nil
}

// begin has none of the images alive or bound.
func (s *images) begin() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.life++
	for k, i := range s.known {
		i.Alive, i.bound, i.life = false, nil, s.life
		s.known[k] = i
	}
}

// work is where nydusd keeps files of an image.
func (s *images) work(i image) string { return filepath.Join(s.dir, i.FSID, "work") }
