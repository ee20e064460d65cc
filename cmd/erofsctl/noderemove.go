package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"strings"
)

// remove undoes install. What containerd knows of the snapshotter it could neither use nor
// remove afterwards, so there must be nothing.
func (n node) remove(ctx context.Context) error {
	const snapshots = "var/lib/containerd/io.containerd.snapshotter.v1.erofsd/snapshots"
	entries, err := fs.ReadDir(n.host.FS(), snapshots)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("look for snapshots: %w", err)
	}
	if len(entries) > 0 {
		return fmt.Errorf("containerd has %d snapshots in /%s: first remove the containers and images that use them by containerd (crictl rm, crictl rmi)", len(entries), snapshots)
	}
	if err := n.removeDropIn(ctx); err != nil {
		return err
	}
	if _, err := n.host.Stat(strings.TrimPrefix(filepath.Join(nodeUnits, snapshotterUnit), "/")); err == nil {
		if _, err := n.systemctl(ctx, "disable", "--now", snapshotterUnit, daemonUnit); err != nil {
			return err
		}
	}
	if err := n.discardAll(); err != nil {
		return err
	}
	_, err = n.systemctl(ctx, "daemon-reload")
	return err
}

// removeDropIn has containerd no longer look for the snapshotter.
func (n node) removeDropIn(ctx context.Context) error {
	if n.dropIn == "" {
		return nil
	}
	there, err := n.discard(n.dropIn)
	if err == nil && there && n.restart {
		_, err = n.systemctl(ctx, "restart", "containerd.service")
	}
	return err
}

// discardAll removes what placeAll wrote. The cache stays.
func (n node) discardAll() error {
	var paths []string
	for _, unit := range []string{daemonUnit, snapshotterUnit} {
		dir := filepath.Join(nodeUnits, unit+".d")
		paths = append(paths, filepath.Join(dir, dropInName), dir, filepath.Join(nodeUnits, unit))
	}
	for _, name := range []string{"token", "ca.crt", "kubeconfig", ""} {
		paths = append(paths, filepath.Join(nodeAccount, name))
	}
	for _, name := range []string{"erofsd.toml", "containerd-erofsd.toml"} {
		paths = append(paths, filepath.Join(nodeConfigs, name))
	}
	for _, name := range nodePrograms {
		paths = append(paths, filepath.Join(n.bin, name))
	}
	var errs []error
	for _, path := range paths {
		_, err := n.discard(path)
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}
