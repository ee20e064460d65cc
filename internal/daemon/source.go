package daemon

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"syscall"

	"github.com/opencontainers/go-digest"

	"github.com/erofsd/erofsd/blobmgr"
	"github.com/erofsd/erofsd/internal/api"
	"github.com/erofsd/erofsd/internal/chunk"
	"github.com/erofsd/erofsd/internal/config"
)

// maxBootstrap bounds a bootstrap: nydusd's own limit.
const maxBootstrap = 2 << 30

// A source is where an image comes from: its bootstrap, copied into our own
// directory so that nobody changes it under the kernel, and the store of its blobs.
type source struct {
	key    imageKey
	digest string            // of the bootstrap
	boot   string            // path of the private copy
	label  string            // what the user named
	origin                   // of the blobs
	bound  bool              // the origin is a binding's, and closed with that
	tables map[string][]byte // chunk tables that came with the bootstrap, by blob id
	record record            // what is kept of it
	config *config.Image     // as the user gave it; nil: by MountRequest alone. It may hold credentials
}

// resolve gets the bootstrap that r names.
func (d *Daemon) resolve(ctx context.Context, r mountRequest) (*source, error) {
	switch {
	case r.Reference != "":
		return d.resolveReference(ctx, r.MountRequest)
	case r.Image != "":
		return d.resolveBound(imageKey{ownDomain(r.DomainID), r.Image})
	}
	f, err := openRegular(r.Bootstrap)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	src := &source{
		label: r.Bootstrap, config: r.config, key: imageKey{domain: r.DomainID},
		record: record{Label: r.Bootstrap, BlobDir: r.BlobDir, Pinned: r.Pinned},
	}
	if src.config == nil && r.BlobDir == "" && d.o.Default.Backend.Type != "" {
		src.config = &d.o.Default
	}
	if src.config == nil {
		src.origin = origin{store: d.stores.directory(r.BlobDir)}
	} else if src.origin, err = d.stores.image(*src.config); err != nil {
		return nil, api.BadRequest(err)
	}
	if err = d.openBootstrap(f, src); err == nil && src.boot == "" {
		err = d.keepBootstrap(f, src)
	}
	return src, err
}

// resolveBound returns the source of a bound image.
func (d *Daemon) resolveBound(k imageKey) (*source, error) {
	d.mu.Lock()
	b := d.bindings[k]
	if b == nil || b.left {
		d.mu.Unlock()
		return nil, api.NotFound(fmt.Errorf("image %s is not bound", k))
	}
	src := *b.src
	d.mu.Unlock()
	src.bound = true
	src.tables = d.sideTables(b)
	return &src, nil
}

// openBootstrap makes src's bootstrap the copy of f that an open image has, if there is
// one. Writing one again would make every further mount wait for the disk.
func (d *Daemon) openBootstrap(f io.ReadSeeker, src *source) error {
	id, err := bootstrapID(f)
	if err != nil {
		return err
	}
	key := imageKey{src.key.domain, id}
	d.mu.Lock()
	_, open := d.images[key]
	d.mu.Unlock()
	if open {
		src.key, src.digest, src.boot = key, id, d.file(key, bootSuffix)
		return nil
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return fmt.Errorf("read bootstrap: %w", err)
	}
	return nil
}

// bootstrapID returns the id of the image whose bootstrap r is.
func bootstrapID(r io.Reader) (string, error) {
	sum := sha256.New()
	if _, err := io.Copy(sum, io.LimitReader(r, maxBootstrap)); err != nil {
		return "", fmt.Errorf("read bootstrap: %w", err)
	}
	return hex.EncodeToString(sum.Sum(nil)), nil
}

// keepBootstrap copies src's bootstrap into the daemon's directory under the name
// of its digest. An older copy is replaced: after a crash it may be torn.
func (d *Daemon) keepBootstrap(r io.Reader, src *source) error {
	tmp, sum, err := d.copyBootstrap(r)
	if err != nil {
		return err
	}
	src.key.id, src.digest = sum, sum
	src.boot = d.file(src.key, bootSuffix)
	if b := d.bound(src.key); b != nil && b.digest != sum {
		return errors.Join(errOtherBootstrap, os.Remove(tmp))
	}
	if err := os.Rename(tmp, src.boot); err != nil {
		return errors.Join(fmt.Errorf("keep bootstrap: %w", err), os.Remove(tmp))
	}
	return nil
}

// partPattern is how files in root/images are called until they are whole.
const partPattern = "part-*"

// removeParts removes what a daemon that died left half made in dir. Nobody else may work
// there.
func removeParts(dir string) error {
	entries, err := os.ReadDir(dir)
	errs := []error{err}
	for _, e := range entries {
		if part, _ := path.Match(partPattern, e.Name()); part && path.Ext(e.Name()) == "" { // else an image is called like that
			errs = append(errs, os.Remove(filepath.Join(dir, e.Name())))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("remove what an earlier daemon left half made: %w", err)
	}
	return nil
}

// copyBootstrap copies r into a new file of the daemon's directory and returns its
// name and its sha256.
func (d *Daemon) copyBootstrap(r io.Reader) (name, sum string, err error) {
	tmp, err := os.CreateTemp(filepath.Join(d.o.Root, "images"), partPattern)
	if err != nil {
		return "", "", fmt.Errorf("keep bootstrap: %w", err)
	}
	hash := sha256.New()
	n, err := io.Copy(io.MultiWriter(tmp, hash), io.LimitReader(r, maxBootstrap+1))
	if err = errors.Join(err, tmp.Close()); err == nil && n > maxBootstrap {
		err = api.BadRequest(fmt.Errorf("it is larger than %d bytes", maxBootstrap))
	}
	if err != nil {
		return "", "", errors.Join(fmt.Errorf("keep bootstrap: %w", err), os.Remove(tmp.Name()))
	}
	return tmp.Name(), hex.EncodeToString(hash.Sum(nil)), nil
}

// openRegular opens the bootstrap at an absolute path.
func openRegular(name string) (*os.File, error) {
	// Without waiting: it may be a FIFO.
	f, err := os.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, api.BadRequest(fmt.Errorf("open bootstrap: %w", err))
	}
	if st, err := f.Stat(); err != nil || !st.Mode().IsRegular() {
		return nil, errors.Join(api.BadRequest(fmt.Errorf("bootstrap %s is not a regular file", name)), err, f.Close())
	}
	return f, nil
}

// blob turns a blob table entry into what blobmgr opens.
func (s *source) blob(e chunk.Entry, digests []blobmgr.ChunkDigest) blobmgr.Source {
	ref := s.repo
	ref.Digest, ref.Size = digest.NewDigestFromEncoded(digest.SHA256, e.ID), s.record.Sizes[e.ID]
	src := blobmgr.Source{
		Entry: e, Domain: s.key.domain, Store: s.store, Ref: ref, LocalTable: s.tables[e.ID], Digests: digests,
		Prefetch: s.prefetch, Mirrored: s.mirrored,
	}
	if e.Features&chunk.FeatureSeparate != 0 {
		src.MetaRef = s.repo
		src.MetaRef.Digest = digest.NewDigestFromEncoded(digest.SHA256, hex.EncodeToString(e.MetaBlobDigest[:]))
		src.MetaRef.Size = e.MetaBlobSize
	}
	return src
}
