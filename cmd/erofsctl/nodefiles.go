package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/erofsd/erofsd/erofs"
	"github.com/erofsd/erofsd/fanotify"
)

// place writes a file of the node, whole or not at all, and reports whether it was another
// one before.
func (n node) place(path string, data []byte, mode fs.FileMode) (changed bool, err error) {
	name := strings.TrimPrefix(filepath.Clean(path), "/")
	old, err := n.host.ReadFile(name)
	if err == nil && bytes.Equal(old, data) {
		return false, nil
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return false, fmt.Errorf("install %s: %w", path, err)
	}
	if err := n.host.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		return false, fmt.Errorf("install %s: %w", path, err)
	}
	if err := n.replace(name, data, mode); err != nil {
		return false, fmt.Errorf("install %s: %w (on a read-only file system choose another directory: --bin)", path, err)
	}
	fmt.Fprintln(n.out, "installed", path)
	return true, nil
}

// replace renames a new file over name: a program that runs cannot be written to, and a
// machine that loses its power has the old one or the new.
func (n node) replace(name string, data []byte, mode fs.FileMode) (err error) {
	fresh := filepath.Join(filepath.Dir(name), "."+filepath.Base(name)+".new")
	f, err := n.host.OpenFile(fresh, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, mode)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	err = errors.Join(err, f.Chmod(mode), f.Sync(), f.Close())
	if err == nil {
		err = n.host.Rename(fresh, name)
	}
	if err != nil {
		return errors.Join(err, n.host.Remove(fresh))
	}
	return nil
}

// discard removes a file of the node, and reports whether it was there.
func (n node) discard(path string) (there bool, err error) {
	err = n.host.Remove(strings.TrimPrefix(filepath.Clean(path), "/"))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return true, fmt.Errorf("remove %s: %w", path, err)
	}
	fmt.Fprintln(n.out, "removed", path)
	return true, nil
}

// maxConfig bounds files that are read whole; programs are larger than all others.
const maxConfig = 1 << 30

// read reads a file of the pod.
func read(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, maxConfig))
}

// systemctlOf returns what runs the node's systemctl, in the node's root directory. It talks
// to systemd by a socket below /run, so no process of the pod has to enter the node's
// namespaces.
func systemctlOf(host *os.Root) func(ctx context.Context, args ...string) (string, error) {
	return func(ctx context.Context, args ...string) (string, error) {
		cmd := exec.CommandContext(ctx, "/usr/bin/systemctl", args...)
		cmd.Dir = "/"
		// Without it systemctl would take the directory for an image of a system and only pretend.
		cmd.Env = []string{"SYSTEMD_IGNORE_CHROOT=1", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C"}
		cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: host.Name()}
		out, err := cmd.CombinedOutput()
		said := strings.TrimSpace(string(out))
		if err != nil {
			return said, fmt.Errorf("systemctl %s: %w: %s", strings.Join(args, " "), err, said)
		}
		return said, nil
	}
}

// ableFanotify says what the kernel lacks to serve images whose cache is on the file system
// of dir.
func ableFanotify(dir string) error {
	dir, remove, err := scratch(dir)
	if err != nil {
		return err
	}
	defer remove()
	return errors.Join(fanotify.Supported(dir), erofs.Supported(dir))
}
