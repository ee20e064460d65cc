package snapshotter

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"

	"github.com/erofsd/erofsd/internal/failpoint"
)

// A record is what the daemon knows an image as. It lies in the directory of the snapshot
// with the bootstrap, and is there before the daemon hears of the image; so what removes
// the directory knows what to take back.
type record struct {
	Image     string `json:"image"` // sha256 of the bootstrap
	Domain    string `json:"domain,omitempty"`
	Reference string `json:"reference,omitempty"` // it was pulled by; "": not known
}

// key is the same for images that are one to the daemon.
func (r record) key() string { return r.Domain + "/" + r.Image }

const (
	recordFile = "image.json"
	maxRecord  = 64 << 10 // bytes
)

// readRecord reads the record in the directory of a snapshot; fs.ErrNotExist: none.
func readRecord(dir string) (r record, err error) {
	name := filepath.Join(dir, recordFile)
	f, err := os.Open(name)
	if err != nil {
		return r, err
	}
	defer f.Close()
	if err := json.NewDecoder(io.LimitReader(f, maxRecord)).Decode(&r); err != nil || r.Image == "" {
		return r, fmt.Errorf("%s is damaged (%w); remove it", name, err)
	}
	return r, nil
}

// write makes r durable in dir.
func (r record) write(dir string) (err error) {
	text, err := json.Marshal(r)
	if err != nil {
		return err
	}
	tmp, err := os.CreateTemp(dir, recordFile+"-*")
	if err != nil {
		return err
	}
	_, err = tmp.Write(text)
	if err = errors.Join(err, tmp.Sync(), tmp.Close()); err == nil {
		failpoint.Hit("snapshotter.record")
		err = os.Rename(tmp.Name(), filepath.Join(dir, recordFile))
	}
	if err != nil {
		return errors.Join(fmt.Errorf("write %s: %w", recordFile, err), os.Remove(tmp.Name()))
	}
	failpoint.Hit("snapshotter.recorded")
	return syncDir(dir)
}

// A Scope says which images share the blobs that they have in common.
type Scope string

const (
	ScopeAll       Scope = "all"       // all
	ScopeNamespace Scope = "namespace" // those that a namespace was the first to use
	ScopeImage     Scope = "image"     // none
)

// domain is the daemon's name of the scope in which an image shares its blobs.
func (s *Snapshotter) domain(ctx context.Context, image string) string {
	switch s.scope {
	case ScopeImage:
		return "image-" + image
	case ScopeNamespace:
		if ns, err := namespaces.NamespaceRequired(ctx); err == nil {
			return "namespace-" + ns
		}
	}
	return "" // the daemon's own
}

// bootstrapPaths are where a bootstrap layer has the bootstrap, the usual place first.
func bootstrapPaths() []string { return []string{"image/image.boot", "image.boot"} }

// bootstrap opens the bootstrap in the layer of a snapshot. Nothing of the layer leads out of it.
func (s *Snapshotter) bootstrap(id string) (f *os.File, err error) {
	root, err := os.OpenRoot(s.upper(id))
	if err != nil {
		return nil, err
	}
	defer root.Close()
	for _, name := range bootstrapPaths() {
		st, err := root.Lstat(name)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err == nil && !st.Mode().IsRegular() {
			err = fmt.Errorf("%s is no regular file", name)
		}
		if err != nil {
			return nil, fmt.Errorf("bootstrap layer: %w: %w", err, errdefs.ErrFailedPrecondition)
		}
		return root.Open(name)
	}
	return nil, fmt.Errorf("bootstrap layer: it has no %s: %w", bootstrapPaths()[0], errdefs.ErrFailedPrecondition)
}

// bootstrapDigest returns the digest of the bootstrap in the layer of a snapshot.
func (s *Snapshotter) bootstrapDigest(id string) (string, error) {
	f, err := s.bootstrap(id)
	if err != nil {
		return "", err
	}
	defer f.Close()
	sum := sha256.New()
	if _, err := io.Copy(sum, f); err != nil {
		return "", err
	}
	return hex.EncodeToString(sum.Sum(nil)), nil
}
