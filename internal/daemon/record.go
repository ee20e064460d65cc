package daemon

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/erofsd/erofsd/backend"
	"github.com/erofsd/erofsd/internal/api"
	"github.com/erofsd/erofsd/internal/config"
)

// Suffixes of the files in root/images; an imageKey is before them.
const (
	bootSuffix   = ".boot" // the private copy of the bootstrap
	recordSuffix = ".json" // its record
)

// An imageKey names an image: the same bootstrap in another domain is another image.
type imageKey struct {
	domain string // empty: the default one
	id     string // sha256 of the bootstrap, hex, or the name that it was bound with
}

// ownDomain is what an imageKey has for the domain_id of a request.
func ownDomain(id string) string {
	if id == defaultDomain {
		return ""
	}
	return id
}

// compareKeys orders keys.
func compareKeys(a, b imageKey) int {
	return cmp.Or(cmp.Compare(a.domain, b.domain), cmp.Compare(a.id, b.id))
}

// String is the key as a part of file names.
func (k imageKey) String() string {
	if k.domain == "" {
		return k.id
	}
	return k.domain + "," + k.id
}

func parseImageKey(s string) imageKey {
	if domain, id, ok := strings.Cut(s, ","); ok {
		return imageKey{domain, id}
	}
	return imageKey{id: s}
}

// A record is what is kept of an image while its cache is: where its blobs come from,
// so that a later daemon can go on with it, and what belongs to it. It has no
// credentials. Its file's time of modification is when the image was last used.
type record struct {
	Label     string           `json:"label"`
	Digest    string           `json:"digest,omitempty"` // sha256 of the bootstrap, hex; empty: the image's id is
	Host      string           `json:"host,omitempty"`   // of the registry
	Repo      string           `json:"repository,omitempty"`
	PlainHTTP bool             `json:"plain_http,omitempty"`
	CAFile    string           `json:"ca_file,omitempty"`
	BlobDir   string           `json:"blob_dir,omitempty"`
	Sizes     map[string]int64 `json:"sizes,omitempty"` // of stored blobs
	Layer     string           `json:"layer,omitempty"` // file name of the kept bootstrap layer
	Pinned    bool             `json:"pinned,omitempty"`
	Entry     json.RawMessage  `json:"entry,omitempty"` // config.BlobEntry without credentials, of an image that has a configuration
	Blobs     []string         `json:"blobs"`           // as the cache calls them
}

// file returns the path of one of k's files.
func (d *Daemon) file(k imageKey, suffix string) string {
	return filepath.Join(d.o.Root, "images", k.String()+suffix)
}

// writeRecord keeps what src is and that img was used now.
func (d *Daemon) writeRecord(img *image, src *source) error {
	r := src.record
	r.Pinned = r.Pinned || d.pinned(img.key, img.digest)
	if src.config != nil {
		var err error
		if r.Entry, err = recordEntry(img.key, src.boot, *src.config); err != nil {
			return err
		}
	}
	r.Blobs = []string{}
	for _, v := range img.devices {
		r.Blobs = append(r.Blobs, v.blob.ID())
	}
	return d.writeRecordFile(img.key, r)
}

// pinned reports whether the image k with this bootstrap was pinned before: it stays so
// until somebody says otherwise ([Daemon.Pin]).
func (d *Daemon) pinned(k imageKey, digest string) bool {
	r, err := d.readRecord(k)
	return err == nil && r.Pinned && r.digest(k) == digest
}

// writeRecordFile makes r the record of k.
func (d *Daemon) writeRecordFile(k imageKey, r record) error {
	p, err := json.Marshal(r)
	if err != nil {
		return err
	}
	if err := writeFile(d.imageDir, k.String()+recordSuffix, p); err != nil {
		return fmt.Errorf("keep record of image: %w", err)
	}
	return nil
}

// digest returns the sha256 of the bootstrap of k, whose record r is.
func (r record) digest(k imageKey) string { return cmp.Or(r.Digest, k.id) }

// readRecord returns the record of k; fs.ErrNotExist when none is kept.
func (d *Daemon) readRecord(k imageKey) (record, error) {
	var r record
	p, err := d.imageDir.ReadFile(k.String() + recordSuffix)
	if err == nil {
		err = json.Unmarshal(p, &r)
	}
	if err != nil {
		return r, fmt.Errorf("read record of image %s: %w", k, err)
	}
	return r, nil
}

// used notes that k was in use until now.
func (d *Daemon) used(k imageKey) {
	now := time.Now()
	if err := d.imageDir.Chtimes(k.String()+recordSuffix, now, now); err != nil && !errors.Is(err, fs.ErrNotExist) {
		d.log.Warn("note when an image was used", "image", k.id, "err", err)
	}
}

// recorded returns the source of an image that is kept.
func (d *Daemon) recorded(k imageKey) (*source, error) {
	boot := d.file(k, bootSuffix)
	r, err := d.readRecord(k)
	if errors.Is(err, fs.ErrNotExist) {
		r = record{Label: boot}
	} else if err != nil {
		return nil, err
	}
	if err := checkBootstrap(boot, r.digest(k)); err != nil {
		return nil, err
	}
	src := &source{key: k, digest: r.digest(k), boot: boot, label: r.Label, record: r}
	if src.config, err = d.recordedConfig(k, r); err != nil {
		return nil, err
	}
	if src.config != nil {
		src.origin, err = d.stores.image(*src.config)
		return src, err
	}
	if r.Host == "" {
		src.store = d.stores.directory(r.BlobDir)
		return src, nil
	}
	reg, err := d.stores.registry(api.MountRequest{PlainHTTP: r.PlainHTTP, CAFile: r.CAFile})
	if err != nil {
		return nil, err
	}
	src.store, src.repo = reg.blobs, backend.Ref{Host: r.Host, Repository: r.Repo}
	return src, nil
}

// recordedConfig returns the configuration of k: as it is bound, which may have been with
// another login after it was opened; as a predecessor handed it over; or as the record r has
// it, without credentials. Nil: there is none.
func (d *Daemon) recordedConfig(k imageKey, r record) (*config.Image, error) {
	if b := d.bound(k); b != nil {
		d.mu.Lock()
		defer d.mu.Unlock()
		c := b.config
		return &c, nil
	}
	if c, ok := d.remembered[k]; ok {
		return &c, nil
	}
	if len(r.Entry) == 0 {
		return nil, nil
	}
	e, _, err := config.ParseBlobEntry(r.Entry)
	if err != nil {
		return nil, fmt.Errorf("read record of image %s: %w", k, err)
	}
	return &e.Image, nil
}

// recordEntry is what a record has of c.
func recordEntry(k imageKey, boot string, c config.Image) (json.RawMessage, error) {
	c.Backend = c.Backend.WithoutCredentials()
	return config.BlobEntry{Type: "bootstrap", ID: k.id, DomainID: k.domain, Image: c, Bootstrap: boot}.MarshalState()
}

// checkBootstrap compares a bootstrap with its id: a crash may have torn it.
func checkBootstrap(name, id string) error {
	f, err := os.Open(name)
	if err != nil {
		return fmt.Errorf("open bootstrap: %w", err)
	}
	defer f.Close()
	got, err := bootstrapID(f)
	if err != nil {
		return err
	}
	if got != id {
		return fmt.Errorf("bootstrap %s is damaged: its digest is %s", name, got)
	}
	return nil
}

// reacquire opens an image that an earlier daemon had open.
func (d *Daemon) reacquire(ctx context.Context, k imageKey) (*image, *source, error) {
	src, err := d.recorded(k)
	if err != nil {
		return nil, nil, err
	}
	img, err := d.acquire(ctx, src)
	return img, src, err
}
