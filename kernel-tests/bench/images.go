package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/erofsd/erofsd/erofs"
	"github.com/erofsd/erofsd/internal/api"
	"github.com/erofsd/erofsd/kernel-tests/harness"
)

// images measures what the daemon keeps for each further image that is not open
// yet: as many small images as mountCount, which share nothing.
func images(ctx context.Context, b *bench) (err error) {
	made, table, err := b.smallImages(ctx)
	if err != nil {
		return err
	}
	var before, after int64
	err = b.lazily(ctx, b.localImage(), []string{"--no-completion"}, func(d *harness.Daemon, dir string) error {
		if before, err = d.Memory("VmRSS"); err != nil {
			return err
		}
		for i, r := range made {
			r.Mountpoint = filepath.Join(filepath.Dir(dir), fmt.Sprint("image", i))
			if err := os.Mkdir(r.Mountpoint, 0o755); err != nil {
				return err
			}
			if _, err := d.Mount(ctx, r); err != nil {
				return err
			}
		}
		after, err = d.Memory("VmRSS")
		return err
	})
	if err != nil {
		return err
	}
	b.add(row{
		Name: "daemon RSS per further new image", Value: float64(after-before) / float64(len(made)) / 1024,
		Unit: "KiB", Limit: 64 + float64(table)/1024, LimitOn: "value",
		Reference: float64(table) / 1024, ReferenceIs: "its chunk table",
	})
	return nil
}

// smallImages converts a part of the root file system again and again, each time
// with another first file, so that no two blobs are the same. table is the length
// of a chunk table in bytes. It is done once.
func (b *bench) smallImages(ctx context.Context) (made []api.MountRequest, table int64, err error) {
	if b.small != nil {
		return b.small, b.smallTable, nil
	}
	top, err := b.dir()
	if err != nil {
		return nil, 0, err
	}
	tree := filepath.Join(top, "tree")
	source := filepath.Join(filepath.Dir(b.tar), "tree", "usr/lib/python3.11/encodings")
	if out, err := exec.CommandContext(ctx, "cp", "-r", source, tree).CombinedOutput(); err != nil {
		return nil, 0, fmt.Errorf("copy %s: %w: %s", source, err, out)
	}
	for i := range mountCount {
		if err := os.WriteFile(filepath.Join(tree, "0"), fmt.Appendln(nil, "image", i), 0o644); err != nil {
			return nil, 0, err
		}
		dir := filepath.Join(top, fmt.Sprint(i))
		out, err := exec.CommandContext(ctx, filepath.Join(b.bin, "erofsctl"), "convert", tree, dir).CombinedOutput()
		if err != nil {
			return nil, 0, fmt.Errorf("erofsctl convert: %w: %s", err, out)
		}
		made = append(made, api.MountRequest{Bootstrap: filepath.Join(dir, "image.boot"), BlobDir: filepath.Join(dir, "blobs")})
	}
	if table, err = chunkTableLen(made[0].Bootstrap); err != nil {
		return nil, 0, err
	}
	b.small, b.smallTable = made, table
	return made, table, nil
}

func chunkTableLen(bootstrap string) (int64, error) {
	f, err := os.Open(bootstrap)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return 0, err
	}
	m, err := erofs.Open(f, st.Size())
	if err != nil {
		return 0, err
	}
	if m.RAFS() == nil {
		return 0, errors.New("not a RAFS image: " + bootstrap)
	}
	return m.RAFS().ChunkTableLen, nil
}
