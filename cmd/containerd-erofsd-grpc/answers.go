package main

import (
	"context"
	"encoding/base64"
	"path/filepath"

	"github.com/erofsd/erofsd/internal/api"
	"github.com/erofsd/erofsd/internal/keychain"
	"github.com/erofsd/erofsd/internal/nydusd"
	"github.com/erofsd/erofsd/snapshotter"
)

// An answerer is who answers at the daemon's socket: erofsd by its API, or a nydusd by its
// own.
type answerer interface {
	snapshotter.Mounter
	Version(ctx context.Context) (api.VersionInfo, error)
	Cache(ctx context.Context) (api.Cache, error)
	Upgrade(ctx context.Context, r api.UpgradeRequest) error
}

// newNydusd returns what a nydusd at c's socket would be talked to by.
func (c config) newNydusd() (*nydusd.Daemon, error) {
	return nydusd.New(nydusd.Options{Socket: c.Daemon.Socket, Dir: filepath.Join(c.Root, "nydusd"), Login: dockerLogin})
}

// dockerLogin is a login of docker's in nydusd's form, which does not ask docker itself.
func dockerLogin(ctx context.Context, host string) (auth, token string, err error) {
	l, err := keychain.Docker{}.Copy(ctx, host)
	switch {
	case err != nil || l.Empty():
		return "", "", err
	case l.Username == "":
		return "", l.Password, nil
	}
	return base64.StdEncoding.EncodeToString([]byte(l.Username + ":" + l.Password)), "", nil
}

// is returns who answered last.
func (d *daemon) is() answerer {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.answerer
}

// title is what people call who answered last.
func (d *daemon) title() string {
	if d.is() == d.erofsd {
		return "erofsd"
	}
	return "nydusd"
}

func (d *daemon) setAnswerer(a answerer) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.answerer = a
}

// Mount is snapshotter.Mounter's, as are those that follow.
func (d *daemon) Mount(ctx context.Context, r api.MountRequest) (api.Mount, error) {
	return d.is().Mount(ctx, r)
}

func (d *daemon) Unmount(ctx context.Context, r api.UnmountRequest) error {
	return d.is().Unmount(ctx, r)
}

func (d *daemon) UnbindImage(ctx context.Context, r api.ImageRequest) error {
	return d.is().UnbindImage(ctx, r)
}

func (d *daemon) Remove(ctx context.Context, r api.RemoveRequest) error {
	return d.is().Remove(ctx, r)
}

func (d *daemon) Prefetch(ctx context.Context, r api.PrefetchRequest) error {
	return d.is().Prefetch(ctx, r)
}

func (d *daemon) Usage(ctx context.Context, r api.ImageRequest) (api.Usage, error) {
	return d.is().Usage(ctx, r)
}

// Version asks who answers what runs, as those that follow ask without waiting for one.
func (d *daemon) Version(ctx context.Context) (api.VersionInfo, error) { return d.is().Version(ctx) }

// Cache is the answerer's.
func (d *daemon) Cache(ctx context.Context) (api.Cache, error) { return d.is().Cache(ctx) }

// Upgrade is the answerer's.
func (d *daemon) Upgrade(ctx context.Context, r api.UpgradeRequest) error {
	return d.is().Upgrade(ctx, r)
}
