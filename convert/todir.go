package convert

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

const (
	bootstrapName = "image.boot"
	blobsName     = "blobs"
)

// ConvertToDir converts src like [Convert] and stores it in the directory dir,
// which is made when it is missing: image.boot and blobs/<sha256>. Files appear
// there under their names only when they are complete and on the disk, the
// bootstrap last; a former image.boot is replaced, other blobs are left alone.
// On an error dir is as it was.
func ConvertToDir(ctx context.Context, src, dir string, o Options) (_ *Result, err error) {
	made, err := makeDirs(filepath.Join(dir, blobsName))
	defer func() {
		if err != nil {
			made.undo()
		}
	}()
	if err != nil {
		return nil, err
	}
	stage, err := os.MkdirTemp(dir, ".convert-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(stage) // before made.undo
	img, err := build(ctx, src, stage, true, o)
	if err != nil {
		return nil, fmt.Errorf("convert %s: %w", src, err)
	}
	if err := img.install(ctx, dir); err != nil {
		return nil, fmt.Errorf("store image in %s: %w", dir, err)
	}
	return &img.result, nil
}

// install moves the files from the staging directory to their names.
func (img *image) install(ctx context.Context, dir string) (err error) {
	var added []string
	defer func() {
		if err != nil {
			for _, name := range added {
				os.Remove(name)
			}
		}
	}()
	blobs := filepath.Join(dir, blobsName)
	for _, b := range img.blobs {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		name := filepath.Join(blobs, b.entry.ID)
		_, statErr := os.Lstat(name)
		if err := os.Rename(b.path, name); err != nil {
			return err
		}
		if errors.Is(statErr, fs.ErrNotExist) {
			added = append(added, name)
		}
	}
	if err := syncDir(blobs); err != nil {
		return err
	}
	if err := os.Rename(img.bootstrap, filepath.Join(dir, bootstrapName)); err != nil {
		return err
	}
	added = nil // the image is there, whatever happens now
	return syncDir(dir)
}

func syncDir(name string) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Sync()
}

// madeDirs are directories that were made, outermost first.
type madeDirs []string

// makeDirs makes the directory name and those above it.
func makeDirs(name string) (madeDirs, error) {
	var missing madeDirs
	for d := filepath.Clean(name); ; d = filepath.Dir(d) {
		if _, err := os.Stat(d); !errors.Is(err, fs.ErrNotExist) {
			break // there, or MkdirAll will say what is wrong
		}
		missing = append(madeDirs{d}, missing...)
	}
	return missing, os.MkdirAll(name, 0o755)
}

// undo removes the directories again; one that is not empty stays.
func (m madeDirs) undo() {
	for i := len(m) - 1; i >= 0; i-- {
		os.Remove(m[i])
	}
}
