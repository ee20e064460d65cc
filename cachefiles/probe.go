package cachefiles

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
)

// probeTag keeps the probe's cache apart from ours.
const probeTag = "erofsd-probe"

// Supported reports whether a cache in dir can be served, restarts included: it
// opens the device (an empty path means [DevicePath]), binds a scratch directory
// there, tries restore and ends it all. It needs CAP_SYS_ADMIN in the initial
// user namespace. The error is a *kernel.UnsupportedError that names the one
// missing thing when the kernel or dir's file system cannot do it; any other
// error means that it could not be tried, as when another daemon has the device.
func Supported(device, dir string) error {
	d, err := Open(device)
	if err != nil {
		return err
	}
	if err := probe(d, dir); err != nil {
		return fmt.Errorf("probe %s: %w", feature, err)
	}
	return nil
}

// probe tries d in a directory below dir, and closes it.
func probe(d *Device, dir string) (err error) {
	defer func() { err = errors.Join(err, d.Close()) }()
	dir, err = filepath.Abs(dir)
	if err != nil {
		return err
	}
	scratch, err := os.MkdirTemp(dir, ".erofsd-probe-*")
	if err != nil {
		return err
	}
	defer func() {
		// The kernel lets go of the directory when the device is closed.
		err = errors.Join(err, d.Close(), os.RemoveAll(scratch))
	}()
	if err := d.Bind(BindOptions{Dir: scratch, Tag: probeTag}); err != nil {
		return err
	}
	return d.Restore()
}
